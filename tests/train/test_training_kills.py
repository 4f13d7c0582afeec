# SPDX-License-Identifier: Apache-2.0
"""A training run that is killed again and again ends as one that was not, bit for bit; SIGTERM
leaves a checkpoint within five seconds.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lvjax.models.dit import dit_spec
from lvjax.train.checkpoints import Checkpoints
from lvjax.train.state import TrainOptions, init_state, make_optimizer
from tests.drawn import drawn
from tests.tiny import DIT

SCRIPT = Path(__file__).with_name("crash_run.py")


def started(folder, steps):
    words = [sys.executable, str(SCRIPT), str(folder), str(steps)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline().strip() == "ready"
    return process


def finish(folder, steps):
    process = started(folder, steps)
    said = process.communicate()[0].strip()
    assert process.returncode == 0 and said.startswith("done")
    return said


def losses(folder):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def state_of(folder, steps):
    optimizer = make_optimizer(TrainOptions(steps, 1e-3, 2))
    like = init_state({"dit": drawn(dit_spec(DIT), 0)}, optimizer)
    with Checkpoints(folder) as saved:
        return saved.restore(like)


def step_of(folder) -> int:
    """The newest step that is logged."""
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(
    ("steps", "kills"), [(24, 1), pytest.param(200, 30, marks=pytest.mark.long)]
)
def test_kills_change_nothing(tmp_path, steps, kills):
    whole, cut, rng, seen = tmp_path / "whole", tmp_path / "cut", random.Random(1), []
    said = finish(whole, steps)
    for i in range(kills):
        process = started(cut, steps)
        now = step_of(cut)
        goal = now + 1 + rng.uniform(0, 1) * (steps - now) / (kills - i)  # some steps further
        while step_of(cut) < goal and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))  # also within a step, or while a checkpoint is written
        assert process.poll() is None  # it was killed at work
        process.kill()
        process.communicate()
        seen.append(step_of(cut))
    assert finish(cut, steps) == said and len(set(seen)) > kills // 2
    assert losses(cut) == losses(whole) and [n for n, *_ in losses(whole)] == [*range(1, steps + 1)]
    (a, position), (b, other) = state_of(whole, steps), state_of(cut, steps)
    assert position == other == {"batch": steps}
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_sigterm_leaves_a_checkpoint_in_time(tmp_path):
    process = started(tmp_path, 100_000)
    while step_of(tmp_path) < 3:
        time.sleep(0.01)
    begin = time.monotonic()
    process.terminate()
    process.communicate()
    assert time.monotonic() - begin < 5
    with Checkpoints(tmp_path) as saved:
        assert saved.newest == step_of(tmp_path)
