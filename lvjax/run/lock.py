# SPDX-License-Identifier: Apache-2.0
"""One run per output: an advisory lock on a file beside it, which the operating system drops when the process dies."""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path

from lvjax.core.errors import InUseError, StorageError


@contextmanager
def hold(output):
    """Hold `<output>.lock` while the body runs.

    Raises: InUseError naming the run that has it; StorageError when the place cannot be written.
    """
    path = Path(f"{output}.lock")
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise StorageError(f"cannot write {path}: {e.strerror or e}; choose another --out") from e
    try:
        _acquire(handle, output)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(me).encode(), 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # still held: nobody else can have locked this file
    finally:
        os.close(handle)


def _acquire(handle: int, output) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise StorageError(f"cannot lock {output}: {e.strerror or e}; choose another --out") from e
        try:
            first = json.loads(os.pread(handle, 4096, 0))
            who = f"process {first['pid']} on {first['host']} since {first['since']}"
        except (ValueError, KeyError):
            who = "another process"
        raise InUseError(f"{output} is being written by {who}; wait for it or choose another --out") from e
