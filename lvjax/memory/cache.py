# SPDX-License-Identifier: Apache-2.0
"""What a video remembers of itself: keys and values of past clips, per layer.

`KVCache` is the saved state: keys are normalised but not rotated, so that a method may re-index
time at will.  `Past` is the same memory opened for one clip: keys rotated, the clip's own slots
marked.  `dit` writes the clip's keys and values into those slots at every pass and attends over
all of them; `commit` keeps the last pass.  Which slots a clip gets and which it sees is decided
in placement.py.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lvjax.core.errors import InputError
from lvjax.core.shapes import expect
from lvjax.nn.rope import rotate


@struct.dataclass
class Past:
    """Memory opened for one clip.

    k, v: [layers, B, S, N, D], keys rotated.
    start: int32 [], the first token slot of the clip's own keys.
    visible: bool [S], the slots that are attended to (the clip's own among them), or None for all.
    layers: (first, last), the half-open range of DiT layers that have memory.
    """

    k: jax.Array
    v: jax.Array
    start: jax.Array
    visible: jax.Array | None
    layers: tuple[int, int] = struct.field(pytree_node=False)

    def write(self, layer, k, v) -> "Past":
        """Put rotated k, and v, [B, L, N, D], into the clip's slots of memory layer `layer`."""
        at = (layer, 0, self.start, 0, 0)

        def put(old, new):
            return lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)

        return self.replace(k=put(self.k, k), v=put(self.v, v))

    def read(self, layer):
        """Keys and values [B, S, N, D] of a memory layer, and the mask [1, 1, 1, S] or None."""
        k, v = (lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (self.k, self.v))
        return k, v, None if self.visible is None else self.visible[None, None, None, :]


@struct.dataclass
class KVCache:
    """Keys and values of the frames that are remembered.

    k, v: [layers, B, S, N, D] with S = F*h*w; k normalised, not rotated.
    frame: int32 [F], the latent frame held by each frame slot, -1 when empty.
    next_frame: int32 [], the first latent frame not generated yet.
    layers: (first, last), the half-open range of DiT layers that have memory.
    grid: (h, w), tokens per frame.
    """

    k: jax.Array
    v: jax.Array
    frame: jax.Array
    next_frame: jax.Array
    layers: tuple[int, int] = struct.field(pytree_node=False)
    grid: tuple[int, int] = struct.field(pytree_node=False)

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


def init_cache(
    cfg,
    batch: int,
    frames: int,
    grid: tuple[int, int],
    layers: tuple[int, int] | None = None,
    dtype=None,
) -> KVCache:
    """An empty cache of `frames` frame slots; layers default to all, dtype to cfg.dtype.

    Raises: InputError when the layer range is not inside the model.
    """
    first, last = layers = (0, cfg.num_layers) if layers is None else tuple(layers)
    if not 0 <= first < last <= cfg.num_layers:
        raise InputError(
            f"memory layers {layers} must be a non-empty range inside 0..{cfg.num_layers}"
        )
    shape = (last - first, batch, frames * grid[0] * grid[1], cfg.num_heads, cfg.head_dim)
    dtype = jnp.dtype(cfg.dtype if dtype is None else dtype)
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),  # a second buffer: donated arrays must not alias
        frame=jnp.full((frames,), -1, jnp.int32),
        next_frame=jnp.zeros((), jnp.int32),
        layers=layers,
        grid=tuple(grid),
    )


def rotated(cache: KVCache, rotation_fn):
    """The cached keys after RoPE, [layers, B, S, N, D]; rotation_fn as in `open_past`."""
    rotation = rotation_fn(cache.frame)
    return lax.map(lambda k: rotate(k, rotation), cache.k)


def open_past(cache: KVCache, rotation_fn, start_frame_slot, visible=None) -> Past:
    """Open the cache for a clip that occupies the frame slots from `start_frame_slot` on.

    rotation_fn: frame int32 [F] -> (cos, sin) [S, 1|N, D/2], the phases at which this clip sees
        the remembered frames.
    visible: bool [F], the frame slots attended to, the clip's own included; None for all.
    """
    if visible is not None:
        expect(visible, "F", "visible", F=cache.frame.shape[0])
        visible = jnp.repeat(visible, cache.frame_tokens)
    start = jnp.asarray(start_frame_slot, jnp.int32) * cache.frame_tokens
    return Past(
        k=rotated(cache, rotation_fn), v=cache.v, start=start, visible=visible, layers=cache.layers
    )


def commit(cache: KVCache, past: Past, keys, start_frame_slot, frames) -> KVCache:
    """Keep a clip: its un-rotated keys [layers, B, L, N, D], and the values in its slots of `past`.

    frames: int32 [T], the latent frames of the clip, in order; next_frame follows the last of them.
    Raises: InputError when keys and frames disagree.
    """
    start = jnp.asarray(start_frame_slot, jnp.int32)
    frames = jnp.asarray(frames, jnp.int32)
    tokens, per_frame = keys.shape[2], cache.frame_tokens
    if tokens != frames.shape[0] * per_frame:
        given = f"keys of {tokens} tokens for {frames.shape[0]} frames"
        raise InputError(f"{given}; a frame of this cache has {per_frame} tokens")
    at = (0, 0, start * per_frame, 0, 0)
    return cache.replace(
        k=lax.dynamic_update_slice(cache.k, keys.astype(cache.k.dtype), at),
        v=past.v,
        frame=lax.dynamic_update_slice(cache.frame, frames, (start,)),
        next_frame=frames[-1] + 1,
    )
