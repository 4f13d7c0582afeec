# SPDX-License-Identifier: Apache-2.0
"""What the paper's tables claim, and whether figures of the lab bear it out.

A claim says that one cell is better than another in one figure.  It is judged over pairs: the same
timeline with the same noise in both cells.  Does not own: how figures are measured (rows.py) or
shown (report.py).
Source: arXiv:2606.22370, Tables 2 to 4.
"""

from typing import NamedTuple

import numpy as np

from lvjax.lab.rows import METRICS, WINDOWS

Values = dict[str, list[dict]]
"""By cell the rows of `measure_row`, in the same order of seeds and timelines in every cell."""

REPRODUCED, REFUTED, WITHIN = "reproduced", "not reproduced", "within one standard deviation"
UNJUDGED, UNMEASURED = "one pair, not judged", "not measured"
VERDICTS = (REPRODUCED, REFUTED, WITHIN, UNJUDGED, UNMEASURED)
LOSS = "loss"


class Claim(NamedTuple):
    """metric: of `METRICS`.  better, worse: cells.  where: "whole", a window from 0, or "loss" for
    the last window less the first.  paper: the figures behind it.  high: whether more is better.
    """

    table: int
    metric: str
    better: str
    worse: str
    paper: str
    where: str | int = "whole"
    high: bool = True


class Verdict(NamedTuple):
    """difference: mean over the pairs, positive where the claim holds; std: of the differences
    between the pairs (of a sample), None for a single one.  pairs: how many have both figures.
    """

    verdict: str
    difference: float | None
    std: float | None
    pairs: int


def _claims(table: int, metrics, better: str, worse: str, paper: str, where="whole") -> list[Claim]:
    return [
        Claim(table, m, better, worse, paper, where, METRICS[m].better == "high") for m in metrics
    ]


PICTURE = ("sharpness_off", "frequency_off", "saturation_off", "colour_cast", "exposure_off")
"""What stands here for the paper's "image quality", which is a network's opinion."""
OBJECT = ("colour_kept", "shape_kept", "tone_drift", "returned")
"""What stands for the identity of a subject that comes back; the paper has no figure for it."""
TABLE2 = {
    ("subject_colour", "subject_shape"): (".9457 > .7811", ".7811 > .7046"),
    OBJECT: ("memory keeps identity (text)", "no figure"),
    ("background_consistency", "background_truth"): (".9691 > .8743", ".8743 > .8348"),
    ("motion_smoothness",): (".9853 > .9850", ".9850 > .9640"),
    ("dynamic_degree",): (".7569 > .7014", ".7014 > .6949"),
    PICTURE: (".6620 > .6198", ".6198 > .5871"),
}
"""By figures the paper's: all of the method > no memory, no memory > neither."""
TABLE3 = (
    ("full", "low_window", ".6198 > .6018"),
    ("low_window", "no_trflow", ".6018 > .5871"),
)
TABLE4 = PICTURE + ("background_truth",)
PAPER4 = {
    0: ".6674 > .6091",
    WINDOWS - 1: ".6140 > .3075",
    LOSS: "-.0534 > -.3016",
}


def paper_claims() -> list[Claim]:
    """All of them, in the order of the tables."""
    out = []
    for metrics, (memory, window) in TABLE2.items():
        out += _claims(2, metrics, "full", "no_memory", memory)
        out += _claims(2, metrics, "no_memory", "baseline", window)
    for better, worse, paper in TABLE3:
        out += _claims(3, PICTURE, better, worse, paper)
    # the mechanism, in the paper's words: low windows blur, and dropping early steps sharpens
    out.append(Claim(3, "sharpness", "full", "low_window", "[0, .7] is blurred"))
    out.append(Claim(3, "sharpness", "no_trflow", "low_window", "[0, .7] is blurred"))
    for where in (*range(WINDOWS), LOSS):
        out += _claims(4, TABLE4, "full", "baseline", PAPER4.get(where, "higher"), where)
    return out


def value(row: dict, metric: str, where: str | int = "whole") -> float | None:
    """A figure of a row."""
    if where == "whole":
        return row["whole"].get(metric)
    if where == LOSS:
        first, last = (value(row, metric, i) for i in (0, WINDOWS - 1))
        return None if first is None or last is None else last - first
    return row["windows"][where].get(metric)


def judge(claim: Claim, values: Values) -> Verdict:
    """Whether the claim holds by more than one standard deviation of the differences.

    Raises: ValueError for cells with different numbers of rows.
    """
    both = zip(values[claim.better], values[claim.worse], strict=True)
    pairs = [tuple(value(r, claim.metric, claim.where) for r in rows) for rows in both]
    there = np.array([p for p in pairs if None not in p], np.float64).reshape(-1, 2)
    if not len(there):
        return Verdict(UNMEASURED, None, None, 0)
    differences = (there[:, 0] - there[:, 1]) * (1 if claim.high else -1)
    mean = float(differences.mean())
    if len(there) == 1:
        return Verdict(UNJUDGED, mean, None, 1)
    std = float(differences.std(ddof=1))
    verdict = WITHIN if abs(mean) <= std else REPRODUCED if mean > 0 else REFUTED
    return Verdict(verdict, mean, std, len(there))


def judged_claims(values: Values) -> list[tuple[Claim, Verdict]]:
    """Every claim whose cells are there, with its verdict."""
    there = [c for c in paper_claims() if c.better in values and c.worse in values]
    return [(c, judge(c, values)) for c in there]


def spread(rows: list[dict], metric: str, where: str | int = "whole") -> tuple[float, float] | None:
    """Mean and standard deviation (0 for one) over the rows that have the figure, or None."""
    found = [v for v in (value(r, metric, where) for r in rows) if v is not None]
    if not found:
        return None
    return float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
