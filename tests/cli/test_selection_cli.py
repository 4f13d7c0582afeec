# SPDX-License-Identifier: Apache-2.0
"""Clip selection on the command line: asked for, in the card, replayed, resumed, refused."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from lvjax.cli.main import main
from lvjax.io.video import read_card
from lvjax.run import encoders
from lvjax.run.card import card_path
from lvjax.run.sentence import features, open_sentence_encoder
from lvjax.run.spill import ClipFiles
from tests.cli.commands import PROMPTS, generate, interrupted
from tests.sentence_folder import sentence_folder

ARGS = (*PROMPTS, "--frames", "41", "--seed", "3", "--quiet")
STORY = (
    *("--prompt", "a red circle moves up"),
    *("--prompt", "the camera pans left"),
    *("--prompt", "a red square moves down"),
    *("--prompt", "the camera pans right"),
    *("--frames", "53", "--quiet", "--set", "defaults.max_selected=1"),
)
LAST = ("--set", "defaults.selection=last", "--set", "defaults.max_selected=1")


def digest(path) -> str:
    return json.loads(card_path(path).read_text())["latents"]


def error(capsys) -> str:
    """What was said; the last line, which is the only one that is no note."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("lvjax: ") for line in lines) == 1, lines
    return lines[-1]


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "a.mp4"
    assert generate(model, out, *ARGS) == 0
    return out


def test_a_policy_is_in_the_card_and_followed_everywhere(model, plain, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    interrupted(model, out, 2, *ARGS, *LAST)
    capsys.readouterr()
    assert generate(model, out, "--resume", *ARGS) == 2
    said = error(capsys)
    assert "defaults.selection was 'last', is 'prompt'" in said
    assert "defaults.max_selected was 1, is 5" in said
    assert main(["generate", "--resume", "--out", str(out), "--quiet"]) == 0
    defaults = read_card(out)["options"]["defaults"]
    assert (defaults["selection"], defaults["max_selected"]) == ("last", 1)
    assert main(["replay", str(out), "--quiet"]) == 0
    assert digest(tmp_path / "a-replay.mp4") == digest(out) != digest(plain)
    assert read_card(plain)["options"]["defaults"]["selection"] == "prompt"


# ---- by a sentence encoder ---------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return sentence_folder(tmp_path_factory.mktemp("encoder") / "tiny-minilm")


@pytest.fixture
def other(encoder, tmp_path):
    """Another encoder: one number of its weights differs."""
    folder = shutil.copytree(encoder, tmp_path / "other")
    arrays = load_file(folder / "model.safetensors")
    arrays["embeddings.LayerNorm.bias"][3] += 1e-3
    save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def made(model, encoder, tmp_path_factory):
    """A video whose clips were selected by an encoder that lies beside it."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(encoder, folder / "encoder")
    asked = ("--selection-encoder", str(folder / "encoder"))
    assert generate(model, folder / "a.mp4", *STORY, *asked) == 0
    return folder


def test_an_encoder_is_in_the_card_and_its_choice_is_made_again(
    model, made, tmp_path, capsys, monkeypatch
):
    asked_of = []

    def heard(encoder, texts):
        asked_of.append(encoder.sha256)
        return features(encoder, texts)

    monkeypatch.setattr(encoders, "features", heard)
    card, out = read_card(made / "a.mp4"), tmp_path / "b.mp4"
    sha256 = open_sentence_encoder(made / "encoder").sha256
    asked = {"path": str(made / "encoder"), "sha256": sha256}
    assert card["options"]["selection_encoder"] == asked
    assert card["weights"]["selection encoder"] == sha256
    assert main(["replay", str(made / "a.mp4"), "--out", str(out), "--quiet"]) == 0
    assert out.read_bytes() == (made / "a.mp4").read_bytes()
    assert "differ" not in capsys.readouterr().err
    assert set(asked_of) == {sha256}
    asked_of.clear()
    assert generate(model, tmp_path / "own.mp4", *STORY) == 0 and not asked_of
    assert digest(tmp_path / "own.mp4") != digest(made / "a.mp4")
    assert read_card(tmp_path / "own.mp4")["options"]["selection_encoder"] is None


def test_replay_takes_no_other_encoder(made, other, tmp_path, capsys):
    again = ["replay", str(made / "a.mp4"), "--out", str(tmp_path / "b.mp4"), "--quiet"]
    assert main([*again, "--selection-encoder", str(other)]) == 2
    assert f"{other} is not the selection encoder that the run was begun" in error(capsys)
    moved = shutil.move(made / "encoder", made / "moved")
    try:
        assert main(again) == 3
        said = error(capsys)
        assert "has no modules.json" in said and "name it with --selection-encoder" in said
        shutil.copytree(other, made / "encoder")
        assert main(again) == 3
        assert f"{made / 'encoder'} is not the selection encoder that" in error(capsys)
        assert not (tmp_path / "b.mp4").exists()
        assert main([*again, "--selection-encoder", str(moved)]) == 0
        assert digest(tmp_path / "b.mp4") == digest(made / "a.mp4")
        assert read_card(tmp_path / "b.mp4")["options"]["selection_encoder"]["path"] == str(moved)
    finally:
        shutil.rmtree(made / "encoder", ignore_errors=True)
        shutil.move(moved, made / "encoder")


def test_a_run_is_resumed_by_its_own_encoder(model, made, encoder, other, tmp_path, capsys):
    out = tmp_path / "b.mp4"
    begun = shutil.copytree(encoder, tmp_path / "begun")
    interrupted(model, out, 2, *STORY, "--selection-encoder", str(begun))
    resume = ("--resume", "--out", str(out), "--quiet")
    capsys.readouterr()
    for args, says in (
        (STORY, f"the run was begun with --selection-encoder {begun}; give the same"),
        ((*STORY, "--selection-encoder", str(other)), f"{other} is not the selection encoder"),
        (("--selection-encoder", str(other)), f"{other} is not the selection encoder"),
    ):
        assert main(["generate", "--model", model, *resume, *args]) == 2
        assert says in error(capsys)
    shutil.rmtree(begun)
    assert main(["generate", *resume]) == 3
    assert "moved? name it with --selection-encoder" in error(capsys)
    assert main(["generate", *resume, "--selection-encoder", str(encoder)]) == 0
    assert digest(out) == digest(made / "a.mp4")
    assert main(["generate", *resume]) == 0  # complete: nothing of it is needed
    assert main(["generate", *resume, "--selection-encoder", str(other)]) == 2


def test_a_run_without_an_encoder_takes_none(model, plain, encoder, tmp_path, capsys):
    place = ("--selection-encoder", str(encoder))
    assert main(["replay", str(plain), "--out", str(tmp_path / "b.mp4"), *place]) == 2
    assert "was begun with no selection encoder; leave" in error(capsys)
    assert generate(model, tmp_path / "c.mp4", *ARGS, *LAST, *place) == 2
    assert "defaults.selection is 'last', which compares no prompts" in error(capsys)
    for damaged in ({"path": 3, "sha256": "0"}, {"path": "x"}, ["x"], "x"):
        card = read_card(plain)
        card["options"]["selection_encoder"] = damaged
        (tmp_path / "x.mp4.json").write_text(json.dumps(card))
        assert main(["replay", str(tmp_path / "x.mp4.json"), *place]) == 3
        assert "the selection encoder in the run card cannot be read" in error(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.mp4.json"]


# ---- clips that leave the memory ---------------------------------------------------


SPILL = (*("--set", "defaults.capacity=2"), *("--set", "defaults.spill=True"))
RETURNS = (
    *(word for colour in ("red", "blue", "green") * 2 for word in ("--prompt", f"a {colour}")),
    *("--frames", "77", "--quiet", "--set", "defaults.max_selected=1"),
)


def folder_of(out):
    return out.with_name(f"{out.name}.clips")


def test_clips_that_leave_the_memory_come_back(model, tmp_path, capsys):
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    assert generate(model, whole, *RETURNS, *SPILL) == 0 and not folder_of(whole).exists()
    assert generate(model, tmp_path / "lost.mp4", *RETURNS, *SPILL[:2]) == 0
    assert digest(whole) != digest(tmp_path / "lost.mp4")
    interrupted(model, cut, 4, *RETURNS, *SPILL)
    green = folder_of(cut) / "000000-00000002.safetensors"  # the last clip sees it again
    kept = green.read_bytes()
    green.unlink()
    resume = ["generate", "--resume", "--out", str(cut), "--quiet"]
    capsys.readouterr()
    assert main(resume) == 3
    assert f"{green}, which is not there" in error(capsys)
    green.write_bytes(kept)
    assert main(resume) == 0 and digest(cut) == digest(whole) and not folder_of(cut).exists()
    assert main(["replay", str(whole), "--quiet"]) == 0
    assert (tmp_path / "whole-replay.mp4").read_bytes() == whole.read_bytes()


def test_one_video_of_a_batch_leaves_no_clips_behind(model, tmp_path, monkeypatch):
    saved, original = [], ClipFiles.save

    def save(self, *args):
        saved.append(self.folder)
        original(self, *args)

    monkeypatch.setattr(ClipFiles, "save", save)
    assert generate(model, tmp_path / "b.mp4", *RETURNS, *SPILL, "--num-videos", "2") == 0
    out = tmp_path / "c.mp4"
    assert main(["replay", str(tmp_path / "b-001.mp4"), "--out", str(out), "--quiet"]) == 0
    assert out.read_bytes() == (tmp_path / "b-001.mp4").read_bytes()
    assert set(saved) == {folder_of(tmp_path / "b.mp4"), folder_of(out)} and len(saved) >= 8
    there = ["b-000.mp4", "b-001.mp4", "b.mp4.json", "c.mp4", "c.mp4.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == there


def test_a_file_where_clips_would_go(model, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    folder_of(out).write_text("precious")
    assert generate(model, out, *RETURNS, *SPILL) == 2
    assert "is no folder; move it away" in error(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4.clips"]
