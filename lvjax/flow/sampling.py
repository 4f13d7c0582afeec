# SPDX-License-Identifier: Apache-2.0
"""One sampling run: a scan over noise levels with any solver, optionally truncated (T-RFlow).

`sample` is the whole run.  Its pieces, `prepare`, `begin`, `advance` and `finish`, are for a caller
with something between two steps: another network from some level on, or a transfer of weights.  The
carry holds the solver's history, so that where a run is divided changes nothing.
Also owns: where a run divides (`switch_step`), and starts in the middle (`shortened`, `noised`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.core.errors import InputError
from lvjax.flow.schedule import Schedule
from lvjax.flow.solvers import SOLVERS, Solver
from lvjax.flow.truncated import Window, state_weights, steps_needed


class Sampler(NamedTuple):
    """A solver and its tables for one schedule; host values, to be closed over.

    rows: {name: float32 [n]}, a row for each step that is run.  first_weight: the noise's share of
    T-RFlow's sum, None without a window.
    """

    solver: Solver
    rows: dict[str, Any]
    first_weight: np.float32 | None

    @property
    def steps(self) -> int:
        """Steps that are run."""
        return len(self.rows["sigma"])


class Carry(NamedTuple):
    """What one step hands to the next: x, the state at the next noise level; history of the solver;
    total, T-RFlow's sum so far, or None; aux, the caller's.
    """

    x: jax.Array
    history: Any
    total: jax.Array | None
    aux: Any


def sample(
    velocity: Callable,
    noise,
    schedule: Schedule,
    solver: Solver | str,
    *,
    window: Window | None = None,
    axis: str = "flow",
    aux=None,
):
    """Integrate the flow from noise to data.

    velocity(x, sigma, timestep, aux) -> (v, aux): x, v float32 of the noise's shape; sigma,
    timestep float32 scalars; aux is any pytree, handed from call to call (the past's buffers,
    updated in place).
    noise: float32, the state at schedule.sigmas[0].
    window: None for the whole trajectory, else T-RFlow over (low, high), see truncated.py; only the
    steps up to `high` are run.  Snapshots are the states that the network sees (for UniPC:
    predicted, not yet corrected), linear in between.  axis: "flow" (tau = 1 - sigma) or "index"
    (fraction of steps).
    Returns (latents float32, aux).
    """
    sampler = prepare(schedule, solver, window, axis)
    return finish(advance(sampler, velocity, begin(sampler, noise, aux)))


def prepare(
    schedule: Schedule, solver: Solver | str, window: Window | None = None, axis: str = "flow"
) -> Sampler:
    """The tables of a run; arguments as in `sample`."""
    solver = find_solver(solver)
    n = steps_needed(schedule.sigmas, window, axis)
    rows = {
        "sigma": schedule.sigmas[:-1].astype(np.float32)[:n],
        "timestep": schedule.timesteps[:n],
        "solver": {k: a[:n] for k, a in solver.coefficients(schedule.sigmas).items()},
    }
    if window is None:
        return Sampler(solver, rows, None)
    weights = state_weights(schedule.sigmas, window, axis).astype(np.float32)
    return Sampler(solver, rows | {"weight": weights[1:]}, weights[0])


def begin(sampler: Sampler, noise, aux=None) -> Carry:
    """The carry before the first step; noise and aux as in `sample`."""
    noise = noise.astype(jnp.float32)
    weight = sampler.first_weight
    total = None if weight is None else (1 + weight) * noise
    return Carry(noise, sampler.solver.init(noise), total, aux)


def advance(
    sampler: Sampler, velocity: Callable, carry: Carry, first: int = 0, last: int | None = None
) -> Carry:
    """Run steps first to last - 1, by default all; velocity as in `sample`.

    Raises: InputError unless 0 <= first <= last <= steps.
    """
    last = sampler.steps if last is None else last
    if not 0 <= first <= last <= sampler.steps:
        raise InputError(f"steps {first} to {last} are asked for; this run has {sampler.steps}")
    if first == last:
        return carry

    def step(carry, row):
        v, aux = velocity(carry.x, row["sigma"], row["timestep"], carry.aux)
        with jax.named_scope("solver"):
            x, history = sampler.solver.step(
                carry.history, carry.x, v.astype(jnp.float32), row["solver"]
            )
            total = None if carry.total is None else carry.total + row["weight"] * x
        return Carry(x, history, total, aux), None

    rows = jax.tree.map(lambda a: jnp.asarray(a[first:last]), sampler.rows)
    return jax.lax.scan(step, carry, rows)[0]


def finish(carry: Carry):
    """(latents float32, aux) after the last step."""
    return (carry.x if carry.total is None else carry.total), carry.aux


def switch_step(schedule: Schedule, boundary: float) -> int:
    """The first step of the low-noise expert: whose timestep is below 1000 * boundary.

    The number of steps when no timestep is.
    Source: Wan-Video/Wan2.2, wan/text2video.py.
    """
    return int(np.sum(schedule.timesteps >= 1000 * boundary))


def shortened(schedule: Schedule, strength: float) -> Schedule:
    """The last int(steps * strength) steps of a schedule, for a run that starts from a noised
    video instead of from noise.

    Raises: InputError unless 0 < strength <= 1 and a step is left.
    Source: huggingface/diffusers, pipeline_wan_video2video.py (get_timesteps).
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength={strength}; give a number above 0, at most 1")
    steps = int(schedule.steps * strength)
    if steps == 0:
        raise InputError(f"strength={strength} leaves no step; give 1/{schedule.steps} or more")
    return Schedule(schedule.sigmas[-steps - 1 :], schedule.timesteps[-steps:])


def noised(latents, noise, schedule: Schedule):
    """(1 - s) latents + s noise: the state of a video at the schedule's first noise level s."""
    sigma = schedule.sigmas[0]
    return jnp.float32(1 - sigma) * latents + jnp.float32(sigma) * noise


def find_solver(solver: Solver | str) -> Solver:
    """A solver by name; a `Solver` is returned as it is.

    Raises: InputError listing the known names.
    """
    if isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        raise InputError(f"solver={solver!r} is unknown; choose one of {list(SOLVERS)}")
    return SOLVERS[solver]
