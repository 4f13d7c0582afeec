# SPDX-License-Identifier: Apache-2.0
"""What a clip is given: masks and latents in Wan's layout, and the picture sizes that fit a model.

A condition is float32 [B,T,h,w,4+z]: 4 channels of mask, then latents.  Channel k of latent frame j
is 1 where pixel frame 4j + k - 3 is given; the first latent frame stands for one pixel frame, four
times.
Does not own: what a method does with a condition.
Source: Wan-Video/Wan2.1: wan/image2video.py, wan/first_last_frame2video.py; Wan-Video/Wan2.2:
wan/textimage2video.py, wan/utils/utils.py.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import jax.numpy as jnp
import numpy as np

from lvjax.core.errors import InputError
from lvjax.core.shapes import expect
from lvjax.nn.embed import cell_waves

MASK = 4  # mask channels per latent frame: one per pixel frame, all four for the first

FILLS = ("latent", "position", "pixel")
"""What may stand for frames that are not given: see `condition`."""


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of a clip: the first latent frame stands for one, the others for four each."""
    return 1 + MASK * (latent_frames - 1)


def given_frames(available: int, overlap: int) -> int:
    """How many of the last pixel frames of a start the first clip is given: at most what `overlap`
    latent frames stand for, and 1 + 4m of them, or none.
    """
    most = min(available, pixel_frames(overlap))
    return most - (most - 1) % MASK if most else 0


def frame_mask(latent_frames: int, first, last=0):
    """The mask of a clip by latent frame, bool [..., T, 4]: the `first` pixel frames are given and
    the `last` ones, each a number or an int32 array [...].
    """
    total = pixel_frames(latent_frames)
    pixel = np.arange(total, dtype=np.int32)[(None,) * np.ndim(first)]
    first, last = (n if hasattr(n, "shape") else np.int32(n) for n in (first, last))
    given = (pixel < first[..., None]) | (pixel >= total - last[..., None])
    return given[..., np.maximum(np.arange(1 - MASK, total), 0).reshape(-1, MASK)]


def first_condition(encode: Callable, source, size, *, fill: str = "latent", overlap: int = 2):
    """The condition of the first clip.

    source: an image [B,H,W,3], a video [B,P,H,W,3] to continue (its last 1 + 4 (overlap - 1) frames
    are given, fewer when it is shorter), both in [-1,1], or None for nothing given.  size, fill: as
    in `condition`.
    """
    if source is None:
        return condition(encode, None, size, fill)
    if source.ndim == 4:
        source = source[:, None]
    expect(source, "B P H W C", "image or video", B=size[0], C=3)
    given = given_frames(source.shape[1], overlap)
    return condition(encode, source[:, source.shape[1] - given :], size, fill)


def condition(
    encode: Callable,
    frames,
    size: tuple[int, int, int, int, int],
    fill: str = "latent",
    last=None,
):
    """The condition of a clip of which pixel frames are given, float32 [B,T,h,w,4+z].

    frames: the first ones, [B,1+4m,H,W,3] in [-1,1], or None for nothing given.  size: (B,T,h,w,z)
    of the clip's latents.  last: the last one, [B,H,W,3], or None; only with fill "pixel".
    fill: latents of what is not given; "latent", "position": see `blank`; "pixel": mid-grey frames
    encoded with the given ones as one clip (Wan's image-to-video habit).
    Raises: InputError for an unknown fill, "pixel" without frames, `last` without "pixel", or more
    frames than the clip has.
    """
    if fill not in FILLS or (fill == "pixel" and frames is None):
        raise InputError(
            f"fill={fill!r} cannot be used here; choose 'latent' or 'position', or 'pixel' with "
            "frames given"
        )
    if last is not None and fill != "pixel":
        raise InputError(f"a last frame is given with fill={fill!r}; it needs fill='pixel'")
    b, t, h, w, z = size
    given, total = 0 if frames is None else frames.shape[1], pixel_frames(t)
    if given + (last is not None) > total:
        which = f"{given} frames" if last is None else f"{given} frames and a last one"
        raise InputError(f"{which} are given, the clip has {total}; give fewer")
    latents = jnp.zeros((b, 0, h, w, z), jnp.float32)
    if fill == "pixel":
        latents = encode(_among_grey(frames, last, total))
    elif given:
        latents = encode(frames)
    expect(latents, "B T H W C", "condition latents", B=b, H=h, W=w, C=z)
    rest = (b, t - latents.shape[1], h, w, z)
    rest = jnp.broadcast_to(blank(fill, rest[2:]), rest)
    latents = jnp.concatenate([latents.astype(jnp.float32), rest], axis=1)
    return with_mask(frame_mask(t, given, last is not None), latents)


def start_condition(encode: Callable, frames, size: tuple[int, int, int, int, int]):
    """The condition of a clip that begins as a noised video: its latents, of which none is given.

    frames: the whole clip, [B,P,H,W,3] in [-1,1].  size: as in `condition`.
    Raises: InputError when the video is not as long as the clip.
    """
    b, t, h, w, z = size
    expect(frames, "B P H W C", "video", B=b, P=pixel_frames(t), C=3)
    latents = encode(frames)
    expect(latents, "B T H W C", "video latents", B=b, T=t, H=h, W=w, C=z)
    return with_mask(frame_mask(t, 0), latents.astype(jnp.float32))


def _among_grey(frames, last, total: int):
    """A clip of `total` pixel frames, mid-grey (zero) where nothing is given."""
    tail = [] if last is None else [last[:, None]]
    grey = total - frames.shape[1] - len(tail)
    padded = jnp.pad(frames, ((0, 0), (0, grey), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([padded, *tail], axis=1)


def with_mask(mask, latents):
    """A condition: the mask, bool [T,4] or [B,T,4], of every cell, then latents [B,T,h,w,z]."""
    mask = jnp.asarray(mask)[..., None, None, :].astype(latents.dtype)
    mask = jnp.broadcast_to(mask, (*latents.shape[:-1], MASK))
    return jnp.concatenate([mask, latents], axis=-1)


def blank(fill: str, size: tuple[int, int, int]):
    """Latents float32 [h, w, z] of a frame that is not given, where no picture stands for it.

    "latent": zeros.  "position": `cell_waves`, so that a token of pure noise knows its place;
    rotary positions are relative and tell it nothing.
    """
    return jnp.asarray(cell_waves(*size)) if fill == "position" else jnp.zeros(size, jnp.float32)


def known(condition):
    """Which latents are given whole (all four mask channels 1), bool [B,T,h,w,1]."""
    return jnp.min(condition[..., :MASK], axis=-1, keepdims=True) == 1


def pin(latents, condition):
    """Put the latents that are `known` back: sampling and T-RFlow do not reproduce them exactly."""
    return jnp.where(known(condition), condition[..., MASK:], latents)


def frame_timesteps(timestep, condition):
    """What the network is told of each latent frame, float32 [B,T]: 0 where it is `known`.

    timestep: float32 scalar of the others.
    Source: Wan-Video/Wan2.2 (TI2V-5B), by frame instead of by token.
    """
    return jnp.where(known(condition).all(axis=(2, 3, 4)), jnp.float32(0), timestep)


def output_size(image_size: tuple[int, int], max_area: int, unit: int) -> tuple[int, int]:
    """The size of Wan's image-to-video: the picture's shape at `max_area`, each side rounded down.

    image_size and the result: (height, width) in pixels.  unit: pixels that both sides divide by,
    16 (latent cells of 8, in patches of 2).
    In exact arithmetic: the official floats fall below a whole number at times, and make 464x832 of
    a 480x832 picture at its own area.
    Raises: InputError when a side would be shorter than `unit`.
    """
    if min(*image_size, max_area, unit) < 1:
        raise InputError(f"image {image_size}, area {max_area}, unit {unit}; all must be positive")
    shapes = (image_size, image_size[::-1])
    height, width = (math.isqrt(max_area * a // (b * unit**2)) * unit for a, b in shapes)
    if not height or not width:
        raise InputError(
            f"a picture of {image_size[1]}x{image_size[0]} pixels would be {width}x{height} in an "
            f"area of {max_area}; crop it, or give a larger area"
        )
    return height, width


def best_output_size(image_size: tuple[int, int], max_area: int, unit: int) -> tuple[int, int]:
    """The size of Wan 2.2 TI2V: multiples of `unit` within `max_area`, as near as possible to the
    picture's shape.

    One side is rounded down as in `output_size`, the other is as long as the area then allows; of
    these two sizes the one of the better shape, in a tie the one whose height was rounded.
    image_size and the result: (height, width) in pixels.
    Raises: InputError as `output_size`.
    """
    height, width = output_size(image_size, max_area, unit)
    sizes = (height, max_area // height // unit * unit), (max_area // width // unit * unit, width)

    def distortion(size):
        ratio = Fraction(*size) / Fraction(*image_size)
        return max(ratio, 1 / ratio)

    return min(sizes, key=distortion)
