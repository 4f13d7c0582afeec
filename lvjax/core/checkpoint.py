# SPDX-License-Identifier: Apache-2.0
"""Arrays on disk: one safetensors file with a crc32 per array, written atomically.

Owns: saving and loading flat dicts of arrays (weights, run states), and the
format of the file.
Does not own: what the arrays mean, or reading other people's checkpoints (checkpoints_convert).
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from lvjax.core.dtypes import DTYPES, NAMES
from lvjax.core.errors import CheckpointError, StorageError

HEADER_MAX = 100_000_000  # bytes
BLOCK = 1 << 24  # bytes read at once where nothing is kept
OLD, FORMAT = "lvjax-arrays/1", "lvjax-arrays/2"  # the old one has no checksum of its header
HOLE = '"header_crc32":"00000000"'
SEAL = "crc32"  # the name of the checksum in a JSON file


@contextmanager
def atomic(path):
    """A file open for writing beside `path`, which is synced and renamed into place in the end.

    Raises: StorageError (full disk, no permission) with the path; the old file, if any, stays.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves is written over
    try:
        with open(tmp, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        with suppress(OSError):
            tmp.unlink()
        raise StorageError(
            f"cannot write {path}: {e.strerror or e}; free space or choose another place"
        ) from e


def write_atomic(path, data: bytes) -> None:
    """Write a small file, as `atomic`."""
    with atomic(path) as f:
        f.write(data)


def raw(a: np.ndarray) -> memoryview:
    """The bytes of an array, without a copy where it is contiguous."""
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8).data


def checksum(a: np.ndarray) -> int:
    """crc32 of the bytes of an array."""
    return zlib.crc32(raw(a))


def file_layout(kinds: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, dict]:
    """Arrays laid one after another as safetensors describes them, the widest types first, so that
    each is aligned.  kinds: {name: (dtype, shape)}.
    """
    layout, end = {}, 0
    for name in sorted(kinds, key=lambda n: (-kinds[n][0].itemsize, n)):
        dtype, shape = kinds[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        layout[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    return layout


def file_header(layout: dict[str, dict], meta: dict, crc: dict[str, int]) -> bytes:
    """The first bytes of a file.  Their number depends on the layout and the meta alone, so that
    the checksums can be filled in when the arrays are written.

    Raises: StorageError when they are more than can be read back.
    """
    text = json.dumps(meta, sort_keys=True)
    # "pt" is what other programs ask for before they read a file
    head = {"format": "pt", "lvjax": FORMAT, "meta": text, "crc32": "", "header_crc32": "0" * 8}
    head["crc32"] = json.dumps({name: f"{crc[name]:08x}" for name in layout})
    body = json.dumps({"__metadata__": head} | layout, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    if len(body) > HEADER_MAX:  # nobody could read it back
        raise StorageError(
            f"what is saved beside the arrays of a file has {len(body)} bytes, allowed are "
            f"{HEADER_MAX}; give fewer or smaller inputs"
        )
    assert body.count(HOLE.encode()) == 1
    own = HOLE.replace("0" * 8, f"{zlib.crc32(body):08x}")
    return len(body).to_bytes(8, "little") + body.replace(HOLE.encode(), own.encode())


def save_arrays(path, arrays: dict[str, np.ndarray], meta: dict | None = None) -> None:
    """Save a flat dict of arrays and JSON-able `meta` into one file, atomically, with a checksum
    per array and one of the header.
    """
    arrays = {k: np.asarray(v, order="C") for k, v in arrays.items()}
    layout = file_layout({k: (a.dtype, a.shape) for k, a in arrays.items()})
    crc = {k: checksum(a) for k, a in arrays.items()}
    head = file_header(layout, meta or {}, crc)
    with atomic(path) as f:
        f.write(head)
        for name in layout:
            f.write(raw(arrays[name]))


class Slot(NamedTuple):
    """Where an array lies: its type, shape and crc32, and the pieces of files that are its bytes,
    in order, as (file, first byte, bytes).
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    crc: int
    pieces: tuple[tuple[Path, int, int], ...]


@dataclass(frozen=True)
class Stored(Mapping):
    """Arrays with checksums on disk; each is read, and checked, when it is asked for.

    path: of the file, or of the folder (orbax_layout.py).  meta: what was saved beside the arrays.
    """

    path: Path
    slots: dict[str, Slot]
    meta: dict

    def __getitem__(self, name: str) -> np.ndarray:
        """Raises: CheckpointError naming the array whose checksum does not match."""
        slot = self.slots[name]
        out = np.empty(slot.shape, slot.dtype)
        self._read(name, 0, raw(out))
        self.compare({name: zlib.crc32(raw(out))})
        return out

    def layer(self, name: str, index: int) -> np.ndarray:
        """One slice along the first axis.  Only the whole array has a checksum: see `layers`."""
        slot = self.slots[name]
        if not 0 <= index < slot.shape[0]:
            raise IndexError(f"layer {index} of {name!r}, which has {slot.shape[0]}")
        out = np.empty(slot.shape[1:], slot.dtype)
        self._read(name, index * out.nbytes, raw(out))
        return out

    def check(self, names: Iterable[str] | None = None) -> None:
        """Compare checksums, of all arrays or of some, in flat memory.

        Raises: CheckpointError naming the first array that does not match.
        """
        block = memoryview(bytearray(BLOCK))
        for name in self.slots if names is None else names:
            slot, crc = self.slots[name], 0
            left = math.prod(slot.shape) * slot.dtype.itemsize
            for at in range(0, left, BLOCK):
                part = block[: min(BLOCK, left - at)]
                self._read(name, at, part)
                crc = zlib.crc32(part, crc)
            self.compare({name: crc})

    def compare(self, crc: dict[str, int]) -> None:
        """Raises: CheckpointError naming the first array whose checksum is another."""
        for name, found in crc.items():
            if found != self.slots[name].crc:
                raise CheckpointError(
                    f"{self.path}: array {name!r} does not match its checksum; restore the file "
                    "from its source"
                )

    def _read(self, name: str, at: int, out: memoryview) -> None:
        """Fill `out` with the bytes of an array from byte `at` on."""
        done = 0
        for file, start, size in self.slots[name].pieces:
            skip, at = min(at, size), max(0, at - size)
            part = out[done : done + size - skip]
            if part:
                with readable(self.path), open(file, "rb") as f:
                    f.seek(start + skip)
                    if f.readinto(part) != len(part):
                        raise ValueError("it is cut short")
            done += len(part)

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)


def layers(stored, prefix: str) -> Iterator[dict[str, np.ndarray]]:
    """The arrays below "prefix/", slice by slice along their first axis: {path below: slice}.

    stored: a `Stored`, or what has its methods.  Only one slice is held; the checksums are compared
    after the last.
    Raises: CheckpointError naming the array that does not match.
    """
    names = [name for name in stored if name.startswith(f"{prefix}/")]
    crc = dict.fromkeys(names, 0)
    for index in range(stored.slots[names[0]].shape[0]):
        found = {name: stored.layer(name, index) for name in names}
        crc = {name: zlib.crc32(raw(array), crc[name]) for name, array in found.items()}
        yield {name.removeprefix(f"{prefix}/"): array for name, array in found.items()}
    stored.compare(crc)


def open_arrays(path) -> Stored:
    """Open what `save_arrays` wrote; no array is read.

    Raises: CheckpointError naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}; give the path of a saved lvjax file")
    with readable(path), open(path, "rb") as f:
        layout, crc, meta = _header(path, f)
        begin, end, slots = f.tell(), os.fstat(f.fileno()).st_size, {}
        if set(crc) != set(layout):
            raise ValueError("its list of arrays does not match its header")
        for name, entry in layout.items():
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            if stop - start != math.prod(shape) * dtype.itemsize or begin + stop > end:
                raise ValueError(f"array {name!r} is cut short")
            slots[name] = Slot(dtype, shape, crc[name], ((path, begin + start, stop - start),))
    return Stored(path, slots, meta)


def load_arrays(path) -> tuple[dict[str, np.ndarray], dict]:
    """Read what `save_arrays` wrote; returns (arrays, meta).

    Raises: CheckpointError naming the file, and the array whose checksum does not match.
    """
    stored = open_arrays(path)
    return dict(stored), stored.meta


def load_meta(path) -> dict:
    """The meta alone of what `save_arrays` wrote; the arrays are neither read nor checked.

    Raises: CheckpointError naming the file.
    """
    return open_arrays(path).meta


def sealed(content: dict) -> bytes:
    """A JSON object as a text for people, with a checksum of what it says."""
    return (json.dumps(content | {SEAL: _seal(content)}, indent=1) + "\n").encode()


def unsealed(path) -> dict:
    """What a JSON file says.  One without a checksum, as people write it, is taken as it is.

    Raises: CheckpointError when the checksum does not match; OSError, ValueError.
    """
    content = json.loads(Path(path).read_bytes())
    if not isinstance(content, dict):
        return {}
    own = _seal({key: value for key, value in content.items() if key != SEAL})
    if content.pop(SEAL, own) != own:
        raise CheckpointError(
            f"{path} does not match its checksum; restore it, or remove the line {SEAL!r} if "
            "somebody changed it on purpose"
        )
    return content


def _seal(content: dict) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


@contextmanager
def readable(path):
    """Whatever goes wrong while `path` is read is a CheckpointError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as e:
        raise CheckpointError(
            f"{path} is not a readable lvjax file ({type(e).__name__}); restore it from its source"
        ) from e


def _header(path, f) -> tuple[dict, dict[str, int], dict]:
    """The layout of the arrays, their checksums and the meta; `f` is then at the first array."""
    size = int.from_bytes(f.read(8), "little")
    if size > min(os.fstat(f.fileno()).st_size, HEADER_MAX):
        raise ValueError("the header ends behind the file")
    text = f.read(size)
    layout = json.loads(text)
    head = layout.pop("__metadata__")
    crc = json.loads(head["crc32"])
    if head["format"] == OLD:
        sound = str(zlib.crc32(head["meta"].encode())) == head.get("meta_crc32")
    else:
        crc = {name: int(value, 16) for name, value in crc.items()}
        own = HOLE.replace("0" * 8, head["header_crc32"])
        sound = head["lvjax"] == FORMAT
        sound = sound and f"{zlib.crc32(text.replace(own.encode(), HOLE.encode())):08x}" in own
    if not sound:
        raise CheckpointError(
            f"{path}: the metadata does not match its checksum; restore the file from its source"
        )
    return layout, crc, json.loads(head["meta"])


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
