# SPDX-License-Identifier: Apache-2.0
"""The reports of the lab that are kept are of the packaged model, and follow from their figures."""

import json
from pathlib import Path

import pytest

from lvjax.lab.claims import judged_claims
from lvjax.lab.error_free import CELLS, check, settings_of
from lvjax.lab.rows import METRICS
from lvjax.lab.timelines import draw_timelines
from lvjax.run.weights import load

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "error_free"
REPORTS = sorted(FOLDER.glob("*/report.json"))


@pytest.mark.parametrize("path", REPORTS, ids=lambda p: p.parent.name)
def test_the_report_is_of_this_model_and_these_timelines(path):
    figures, pocket = json.loads(path.read_text()), load("pocket")
    about, settings = figures["about"], settings_of(figures["about"])
    check(pocket, settings)
    assert about["weights"] == pocket.hashes and about["model"] == "pocket"
    assert set(figures["rows"]) == set(settings.cells) <= set(CELLS)
    drawn = draw_timelines(settings.timelines, settings.frames)
    moments = [[list(moment) for moment in t.moments] for t in drawn]
    assert [t["moments"] for t in figures["timelines"]] == moments
    for rows in figures["rows"].values():
        assert len(rows) == settings.seeds * settings.timelines
        assert all(set(row["whole"]) == set(METRICS) for row in rows)
    text = (path.parent / "report.md").read_text()
    assert ("quick version" in text) == settings.quick
    for picture in path.parent.glob("*.jpg"):
        assert picture.name in text and picture.stat().st_size < 400_000


@pytest.mark.parametrize("path", REPORTS, ids=lambda p: p.parent.name)
def test_the_verdicts_follow_from_the_figures(path):
    figures = json.loads(path.read_text())
    text = (path.parent / "report.md").read_text()
    found = [c._asdict() | v._asdict() for c, v in judged_claims(figures["rows"])]
    assert found == figures["claims"] and found
    for claim in found:
        if claim["std"] is not None:
            shown = f"{claim['difference']:+.4f} ± {claim['std']:.4f}, {claim['pairs']}"
            assert f"{claim['verdict']} ({shown})" in text


def test_there_is_a_report():
    assert REPORTS
