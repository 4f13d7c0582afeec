# SPDX-License-Identifier: Apache-2.0
"""Random parameters without a compiler (jax compiles a program or more for each shape that `init`
draws, which takes longer than most tests), and parameters with a mistake.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from lvjax.core.params import Param, Spec, flatten, unflatten


def drawn(spec: Spec, seed: int) -> dict:
    """A tree of parameters, distributed as `lvjax.core.params.init` has them; others than its."""
    rng = np.random.default_rng(seed)
    return unflatten({path: jnp.asarray(_draw(p, rng)) for path, p in flatten(spec).items()})


def edited(tree: dict, path: str, change: Callable) -> dict:
    """The tree with what lies at a path "a/b/c", an array or a subtree, changed."""
    first, _, rest = path.partition("/")
    return tree | {first: edited(tree[first], rest, change) if rest else change(tree[first])}


def swapped(tree: dict, path: str, first: str, second: str) -> dict:
    """The tree with two things under a path in each other's place."""
    return edited(tree, path, lambda node: node | {first: node[second], second: node[first]})


def _draw(p: Param, rng: np.random.Generator) -> np.ndarray:
    if p.init in ("zeros", "ones"):
        return np.full(p.shape, p.init == "ones", p.dtype)
    if p.init == "xavier":
        bound = math.sqrt(6.0 / (p.shape[-2] + p.shape[-1]))
        return rng.uniform(-bound, bound, p.shape).astype(p.dtype)
    std = p.init
    if std == "fan_in":
        sizes = zip(p.shape[:-1], p.axes[:-1], strict=True)
        std = math.prod(n for n, axis in sizes if axis != "layers") ** -0.5
    return (std * rng.standard_normal(p.shape)).astype(p.dtype)
