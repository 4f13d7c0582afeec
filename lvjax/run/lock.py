# SPDX-License-Identifier: Apache-2.0
"""One run per output file: an advisory lock on a file beside it, which the operating system drops
when the process dies.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lvjax.core.errors import InUseError, StorageError

_held: set[int] = set()


def _forget_in_child() -> None:
    """A forked child must not keep the lock of a parent that died."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def hold(outputs, option: str = "--out", inside: bool = False):
    """Hold `<output>.lock` of every output while the body runs; of none when one is taken.

    outputs: a path, or several; they are taken in sorted order.  option: what chooses them, for the
    messages.  inside: they are folders, made where they are not there, and the file is `.lock` in
    each: what is around a folder need not be writable.
    Raises: InUseError naming the run that has one; StorageError when the place cannot be written.
    """
    several = isinstance(outputs, Iterable) and not isinstance(outputs, str)
    places = {os.path.realpath(p): p for p in (outputs if several else [outputs])}
    with ExitStack() as held:
        for place, given in sorted(places.items()):
            path = Path(place, ".lock") if inside else Path(f"{place}.lock")
            held.enter_context(_hold(path, given, option))
        yield


@contextmanager
def _hold(path: Path, output, option: str):
    handle = _open(path, output, option)
    _held.add(handle)
    try:
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        try:
            _write(handle, path, json.dumps(me).encode(), option)
            yield
        finally:
            if handle in _held:
                path.unlink(missing_ok=True)  # still held: nobody else can have locked this file
    finally:
        if handle in _held:  # not in a forked child, which has closed its copy
            _held.discard(handle)
            os.close(handle)


def _write(handle: int, path: Path, data: bytes, option: str) -> None:
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, data, 0)
    except OSError as e:
        raise StorageError(
            f"cannot write {path}: {e.strerror or e}; free space or choose another {option}"
        ) from e


def _open(path: Path, output, option: str) -> int:
    """The locked file; tried again when the run before removed it between our opening and locking
    it.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise StorageError(
                f"cannot write {path}: {e.strerror or e}; choose another {option}"
            ) from e
        try:
            _acquire(handle, output, option)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _acquire(handle: int, output, option: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise StorageError(
                f"cannot lock {output}: {e.strerror or e}; choose another {option}"
            ) from e
        try:
            first = json.loads(os.pread(handle, 4096, 0))
            who = f"process {first['pid']} on {first['host']} since {first['since']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        raise InUseError(
            f"{output} is being written by {who}; wait for it or choose another {option}"
        ) from e
