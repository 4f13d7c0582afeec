# SPDX-License-Identifier: Apache-2.0
"""The errors a user can meet, each with the exit code that the command line returns for it.

Every message is one line: what was given, what is allowed, what to do.  Library code raises these
at its boundary; the command line prints the message and exits with `code` (tracebacks only with
``--debug``).
"""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

REMEDY = "free space or choose another place"


def one_line(text) -> str:
    """Text as one line: line breaks and other control characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def shown(value, most: int = 60) -> str:
    """A value as a message has it: its repr in one line, cut where it is long."""
    try:
        text = one_line(repr(value))
    except ValueError:  # a whole number of more digits than Python writes
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def some_of(names: Iterable[str]) -> str:
    """A few of the names, and how many there are more."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class LvjaxError(Exception):
    """Base of the errors that end a run with a known exit code."""

    code = 1


class InputError(LvjaxError, ValueError):
    """The user's input cannot be used (exit 2)."""

    code = 2


class CheckpointError(LvjaxError):
    """Weights or a saved state are missing, corrupt, or of another model (exit 3)."""

    code = 3


class DoesNotFitError(LvjaxError):
    """The plan, or the device, says that the run does not fit into memory (exit 4)."""

    code = 4


class NonFiniteError(LvjaxError):
    """NaN or infinity in latents or frames; the run stops at that clip (exit 5)."""

    code = 5


class StorageError(LvjaxError):
    """The disk is full or the place is not writable (exit 6)."""

    code = 6


class InUseError(LvjaxError):
    """Another live run holds the output (exit 7)."""

    code = 7


def of_system(e: OSError) -> LvjaxError:
    """What an error of the file system means that nobody nearer to it has said.  Whoever writes
    says so, which leaves names that cannot be, and what cannot be read.
    """
    what = f"cannot use {one_line(e.filename or 'a file')[:200]}: {e.strerror or e}"
    if e.errno == errno.ENAMETOOLONG:
        return InputError(f"{what}; give a shorter name")
    if e.errno in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR):
        return CheckpointError(f"{what}; give one that can be read")
    return StorageError(f"{what}; {REMEDY}")


def not_stored(doing: str, e: Exception, remedy: str = REMEDY) -> StorageError:
    """That the file system refused something, and why; doing: for example "write a.mp4"."""
    reason = getattr(e, "strerror", None) or str(e).partition("\n")[0][:200]
    return StorageError(f"cannot {doing}: {reason}; {remedy}")


@contextmanager
def storing(path, remedy: str = REMEDY) -> Iterator[None]:
    """An error of the file system while `path` is written is a StorageError with the remedy."""
    try:
        yield
    except OSError as e:
        raise not_stored(f"write {path}", e, remedy) from e


@contextmanager
def system_told() -> Iterator[None]:
    """Errors of the file system end as `of_system` says; for a function of the Python face."""
    try:
        yield
    except OSError as e:
        raise of_system(e) from e
