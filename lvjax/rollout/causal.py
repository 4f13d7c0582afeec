# SPDX-License-Identifier: Apache-2.0
"""A few latent frames at a time against a rolling memory: the step of all causal streaming models.

One step is one clip (papers: chunk, block) of a few latent frames: open the memory, sample, run
once at sigma 0 so that the memory holds clean keys and values, decode with the autoencoder's state
carried.  Shapes never depend on the clip, so one program serves all of them, for ever.
Owns: the state.  Does not own: a model (functions come in), a sampler, which slots a clip gets
(memory/window.py), frequencies (nn/rope_policies.py).
Source: Self Forcing, arXiv:2506.08009; guandeh17/Self-Forcing: pipeline/causal_inference.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial

from lvjax.core.errors import InputError
from lvjax.core.functional import bound
from lvjax.flow.guidance import guided, per_pass
from lvjax.memory.cache import KVCache, commit, open_past
from lvjax.memory.window import POSITIONS, Window
from lvjax.rollout.clipwise import row_key_data
from lvjax.rollout.method import Method


@struct.dataclass
class CausalState:
    """Everything that one clip hands to the next.

    cache: the memory, batch Bm = B, or 2B with guidance; its next_frame is where the video goes on.
    decoder: the autoencoder's state, or None.  latents: float32 [B, W, h, w, z], what is in the
    memory's slots.  key: uint32 [B, 2], key data per row.
    """

    cache: KVCache
    decoder: Any
    latents: jax.Array
    key: jax.Array


@struct.dataclass
class CausalClip:
    """What a clip is given: context (any pytree of the model, batch Bm).  since: int32 [], the
    first frame that may be looked at beside the sink; 0 for all that are held.
    """

    context: Any
    since: jax.Array


class CausalModel(NamedTuple):
    """The functions of a model; those with weights are `jax.tree_util.Partial`s.

    denoise: (x [Bm,T,h,w,z], timestep float32 [Bm,T], context, rotation, past) -> (velocity
      float32, past, keys).
    rotation: (frames int32 [..., F], grid (h, w) in tokens) -> (cos, sin) [..., F*h*w, 1|N, D/2].
    decode: (state, latents [B,T,h,w,z], first bool []) -> (state, frames [B,4T,H,W,3] in [-1,1]; of
      the first clip the first three are of no meaning).  None leaves latents as they are.
    """

    denoise: Callable
    rotation: Callable
    decode: Callable | None


class CausalKnobs(NamedTuple):
    """How clips follow each other.

    window: the memory.  positions: a name in `memory.window.POSITIONS`.  guidance: scale of
    classifier-free guidance, batch doubled [prompt; no prompt]; None is a single pass.
    """

    window: Window
    positions: str = "absolute"
    guidance: float | None = None


def causal_noise(key, frame, step, size):
    """float32 [B,T,h,w,z]: row b draws from key data key[b] folded with the number of the clip's
    first frame and of the sampler's step, whatever the batch.
    """

    def row(data):
        key = jax.random.fold_in(jax.random.wrap_key_data(data), frame)
        return jax.random.normal(jax.random.fold_in(key, step), size[1:], jnp.float32)

    return jax.vmap(row)(key)


def causal(model: CausalModel, sampler: Callable, knobs: CausalKnobs) -> Method:
    """Build the method.

    sampler(velocity, draw, aux=) -> (latents, aux): `flow.few_step.sample_few` with its schedule
    bound, or an ODE solver behind `once`.
    init(cache, decoder, latent_size (h, w, z), keys): an empty memory of `window.frames` frame
      slots, the decoder's state of nothing, and one typed key per row [B].
    step: `CausalClip` in; (latents [B,T,h,w,z], frames or None) out.
    Raises: InputError for unknown positions.
    """
    if knobs.positions not in POSITIONS:
        raise InputError(
            f"positions={knobs.positions!r} is unknown; choose one of {list(POSITIONS)}"
        )
    step = bound(_step, sampler=sampler, knobs=knobs)
    return Method(init=partial(_init, knobs=knobs), step=Partial(step, model))


def once(sample: Callable) -> Callable:
    """A sampler for `causal` of one that takes noise only to begin with, such as
    `flow.sampling.sample` with its schedule bound.
    """
    return bound(_once, sample=sample)


def _once(velocity, draw, *, aux, sample):
    return sample(velocity, draw(0), aux=aux)


def _init(cache: KVCache, decoder, latent_size, keys, knobs: CausalKnobs) -> CausalState:
    """Raises: InputError when batch and memory do not fit together."""
    b, window = len(keys), knobs.window
    batch = b if knobs.guidance is None else 2 * b
    if cache.frame.shape != (batch, window.frames):
        raise InputError(
            f"memory of batch {cache.frame.shape[0]} and {cache.frame.shape[1]} frame slots; this "
            f"method needs {batch} and {window.frames}"
        )
    latents = jnp.zeros((b, window.frames, *latent_size), jnp.float32)
    return CausalState(cache, decoder, latents, row_key_data(keys, b))


def opened(model: CausalModel, cache: KVCache, frames, start, since, knobs: CausalKnobs):
    """(past, rotation) for a clip of frames int32 [T] that goes into the frame slots from `start`
    on.
    """
    window, batch = knobs.window, cache.frame.shape[0]
    own = window.own(start, frames.shape[0])
    place = jnp.clip(jnp.arange(window.frames, dtype=jnp.int32) - start, 0, frames.shape[0] - 1)
    held = jnp.where(own[None], frames[place][None], cache.frame)
    visible = own[None] | window.seen(cache.frame, since)

    def rotation(frames):
        return model.rotation(POSITIONS[knobs.positions](frames, held), cache.grid)

    starts = jnp.broadcast_to(start, (batch,))
    return open_past(cache, rotation, starts, visible), rotation(frames)


def _step(model: CausalModel, state: CausalState, clip: CausalClip, *, sampler, knobs):
    cache, window = state.cache, knobs.window
    frames = cache.next_frame + jnp.arange(window.clip, dtype=jnp.int32)
    start = window.slot(cache.next_frame)
    size = (state.key.shape[0], window.clip, *state.latents.shape[2:])

    def velocity(x, sigma, timestep, past):
        timestep = jnp.broadcast_to(timestep, x.shape[:2])
        v, past, _ = model.denoise(x, timestep, clip.context, turn, past)
        return v, past

    def draw(i):
        return causal_noise(state.key, cache.next_frame, i, size)

    with jax.named_scope("sample"):
        past, turn = opened(model, cache, frames, start, clip.since, knobs)
        latents, past = sampler(guided(velocity, knobs.guidance), draw, aux=past)
    with jax.named_scope("remember"):
        state = _remember(model, state, past, latents, clip.context, turn, frames, start, knobs)
    if model.decode is None:
        return state, (latents, None)
    with jax.named_scope("decode"):
        decoder, video = model.decode(state.decoder, latents, cache.next_frame == 0)
    return state.replace(decoder=decoder), (latents, video)


def _remember(model, state, past, latents, context, turn, frames, start, knobs) -> CausalState:
    """The state with a clip's clean latents, and their keys and values at sigma 0, in its slots."""
    clean = per_pass(latents, knobs.guidance)
    zero = jnp.zeros(clean.shape[:2], jnp.float32)
    _, past, keys = model.denoise(clean, zero, context, turn, past)
    cache = commit(state.cache, past, keys, start, frames)
    held = jax.lax.dynamic_update_slice_in_dim(state.latents, latents, start, axis=1)
    return state.replace(cache=cache, latents=held)


def given(
    model: CausalModel, state: CausalState, latents, clip: CausalClip, knobs: CausalKnobs
) -> CausalState:
    """The state after a clip that is given instead of sampled, not decoded.

    latents: float32 [B, T, h, w, z], T the window's clip, or its `first` at the beginning.
    """
    frames = state.cache.next_frame + jnp.arange(latents.shape[1], dtype=jnp.int32)
    start = knobs.window.slot(state.cache.next_frame)
    past, turn = opened(model, state.cache, frames, start, clip.since, knobs)
    return _remember(model, state, past, latents, clip.context, turn, frames, start, knobs)


# ---- a new prompt ------------------------------------------------------------------


def recached(
    model: CausalModel,
    state: CausalState,
    clip: CausalClip,
    knobs: CausalKnobs,
    keep_sink: bool = True,
) -> CausalState:
    """The state with its memory written anew under a new prompt, all frames in one pass.

    All that is held is run at sigma 0 with the new context, every frame seeing every other.
    keep_sink: leave keys and values of the sink as the old prompt made them.
    Source: LongLive, arXiv:2509.22622; NVlabs/LongLive, KV-recache ("joint": its prepared
      block-causal mask is not used in the cached path).
    """
    cache, window = state.cache, knobs.window
    held = cache.frame
    there = jnp.broadcast_to(held >= 0, held.shape)

    def rotation(frames):
        return model.rotation(POSITIONS[knobs.positions](frames, held), cache.grid)

    past = open_past(cache, rotation, 0, there)
    many = per_pass(state.latents, knobs.guidance)
    zero = jnp.zeros(many.shape[:2], jnp.float32)
    _, past, keys = model.denoise(many, zero, clip.context, rotation(held[0]), past)
    made = commit(cache, past, keys, 0, held[0])
    slots = there
    if keep_sink:
        slots &= jnp.arange(window.frames, dtype=jnp.int32)[None] >= window.sink
    tokens = jnp.repeat(slots, cache.frame_tokens, axis=-1)[None, :, :, None, None]
    k, v = jnp.where(tokens, made.k, cache.k), jnp.where(tokens, made.v, cache.v)
    return state.replace(cache=cache.replace(k=k, v=v))
