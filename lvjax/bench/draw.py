# SPDX-License-Identifier: Apache-2.0
"""Random inputs and weights for benchmarks, and the exact computation they are compared with.

Nothing is zero: zeros make a GPU faster than it is.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.core.params import Param, abstract, map_spec

jitted = functools.cache(jax.jit)


class Spread(NamedTuple):
    """Mean and standard deviation of a leaf."""

    mean: float = 0.0
    std: float = 1.0


def floats(*shape: int, dtype: str = "float32"):
    """The shape and dtype of an array to draw."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def retype(tree, dtype: str):
    """The same shapes in another dtype."""
    return jax.tree.map(lambda a: floats(*a.shape, dtype=dtype), tree)


def _split(flat, tree, spreads):
    """Consecutive pieces of flat [n] as the leaves of `tree`, each times its std plus its mean."""
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([math.prod(a.shape) for a in leaves])
    out = []
    for leaf, end, (mean, std) in zip(leaves, ends, spreads, strict=True):
        piece = flat[end - math.prod(leaf.shape) : end] * std + mean
        out.append(piece.reshape(leaf.shape).astype(leaf.dtype))
    return structure.unflatten(out)


def _draw(tree, spreads, seed: int):
    """One draw for all leaves; a draw for each would take longer to compile than what is timed."""
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(tree))
    flat = jax.random.normal(jax.random.key(seed), (count,))
    return jax.jit(lambda flat: _split(flat, tree, spreads))(flat)


def random_like(tree, seed: int = 1):
    """Standard normal arrays of the shapes and dtypes of a tree."""
    return _draw(tree, [Spread()] * len(jax.tree.leaves(tree)), seed)


def _spread(p: Param) -> Spread:
    if p.init == "ones":
        return Spread(1.0, 0.1)
    inside = [n for n, axis in zip(p.shape, p.axes, strict=True) if axis != "layers"]
    return Spread(0.0, 0.02 if len(inside) == 1 else math.prod(inside[:-1]) ** -0.5)


def random_params(spec, dtype: str, seed: int = 0):
    """Parameters of about the size that training starts from, on the device, in `dtype`."""
    spreads = map_spec(_spread, spec)
    spreads = jax.tree.leaves(spreads, is_leaf=lambda x: isinstance(x, Spread))
    return _draw(retype(abstract(spec), dtype), spreads, seed)


def widen(tree):
    """The same arrays in float32."""
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def exact(f, *args):
    """f(*args) with float32 products that are not rounded, on the device that holds args."""
    with jax.default_matmul_precision("highest"):
        return jitted(f)(*args)


def on_cpu(tree):
    """The arrays on the CPU; where jax has no CPU device here, as they are."""
    try:
        return jax.device_put(tree, jax.devices("cpu")[0])
    except RuntimeError:
        return tree
