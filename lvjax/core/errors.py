# SPDX-License-Identifier: Apache-2.0
"""The errors a user can meet, each with the exit code that the command line returns for it.

Every message is one line: what was given, what is allowed, what to do.  Library code raises these
at its boundary; the command line prints the message and exits with `code` (tracebacks only with
``--debug``).
"""


def one_line(text) -> str:
    """Text as one line: line breaks and other control characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


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
