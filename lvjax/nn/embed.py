# SPDX-License-Identifier: Apache-2.0
"""Sinusoidal features of time steps and places; latents to tokens and back, in Wan's two
different orders.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

TURN = 2.0**32


def sinusoid(timestep, dim: int):
    """timestep float32 [...] in 0..1000, fractions allowed -> features float32 [..., dim].

    Cosines first, frequencies 10000**(-k / (dim / 2)).  The whole part of the timestep is
    multiplied in integers modulo one turn, so that every feature is good to 2e-6; a float32 product
    would be wrong by 1e-4 at timestep 1000.
    """
    half = dim // 2
    frequency = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
    turns = np.round(frequency / (2 * np.pi) * TURN).astype(np.uint32)
    last = (1,) * timestep.ndim + (half,)
    whole = jnp.floor(timestep)
    phase = whole.astype(jnp.int32).astype(jnp.uint32)[..., None] * turns.reshape(last)
    angle = lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32) * (2 * np.pi / TURN)
    rest = (timestep - whole)[..., None] * frequency.astype(np.float32).reshape(last)
    angle = angle + rest
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def cell_waves(h: int, w: int, channels: int) -> np.ndarray:
    """Where a cell of an h x w picture is, as float32 [h, w, channels] in -1..1.

    With (y, x) in 0..1 from border to border: cos(pi k y), sin(pi k y), cos(pi k x), sin(pi k x)
    for k = 1, 2, ... channels / 4, rounded up; what is too much is cut off.
    """
    y, x = np.meshgrid((np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w, indexing="ij")
    angles = np.pi * np.arange(1, 1 + -(-channels // 4)) * np.stack([y, x], -1)[..., None]
    waves = np.stack([np.cos(angles), np.sin(angles)], -1)  # [h, w, 2, k, 2]
    return rearrange(waves, "h w a k s -> h w (k a s)")[..., :channels].astype(np.float32)


def patchify(latents, patch: tuple[int, int, int]):
    """latents [B, T, H, W, C] -> tokens [B, L, C*pt*ph*pw], frame-major, c slowest in a token."""
    sizes = dict(zip(("pt", "ph", "pw"), patch, strict=True))
    return rearrange(latents, "b (t pt) (h ph) (w pw) c -> b (t h w) (c pt ph pw)", **sizes)


def unpatchify(tokens, grid: tuple[int, int, int], patch: tuple[int, int, int]):
    """tokens [B, L, pt*ph*pw*C] of a (t, h, w) grid -> latents [B, T, H, W, C], c fastest."""
    sizes = dict(zip(("t", "h", "w", "pt", "ph", "pw"), (*grid, *patch), strict=True))
    return rearrange(tokens, "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c", **sizes)
