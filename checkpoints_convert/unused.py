# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds and the model does not use, kept in a file beside the part.

The official CLIP file has a text encoder that no Wan uses, and UMT5's table of words may stand in a
file under two names.  With these kept, the way back gives every array that there was.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from checkpoints_convert.convert import source_facts
from checkpoints_convert.recognise import Model
from lvjax.core.checkpoint import Stored, open_arrays
from lvjax.core.errors import CheckpointError
from lvjax.core.streaming import Kind, write_stream


def unused_path(folder: Path, part: str) -> Path:
    """Where the unused arrays of a part lie."""
    return folder / f"{part}.unused.safetensors"


def digest(stored: Stored) -> str:
    """sha256 over what a part is and the checksums of its arrays."""
    sums = [[name, slot.crc] for name, slot in sorted(stored.slots.items())]
    return hashlib.sha256(json.dumps([stored.meta, sums], sort_keys=True).encode()).hexdigest()


def write_unused(
    model: Model,
    stored: Stored,
    folder: Path,
    progress: Callable[[int], None] = lambda size: None,
) -> Path | None:
    """Write the unused arrays of a checkpoint under their own names and types, and which arrays
    were copies of others; what is there already is checked and kept.  None where there are none.

    stored: the part that was made of the checkpoint; the file belongs to it alone.
    Raises: CheckpointError for values that are not finite; StorageError.
    """
    plan, tensors = model.plan(), model.tensors
    if not plan.unused and not plan.copies:
        return None
    path = unused_path(folder, stored.meta["part"])
    meta = {"beside": digest(stored), "naming": model.layout, "copies": dict(plan.copies)}
    meta |= {"source": source_facts(tensors)}
    kinds = {name: Kind(tensors.dtype(name), tensors.shape(name)) for name in plan.unused}
    try:
        found = open_arrays(path)
        found.check()
        if found.meta == meta:
            return path
    except CheckpointError:
        pass  # there is none, or it is damaged: it is written

    def pieces(name: str) -> Callable[[int], np.ndarray]:
        return lambda index: tensors[name]

    write_stream(path, kinds, meta, pieces, progress=progress)
    return path


def open_unused(
    stored: Stored, layout: str
) -> tuple[Stored | dict, dict[str, str], tuple[str, ...]]:
    """What was kept beside a part: the unused arrays, and which names were copies of which; or,
    where `layout` is another naming than theirs, only the names of what has no place in it.

    Raises: CheckpointError when the file is damaged, or of another conversion.
    """
    path = unused_path(stored.path.parent, stored.meta["part"])
    if not path.exists():
        return {}, {}, ()
    found = open_arrays(path)
    if found.meta.get("beside") != digest(stored):
        raise CheckpointError(
            f"{path} belongs to another {stored.path.name}; convert with --keep-unused again, or "
            "remove it"
        )
    if found.meta["naming"] != layout:
        return {}, {}, tuple(found)
    return found, found.meta["copies"], ()
