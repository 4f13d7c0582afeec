# SPDX-License-Identifier: Apache-2.0
"""The device mesh and the one table that maps logical axis names to mesh axes."""

import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lvjax.core.errors import InputError
from lvjax.core.params import Spec, flatten, map_spec

MESH_AXES = ("data", "fsdp", "seq")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": "data",
    "length": "seq",
    "heads": "fsdp",
    "embed": None,
    "mlp": "fsdp",
    "channels_out": None,
    "channels_in": None,
    "layers": None,
}


def make_mesh(data: int = 1, fsdp: int = 1, seq: int = 1, devices=None):
    """A mesh over ("data", "fsdp", "seq"); the product must be the number of devices used.

    Axis types are Auto: under jax's default (Explicit) the in-place cache write is refused.
    """
    devices = jax.devices() if devices is None else devices
    need = data * fsdp * seq
    if need > len(devices):
        raise InputError(
            f"mesh {data}x{fsdp}x{seq} needs {need} devices, {len(devices)} present; lower data, "
            "fsdp or seq"
        )
    return jax.make_mesh(
        (data, fsdp, seq), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:need]
    )


def partition(axes, rules=None) -> PartitionSpec:
    """The PartitionSpec of logical axis names under the rules, None for an axis without a name.

    Raises: KeyError for a name that the rules do not have.
    """
    rules = RULES if rules is None else rules
    return PartitionSpec(*(rules[a] if a else None for a in axes))


def shardings(spec: Spec, mesh, rules=None):
    """A tree of NamedSharding for a parameter spec.

    Raises: InputError naming the parameter when a sharded size does not divide.
    """
    for path, p in flatten(spec).items():
        for size, axis in zip(p.shape, partition(p.axes, rules), strict=True):
            axes = axis if isinstance(axis, tuple) else (axis,) if axis else ()
            if size % (devices := math.prod(mesh.shape[a] for a in axes)):
                raise InputError(
                    f"parameter {path}: size {size} does not divide over the {devices} devices of "
                    f"mesh axis {axis!r}; choose another mesh"
                )
    return map_spec(lambda p: NamedSharding(mesh, partition(p.axes, rules)), spec)


def constrain(x, *axes: str | None):
    """x inside a compiled function, laid out by logical axes over the mesh in force
    (`jax.set_mesh`); as it is where there is none.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes))


def shard_batch(tree, mesh):
    """Place every array of `tree` with its leading axis over `data`."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))
