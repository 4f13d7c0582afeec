# SPDX-License-Identifier: Apache-2.0
"""The directory of a zip file as `torch.save` writes it: entries stored, one after another.

Stricter than zip: no compression (so nothing can unpack to more than is there), no encryption, no
comment, no bytes outside the archive, no name twice, no name that leaves a folder, and no two
entries on the same bytes.  Nothing is unpacked: an entry is a place in the file.
Source: PKWARE, APPNOTE.TXT 6.3 (sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16, 4.5.3).
"""

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from checkpoints_convert.files import shown, size_of, take
from checkpoints_convert.tensors import TENSORS_MAX
from lvjax.core.errors import CheckpointError

ENTRIES_MAX = TENSORS_MAX + 1000
DIRECTORY_MAX = 25_000_000  # bytes
NAME_MAX = 1000  # bytes
ENCRYPTED = 1 | 1 << 6 | 1 << 13  # bits of the flags
FULL = 0xFFFFFFFF  # the number is in the ZIP64 part

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_PLACE64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")


class Record(NamedTuple):
    """One entry: its first byte in the file, its bytes, its crc32 (0 when none was written)."""

    start: int
    size: int
    crc: int


class _Entry(NamedTuple):
    """An entry as the directory has it; header: first byte of its local header."""

    name: str
    size: int
    crc: int
    header: int


def read_directory(f: BinaryIO, path: Path) -> dict[str, Record]:
    """The entries of an open zip file by name.

    Raises: CheckpointError for whatever `torch.save` does not write.
    """
    try:
        count, size, start = _end(f, path)
        if count > ENTRIES_MAX or size > DIRECTORY_MAX:
            raise ValueError(f"{count} entries, directory of {size} bytes: more than are read")
        entries = _central(take(f, path, start, size), count)
        return _records(f, path, entries, start)
    except (ValueError, struct.error) as e:
        raise CheckpointError(
            f"{path} is not as torch.save writes it ({e}); download it again, or save it again as "
            "safetensors"
        ) from e


def _end(f: BinaryIO, path: Path) -> tuple[int, int, int]:
    """Entries, bytes and first byte of the directory."""
    at = size_of(f) - _END.size
    if at < 0:
        raise ValueError("cut short")
    mark, disk, first, here, count, size, start, comment = _END.unpack(take(f, path, at, _END.size))
    if mark != b"PK\5\6" or comment:
        raise ValueError("cut short, or bytes after its end")
    place = at - _PLACE64.size
    if place >= _END64.size and take(f, path, place, 4) == b"PK\6\7":
        at = place - _END64.size
        _, disk, where, disks = _PLACE64.unpack(take(f, path, place, _PLACE64.size))
        mark, length, _, _, number, first, here, count, size, start = _END64.unpack(
            take(f, path, at, _END64.size)
        )
        if mark != b"PK\6\6" or length != _END64.size - 12 or where != at or disks > 1 or number:
            raise ValueError("its ZIP64 end is damaged")
    if disk or first or here != count or start + size != at:
        raise ValueError("its directory is not where it should be")
    return count, size, start


def _central(directory: bytes, count: int) -> dict[str, _Entry]:
    at, found = 0, {}
    for _ in range(count):
        (
            mark,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            n,
            extra,
            comment,
            disk,
            _,
            _,
            header,
        ) = _CENTRAL.unpack_from(directory, at)
        at += _CENTRAL.size
        name = _name(directory[at : at + n])
        fields = directory[at + n : at + n + extra]
        at += n + extra + comment
        if mark != b"PK\1\2" or disk or at > len(directory):
            raise ValueError("its directory is damaged")
        size, packed, header = _zip64(fields, [size, packed, header])
        if flags & ENCRYPTED:
            raise ValueError(f"{shown(name)} is encrypted")
        if method or size != packed:
            raise ValueError(f"{shown(name)} is compressed")
        if name in found:
            raise ValueError(f"{shown(name)} is in it twice")
        found[name] = _Entry(name, size, crc, header)
    if at != len(directory):
        raise ValueError("its directory has another number of entries than it says")
    return found


def _name(raw: bytes) -> str:
    name = raw.decode()
    if not 0 < len(raw) <= NAME_MAX or not name.isprintable() or "\\" in name:
        raise ValueError(f"an entry with the name {shown(name)}")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"an entry with the name {shown(name)}, which leaves its folder")
    return name


def _zip64(extra: bytes, values: list[int]) -> list[int]:
    """The numbers, those that are `FULL` taken from the ZIP64 field."""
    at = 0
    while at + 4 <= len(extra) and FULL in values:
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at))
            values = [next(numbers, FULL) if v == FULL else v for v in values]
            break
        at += length
    return values


def _records(f: BinaryIO, path: Path, entries: dict[str, _Entry], end: int) -> dict[str, Record]:
    """Where the bytes of the entries are, from their local headers.  end: of the last one."""
    ordered = sorted(entries.values(), key=lambda e: e.header)
    if ordered and ordered[0].header:
        raise ValueError("bytes before its first entry")
    limits = [e.header for e in ordered[1:]] + [end]
    found = {}
    for entry, limit in zip(ordered, limits, strict=True):
        name, at = entry.name.encode(), entry.header
        if at + _LOCAL.size + len(name) > limit:
            raise ValueError(f"{shown(entry.name)} overlaps another entry")
        head = take(f, path, at, _LOCAL.size + len(name))
        mark, _, flags, method, _, _, _, _, _, n, extra = _LOCAL.unpack_from(head)
        if mark != b"PK\3\4" or method or flags & ENCRYPTED or head[_LOCAL.size :] != name:
            raise ValueError(f"{shown(entry.name)} is not what the directory says")
        start = at + _LOCAL.size + n + extra
        if n != len(name) or start + entry.size > limit:
            raise ValueError(f"{shown(entry.name)} is longer than its place")
        found[entry.name] = Record(start, entry.size, entry.crc)
    return found
