# SPDX-License-Identifier: Apache-2.0
"""Writing arrays that do not fit into memory, piece by piece, so that a killed run can go on.

A piece is a slice along the first axis of an array, or the whole of it.  Everything is written to a
hidden place beside the target, with a log of the pieces done and their running checksums; the
target appears under its name when it is complete, and not before.  What a run before has left is
read again and compared before it is believed.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lvjax.core.checkpoint import BLOCK, Stored, file_header, file_layout, open_arrays, raw
from lvjax.core.errors import CheckpointError, StorageError
from lvjax.core.orbax_layout import OWN, metadata_files, open_folder, own_file, piece_file


class Kind(NamedTuple):
    """An array to be written: its type, its shape, and in how many pieces along the first axis."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: int = 1

    @property
    def piece_bytes(self) -> int:
        """Bytes of one piece."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize // self.pieces


Kinds = dict[str, Kind]


def total_bytes(kinds: Kinds) -> int:
    """Bytes of all arrays."""
    return sum(kind.piece_bytes * kind.pieces for kind in kinds.values())


class FileTarget:
    """One safetensors file with checksums (core/checkpoint.py)."""

    suffix = ".safetensors"

    def __init__(self, partial: Path, kinds: Kinds, meta: dict):
        self.partial, self.kinds, self.meta = partial, kinds, meta
        self.layout = file_layout({name: (k.dtype, k.shape) for name, k in kinds.items()})
        self.begin = len(file_header(self.layout, meta, dict.fromkeys(kinds, 0)))

    def place(self, name: str, index: int) -> tuple[Path, int]:
        """The file and the first byte of a piece."""
        start = self.begin + self.layout[name]["data_offsets"][0]
        return self.partial, start + index * self.kinds[name].piece_bytes

    def commit(self, crc: dict[str, int]) -> None:
        """Write what makes the arrays readable."""
        with open(self.partial, "r+b" if self.partial.exists() else "wb") as f:
            f.write(file_header(self.layout, self.meta, crc))
            f.flush()
            os.fsync(f.fileno())


class FolderTarget:
    """A folder that Orbax reads (core/orbax_layout.py)."""

    suffix = ""

    def __init__(self, partial: Path, kinds: Kinds, meta: dict):
        self.partial, self.kinds, self.meta = partial, kinds, meta

    def place(self, name: str, index: int) -> tuple[Path, int]:
        """The file and the first byte of a piece."""
        return self.partial / piece_file(name, index, len(self.kinds[name].shape)), 0

    def commit(self, crc: dict[str, int]) -> None:
        """Write what makes the arrays readable."""
        files = metadata_files(self.kinds)
        for name, data in (files | {OWN: own_file(self.kinds, self.meta, crc, files)}).items():
            path = self.partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        os.sync()  # thousands of files may be there


TARGETS = {"safetensors": FileTarget, "orbax": FolderTarget}


def open_stored(path) -> Stored:
    """Open checksummed arrays of either kind.

    Raises: CheckpointError naming what is damaged or missing.
    """
    return open_folder(path) if Path(path).is_dir() else open_arrays(path)


def write_stream(
    path: Path,
    kinds: Kinds,
    meta: dict,
    pieces: Callable[[str], Callable[[int], np.ndarray]],
    fmt: str = "safetensors",
    identity: str = "",
    progress: Callable[[int], None] = lambda size: None,
    finish: Callable[[dict[str, int]], None] = lambda crc: None,
) -> None:
    """Write arrays to `path`.

    kinds: what is written.  meta: saved beside it.  identity: of the source; with these it tells
      whether what an interrupted run has left is part of the same work.
    pieces(name)(index): the array of that piece, of the type and shape that `kinds` says.
    fmt: a name in `TARGETS`.  progress: called with the bytes of each piece done, `total_bytes` in
      the end.
    finish: called with the crc32 of every array before the target appears.
    Raises: StorageError when the disk is full or the place cannot be written; what is done is kept
      for the next run.  CheckpointError of `pieces`; then nothing is kept, as nothing can be made
      of such a source.
    """
    partial, log, _ = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = TARGETS[fmt](partial, kinds, meta)
        done = _begin(partial, log, [fmt, _described(kinds), meta, identity])
        _check_room(path, partial, kinds)
        crc = {}
        with open(log, "a") as lines:
            for name in kinds:
                crc[name] = _write_array(target, name, pieces(name), done, lines, progress)
        target.commit(crc)
        finish(crc)
        _put(partial, path)
        log.unlink()
    except CheckpointError:
        with suppress(OSError):
            _remove(partial)
            _remove(log)
        raise
    except OSError as e:
        raise StorageError(
            f"cannot write {path}: {e.strerror or e}; free space or choose another place, and run "
            "it again: it goes on where it stopped"
        ) from e


def _beside(path: Path) -> tuple[Path, Path, Path]:
    """Where a target grows, the log of that, and where an older target waits to be removed."""
    partial, log, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "log", "old"))
    return partial, log, old


def remove(path: Path) -> None:
    """Remove a target, and what killed runs have left of it; nothing need be there.

    A folder is moved to where nobody looks for it first: a kill leaves no half of it in its place.
    """
    clean(path)
    if path.is_dir() and not path.is_symlink():
        *_, old = _beside(path)
        os.rename(path, old)
        path = old
    _remove(path)


def clean(path: Path) -> None:
    """Remove what killed runs have left beside `path`, when it is complete or not wanted."""
    for place in _beside(path):
        _remove(place)


def _described(kinds: Kinds) -> dict:
    return {name: [str(kind.dtype), *kind[1:]] for name, kind in kinds.items()}


def _begin(partial: Path, log: Path, work: list) -> dict:
    """Pieces that a run before has logged, {(name, index): running crc32}; what belongs to other
    work is removed.
    """
    first = hashlib.sha256(json.dumps(work).encode()).hexdigest()
    try:
        lines = log.read_text().split("\n")[:-1]  # the last one may be cut short
    except (OSError, ValueError):
        lines = []
    if lines[:1] != [first] or not partial.exists():
        _remove(partial)
        log.write_text(first + "\n")
        lines = [first]
    done = {}
    for line in lines[1:]:
        with suppress(ValueError):  # a line that a power cut has damaged: that piece is not done
            name, index, crc = line.rsplit(" ", 2)
            done[name, int(index)] = int(crc, 16)
    return done


def _check_room(path: Path, partial: Path, kinds: Kinds) -> None:
    there = [partial, *partial.rglob("*")] if partial.is_dir() else [partial]
    have = sum(p.stat().st_blocks * 512 for p in there if p.exists())
    needs = total_bytes(kinds) - have
    free = shutil.disk_usage(path.parent).free
    if needs > free:
        raise StorageError(
            f"{path} needs {needs / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free; free space or "
            "choose another place"
        )


def _write_array(target, name: str, piece, done: dict, lines, progress) -> int:
    """Write the pieces of an array that are not there yet; returns its crc32."""
    kind, crc = target.kinds[name], 0
    for index in range(kind.pieces):
        file, start = target.place(name, index)
        if (name, index) in done:
            if (again := _read_crc(file, start, kind.piece_bytes, crc)) == done[name, index]:
                crc = again
                progress(kind.piece_bytes)
                continue
        array = piece(index)
        assert array.dtype == kind.dtype and array.nbytes == kind.piece_bytes, name
        data = raw(array)
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "r+b" if file.exists() else "wb") as f:
            f.seek(start)
            f.write(data)
        crc = zlib.crc32(data, crc)
        lines.write(f"{name} {index} {crc:08x}\n")
        lines.flush()
        progress(kind.piece_bytes)
        del array, data
    return crc


def _read_crc(file: Path, start: int, size: int, crc: int) -> int | None:
    """crc32 going on from `crc` over a piece on disk; None when it is not all there."""
    try:
        with open(file, "rb") as f:
            f.seek(start)
            while size:
                if not (block := f.read(min(size, BLOCK))):
                    return None
                crc, size = zlib.crc32(block, crc), size - len(block)
    except FileNotFoundError:
        return None
    return crc


def _put(partial: Path, path: Path) -> None:
    """Give the finished target its name, in place of an older one, which stays until then.

    A folder cannot be replaced at once: it is moved aside first, to where nobody looks for it.
    """
    *_, old = _beside(path)
    if path.is_dir() or (partial.is_dir() and path.exists()):
        _remove(old)
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except OSError:
            os.rename(old, path)
            raise
    else:
        os.replace(partial, path)
    _remove(old)  # also one that a killed run has left
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
