# SPDX-License-Identifier: Apache-2.0
"""The pocket model's figures are those of the packaged weights, and its card shows them."""

import json
import re
from pathlib import Path

from lvjax.core.params import count
from lvjax.run.bundle import specs
from lvjax.run.weights import load

ROOT = Path(__file__).resolve().parents[2]
FIGURES = json.loads((ROOT / "benchmarks" / "pocket_obedience.json").read_text())
CARD = (ROOT / "lvjax" / "assets" / "pocket" / "README.md").read_text()


def test_the_figures_are_of_these_weights_and_this_sampler():
    pocket = load("pocket")
    assert FIGURES["weights"] == pocket.hashes
    used = {"steps", "shift", "solver", "guidance", "positions", "fill", "capacity"}
    assert {k: FIGURES["sampler"][k] for k in used} == {
        k: getattr(pocket.defaults, k) for k in used
    }
    assert FIGURES["cases"] == 200 and pocket.defaults.steps >= 16 and pocket.defaults.guidance > 1


def test_the_card_shows_the_figures():
    for name, row in (
        ("this model", "model"),
        ("this model, prompts shuffled", "prompt_shuffled"),
        ("untrained", "untrained"),
        ("ground truth", "ground_truth"),
    ):
        shown = re.search(rf"^\| {name} \|(.*)\|$", CARD, re.M)[1]
        shares = [int(x) for x in re.findall(r"(\d+) %", shown)]
        kinds = ("direction", "camera", "object", "colour")
        assert shares == [int(f"{100 * FIGURES[row][k]:.0f}") for k in kinds]
    assert f"gain {FIGURES['continuation']['gain_db']:.1f} dB" in CARD
    assert f"{FIGURES['autoencoder_psnr_db']:.1f} dB mean PSNR" in CARD


def test_the_card_counts_the_parameters():
    pocket = load("pocket")
    for part, spec in specs(pocket).items():
        row = {"dit": "transformer", "vae": "autoencoder", "text": "text encoder"}[part]
        shown = float(re.search(rf"^\| {row} \|.*\| ([\d.]+) M \|$", CARD, re.M)[1])
        assert abs(shown - count(spec) / 1e6) < 0.06, (part, count(spec))
