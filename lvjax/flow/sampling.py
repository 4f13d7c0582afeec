# SPDX-License-Identifier: Apache-2.0
"""One sampling run: a scan over noise levels with any solver, optionally truncated (T-RFlow)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.core.errors import InputError
from lvjax.flow.schedule import Schedule
from lvjax.flow.solvers import SOLVERS, Solver
from lvjax.flow.truncated import Window, state_weights, steps_needed


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
    solver = find_solver(solver)
    n = steps_needed(schedule.sigmas, window, axis)
    rows = {
        "sigma": schedule.sigmas[:-1].astype(np.float32)[:n],
        "timestep": schedule.timesteps[:n],
        "solver": {k: a[:n] for k, a in solver.coefficients(schedule.sigmas).items()},
    }
    if window is not None:
        weights = state_weights(schedule.sigmas, window, axis).astype(np.float32)
        rows["weight"] = weights[1:]
    noise = noise.astype(jnp.float32)

    def step(carry, row):
        x, history, total, aux = carry
        v, aux = velocity(x, row["sigma"], row["timestep"], aux)
        with jax.named_scope("solver"):
            x, history = solver.step(history, x, v.astype(jnp.float32), row["solver"])
            if window is not None:
                total = total + row["weight"] * x
        return (x, history, total, aux), None

    total = () if window is None else (1 + weights[0]) * noise
    carry = (noise, solver.init(noise), total, aux)
    (x, _, total, aux), _ = jax.lax.scan(step, carry, jax.tree.map(jnp.asarray, rows))
    return (x if window is None else total), aux


def find_solver(solver: Solver | str) -> Solver:
    """A solver by name; a `Solver` is returned as it is.

    Raises: InputError listing the known names.
    """
    if isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        raise InputError(f"solver={solver!r} is unknown; choose one of {list(SOLVERS)}")
    return SOLVERS[solver]
