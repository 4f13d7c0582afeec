# SPDX-License-Identifier: Apache-2.0
"""Checkpoint in, lvjax part out, array by array, with a report that proves it.

Owns: types of the written arrays, the report.  Does not own: the plan (rules.py), how files are
written and resumed (lvjax.core.streaming).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from checkpoints_convert.read import Tensors
from checkpoints_convert.recognise import KINDS, Model
from checkpoints_convert.rules import LAYER, Place, Plan
from lvjax.core.dtypes import DTYPES
from lvjax.core.errors import CheckpointError
from lvjax.core.streaming import Kind, write_stream

REPORT = "lvjax-report/1"
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ROWS = 4096  # compared at a time


def out_type(place: Place, model: Model, dtype: str) -> np.dtype:
    """The type that an array is written in: its own ("keep"), or `dtype` where that is harmless.

    Float32 is for everything.  Half precision leaves out what every published run keeps wide.
    """
    types = {model.tensors.dtype(name) for name in place.sources}
    if len(types) > 1 and dtype != "float32":
        raise CheckpointError(
            f"the layers of {place.path} are in {sorted(map(str, types))}; use --dtype float32"
        )
    own = types.pop()
    precise = any(word in place.path for word in KINDS[model.kind].precise)
    if dtype == "keep" or (dtype != "float32" and precise):
        return own
    return np.dtype(DTYPES[TYPES[dtype]])


def write_part(
    model: Model,
    path: Path,
    *,
    part: str,
    dtype: str = "keep",
    fmt: str = "safetensors",
    progress: Callable[[int], None] = lambda size: None,
    tell: Callable[[dict], None] = lambda report: None,
) -> None:
    """Convert one part to `path`.

    part: its place in the model ("dit_low" for the second expert, else the kind).
    dtype: "keep" or a name in `TYPES`.  fmt: "safetensors" or "orbax".  progress: called with the
      bytes of each piece.  tell: given the report, before the part appears at `path`.
    Raises: CheckpointError for whatever does not fit, before anything is written, and for values
      that are not finite; StorageError.
    """
    plan = model.plan()
    places = {place.path: place for place in plan.places}
    kinds = {}
    for name, place in places.items():
        pieces = len(place.sources) if LAYER in place.rule.source else 1
        kinds[name] = Kind(out_type(place, model, dtype), place.param.shape, pieces)
    check_copies(model.tensors, plan)

    def pieces(name: str):
        return lambda index: _piece(places[name], index, kinds[name].dtype, model.tensors)

    meta = part_meta(model, part)

    def finish(crc: dict[str, int]) -> None:
        tell(report(model, plan, kinds, crc, meta, dtype))

    identity = repr(source_files(model.tensors))
    write_stream(path, kinds, meta, pieces, fmt, identity, progress, finish)


def source_files(tensors: Tensors) -> list[dict]:
    """The files that a checkpoint is read from."""
    return [{"name": path.name, "bytes": size} for path, size in tensors.files()]


def part_meta(model: Model, part: str) -> dict:
    """What a part says of itself."""
    return {"part": part, "kind": model.kind, "config": dataclasses.asdict(model.cfg)}


def _piece(place: Place, index: int, dtype: np.dtype, tensors: Tensors) -> np.ndarray:
    """One layer of an array, or all of it, in our layout and type."""
    name = place.sources[index]
    array = place.rule.arrays(tensors[name])[place.part]
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(array.astype(dtype))
    if not np.isfinite(out).all():
        largest = float(np.abs(array.astype(np.float64)).max())
        raise CheckpointError(
            f"{name} reaches {largest:.3g}, more than {dtype} holds; use --dtype bfloat16 or "
            "float32"
        )
    return out


def check_copies(tensors: Tensors, plan: Plan) -> None:
    """Raises: CheckpointError when an array is not equal to the one that it repeats."""
    for name, other in plan.copies:
        a, b = tensors[name], tensors[other]
        same = a.shape == b.shape and a.dtype == b.dtype
        rows = range(0, len(a), ROWS)  # some at a time: the table of words has two gigabytes
        if not same or not all(np.array_equal(a[i : i + ROWS], b[i : i + ROWS]) for i in rows):
            raise CheckpointError(f"{name!r} and {other!r} must be equal and are not; keep one")


def report(model: Model, plan: Plan, kinds: dict, crc: dict, meta: dict, dtype: str) -> dict:
    """What was done, checked while it is written down: every array used once, every parameter
    filled once.
    """
    uses = Counter((name, p.part) for p in plan.places for name in p.sources)
    used = {name for name, _ in uses}
    copies = [name for name, _ in plan.copies]
    everything = Counter([*used, *plan.unused, *copies])
    assert set(uses.values()) == {1} and everything == Counter(list(model.tensors))
    arrays = {}
    for place in plan.places:
        kind = kinds[place.path]
        arrays[place.path] = {
            "dtype": str(kind.dtype),
            "shape": list(kind.shape),
            "crc32": f"{crc[place.path]:08x}",
            "source": place.rule.source,
            "sources": len(place.sources),
        }
    return {
        "format": REPORT,
        **meta,
        "naming": model.layout,
        "dtype": dtype,
        "source": {
            "files": source_files(model.tensors),
            "weights": model.tensors.chosen,
            "arrays": len(model.tensors),
            "used": len(used),
            "unused": list(plan.unused),
            "copies": copies,
        },
        "parameters": sum(math.prod(kind.shape) for kind in kinds.values()),
        "finite": True,  # every array was read through the check for it
        "arrays": arrays,
    }
