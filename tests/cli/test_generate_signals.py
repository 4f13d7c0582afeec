# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM of a real `lvjax generate` process."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from lvjax.io.video import read_video
from lvjax.run.card import card_path
from lvjax.run.weights import save
from tests.tiny import tiny_bundle

RUN = ("--prompt", "the camera pans left", "--prompt", "a red circle moves up")
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from lvjax.cli.main import main; sys.exit(main())"
)


def start(out, *args) -> subprocess.Popen:
    """`lvjax generate`, with SIGINT as a terminal leaves it: a shell's background job ignores it,
    and a test may run in one.
    """
    command = [sys.executable, "-c", START, "generate", "--out", str(out), *args]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    err = process.communicate()[1]
    return process.returncode, err


def digest(out) -> str:
    return json.loads(card_path(out).read_text())["latents"]


def interrupt_and_resume(folder, number: int, code: int, *args) -> None:
    """Stop a run after its first clip, resume it, and compare it with one that nobody stopped."""
    whole, out = folder / "whole.mp4", folder / f"cut{number}.mp4"
    if not whole.exists():
        assert finish(start(whole, *RUN, *args))[0] == 0
    wanted = read_video(whole)[0]
    process = start(out, *RUN, *args)
    while "clip 1/" not in (line := process.stderr.readline()):
        assert line, "the run ended before its first clip"
    process.send_signal(number)
    found, err = finish(process)
    assert found == code and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("lvjax: stopped after a finished clip")
    assert os.path.exists(f"{out}.state") and not os.path.exists(f"{out}.lock")
    partial = read_video(out)[0]
    assert 0 < len(partial) < len(wanted)
    np.testing.assert_array_equal(partial, wanted[: len(partial)])
    assert finish(start(out, "--resume"))[0] == 0
    assert digest(out) == digest(whole) and out.read_bytes() == whole.read_bytes()
    assert not os.path.exists(f"{out}.state")


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_ten_seconds_of_the_pocket_model(tmp_path, number, code):
    interrupt_and_resume(tmp_path, number, code, "--seconds", "10")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save(folder / "model", tiny_bundle())
    return folder


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_saves_the_run(tiny, number, code):
    """The same on a tiny model; long enough that the signal arrives inside it."""
    interrupt_and_resume(tiny, number, code, "--model", str(tiny / "model"), "--frames", "1205")


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_while_starting_ends_it_at_once(tiny, number, code):
    """Before the first clip there is nothing to save, but the exit code and the line are the same.

    The plan is printed before anything heavy; a pipe that nobody reads yet holds it back.
    """
    out = tiny / f"early{number}.mp4"
    command = [sys.executable, "-u", "-c", START, "generate", "--out", str(out), *RUN]
    command += ["--model", str(tiny / "model"), "--size", "32x32", "--steps", "7"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline().startswith("plan: ")
        process.send_signal(number)
        process.stdout.read()
        err = process.stderr.read().strip()
    assert process.returncode == code and "Traceback" not in err
    assert err.splitlines()[-1].startswith("lvjax: ")
