# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments, and memory that does not grow with the video."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lvjax.core.checkpoint import load_meta
from lvjax.io.video import read_video
from lvjax.run.card import card_path
from lvjax.run.spill import clips_path
from lvjax.run.state import state_path

pytestmark = pytest.mark.long


def command(model, out, *args) -> list[str]:
    return [
        sys.executable,
        "-m",
        "lvjax.cli.main",
        "generate",
        "--model",
        str(model),
        "--out",
        str(out),
        "--quiet",
        *args,
    ]


PROMPTS = ("the camera pans left", "a red circle moves up", "waves")
SPILL = ("spill=True", "capacity=2", "max_selected=1")


@pytest.mark.parametrize(("turns", "settings"), [(1, ()), (6, SPILL)], ids=("bank", "spill"))
def test_twenty_kills_twenty_equal_videos(model, tmp_path, turns, settings):
    """turns: how often the prompts follow each other; with several, clips come back from files."""
    run = [x for text in turns * PROMPTS for x in ("--prompt", text)]
    run += ["--frames", "1925", "--seed", "3"]
    run += [x for setting in settings for x in ("--set", f"defaults.{setting}")]
    whole = tmp_path / "whole.mp4"
    subprocess.run(command(model, whole, *run), check=True)
    began = time.monotonic()
    subprocess.run(command(model, whole, *run, "--overwrite"), check=True)
    duration = time.monotonic() - began
    wanted, digest = (
        read_video(whole)[0],
        json.loads(card_path(whole).read_text())["latents"],
    )
    moments, playable, saved, spilled = random.Random(7), 0, 0, 0
    for i in range(20):
        out = tmp_path / f"cut{i}.mp4"
        process = subprocess.Popen(command(model, out, *run))
        time.sleep(moments.uniform(0.05, 0.98) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        meta = load_meta(state_path(out)) if state_path(out).exists() else {"frame": 0}
        if meta["frame"]:  # then the video holds these frames, and is playable as it was left
            frames = read_video(out)[0]
            assert len(frames) >= meta["frame"]
            np.testing.assert_array_equal(frames, wanted[: len(frames)])
        playable += meta["frame"] > 0
        saved += state_path(out).exists()
        spilled += clips_path(out).exists()
        again = command(model, out, *run, "--resume")  # starts anew where nothing was saved
        subprocess.run(again, check=True)
        assert json.loads(card_path(out).read_text())["latents"] == digest
        np.testing.assert_array_equal(read_video(out)[0], wanted)
        for path in tmp_path.glob(f"cut{i}.*"):
            path.unlink()
    print(f"{saved} of 20 kills left a state, {playable} a video with frames")
    assert bool(spilled) == bool(settings)
    assert playable >= 5, "the moments missed the generating part of the run; make it longer"


def peak_memory(args: list[str]) -> float:
    """Peak resident bytes of a whole process."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    return 1024 * float(
        subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
        ).stdout.split()[-1]
    )


def test_ten_minutes_need_the_memory_of_one(tmp_path):
    """The shipped pocket model, 480 frames against 4800."""
    run = ["--prompt", "the camera pans left over a landscape", "--prompt", "a red circle moves up"]
    args = [sys.executable, "-m", "lvjax.cli.main", "generate", "--quiet"]
    subprocess.run([*args, *run, "--seconds", "4", "--out", str(tmp_path / "warm.mp4")], check=True)
    one = peak_memory([*args, *run, "--seconds", "60", "--out", str(tmp_path / "one.mp4")])
    ten = peak_memory([*args, *run, "--seconds", "600", "--out", str(tmp_path / "ten.mp4")])
    print(f"peak memory: one minute {one / 1e6:.0f} MB, ten minutes {ten / 1e6:.0f} MB")
    assert ten <= 1.02 * one
