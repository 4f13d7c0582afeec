# SPDX-License-Identifier: Apache-2.0
"""Clip by clip: sample against remembered clips, remember, and begin the next with the last frames.

One step is one clip: open the bank, sample, pin what was given, run once at sigma 0 so that the
bank holds clean keys and values, decode, re-encode the last frames as the next clip's condition.
Shapes never depend on the clip.
Owns: the state, the condition layout (Wan's mask of 4 channels per latent frame, then latents),
positions.
Does not own: a model (functions come in), a solver, or which clips are seen (memory/placement.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding
from jax.tree_util import Partial

from lvjax.core.errors import InputError
from lvjax.core.functional import bound
from lvjax.core.mesh import partition
from lvjax.core.shapes import expect
from lvjax.flow.guidance import doubled, guided
from lvjax.memory.cache import KVCache, commit, open_past
from lvjax.nn.embed import cell_waves
from lvjax.rollout.method import Method

MASK = 4  # mask channels per latent frame: one per pixel frame, all four for the first

POSITIONS: dict[str, Callable] = {
    "absolute": lambda frames, next_frame: frames,
    "relative": lambda frames, next_frame: frames - next_frame,
}
"""(latent frames int32 [..., F], first frame of the clip) -> frames to rotate by.  "relative" is
exact at any length."""

FILLS = ("latent", "position", "pixel")
"""What may stand for frames that are not given: see `condition`."""


@struct.dataclass
class ClipState:
    """Everything that one clip hands to the next.

    cache: the bank, batch Bm = B, or 2B with guidance.  condition: float32 [B,T,h,w,4+z], see
    `condition`.
    next_frame: int32 [], latent index of the next clip's first frame.  clip: int32 [], its number.
    key: uint32 [B, 2], key data per row (plain arrays, so that a state can be saved).
    """

    cache: KVCache
    condition: jax.Array
    next_frame: jax.Array
    clip: jax.Array
    key: jax.Array


@struct.dataclass
class Clip:
    """What a clip is given: context (any pytree of the model, batch Bm), slot int32 [B] in the bank
    and visible bool [B, capacity], both per row; without B they hold for all rows."""

    context: Any
    slot: jax.Array
    visible: jax.Array


class ClipModel(NamedTuple):
    """The functions of a model; those with weights are `jax.tree_util.Partial`s, so that the whole
    is a pytree of weights.

    denoise: (x [Bm,T,h,w,z], timestep float32 [Bm], context, condition [Bm,T,h,w,4+z], rotation,
    past) -> (velocity float32, past, keys).
    rotation: (frames int32 [..., F], grid (h, w) in tokens) -> (cos, sin) [..., F*h*w, 1|N, D/2].
    encode: frames [B,1+4m,H,W,3] -> latents [B,1+m,h,w,z].
    decode: latents [B,T,h,w,z] -> frames [B,1+4(T-1),H,W,3] in [-1,1].
    """

    denoise: Callable
    rotation: Callable
    encode: Callable
    decode: Callable


class Knobs(NamedTuple):
    """How clips follow each other.

    overlap: latent frames that a clip shares with the one before (2 latents are 5 pixel frames).
    guidance: scale of classifier-free guidance, batch doubled [prompt; no prompt]; None is a single
    pass, batch B.
    positions: function as in POSITIONS.  fill: what stands for frames not given, see `condition`.
    """

    overlap: int
    guidance: float | None
    positions: Callable
    fill: str = "latent"


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


def given_frames(available: int, overlap: int) -> int:
    """How many of the last pixel frames of a start the first clip is given: at most what `overlap`
    latent frames stand for, and 1 + 4m of them, or none.
    """
    most = min(available, pixel_frames(overlap))
    return most - (most - 1) % MASK if most else 0


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of a clip: the first latent frame stands for one, the others for four each."""
    return 1 + MASK * (latent_frames - 1)


def condition(encode: Callable, frames, size: tuple[int, int, int, int, int], fill: str = "latent"):
    """The condition of a clip that begins with given pixel frames, float32 [B,T,h,w,4+z].

    frames: [B,1+4m,H,W,3] in [-1,1], or None for nothing given.  size: (B,T,h,w,z) of the clip's
    latents.
    Channels: 4 of mask (1 = given; the pixel frames of each latent frame, the first repeated), then
    the latents.
    fill: latents of what is not given; "latent", "position": see `blank`; "pixel": mid-grey frames
    encoded behind the given ones (Wan's image-to-video habit; encodes the whole clip).
    Raises: InputError for an unknown fill, "pixel" without frames, or more frames than the clip
    has.
    """
    if fill not in FILLS or (fill == "pixel" and frames is None):
        raise InputError(
            f"fill={fill!r} cannot be used here; choose 'latent' or 'position', or 'pixel' with "
            "frames given"
        )
    b, t, h, w, z = size
    given = 0 if frames is None else frames.shape[1]
    if given > pixel_frames(t):
        raise InputError(f"{given} frames are given, the clip has {pixel_frames(t)}; give fewer")
    n = (given + MASK - 1) // MASK
    latents = jnp.zeros((b, 0, h, w, z), jnp.float32)
    if fill == "pixel":
        grey = ((0, 0), (0, pixel_frames(t) - given), (0, 0), (0, 0), (0, 0))
        latents = encode(jnp.pad(frames, grey))
    elif given:
        latents = encode(frames)
    expect(latents, "B T H W C", "condition latents", B=b, H=h, W=w, C=z)
    rest = (b, t - latents.shape[1], h, w, z)
    rest = jnp.broadcast_to(blank(fill, rest[2:]), rest)
    latents = jnp.concatenate([latents.astype(jnp.float32), rest], axis=1)
    mask = (jnp.arange(t) < n).astype(jnp.float32)[None, :, None, None, None]
    return jnp.concatenate([jnp.broadcast_to(mask, (b, t, h, w, MASK)), latents], axis=-1)


def blank(fill: str, size: tuple[int, int, int]):
    """Latents float32 [h, w, z] of a frame that is not given, where no picture stands for it.

    "latent": zeros.  "position": `cell_waves`, so that a token of pure noise knows its place;
    rotary positions are relative and tell it nothing.
    """
    return jnp.asarray(cell_waves(*size)) if fill == "position" else jnp.zeros(size, jnp.float32)


def pin(latents, condition):
    """Put the given latents (all four mask channels 1) back: sampling and T-RFlow do not reproduce
    them exactly."""
    given = jnp.min(condition[..., :MASK], axis=-1, keepdims=True) == 1
    return jnp.where(given, condition[..., MASK:], latents)


def clip_noise(key, clip, size):
    """float32 [B,T,h,w,z]: row b draws from key data key[b] folded with the clip's number, whatever
    the batch."""

    def row(data):
        key = jax.random.fold_in(jax.random.wrap_key_data(data), clip)
        return jax.random.normal(key, size[1:], jnp.float32)

    return jax.vmap(row)(key)


def shard_state(state: ClipState, mesh) -> ClipState:
    """Lay a state out over a mesh: the batch over `data`, everything else on every device.

    Place weights and clips on the same mesh; the steps then keep this layout.
    """

    def put(a, *axes):
        return jax.device_put(a, NamedSharding(mesh, partition(axes)))

    cache = state.cache
    return state.replace(
        cache=cache.replace(
            k=put(cache.k, None, "batch"),
            v=put(cache.v, None, "batch"),
            frame=put(cache.frame, "batch"),
            next_frame=put(cache.next_frame),
        ),
        condition=put(state.condition, "batch"),
        next_frame=put(state.next_frame),
        clip=put(state.clip),
        key=put(state.key, "batch"),
    )


def clipwise(model: ClipModel, sampler: Callable, knobs: Knobs) -> Method:
    """Build the method.

    sampler(velocity, noise, aux=) -> (latents, aux): for instance `flow.sampling.sample` with its
    schedule bound.
    init(cache, condition, keys): an empty bank, the first condition, one typed key per row [B].
    step: `Clip` in; (latents [B,T,h,w,z], frames [B,P,H,W,3]) out, the given frames included.
    """
    step = bound(_step, sampler=sampler, knobs=knobs)
    return Method(init=partial(_init, knobs=knobs), step=Partial(step, model))


def _init(cache: KVCache, condition, keys, knobs: Knobs) -> ClipState:
    """Raises: InputError when batch, bank and clip do not fit together."""
    b, t = condition.shape[:2]
    batch = b if knobs.guidance is None else 2 * b
    if not 0 < knobs.overlap < t:
        raise InputError(
            f"overlap={knobs.overlap} latent frames; it must be from 1 to {t - 1}, inside the clip"
        )
    if cache.k.shape[1] != batch or cache.frame.shape[1] % t:
        raise InputError(
            f"bank of batch {cache.k.shape[1]} and {cache.frame.shape[1]} frame slots; "
            f"this method needs batch {batch} and a multiple of {t} frame slots"
        )
    if keys.shape != (b,):
        raise InputError(f"keys has shape {keys.shape}; expected one key per row, [{b}]")
    # buffers of its own: the state is donated
    start, clip = jnp.array(0, jnp.int32), jnp.array(0, jnp.int32)
    return ClipState(cache, jnp.array(condition), start, clip, jnp.array(jax.random.key_data(keys)))


def _step(model: ClipModel, state: ClipState, clip: Clip, *, sampler: Callable, knobs: Knobs):
    given, (b, t) = state.condition, state.condition.shape[:2]
    size = (*given.shape[:4], given.shape[4] - MASK)
    frames = state.next_frame + jnp.arange(t, dtype=jnp.int32)
    start = jnp.broadcast_to(clip.slot, (b,)) * t
    visible = jnp.repeat(clip.visible, t, axis=-1)
    visible = jnp.broadcast_to(visible, (b, visible.shape[-1]))
    passes = (lambda a: a) if knobs.guidance is None else doubled
    many, start, visible = passes((given, start, visible))

    def rotation(frames):
        return model.rotation(knobs.positions(frames, state.next_frame), state.cache.grid)

    turn = rotation(frames)

    def velocity(x, sigma, timestep, past):
        timestep = jnp.broadcast_to(timestep, x.shape[:1])
        v, past, _ = model.denoise(x, timestep, clip.context, many, turn, past)
        return v, past

    with jax.named_scope("sample"):
        past = open_past(state.cache, rotation, start, visible)
        noise = clip_noise(state.key, state.clip, size)
        latents, past = sampler(guided(velocity, knobs.guidance), noise, aux=past)
        latents = pin(latents, given)
    with jax.named_scope("remember"):
        clean = passes(latents)
        zero = jnp.zeros(clean.shape[:1], jnp.float32)
        _, past, keys = model.denoise(clean, zero, clip.context, many, turn, past)
        cache = commit(state.cache, past, keys, start, frames)
    with jax.named_scope("decode"):
        video = model.decode(latents)
        tail = video[:, video.shape[1] - pixel_frames(knobs.overlap) :]
        ahead = condition(model.encode, tail, size, knobs.fill)
    state = ClipState(cache, ahead, frames[-1] + 1 - knobs.overlap, state.clip + 1, state.key)
    return state, (latents, video)
