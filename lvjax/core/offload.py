# SPDX-License-Identifier: Apache-2.0
"""Stacks of layers that wait in the host's memory until a loop comes to them.

`place` puts a tree of stacked arrays there; inside the loop, `fetch` makes one layer ready to
compute with.  Nothing is said twice: jax knows the memory that an array is in, also in a traced
function, so that a model asks the arrays themselves and takes no setting.
Does not own: which weights wait (run/session.py), or whether they should (run/plan.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lvjax.core.compat import SLICES_WIDEN

HOST, DEVICE = "pinned_host", "device"
"""Kinds of memory, as jax names them."""

BITS = jnp.dtype(jnp.uint16)
"""Stands for bfloat16 where XLA cannot slice it, see `as_bits`; no parameter is of this type."""


def place(tree, mesh, kind: str = DEVICE):
    """Every array on all devices of a mesh, or waiting for them in the host's memory."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(), memory_kind=kind))


def wait(array):
    """One array, in the host's memory until its device asks for it."""
    return jax.device_put(array, array.sharding.with_memory_kind(HOST))


def as_bits(tree):
    """Arrays of bfloat16 as the integers of their bits, where XLA would widen them; in the same
    memory, without a copy.

    XLA on the CPU slices bfloat16 as float32 in the jax versions named by `SLICES_WIDEN`, and then
    converts a whole stack ahead of the loop that reads it: weights cost three times their size.
    """
    if not SLICES_WIDEN or jax.default_backend() != "cpu":
        return tree

    def view(a):
        narrow = a.dtype == jnp.bfloat16
        return jax.device_put(np.asarray(a).view(BITS), a.sharding) if narrow else a

    return jax.tree.map(view, tree)


def is_ready(tree) -> bool:
    """Whether all arrays can be computed with as they are."""
    return all(
        jax.typeof(a).memory_space != jax.memory.Space.Host and a.dtype != BITS
        for a in jax.tree.leaves(tree)
    )


def fetch(tree):
    """One layer, or anything else that is no stack, ready to compute with."""
    if is_ready(tree):
        return tree
    there = jax.device_put(tree, jax.memory.Space.Device)

    def view(a):
        return lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == BITS else a

    return jax.tree.map(view, there)


def pick(stacked, i):
    """Layer i of stacked arrays, where they are."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), stacked)


def scan_ahead(step: Callable, carry, stacked, span: tuple[int, int]):
    """`lax.scan` of step(carry, i, layer) -> (carry, out) over layers first to last - 1 of stacks
    that wait, i from 0; while a layer is computed with, the next is on its way.
    """
    first, last = span

    def body(carry, i):
        carry, layer = carry
        following = fetch(pick(stacked, jnp.minimum(first + i + 1, last - 1)))
        carry, out = step(carry, i, layer)
        return (carry, following), out

    index = jnp.arange(last - first, dtype=jnp.int32)
    (carry, _), outs = lax.scan(body, (carry, fetch(pick(stacked, first))), index)
    return carry, outs
