# SPDX-License-Identifier: Apache-2.0
"""The lower threshold of T-RFlow, from one sampling run per prompt and seed.

The upper threshold is chosen by eye, as the largest without artefacts.  The lower one is where the
decoded video of the window [low, high] is as fine, by its average frequency (AF), as that of the
whole trajectory [0, 1].  A run is kept as its states, from which every window follows.
Source: arXiv:2606.22370, section on the thresholds and equation 6.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lvjax.core.errors import InputError, NonFiniteError
from lvjax.flow.schedule import Schedule
from lvjax.flow.trajectory import windowed
from lvjax.lab.metrics import average_frequency
from lvjax.models.vae import decode
from lvjax.rollout.condition import pin, pixel_frames
from lvjax.rollout.method import stream
from lvjax.rollout.traced import traced
from lvjax.run.bundle import Bundle
from lvjax.run.open_error_free import settings
from lvjax.run.request import Request, resolved
from lvjax.run.session import open_session, to_uint8

WIDTH = 0.005  # of the interval in which the threshold is found
_decode = jax.jit(decode, static_argnums=2)


@dataclass(frozen=True)
class Run:
    """One sampling run of a first clip, on the host.

    states: float32 [steps + 1, 1, T, h, w, z], at the schedule's noise levels.  condition: float32
    [1, T, h, w, 4 + z].  target: AF of the video of [0, 1].  keep_dc: see `average_frequency`.
    """

    prompt: str
    seed: int
    schedule: Schedule
    states: np.ndarray
    condition: np.ndarray
    target: float = math.nan
    keep_dc: bool = True


@dataclass(frozen=True)
class Curve:
    """AF by lower threshold.

    high: the upper threshold.  target: AF of [0, 1], float64 [runs].  lows: the grid, increasing;
    af: float64 [lows, runs].  low: where the mean of af crosses that of the target; None when it
    does not.  tried: (low, mean difference) of the bisection.
    """

    high: float
    target: np.ndarray
    lows: np.ndarray
    af: np.ndarray
    low: float | None
    tried: list[tuple[float, float]] = field(default_factory=list)

    @property
    def differences(self) -> np.ndarray:
        """AF of [low, high] less that of [0, 1], mean over the runs, [lows]."""
        return (self.af - self.target).mean(1)

    @property
    def nearest(self) -> float:
        """The low of the grid with the smallest absolute mean difference."""
        return float(self.lows[np.abs(self.differences).argmin()])

    @property
    def crossings(self) -> list[tuple[float, float]]:
        """The neighbours on the grid between which the mean difference changes sign; twice the same
        point where it is 0.
        """
        return list(_crossings(self.lows, self.differences))

    def each(self) -> list[float | None]:
        """Where each run alone crosses its own target first, linear between points of the grid."""
        found = []
        for d in (self.af - self.target).T:
            between = next(_crossings(self.lows, d), None)
            at = [] if between is None else np.searchsorted(self.lows, between)
            found.append(float(np.interp(0, *_rising(d[at], between))) if between else None)
        return found

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            "high": self.high,
            "low": self.low,
            "nearest_on_grid": self.nearest,
            "crossings": self.crossings,
            "lows": self.lows.tolist(),
            "af": self.af.mean(1).tolist(),
            "af_std": self.af.std(1).tolist(),
            "difference": self.differences.tolist(),
            "difference_std": (self.af - self.target).std(1).tolist(),
            "target": float(self.target.mean()),
            "target_of_each": self.target.tolist(),
            "af_of_each": self.af.T.tolist(),
            "low_of_each": self.each(),
            "bisection": self.tried,
        }


def _rising(ends: np.ndarray, between: tuple[float, float]):
    """(xp, fp) for `numpy.interp` at a difference of 0, the differences increasing."""
    order = np.argsort(ends)
    return ends[order], np.array(between)[order]


def _crossings(lows: np.ndarray, differences: np.ndarray) -> Iterator[tuple[float, float]]:
    sign = np.sign(differences)
    for i, low in enumerate(lows):
        if sign[i] == 0:
            yield float(low), float(low)
        elif sign[i] * sign[min(i + 1, len(lows) - 1)] < 0:
            yield float(low), float(lows[i + 1])


def runs(
    bundle: Bundle, requests: list[Request], seeds: list[int], keep_dc: bool = True
) -> Iterator[Run]:
    """The first clip of each request, of one prompt, with each seed; its own seed is not used.

    It is the clip that `generate` makes with that prompt and seed.
    Raises: InputError as `open_session`; NonFiniteError naming prompt and seed.
    """
    for request in requests:
        frames = pixel_frames(bundle.defaults.clip_latents)
        request = replace(request, frames=frames, method="error_free")
        session = open_session(bundle, request)
        chosen = settings(bundle.defaults, resolved(bundle, request))
        method = traced(session.method, chosen.schedule, chosen.solver)
        for seed in seeds:
            own = session.with_key(jax.random.key(seed))
            first = own.state()
            condition = np.asarray(first.condition)
            _, (states, video) = next(stream(method, first, own.clips(0)))
            states, prompt = np.asarray(states), request.timelines[0][0][1]
            run = Run(prompt, seed, chosen.schedule, states, condition, keep_dc=keep_dc)
            if not (np.isfinite(states).all() and np.isfinite(np.asarray(video)).all()):
                raise NonFiniteError(
                    f"the clip of {prompt!r} with seed {seed} is not finite; try another seed, "
                    "fewer steps or less guidance"
                )
            yield replace(run, target=frequency(bundle, run, 0.0, 1.0))


def frequency(bundle: Bundle, run: Run, low: float, high: float) -> float:
    """AF of the decoded video of the window [low, high] of a run."""
    latents = pin(windowed(run.states, run.schedule, (low, high)), run.condition)
    video = _decode(bundle.params["vae"], latents, bundle.vae)
    return average_frequency(np.asarray(to_uint8(video))[0], keep_dc=run.keep_dc)


def check(high: float, grid: int) -> None:
    """Raises: InputError for an upper threshold or a number of lower ones that cannot be."""
    if not 0 < high <= 1:
        raise InputError(f"--high is {high}; give a number above 0, at most 1")
    if not 2 <= grid <= 1000:
        raise InputError(f"--grid is {grid}; give 2 to 1000 lower thresholds")


def tune(
    bundle: Bundle,
    made: list[Run],
    high: float = 0.7,
    grid: int = 14,
    report: Callable[[str], None] = lambda text: None,
) -> Curve:
    """The curve over `grid` lower thresholds from 0 up to `high`, and where it crosses the target.

    Where it crosses several times, the lowest threshold is taken: it leaves out the least.
    Raises: InputError as `check`.
    """
    check(high, grid)
    target = np.array([r.target for r in made])

    def values(low: float) -> np.ndarray:
        found = np.array([frequency(bundle, r, low, high) for r in made])
        report(f"low {low:.4f}: AF {found.mean():.5f}, of [0, 1] {target.mean():.5f}")
        return found

    lows = np.linspace(0, high, grid, endpoint=False)
    af = np.array([values(low) for low in lows])
    curve = Curve(high, target, lows, af, None)
    if not curve.crossings:
        return curve
    between = curve.crossings[0]
    low, tried = _bisect(lambda low: float((values(low) - target).mean()), between, curve)
    return replace(curve, low=low, tried=tried)


def _bisect(difference: Callable[[float], float], between: tuple[float, float], curve: Curve):
    """(the middle of the last interval, what was tried), of a change of sign within `between`."""
    a, b = between
    below = curve.differences[np.searchsorted(curve.lows, a)] < 0
    tried = []
    while b - a > WIDTH:
        middle = (a + b) / 2
        tried.append((middle, difference(middle)))
        a, b = (middle, b) if (tried[-1][1] < 0) == below else (a, middle)
    return (a + b) / 2, tried


def table(curve: Curve) -> str:
    """The curve for people, and what follows from it."""
    high, runs = curve.high, len(curve.target)
    lines = [f"AF of [0, 1]: {curve.target.mean():.5f} (mean of {runs} runs)"]
    lines.append(f"{'low':>6}  {f'AF of [low, {high:g}]':>16}  difference  +- between runs")
    spread = (curve.af - curve.target).std(1)
    for low, af, d, s in zip(curve.lows, curve.af.mean(1), curve.differences, spread, strict=True):
        lines.append(f"{low:6.3f}  {af:16.5f}  {d:+10.5f}  {s:15.5f}")
    if curve.low is None:
        lines.append(
            f"no low gives the AF of [0, 1]; the nearest on the grid is {curve.nearest:.3f}"
        )
    else:
        several = f"; the first of {len(curve.crossings)} crossings" * (len(curve.crossings) > 1)
        lines.append(f"low {curve.low:.3f} gives the AF of [0, 1]{several}")
    own = [x for x in curve.each() if x is not None]
    if own:
        text = f"{np.mean(own):.3f} +- {np.std(own):.3f}"
        lines.append(f"runs alone: {len(own)} of {runs} cross, at low {text}")
    return "\n".join(lines)


def plot(curve: Curve, path: Path) -> None:
    """The curve of each run and their mean, as a PNG file.  Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.lows, curve.af, color="0.8", linewidth=0.8)
    axes.plot(curve.lows, curve.af.mean(1), "o-", label=f"[low, {curve.high:g}]")
    axes.axhline(curve.target.mean(), color="k", linestyle="--", label="[0, 1]")
    if curve.low is not None:
        axes.axvline(curve.low, color="C1", label=f"low = {curve.low:.3f}")
    axes.set(xlabel="low", ylabel="average frequency, cycles per pixel")
    axes.legend()
    figure.savefig(path, dpi=150)
