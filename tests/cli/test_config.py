# SPDX-License-Identifier: Apache-2.0
"""Configs and defaults: a value that cannot be used is one line that says what can."""

import dataclasses
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from lvjax.cli import config
from lvjax.cli.main import main
from lvjax.core.errors import CheckpointError, InputError
from lvjax.lab.recipe import Stage
from lvjax.run.bundle import outline
from lvjax.run.defaults import ALLOWED, Defaults
from lvjax.run.weights import load

BAD = {
    "fps=0": "from 1 to 240",
    "fps=8.0": "whole number",
    "size=64": "(height, width)",
    "size=(64, 0)": "(height, width)",
    "clip_latents=1": "from 2",
    "overlap=0": "from 1",
    "overlap=5": "from 1 to 4",
    "steps=abc": "'abc'; give a whole number from 1 to 1000",
    "steps=True": "True",
    "shift=0": "3.0",
    "shift=1e400": "inf",
    "solver=heun": "unipc",
    "solver=[1]": "unipc",
    "guidance=-1": "1 is none",
    "window=[.9,.1]": "low < high",
    "window=(.3,.3)": "low < high",
    "window=0.5": "low < high",
    "positions=near": "relative",
    "fill=grey": "pixel",
    "capacity=0": "from 1",
    "selection=best": "prompt, last, first_last, none",
    "max_selected=0": "from 1",
    "delta=0": "0.02",
    "layers=(3, 1)": "first < last",
    "upscale=-1": "from 1 to 64",
}


@pytest.mark.parametrize("change", BAD)
def test_a_default_is_checked_wherever_it_comes_from(change):
    name, _, text = change.partition("=")
    with pytest.raises(InputError) as e:
        config.changed(Defaults(), {}, [change])
    said = str(e.value)
    assert said.startswith(f"defaults.{name} is ") and BAD[change] in said and "\n" not in said
    with pytest.raises(InputError, match=f"defaults.{name}"):
        config.build(Defaults, {name: config._value(text)})


def test_there_is_a_rule_for_every_default():
    assert [f.name for f in dataclasses.fields(Defaults) if f.name not in ALLOWED] == []


def test_good_defaults_pass():
    changes = ["window=[0, 1]", "shift=5", "layers=[0, 2]", "upscale=1", "overlap=4", "guidance=1"]
    d = config.changed(Defaults(), {}, changes)
    assert d.window == (0, 1) and d.layers == (0, 2) and d.overlap == 4


@pytest.mark.parametrize("change", ["fps=0", "overlap=5", "steps=abc", "capacity=0", "upscale=-1"])
def test_generate_ends_with_2_and_writes_nothing(model, tmp_path, capsys, change):
    out = tmp_path / "a.mp4"
    command = ["generate", "--model", str(model), "--out", str(out), "--prompt", "x"]
    assert main([*command, "--set", f"defaults.{change}"]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("lvjax: defaults.") and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("defaults", {"overlap": 9}, "defaults.overlap is 9"),
        ("defaults", {"fps": "8"}, "defaults.fps is '8'"),
        ("defaults", 5, "Defaults is 5"),
        ("dit", {"dim": 32}, "num_heads"),
    ],
)
def test_a_model_file_with_bad_values_is_a_bad_checkpoint(model, tmp_path, part, value, message):
    head = json.loads(Path(model, "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(head | {part: value}))
    with pytest.raises(CheckpointError, match=message) as e:
        load(tmp_path)
    assert "model.json" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("dit", {"dim": "256"}, "DiTConfig.dim is '256'; give a whole number"),
        ("dit", {"num_heads": 3}, "a multiple of 6"),
        ("dit", {"patch": None}, "DiTConfig.patch is None; give three"),
        ("vae", {"dim_mult": [1, 0]}, "VAEConfig.dim_mult"),
        ("vae", {"temporal_down": []}, "VAEConfig.temporal_down"),
        ("vae", {"mean": [0.0]}, "VAEConfig.mean"),
        ("text", {"num_heads": 5}, "a multiple of num_heads, 5"),
        ("text", {"eps": None}, "PocketTextConfig.eps"),
        ("dit", {"theta": 0}, "DiTConfig.theta"),
        ("dit", {"eps": 1e7}, "DiTConfig.eps"),
        ("dit", {"dtype": "int4"}, "one of float32"),
        ("dit", {"condition_channels": "x"}, "condition_channels"),
        ("dit", {"image_dim": []}, "image_dim"),
        ("vae", {"res_blocks": 10**7}, "res_blocks"),
        ("defaults", {"size": [60, 60]}, "makes multiples of"),
    ],
)
def test_a_model_of_impossible_sizes_is_a_bad_checkpoint(model, tmp_path, part, change, message):
    head = json.loads(Path(model, "model.json").read_text())
    head[part] |= change
    (tmp_path / "model.json").write_text(json.dumps(head))
    with pytest.raises(CheckpointError, match=message) as e:
        outline(tmp_path)
    assert "model.json" in str(e.value) and "\n" not in str(e.value)


def test_a_config_of_frozen_values_can_be_changed(tmp_path):
    text = (
        "from ml_collections import FrozenConfigDict as F\ndef get_config(): return F({'seed': 1})"
    )
    (tmp_path / "c.py").write_text(text)
    assert config.load(str(tmp_path / "c.py"), ["seed=3"]).seed == 3


def test_a_path_that_is_no_config_is_not_another_config(tmp_path, monkeypatch):
    for name in ("demo", "demo.py", "configs/demo.py"):
        assert config.find(name).name == "demo.py"
    monkeypatch.chdir(tmp_path)
    for name in ("other/configs/demo.py", f"{tmp_path}/configs/demo.py", "demo.txt", "x/demo"):
        with pytest.raises(InputError, match="no config"):
            config.find(name)


@pytest.mark.parametrize("key", ["a.b.a", "a.a.a", "a.a"])
def test_a_key_is_looked_up_at_every_level(key):
    values = ConfigDict({"a": {"a": 1, "b": {"a": 1}}})
    if key == "a.a.a":  # a number has no keys
        with pytest.raises(InputError, match="no keys"):
            config._assign(values, key, 2)
    else:
        config._assign(values, key, 2)
        assert (values.a.b.a, values.a.a) == ((2, 1) if key == "a.b.a" else (1, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "SyntaxError"),
        ("import no_such_module\n", "no_such_module"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError"),
        ("x = 1\n", "no get_config"),
        ("import sys; sys.exit(3)\n", "SystemExit"),
        ("def get_config():\n    raise SystemExit('bye')\n", "bye"),
        ("def get_config():\n    return 5\n", "returned 5"),
        ("def get_config():\n    return {5: 4, 'zz': 1}\n", "keys are names"),
        ("def get_config():\n    return {'defaults': {1: 2}}\n", "keys are names"),
    ],
)
def test_an_error_in_a_config_file_is_one_line(tmp_path, text, message):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(InputError, match=message) as e:
        config.load(str(tmp_path / "c.py"))
    assert "c.py" in str(e.value) and "\n" not in str(e.value)


def test_a_dataclass_that_lacks_a_value_is_named():
    with pytest.raises(InputError, match="Stage: .*options.*; give all"):
        config.build(Stage, {"name": "a", "batch": 1, "frames": 1})
