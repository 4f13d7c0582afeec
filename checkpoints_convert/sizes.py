# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model, from the shapes of a checkpoint's arrays, and what config.json says of them."""

import re
from collections.abc import Iterable, Mapping

from checkpoints_convert.rules import LAYER
from lvjax.core.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


def shape_of(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    """The shape of one array.

    Raises: CheckpointError when the array is missing or has another number of axes.
    """
    if name not in shapes:
        raise CheckpointError(f"the checkpoint has no {name}; is it complete?")
    shape = tuple(shapes[name])
    if len(shape) != rank:
        raise CheckpointError(f"{name} has shape {list(shape)}; expected are {rank} axes")
    return shape


def count_layers(names: Iterable[str], source: str) -> int:
    """How many layers there are by the highest number in `source`, a name with {layer} in it."""
    before, after = map(re.escape, source.split(LAYER))
    found = (re.fullmatch(rf"{before}(\d{{1,6}}){after}", name) for name in names)
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def stated(config: Mapping, name: str, value):
    """`value`, which config.json may repeat under `name`.

    Raises: CheckpointError when it says something else.
    """
    said = config.get(name, value)
    if said != value:
        raise CheckpointError(
            f"config.json says {name} {said!r}, the arrays say {value!r}; is it another model's?"
        )
    return value
