# SPDX-License-Identifier: Apache-2.0
"""A request from the settings of a command or a config: its files are read, its texts understood.

Does not own: which settings there are (generate.py), what a request may be (run/request.py).
"""

import dataclasses
import re

import numpy as np

from lvjax.core.errors import InputError
from lvjax.data.captions import moment, read_lines
from lvjax.io.image import fit_image, read_image
from lvjax.io.video import read_video
from lvjax.run.bundle import Bundle
from lvjax.run.defaults import Defaults
from lvjax.run.presets import SIZES
from lvjax.run.request import Request, check_frames, check_size, frame_count, spread
from lvjax.run.session import check_settings, frames_for, size_for, span

ALTERNATIVES = (("prompt", "timeline", "prompt_file"), ("seconds", "frames"), ("image", "video"))
SECONDS = 5.0
MAX_VIDEOS = 100_000  # of one run


def make_request(bundle: Bundle, options: dict) -> tuple[Request, list[str]]:
    """A checked request from the settings; and notices about the inputs."""
    for a, b in ALTERNATIVES[1:]:
        if options.get(a) is not None and options.get(b) is not None:
            raise InputError(f"both --{a} and --{b} are given; give one of them")
    d, asked = bundle.defaults, options.get("frames")
    if asked is None and options.get("seconds") is not None:
        asked = frame_count(options["seconds"], d.fps)
    size = options.get("size")
    size = None if size is None else check_size(picture_size(size), bundle)
    request = _plain(options, d, frame_count(SECONDS, d.fps) if asked is None else asked)
    given, notices = None, []
    if options.get("image") is not None:
        image, notices = read_image(options["image"])
        given = image[None]
    if options.get("video") is not None:
        given = _read_start(bundle, request, options["video"])
        if asked is None and (fewer := frames_for(bundle, request, len(given))) != request.frames:
            request, given = _plain(options, d, fewer), given[:fewer]
    if size is None:
        size = d.size if given is None else size_for(bundle, request, given.shape[1:3])
    start = None if given is None else _fitted(given, size)
    last = None
    if options.get("last_image") is not None:
        image, more = read_image(options["last_image"])
        last, notices = fit_image(image, size), list(dict.fromkeys([*notices, *more]))
    request = dataclasses.replace(request, size=size, start=start, last=last)
    check_settings(bundle, request)
    return request, notices


def _plain(options: dict, d: Defaults, frames: int) -> Request:
    """What needs neither a file of pictures nor a size."""
    count = 1 if options.get("num_videos") is None else options["num_videos"]
    if count < 1:
        raise InputError(f"--num-videos is {count}; give 1 or more")
    timelines = _timelines(options, check_frames(frames), d.fps)
    if count * len(timelines) > MAX_VIDEOS:
        raise InputError(
            f"{len(timelines)} prompts with --num-videos {count} are more than {MAX_VIDEOS} "
            "videos; make them in several runs"
        )
    return Request(
        tuple(timeline for timeline in timelines for _ in range(count)),
        frames,
        negative=options.get("negative_prompt"),
        steps=options.get("steps"),
        guidance=_guidance(options.get("guidance")),
        seed=options.get("seed") or 0,
        method=options.get("method"),
        strength=options.get("strength"),
    )


def picture_size(text: str) -> tuple[int, int]:
    """ "WxH", or a name, -> (height, width)."""
    if text in SIZES:
        return SIZES[text]
    found = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", str(text).strip())
    if not found:
        raise InputError(
            f"--size is {text!r}; write WIDTHxHEIGHT, for example 64x64, or one of "
            f"{', '.join(SIZES)}"
        )
    return int(found[2]), int(found[1])


def _guidance(given):
    """A number, or two for (low noise, high noise)."""
    parts = str(given).split(",") if not isinstance(given, (list, tuple)) else given
    if given is None:
        return None
    try:
        scales = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        scales = ()
    if len(scales) not in (1, 2):
        raise InputError(f"--guidance is {given!r}; give a number, or LOW,HIGH for two experts")
    return scales[0] if len(scales) == 1 else scales


def video_frames(bundle: Bundle, request: Request, path, size: tuple[int, int]) -> np.ndarray:
    """The frames of a video that a run starts from, float32 [P, H, W, 3] in [-1, 1] and of 8 bits,
    as the card holds them.

    Raises: InputError when it cannot be read.
    """
    return _fitted(_read_start(bundle, request, path), size)


def _read_start(bundle: Bundle, request: Request, path) -> np.ndarray:
    """The same as they are in the video, uint8 [P, h, w, 3]."""
    end, most = span(bundle, request)
    which = {"last": "max_frames", "first": "first"}[end]
    return read_video(path, fps=bundle.defaults.fps, **{which: most})[0]


def _fitted(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.stack([fit_image(frame, size) for frame in frames])


def _timelines(options: dict, frames: int, fps: int) -> list:
    """One timeline per prompt of a batch, or the one of --prompt / --timeline."""
    given = [k for k in ALTERNATIVES[0] if options.get(k) is not None]
    if len(given) != 1:
        names = " and ".join(f"--{k.replace('_', '-')}" for k in given) or "no prompt"
        raise InputError(f"{names} given; give one of --prompt, --timeline, --prompt-file")
    if given == ["prompt"]:
        return [spread(list(options["prompt"]), frames, fps)]
    lines = read_lines(options[given[0]])
    if given == ["prompt_file"]:
        return [spread([x], frames, fps) for x in lines]
    return [tuple(moment(x, options["timeline"]) for x in lines)]
