# SPDX-License-Identifier: Apache-2.0
"""Clip by clip: sample against remembered clips, remember, and begin the next with the last frames.

One step is one clip: open the bank, sample, pin what was given, run once at sigma 0 so that the
bank holds clean keys and values, decode, re-encode the last frames as the next clip's condition.
Shapes never depend on the clip.
Owns: the state, positions.
Does not own: a model (functions come in), a solver, the layout of a condition (condition.py), or
which clips are seen (memory/placement.py).
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
from lvjax.flow.guidance import guided, per_pass
from lvjax.memory.cache import KVCache, commit, open_past
from lvjax.rollout.condition import MASK, condition, pin, pixel_frames
from lvjax.rollout.method import Method

POSITIONS: dict[str, Callable] = {
    "absolute": lambda frames, next_frame: frames,
    "relative": lambda frames, next_frame: frames - next_frame,
}
"""(latent frames int32 [..., F], first frame of the clip) -> frames to rotate by.  "relative" is
exact at any length."""


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


def row_key_data(keys, batch: int):
    """uint32 [B, 2]: the data of typed keys [B], one per row, in a buffer of their own.

    Raises: InputError for another number of keys.
    """
    if keys.shape != (batch,):
        raise InputError(f"keys has shape {keys.shape}; expected one key per row, [{batch}]")
    return jnp.array(jax.random.key_data(keys))


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
    # buffers of its own: the state is donated
    start, clip = jnp.array(0, jnp.int32), jnp.array(0, jnp.int32)
    return ClipState(cache, jnp.array(condition), start, clip, row_key_data(keys, b))


def _step(model: ClipModel, state: ClipState, clip: Clip, *, sampler: Callable, knobs: Knobs):
    given, (b, t) = state.condition, state.condition.shape[:2]
    size = (*given.shape[:4], given.shape[4] - MASK)
    frames = state.next_frame + jnp.arange(t, dtype=jnp.int32)
    start = jnp.broadcast_to(clip.slot, (b,)) * t
    visible = jnp.repeat(clip.visible, t, axis=-1)
    visible = jnp.broadcast_to(visible, (b, visible.shape[-1]))
    many, start, visible = per_pass((given, start, visible), knobs.guidance)

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
        clean = per_pass(latents, knobs.guidance)
        zero = jnp.zeros(clean.shape[:1], jnp.float32)
        _, past, keys = model.denoise(clean, zero, clip.context, many, turn, past)
        cache = commit(state.cache, past, keys, start, frames)
    with jax.named_scope("decode"):
        video = model.decode(latents)
        tail = video[:, video.shape[1] - pixel_frames(knobs.overlap) :]
        ahead = condition(model.encode, tail, size, knobs.fill)
    state = ClipState(cache, ahead, frames[-1] + 1 - knobs.overlap, state.clip + 1, state.key)
    return state, (latents, video)
