# SPDX-License-Identifier: Apache-2.0
"""Normalisations.  Statistics are float32; results have the dtype of x."""

import jax.numpy as jnp
from jax import lax


def _rows(weight, ndim):
    """A [C] weight as float32, with leading axes of size one for explicit broadcasting."""
    return weight.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


def layer_norm(x, eps: float, params=None):
    """LayerNorm over the last axis of x [..., C]; params: None or {"scale": [C], "bias": [C]}."""
    f = x.astype(jnp.float32)
    f = f - f.mean(-1, keepdims=True)
    y = f * lax.rsqrt((f * f).mean(-1, keepdims=True) + eps)
    if params is not None:
        y = y * _rows(params["scale"], x.ndim) + _rows(params["bias"], x.ndim)
    return y.astype(x.dtype)


def rms_norm(weight, x, eps: float):
    """RMSNorm over the last axis of x [..., C], weight [C].

    In Wan's order: normalise in float32, round to x's dtype, then scale.
    Source: Wan-Video/Wan2.1: wan/modules/model.py (WanRMSNorm).
    """
    f = x.astype(jnp.float32)
    y = (f * lax.rsqrt((f * f).mean(-1, keepdims=True) + eps)).astype(x.dtype)
    return (y.astype(jnp.float32) * _rows(weight, x.ndim)).astype(x.dtype)


def channel_norm(gamma, x):
    """The autoencoder's norm over channels: x / max(||x||, 1e-12) * sqrt(C) * gamma.

    x [..., C], gamma [C].
    Source: Wan-Video/Wan2.1: wan/modules/vae.py (RMS_norm).
    """
    f = x.astype(jnp.float32)
    squares = (f * f).sum(-1, keepdims=True)
    y = f * (x.shape[-1] ** 0.5 * lax.rsqrt(jnp.maximum(squares, 1e-24)))
    return (y * _rows(gamma, x.ndim)).astype(x.dtype)
