# SPDX-License-Identifier: Apache-2.0
"""Sinusoidal timestep features, and the two (different) orders in which Wan cuts latents into tokens."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

TURN = 2.0**32


def sinusoid(timestep, dim: int):
    """timestep float32 [...] in [0, 1000], fractions allowed -> float32 [..., dim], cosines first, frequencies 10000**(-k/(dim/2)).

    The whole part of the timestep is multiplied in integers modulo one turn, so that every feature is good to 2e-6;
    a float32 product would be wrong by 1e-4 at timestep 1000.
    """
    half = dim // 2
    frequency = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
    turns = np.round(frequency / (2 * np.pi) * TURN).astype(np.uint32)
    lead = (1,) * timestep.ndim
    whole = jnp.floor(timestep)
    phase = whole.astype(jnp.int32).astype(jnp.uint32)[..., None] * jnp.asarray(turns).reshape(*lead, half)
    angle = lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32) * np.float32(2 * np.pi / TURN)
    angle = angle + (timestep - whole)[..., None] * jnp.asarray(frequency, jnp.float32).reshape(*lead, half)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def patchify(latents, patch: tuple[int, int, int]):
    """latents [B, T, H, W, C] -> tokens [B, L, C*pt*ph*pw], frame-major; features in the order (c, pt, ph, pw), c slowest."""
    pt, ph, pw = patch
    return rearrange(latents, "b (t pt) (h ph) (w pw) c -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def unpatchify(tokens, grid: tuple[int, int, int], patch: tuple[int, int, int]):
    """tokens [B, L, pt*ph*pw*C] on a (t, h, w) token grid -> latents [B, T, H, W, C]; features in the order (pt, ph, pw, c), c fastest."""
    (t, h, w), (pt, ph, pw) = grid, patch
    return rearrange(tokens, "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
