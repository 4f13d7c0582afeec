# SPDX-License-Identifier: Apache-2.0
"""One run per output: an advisory lock on a file beside it, which the operating system drops when
the process dies.
"""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path

from lvjax.core.errors import InUseError, StorageError

_held: set[int] = set()


def _forget_in_child() -> None:
    """A forked child must not keep the lock of a parent that died."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def hold(output):
    """Hold `<output>.lock` while the body runs.

    Raises: InUseError naming the run that has it; StorageError when the place cannot be written.
    """
    path = Path(f"{os.path.realpath(output)}.lock")
    handle = _open(path, output)
    _held.add(handle)
    try:
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(me).encode(), 0)
        try:
            yield
        finally:
            if handle in _held:
                path.unlink(missing_ok=True)  # still held: nobody else can have locked this file
    finally:
        if handle in _held:  # not in a forked child, which has closed its copy
            _held.discard(handle)
            os.close(handle)


def _open(path: Path, output) -> int:
    """The locked file; tried again when the run before removed it between our opening and locking
    it.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise StorageError(
                f"cannot write {path}: {e.strerror or e}; choose another --out"
            ) from e
        try:
            _acquire(handle, output)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _acquire(handle: int, output) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise StorageError(
                f"cannot lock {output}: {e.strerror or e}; choose another --out"
            ) from e
        try:
            first = json.loads(os.pread(handle, 4096, 0))
            who = f"process {first['pid']} on {first['host']} since {first['since']}"
        except (ValueError, KeyError):
            who = "another process"
        raise InUseError(
            f"{output} is being written by {who}; wait for it or choose another --out"
        ) from e
