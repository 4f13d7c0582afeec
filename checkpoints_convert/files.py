# SPDX-License-Identifier: Apache-2.0
"""Other people's files: opened without surprises, told apart by their first bytes, small JSON.

Owns: that only regular files are opened (never a pipe or device, which may block or answer for
ever), what a file is that is no checkpoint, JSON of bounded size.
Does not own: the formats (read_*.py).  Messages name files and places in them, not their content.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lvjax.core.errors import CheckpointError

JSON_MAX = 2_000_000  # bytes; parsed, hostile JSON takes twenty times as much memory
HEAD = 512  # bytes that tell what a file is
PAGE = "a web page, not a checkpoint; download it again, signed in if the site asks for it"
BARE = "a bare pickle (PyTorch before 1.6); load it there and save it again as safetensors"
SIGNS = {
    (b"version https://git-lfs",): "a git-lfs pointer, not the file; run `git lfs pull` for it",
    (b"<!", b"<?", b"<h", b"<H"): PAGE,
    (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"): BARE,
    (b"GGUF",): "a GGUF file, which is not read; give the .safetensors or .pth it was made of",
    (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!"): "packed; unpack it",
}


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading without a buffer; links to one are followed.

    Raises: CheckpointError for anything else, and for what goes wrong while it is read.
    """
    try:
        _regular(path, os.stat(path).st_mode)
        with open(path, "rb", buffering=0, opener=_open) as f:
            _regular(path, os.fstat(f.fileno()).st_mode)  # it may have been exchanged
            yield f
    except OSError as e:
        raise CheckpointError(
            f"cannot read {path}: {e.strerror or e}; give a file that can be read"
        ) from e


def _open(path, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe does not block


def _regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise CheckpointError(f"cannot read {path}: it is {kind}; give a regular file")


def size_of(f: BinaryIO) -> int:
    """Bytes of an open file."""
    return os.fstat(f.fileno()).st_size


def take(f: BinaryIO, path: Path, start: int, size: int) -> bytes:
    """Bytes of an open file.

    Raises: CheckpointError when they are not there.
    """
    f.seek(start)
    data = f.read(size)
    if len(data) != size:
        raise CheckpointError(f"{path} is cut short or changes while it is read; download it again")
    return data


def sign(head: bytes) -> str | None:
    """What a file that begins with `head` is, where it is known and no checkpoint."""
    if not head:
        return "empty; download it again"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((what for marks, what in SIGNS.items() if text.startswith(marks)), None)


def decode(text: bytes) -> dict:
    """A JSON object; no name twice, no NaN.

    Raises: ValueError.
    """

    def once(pairs):
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("a name stands there twice")
        return found

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises: CheckpointError when it is missing, too large, or not one.
    """
    with opened(path) as f:
        if (size := size_of(f)) > JSON_MAX:
            raise CheckpointError(
                f"{path} has {size} bytes, more than the {JSON_MAX} that are read; is it the right "
                "file?"
            )
        text = take(f, path, 0, size)
    if what := sign(text[:HEAD]):
        raise CheckpointError(f"{path} is {what}")
    try:
        return decode(text)
    except ValueError as e:
        reason = str(e).splitlines()[0]
        raise CheckpointError(f"{path} is damaged ({reason}); download it again") from e


def shown(name: str) -> str:
    """A name out of a file, quoted, at a length that can be shown."""
    return repr(name if len(name) < 200 else f"{name[:100]}...")
