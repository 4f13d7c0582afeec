# SPDX-License-Identifier: Apache-2.0
"""Attention as it is defined: the form that every other implementation is tested against."""

import jax
import jax.numpy as jnp


def attend_reference(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v, all scores at once.

    q: [B, L, N, D]; k, v: [B, S, N, D].  mask: bool [B|1, 1|N, L|1, S], True = attend.
    Scores and softmax in float32; probabilities are rounded to v's dtype; returns q's dtype.
    """
    f32 = jnp.float32
    scores = jnp.einsum("blnd,bsnd->bnls", q, k, preferred_element_type=f32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(f32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bnls,bsnd->blnd", weights, v, preferred_element_type=f32)
    return out.astype(q.dtype)
