# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments, and memory that does not grow with the video."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lvjax.io.video import read_video
from lvjax.run.bundle import save
from tests.tiny import tiny_bundle

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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save(folder, tiny_bundle())
    return folder


def test_twenty_kills_twenty_equal_videos(model, tmp_path):
    run = [
        "--prompt",
        "the camera pans left",
        "--prompt",
        "a red circle moves up",
        "--frames",
        "1925",
        "--seed",
        "3",
    ]
    whole = tmp_path / "whole.mp4"
    subprocess.run(command(model, whole, *run), check=True)
    began = time.monotonic()
    subprocess.run(command(model, whole, *run, "--overwrite"), check=True)
    duration = time.monotonic() - began
    wanted, digest = (
        read_video(whole)[0],
        json.loads(whole.with_suffix(".json").read_text())["latents"],
    )
    moments, playable = random.Random(7), 0
    for i in range(20):
        out = tmp_path / f"cut{i}.mp4"
        process = subprocess.Popen(command(model, out, *run))
        time.sleep(moments.uniform(0.05, 0.98) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists() and out.stat().st_size and os.path.exists(f"{out}.state"):
            state_frames = 0
            try:
                state_frames = len(read_video(out)[0])
            except ValueError as e:
                assert "no frames" in str(e)
            np.testing.assert_array_equal(
                read_video(out)[0] if state_frames else wanted[:0], wanted[:state_frames]
            )
            playable += state_frames > 0
        subprocess.run(
            command(
                model,
                out,
                *run,
                "--resume",
                *([] if os.path.exists(f"{out}.state") else ["--overwrite"]),
            ),
            check=True,
        )
        assert json.loads(out.with_suffix(".json").read_text())["latents"] == digest
        np.testing.assert_array_equal(read_video(out)[0], wanted)
        for path in tmp_path.glob(f"cut{i}.*"):
            path.unlink()
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
