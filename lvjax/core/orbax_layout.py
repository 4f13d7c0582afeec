# SPDX-License-Identifier: Apache-2.0
"""A folder of arrays that Orbax restores as it is, and that shows damage: one file per array, or
per layer of a stacked one, and `lvjax.json` with the checksums.

Orbax's own metadata describes plain (zarr 2, uncompressed) arrays, whose files hold nothing but the
numbers; so they are written, and resumed, piece by piece, and Orbax restores them onto any mesh.
It notices no damage in them; `open_folder` does.
Source: google/orbax, checkpoint/orbax/checkpoint/_src/handlers/pytree_checkpoint_handler.py; the
zarr 2 specification.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

from lvjax.core.checkpoint import Slot, Stored, readable
from lvjax.core.dtypes import DTYPES, NAMES
from lvjax.core.errors import CheckpointError

OWN = "lvjax.json"
FORMAT = "lvjax-folder/1"
HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
KEY_OF_DICT = 2  # Orbax's code for a step into a dictionary


def array_folder(name: str) -> str:
    """The folder of an array "a/b/c"."""
    return name.replace("/", ".")


def piece_file(name: str, index: int, ndim: int) -> str:
    """The file of piece `index` along the first axis of an array."""
    return f"{array_folder(name)}/{'.'.join(map(str, (index, *(0,) * (ndim - 1))))}"


def _zarray(dtype: np.dtype, shape: tuple[int, ...], pieces: int) -> dict:
    chunks = (shape[0] // pieces, *shape[1:]) if shape else ()
    plain = dtype.str if dtype.kind in "fiub" else str(dtype)  # as tensorstore names bfloat16
    return {
        "chunks": [max(1, n) for n in chunks],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": plain,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }


def metadata_files(kinds: dict[str, tuple[np.dtype, tuple[int, ...], int]]) -> dict[str, bytes]:
    """What makes the folder a checkpoint of Orbax, by file.

    kinds: {name: (dtype, shape, pieces along the first axis)}.
    """
    tree, files = {}, {}
    for name, (dtype, shape, pieces) in kinds.items():
        keys = tuple(name.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": KEY_OF_DICT} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        files[f"{array_folder(name)}/.zarray"] = _zarray(dtype, shape, pieces)
    files["_METADATA"] = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    files["_CHECKPOINT_METADATA"] = {
        "item_handlers": HANDLER,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": 0,
        "commit_timestamp_nsecs": 0,
        "custom_metadata": {},
    }
    texts = {name: json.dumps(value, sort_keys=True).encode() for name, value in files.items()}
    return texts | {"commit_success.txt": b"complete\n"}


def own_file(kinds, meta: dict, crc: dict[str, int], files: dict[str, bytes]) -> bytes:
    """`lvjax.json`: the arrays, their checksums, those of the other metadata files, and its own."""
    arrays = {
        name: [NAMES[dtype], list(shape), pieces, f"{crc[name]:08x}"]
        for name, (dtype, shape, pieces) in kinds.items()
    }
    others = {name: f"{zlib.crc32(data):08x}" for name, data in files.items()}
    body = {"format": FORMAT, "meta": meta, "arrays": arrays, "files": others}
    return _signed(json.dumps(body, sort_keys=True, separators=(",", ":")))


def _signed(text: str) -> bytes:
    """A JSON text with its checksum before it."""
    return f'{{"crc32":"{zlib.crc32(text.encode()):08x}","body":{text}}}\n'.encode()


def open_folder(path) -> Stored:
    """Open such a folder; its metadata is checked, no array is read.

    Raises: CheckpointError naming the file that is damaged or missing.
    """
    path = Path(path)
    own = path / OWN
    if not own.is_file():
        raise CheckpointError(f"{path} has no {OWN}; give a folder that `lvjax convert` finished")
    with readable(own):
        text = own.read_bytes()
        body = json.loads(text)["body"]
        again = json.dumps(body, sort_keys=True, separators=(",", ":"))
        if text != _signed(again):
            raise ValueError("its checksum does not match")
        if body["format"] != FORMAT:
            raise ValueError(f"its format is {body['format']!r}")
        slots = {name: _slot(path, name, *entry) for name, entry in body["arrays"].items()}
    for name, crc in body["files"].items():
        with readable(path / name):
            if f"{zlib.crc32((path / name).read_bytes()):08x}" != crc:
                raise ValueError("its checksum does not match")
    for slot in slots.values():
        for file, _, size in slot.pieces:
            with readable(file):
                if file.stat().st_size != size:
                    raise ValueError(f"it has other than {size} bytes")
    return Stored(path, slots, body["meta"])


def _slot(path: Path, name: str, kind: str, shape: list[int], pieces: int, crc: str) -> Slot:
    """Where an array lies, from its line in `lvjax.json`."""
    dtype = np.dtype(DTYPES[kind])
    if pieces < 1:
        raise ValueError(f"array {name!r} in {pieces} pieces")
    size = math.prod(shape) * dtype.itemsize // pieces
    places = tuple((path / piece_file(name, i, len(shape)), 0, size) for i in range(pieces))
    return Slot(dtype, tuple(shape), int(crc, 16), places)
