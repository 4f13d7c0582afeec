# SPDX-License-Identifier: Apache-2.0
"""How the commands that go on where they stopped end at a signal."""

import signal
import sys

from lvjax.core.errors import one_line


def stopped(place, number: int = signal.SIGINT) -> int:
    """Say that the same command goes on from what is saved in `place`; returns the exit code.

    number: of the signal; a KeyboardInterrupt of core/signals.py has it as its argument.
    """
    print(
        f"lvjax: stopped; the same command goes on from what is saved in {one_line(place)}",
        file=sys.stderr,
    )
    return 128 + number
