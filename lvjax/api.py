# SPDX-License-Identifier: Apache-2.0
"""The Python face: `load`, `generate`, `stream`, with the argument names that diffusers' users
know.

import jax, lvjax
pocket = lvjax.load("pocket")
video = lvjax.generate(pocket, "the camera pans left over a landscape", num_frames=121,
key=jax.random.key(0))
video.frames[0]   # uint8 [P, H, W, 3]
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lvjax.core.compat import enable_compilation_cache
from lvjax.core.errors import InputError
from lvjax.io.image import fit_image
from lvjax.rollout.clipwise import pixel_frames
from lvjax.run.bundle import Bundle, load
from lvjax.run.job import enlarge
from lvjax.run.session import ClipResult, Request, Session, frame_count, open_session, spread

__all__ = ["Bundle", "ClipResult", "Video", "generate", "load", "prepare", "stream"]


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
        """Write one row as an H.264 MP4, each pixel enlarged to upscale x upscale."""
        from lvjax.io.video import FragmentedWriter

        frames = enlarge(self.frames[row], upscale)
        with FragmentedWriter(path, (frames.shape[2], frames.shape[1]), self.fps, {}) as writer:
            writer.write_clip(frames)


def prepare(
    bundle: Bundle,
    prompt,
    *,
    negative_prompt: str = "",
    image=None,
    video=None,
    num_frames: int | None = None,
    seconds: float | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    method: str = "error_free",
    seed: int = 0,
) -> Session:
    """A run that is ready: its method, first state and clips, for those who drive it themselves.

    prompt: one prompt; a list of prompts, spread evenly over the video; or a timeline [(seconds,
      prompt), ...].  A batch is a
      list of such lists or timelines.
    image: uint8 [H, W, 3], the first frame; it is fitted to the size.  video: uint8 [P, H, W, 3],
      to be continued; not both.
    num_frames (1 + 4m) or seconds; the default is one clip of 17 frames.
    height, width: multiples of the model's unit (64 x 64 for the pocket model by default).
    guidance_scale: 1 means no guidance.  num_inference_steps: of the sampler; T-RFlow stops before
      the last.
    Raises: InputError with the nearest legal values.
    """
    d = bundle.defaults
    if num_frames is not None and seconds is not None:
        raise InputError("both num_frames and seconds are given; give one of them")
    if image is not None and video is not None:
        raise InputError("both image and video are given; give one of them")
    size = tuple(own if n is None else n for n, own in zip((height, width), d.size, strict=True))
    frames = (
        frame_count(seconds, d.fps)
        if seconds is not None
        else pixel_frames(d.clip_latents)
        if num_frames is None
        else num_frames
    )
    start = None if image is None else fit_image(np.asarray(image), size)
    if video is not None:
        start = np.stack(
            [fit_image(f, size) for f in np.asarray(video)[-(1 + 4 * (d.overlap - 1)) :]]
        )
    rows = tuple(_timeline(p, frames, d.fps) for p in _rows(prompt))
    request = Request(
        rows,
        frames,
        negative_prompt,
        start,
        size,
        num_inference_steps,
        guidance_scale,
        seed,
        method,
    )
    return open_session(bundle, request)


def stream(bundle: Bundle, prompt, **options) -> Iterator[ClipResult]:
    """Yield a `ClipResult` per clip while the video is made; memory does not grow.  Options as in
    `prepare`.
    """
    enable_compilation_cache()
    yield from prepare(bundle, prompt, **options).run()


def generate(
    bundle: Bundle,
    prompt,
    *,
    key=None,
    callback: Callable[[ClipResult], None] | None = None,
    **options,
) -> Video:
    """Make a whole video in memory.  Options as in `prepare`.

    key: a typed JAX key instead of `seed`.  callback: called after each clip.
    """
    enable_compilation_cache()
    session = prepare(bundle, prompt, **options)
    if key is not None:
        session = session.with_key(key)
    frames, latents = [], []
    for clip in session.run():
        frames.append(clip.frames)
        latents.append(np.asarray(clip.latents))
        if callback:
            callback(clip)
    return Video(np.concatenate(frames, 1), np.stack(latents), bundle.defaults.fps, session.notices)


def _rows(prompt) -> list:
    """One entry per row of the batch."""
    if isinstance(prompt, str):
        return [prompt]
    prompt = list(prompt)
    batched = bool(prompt) and isinstance(prompt[0], (list, tuple)) and not _is_moment(prompt[0])
    return prompt if batched else [prompt]


def _is_moment(x) -> bool:
    return len(x) == 2 and not isinstance(x[0], str) and isinstance(x[1], str)


def _timeline(prompts, frames: int, fps: int):
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if prompts and not isinstance(prompts[0], str):
        return tuple((float(t), p) for t, p in prompts)
    return spread(prompts, frames, fps)
