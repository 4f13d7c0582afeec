# SPDX-License-Identifier: Apache-2.0
"""What an interrupted run leaves, who may go on with it, and who may replace it."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from lvjax.cli.main import main
from lvjax.core.checkpoint import load_arrays, save_arrays
from lvjax.io.video import read_video
from lvjax.run import lock
from lvjax.run.card import card_path
from lvjax.run.state import state_path
from lvjax.run.weights import load, save
from tests.cli.commands import PROMPTS, generate, interrupted


def test_an_interrupted_run_resumes_to_the_same_file(model, tmp_path):
    args = (*PROMPTS, "--frames", "53", "--seed", "2")
    assert generate(model, tmp_path / "whole.mp4", *args) == 0
    interrupted(model, tmp_path / "cut.mp4", 2, *args)
    with open(tmp_path / "cut.mp4", "ab") as f:
        f.write(b"half a fragment")
    assert read_video(tmp_path / "cut.mp4")[0].shape[0] == 29
    assert main(["generate", "--resume", "--out", str(tmp_path / "cut.mp4")]) == 0
    assert (tmp_path / "cut.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert main(["generate", "--resume", "--out", str(tmp_path / "cut.mp4")]) == 0


def test_no_run_replaces_the_state_of_another(model, tmp_path, capsys):
    """A batch that was interrupted, then one video under the same name, and the reverse."""
    (tmp_path / "p.txt").write_text("the camera pans left\na red circle moves up\n")
    batch = ("--prompt-file", str(tmp_path / "p.txt"), "--frames", "29")
    for name, first, second in (("a", batch, (*PROMPTS, "--frames", "17")), ("b", PROMPTS, batch)):
        out = tmp_path / f"{name}.mp4"
        assert generate(model, out, *first) == 0
        before = {p: p.read_bytes() for p in tmp_path.iterdir()}
        assert generate(model, out, *second) == 2
        assert "already exists" in capsys.readouterr().err
        assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}
        assert generate(model, out, *second, "--overwrite") == 0


def test_a_run_is_not_resumed_with_another_model(model, tmp_path, capsys):
    other, out = shutil.copytree(model, tmp_path / "other"), tmp_path / "a.mp4"
    head = json.loads((other / "model.json").read_text())
    head["dit"]["theta"] = 5000.0  # the same shapes
    (other / "model.json").write_text(json.dumps(head))
    interrupted(model, out, 1, *PROMPTS, "--frames", "29")
    capsys.readouterr()
    before = {p: p.read_bytes() for p in tmp_path.glob("a.mp4*")}
    assert main(["generate", "--resume", "--out", str(out), "--model", str(other)]) == 2
    assert "other weights" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in tmp_path.glob("a.mp4*")}


def test_a_state_without_its_video_is_not_replaced(model, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    interrupted(model, out, 1, *PROMPTS, "--frames", "29")
    out.rename(tmp_path / "elsewhere.mp4")
    card_path(out).unlink()
    capsys.readouterr()
    assert generate(model, out, *PROMPTS) == 2
    assert "a.mp4.state already exists (unfinished" in capsys.readouterr().err


def test_nan_stops_at_its_clip_and_keeps_the_ones_before(model, tmp_path, capsys):
    """NaN enters by the state: clip 2 begins from it."""
    args = (*PROMPTS, "--frames", "53")
    assert generate(model, tmp_path / "whole.mp4", *args) == 0
    out = tmp_path / "a.mp4"
    interrupted(model, out, 2, *args)
    good = state_path(out).read_bytes()
    arrays, meta = load_arrays(state_path(out))
    arrays["condition"] = np.full_like(arrays["condition"], np.nan)
    save_arrays(state_path(out), arrays, meta)
    damaged = state_path(out).read_bytes()
    assert main(["generate", "--resume", "--out", str(out)]) == 5
    err = capsys.readouterr().err.strip().splitlines()
    assert "latents of clip 2" in err[-1] and read_video(out)[0].shape[0] == 29
    assert state_path(out).read_bytes() == damaged  # no state after the clip that failed
    state_path(out).write_bytes(good)
    assert main(["generate", "--resume", "--out", str(out)]) == 0
    assert out.read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_resume_takes_the_settings_of_the_run_or_none(model, tmp_path, capsys):
    args = (*PROMPTS, "--frames", "53", "--seed", "2")
    assert generate(model, tmp_path / "whole.mp4", *args) == 0
    out = tmp_path / "a.mp4"
    interrupted(model, out, 1, *args)
    before = out.read_bytes(), state_path(out).read_bytes()
    capsys.readouterr()
    for other, name in (
        (("--prompt", "the camera pans up", *args[4:]), "prompt"),
        ((*args, "--steps", "3"), "steps"),
        ((*args, "--seed", "3"), "seed"),
        ((*args[:4], "--frames", "41", "--seed", "2"), "frames"),
        ((*args, "--set", "defaults.shift=5.0"), "shift"),
        (("--seed", "3"), "prompts"),
    ):
        assert generate(model, out, "--resume", *other) == 2
        err = capsys.readouterr().err.strip()
        assert name in err and len(err.splitlines()) == 1
        assert (out.read_bytes(), state_path(out).read_bytes()) == before
    assert generate(model, out, "--resume", *args) == 0
    assert out.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert generate(model, out, "--resume", *args) == 0
    assert generate(model, out, "--resume", *args, "--steps", "3") == 2  # complete, but another


def test_resume_with_nothing_to_resume(tmp_path, capsys):
    assert main(["generate", "--resume", "--out", str(tmp_path / "a.mp4")]) == 2
    assert "no unfinished run" in capsys.readouterr().err


def test_resume_refuses_other_weights_and_finds_moved_ones(model, tmp_path, capsys):
    here, moved = tmp_path / "here", tmp_path / "moved"
    save(here, load(model))
    out = tmp_path / "a.mp4"
    interrupted(str(here), out, 1, *PROMPTS, "--frames", "41")
    here.rename(moved)
    other = load(model)
    head = other.params["dit"]["head"]["linear"]
    head["kernel"] = head["kernel"] * 2
    save(tmp_path / "other", other)
    again = ["generate", "--resume", "--out", str(out)]
    assert main(again) == 3
    capsys.readouterr()
    assert main([*again, "--model", str(tmp_path / "other")]) == 2
    assert "other weights" in capsys.readouterr().err
    assert main([*again, "--model", str(moved)]) == 0


def test_runs_whose_files_overlap_exclude_each_other(model, tmp_path, capsys):
    """A batch to b.mp4 writes b-000.mp4 and b-001.mp4, which another run may hold."""
    (tmp_path / "prompts.txt").write_text("the camera pans left\na red circle moves up\n")
    batch = ("--prompt-file", str(tmp_path / "prompts.txt"), "--frames", "5")
    with lock.hold(tmp_path / "b-001.mp4"):
        assert generate(model, tmp_path / "b.mp4", *batch) == 7
        assert "b-001.mp4 is being written" in capsys.readouterr().err
    with lock.hold(tmp_path / "b.mp4"):
        assert generate(model, tmp_path / "b.mp4", *batch) == 7
    interrupted(model, tmp_path / "b.mp4", 1, *batch[:2], "--frames", "41")
    with lock.hold(tmp_path / "b-000.mp4"):
        assert main(["generate", "--resume", "--out", str(tmp_path / "b.mp4")]) == 7
    assert main(["generate", "--resume", "--out", str(tmp_path / "b.mp4")]) == 0
    assert not list(tmp_path.glob("*.lock"))


def test_a_run_without_its_card_goes_on(model, tmp_path):
    """The state holds the card: a kill between the two first files loses nothing."""
    args = (*PROMPTS, "--frames", "29")
    assert generate(model, tmp_path / "whole.mp4", *args) == 0
    for name, instead in (("a", None), ("b", card_path(tmp_path / "whole.mp4").read_bytes())):
        out = tmp_path / f"{name}.mp4"
        interrupted(model, out, 1, *args)
        card_path(out).unlink()
        if instead is not None:  # the card of another run that was here before
            card_path(out).write_bytes(instead)
        assert main(["generate", "--resume", "--out", str(out)]) == 0
        assert out.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
        assert "latents" in json.loads(card_path(out).read_text())


@pytest.mark.parametrize(
    "change",
    [
        {"clip": "1"},
        {"clip": -1},
        {"clip": 0},
        {"clip": 99},
        {"frame": 4},
        {"frame": "17"},
        {"digest": 4},
        {"offsets": []},
        {"offsets": [None]},
        {"offsets": 7},
        {"card": {"options": {"frames": 18}}},
        {"card": {"options": {"steps": 0}}},
        {"card": {"options": {"guidance": []}}},
        {"card": {"options": {"guidance": [1.0, 2.0, 3.0]}}},
        {"card": {"options": {"model": "a\0b"}}},
    ],
    ids=str,
)
def test_a_state_that_no_run_leaves_is_refused(model, tmp_path, capsys, change):
    """Written with a right checksum, as a program with a fault would."""
    out = tmp_path / "a.mp4"
    interrupted(model, out, 1, *PROMPTS, "--frames", "29")
    arrays, meta = load_arrays(state_path(out))
    if "card" in change:
        card = meta["card"]
        change = {"card": card | {"options": card["options"] | change["card"]["options"]}}
    save_arrays(state_path(out), arrays, meta | change)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    assert main(["generate", "--resume", "--out", str(out), "--quiet"]) == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


def test_a_damaged_state_is_refused(model, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    interrupted(model, out, 1, *PROMPTS, "--frames", "53")
    state = bytearray(state_path(out).read_bytes())
    state[-5] ^= 1
    state_path(out).write_bytes(state)
    assert main(["generate", "--resume", "--out", str(out)]) == 3
    assert "checksum" in capsys.readouterr().err


def test_a_second_run_on_the_same_output_is_told_of_the_first(model, tmp_path):
    out = tmp_path / "a.mp4"
    holder = (
        "import time; from lvjax.run.lock import hold\n"
        f"with hold({str(out)!r}): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", holder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline().strip() == "held"
        second = subprocess.run(
            [
                sys.executable,
                "-m",
                "lvjax.cli.main",
                "generate",
                "--model",
                model,
                "--prompt",
                "x",
                "--out",
                str(out),
            ],
            capture_output=True,
            text=True,
        )
        assert second.returncode == 7 and str(first.pid) in second.stderr
        first.kill()
    assert os.path.exists(f"{out}.lock")
    assert generate(model, out, *PROMPTS, "--frames", "5") == 0
