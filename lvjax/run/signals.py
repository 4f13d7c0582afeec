# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM end a run after the clip in flight, with its state saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """`signal` is None until one arrived; `code` is the exit code it asks for (130 or 143)."""

    signal: int | None = None

    @property
    def code(self) -> int:
        return 128 + (self.signal or 0)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """The first SIGINT or SIGTERM is noted; a second SIGINT interrupts at once."""
    stop = Stop()

    def note(number, frame):
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
