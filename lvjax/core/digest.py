# SPDX-License-Identifier: Apache-2.0
"""Checksums of arrays where they are: computed on the devices, whatever the layout over a mesh.

Each word of an array is multiplied by an odd number that depends on its place, and all are added
modulo 2**32: the sum does not depend on how devices share the work, and a change of one word always
changes it.
"""

import jax
import jax.numpy as jnp
from jax import lax

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digests(tree) -> dict[str, int]:
    """{"path/to/leaf": checksum} of a pytree of arrays of 1, 2 or 4 bytes an element."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    found = jax.device_get(_digests([leaf for _, leaf in leaves]))
    return {name: int(value) for name, value in zip(names, found, strict=True)}


@jax.jit
def _digests(arrays: list) -> list:
    return [_digest(a) for a in arrays]


@jax.jit  # traced once for each shape: a state has many arrays of few
def _digest(a):
    bits = a.astype(jnp.uint8) if a.dtype == bool else a
    words = lax.bitcast_convert_type(bits, WORDS[bits.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(a.shape, jnp.uint32)
    for axis, size in enumerate(a.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, a.shape, axis)
    return jnp.sum((words ^ jnp.uint32(0x9E3779B9)) * _odd(place), dtype=jnp.uint32)


def _odd(x):
    """A well-mixed odd number for every x: the finaliser of MurmurHash3, and 1."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)) | jnp.uint32(1)
