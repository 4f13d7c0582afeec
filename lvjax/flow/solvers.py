# SPDX-License-Identifier: Apache-2.0
"""Solvers of the flow ODE: data in, data out.

A solver is three functions.  `coefficients` turns noise levels into small tables (float64 on the
host, stored as float32); `init` makes an explicit history; `step` advances one noise level with one
row of the tables.  No solver counts its steps or branches on them; first, last and low-order steps
differ only by their coefficients.

Convention: x_s = (1 - s) x0 + s eps, v = eps - x0, hence x0 = x_s - s v.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Tables = dict[str, np.ndarray]


class Solver(NamedTuple):
    """coefficients(sigmas float64 [n+1]) -> {name: float32 [n]}; init(x) -> history; step(history,
    x, v, row) -> (x at the next level, history), all float32."""

    coefficients: Callable[[np.ndarray], Tables]
    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def _log_snr(sigmas: np.ndarray) -> np.ndarray:
    """log((1 - s) / s), with -inf at 1 and +inf at 0."""
    with np.errstate(divide="ignore"):
        return np.log1p(-sigmas) - np.log(sigmas)


def _tables(steps: int, names: str) -> Tables:
    return {name: np.zeros(steps) for name in names.split()}


def _float32(tables: Tables) -> Tables:
    return {name: a.astype(np.float32) for name, a in tables.items()}


# --- Euler ----------------------------------------------------------------------------------------


def _euler_coefficients(sigmas):
    return _float32({"step": np.diff(sigmas)})


def _euler_step(history, x, v, row):
    return x + row["step"] * v, history


# --- DPM-Solver++ (2M, midpoint, predicts x0) -----------------------------------------------------


def _dpmpp_coefficients(sigmas):
    """x' = keep x + gain (m + slope (m - m_before)); first and last step have slope 0."""
    n, lam = len(sigmas) - 1, _log_snr(sigmas)
    table = _tables(n, "sigma keep gain slope")
    for i in range(n):
        h = lam[i + 1] - lam[i]
        table["sigma"][i] = sigmas[i]
        table["keep"][i] = sigmas[i + 1] / sigmas[i]
        table["gain"][i] = -(1 - sigmas[i + 1]) * np.expm1(-h)
        last = i == n - 1 and sigmas[-1] == 0
        if (
            i and not last
        ):  # at sigma 1 the step before was infinitely long in log SNR: slope h / inf = 0
            table["slope"][i] = h / (2 * (lam[i] - lam[i - 1]))
    return _float32(table)


def _dpmpp_step(before, x, v, row):
    m = x - row["sigma"] * v
    return row["keep"] * x + row["gain"] * (m + row["slope"] * (m - before)), m


# --- UniPC (order 2, bh2, predicts x0, corrector always on) ---------------------------------------


def _unipc_corrector(lam, i: int, order: int) -> tuple[float, float]:
    """Weights (far, near) of m[i-2] - m[i-1] and m[i] - m[i-1] in the corrector of step i."""
    if order == 1:
        return 0.0, 0.5
    h = lam[i] - lam[i - 1]
    r = (lam[i - 2] - lam[i - 1]) / h
    b = np.expm1(-h)
    g = b / -h - 1
    b1, b2 = g / b, 2 * (g / -h - 0.5) / b
    a = (b1 - b2) / (1 - r)
    return a / r, b1 - a


def _unipc_coefficients(sigmas):
    """Corrected X = here x + keep_c X_before + gain_c (m1 + far (m2 - m1) + near (m - m1)); `here`
    is 1 at step 0 only.  Next x = keep_p X + gain_p (m + slope (m1 - m)).  m, m1, m2: predictions
    of x0 now, one and two ago."""
    n, lam = len(sigmas) - 1, _log_snr(sigmas)
    table = _tables(n, "sigma here keep_c gain_c far near keep_p gain_p slope")
    order = [min(2, i + 1) for i in range(n)]
    if n > 0:
        order[-1] = 1
    for i in range(n):
        table["sigma"][i] = sigmas[i]
        if i == 0:
            table["here"][i] = 1.0
        else:
            table["keep_c"][i] = sigmas[i] / sigmas[i - 1]
            table["gain_c"][i] = -(1 - sigmas[i]) * np.expm1(lam[i - 1] - lam[i])
            table["far"][i], table["near"][i] = _unipc_corrector(lam, i, order[i - 1])
        h = lam[i + 1] - lam[i]
        table["keep_p"][i] = sigmas[i + 1] / sigmas[i]
        table["gain_p"][i] = -(1 - sigmas[i + 1]) * np.expm1(-h)
        if order[i] == 2:
            table["slope"][i] = 0.5 * h / (lam[i - 1] - lam[i])
    return _float32(table)


def _unipc_init(x):
    return tuple(jnp.zeros_like(x) for _ in range(3))


def _unipc_step(history, x, v, row):
    before, m1, m2 = history
    m = x - row["sigma"] * v
    correction = m1 + row["far"] * (m2 - m1) + row["near"] * (m - m1)
    fixed = row["here"] * x + row["keep_c"] * before + row["gain_c"] * correction
    ahead = row["keep_p"] * fixed + row["gain_p"] * (m + row["slope"] * (m1 - m))
    return ahead, (fixed, m, m1)


SOLVERS: dict[str, Solver] = {
    "euler": Solver(_euler_coefficients, lambda x: (), _euler_step),
    "dpm++": Solver(_dpmpp_coefficients, jnp.zeros_like, _dpmpp_step),
    "unipc": Solver(_unipc_coefficients, _unipc_init, _unipc_step),
}
