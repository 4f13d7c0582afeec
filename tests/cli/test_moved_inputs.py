# SPDX-License-Identifier: Apache-2.0
"""What a run was made of, when it is resumed or replayed: long videos, embeddings, encoders, and
cards of an older version.
"""

import json
import shutil

import numpy as np
import pytest

from lvjax.cli import drive
from lvjax.cli import generate as generating
from lvjax.cli.main import main
from lvjax.io.video import FragmentedWriter, read_card
from lvjax.run import pictures
from lvjax.run.card import card_path, file_hash
from lvjax.run.encoders import load_embeddings, save_embeddings
from tests.cli.commands import PROMPTS, generate, interrupted
from tests.wan_folder import TEXT_DIM, wan_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers
PROMPT = ("--prompt", "A red fox runs over the snow")
SMALL = ("--steps", "2", "--quiet", "--size", "48x32")


def film(path, frames: int, seed: int = 0):
    noise = np.random.default_rng(seed).integers(0, 256, (frames, 32, 48, 3), np.uint8)
    with FragmentedWriter(path, (48, 32), 16, {}) as writer:
        writer.write_clip(noise)
    return path


def begin(monkeypatch, *command) -> None:
    """Start a run that is ended before its first clip."""
    with monkeypatch.context() as patch:
        patch.setattr(drive, "finish", lambda *args: 0)
        assert main([*map(str, command)]) == 0


def fails(capsys, code: int, *command) -> str:
    capsys.readouterr()
    assert main([*map(str, command)]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lvjax: ")
    return lines[0]


# ---- long videos -------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return wan_folder(tmp_path_factory.mktemp("wan") / "t2v", "t2v")


def test_a_long_video_is_resumed_from_the_state_and_replayed_from_its_file(
    wan, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(pictures, "MOST", 4)
    video, whole, cut = film(tmp_path / "v.mp4", 5), tmp_path / "a.mp4", tmp_path / "b.mp4"
    own = ("generate", "--model", wan, *PROMPT, *SMALL, "--frames", "5", "--video", video)
    assert main([*map(str, own), "--out", str(whole)]) == 0
    start = read_card(whole)["options"]["start"]
    assert start["video"] == str(video) and start["shape"] == [5, 32, 48, 3]
    assert card_path(whole).stat().st_size < 10_000
    begin(monkeypatch, *own, "--out", cut)
    video.rename(tmp_path / "moved.mp4")
    assert main(["generate", "--resume", "--out", str(cut), "--quiet"]) == 0
    assert cut.read_bytes() == whole.read_bytes()
    again = ("replay", whole, "--out", tmp_path / "c.mp4", "--quiet")
    assert "v.mp4" in fails(capsys, 3, *again)
    film(video, 5, seed=1)
    assert "has changed" in fails(capsys, 3, *again)
    assert not (tmp_path / "c.mp4").exists()
    (tmp_path / "moved.mp4").replace(video)
    assert main([*map(str, again)]) == 0
    assert (tmp_path / "c.mp4").read_bytes() == whole.read_bytes()


def test_frames_that_a_card_names_stay_in_the_state_clip_by_clip(
    model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(pictures, "MOST", 0)
    video = film(tmp_path / "v.mp4", 9)
    own = (*PROMPTS, "--frames", "53", "--video", str(video), "--quiet")
    assert generate(model, tmp_path / "a.mp4", *own) == 0
    interrupted(model, tmp_path / "b.mp4", 2, *own)
    same = ("generate", "--model", model, "--resume", *own, "--out", tmp_path / "b.mp4")
    film(video, 9, seed=1)
    assert "start frames differ" in fails(capsys, 2, *same)
    video.unlink()
    assert main(["generate", "--resume", "--out", str(tmp_path / "b.mp4"), "--quiet"]) == 0
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "a.mp4").read_bytes()


# ---- embeddings and encoders -------------------------------------------------------


@pytest.fixture
def split(wan, tmp_path):
    """(a folder without a text encoder, prompts that were read with it)."""
    for part in ("transformer", "vae"):
        shutil.copytree(wan / part, tmp_path / "model" / part)
    rows = tmp_path / "p.safetensors"
    assert main(["encode", "--model", str(wan), *PROMPT, "--out", str(rows)]) == 0
    return tmp_path / "model", rows


def changed(rows, to):
    """The same prompts with other rows."""
    found = load_embeddings(rows, TEXT_DIM)
    save_embeddings(to, {text: row + np.float32(0.5) for text, row in found.items()}, "other")
    return to


def test_embeddings_are_a_place_that_is_remembered(split, tmp_path, monkeypatch, capsys):
    model, rows = split
    own = ("generate", "--model", model, *PROMPT, *SMALL, "--frames", "5", "--embeddings", rows)
    whole, cut, again = (tmp_path / f"{name}.mp4" for name in "abc")
    assert main([*map(str, own), "--out", str(whole)]) == 0
    assert read_card(whole)["options"]["embeddings"] == str(rows)
    for name in ("b", "d"):
        begin(monkeypatch, *own, "--out", tmp_path / f"{name}.mp4")
    resume = ("generate", "--resume", "--quiet", "--out")
    assert main([*map(str, resume), str(cut)]) == 0
    assert cut.read_bytes() == whole.read_bytes()
    moved, replay = tmp_path / "moved.safetensors", ("replay", whole, "--quiet", "--out", again)
    rows.rename(moved)
    cut = tmp_path / "d.mp4"
    assert "say with --embeddings" in fails(capsys, 3, *resume, cut)
    assert "say with --embeddings" in fails(capsys, 3, *replay)
    other = changed(moved, tmp_path / "other.safetensors")
    assert "other rows" in fails(capsys, 2, *resume, cut, "--embeddings", other)
    capsys.readouterr()
    assert main([*map(str, replay), "--embeddings", str(other)]) == 0
    assert "the rows of the prompts differ" in capsys.readouterr().err
    assert again.read_bytes() != whole.read_bytes()
    assert main([*map(str, replay), "--overwrite", "--embeddings", str(moved)]) == 0
    assert "differ" not in capsys.readouterr().err
    assert main([*map(str, resume), str(cut), "--embeddings", str(moved)]) == 0
    assert cut.read_bytes() == whole.read_bytes()
    assert json.loads(card_path(again).read_text())["options"]["embeddings"] == str(moved)


def test_a_run_goes_on_from_a_conversion_but_not_with_another_text_encoder(
    wan, tmp_path, monkeypatch, capsys
):
    own = ("generate", "--model", wan, *PROMPT, *SMALL, "--frames", "5", "--seed", "3")
    assert main([*map(str, own), "--out", str(tmp_path / "a.mp4")]) == 0
    for name in ("b", "c"):
        begin(monkeypatch, *own, "--out", tmp_path / f"{name}.mp4")
    assert main(["convert", str(wan), str(tmp_path / "converted")]) == 0
    resume = ("generate", "--resume", "--quiet")
    there = (*resume, "--model", tmp_path / "converted", "--out", tmp_path / "b.mp4")
    assert main([*map(str, there)]) == 0
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "a.mp4").read_bytes()
    mixed = shutil.copytree(wan, tmp_path / "mixed")
    shutil.rmtree(mixed / "text_encoder")
    other = wan_folder(tmp_path / "seed", "t2v", seed=7)
    shutil.copytree(other / "text_encoder", mixed / "text_encoder")
    there = (*resume, "--model", mixed, "--out", tmp_path / "c.mp4")
    assert "other rows of its prompts" in fails(capsys, 2, *there)
    capsys.readouterr()
    again = ("replay", tmp_path / "a.mp4", "--model", mixed, "--quiet")
    assert main([*map(str, again)]) == 0
    assert "the rows of the prompts differ" in capsys.readouterr().err


def test_embeddings_of_another_encoder_are_refused_where_it_can_be_known(wan, tmp_path, capsys):
    folders = {"own": wan, "other": wan_folder(tmp_path / "seed", "t2v", seed=7)}
    for name, folder in folders.items():
        assert main(["convert", str(folder), str(tmp_path / name)]) == 0
        given = ("--model", str(tmp_path / name), *PROMPT)
        assert main(["encode", *given, "--out", str(tmp_path / f"{name}.safetensors")]) == 0
    assert main(["encode", "--model", str(folders["other"]), *PROMPT, "--out",
                 str(tmp_path / "unknown.safetensors")]) == 0  # fmt: skip
    own = ("generate", "--model", tmp_path / "own", *PROMPT, *SMALL, "--frames", "1")
    for name in ("own", "unknown"):
        given = (
            "--embeddings",
            tmp_path / f"{name}.safetensors",
            "--out",
            tmp_path / f"{name}.mp4",
        )
        assert main([*map(str, (*own, *given))]) == 0
    given = ("--embeddings", tmp_path / "other.safetensors", "--out", tmp_path / "c.mp4")
    assert "another text encoder" in fails(capsys, 3, *own, *given)


def test_without_guidance_no_negative_prompt_is_needed(split, tmp_path, capsys):
    model, rows = split
    found = load_embeddings(rows, TEXT_DIM)
    save_embeddings(rows, {PROMPT[1]: found[PROMPT[1]]}, "t2v")
    own = ("generate", "--model", model, *PROMPT, *SMALL, "--frames", "1", "--embeddings", rows)
    own = (*own, "--out", tmp_path / "a.mp4")
    assert "no embedding of the prompt" in fails(capsys, 2, *own)
    assert main([*map(str, (*own, "--guidance", "1"))]) == 0
    assert "one expert" in fails(capsys, 2, *own, "--overwrite", "--guidance", "1,2")


# ---- settings of this machine, and older cards -------------------------------------


def test_a_replay_says_where_weights_wait_and_activations_keep_their_type(wan, tmp_path, capsys):
    own = ["generate", "--model", str(wan), *PROMPT, *SMALL, "--frames", "1"]
    out, wide = tmp_path / "a.mp4", tmp_path / "wide.mp4"
    assert main([*own, "--out", str(out)]) == 0
    assert main([*own, "--set", "defaults.dtype=float32", "--out", str(wide)]) == 0
    assert read_card(out)["options"]["defaults"]["dtype"] is None
    assert read_card(wide)["options"]["defaults"]["dtype"] == "float32"
    latents = [json.loads(card_path(p).read_text())["latents"] for p in (out, wide)]
    assert latents[0] != latents[1]
    for offload in ("none", "layers"):
        again = ["replay", str(wide), "--offload", offload, "--overwrite", "--quiet"]
        assert main(again) == 0
        made = tmp_path / "wide-replay.mp4"
        assert made.read_bytes() == wide.read_bytes()
    seen = []
    original = drive.load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "load_model", lambda s, *a: seen.append(s) or original(s, *a))
        assert main(["replay", str(wide), "--offload", "layers", "--overwrite", "--quiet"]) == 0
    assert seen[0].offload == "layers" and seen[0].dit.dtype == "float32"
    assert "float16" in fails(capsys, 2, *own, "--set", "defaults.dtype=float16",
                              "--out", tmp_path / "c.mp4")  # fmt: skip


LATER = ("last", "strength", "embeddings", "lora", "merge_lora")
LATER_DEFAULTS = ("method", "negative", "boundary", "impose", "dtype")


def older(card: dict, model) -> dict:
    """A card as it was before Wan's models: fewer settings, and hashes of whole files."""
    options = {k: v for k, v in card["options"].items() if k not in LATER}
    was = {k: v for k, v in options["defaults"].items() if k not in LATER_DEFAULTS}
    options |= {"defaults": was, "negative": "", "method": "error_free"}
    hashes = {p: file_hash(f"{model}/{p}.safetensors") for p in ("dit", "vae", "text")}
    return card | {"options": options, "weights": hashes | {"model": "of its sizes"}}


def test_an_older_card_is_replayed_and_its_run_resumed(model, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "a.mp4", tmp_path / "b.mp4"
    own = (*PROMPTS, "--frames", "29", "--quiet")
    made = generating._card
    with monkeypatch.context() as patch:
        patch.setattr(generating, "_card", lambda *args: older(made(*args), model))
        assert generate(model, whole, *own) == 0
        interrupted(model, cut, 1, *own)
    assert "strength" not in read_card(whole)["options"]
    capsys.readouterr()
    assert main(["generate", "--resume", "--out", str(cut), "--quiet"]) == 0
    card = json.loads(card_path(whole).read_text())
    assert json.loads(card_path(cut).read_text())["latents"] == card["latents"]
    assert main(["replay", str(whole), "--quiet"]) == 0
    assert "differ" not in capsys.readouterr().err
    again = tmp_path / "a-replay.mp4"
    assert json.loads(card_path(again).read_text())["latents"] == card["latents"]
    card["weights"]["dit"] = "0" * 64
    card_path(whole).write_text(json.dumps(card))
    assert main(["replay", str(card_path(whole)), "--quiet", "--overwrite"]) == 0
    assert "weights dit differ" in capsys.readouterr().err
