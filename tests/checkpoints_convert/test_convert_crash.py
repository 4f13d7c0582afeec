# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert` killed at random moments and at every change that it makes on the disk, ended by
signals, and started twice: nothing half-written is taken for a part, nothing is lost, and the next
run makes what an undisturbed one makes, bit by bit.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import lvjax
from checkpoints_convert.foreign import Foreign
from checkpoints_convert.sources import find_sources
from lvjax.cli.main import main
from lvjax.core.checkpoint import Stored
from lvjax.core.errors import CheckpointError
from lvjax.core.streaming import open_stored
from lvjax.run.bundle import part_path
from tests.checkpoints_convert.crash_runs import Runs
from tests.checkpoints_convert.tiny_checkpoints import bits, draw, tiny, usual, write

FORMATS = {"safetensors": ".safetensors", "orbax": ""}
SLOW = 0.001  # seconds a piece


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    server = Runs(tmp_path_factory.mktemp("runs"))
    yield server
    server.close()


def model(folder, layers: int):
    """A transformer and an autoencoder, in one folder."""
    write(draw(tiny("wan2.1-t2v-1.3b.official", layers)[0]), folder, "dit", "shards")
    write(draw(tiny("wan2.1-vae.official")[0]), folder, *usual("wan2.1-vae.official"))
    return folder


def content(folder) -> dict[str, bytes]:
    """Every file that a finished conversion leaves."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def accepted(places) -> dict:
    """The parts that a loader takes, by place, with all their arrays; the way back as well."""
    found = {}
    for place in places:
        try:
            found[place] = bits(dict(open_stored(place)))
        except CheckpointError:
            back = place.parent.parent / "never"
            assert main(["convert", str(place), str(back), "--to", "official"]) == 3
            assert not back.exists()
    return found


def kill_and_run_again(runs, src, dst, fmt, wanted, whole, moment, slow) -> tuple[bool, bool]:
    """Kill a run after `moment` seconds; returns whether it was in the middle of the writing, and
    whether a part was complete.  wanted: what is left in the end.  whole: the parts' arrays.
    """
    begun = time.monotonic()
    process = runs.start(src, dst, "--format", fmt, slow=slow)
    time.sleep(max(0.0, moment - (time.monotonic() - begun)))
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
    status, _ = runs.wait()
    places = [part_path(dst, part, FORMATS[fmt]) for part in ("dit", "vae")]
    partial = status != 0 and dst.exists() and any(dst.glob(".*.partial"))
    parts = accepted(places)
    assert all(parts[place] == whole[place.name] for place in parts)
    if status == 0 or (dst / "model.json").exists():
        assert set(lvjax.load(dst).parts) == {"dit", "vae"} and set(parts) == set(places)
    else:
        with pytest.raises(CheckpointError):
            lvjax.load(dst)
    assert runs.run(src, dst, "--format", fmt)[0] == 0
    assert content(dst) == wanted and {p.name for p in dst.parent.glob("dst*")} == {"dst"}
    shutil.rmtree(dst)
    return partial, bool(parts)


def ten_kills(runs, folder, fmt, layers, slow):
    src, dst = model(folder / "src", layers), folder / "dst"
    assert runs.run(src, dst, "--format", fmt)[0] == 0
    wanted = content(dst)
    whole = {
        path.name: bits(dict(open_stored(path)))
        for part in ("dit", "vae")
        if (path := part_path(dst, part, FORMATS[fmt]))
    }
    shutil.rmtree(dst)
    begun = time.monotonic()
    assert runs.run(src, dst, "--format", fmt, slow=slow)[0] == 0
    duration = time.monotonic() - begun
    shutil.rmtree(dst)
    moments = random.Random(7)
    found = []
    for _ in range(10):
        moment = moments.uniform(0.02, 0.98) * duration
        found.append(kill_and_run_again(runs, src, dst, fmt, wanted, whole, moment, slow))
    partial, complete = (sum(column) for column in zip(*found, strict=True))
    print(
        f"of 10 kills, {partial} left half a part, {complete} a whole one; {duration:.2f} s a run"
    )
    assert partial >= 5, "the moments missed the writing; make it slower"


@pytest.mark.parametrize("fmt", FORMATS)
def test_ten_kills(runs, tmp_path, fmt):
    """Small files, and a pause before each piece, so that every moment can be hit."""
    ten_kills(runs, tmp_path, fmt, 3, SLOW)


@pytest.mark.long
@pytest.mark.parametrize("fmt", FORMATS)
def test_ten_kills_at_full_speed(runs, tmp_path, fmt):
    """A hundred megabytes."""
    ten_kills(runs, tmp_path, fmt, 200, 0)


# ---- every change on the disk --------------------------------------------------------------


def chosen(changes: list[str], root) -> list[int]:
    """Changes to be killed before: every one, but of those inside a folder and of the writes into
    one file only the first, the second and the ninth.  Numbers begin at 1.
    """
    found, seen = [], Counter()
    for number, line in enumerate(changes, 1):
        event, path = line.split(" ", 1)
        inside = not path.startswith(str(root)) or len(Path(path).relative_to(root).parts) > 2
        kind = (event, inside) if inside else line
        seen[kind] += 1
        if seen[kind] in (1, 2, 9):
            found.append(number)
    return found


def small(folder, seed=0):
    """A text encoder."""
    name = "umt5-xxl-encoder.official"
    return write(draw(tiny(name)[0], "mixed", seed), folder, *usual(name))


SCENES = {  # options of what is there before, None: nothing; and of the run that is killed
    "safetensors": (None, ()),
    "orbax": (None, ("--format", "orbax")),
    "file by file": ((), ("--overwrite",)),
    "folder by folder": (("--format", "orbax"), ("--format", "orbax", "--overwrite")),
    "file by folder": ((), ("--format", "orbax", "--overwrite")),
    "folder by file": (("--format", "orbax"), ("--overwrite",)),
}


# The others do in another order what these do.
QUICK = {"safetensors", "orbax", "folder by folder", "folder by file"}


@pytest.mark.parametrize(
    "scene", [s if s in QUICK else pytest.param(s, marks=pytest.mark.long) for s in SCENES]
)
def test_a_kill_before_every_change(runs, tmp_path, scene):
    before, options = SCENES[scene]
    root = tmp_path / "root"
    src, older = small(tmp_path / "src", 1), small(tmp_path / "older", 2)
    dst = root / "dst"

    def prepare():
        if root.exists():
            shutil.rmtree(root)
        root.mkdir()
        if before is not None:
            shutil.copytree(tmp_path / "before", dst)

    if before is not None:
        assert runs.run(older, tmp_path / "before", *before)[0] == 0
    prepare()
    assert runs.run(src, dst, *options, root=root, log=True)[0] == 0
    changes, wanted = runs.changes(), content(dst)
    places = [dst / "text.safetensors", dst / "text"]
    new = accepted(places)
    assert len(new) == 1
    prepare()
    old = accepted(places)
    wholes = [*new.values(), *old.values()]
    gaps = 0
    for number in chosen(changes, root):
        prepare()
        assert runs.run(src, dst, *options, root=root, stop=number)[0] == -signal.SIGKILL
        found = accepted(places)
        assert all(arrays in wholes for arrays in found.values()), changes[number - 1]
        if (
            before is not None and not found
        ):  # between the old folder's going and the new one's coming
            gaps += 1
            assert any(dst.glob(".text*.old")), changes[number - 1]
        assert runs.run(src, dst, *options)[0] == 0, changes[number - 1]
        assert content(dst) == wanted, changes[number - 1]
        assert [path.name for path in root.iterdir()] == ["dst"]
    assert gaps <= 1


def test_an_export_killed_before_every_change(runs, tmp_path):
    root, dst = tmp_path / "root", tmp_path / "dst"
    assert runs.run(small(tmp_path / "src"), dst)[0] == 0
    arguments, shard = (dst, root / "back", "--to", "diffusers"), {"shard": 1 << 14}
    root.mkdir()
    assert runs.run(*arguments, **shard, root=root, log=True)[0] == 0
    changes, wanted = runs.changes(), content(root / "back")
    arrays = bits(root / "back" / "text_encoder")
    assert sum(name.endswith(".safetensors") for name in wanted) > 2
    whole = 0
    for number in chosen(changes, root):
        shutil.rmtree(root / "back", ignore_errors=True)
        assert runs.run(*arguments, **shard, root=root, stop=number)[0] == -signal.SIGKILL
        try:
            (source,), _ = find_sources(root / "back")
            source.model.plan()
            found = source.model.tensors
            assert bits({name: found[name] for name in found}) == arrays
            whole += 1
        except CheckpointError:
            pass
        assert runs.run(*arguments, **shard)[0] == 0
        assert content(root / "back") == wanted, changes[number - 1]
        assert [path.name for path in root.iterdir()] == ["back"]
    assert whole > 0


# ---- signals and a second run ------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_in_one_line(runs, tmp_path, number, code, fmt):
    src, dst = small(tmp_path / "src"), tmp_path / "dst"
    process = runs.start(src, dst, "--format", fmt, slow=0.05)
    while not any(dst.glob(".text*.partial")):
        time.sleep(0.01)
    os.kill(process, number)
    status, err = runs.wait()
    assert status == code and err == "lvjax: interrupted\n"
    assert not (tmp_path / "dst.lock").exists()
    with pytest.raises(CheckpointError):
        open_stored(part_path(dst, "text", FORMATS[fmt]))
    assert runs.run(src, dst, "--format", fmt)[0] == 0
    assert runs.run(src, tmp_path / "whole", "--format", fmt)[0] == 0
    assert content(dst) == content(tmp_path / "whole")


def test_a_second_run_into_the_same_place(runs, tmp_path, capsys):
    src, dst = small(tmp_path / "src"), tmp_path / "dst"
    process = runs.start(src, dst, slow=0.05)
    while not any(dst.glob(".text*.partial")):
        time.sleep(0.01)
    for arguments in ((src, dst), (src, dst, "--overwrite", "--format", "orbax")):
        assert main(["convert", *map(str, arguments)]) == 7
        says = capsys.readouterr().err
        assert f"is being written by process {process} on" in says and says.count("\n") == 1
    assert runs.wait()[0] == 0
    assert main(["convert", str(src), str(dst)]) == 0


def test_a_source_that_changes_between_two_runs(runs, tmp_path):
    """What a killed run has made of other weights, of the same names and sizes, is not used."""
    src, dst = small(tmp_path / "src", 1), tmp_path / "dst"
    times = src.stat()
    process = runs.start(src, dst, slow=0.05)
    while not (dst / ".text.safetensors.log").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process, signal.SIGKILL)
    assert runs.wait()[0] == -signal.SIGKILL and any(dst.glob(".text*.partial"))
    small(tmp_path / "src", 2)
    os.utime(src, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert src.stat().st_size == times.st_size
    assert runs.run(src, dst)[0] == 0
    (source,), _ = find_sources(src)
    theirs, ours = Foreign(*source[::2][::-1], src), open_stored(dst / "text.safetensors")
    assert isinstance(ours, Stored)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
