# SPDX-License-Identifier: Apache-2.0
"""A sampling run with every state kept, so that T-RFlow of any window is read off afterwards.

Does not own: the loop (sampling.py), what a window is (truncated.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.flow.sampling import sample
from lvjax.flow.schedule import Schedule
from lvjax.flow.solvers import Solver
from lvjax.flow.truncated import Window, state_weights


def trajectory(velocity: Callable, noise, schedule: Schedule, solver: Solver | str, *, aux=None):
    """All states of a run that `sample` would do without a window; arguments as there.

    Returns (states float32 [steps + 1, ...], aux): states[i] is at schedule.sigmas[i] and what the
    network sees there, states[-1] the result.
    """
    kept = jnp.zeros((schedule.steps, *noise.shape), jnp.float32)

    def recorded(x, sigma, timestep, aux):
        own, kept, i = aux
        kept = jax.lax.dynamic_update_index_in_dim(kept, x, i, 0)
        v, own = velocity(x, sigma, timestep, own)
        return v, (own, kept, i + 1)

    aux = (aux, kept, jnp.array(0, jnp.int32))
    last, (aux, kept, _) = sample(recorded, noise, schedule, solver, aux=aux)
    return jnp.concatenate([kept, last[None]]), aux


def windowed(states: np.ndarray, schedule: Schedule, window: Window, axis: str = "flow"):
    """What T-RFlow over `window` makes of a run, float32 on the host; no state after the window's
    end matters.

    states: [steps + 1, ...] of `trajectory`.  axis: as in `sample`.
    Raises: InputError as `flow_window`.
    """
    out = np.asarray(states[0], np.float64)
    for weight, state in zip(state_weights(schedule.sigmas, window, axis), states, strict=False):
        if weight:
            out = out + weight * np.asarray(state, np.float64)
    return out.astype(np.float32)
