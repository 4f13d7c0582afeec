# SPDX-License-Identifier: Apache-2.0
"""What is asked of a model: `Request`, and the checks that need its sizes alone.

Owns: lengths, sizes, timelines and settings that every method shares.  What one method allows
stands in its opening (open_*.py).
"""

from dataclasses import dataclass, replace
from typing import Any

from lvjax.core.errors import InputError, shown
from lvjax.data.captions import check_timeline
from lvjax.rollout.condition import MASK
from lvjax.run.bundle import Bundle
from lvjax.run.defaults import ALLOWED

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
    guidance: float | tuple[float, float] | None = None
    seed: int = 0
    method: str | None = None
    last: Any = None
    strength: float | None = None


def check_bundle(given) -> None:
    """Raises: InputError unless it is a model."""
    if not isinstance(given, Bundle):
        raise InputError(f"the model is {shown(given)}; give what lvjax.load returns")


def frame_count(seconds: float, fps: int) -> int:
    """1 + 4·round(seconds·fps / 4): the frames that F latent frames give.

    Raises: InputError unless seconds is a positive finite number.
    """
    if not 0 < seconds <= MAX_FRAMES / fps:  # false for NaN
        raise InputError(f"seconds is {seconds}; give a positive number up to {MAX_FRAMES / fps:g}")
    return check_frames(1 + MASK * round(seconds * fps / MASK))


def whole_frames(available: int) -> int:
    """The most frames of the form 1 + 4m among those that there are, one at least."""
    return max(1, available - (available - 1) % MASK)


def check_frames(frames: int) -> int:
    """Raises: InputError naming the two nearest counts of the form 1 + 4m."""
    if frames < 1 or frames > MAX_FRAMES or (frames - 1) % MASK:
        near = min(frames, MAX_FRAMES - MASK)
        below = whole_frames(near)
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
        raise InputError(f"seed is {shown(request.seed)}; give a number from 0 to {MAX_SEED - 1}")
    given = {
        "method": d.method if request.method is None else request.method,
        "steps": d.steps if request.steps is None else request.steps,
        "guidance": d.guidance if request.guidance is None else request.guidance,
        "negative": d.negative if request.negative is None else request.negative,
    }
    for name, value in given.items():
        test, words = ALLOWED[name]
        if not test(value):
            raise InputError(f"{name} is {shown(value)}; give {words}")
    if isinstance(given["guidance"], list):
        given["guidance"] = tuple(given["guidance"])
    strength = request.strength
    if strength is not None and not (type(strength) in (int, float) and 0 < strength <= 1):
        raise InputError(f"strength is {shown(strength)}; give a number above 0, at most 1")
    return replace(request, size=size, **given)
