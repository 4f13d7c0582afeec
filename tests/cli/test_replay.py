# SPDX-License-Identifier: Apache-2.0
"""`lvjax replay` end to end on a tiny random model: the same bytes again, and what is refused."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from lvjax.cli.main import main
from lvjax.io.video import read_card
from lvjax.run import lock
from lvjax.run.card import card_path
from lvjax.run.weights import save
from tests.tiny import tiny_bundle

PROMPTS = ("--prompt", "the camera pans left", "--prompt", "a red circle moves up")


def generate(model, out, *args) -> None:
    assert main(["generate", "--model", model, "--out", str(out), "--quiet", *args]) == 0


def digest(path) -> str:
    return json.loads(card_path(path).read_text())["latents"]


def test_replay_makes_the_same_latents_without_the_input(model, tmp_path):
    photo, out = tmp_path / "photo.png", tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(photo)
    generate(model, out, *PROMPTS, "--frames", "29", "--image", str(photo), "--seed", "4")
    photo.unlink()
    assert main(["replay", str(out)]) == 0
    assert digest(tmp_path / "a-replay.mp4") == digest(out)
    assert (tmp_path / "a-replay.mp4").read_bytes() == out.read_bytes()


@pytest.fixture(scope="module")
def batch(model, tmp_path_factory):
    """A folder with b-000.mp4 to b-003.mp4, two videos of each of two prompts."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "prompts.txt").write_text("the camera pans left\na red circle moves up\n")
    args = ("--prompt-file", str(folder / "prompts.txt"), "--num-videos", "2", "--frames", "29")
    generate(model, folder / "b.mp4", *args)
    return folder


def test_a_row_of_a_batch_is_one_video_equal_to_the_original(batch, tmp_path, capsys):
    out = tmp_path / "again.mp4"
    assert main(["replay", str(batch / "b-002.mp4"), "--out", str(out)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.mp4", "again.mp4.json"]
    assert out.read_bytes() == (batch / "b-002.mp4").read_bytes()
    assert out.read_bytes() != (batch / "b-001.mp4").read_bytes()
    assert digest(out) == digest(batch / "b.mp4")
    assert json.loads(card_path(out).read_text())["row"] == 2
    assert "2/2" in capsys.readouterr().err


def test_the_card_of_a_batch_makes_all_of_it(batch, tmp_path):
    assert main(["replay", str(batch / "b.mp4.json"), "--out", str(tmp_path / "c.mp4")]) == 0
    for i in range(4):
        made = (tmp_path / f"c-{i:03d}.mp4").read_bytes()
        assert made == (batch / f"b-{i:03d}.mp4").read_bytes()
    with lock.hold(tmp_path / "d-003.mp4"):
        assert main(["replay", str(batch / "b.mp4.json"), "--out", str(tmp_path / "d.mp4")]) == 7


def test_a_second_replay_asks_before_it_replaces_the_first(model, tmp_path, capsys):
    out, again = tmp_path / "a.mp4", tmp_path / "a-replay.mp4"
    generate(model, out, *PROMPTS, "--frames", "5")
    assert main(["replay", str(out)]) == 0
    again.write_bytes(b"precious")
    assert main(["replay", str(out)]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert "--overwrite" in err[-1] and again.read_bytes() == b"precious"
    assert main(["replay", str(out), "--overwrite"]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_model_is_found_from_anywhere_and_after_a_move(tmp_path, monkeypatch, capsys):
    save(tmp_path / "model", tiny_bundle())
    monkeypatch.chdir(tmp_path)
    generate("model", tmp_path / "a.mp4", *PROMPTS, "--frames", "5")
    assert read_card("a.mp4")["options"]["model"] == str(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main(["replay", "../a.mp4"]) == 0
    (tmp_path / "model").rename(tmp_path / "moved")
    assert main(["replay", "../a.mp4", "--overwrite"]) == 3
    capsys.readouterr()
    assert main(["replay", "../a.mp4", "--overwrite", "--model", "../moved"]) == 0
    assert "differ" not in capsys.readouterr().err
    assert digest(tmp_path / "a-replay.mp4") == digest(tmp_path / "a.mp4")


@pytest.fixture(scope="module")
def card(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("card") / "a.mp4"
    generate(model, out, *PROMPTS, "--frames", "5")
    return json.loads(card_path(out).read_text())


def drawn(format: str, side: int) -> str:
    """A start frame as a card holds it, in a format and size of one's choice."""
    data = io.BytesIO()
    Image.new("1" if format == "PNG" else "RGB", (side, side)).save(data, format)
    return base64.b64encode(data.getvalue()).decode()


@pytest.mark.parametrize("start", [("EPS", 16), ("BMP", 16), ("PNG", 20_000)], ids=str)
def test_a_start_frame_that_is_no_harmless_picture(card, tmp_path, capsys, start):
    """Other formats than PNG are never opened: for some, Pillow starts outside programs."""
    options = card["options"] | {"start": [drawn(*start)]}
    assert replay(card | {"options": options}, tmp_path) == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_card_nested_without_end(tmp_path, capsys):
    (tmp_path / "x.mp4.json").write_text("[" * 100_000)
    assert main(["replay", str(tmp_path / "x.mp4.json")]) == 3
    assert "not a readable run card" in capsys.readouterr().err


def replay(card, folder) -> int:
    path = folder / "x.mp4.json"
    path.write_text(json.dumps(card))
    return main(["replay", str(path)])


def test_a_replay_that_cannot_fit_is_refused_before_it_starts(card, tmp_path, capsys):
    big = card | {"options": card["options"] | {"size": [8192, 8192]}}
    assert replay(big, tmp_path) == 4
    assert "fit" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.mp4.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "lvjax-card/99"},
        {"weights": None},
        {"inputs": []},
        {"versions": None},
        {"options": []},
        {"row": 7},
        {"row": "first"},
        *(
            {"options": option}
            for option in (
                {"timelines": None},
                {"timelines": [[]]},
                {"timelines": [[[0, ""]]]},
                {"timelines": [[["soon", "x"]]]},
                {"frames": "many"},
                {"frames": 18},
                {"size": [64]},
                {"size": [15, 16]},
                {"size": ["a", "b"]},
                {"start": ["no picture"]},
                {"seed": None},
                {"steps": "few"},
                {"guidance": "much"},
                {"guidance": []},
                {"guidance": [1.0]},
                {"guidance": [1, 2, 3]},
                {"guidance": 10**400},
                {"model": "a\0b"},
                {"lora": [{"path": "a", "sha256": "0", "strength": 10**400, "expert": None}]},
                {"negative": 3},
                {"defaults": {"overlap": 9}},
                {"defaults": None},
            )
        ),
    ],
    ids=str,
)
def test_a_card_that_cannot_be_followed_is_one_line(card, tmp_path, capsys, change):
    if isinstance(change.get("options"), dict):
        change = {"options": card["options"] | change["options"]}
    assert replay(card | change, tmp_path) == 3
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and "unexpected" not in err
    assert "card" in err or "give 'pocket' or a folder" in err


@pytest.mark.parametrize("option", ["--model", "--lora", "--embeddings", "--out", "VIDEO"])
def test_an_empty_name_is_not_the_current_folder(card, tmp_path, capsys, option):
    path = tmp_path / "x.mp4.json"
    path.write_text(json.dumps(card))
    given = [""] if option == "VIDEO" else [str(path), option, ""]
    assert main(["replay", *given]) == 2
    assert capsys.readouterr().err.startswith(f"lvjax: {option} is empty; give the name of")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("part", ["format", "options", "weights", "inputs", "versions"])
def test_a_card_without_a_part(card, tmp_path, capsys, part):
    assert replay({k: v for k, v in card.items() if k != part}, tmp_path) == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("key", ["timelines", "frames", "size", "seed", "defaults", "start"])
def test_a_card_without_a_setting_names_it(card, tmp_path, capsys, key):
    options = {k: v for k, v in card["options"].items() if k != key}
    assert replay(card | {"options": options}, tmp_path) == 3
    err = capsys.readouterr().err.strip()
    assert key in err and len(err.splitlines()) == 1
