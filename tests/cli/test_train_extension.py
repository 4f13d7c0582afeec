# SPDX-License-Identifier: Apache-2.0
"""`lvjax train` on a dataset of latents: from videos to a model, and back into the same folder."""

import dataclasses
import json
import signal

import numpy as np
import pytest

from lvjax.cli import train_extension
from lvjax.cli.main import main
from lvjax.run.machine import host_memory
from lvjax.run.weights import load, save
from lvjax.train.checkpoints import Checkpoints
from tests.cli.test_encode_videos import LEFT, UP, write_video
from tests.tiny import tiny_bundle

STEPS = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, and a dataset of two videos."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny_bundle()
    defaults = dataclasses.replace(model.defaults, clip_latents=3, overlap=1, steps=2)
    save(folder / "model", dataclasses.replace(model, defaults=defaults), dtype="float32")
    (folder / "videos").mkdir()
    for name, frames, text in (("a", 33, LEFT), ("b", 25, UP)):
        write_video(folder / "videos" / f"{name}.mp4", frames)
        (folder / "videos" / f"{name}.txt").write_text(text)
    words = ["--model", folder / "model", "--videos", folder / "videos", "--out", folder / "data"]
    assert main(["encode", *map(str, words), "--tails", "2"]) == 0
    return folder


@pytest.fixture
def command(made, tmp_path):
    """(stage, changes of the config) -> the command, in a folder of its own."""

    def build(stage, *changes, model=None):
        own = [
            f"model={model or made / 'model'}",
            f"data={made / 'data'}",
            f"options.steps={STEPS}",
            "options.log_every=1",
            "options.sample_every=0",
            "options.warmup=1",
            "options.learning_rate=0.01",
            "batch=2",
            "dtype=None",
            "task.given=(0.2, 0.4, 0.4)",
            *changes,
        ]
        sets = [x for change in own for x in ("--set", change)]
        place = str(tmp_path / f"run{stage}")
        return ["train", "--config", f"error_free_stage{stage}", *sets, "--folder", place]

    return build


def test_both_stages_from_videos(command, made, tmp_path, capsys):
    samples = (f"samples=({LEFT!r},)", "options.sample_every=2", "sample_seconds=1.0")
    assert main(command(1, *samples, "tensorboard=True")) == 0
    err, out = capsys.readouterr().err, tmp_path / "run1"
    assert "plan: memory" in err and f"step {STEPS}/{STEPS}: " in err
    assert sorted(p.name for p in (out / "samples").iterdir()) == [
        "0000002-0.mp4",
        "0000004-0.mp4",
    ]
    assert list((out / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    trained, before = load(out / "bundle"), load(made / "model")
    kernel = [m.params["dit"]["head"]["linear"]["kernel"] for m in (trained, before)]
    assert not np.array_equal(*kernel)

    words = ("clips=2", "adapters.rank=2")
    assert main(command(2, *words, model=out / "bundle")) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    two = tmp_path / "run2"
    assert f"--model {two / 'bundle'} --lora {two / 'lora.safetensors'}" in said


def test_a_run_goes_on_only_as_it_was_begun(command, tmp_path, capsys, monkeypatch):
    def stopped(bar, line):
        if line["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train_extension._Bar, "report", stopped)
        assert main(command(1)) == 143
    with Checkpoints(tmp_path / "run1") as saved:
        assert saved.newest == 2
    capsys.readouterr()
    assert main(command(1, "batch=1")) == 2
    assert "begun with another config: batch was 2, is 1" in capsys.readouterr().err
    assert main(command(1, "options.steps=3")) == 0
    assert "step 3/3" in capsys.readouterr().err
    assert (tmp_path / "run1" / "bundle" / "model.json").is_file()


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        (("data=",), 2, "data is not given"),
        (("data=nowhere",), 3, "nowhere is no dataset"),
        (("samples=('no such',)",), 2, "no prompt 'no such'"),
        (("clips=90", "task.last=0.0", "task.both=0.0"), 2, "samples of 90 clips"),
        (("task.given=(0.5, 0.1)",), 2, "add up to 1"),
        (("task.given=(1.0,)",), 2, "give last=0, both=0"),
        (("task.drop_txt=1",), 2, "did you mean 'drop_text'"),
        (("mesh=(64, 1, 1)",), 2, "needs 64 devices"),
        (("options.accumulate=3",), 2, "accumulate=3"),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, capsys, changes, code, says):
    assert main(command(1, *changes)) == code
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lvjax: ")]
    assert len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "run1" / "checkpoints").exists()


def test_what_does_not_fit_is_refused_before_weights_are_read(command, capsys, monkeypatch):
    monkeypatch.setattr(train_extension, "begin", None)
    monkeypatch.setattr(train_extension, "host_memory", lambda: 1_000_000)
    assert main(command(1)) == 4
    assert "training needs 0.0 GB" in capsys.readouterr().err and host_memory() > 1e6
