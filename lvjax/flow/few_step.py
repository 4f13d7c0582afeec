# SPDX-License-Identifier: Apache-2.0
"""Sampling in a few steps by predicting the clean latents and adding fresh noise.

Owns: the noise levels of few-step models and their sampler.  ODE solvers are in sampling.py.
Source: guandeh17/Self-Forcing: pipeline/causal_inference.py, utils/scheduler.py; arXiv:2506.08009;
DMD2, arXiv:2405.14867.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.core.errors import InputError
from lvjax.flow.schedule import Schedule, from_sigmas, shifted

STEPS = (1000, 750, 500, 250)


def few_step_schedule(steps=STEPS, shift: float = 5.0) -> Schedule:
    """The levels of listed timesteps after shifting, 0 appended: 1, .9375, .8333, .625, 0 for four
    steps and a shift of 5.

    steps: from 1000, falling, in the unshifted grid.  The network is told 1000 sigma, not rounded.
    Raises: InputError for anything else.
    """
    steps = np.asarray(steps, np.float64)
    if steps.ndim != 1 or not len(steps) or steps[0] != 1000 or steps[-1] <= 0:
        raise InputError(f"steps are {steps.tolist()}; give falling timesteps from 1000, above 0")
    sigmas = np.append(shifted(steps / 1000, shift), 0.0)
    return from_sigmas(sigmas, integer_timesteps=False)


def sample_few(velocity: Callable, draw: Callable, schedule: Schedule, *, aux=None):
    """Denoise and add fresh noise, level by level: x0 = x - s v, then x = (1 - s') x0 + s' noise.

    velocity(x, sigma, timestep, aux) -> (v, aux), as in `flow.sampling.sample`.
    draw(i): float32 noise of step i, a number or int32 []; i = 0 is where the run begins.
    Returns (latents float32, aux).
    """
    levels = np.float32(schedule.sigmas)
    rows = (np.arange(schedule.steps, dtype=np.int32), levels[:-1], levels[1:], schedule.timesteps)

    def step(carry, row):
        x, aux = carry
        i, sigma, after, timestep = row
        v, aux = velocity(x, sigma, timestep, aux)
        clean = x - sigma * v.astype(jnp.float32)
        return ((1 - after) * clean + after * draw(i + 1), aux), None

    start = (levels[0] * draw(0), aux)
    return jax.lax.scan(step, start, jax.tree.map(jnp.asarray, rows))[0]
