# SPDX-License-Identifier: Apache-2.0
"""The Python face: `load`, `generate`, `stream`, LoRAs, with diffusers' argument names.

import jax, lvjax
pocket = lvjax.load("pocket")
video = lvjax.generate(pocket, "the camera pans left", num_frames=121, key=jax.random.key(0))
video.frames[0]   # uint8 [P, H, W, 3]
"""

import dataclasses
import difflib
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lvjax.core.compat import enable_compilation_cache
from lvjax.core.errors import InputError, shown, system_told
from lvjax.io.image import as_image, fit_image
from lvjax.rollout.condition import pixel_frames
from lvjax.run import plan as plans
from lvjax.run.bundle import Bundle, outline, typed
from lvjax.run.defaults import Defaults
from lvjax.run.job import enlarge
from lvjax.run.loras import filled, with_lora, with_strength, without_lora
from lvjax.run.machine import device_memory
from lvjax.run.request import MAX_SIDE, Request, check_bundle, check_size, frame_count, spread
from lvjax.run.selection import with_encoder
from lvjax.run.session import (
    ClipResult,
    Session,
    check_offload,
    check_settings,
    frames_for,
    open_session,
    size_for,
    span,
)
from lvjax.run.weights import weight_bytes

__all__ = [
    "Bundle",
    "ClipResult",
    "Options",
    "Video",
    "generate",
    "load",
    "prepare",
    "stream",
    "with_lora",
    "with_strength",
    "without_lora",
]


@system_told()
def load(
    name: str | Path = "pocket",
    dtype: str | None = None,
    lora=None,
    merge: bool = False,
    offload: str = "auto",
    selection_encoder: str | Path | None = None,
) -> Bundle:
    """A model with its weights.

    name: "pocket", the model inside the package; a folder that lvjax wrote; or a checkpoint, or the
      folder of a whole model, as its publishers or diffusers lay it out.
    dtype: of the activations of the transformer and of a large text encoder, "bfloat16" or
      "float32"; None for what the model says.
    lora, merge: as in `with_lora`; merged here, only the merged weights are in memory.
    offload: where the transformers' weights are kept: "none", on the device; "layers" or "expert",
      in the host's memory, from where `generate` brings them as its own `offload` says; "auto",
      there if they would fill more than half of the device.
    selection_encoder: the folder of a sentence encoder of sentence-transformers, as
      all-MiniLM-L6-v2, by which clips are selected that have similar prompts; None for the model's
      own text encoder.
    Raises: CheckpointError when a file is missing, damaged, or does not match the model's spec;
      and as `with_lora`.
    """
    _check_offload(offload)
    if not isinstance(dtype, str | None):
        raise InputError(f"dtype is {shown(dtype)}; give 'bfloat16', 'float32' or None")
    model = with_encoder(with_lora(typed(outline(name), dtype), lora, merge), selection_encoder)
    if offload == "auto":
        offload = "layers" if 2 * weight_bytes(model) > device_memory() else "none"
    check_offload(offload, model.defaults.method)
    return filled(dataclasses.replace(model, offload=offload))


def _check_offload(offload) -> None:
    if not (isinstance(offload, str) and offload in plans.OFFLOADS):
        raise InputError(f"offload is {shown(offload)}; give one of {list(plans.OFFLOADS)}")


@dataclass(frozen=True)
class Video:
    """frames: uint8 [B, P, H, W, 3].  latents: float32 [K, B, T, h, w, z], every clip with the
    frames it was given.  fps: frames per second.

    notices: what the user should know, for instance words that the model does not know.
    """

    frames: np.ndarray
    latents: np.ndarray
    fps: int
    notices: tuple[str, ...] = ()

    def save(self, path, row: int = 0, upscale: int = 1) -> None:
        """Write one row as an H.264 MP4, each pixel enlarged to upscale x upscale.

        Raises: InputError for a row that is not there or an impossible size; StorageError.
        """
        from lvjax.io.video import FragmentedWriter

        most = MAX_SIDE // max(self.frames.shape[2:4])
        for name, n, low, high in (
            ("row", row, 0, len(self.frames) - 1),
            ("upscale", upscale, 1, most),
        ):
            if type(n) is not int or not low <= n <= high:
                raise InputError(f"{name} is {n!r}; give a whole number from {low} to {high}")
        frames = enlarge(self.frames[row], upscale)
        with FragmentedWriter(path, (frames.shape[2], frames.shape[1]), self.fps, {}) as writer:
            writer.write_clip(frames)


ALTERNATIVES = (("num_frames", "seconds"), ("image", "video"), ("seed", "key"))
NUMBERS = (
    (
        ("num_frames", "height", "width", "num_inference_steps", "seed"),
        numbers.Integral,
        "a whole number",
    ),
    (("seconds", "guidance_scale", "guidance_scale_2", "strength"), numbers.Real, "a number"),
)


@dataclass(frozen=True)
class Options:
    """What to make, by the names that diffusers' users know.  All can be left out.

    negative_prompt: what guidance leads away from.
    image: the first frame, fitted to the size: uint8 [H, W, 3], floating point [H, W, 3] in [0, 1],
      or a PIL image.  video: frames to be continued, [P, H, W, 3] or a list, each as `image` may
      be, or to be changed by models that make a video of a video.  Not both.
    last_image: the picture to end with, for models that go from one to another.
    strength: how much of a video is changed, above 0 to 1, for models that make one of another.
    num_frames (1 + 4m) or seconds; the default is one clip: 17 frames of the pocket model, 81 or
      121 of Wan's, fewer where a video is made of one that has fewer.
    height, width: multiples of the model's unit (64 x 64 for the pocket model by default); without
      either, Wan's models give a video the shape of the image or video that it is made of.
    guidance_scale: 1 means no guidance.  guidance_scale_2: that of the low-noise expert of models
      with two.  num_inference_steps: of the sampler; T-RFlow stops before the last.
    method: a name in `lvjax.methods.METHODS`; None for the model's own.
    seed: 0 to 2**32 - 1; or key: one typed JAX key, `jax.random.key(0)` being seed 0.
    offload: where the transformers' weights wait; it changes no number.  "none": on the device;
      "expert": in the host's memory, one transformer comes for its steps; "layers": there too, a
      layer comes at a time; "auto": where they fit.
    """

    negative_prompt: str | None = None
    image: Any = None
    video: Any = None
    last_image: Any = None
    strength: float | None = None
    num_frames: int | None = None
    seconds: float | None = None
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    num_inference_steps: int | None = None
    method: str | None = None
    seed: int | None = None
    key: Any = None
    offload: str = "auto"

    def __post_init__(self):
        for a, b in ALTERNATIVES:
            if getattr(self, a) is not None and getattr(self, b) is not None:
                raise InputError(f"both {a} and {b} are given; give one of them")
        for names, kind, words in NUMBERS:
            for name in names:
                value = getattr(self, name)
                if value is None:
                    continue
                if isinstance(value, bool) or not isinstance(value, kind):
                    raise InputError(f"{name} is {shown(value)}; give {words}")
                plain = int if kind is numbers.Integral else float  # NumPy's own are no JSON
                try:
                    object.__setattr__(self, name, plain(value))
                except OverflowError as e:
                    raise InputError(f"{name} is too large; give {words}") from e
        for name in ("negative_prompt", "method"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"{name} is {shown(value)}; give text")
        _check_offload(self.offload)
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; give a number from 0 to {2**32 - 1}")
        if self.key is not None and not _is_key(self.key):
            what = getattr(self.key, "dtype", type(self.key).__name__)
            raise InputError(
                f"key is {what}{list(getattr(self.key, 'shape', ()))}; give one typed key, for "
                "example jax.random.key(0)"
            )


def _is_key(key) -> bool:
    return isinstance(key, jax.Array) and (
        jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    )


@system_told()
def prepare(bundle: Bundle, prompt, **options) -> Session:
    """A run that is ready: its method, first state and clips, for those who drive it themselves.

    prompt: one prompt; a list of prompts, spread evenly over the video; or a timeline [(seconds,
      prompt), ...].  A batch is a list of such lists or timelines.
    options: the fields of `Options`.
    Raises: InputError with the nearest legal values; DoesNotFitError with settings that fit;
      StorageError where the clips that leave the memory do not fit on the disk.
    """
    check_bundle(bundle)
    names = [f.name for f in dataclasses.fields(Options)]
    if unknown := sorted(set(options) - set(names)):
        near = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.0)
        raise InputError(f"unknown option {unknown[0]!r}; did you mean {near[0]!r}?")
    o = Options(**options)
    request, notices = _request(bundle, prompt, o)
    check_settings(bundle, request)
    work = plans.work_of(request, bundle)
    plan = plans.propose(bundle, work, o.offload)
    plans.check_memory(plan, bundle, work, o.offload)
    plans.check_temporary(plan)
    session = open_session(dataclasses.replace(bundle, offload=plan.offload), request)
    notices = (*bundle.notices, *notices, *session.notices)
    session = dataclasses.replace(session, notices=notices)
    return session if o.key is None else session.with_key(o.key)


def _request(bundle: Bundle, prompt, o: Options) -> tuple[Request, list[str]]:
    """The request that is asked for, with its pictures; and notices about them."""
    d, asked = bundle.defaults, o.num_frames
    if o.seconds is not None:
        asked = frame_count(o.seconds, d.fps)
    request = _plain(prompt, o, d, pixel_frames(d.clip_latents) if asked is None else asked)
    given, notices = [], []
    if o.image is not None:
        picture, notices = as_image(o.image)
        given = [picture]
    if o.video is not None:
        given, notices = _video_frames(o.video, *span(bundle, request))
        if asked is None and (fewer := frames_for(bundle, request, len(given))) != request.frames:
            request, given = _plain(prompt, o, d, fewer), given[:fewer]
    size = check_size(_size(o, bundle, request, given), bundle)
    fitted = [fit_image(picture, size) for picture in given]
    start = np.stack(fitted) if o.video is not None else next(iter(fitted), None)
    last, more = (None, []) if o.last_image is None else as_image(o.last_image, "the last image")
    last = None if last is None else fit_image(last, size)
    request = dataclasses.replace(request, size=size, start=start, last=last)
    return request, list(dict.fromkeys([*notices, *more]))


def _plain(prompt, o: Options, d: Defaults, frames: int) -> Request:
    """What needs neither pictures nor a size."""
    return Request(
        tuple(_timeline(p, frames, d.fps) for p in _rows(prompt)),
        frames,
        negative=o.negative_prompt,
        steps=o.num_inference_steps,
        guidance=_guidance(o, d),
        seed=o.seed or 0,
        method=o.method,
        strength=o.strength,
    )


def _size(o: Options, bundle: Bundle, request: Request, given: list) -> tuple[int, int]:
    """(height, width) as asked for; what is left out as the pictures or else the model have it."""
    own = bundle.defaults.size
    if given and o.height is None and o.width is None:
        own = size_for(bundle, request, given[-1].shape[:2])
    asked = zip((o.height, o.width), own, strict=True)
    return tuple(default if n is None else n for n, default in asked)


def _guidance(o: Options, d: Defaults):
    """The guidance of a request: one number, or (low noise, high noise)."""
    if o.guidance_scale_2 is None:
        return o.guidance_scale
    own = d.guidance[1] if isinstance(d.guidance, tuple) else d.guidance
    return o.guidance_scale_2, own if o.guidance_scale is None else o.guidance_scale


def _video_frames(video, end: str, most: int) -> tuple[list, list[str]]:
    """The "first" or "last" so many frames of a video, each uint8 [h, w, 3]; and notices."""
    frames = isinstance(video, (list, tuple)) or getattr(video, "ndim", 0) > 0
    if not frames or len(video) == 0:
        raise InputError(
            f"video is {type(video).__name__} without frames; give [P, H, W, 3] with P >= 1, or "
            "a list of pictures"
        )
    first = max(0, len(video) - most) if end == "last" else 0
    chosen = video[first : first + most]
    found = [as_image(f, f"video frame {i}") for i, f in enumerate(chosen, first)]
    notices = dict.fromkeys(notice for _, notices in found for notice in notices)
    return [frame for frame, _ in found], list(notices)


def stream(bundle: Bundle, prompt, **options) -> Iterator[ClipResult]:
    """A `ClipResult` per clip while the video is made; memory does not grow.

    prompt, options: as in `prepare`.
    """
    enable_compilation_cache()
    return prepare(bundle, prompt, **options).run()


def generate(
    bundle: Bundle, prompt, *, callback: Callable[[ClipResult], None] | None = None, **options
) -> Video:
    """Make a whole video in memory.

    prompt, options: as in `prepare`.  callback: called after each clip.
    """
    enable_compilation_cache()
    if callback is not None and not callable(callback):
        raise InputError(f"callback is {callback!r}; give a function of a ClipResult")
    session = prepare(bundle, prompt, **options)
    frames, latents = [], []
    for clip in session.run():
        frames.append(clip.frames)
        latents.append(np.asarray(clip.latents))
        if callback is not None:
            callback(clip)
    return Video(np.concatenate(frames, 1), np.stack(latents), bundle.defaults.fps, session.notices)


def _rows(prompt) -> list:
    """One entry per row of the batch."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, (list, tuple)):
        raise InputError(f"prompt is {prompt!r}; give text, a list of texts or a timeline")
    batched = bool(prompt) and isinstance(prompt[0], (list, tuple)) and not _is_moment(prompt[0])
    return list(prompt) if batched else [prompt]


def _is_moment(x) -> bool:
    return len(x) == 2 and not isinstance(x[0], str) and isinstance(x[1], str)


def _timeline(prompts, frames: int, fps: int):
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if prompts and not isinstance(prompts[0], str):
        try:
            return tuple((float(t), p) for t, p in prompts)
        except (TypeError, ValueError) as e:
            raise InputError(f"prompt is {prompts!r}; a timeline is [(seconds, text), ...]") from e
    return spread(prompts, frames, fps)
