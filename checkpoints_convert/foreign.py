# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of somebody else's, seen as lvjax's own part: read in place, nothing is written."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from checkpoints_convert.convert import check_copies, part_meta, source_types
from checkpoints_convert.recognise import Model
from checkpoints_convert.rules import LAYER, Place
from checkpoints_convert.sources import find_sources
from lvjax.core.checkpoint import Slot


class Foreign(Mapping):
    """The arrays of a `Model` by our paths, as `lvjax.core.checkpoint.Stored` gives its own.

    Without checksums of ours.  Where layers of an array differ in type it has one that holds them
    all.  Shapes were compared, and values are finite when they are read.
    """

    def __init__(self, model: Model, part: str, path: Path):
        plan = model.plan()
        check_copies(model.tensors, plan)
        self.path, self.meta, self.tensors = path, part_meta(model, part), model.tensors
        self.places = {place.path: place for place in plan.places}
        self.slots = {
            name: Slot(_own_type(place, model), place.param.shape, 0, ())
            for name, place in self.places.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        """Raises: CheckpointError when a value is not finite."""
        return self.places[name].array(self.tensors, self.slots[name].dtype)

    def layer(self, name: str, index: int) -> np.ndarray:
        """One slice along the first axis; of an array that stays as it is, nothing else is read."""
        place, (dtype, (count, *_), *_) = self.places[name], self.slots[name]
        if not 0 <= index < count:
            raise IndexError(f"layer {index} of {name!r}, which has {count}")
        if LAYER in place.rule.source:
            source = place.sources[index]
            return np.ascontiguousarray(
                place.rule.arrays(self.tensors[source])[place.part], dtype=dtype
            )
        if place.rule.transform != "same":
            return self[name][index]
        return self.tensors.rows(place.sources[0], index, index + 1)[0]

    def check(self, names: Iterable[str] | None = None) -> None:
        """Read arrays, all or some, for what the file tells of them.

        Raises: CheckpointError when a value is not finite, or a checksum of the file does not
          match.
        """
        for name in self.places if names is None else names:
            for source in self.places[name].sources:
                self.tensors.check(source)

    def compare(self, crc: dict[str, int]) -> None:
        """There is nothing to compare with."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)


def _own_type(place: Place, model: Model) -> np.dtype:
    """The type of an array; where its layers differ, one that holds each as it is."""
    types = source_types(place, model)
    wide = np.dtype(np.float64 if np.dtype(np.float64) in types else np.float32)
    return types.pop() if len(types) == 1 else wide


def open_foreign(path: Path) -> tuple[dict[str, Foreign], list[str]]:
    """The parts of a model at `path`, and lines on what was left out.

    Raises: CheckpointError when there is no part of a Wan model, or something does not fit.
    """
    sources, left = find_sources(path)
    return {s.part: Foreign(s.model, s.part, s.path) for s in sources}, left
