# SPDX-License-Identifier: Apache-2.0
"""Prompts as people write them in files: lines, moments of a timeline, and the captions of videos.

Does not own: which clip follows which prompt (run/timeline.py).
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from lvjax.core.errors import InputError

MOMENT = re.compile(r"(?:(\d{1,6}):)?(\d{1,9}(?:\.\d{1,9})?)s?(?:[:,](?!\d)|\s)\s*(.+)")
SURELY = re.compile(r"\d+(?:[.:]\d|s\b)")  # what begins like this counts no things


def read_lines(path) -> list[str]:
    """The lines of a file of prompts; empty ones and comments (# ...) are left out.

    Raises: InputError when it cannot be read or holds none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(
            f"cannot read {path} ({e.strerror if isinstance(e, OSError) else 'not UTF-8 text'})"
        ) from e
    return text_lines(text, path, comments=True)


def text_lines(text: str, source, comments: bool = False) -> list[str]:
    """The lines of a text of prompts that are not empty; comments: whether there may be such, which
    are left out.  source: what the error calls it.

    Raises: InputError when there is none.
    """
    lines = [line.strip() for line in text.splitlines()]
    if not (lines := [x for x in lines if x and not (comments and x.startswith("#"))]):
        raise InputError(f"{source} holds no prompt; write one per line")
    return lines


def moment(line: str, source) -> tuple[float, str]:
    """(seconds, prompt) of a line of a timeline.

    Raises: InputError when it is none; source: what the error calls its file.
    """
    if (found := _moment(line)) is None:
        raise InputError(
            f"{source}: {line!r} is not a time and a prompt; write for example: 3.5 the camera "
            "pans left, or 1:30 the camera pans left"
        )
    return found


def _moment(line: str) -> tuple[float, str] | None:
    found = MOMENT.fullmatch(line)
    if not found or (found[1] and float(found[2]) >= 60):
        return None
    return 60 * int(found[1] or 0) + float(found[2]), found[3]


def check_timeline(timeline) -> None:
    """Raises: InputError for an empty timeline or prompt, a first time other than 0, or times that
    do not increase.
    """
    if not timeline:
        raise InputError(
            "no prompt is given; give at least one, for example 'the camera pans left'"
        )
    times = [t for t, _ in timeline]
    if not all(isinstance(p, str) and p.strip() for _, p in timeline):
        raise InputError("a prompt is empty; say what happens, for example 'a red circle moves up'")
    if (
        times[0] != 0
        or not all(math.isfinite(t) for t in times)
        or any(a >= b for a, b in zip(times, times[1:], strict=False))
    ):
        raise InputError(f"prompt times are {times}; they must start at 0 and increase")


def captions(lines: Sequence[str], source) -> tuple[tuple[float, str], ...]:
    """The timeline that the lines of a video's caption are: ((seconds, prompt), ...).

    They are a timeline, of prompts that change, if the first line begins with the time 0; or if
    there are several, each begins with a time, and one of these with a point, a colon or an s
    (3.5, 1:30, 3s), so that 0 was forgotten.  Anything else is one caption for the whole video,
    numbers and all, however many lines it has: "3 dogs run", "2 cats sit".
    Raises: InputError for a timeline that begins later, does not go forward, or has other lines.
    """
    found = [_moment(line) for line in lines]
    begins = found[0] is not None and found[0][0] == 0
    late = len(lines) > 1 and all(found) and any(map(SURELY.match, lines))
    if not begins and not late:
        return ((0.0, " ".join(lines)),)
    timeline = tuple(moment(line, source) for line in lines)
    try:
        check_timeline(timeline)
    except InputError as e:
        raise InputError(f"{source}: {e}") from e
    return timeline
