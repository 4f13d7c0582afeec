# SPDX-License-Identifier: Apache-2.0
"""A corpus of bad files, and how it is run: each must be refused in one line, at once, in little
memory, with nothing executed and nothing written.

`CASES` is open to others: `outcomes` runs any list of cases with any program.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from tests.checkpoints_convert import bad_pickles, bad_safetensors, bad_torch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1.0
MEGABYTES = 64


class Case(NamedTuple):
    """A bad file.  make: builds it in a folder of its own and returns the path to open.  says:
    words that the message must contain.
    """

    name: str
    make: Callable[[Path], Path]
    says: str


def _saved(name: str, data) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data())
        return folder / name

    return make


def _cases() -> list[Case]:
    found = []
    for name, (data, says) in bad_safetensors.FILES.items():
        found.append(Case(f"safetensors: {name}", _saved("model.safetensors", data), says))
    for title, group in (
        ("pickle", bad_pickles.MACHINE),
        ("tensor", bad_torch.TENSORS),
        ("set", bad_torch.SETS),
        ("zip", bad_torch.ZIPS | bad_torch.WIDE),
    ):
        for name, (data, says) in group.items():
            found.append(Case(f"{title}: {name}", _saved("model.pth", data), says))
    for title, group in (
        ("place", bad_safetensors.PLACES),
        ("index", bad_safetensors.INDICES),
        ("hidden", bad_pickles.HIDDEN),
    ):
        found += [Case(f"{title}: {name}", *rest) for name, rest in group.items()]
    for protocol, group in ((2, bad_pickles.LIVE), (4, bad_pickles.LIVE_4)):
        for name, make in group.items():
            says = "its pickle has the opcode" if "INST" in name else "it names"
            found.append(Case(f"payload: {name}", bad_pickles.payload(make, protocol), says))
    for name, (make, says) in bad_pickles.OTHER.items():
        found.append(Case(f"payload: {name}", bad_pickles.payload(make), says))
    return found


CASES: list[Case] = _cases()


def build(case: Case, folder: Path) -> Path:
    """Make the files of a case in `folder`, which is made; returns the path to open."""
    folder.mkdir(parents=True)
    return case.make(folder)


READ = """
from checkpoints_convert.read import open_checkpoint

def use(path):
    tensors, config = open_checkpoint(path)
    for name in tensors:
        tensors[name]
"""
"""Reads everything; a program defines `use(path)`."""

RUN = """
import json, sys, time

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
{program}
from lvjax.core.errors import CheckpointError

def memory(field):
    with open("/proc/self/status") as f:
        return int(next(line for line in f if line.startswith(field)).split()[1]) / 1024

def measured(path):
    for _ in range(3):  # another process may have the processor
        found = once(path)
        if found[2] < {seconds}:
            break
    return found

def once(path):
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak starts again
    begin = time.monotonic()
    try:
        use(path)
        kind, says = None, ""
    except CheckpointError as e:
        kind, says = "CheckpointError", str(e)
    except BaseException as e:
        kind, says = type(e).__name__, str(e)
    return kind, says, time.monotonic() - begin, memory("VmHWM:") - idle

idle = memory("VmRSS:")
print(json.dumps([measured(path) for path in json.load(sys.stdin)]))
"""


class Outcome(NamedTuple):
    """kind: the exception's class, None without one.  megabytes: peak above an idle import."""

    kind: str | None
    says: str
    seconds: float
    megabytes: float


def outcomes(
    cases: Iterable[Case], folder: Path, program: str = READ, blocked=("jax", "torch")
) -> dict[str, Outcome]:
    """Every case in one process of its own, which starts in an empty folder.

    folder: gets the files of the cases (in `cases`) and the process's own (in `home`).
    """
    paths = {}
    for number, case in enumerate(cases):
        paths[case.name] = str(build(case, folder / "cases" / str(number)))
    (folder / "home").mkdir()
    text = RUN.format(program=program, blocked=set(blocked), seconds=SECONDS)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    own = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, "-B", "-c", text],
        input=json.dumps(list(paths.values())),
        env=kept | own | {"PYTHONPATH": str(ROOT)},
        cwd=folder / "home",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr, done.stderr[-2000:]
    return {
        name: Outcome(*values) for name, values in zip(paths, json.loads(done.stdout), strict=True)
    }


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder: type and mode, size and time of change."""
    return {
        str(path): (path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def complaint(case: Case, outcome: Outcome) -> str | None:
    """What is wrong with the way in which a case was refused."""
    if outcome.kind != "CheckpointError":
        return f"ended with {outcome.kind}: {outcome.says[:300]}"
    if case.says not in outcome.says:
        return f"says {outcome.says[:300]!r} instead of {case.says!r}"
    if "\n" in outcome.says or len(outcome.says) > 700:
        return f"says more than a line: {outcome.says[:300]!r}"
    if outcome.seconds > SECONDS or outcome.megabytes > MEGABYTES:
        return f"took {outcome.seconds:.2f} s and {outcome.megabytes:.0f} MB"
    return None
