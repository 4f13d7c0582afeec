# SPDX-License-Identifier: Apache-2.0
"""Truncated rectified flow (T-RFlow): keep only the middle of the sampling trajectory.

With tau = 1 - sigma running from 0 (noise) to 1 (data), the Euler sampler is a weighted mean of
the estimates eps - v_i.  T-RFlow keeps the terms with tau in [a, b] and renormalises.  The sum
telescopes to a secant of the trajectory, which holds for any ODE solver:

    z = z(start) + sigma_start * (z(b) - z(a)) / (b - a)

Nothing after tau = b is needed, so sampling stops early.  Everything here is float64 on the host.
Does not own: the sampling loop (sampling.py).
Source: "Towards Error-Free Long Video Generation", arXiv:2606.22370, equations 1-3; the closed form
is ours.
"""

import math

import numpy as np

from lvjax.core.errors import InputError

AXES = ("flow", "index")
Window = tuple[float, float]


def flow_window(sigmas, window: Window, axis: str = "flow") -> Window:
    """The window in flow time tau = 1 - sigma, clipped to what the schedule covers.

    axis: "flow" when `window` is given in tau, "index" when it is given as fractions of the number
    of steps.
    Raises: InputError when the axis is unknown, the window is not within 0 <= a < b <= 1, or
    nothing of it is left.
    """
    if axis not in AXES:
        raise InputError(f"axis={axis!r} is unknown; choose one of {list(AXES)}")
    a, b = window
    if not 0 <= a < b <= 1:
        raise InputError(f"window={window} must satisfy 0 <= low < high <= 1")
    tau = 1 - np.asarray(sigmas, np.float64)
    if axis == "index":
        a, b = np.interp([a, b], np.linspace(0, 1, len(tau)), tau)
    a, b = max(float(a), float(tau[0])), min(float(b), float(tau[-1]))
    if not a < b:
        raise InputError(
            f"window={window} lies outside the schedule's tau, {tau[0]:.4f} to {tau[-1]:.4f}"
        )
    return a, b


def steps_needed(sigmas, window: Window | None, axis: str = "flow") -> int:
    """How many steps must be run to reach the window's end; all of them without a window."""
    if window is None:
        return len(sigmas) - 1
    _, b = flow_window(sigmas, window, axis)
    return int(np.argmax(1 - np.asarray(sigmas, np.float64) >= b - 1e-12))


def step_weights(sigmas, window: Window, axis: str = "flow") -> np.ndarray:
    """float64 [n]: share of the window that falls into each step; the weights of eps - v_i, summing
    to 1."""
    a, b = flow_window(sigmas, window, axis)
    tau = 1 - np.asarray(sigmas, np.float64)
    overlap = np.minimum(tau[1:], b) - np.maximum(tau[:-1], a)
    return np.maximum(overlap, 0.0) / (b - a)


def _at(tau: np.ndarray, t: float) -> np.ndarray:
    """Weights over the states at `tau` that interpolate linearly at t."""
    i = min(max(int(np.searchsorted(tau, t)) - 1, 0), len(tau) - 2)
    share = (t - tau[i]) / (tau[i + 1] - tau[i])
    weights = np.zeros(len(tau))
    weights[i], weights[i + 1] = 1 - share, share
    return weights


def state_weights(sigmas, window: Window, axis: str = "flow") -> np.ndarray:
    """float64 [steps_needed + 1]: the output is z[0] + sum_i weights[i] z[i] over the states of the
    trajectory."""
    sigmas = np.asarray(sigmas, np.float64)
    a, b = flow_window(sigmas, window, axis)
    weights = (_at(1 - sigmas, b) - _at(1 - sigmas, a)) * (sigmas[0] / (b - a))
    return weights[: steps_needed(sigmas, window, axis) + 1]


def gain(std: float, window: Window) -> float:
    """How much of a Gaussian component of this conditional standard deviation T-RFlow passes (1:
    all of it).

    A part that the condition determines always has gain 1; see the module for the window, here in
    flow time.
    """
    a, b = window
    curve = [math.hypot(t * std, 1 - t) for t in (a, b)]
    return (1 + (curve[1] - curve[0]) / (b - a)) / std
