# SPDX-License-Identifier: Apache-2.0
"""`lvjax train` on a dataset of latents: from videos to a model, and back into the same folder."""

import dataclasses
import filecmp
import gc
import json
import shutil
import signal
import types
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from lvjax.cli import train_extension
from lvjax.cli.main import main
from lvjax.core.errors import DoesNotFitError, StorageError
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


def words(made, place, stage, *changes, model=None):
    """The command that trains in a folder, with changes of the config."""
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
    return ["train", "--config", f"error_free_stage{stage}", *sets, "--folder", str(place)]


@pytest.fixture
def command(made, tmp_path):
    """(stage, changes of the config) -> the command, in a folder of its own."""
    return lambda stage, *changes, **kwargs: words(
        made, tmp_path / f"run{stage}", stage, *changes, **kwargs
    )


SAMPLES = (f"samples=({LEFT!r},)", "options.sample_every=2", "sample_seconds=1.0")


def held(patch) -> list[int]:
    """Bytes of the arrays in memory beside those of now, added to after every step."""
    gc.collect()
    found, before = [], sum(a.nbytes for a in jax.live_arrays())
    report = train_extension._report

    def reported(bar, steps, line):
        gc.collect()
        found.append(sum(a.nbytes for a in jax.live_arrays()) - before)
        report(bar, steps, line)

    patch.setattr(train_extension, "_report", reported)
    return found


class Whole(NamedTuple):
    """A run of stage 1 that was not interrupted.  held: see there."""

    folder: Path
    err: str
    held: list[int]


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run1"
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as err:
        bytes_held = held(patch)
        assert main(words(made, folder, 1, *SAMPLES, "tensorboard=True")) == 0
    return Whole(folder, err.getvalue(), bytes_held)


def losses(folder) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def test_both_stages_from_videos(whole, command, made, tmp_path, capsys):
    out = whole.folder
    assert "plan: memory" in whole.err and f"step {STEPS}/{STEPS}: " in whole.err
    assert sorted(p.name for p in (out / "samples").iterdir()) == [
        "0000002-0.mp4",
        "0000004-0.mp4",
    ]
    assert list((out / "tensorboard").iterdir())
    assert [*losses(out)] == [*range(1, STEPS + 1)]
    trained, before = load(out / "bundle"), load(made / "model")
    kernel = [m.params["dit"]["head"]["linear"]["kernel"] for m in (trained, before)]
    assert not np.array_equal(*kernel)

    words = ("clips=2", "adapters.rank=2")
    assert main(command(2, *words, model=out / "bundle")) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    two = tmp_path / "run2"
    assert f"--model {two / 'bundle'} --lora {two / 'lora.safetensors'}" in said


def test_a_signal_ends_a_sample_and_the_run_goes_on_as_if_there_was_none(
    whole, command, tmp_path, monkeypatch, capsys
):
    def generate(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("not reached")

    out = tmp_path / "run1"
    with monkeypatch.context() as patch:
        patch.setattr(train_extension, "generate", generate)
        assert main(command(1, *SAMPLES)) == 143
    assert list(losses(out)) == [1, 2] and "goes on from what is saved" in capsys.readouterr().err
    with Checkpoints(out) as saved:
        assert saved.newest == 2
    bytes_held = held(monkeypatch)
    assert main(command(1, *SAMPLES)) == 0
    assert losses(out) == losses(whole.folder)
    for name in ("dit", "text"):
        files = [folder / "bundle" / f"{name}.safetensors" for folder in (out, whole.folder)]
        assert filecmp.cmp(*files, shallow=False)
    # the state is in memory once, also of a run that went on
    assert len(bytes_held) == 2 and max(bytes_held) < 1.1 * max(whole.held)


def test_all_parameters_over_a_mesh_give_the_curve_of_one_device(command, whole, tmp_path):
    """Also where a run that was stopped goes on, and every array stays where the step wants it."""
    assert main(command(1, "options.steps=2", "mesh=(2, 2, 2)")) == 0
    assert main(command(1, "mesh=(2, 2, 2)")) == 0
    found, one = losses(tmp_path / "run1"), losses(whole.folder)
    assert found.keys() == one.keys()
    np.testing.assert_allclose([*found.values()], [*one.values()], rtol=1e-4)


@pytest.mark.long
def test_a_mesh_with_adapters_and_samples_gives_the_curve_of_one_device(command, tmp_path, capsys):
    changes = ("clips=2", "adapters.rank=2", "task.last=0.0", "task.both=0.0")
    assert main(command(2, *changes)) == 0
    one = losses(tmp_path / "run2")
    (tmp_path / "run2").rename(tmp_path / "one")
    assert main(command(2, *changes, *SAMPLES, "mesh=(2, 2, 2)")) == 0
    assert "no sample" not in capsys.readouterr().err
    assert len(list((tmp_path / "run2" / "samples").iterdir())) == 2
    found = losses(tmp_path / "run2")
    np.testing.assert_allclose([*found.values()], [*one.values()], rtol=1e-4)


def test_what_is_wrong_with_a_sample_is_said_and_training_goes_on(
    command, tmp_path, monkeypatch, capsys
):
    wrong = [DoesNotFitError("too much"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x")]

    def generate(*_, **__):
        assert (tmp_path / "run1" / "checkpoints" / str(2 * (3 - len(wrong)))).is_dir()
        raise wrong.pop(0)

    monkeypatch.setattr(train_extension, "generate", generate)
    assert main(command(1, *SAMPLES)) == 0
    err = capsys.readouterr().err
    assert "note: no sample of step 2: too much" in err
    assert "note: no sample of step 4: the device ran out of memory" in err
    assert (tmp_path / "run1" / "bundle" / "model.json").is_file()


def test_a_run_goes_on_only_as_it_was_begun(command, made, tmp_path, capsys, monkeypatch):
    """And what is damaged is said, also after a signal."""
    shutil.copytree(made / "data", tmp_path / "data")
    damaged = min((tmp_path / "data" / "samples").iterdir())
    damaged.write_bytes(b"")
    data = f"data={tmp_path / 'data'}"

    def stopped(bar, steps, line):
        if line["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train_extension, "_report", stopped)
        assert main(command(1, data)) == 143
    with Checkpoints(tmp_path / "run1") as saved:
        assert saved.newest == 2
    lines = (tmp_path / "run1" / "damaged.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [damaged.stem]
    assert "1 damaged samples of" in capsys.readouterr().err
    assert main(command(1, data, "batch=1")) == 2
    assert "begun with another config: batch was 2, is 1" in capsys.readouterr().err
    assert main(command(1, data, "options.steps=3")) == 0
    assert "step 3/3" in capsys.readouterr().err
    assert (tmp_path / "run1" / "bundle" / "model.json").is_file()


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        (("data=",), 2, "data is not given"),
        (("data=nowhere",), 3, "nowhere is no dataset"),
        (("samples=('no such',)",), 2, "no prompt 'no such'"),
        ((SAMPLES[0], "sample_seconds=0.0"), 2, "sample_seconds is 0.0; give a number"),
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
    assert "training needs 0.9 GB" in capsys.readouterr().err and host_memory() > 1e6


def test_checkpoints_that_do_not_fit_are_refused_before_weights_are_read(
    command, tmp_path, capsys, monkeypatch
):
    usage = types.SimpleNamespace(free=10_000)
    monkeypatch.setattr(train_extension, "begin", None)
    monkeypatch.setattr(train_extension.shutil, "disk_usage", lambda _: usage)
    assert main(command(1)) == 6
    assert "the checkpoints need 0.00 GB more in" in capsys.readouterr().err
    with pytest.raises(StorageError, match="choose another --folder"):
        train_extension.check_disk(11_000, tmp_path)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "5" / "state").write_bytes(bytes(1000))
    train_extension.check_disk(11_000, tmp_path)  # what is there is counted
