# SPDX-License-Identifier: Apache-2.0
"""A folder of videos with captions, as people keep them: clip.mp4 beside clip.txt, or a table
metadata.jsonl or metadata.csv.

Owns: which videos there are, what their captions say, and their frames at a rate and a size.
Does not own: what is made of them (video_folder.py, run/dataset.py).
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lvjax.core.errors import InputError, one_line
from lvjax.data.captions import captions, read_lines, text_lines
from lvjax.io.image import fit_bits
from lvjax.io.video import stream_video

SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .wmv .flv .ogv .3gp .gif".split()
)
TABLES = ("metadata.jsonl", "metadata.csv")
FILE, CAPTION = "file_name", ("text", "caption", "prompt")  # columns of a table


class Source(NamedTuple):
    """A video.  name: its path in the folder, with "/".  timeline: ((seconds, prompt), ...), the
    first at 0.
    """

    name: str
    path: Path
    timeline: tuple[tuple[float, str], ...]


class Skipped(NamedTuple):
    """A video that cannot be used, and why, in one line."""

    video: str
    reason: str

    @classmethod
    def of(cls, name: str, path: Path, error: Exception) -> "Skipped":
        """What an error says of a video; its place, which may change, is left out."""
        told = str(error).removeprefix(f"{path} ").replace(f"{path.parent}{os.sep}", "")
        return cls(name, one_line(told))


def find_videos(folder) -> tuple[list[Source], list[Skipped]]:
    """The videos in a folder and the folders in it, by name; and those without a good caption.

    The caption of a.mp4 is the text in a.txt, else what the folder's table says; it is for the
    whole video, or lines of a timeline (`captions`).  Hidden files are left out, and folders that
    are links.
    Raises: InputError when there is no such folder, no video in it, none has a caption, or a table
      cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}; give one with videos in it")
    names = sorted(  # links to nothing among them, so that they are told
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not os.path.isdir(path)
    )
    names = [n for n in names if not any(part.startswith(".") for part in n.split("/"))]
    if not names:
        raise InputError(
            f"{folder} holds no video; give a folder of files such as clip.mp4 beside clip.txt"
        )
    table, found, skipped = _tables(folder), [], []
    for name in names:
        try:
            found.append(Source(name, folder / name, _caption(folder / name, table.get(name))))
        except InputError as e:
            skipped.append(Skipped.of(name, folder / name, e))
    if not found:
        raise InputError(
            f"none of the {len(names)} videos in {folder} has a caption that can be read "
            f"({names[0]} {skipped[0].reason}); write {Path(names[0]).with_suffix('.txt')}, or "
            f"{TABLES[0]} with {FILE} and {CAPTION[0]}"
        )
    return found, skipped


def _caption(path: Path, row: tuple[Path, dict] | None) -> tuple[tuple[float, str], ...]:
    """row: of which table, and what it says of the video."""
    beside = path.with_suffix(".txt")
    if os.path.lexists(beside):
        return captions(read_lines(beside), beside)
    if row is None:
        raise InputError(f"{path} has no caption in {beside.name} or a table")
    table, columns = row
    told = next((columns[name] for name in CAPTION if isinstance(columns.get(name), str)), None)
    if told is None:
        raise InputError(f"{path} has no {CAPTION[0]!r} in {table.name}, and no {beside.name}")
    source = f"the caption of {path}"
    if any(0xD800 <= ord(c) < 0xE000 for c in told):  # halves of letters, which JSON can hold
        raise InputError(f"{source} is not text that can be written; correct {table.name}")
    return captions(text_lines(told, source), source)


def _tables(folder: Path) -> dict[str, tuple[Path, dict]]:
    """{video: its row, and of which table} in a folder and the folders in it."""
    found = {}
    for name in TABLES:
        for path in sorted(folder.rglob(name)):
            below = path.parent.relative_to(folder)
            found |= {(below / row[FILE]).as_posix(): (path, row) for row in _rows(path)}
    return found


def _rows(path: Path) -> list[dict]:
    """The rows of a table that name a file.  Raises: InputError naming the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read {path} ({reason})") from e
    if path.suffix == ".csv":
        try:
            rows = list(csv.DictReader(io.StringIO(text)))
        except csv.Error as e:
            raise InputError(f"{path} is no table of comma-separated values ({e})") from e
    else:
        lines = enumerate(text.split("\n"), 1)  # a caption may hold other breaks, as U+2028
        rows = [_json(line, n, path) for n, line in lines if line.strip()]
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get(FILE), str):
            raise InputError(f"{path}: row {n} names no file; give it a {FILE!r}")
    return rows


def _json(line: str, number: int, path: Path):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: line {number} is not JSON; write one object per line") from e


def frames_of(path, fps, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The frames of a video at a rate, one at a time, scaled to cover a size and cropped.

    size: (height, width).  Yields: uint8 [height, width, 3].
    Raises: InputError when it cannot be read.
    """
    for frame in stream_video(path, fps):
        yield fit_bits(frame, size)
