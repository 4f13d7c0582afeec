# SPDX-License-Identifier: Apache-2.0
"""What a video remembers of itself: keys and values of past clips, per layer.

`KVCache` is the saved state: keys are normalised but not rotated, so that a method may re-index
time at will.  `Past` is the same memory opened for one clip: keys rotated, the clip's own slots
marked.  `dit` writes the clip's keys and values into those slots at every pass and attends over
all of them; `commit` keeps the last pass.  `Recalled` is memory that is only read, as in training:
the clip's own keys and values stand beside it, so that a gradient needs no copy of it per layer.
Every row of a batch has its own slots, sees its own selection, and so gets what it would get alone.
Which slots a clip gets and which it sees is decided in placement.py.
"""

from functools import partial

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
    start: int32 [B], the first token slot of the clip's own keys, per row.
    visible: bool [B|1, S], the slots that are attended to (the clip's own among them), or None for
        all.
    layers: (first, last), the half-open range of DiT layers that have memory.
    """

    k: jax.Array
    v: jax.Array
    start: jax.Array
    visible: jax.Array | None
    layers: tuple[int, int] = struct.field(pytree_node=False)

    @property
    def written(self):
        """What passes change: a loop carries this, and nothing else of a memory."""
        return self.k, self.v

    def with_written(self, written) -> "Past":
        """The memory after passes that left `written`."""
        k, v = written
        return self.replace(k=k, v=v)

    def check(self, tokens: int) -> None:
        """Raises: InputError when a clip of so many tokens finds no room."""
        if (slots := self.k.shape[2]) < tokens:
            raise InputError(f"memory of {slots} token slots cannot hold a clip of {tokens} tokens")

    def extend(self, layer, k, v):
        """Put rotated k, and v, [B, L, N, D], into the clip's slots of memory layer `layer`.

        Returns: the memory; what is attended to in that layer, keys and values [B, S, N, D] and
        the mask [B|1, 1, 1, S] or None.
        """
        k, v = (
            write_rows(old, new[None], layer, self.start) for old, new in ((self.k, k), (self.v, v))
        )
        own = [lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (k, v)]
        mask = None if self.visible is None else self.visible[:, None, None, :]
        return self.replace(k=k, v=v), *own, mask


@struct.dataclass
class Recalled:
    """Memory of other clips that no pass changes; the interface of `Past`.

    k, v: [layers, B, S, N, D], keys rotated.
    visible: bool [B|1, S], the slots that are attended to beside the clip itself.
    layers: (first, last), the half-open range of DiT layers that have memory.
    """

    k: jax.Array
    v: jax.Array
    visible: jax.Array
    layers: tuple[int, int] = struct.field(pytree_node=False)

    @property
    def written(self):
        """Nothing."""
        return ()

    def with_written(self, written) -> "Recalled":
        """The same memory."""
        return self

    def check(self, tokens: int) -> None:
        """There is room for any clip: it stays outside."""

    def extend(self, layer, k, v):
        """As `Past.extend`; the clip's own k and v come after what is remembered."""
        old = (lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (self.k, self.v))
        k, v = (
            jnp.concatenate([past.astype(own.dtype), own], axis=1)
            for past, own in zip(old, (k, v), strict=True)
        )
        own = k.shape[1] - self.visible.shape[1]
        seen = jnp.pad(self.visible, ((0, 0), (0, own)), constant_values=True)
        return self, k, v, seen[:, None, None, :]


def recall(cache: "KVCache", rotation_fn, visible) -> Recalled:
    """Everything in a cache for a clip outside it; arguments as in `open_past`."""
    batch, slots = cache.frame.shape
    expect(visible, "B F", "visible", B=batch if visible.shape[0] > 1 else 1, F=slots)
    visible = jnp.repeat(visible, cache.frame_tokens, axis=-1)
    return Recalled(rotated(cache, rotation_fn), cache.v, visible, cache.layers)


@struct.dataclass
class KVCache:
    """Keys and values of the frames that are remembered.

    k, v: [layers, B, S, N, D] with S = F*h*w; k normalised, not rotated.
    frame: int32 [B, F], the latent frame held by each frame slot of a row, -1 when empty.
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
        """Tokens of one latent frame."""
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
        frame=jnp.full((batch, frames), -1, jnp.int32),
        next_frame=jnp.zeros((), jnp.int32),
        layers=layers,
        grid=tuple(grid),
    )


def write_rows(old, new, layer, start):
    """`old` [layers, B, S, N, D] with `new` [M, B, L, N, D] in its place, from `layer` on and, in
    row b, from token slot `start`[b] on.

    One scatter with a batch axis: in place where `old` is donated or carried, and without traffic
    between devices that hold different rows.
    """
    at = jnp.stack([jnp.broadcast_to(jnp.asarray(layer, start.dtype), start.shape), start], -1)
    where = lax.ScatterDimensionNumbers(
        update_window_dims=(0, 2, 3, 4),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    clip = lax.GatherScatterMode.CLIP
    return lax.scatter(
        old,
        at,
        new.astype(old.dtype),
        where,
        unique_indices=True,
        indices_are_sorted=True,
        mode=clip,
    )


def rotated(cache: KVCache, rotation_fn):
    """The cached keys after RoPE, [layers, B, S, N, D]; rotation_fn as in `open_past`."""
    rotation = rotation_fn(cache.frame)
    return lax.map(lambda k: rotate(k, rotation), cache.k)


def open_past(cache: KVCache, rotation_fn, start_frame_slot, visible=None) -> Past:
    """Open the cache for a clip that occupies the frame slots from `start_frame_slot` on.

    rotation_fn: frame int32 [B, F] -> (cos, sin) [B, S, 1|N, D/2], the phases at which this clip
        sees the remembered frames.
    start_frame_slot: int32 [B], or [] for all rows.
    visible: bool [B|1, F], the frame slots attended to, the clip's own included; None for all.
    Raises: InputError when visible has another shape.
    """
    batch, slots = cache.frame.shape
    if visible is not None:
        expect(visible, "B F", "visible", B=batch if visible.shape[0] > 1 else 1, F=slots)
        visible = jnp.repeat(visible, cache.frame_tokens, axis=-1)
    start = _per_row(start_frame_slot, batch) * cache.frame_tokens
    return Past(
        k=rotated(cache, rotation_fn), v=cache.v, start=start, visible=visible, layers=cache.layers
    )


def commit(cache: KVCache, past: Past, keys, start_frame_slot, frames) -> KVCache:
    """Keep a clip: its un-rotated keys [layers, B, L, N, D], and the values in its slots of `past`.

    start_frame_slot: as in `open_past`.
    frames: int32 [T], the latent frames of the clip, in order; next_frame follows the last of them.
    Raises: InputError when keys and frames disagree.
    """
    start = _per_row(start_frame_slot, cache.frame.shape[0])
    frames = jnp.asarray(frames, jnp.int32)
    tokens, per_frame = keys.shape[2], cache.frame_tokens
    if tokens != frames.shape[0] * per_frame:
        given = f"keys of {tokens} tokens for {frames.shape[0]} frames"
        raise InputError(f"{given}; a frame of this cache has {per_frame} tokens")
    mark = jax.vmap(lambda row, at: lax.dynamic_update_slice(row, frames, (at,)))
    return cache.replace(
        k=write_rows(cache.k, keys, 0, start * per_frame),
        v=past.v,
        frame=mark(cache.frame, start),
        next_frame=frames[-1] + 1,
    )


def read_clip(cache: KVCache, slot, frames: int) -> dict[str, jax.Array]:
    """What is remembered of one clip in each row: k, v [layers, B, L, N, D] and frame [B, T].

    slot: int32 [B], or [] for all rows, in clips of T = `frames` frame slots.
    """
    start = _per_row(slot, cache.frame.shape[0]) * frames

    def rows(a, at, size: int, axis: int):
        cut = partial(lax.dynamic_slice_in_dim, slice_size=size, axis=axis)
        return jax.vmap(cut, (axis, 0), axis)(a, at)

    tokens = cache.frame_tokens
    k, v = (rows(a, start * tokens, frames * tokens, 1) for a in (cache.k, cache.v))
    return {"k": k, "v": v, "frame": rows(cache.frame, start, frames, 0)}


def write_clip(cache: KVCache, slot, clip: dict[str, jax.Array], rows) -> KVCache:
    """The cache with what `read_clip` gave in a clip slot, of the rows for which `rows`, bool [B],
    is true; in place where the cache is donated.
    """
    batch, frames = clip["frame"].shape
    slot = _per_row(slot, batch)
    there, start = read_clip(cache, slot, frames), slot * frames
    k, v = (
        write_rows(
            old,
            jnp.where(rows[None, :, None, None, None], clip[name], there[name]),
            0,
            start * cache.frame_tokens,
        )
        for name, old in (("k", cache.k), ("v", cache.v))
    )
    frame = jnp.where(rows[:, None], clip["frame"], there["frame"])
    mark = jax.vmap(lambda row, own, at: lax.dynamic_update_slice(row, own, (at,)))
    return cache.replace(k=k, v=v, frame=mark(cache.frame, frame, start))


def _per_row(slot, batch: int):
    """int32 [B] of a slot per row, or of one for all."""
    return jnp.broadcast_to(jnp.asarray(slot, jnp.int32), (batch,))
