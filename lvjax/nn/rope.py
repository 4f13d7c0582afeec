# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding over (frame, row, column), exact for any int32 frame.

A frequency is stored as the fraction of a full turn that one step advances, in units of 2**-32
turn.  Position times frequency is then an integer product modulo 2**32, which wraps exactly where
an angle does: no phase loses digits as a video grows, and no float64 is needed on the device.  What
remains is the rounding of the frequency itself, at most position * pi / 2**32 radians (0.7 mrad at
frame one million).

Pairs are interleaved, (x[2j], x[2j+1]), as Wan's are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

TURN = 2.0**32


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Rotated pairs per axis (frame, row, column); 22, 21, 21 for a head of 128."""
    side = head_dim // 6
    return head_dim // 2 - 2 * side, side, side


def turns(head_dim: int, theta=10000.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frequencies of the three axes, uint32 [pairs] each, in 2**-32 turn per step.

    theta: the base; an array [N], one base per head, gives [N, pairs].
    """

    def axis(pairs):
        exponent = -np.arange(pairs, dtype=np.float64) / pairs
        frequency = np.asarray(theta, np.float64)[..., None] ** exponent
        return np.round(frequency / (2 * np.pi) * TURN).astype(np.uint64).astype(np.uint32)

    return tuple(axis(pairs) for pairs in axis_pairs(head_dim))


def table(position, turns):
    """cos, sin float32 [..., P] of position int32 [...] times turns uint32 [P]."""
    steps = lax.bitcast_convert_type(jnp.asarray(position, jnp.int32), jnp.uint32)
    turns = jnp.asarray(turns, jnp.uint32)
    phase = steps[..., None] * turns.reshape((1,) * steps.ndim + turns.shape)
    angle = lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32) * (2 * np.pi / TURN)
    return jnp.cos(angle), jnp.sin(angle)


def _grid(frames, h: int, w: int, axis_turns):
    """cos, sin [..., T*h*w, D/2] of one head."""
    positions = frames, jnp.arange(h), jnp.arange(w)
    tables = [table(p, a) for p, a in zip(positions, axis_turns, strict=True)]
    size = (*frames.shape, h, w)

    def spread(parts):
        t, r, c = parts
        parts = t[..., None, None, :], r[:, None, :], c[None, :, :]
        full = jnp.concatenate([jnp.broadcast_to(p, (*size, p.shape[-1])) for p in parts], -1)
        return rearrange(full, "... t h w p -> ... (t h w) p")

    return spread([cos for cos, _ in tables]), spread([sin for _, sin in tables])


def grid_table(frames, h: int, w: int, head_dim: int, theta: float = 10000.0):
    """(cos, sin) float32 [..., T*h*w, 1, D/2] of an h x w token grid at latent frames int32
    [..., T].

    Frames may have any values in any order; a leading axis B gives every row of a batch its own.
    """
    return turn_table(frames, h, w, turns(head_dim, theta))


def turn_table(frames, h: int, w: int, axis_turns):
    """`grid_table` for frequencies of one's own: three uint32 arrays as `turns` gives; [N, pairs]
    for a head axis, see `head_tables`.
    """
    if np.ndim(axis_turns[0]) == 2:
        return head_tables(frames, h, w, axis_turns)
    cos, sin = _grid(jnp.asarray(frames, jnp.int32), h, w, axis_turns)
    return cos[..., None, :], sin[..., None, :]


def head_tables(frames, h: int, w: int, turns_per_head):
    """`grid_table` with a head axis, (cos, sin) float32 [..., T*h*w, N, D/2].

    turns_per_head: three uint32 arrays [N, pairs], as `turns` gives for theta [N].
    """
    frames = jnp.asarray(frames, jnp.int32)
    heads = tuple(jnp.asarray(a, jnp.uint32) for a in turns_per_head)
    return jax.vmap(lambda a: _grid(frames, h, w, a), out_axes=-2)(heads)


def rotate(x, rotation):
    """Turn the pairs of x [B, L, N, D] by (cos, sin), each [L, 1|N, D/2] or with a leading axis
    1|B, in float32; x's dtype out."""
    cos, sin = (part.reshape(-1, *part.shape[-3:]) for part in rotation)
    pairs = rearrange(x.astype(jnp.float32), "b l n (p two) -> b l n p two", two=2)
    even, odd = pairs[..., 0], pairs[..., 1]
    out = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return rearrange(out, "b l n p two -> b l n (p two)").astype(x.dtype)
