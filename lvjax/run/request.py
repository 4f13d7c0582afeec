# SPDX-License-Identifier: Apache-2.0
"""What is asked of a model: `Request`, and the checks that need its sizes alone.

Owns: lengths, sizes, timelines and settings that every method shares.  What one method allows
stands in its opening (open_*.py).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from lvjax.core.errors import InputError
from lvjax.methods import METHODS
from lvjax.rollout.condition import MASK
from lvjax.run.bundle import Bundle

MAX_FRAMES = 10_000_000
MAX_SIDE = 16384  # of an encoded picture
MAX_SEED = 2**32


@dataclass(frozen=True)
class Request:
    """One run.  Fields left None take the bundle's defaults.

    timelines: per row of the batch, ((seconds, prompt), ...) in order, the first at 0; see
      `run.timeline`.  negative: one prompt for all rows.
    start: None, an image float32 [H, W, 3] or the last frames of a video [P, H, W, 3], in [-1, 1],
      of the run's size; with [B, P, H, W, 3] each row has its own.
    last: None, or an image [H, W, 3] that the video ends with.  strength: with start frames, how
      much of them a model changes that makes a video of a video, 0 to 1.
    frames: pixel frames of the result, 1 + 4m.  seed: row b of clip i draws from
      fold_in(fold_in(key(seed), b), i).
    """

    timelines: tuple[tuple[tuple[float, str], ...], ...]
    frames: int
    negative: str | None = None
    start: Any = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    method: str | None = None
    last: Any = None
    strength: float | None = None


def frame_count(seconds: float, fps: int) -> int:
    """1 + 4·round(seconds·fps / 4): the frames that F latent frames give.

    Raises: InputError unless seconds is a positive finite number.
    """
    if not 0 < seconds <= MAX_FRAMES / fps:  # false for NaN
        raise InputError(f"seconds is {seconds}; give a positive number up to {MAX_FRAMES / fps:g}")
    return check_frames(1 + MASK * round(seconds * fps / MASK))


def check_frames(frames: int) -> int:
    """Raises: InputError naming the two nearest counts of the form 1 + 4m."""
    if frames < 1 or frames > MAX_FRAMES or (frames - 1) % MASK:
        near = min(frames, MAX_FRAMES - MASK)
        below = max(1, near - (near - 1) % MASK)
        raise InputError(
            f"frames is {frames}; it must be 1 + 4m, at most {MAX_FRAMES}: the nearest are "
            f"{below} and {below + MASK}"
        )
    return frames


def check_size(size: tuple[int, int], bundle: Bundle) -> tuple[int, int]:
    """Raises: InputError naming the two nearest sides that the model can make."""
    unit = bundle.vae.spatial_stride * bundle.dit.patch[1]
    for name, n in zip(("height", "width"), size, strict=True):
        if n > MAX_SIDE:
            raise InputError(f"{name} is {n}; a picture of a video has at most {MAX_SIDE}")
        if n < unit or n % unit:
            below = max(unit, n - n % unit)
            raise InputError(
                f"{name} is {n}; it must be a multiple of {unit}: the nearest are {below} and "
                f"{below + unit}"
            )
    return size


def spread(prompts: list[str], frames: int, fps: int) -> tuple[tuple[float, str], ...]:
    """Prompts at equal distances over the video."""
    duration = (frames - 1) / fps
    return tuple((duration * i / len(prompts), p) for i, p in enumerate(prompts))


def check_timeline(timeline) -> None:
    """Raises: InputError for an empty timeline or prompt, a first time other than 0, or times that
    do not increase.
    """
    if not timeline:
        raise InputError(
            "no prompt is given; give at least one, for example --prompt 'the camera pans left'"
        )
    times = [t for t, _ in timeline]
    if not all(isinstance(p, str) and p.strip() for _, p in timeline):
        raise InputError("a prompt is empty; say what happens, for example 'a red circle moves up'")
    if (
        times[0] != 0
        or not all(math.isfinite(t) for t in times)
        or any(a >= b for a, b in zip(times, times[1:], strict=False))
    ):
        raise InputError(f"prompt times are {times}; they must start at 0 and increase")


def resolved(bundle: Bundle, request: Request) -> Request:
    """The request with the model's defaults in place of what it leaves open.

    Raises: InputError with the nearest legal values.
    """
    d = bundle.defaults
    for timeline in request.timelines or ((),):
        check_timeline(timeline)
    check_frames(request.frames)
    size = check_size(tuple(request.size or d.size), bundle)
    if type(request.seed) is not int or not 0 <= request.seed < MAX_SEED:
        raise InputError(f"seed is {request.seed!r}; give a number from 0 to {MAX_SEED - 1}")
    given = {
        "method": d.method if request.method is None else request.method,
        "steps": d.steps if request.steps is None else request.steps,
        "guidance": d.guidance if request.guidance is None else request.guidance,
        "negative": d.negative if request.negative is None else request.negative,
    }
    if given["method"] not in METHODS:
        what = f"method {given['method']!r} is unknown"
        raise InputError(f"{what}; choose one of {sorted(METHODS)}")
    scales = given["guidance"] if isinstance(given["guidance"], tuple) else (given["guidance"],)
    steps = 1 <= given["steps"] <= 1000
    if not steps or not all(math.isfinite(g) and 0 <= g <= 100 for g in scales):
        raise InputError(
            f"steps is {given['steps']}, guidance {given['guidance']}; allowed are 1 to 1000 steps "
            "and a guidance from 0 to 100"
        )
    if request.strength is not None and not 0 < request.strength <= 1:
        raise InputError(f"strength is {request.strength}; give a number above 0, at most 1")
    return replace(request, size=size, **given)
