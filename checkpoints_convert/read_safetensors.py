# SPDX-License-Identifier: Apache-2.0
"""One safetensors file: where its arrays are, and the lines of text that it says of itself.

Every number of the header is checked before it is used: names once each, known dtypes, shapes that
fit their bytes, arrays that fill the file without gap or overlap.  The header is walked an array at
a time, so that a hostile one costs no more memory than its own bytes.
Source: huggingface/safetensors, README.md (the format; its header may have 100 MB, ours 25).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from checkpoints_convert.files import decode, opened, shown, size_of, take
from checkpoints_convert.tensors import NAME_MAX, TENSORS_MAX, Entry, possible
from lvjax.core.dtypes import DTYPES
from lvjax.core.errors import CheckpointError

HEADER_MAX = 25_000_000  # bytes
NOTES_MAX = 10_000  # lines of metadata
FIELDS = {"dtype", "shape", "data_offsets"}

_SPACE = rb"[ \t\r\n]*+"
_TEXT = rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"'
_OPEN = re.compile(rb"\{" + _SPACE)
_NAME = re.compile(rb"(" + _TEXT + rb")" + _SPACE + rb":" + _SPACE)
_ARRAY = re.compile(rb"\{[^{}]{0,1000}+\}" + _SPACE)
_NOTE = re.compile(rb"(" + _TEXT + rb")" + _SPACE + rb":" + _SPACE + rb"(" + _TEXT + rb")" + _SPACE)
_NEXT = re.compile(rb"(?:(,)|\})" + _SPACE)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The arrays of one safetensors file, and its metadata.

    Raises: CheckpointError saying what is wrong with it.
    """
    with opened(path) as f:
        size = size_of(f)
        length = int.from_bytes(take(f, path, 0, min(8, size)), "little")
        if size < 8 or length > min(HEADER_MAX, size - 8):
            raise CheckpointError(
                f"{path} is not a safetensors file, or cut short ({size} bytes, a header of "
                f"{length}, at most {HEADER_MAX}); download it again"
            )
        header = take(f, path, 8, length)
    if header.count(b'"data_offsets"') > TENSORS_MAX:
        raise CheckpointError(f"{path} has more than {TENSORS_MAX} arrays; is it a checkpoint?")
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    try:
        for name, fields in _arrays(header, metadata):
            if name in entries:
                raise ValueError(f"array {shown(name)} stands there twice")
            entries[name] = _entry(path, name, fields, 8 + length)
    except ValueError as e:  # of JSON and of text, too
        reason = str(e).splitlines()[0]
        raise CheckpointError(f"{path} is damaged ({reason}); download it again") from e
    _check_places(path, entries, 8 + length, size)
    return entries, metadata


def _match(pattern: re.Pattern, header: bytes, at: int) -> re.Match:
    if (match := pattern.match(header, at)) is None:
        raise ValueError(f"its header makes no sense from byte {at} on")
    return match


def _arrays(header: bytes, metadata: dict[str, str]) -> Iterator[tuple[str, dict]]:
    """Names and fields of the arrays in a header; its metadata go into `metadata`.

    Raises: ValueError where it is not what the format allows.
    """
    at, noted = _match(_OPEN, header, 0).end(), False
    more = not header.startswith(b"}", at)
    at = at if more else _match(_NEXT, header, at).end()
    while more:
        key = _match(_NAME, header, at)
        if len(key[1]) > 12 * NAME_MAX:  # an astral character, escaped, has 12 bytes
            raise ValueError(f"a name of {len(key[1])} bytes")
        name = json.loads(key[1])
        if name == "__metadata__":
            if noted:
                raise ValueError("its metadata stand there twice")
            at, noted = _take_metadata(header, key.end(), metadata), True
        else:
            fields = _match(_ARRAY, header, key.end())
            at = fields.end()
            yield name, decode(fields[0])
        step = _match(_NEXT, header, at)
        more, at = step[1] is not None, step.end()
    if at != len(header):
        raise ValueError(f"its header goes on after byte {at}")


def _take_metadata(header: bytes, at: int, metadata: dict[str, str]) -> int:
    """Fill `metadata` from byte `at` on; returns the first byte behind them.

    Raises: ValueError where they are not what the format allows.
    """
    at = _match(_OPEN, header, at).end()
    if header.startswith(b"}", at):
        return _match(_NEXT, header, at).end()
    for count in range(1, NOTES_MAX + 1):
        note = _match(_NOTE, header, at)
        metadata[json.loads(note[1])] = json.loads(note[2])
        step = _match(_NEXT, header, note.end())
        at = step.end()
        if step[1] is None:
            if len(metadata) != count:
                raise ValueError("a line of its metadata stands there twice")
            return at
    raise ValueError(f"more than {NOTES_MAX} lines of metadata")


def _entry(path: Path, name: str, fields: dict, base: int) -> Entry:
    """An array from its fields; `base` is the first byte after the header.

    Raises: ValueError; CheckpointError for a dtype that is not known.
    """
    wrong = ValueError(f"array {shown(name)} has impossible dtype, shape or place")
    name.encode()  # half of a surrogate pair is no text
    if fields.keys() != FIELDS:
        raise wrong
    dtype, shape, offsets = (fields[k] for k in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise wrong
    if dtype not in DTYPES:
        kind = f"{path} holds {shown(name)} as {shown(dtype)}"
        raise CheckpointError(f"{kind}; lvjax reads {', '.join(DTYPES)}")
    sound = possible(name, dtype, shape) and len(offsets) == 2
    if not sound or not all(type(n) is int and n >= 0 for n in offsets):
        raise wrong
    entry = Entry(path, dtype, tuple(shape), base + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise wrong
    return entry


def _check_places(path: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """Raises: CheckpointError unless the arrays fill the file from `start` to its end."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != start:
            what = "overlaps another" if entry.start < start else "lies behind a gap"
            raise CheckpointError(f"{path} is damaged (array {shown(name)} {what}); download it")
        start += entry.nbytes
    if start != size:
        what = f"{path} is cut short or damaged: {start} bytes expected, {size} there"
        raise CheckpointError(f"{what}; download it again")
