# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM end a run after the clip or step in flight, with its state saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stop:
    """`signal` is None until one arrived; `code` is the exit code it asks for (130 or 143)."""

    signal: int | None = None

    @property
    def code(self) -> int:
        """The exit code of a program that the signal ended."""
        return 128 + (self.signal or 0)


@contextmanager
def _handled(handler: Callable) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler`; outside the main thread, which alone gets signals,
    nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """The first SIGINT or SIGTERM is noted; a second SIGINT interrupts at once."""
    stop = Stop()

    def note(number, frame):
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt(number)
        stop.signal = number

    with _handled(note):
        yield stop


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM interrupts as SIGINT does: both raise KeyboardInterrupt(number)."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    with _handled(interrupt):
        yield
