# SPDX-License-Identifier: Apache-2.0
"""Where a conversion may write: never over what it reads, into a model of another kind, or beside
its folder; and what is left when it stops.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints_convert.sources import checkpoints
from lvjax.cli.main import main
from lvjax.core.errors import CheckpointError
from lvjax.run.bundle import outline
from tests.wan_folder import wan_folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return wan_folder(tmp_path_factory.mktemp("published"), "t2v")


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "wan"
    assert main(["convert", str(published), str(folder)]) == 0
    return folder


def said(capsys):
    err = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lvjax: ")]
    assert len(err) == 1
    return err[0]


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("fmt", ["safetensors", "orbax"])
def test_the_way_back_does_not_lead_into_a_model(published, tmp_path, capsys, layout, fmt):
    assert main(["convert", str(published), str(tmp_path / "wan"), "--format", fmt]) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "wan").rglob("*")}
    capsys.readouterr()
    for more in ([], ["--overwrite"]):
        words = ["convert", str(tmp_path / "wan"), str(tmp_path / "wan"), "--to", layout, *more]
        assert main(words) == 2
        assert "choose another DST" in said(capsys)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "wan").rglob("*")} == before


def test_a_part_that_is_not_there_is_not_written_back(converted, tmp_path, capsys):
    words = ["convert", str(converted / "vae.safetensors"), str(tmp_path / "o"), "--to", "official"]
    assert main([*words, "--part", "dit"]) == 2
    assert "is the part vae; leave --part dit out" in said(capsys)
    assert not (tmp_path / "o").exists()


def lora(path):
    rng = np.random.default_rng(0)
    name = "diffusion_model.blocks.0.self_attn.q"
    width = 48
    halves = {f"{name}.lora_down.weight": (2, width), f"{name}.lora_up.weight": (width, 2)}
    save_file({k: rng.standard_normal(s).astype(np.float32) for k, s in halves.items()}, path)


def test_a_lora_is_not_written_over_itself_or_into_a_model(converted, tmp_path, capsys):
    folder = tmp_path / "own"
    folder.mkdir()
    lora(folder / "own.safetensors")
    before = load_file(folder / "own.safetensors")
    base = ["--base", str(converted), "--overwrite"]
    assert main(["convert", str(folder), str(folder), *base]) == 2
    assert "is SRC" in said(capsys)
    assert load_file(folder / "own.safetensors").keys() == before.keys()
    lora(tmp_path / "vae.safetensors")
    model = shutil.copytree(converted, tmp_path / "model")
    facts = (model / "vae.safetensors").stat().st_mtime_ns
    assert main(["convert", str(tmp_path / "vae.safetensors"), str(model), *base]) == 2
    assert "is a model" in said(capsys)
    assert (model / "vae.safetensors").stat().st_mtime_ns == facts


def test_a_folder_is_called_by_its_name(converted, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    lora(folder / "x.safetensors")
    monkeypatch.chdir(folder)
    assert main(["convert", ".", str(tmp_path / "out"), "--base", str(converted)]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.safetensors"]


def test_the_lock_lies_inside(published, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lvjax.cli.convert.describe", lambda dst, preset: seen.extend(tmp_path.rglob("*.lock"))
    )
    assert main(["convert", str(published), str(tmp_path / "wan")]) == 0
    assert seen == [tmp_path / "wan" / ".lock"] and not seen[0].exists()


@pytest.mark.parametrize("empty", range(3))
def test_an_empty_name_is_no_folder(published, capsys, tmp_path, monkeypatch, empty):
    monkeypatch.chdir(tmp_path)
    names = [str(published), "x", str(published)]
    names[empty] = ""
    words = ["convert", *names[:2], *(["--base", names[2]] if empty == 2 else [])]
    assert main(words) == 2
    assert "is empty" in said(capsys) and not list(tmp_path.iterdir())


def test_a_link_to_nothing_is_no_folder(published, tmp_path, capsys):
    (tmp_path / "dst").symlink_to("nowhere")
    assert main(["convert", str(published), str(tmp_path / "dst")]) == 2
    assert "a link to nothing" in said(capsys)


def test_what_an_index_does_not_name_is_another_checkpoint(tmp_path):
    names = {"a": "wan-1.safetensors", "b": "wan-2.safetensors"}
    index = tmp_path / "wan.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for name in (*names.values(), "wan-vae.safetensors", "wan-vae.pth"):
        (tmp_path / name).touch()
    others = [tmp_path / "wan-vae.pth", tmp_path / "wan-vae.safetensors"]
    assert checkpoints(tmp_path) == [index, *others]
    for damaged in ("{", "[]", '{"weight_map": 5}', '{"weight_map": {"a": 5}}'):
        index.write_text(damaged)
        assert checkpoints(tmp_path)[0] == index  # whose reader says so


def test_a_conversion_that_was_stopped_is_told(converted, tmp_path, capsys):
    folder = shutil.copytree(converted, tmp_path / "wan")
    (folder / "model.json").unlink()
    with pytest.raises(CheckpointError, match="its conversion was stopped; run it again"):
        outline(folder)
    capsys.readouterr()
    assert main(["info", str(folder)]) == 3
    out = capsys.readouterr()
    assert "its conversion was stopped" in out.err and "lvjax generate" not in out.out
    (folder / "vae.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no part 'vae' yet"):
        outline(folder)


def test_a_damaged_description_says_what_helps(published, converted, tmp_path, capsys):
    folder = shutil.copytree(converted, tmp_path / "wan")
    (folder / "model.json").write_text("{")
    capsys.readouterr()
    assert main(["convert", str(published), str(folder), "--overwrite"]) == 3
    assert "remove it, it is written again" in said(capsys)
    (folder / "model.json").unlink()
    assert main(["convert", str(published), str(folder)]) == 0
    assert outline(folder).name == outline(converted).name
