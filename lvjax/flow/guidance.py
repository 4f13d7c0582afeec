# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance as one pass over a doubled batch, [with prompt; without prompt]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def doubled(tree):
    """Every array of `tree` repeated along its first axis: [B, ...] -> [2B, ...]."""
    return jax.tree.map(lambda a: jnp.concatenate([a, a], axis=0), tree)


def per_pass(tree, scale: float | None):
    """What a velocity under `guided` sees of a tree of batch B: doubled, or as it is without
    guidance."""
    return tree if scale is None else doubled(tree)


def combine(v, scale):
    """v_u + scale (v_c - v_u) in float32; v [2B, ...] with the conditional rows first; returns [B,
    ...]."""
    v_c, v_u = jnp.split(v.astype(jnp.float32), 2, axis=0)
    return v_u + jnp.float32(scale) * (v_c - v_u)


def guided(velocity: Callable, scale: float | None) -> Callable:
    """Guide a velocity of doubled batch 2B; the result takes and returns batch B.

    velocity(x, sigma, timestep, aux) -> (v, aux); aux (for instance the past) keeps its doubled
    batch.
    scale: 1 is the conditional prediction alone; None returns `velocity` as it is, batch not
    doubled.
    """
    if scale is None:
        return velocity

    def guide(x, sigma, timestep, aux):
        v, aux = velocity(doubled(x), sigma, timestep, aux)
        return combine(v, scale), aux

    return guide
