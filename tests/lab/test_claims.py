# SPDX-License-Identifier: Apache-2.0
"""Verdicts follow from figures: what holds, what is the other way round, and what is too close."""

import numpy as np
import pytest

from lvjax.lab.claims import (
    LOSS,
    REFUTED,
    REPRODUCED,
    TABLE4,
    UNJUDGED,
    UNMEASURED,
    WITHIN,
    Claim,
    judge,
    judged_claims,
    paper_claims,
    spread,
    value,
)
from lvjax.lab.error_free import CELLS
from lvjax.lab.rows import METRICS, WINDOWS


def rows(quality: float, n: int = 6, noise: float = 0.0, fall: float = 0.0, seed: int = 0):
    """Rows whose figures are better for a higher quality, which falls by `fall` per window.  What
    is common to a pair of rows, far more than `noise`, has no part in their difference.
    """
    common = np.random.default_rng(9).normal(size=n)
    own = np.random.default_rng(seed).normal(size=n) * noise
    sign = {"high": 1, "low": -1, "": 1}

    def figures(q):
        return {name: sign[m.better] * q for name, m in METRICS.items()}

    return [
        {
            "whole": figures(quality + c + o),
            "windows": [figures(quality + c + o - fall * w) for w in range(WINDOWS)],
        }
        for c, o in zip(common, own, strict=True)
    ]


def in_order():
    """As the paper has it."""
    return {
        "full": rows(3.0, noise=0.1, fall=0.1, seed=1),
        "no_memory": rows(2.0, noise=0.1, seed=2),
        "no_trflow": rows(1.5, noise=0.1, seed=3),
        "low_window": rows(2.5, noise=0.1, seed=4),
        "baseline": rows(1.0, noise=0.1, fall=0.4, seed=5),
    }


BLUR = ("no_trflow", "low_window")  # of these the paper's worse one is the sharper


def test_the_papers_order_is_reproduced_and_exchanged_cells_are_noticed():
    found = [(c, v) for c, v in judged_claims(in_order()) if (c.better, c.worse) != BLUR]
    assert {c.table for c, _ in found} == {2, 3, 4} and len(found) > 60
    assert {v.verdict for _, v in found} == {REPRODUCED}
    assert all(v.pairs == 6 and v.difference > v.std for _, v in found)
    for a, b in (("full", "no_memory"), ("no_memory", "baseline"), ("full", "baseline")):
        exchanged = in_order()
        exchanged[a], exchanged[b] = exchanged[b], exchanged[a]
        own = [v for c, v in judged_claims(exchanged) if (c.better, c.worse) == (a, b)]
        assert {v.verdict for v in own} == {REFUTED} and len(own) >= 10


def test_a_difference_counts_from_one_standard_deviation_of_the_pairs_on():
    claim = Claim(2, "subject_colour", "a", "b", "")

    def of(*differences):
        both = {"a": rows(0, len(differences)), "b": rows(0, len(differences))}
        for row, d in zip(both["a"], differences, strict=True):
            row["whole"]["subject_colour"] += d
        return judge(claim, both)

    assert of(1, 3) == (REPRODUCED, pytest.approx(2), pytest.approx(2**0.5), 2)
    assert of(-1, -3).verdict == REFUTED
    assert of(0, 2).verdict == WITHIN and of(0, -2).verdict == WITHIN
    assert of(0, 0).verdict == WITHIN  # the same in all pairs is no difference
    assert of(2) == (UNJUDGED, pytest.approx(2), None, 1)


def test_lower_is_better_where_it_is():
    low = next(c for c in paper_claims() if c.metric == "colour_cast")
    values = {low.better: rows(0, 3), low.worse: rows(0, 3)}
    for row in values[low.worse]:
        row["whole"]["colour_cast"] += 1
    assert judge(low, values).difference == pytest.approx(1)


def test_pairs_without_a_figure_are_left_out_and_counted():
    values = in_order()
    claim = next(c for c in paper_claims() if c.metric == "tone_drift")
    values[claim.better][0]["whole"]["tone_drift"] = None
    values[claim.worse][1]["whole"]["tone_drift"] = None
    assert judge(claim, values).pairs == 4
    for row in values[claim.worse]:
        row["whole"]["tone_drift"] = None
    assert judge(claim, values) == (UNMEASURED, None, None, 0)
    assert spread(values[claim.worse], "tone_drift") is None
    with pytest.raises(ValueError):
        judge(claim, {claim.better: rows(0, 2), claim.worse: rows(0, 3)})


def test_the_loss_is_the_last_window_less_the_first():
    row = rows(1.0, 1, fall=0.25)[0]
    assert value(row, "colour_cast", LOSS) == pytest.approx(0.25 * (WINDOWS - 1))
    assert value(row, "background_truth", LOSS) == pytest.approx(-0.25 * (WINDOWS - 1))


def test_claims_name_cells_and_figures_that_there_are_once():
    every = paper_claims()
    assert len({c[:4] + c[5:6] for c in every}) == len(every)
    for c in every:
        assert c.metric in METRICS and {c.better, c.worse} <= set(CELLS)
        better = METRICS[c.metric].better
        assert better == "" or c.high == (better == "high")
    assert {c.where for c in every if c.table == 4} == {*range(WINDOWS), LOSS}
    assert sum(c.table == 4 for c in every) == len(TABLE4) * (WINDOWS + 1)
    assert judged_claims({"full": rows(0)}) == []
