# SPDX-License-Identifier: Apache-2.0
"""Arrays on disk: one safetensors file with a crc32 per array, written atomically.

Owns: saving and loading flat dicts of arrays (weights, run states, training snapshots).
Does not own: what the arrays mean, or reading other people's checkpoints (checkpoints_convert).
"""

import json
import os
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save as st_save

from lvjax.core.errors import CheckpointError, StorageError

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def write_atomic(path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, sync it, and rename it into place.

    Raises: StorageError (full disk, no permission) with the path; the old file, if any, stays.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves is written over
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        with suppress(OSError):
            tmp.unlink()
        raise StorageError(
            f"cannot write {path}: {e.strerror or e}; free space or choose another place"
        ) from e


def checksum(a: np.ndarray) -> int:
    """crc32 of the bytes of an array."""
    return zlib.crc32(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data)


def save_arrays(path, arrays: dict[str, np.ndarray], meta: dict | None = None) -> None:
    """Save a flat dict of arrays and JSON-able `meta` into one file, atomically, with a checksum
    per array and of the meta.
    """
    arrays = {k: np.asarray(v, order="C") for k, v in arrays.items()}
    text = json.dumps(meta or {}, sort_keys=True)
    crc = {k: checksum(v) for k, v in arrays.items()}
    head = {
        "format": "lvjax-arrays/1",
        "meta": text,
        "meta_crc32": str(zlib.crc32(text.encode())),
        "crc32": json.dumps(crc, sort_keys=True),
    }
    write_atomic(path, st_save(arrays, metadata=head))


def _array(entry: dict, body: memoryview) -> np.ndarray:
    """One array of a safetensors body; safetensors' own numpy loader has no bfloat16 or float8."""
    start, end = entry["data_offsets"]
    return np.frombuffer(body[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])


def load_arrays(path) -> tuple[dict[str, np.ndarray], dict]:
    """Read what `save_arrays` wrote; returns (arrays, meta).

    Raises: CheckpointError naming the file, and the array whose checksum does not match.
    """
    with _opened(path) as f:
        layout, crc, meta = _header(path, f)
        body = memoryview(f.read())
        arrays = {k: _array(entry, body) for k, entry in layout.items()}
    if set(crc) != set(arrays):
        raise CheckpointError(
            f"{path}: the list of arrays does not match its header; restore the file from its "
            "source"
        )
    for name, a in arrays.items():
        if checksum(a) != crc[name]:
            raise CheckpointError(
                f"{path}: array {name!r} does not match its checksum; restore the file from its "
                "source"
            )
    return arrays, meta


def load_meta(path) -> dict:
    """The meta alone of what `save_arrays` wrote; the arrays are neither read nor checked.

    Raises: CheckpointError naming the file.
    """
    with _opened(path) as f:
        return _header(path, f)[2]


@contextmanager
def _opened(path):
    if not Path(path).is_file():
        raise CheckpointError(f"no such file: {path}; give the path of a saved lvjax file")
    try:
        with open(path, "rb") as f:
            yield f
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as e:
        raise CheckpointError(
            f"{path} is not a readable lvjax file ({type(e).__name__}); restore it from its source"
        ) from e


def _header(path, f) -> tuple[dict, dict[str, int], dict]:
    """The layout of the arrays, their checksums and the meta; `f` is then at the first array."""
    size = int.from_bytes(f.read(8), "little")
    if size > os.fstat(f.fileno()).st_size:
        raise ValueError("the header ends behind the file")
    layout = json.loads(f.read(size))
    head = layout.pop("__metadata__")
    if str(zlib.crc32(head["meta"].encode())) != head.get("meta_crc32"):
        raise CheckpointError(
            f"{path}: the metadata does not match its checksum; restore the file from its source"
        )
    return layout, json.loads(head["crc32"]), json.loads(head["meta"])


def tree_arrays(tree) -> dict[str, np.ndarray]:
    """Any pytree of arrays as {"path/to/leaf": array} on the host."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def restore_tree(like, arrays: dict[str, np.ndarray], source: str = "the file"):
    """The arrays in the structure of `like` (arrays or ShapeDtypeStructs), on the host.

    Raises: CheckpointError naming the first array that is missing, of another shape or dtype, or
    left over.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if left := sorted(set(arrays) - set(names)):
        raise CheckpointError(
            f"{source}: array {left[0]!r} belongs to another model or version ({len(left)} such "
            "arrays)"
        )
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if name not in arrays:
            raise CheckpointError(
                f"{source}: array {name!r} is missing; restore the file from its source"
            )
        a = arrays[name]
        if a.shape != leaf.shape or a.dtype != leaf.dtype:
            raise CheckpointError(
                f"{source}: array {name!r} is {a.dtype}{list(a.shape)}, expected "
                f"{leaf.dtype}{list(leaf.shape)}"
            )
    return jax.tree_util.tree_unflatten(structure, [arrays[n] for n in names])
