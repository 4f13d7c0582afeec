# SPDX-License-Identifier: Apache-2.0
"""Parameters are declared once, as a nested dict of `Param`; everything else reads that
declaration.

Initialisation, abstract shapes, shardings, the converter's check list and the memory plan all come
from the same spec, so a parameter's shape stands in one place.
"""

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

Spec = dict[str, Any]


@dataclass(frozen=True)
class Param:
    """One parameter: shape, logical axis names (one per dimension), initialiser and dtype.

    init: "zeros", "ones", "xavier" (uniform over the last two axes), "fan_in" (normal, variance 1 /
      product of all axes but the last) or a float, the standard deviation of a normal.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str | float = "xavier"
    dtype: str = "float32"

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"Param{self.shape} needs {len(self.shape)} logical axes, got {self.axes}"
            )


def is_param(x) -> bool:
    """Whether a node of a spec is a leaf."""
    return isinstance(x, Param)


def map_spec(f, spec: Spec):
    """Apply `f` to every `Param` of a spec."""
    return jax.tree.map(f, spec, is_leaf=is_param)


def stack(spec: Spec, n: int, axis: str = "layers") -> Spec:
    """The spec of `n` equal layers with a new leading axis, ready for `lax.scan`."""
    return map_spec(lambda p: replace(p, shape=(n, *p.shape), axes=(axis, *p.axes)), spec)


def _draw(p: Param, key):
    dtype = jnp.dtype(p.dtype)
    if p.init == "zeros":
        return jnp.zeros(p.shape, dtype)
    if p.init == "ones":
        return jnp.ones(p.shape, dtype)
    if p.init == "xavier":
        bound = math.sqrt(6.0 / (p.shape[-2] + p.shape[-1]))
        return jax.random.uniform(key, p.shape, jnp.float32, -bound, bound).astype(dtype)
    if p.init == "fan_in":
        fan_in = math.prod(
            n for n, a in zip(p.shape[:-1], p.axes[:-1], strict=True) if a != "layers"
        )
        std = 1.0 / math.sqrt(fan_in)
    else:
        std = float(p.init)
    return (std * jax.random.normal(key, p.shape, jnp.float32)).astype(dtype)


def init(spec: Spec, key) -> dict:
    """Draw a parameter tree; each leaf's key is folded from its path, so adding a leaf changes no
    other.
    """
    return unflatten(
        {
            path: _draw(p, jax.random.fold_in(key, zlib.crc32(path.encode())))
            for path, p in flatten(spec).items()
        }
    )


def abstract(spec: Spec):
    """The tree of `jax.ShapeDtypeStruct` that a checkpoint for this spec must match."""
    return map_spec(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype)), spec)


def flatten(tree) -> dict[str, Any]:
    """{"a/b": leaf}, in sorted order of the paths."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(flat: dict[str, Any]) -> dict:
    """The tree that `flatten` flattened."""
    return traverse_util.unflatten_dict(flat, sep="/")


def count(spec: Spec) -> int:
    """Number of parameters."""
    return sum(math.prod(p.shape) for p in flatten(spec).values())


def num_bytes(spec: Spec) -> int:
    """Bytes of the parameters in their stored dtype."""
    return sum(
        math.prod(p.shape) * np.dtype(jnp.dtype(p.dtype)).itemsize for p in flatten(spec).values()
    )
