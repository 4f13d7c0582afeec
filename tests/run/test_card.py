# SPDX-License-Identifier: Apache-2.0
"""Where a card lies, what it may replace, and what counts as one."""

import json

import pytest

from lvjax.core.errors import CheckpointError, InputError
from lvjax.run import card as cards


@pytest.fixture
def card():
    return cards.make_card({"seed": 1}, weights={"dit": "x"}, inputs={})


def test_a_card_lies_beside_its_video_under_its_whole_name(tmp_path, card):
    assert cards.card_path(tmp_path / "a.mp4") == tmp_path / "a.mp4.json"
    cards.write_card(tmp_path / "a.mp4", card)
    cards.write_card(tmp_path / "a.mp4", card | {"latents": "digest"})
    assert json.loads((tmp_path / "a.mp4.json").read_text())["latents"] == "digest"
    (tmp_path / "a.mp4.json").write_text('{"format": "lvjax-card/0"}')
    cards.write_card(tmp_path / "a.mp4", card)  # an older card is one of ours


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"format": "x"}', '{"format": 1}', "no json"])
def test_another_file_is_not_replaced(tmp_path, card, text):
    path = tmp_path / "a.mp4.json"
    path.write_text(text)
    with pytest.raises(InputError, match="a.mp4.json") as e:
        cards.write_card(tmp_path / "a.mp4", card)
    assert path.read_text() == text and "\n" not in str(e.value)


def test_a_model_is_named_so_that_it_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cards.model_place(None) == cards.model_place("pocket") == "pocket"
    assert cards.model_place("models/a") == str(tmp_path / "models" / "a")


def test_a_link_to_itself_names_no_model_but_is_a_place(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert cards.model_place(str(tmp_path / "loop")) == str(tmp_path / "loop")


NO_NAMES = ("a\0b", "", 5, [], 10**5000, {"a": 1})


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda x: type(x).__name__)
def test_what_is_no_name_of_a_model(name):
    with pytest.raises(CheckpointError, match="give 'pocket' or a folder with --model") as e:
        cards.model_place(name)
    assert "\n" not in str(e.value) and len(str(e.value)) < 200


@pytest.mark.parametrize("part", ["options", "weights", "inputs", "versions", "format"])
def test_every_part_of_a_card_is_needed(card, part):
    assert cards.check_card(card, "a.mp4") == card
    with pytest.raises(CheckpointError, match="a.mp4"):
        cards.check_card({k: v for k, v in card.items() if k != part}, "a.mp4")
    with pytest.raises(CheckpointError, match="a.mp4"):
        cards.check_card(card | {part: None}, "a.mp4")


def test_weights_compare_where_both_cards_have_them(card):
    def other(old, new):
        return cards.other_weights(card | {"weights": old}, card | {"weights": new})

    assert other({"dit": "x"}, {"dit": "x"}) == []
    assert other({"dit": "x", "vae": "y"}, {"dit": "z", "vae": "y"}) == ["dit"]
    for lonely in ("dit_low", "lora 1", "model"):  # another model, or one thing more
        assert other({"dit": "x"}, {"dit": "x", lonely: "y"}) == [lonely]
        assert other({"dit": "x", lonely: "y"}, {"dit": "x"}) == [lonely]
    for encoder in ("text", "image"):  # as published they have no checksums
        assert other({"dit": "x", encoder: "y"}, {"dit": "x"}) == []
        assert other({"dit": "x", encoder: "y"}, {"dit": "x", encoder: "z"}) == [encoder]


def test_prompts_compare_by_their_rows_or_else_by_their_file(card):
    def other(old, new):
        return cards.other_prompts(card | {"inputs": old}, card | {"inputs": new})

    assert not other({}, {"prompts": "a", "embeddings": "b"})
    assert not other({"prompts": "a", "embeddings": "b"}, {"prompts": "a", "embeddings": "c"})
    assert other({"prompts": "a", "embeddings": "b"}, {"prompts": "c", "embeddings": "b"})
    assert other({"embeddings": "b"}, {"prompts": "c", "embeddings": "d"})
    assert not other({"embeddings": "b"}, {"prompts": "c"})
    now = card | {"inputs": {"prompts": "b"}}
    said = cards.differences(card | {"inputs": {"prompts": "a"}}, now)
    assert said == ["the rows of the prompts differ"] and not cards.differences(now, now)
