# SPDX-License-Identifier: Apache-2.0
"""Clip selection on the command line: asked for, in the card, replayed, resumed, refused."""

import json

import pytest

from lvjax.cli.main import main
from lvjax.io.video import read_card
from lvjax.run.card import card_path
from tests.cli.commands import PROMPTS, generate, interrupted

ARGS = (*PROMPTS, "--frames", "41", "--seed", "3", "--quiet")
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
