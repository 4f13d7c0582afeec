# SPDX-License-Identifier: Apache-2.0
"""A clipwise method that shows how its clips came about: every state of every sampling run."""

from jax.tree_util import Partial

from lvjax.core.functional import bound
from lvjax.flow.schedule import Schedule
from lvjax.flow.solvers import Solver
from lvjax.flow.trajectory import trajectory
from lvjax.rollout.clipwise import Clip, ClipModel, ClipState, Knobs, clipwise
from lvjax.rollout.method import Method


def traced(method: Method, schedule: Schedule, solver: Solver | str) -> Method:
    """A method of `clipwise` with the plain sampler in place of its own.

    The network, memory, guidance and noise stay those of the method.  step: `Clip` in; (states
    [steps + 1, B, T, h, w, z], frames [B, P, H, W, 3]) out, see `trajectory`; the states are as the
    sampler leaves them, given latents not `pin`ned.
    """
    (model,), knobs = method.step.args, method.step.func.keywords["knobs"]
    step = bound(_step, knobs=knobs, schedule=schedule, solver=solver)
    return Method(method.init, Partial(step, model))


def _step(
    model: ClipModel,
    state: ClipState,
    clip: Clip,
    *,
    knobs: Knobs,
    schedule: Schedule,
    solver: Solver | str,
):
    kept = []  # of this one call: the step hands a sampler's result on, but not its states

    def sampler(velocity, noise, aux):
        states, aux = trajectory(velocity, noise, schedule, solver, aux=aux)
        kept.append(states)
        return states[-1], aux

    state, (_, frames) = clipwise(model, sampler, knobs).step(state, clip)
    return state, (kept[0], frames)
