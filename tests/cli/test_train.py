# SPDX-License-Identifier: Apache-2.0
"""`lvjax train` on the tiniest recipe: one run per folder, signals, a recipe that stays."""

import dataclasses
import json
import os
import shutil
import signal
import types

import pytest

from lvjax.cli import train
from lvjax.cli.main import main
from lvjax.lab.gpu_train import TINY
from lvjax.run.weights import load
from lvjax.train.checkpoints import Checkpoints, is_begun

RECIPE = dataclasses.replace(
    TINY, extension=(dataclasses.replace(TINY.extension[0], name="dit", memory=0),)
)
CONFIG = f"""
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({dataclasses.asdict(RECIPE)!r}, convert_dict=True)
"""
STAGES = ("vae_image", "dit", "vae_decoder")


@pytest.fixture
def command(tmp_path):
    """changes of the config -> the command, in a folder of its own."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    base = ["train", "--config", str(tmp_path / "tiny.py"), "--folder", str(tmp_path / "run")]
    return lambda *changes: [*base, *(x for c in changes for x in ("--set", c))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that is complete."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.py").write_text(CONFIG)
    args = ["train", "--config", str(folder / "tiny.py"), "--folder", str(folder / "run")]
    assert main(args) == 0
    return folder / "run"


def steps(folder) -> dict[str, int]:
    found = {}
    for stage in STAGES:
        if is_begun(folder / stage):
            with Checkpoints(folder / stage) as saved:
                found[stage] = saved.newest
    return found


def stages(kind: str, name: str | None = None, **changes) -> str:
    """A change of the only stage of a kind of the tiny recipe: its name, fields or options."""
    stage = dataclasses.asdict(getattr(RECIPE, kind)[0])
    stage["name"] = name or stage["name"]
    for key, value in changes.items():
        (stage if key in stage else stage["options"])[key] = value
    return f"{kind}=({stage!r},)"


def said(capsys) -> str:
    err = [x for x in capsys.readouterr().err.strip().splitlines() if x.startswith("lvjax: ")]
    assert len(err) == 1
    return err[0]


@pytest.mark.parametrize(
    ("number", "code", "all_stages"),
    [
        pytest.param(signal.SIGINT, 130, True, marks=pytest.mark.long),
        (signal.SIGTERM, 143, False),
    ],
)
def test_a_signal_saves_the_step_in_flight_and_the_run_goes_on(
    command, tmp_path, capsys, monkeypatch, number, code, all_stages
):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(train, "_report", lambda stage, line: signal.raise_signal(number))
    assert main(command()) == code
    assert "goes on from" in said(capsys) and steps(tmp_path / "run") == {"vae_image": 1}
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert not list((tmp_path / "run").glob("*.lock"))
    monkeypatch.undo()
    if not all_stages:  # the time is up after the first
        monkeypatch.setattr(train.pocket, "encode_store", lambda *_: None)
    assert main(command()) == 0
    done = STAGES if all_stages else STAGES[:1]
    assert steps(tmp_path / "run") == dict.fromkeys(done, 2)
    lines = (tmp_path / "run" / "vae_image" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [1, 2]


def test_a_second_interrupt_does_not_say_that_the_step_is_saved(
    command, tmp_path, capsys, monkeypatch
):
    def twice(stage, line):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "_report", twice)
    assert main(command()) == 130
    assert "goes on from what is saved in" in said(capsys)
    assert steps(tmp_path / "run") == {}


def test_a_signal_while_clips_are_rendered_ends_at_once(command, capsys, monkeypatch):
    def fill(store, left):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("not reached")

    monkeypatch.setattr("lvjax.data.clips.ClipStore.fill", fill)
    assert main(command()) == 143
    assert "goes on from" in said(capsys)


def test_a_second_run_in_the_folder_is_told_of_the_first(command, capsys, monkeypatch):
    codes = []

    def meanwhile(*_):
        codes.append(main(command()))
        raise KeyboardInterrupt

    monkeypatch.setattr(train.pocket, "train", meanwhile)
    assert main(command()) == 130 and codes == [7]
    err = capsys.readouterr().err
    assert f"process {os.getpid()} on" in err and "--folder" in err


def test_a_place_that_cannot_be_written(command, tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    assert main(command()) == 6
    assert "choose another --folder" in said(capsys)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "x")]
)
def test_a_failing_disk_is_one_line(command, capsys, monkeypatch, error):
    def failing(*_):
        raise error

    monkeypatch.setattr(train.pocket, "train", failing)
    assert main(command()) == 6
    assert error.strerror in said(capsys)


def test_clips_that_do_not_fit_are_refused_before_they_are_rendered(
    command, tmp_path, capsys, monkeypatch
):
    usage = types.SimpleNamespace(free=600_000)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(train.pocket, "train", lambda *_: True)
    assert main(command()) == 6  # 2 videos of 2 clips of 17 frames are 0.8 MB
    assert "0.0 GB more" in said(capsys) and not (tmp_path / "run" / "recipe.json").exists()
    usage.free = 1_000_000
    assert main(command()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dit.ffn_dim=64", "dit.ffn_dim was 32, is 64"),
        ("task.drop_text=0.5", "task.drop_text was"),
        ("videos=3", "videos was 2, is 3"),
        ("seed=1", "seed was 0, is 1"),
        ("autoencoder=()", "stage 1 of autoencoder was vae_image, is nothing"),
        (stages("extension", name="dit_other"), "was dit, is dit_other"),
        (stages("extension", warmup=7), "dit.warmup was 1, is 7"),
        (stages("extension", batch=1), "dit.batch was 2, is 1"),
        (stages("extension", steps=1), "it may only grow"),
        (stages("autoencoder", steps=3), "vae_image has more steps, but is done"),
    ],
    ids=lambda x: x[:24],
)
def test_another_recipe_is_refused(finished, command, tmp_path, capsys, change, message):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "recipe.json").read_text()
    assert main(command(change)) == 2
    err = said(capsys)
    assert message in err and "another folder" in err
    assert (tmp_path / "run" / "recipe.json").read_text() == before
    assert steps(tmp_path / "run") == dict.fromkeys(STAGES, 2)


def test_a_folder_in_which_nothing_was_made_is_free(command, tmp_path):
    assert main([*command("seed=1"), "--minutes", "1e-9"]) == 0
    assert main([*command(), "--minutes", "1e-9"]) == 0
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["seed"] == 0


def test_longer_stages_and_other_defaults_go_on(finished, command, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    longer = stages("extension", steps=4, learning_rate=5e-4)  # as after a run that diverged
    assert main(command(longer, "defaults.upscale=3")) == 0
    assert steps(tmp_path / "run") == dict.fromkeys(STAGES, 2) | {"dit": 4}
    assert load(tmp_path / "run" / "bundle").defaults.upscale == 3
    kept = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert kept["extension"][0]["options"]["steps"] == 4


def test_a_folder_without_a_recipe_takes_the_first_and_a_damaged_one_is_named(
    finished, command, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "recipe.json").unlink()
    assert main(command()) == 0 and (tmp_path / "run" / "recipe.json").exists()
    (tmp_path / "run" / "recipe.json").write_text("{")
    capsys.readouterr()
    assert main(command()) == 3
    assert "remove it" in said(capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("videos=0", "1 or more"),
        ("videos=many", "videos"),
        ("videos=None", "1 or more"),
        ("seed=-1", "from 0 to"),
        ("defaults.fps=0", "defaults.fps is 0"),
    ],
)
def test_values_that_no_run_can_have(command, tmp_path, capsys, change, message):
    assert main(command(change)) == 2
    assert message in said(capsys) and not (tmp_path / "run").exists()


def test_a_start_that_is_no_model(command, tmp_path, capsys):
    assert main(command("start='nowhere'")) == 3
    assert "no model" in said(capsys) and not (tmp_path / "run").exists()


def test_minutes_must_be_positive(command, capsys):
    assert main([*command(), "--minutes", "nan"]) == 2
    assert "--minutes" in said(capsys)
