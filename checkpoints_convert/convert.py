# SPDX-License-Identifier: Apache-2.0
"""Checkpoint in, lvjax part out, array by array, with a report that proves it.

Owns: types of the written arrays, the report.  Does not own: the plan (rules.py), how files are
written and resumed (lvjax.core.streaming).
"""

import dataclasses
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from checkpoints_convert.files import opened
from checkpoints_convert.read import Tensors
from checkpoints_convert.recognise import KINDS, Model
from checkpoints_convert.rules import LAYER, Place, Plan
from lvjax import __version__
from lvjax.core.dtypes import DTYPES
from lvjax.core.errors import CheckpointError
from lvjax.core.streaming import Kind, Kinds, write_stream

REPORT = "lvjax-report/1"
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ROWS = 4096  # looked at at once, where that needs memory
SAMPLE = 4096  # bytes of an array that tell it from another


def source_types(place: Place, model: Model) -> set[np.dtype]:
    """The types of what an array is made of; layers may differ."""
    return {model.tensors.dtype(name) for name in place.sources}


def out_type(place: Place, model: Model, dtype: str) -> np.dtype:
    """The type that an array is written in: its own ("keep"), or `dtype` where that is harmless.

    Float32 is for everything.  Half precision leaves out what every published run keeps wide.
    """
    types = source_types(place, model)
    if len(types) > 1 and dtype != "float32":
        raise CheckpointError(
            f"the layers of {place.path} are in {sorted(map(str, types))}; use --dtype float32"
        )
    own = types.pop()
    precise = any(word in place.path for word in KINDS[model.kind].precise)
    if dtype == "keep" or (dtype != "float32" and precise):
        return own
    return np.dtype(DTYPES[TYPES[dtype]])


def part_kinds(model: Model, plan: Plan, dtype: str = "keep") -> Kinds:
    """What a conversion writes: every array in its type, shape and pieces.

    Raises: CheckpointError as `out_type`.
    """
    kinds = {}
    for place in plan.places:
        pieces = len(place.sources) if LAYER in place.rule.source else 1
        kinds[place.path] = Kind(out_type(place, model, dtype), place.param.shape, pieces)
    return kinds


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
      bytes of each piece, the `total_bytes` of `part_kinds` in the end.  tell: given the report,
      before the part appears at `path`.
    Raises: CheckpointError for whatever does not fit, before anything is written, and for values
      that are not finite; then nothing is left.  StorageError.
    """
    plan = model.plan()
    places = {place.path: place for place in plan.places}
    kinds = part_kinds(model, plan, dtype)
    check_copies(model.tensors, plan)

    checked = set()  # arrays of the source that were read, and so found to be finite

    def pieces(name: str):
        def piece(index: int) -> np.ndarray:
            made = _piece(places[name], index, kinds[name].dtype, model.tensors)
            checked.add(places[name].sources[index])
            return made

        return piece

    meta, source = part_meta(model, part), source_facts(model.tensors)

    def finish(crc: dict[str, int]) -> None:
        for name in {name for place in plan.places for name in place.sources} - checked:
            model.tensors.check(name)  # what a run before has written
            checked.add(name)
        tell(report(model, part, dtype, crc, source) | {"finite": len(checked)})

    identity = json.dumps([__version__, source])  # another version may convert otherwise
    write_stream(path, kinds, meta, pieces, fmt, identity, progress, finish)


def source_facts(tensors: Tensors) -> dict:
    """The files that a checkpoint is read from, and what tells it from another of the same names
    and sizes: when they changed, a crc32 over the first bytes of every array, and which of several
    sets of weights it is.
    """
    files = []
    for path, size in tensors.files():
        own = {e.start: e.nbytes for e in tensors.entries.values() if e.path == path}
        crc = 0
        with opened(path) as f:
            for start in sorted(own):
                f.seek(start)
                crc = zlib.crc32(f.read(min(own[start], SAMPLE)), crc)
            changed = os.fstat(f.fileno()).st_mtime_ns
        facts = {"name": path.name, "bytes": size, "changed_ns": changed, "sample": f"{crc:08x}"}
        files.append(facts)
    return {"files": files, "weights": tensors.chosen, "arrays": len(tensors)}


def part_meta(model: Model, part: str) -> dict:
    """What a part says of itself."""
    return {"part": part, "config": dataclasses.asdict(model.cfg)}


def _piece(place: Place, index: int, dtype: np.dtype, tensors: Tensors) -> np.ndarray:
    """One layer of an array, or all of it, in our layout and type."""
    name = place.sources[index]
    array = place.rule.arrays(tensors[name])[place.part]
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        out = array.astype(dtype, order="C")
    if not all(np.isfinite(out[i : i + ROWS]).all() for i in range(0, len(out), ROWS)):
        largest = max(abs(float(array.min())), abs(float(array.max())))
        raise CheckpointError(
            f"{name} reaches {largest:.3g}, more than {dtype} holds; use --dtype bfloat16 or "
            "float32"
        )
    return out


def check_copies(tensors: Tensors, plan: Plan) -> None:
    """Raises: CheckpointError when an array is not equal to the one that it repeats."""
    for name, other in plan.copies:
        shape = tensors.shape(name)
        same = shape == tensors.shape(other) and tensors.dtype(name) == tensors.dtype(other)
        for first in range(0, shape[0] if same else 0, ROWS):  # the table of words has gigabytes
            rows = [tensors.rows(n, first, min(first + ROWS, shape[0])) for n in (name, other)]
            same = same and np.array_equal(*rows)
        if not same:
            raise CheckpointError(f"{name!r} and {other!r} must be equal and are not; keep one")


def report(model: Model, part: str, dtype: str, crc: dict[str, int], source: dict) -> dict:
    """What was done, checked while it is written down: every array used once, every parameter
    filled once.

    part, dtype: as `write_part` had them.  crc: of every array that was written.  source: the
      `source_facts` of what was read.
    Raises: CheckpointError when the plan left an array out, or used one twice.
    """
    plan = model.plan()
    kinds = part_kinds(model, plan, dtype)
    uses = Counter((name, p.part) for p in plan.places for name in p.sources)
    used = {name for name, _ in uses}
    copies = dict(plan.copies)
    everything = Counter([*used, *plan.unused, *copies])
    if set(uses.values()) != {1} or everything != Counter(list(model.tensors)):
        wrong = [name for name, n in [*uses.items(), *everything.items()] if n != 1]
        wrong += set(model.tensors) ^ everything.keys()
        raise CheckpointError(f"{model.name}: {wrong[0]!r} is not used exactly once; report it")
    arrays = {}
    for place in plan.places:
        kind = kinds[place.path]
        arrays[place.path] = {
            "dtype": str(kind.dtype),
            "shape": list(kind.shape),
            "crc32": f"{crc[place.path]:08x}",
            "source": place.rule.source,
            "source_dtype": " + ".join(sorted(map(str, source_types(place, model)))),
            "sources": len(place.sources),
        }
    return {
        "format": REPORT,
        "lvjax": __version__,
        **part_meta(model, part),
        "dtype": dtype,
        "naming": model.layout,
        "source": source | {"used": len(used), "unused": list(plan.unused), "copies": copies},
        "parameters": sum(math.prod(kind.shape) for kind in kinds.values()),
        "arrays": arrays,
    }
