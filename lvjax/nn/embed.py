# SPDX-License-Identifier: Apache-2.0
"""Sinusoidal timestep features; latents to tokens and back, in Wan's two different orders."""

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


def patchify(latents, patch: tuple[int, int, int]):
    """latents [B, T, H, W, C] -> tokens [B, L, C*pt*ph*pw], frame-major, c slowest in a token."""
    sizes = dict(zip(("pt", "ph", "pw"), patch, strict=True))
    return rearrange(latents, "b (t pt) (h ph) (w pw) c -> b (t h w) (c pt ph pw)", **sizes)


def unpatchify(tokens, grid: tuple[int, int, int], patch: tuple[int, int, int]):
    """tokens [B, L, pt*ph*pw*C] of a (t, h, w) grid -> latents [B, T, H, W, C], c fastest."""
    sizes = dict(zip(("t", "h", "w", "pt", "ph", "pw"), (*grid, *patch), strict=True))
    return rearrange(tokens, "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c", **sizes)
