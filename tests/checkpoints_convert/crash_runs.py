# SPDX-License-Identifier: Apache-2.0
"""Runs of `lvjax` that can be killed, at any moment or at a chosen operation on files.

A process that has everything imported makes a child for each run: to start Python and import jax
would take seconds every time.  The children are real processes, and SIGKILL is a real one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.checkpoints_convert.bad_files import ROOT

SERVER = """
import json, os, signal, sys, time
from checkpoints_convert import export
from lvjax.cli import convert
from lvjax.cli.main import main
from lvjax.core import streaming

WRITES = os.O_WRONLY | os.O_RDWR

def watch(root, stop, log):
    count = 0

    def hook(event, given):
        nonlocal count
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            return
        path = str(given[0])
        inside = event in ("os.remove", "os.rmdir") and given[1] >= 0  # of a folder that goes
        if not (path.startswith(root) or inside) or (event == "open" and not given[2] & WRITES):
            return
        there = inside or os.path.lexists(path)
        if there == (event == "os.mkdir") and event != "open":
            return  # nothing changes
        count += 1
        if log is not None:
            os.write(log, f"{event} {path}\\n".encode())
        if count == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)

def run(work):
    os.sync = os.fsync = lambda *_: None  # for a power cut, not for a kill, and slow
    os.dup2(os.open(work["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    log = os.open(work["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if work["log"] else None
    if work["shard"]:
        export.plan_export.__defaults__ = (work["shard"],)
    if work["slow"]:
        raw = streaming.raw
        streaming.raw = lambda a: (time.sleep(work["slow"]), raw(a))[1]
    if work["stop"] or log is not None:
        watch(work["root"], work["stop"], log)
    os._exit(main(work["args"]))

for line in sys.stdin:
    child = os.fork()
    if not child:
        run(json.loads(line))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """A server of runs, one at a time."""

    def __init__(self, folder: Path):
        self.err, self.log = folder / "run.err", folder / "run.log"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            text=True,
        )

    def start(
        self, *args, slow: float = 0, shard: int = 0, root: Path = Path(), stop: int = 0, log=False
    ) -> int:
        """Start a run; returns its process.

        slow: seconds of sleep before each piece is written.  shard: bytes of an exported file.
        stop: kill it before this change below `root`; log: write the changes down.
        """
        work = {"args": ["convert", *map(str, args)], "err": str(self.err), "slow": slow}
        work |= {"root": str(root), "stop": stop, "log": str(self.log) if log else None}
        work |= {"shard": shard}
        self.server.stdin.write(json.dumps(work) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """(exit code, or minus the signal that ended it; what it said)."""
        return int(self.server.stdout.readline()), self.err.read_text()

    def run(self, *args, **options) -> tuple[int, str]:
        """Start a run and wait for it."""
        self.start(*args, **options)
        return self.wait()

    def changes(self) -> list[str]:
        """The changes of the last run that wrote them down."""
        return self.log.read_text().splitlines()

    def close(self) -> None:
        """End the server."""
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()
