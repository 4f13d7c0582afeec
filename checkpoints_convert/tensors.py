# SPDX-License-Identifier: Apache-2.0
"""The arrays of a checkpoint by name, each read from its file when asked for.

Owns: where an array is (`Entry`), reading it in blocks with the checks that need its numbers:
finite, and its checksum where the file has one.  Does not own: finding the places (read_*.py).
"""

import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from checkpoints_convert.files import opened, shown
from lvjax.core.dtypes import DTYPES
from lvjax.core.errors import CheckpointError

TENSORS_MAX = 100_000  # in a checkpoint; the largest released Wan has 1,300
NAME_MAX = 500  # characters
AXES_MAX = 8
BYTES_MAX = 2**36  # of one array
BLOCK = 1 << 22  # bytes read and checked at once


class Entry(NamedTuple):
    """Where an array is.

    dtype: safetensors' name.  start: its first byte in the file.  strides: in elements, None for
    C order without gaps.  crc: crc32 of its bytes, None where the file has none.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...] | None = None
    crc: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def possible(name, dtype: str, shape) -> bool:
    """Whether an array may have this name, and whether its shape is one: at most `AXES_MAX` axes,
    at most `BYTES_MAX` bytes, also where an axis has length 0.
    """
    if not isinstance(name, str) or not 0 < len(name) <= NAME_MAX or len(shape) > AXES_MAX:
        return False
    if not all(type(n) is int and n >= 0 for n in shape):
        return False
    size = math.prod(max(n, 1) for n in shape) * np.dtype(DTYPES[dtype]).itemsize
    return size <= BYTES_MAX


Stamp = tuple[int, ...]


def stamp_of(f: BinaryIO) -> Stamp:
    """What tells an open file from another one in its place, and from itself before a change."""
    facts = os.fstat(f.fileno())
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def stamps(entries: Mapping[str, Entry]) -> dict[Path, Stamp]:
    """Those of all files that the arrays are in."""
    found = {}
    for path in {entry.path for entry in entries.values()}:
        with opened(path) as f:
            found[path] = stamp_of(f)
    return found


class Tensors(Mapping):
    """The arrays of a checkpoint by name.

    chosen: which of several sets of weights in the file they are, None where there is one.
    metadata: what the header of a safetensors file says beside them.
    stamps: of the files, see `stamp_of`, when their headers were read; one that is another file
      since then is not read.
    """

    def __init__(
        self,
        entries: dict[str, Entry],
        chosen: str | None = None,
        metadata: Mapping[str, str] | None = None,
        stamps: Mapping[Path, Stamp] | None = None,
    ):
        self.entries, self.chosen, self.metadata = entries, chosen, dict(metadata or {})
        self.stamps = dict(stamps or {})

    def __getitem__(self, name: str) -> np.ndarray:
        """The array, in its stored dtype and C order; nothing else is kept in memory.

        Raises: CheckpointError when it is not finite or not what its checksum says, or the file is
          gone or shorter.
        """
        entry = self.entries[name]
        out = np.empty(entry.shape, np.dtype(DTYPES[entry.dtype]))
        with self._opened(entry.path) as f:
            if entry.strides is None:
                _read(f, entry, name, out.reshape(-1))
            elif out.size:
                _gather(f, entry, name, out, entry.start)
        return out

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows first to last - 1 of the first axis; of an array without gaps nothing else is read.

        Raises: CheckpointError as for the whole array; its checksum is not compared.
        """
        entry = self.entries[name]
        if entry.strides is not None:
            return self[name][first:last]
        part = entry._replace(shape=(last - first, *entry.shape[1:]), crc=None)
        part = part._replace(start=entry.start + first * (part.nbytes // max(1, last - first)))
        return Tensors({name: part}, stamps=self.stamps)[name]

    def check(self, name: str) -> None:
        """Read an array for what reading it would find, in a block of memory.

        Raises: CheckpointError as for the array itself.
        """
        entry, crc = self.entries[name], 0
        if entry.strides is not None:
            self[name]
            return
        flat = np.empty(min(math.prod(entry.shape), BLOCK), np.dtype(DTYPES[entry.dtype]))
        with self._opened(entry.path) as f:
            f.seek(entry.start)
            for left in range(math.prod(entry.shape), 0, -max(1, flat.size)):
                part = flat[: min(left, flat.size)]
                _fill(f, entry.path, part)
                crc = zlib.crc32(part.view(np.uint8), crc)
                check_finite(part, entry.path, name)
        _compare(entry, name, crc)

    def __contains__(self, name) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array; nothing is read."""
        return self.entries[name].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all arrays by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def dtype(self, name: str) -> np.dtype:
        """The type that an array is stored in."""
        return np.dtype(DTYPES[self.entries[name].dtype])

    def nbytes(self, name: str) -> int:
        """Bytes of an array in memory."""
        return self.entries[name].nbytes

    def files(self) -> tuple[tuple[Path, int], ...]:
        """The files that the arrays are in, and their bytes, sorted."""
        paths = sorted({entry.path for entry in self.entries.values()})
        return tuple((path, _size(path)) for path in paths)

    def without(self, prefix: str) -> "Tensors":
        """The same arrays, `prefix` removed from every name.

        Raises: CheckpointError when two names become one.
        """
        names = {name: name.removeprefix(prefix) for name in self.entries}
        return Tensors(renamed(self.entries, names), self.chosen, self.metadata, self.stamps)

    @contextmanager
    def _opened(self, path: Path) -> Iterator[BinaryIO]:
        """A file of the checkpoint, as it was when its header was read, before and after.

        Raises: CheckpointError when it is not.
        """
        with opened(path) as f:
            self._same(path, f)
            yield f
            self._same(path, f)

    def _same(self, path: Path, f: BinaryIO) -> None:
        if self.stamps.get(path) not in (None, stamp_of(f)):
            raise CheckpointError(
                f"{path} has changed since it was opened; run it again when nothing writes it"
            )


def renamed(entries: dict[str, Entry], names: dict[str, str]) -> dict[str, Entry]:
    """Entries with other names.

    Raises: CheckpointError when two names become one.
    """
    found: dict[str, str] = {}
    for old, new in names.items():
        if found.setdefault(new, old) != old:
            path = entries[old].path
            both = f"{shown(found[new])} and {shown(old)}"
            raise CheckpointError(f"{path}: {both} are the same name {shown(new)}; keep one")
    return {names[old]: entry for old, entry in entries.items()}


def _size(path: Path) -> int:
    with opened(path) as f:
        return f.seek(0, 2)


def _read(f: BinaryIO, entry: Entry, name: str, flat: np.ndarray) -> None:
    """Fill `flat` from the start of the array, and check it while it is in the cache."""
    f.seek(entry.start)
    crc, step = 0, BLOCK // flat.itemsize
    for i in range(0, flat.size, step):
        part = flat[i : i + step]
        _fill(f, entry.path, part)
        crc = zlib.crc32(part.view(np.uint8), crc) if entry.crc is not None else 0
        check_finite(part, entry.path, name)
    _compare(entry, name, crc)


def _compare(entry: Entry, name: str, crc: int) -> None:
    if entry.crc not in (None, crc):
        what = f"{entry.path}: array {shown(name)} does not match its checksum"
        raise CheckpointError(f"{what}; download the file again from its source")


def _fill(f: BinaryIO, path: Path, flat: np.ndarray) -> None:
    view, done = memoryview(flat.view(np.uint8)), 0
    while done < len(view):
        if not (count := f.readinto(view[done:])):
            raise CheckpointError(f"{path} became shorter while it was read; try again")
        done += count


def _gather(f: BinaryIO, entry: Entry, name: str, out: np.ndarray, start: int) -> None:
    """Fill `out`, an array or a part of it, from elements that lie `entry.strides` apart.

    start: byte of its first element.  Where the elements from first to last are more than a block,
    the axis with the widest steps is cut.
    """
    spans = [(n - 1) * s for n, s in zip(out.shape, entry.strides, strict=True)]
    size = out.itemsize
    if (sum(spans) + 1) * size <= BLOCK:
        flat = np.empty(sum(spans) + 1, out.dtype)
        f.seek(start)
        _fill(f, entry.path, flat)
        steps = [s * size for s in entry.strides]
        out[...] = np.lib.stride_tricks.as_strided(flat, out.shape, steps, writeable=False)
        check_finite(out, entry.path, name)
        return
    axis = max((s, i) for i, s in enumerate(entry.strides) if out.shape[i] > 1)[1]
    stride, rest = entry.strides[axis], sum(spans) - spans[axis] + 1
    step = max(1, (BLOCK // size - rest) // stride + 1)
    for i in range(0, out.shape[axis], step):
        part = out[(slice(None),) * axis + (slice(i, i + step),)]
        _gather(f, entry, name, part, start + i * stride * size)


def check_finite(a: np.ndarray, path: Path, name: str) -> None:
    """Raises: CheckpointError for NaN and infinity."""
    if a.dtype.kind not in "biu" and not np.isfinite(a).all():
        bad = f"{path}: array {shown(name)} is not finite"
        raise CheckpointError(f"{bad}; download the file again from its source")
