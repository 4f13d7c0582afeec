# SPDX-License-Identifier: Apache-2.0
"""What the lab measures of one video: a row of figures for the whole, and one per sixth of it.

Every figure compares with the same frames of the world's own video, rendered and passed through the
model's autoencoder, or says itself with what.
"""

from typing import NamedTuple

import numpy as np

from lvjax.lab import metrics as m
from lvjax.lab.object_metrics import (
    Absence,
    Look,
    Outlines,
    look,
    returns,
    subject_consistency,
)

WINDOWS = 6
SPAN = 24  # frames of an object that are looked at before it leaves and after it comes back
SLACK = 12  # frames by which a video may lag behind its prompts

Row = dict[str, float | None]


class Metric(NamedTuple):
    """better: "high", "low", or "" where neither end is.  words: what it is, for the report."""

    better: str
    words: str


METRICS = {
    "subject_colour": Metric("high", "cosine of the object's mean chroma to its first and its "
        "previous appearance, half and half, over the frames that show an object"),
    "subject_shape": Metric("high", "the same of its outline's likeness to each shape of the world "
        "through the autoencoder"),
    "returned": Metric("high", "share of the times that an object left and should be back at which "
        "one is seen"),
    "colour_kept": Metric("high", "share of the returns in the colour that left"),
    "shape_kept": Metric("high", "share of the returns in the shape that left"),
    "tone_drift": Metric("low", "distance of the object's mean chroma before it leaves and after "
        "it returns"),
    "ghosts": Metric("low", "share of the frames in which the object is away, a clip at either end "
        "left out, that show one"),
    "background_consistency": Metric("high", "cosine of histograms of the background (luminance, "
        "chroma, slope) to the first and the previous frame, half and half"),
    "background_truth": Metric("high", "the same to the mean of the world's own frames and the "
        "previous frame"),
    "motion_smoothness": Metric("high", "1 less the error of a frame between its neighbours, which "
        "are moved towards each other block by block"),
    "dynamic_degree": Metric("high", "mean motion of the blocks of the picture, pixels per frame"),
    "sharpness": Metric("", "mean absolute Laplacian over that of the world: below 1 blurred, "
        "above 1 over-sharp"),
    "sharpness_off": Metric("low", "|log2| of it"),
    "frequency": Metric("", "AF, the average frequency weighted by magnitude, over that of the "
        "world"),
    "frequency_off": Metric("low", "|log2| of it"),
    "saturation": Metric("", "mean chroma of the background over that of the world"),
    "saturation_off": Metric("low", "|log2| of it"),
    "colour_cast": Metric("low", "distance of the background's mean chroma from that of the world"),
    "exposure_off": Metric("low", "absolute difference of mean luminance from that of the world"),
    "clipped": Metric("low", "share of pixels with a channel at 0 or 255"),
}  # fmt: skip
"""Every figure of a row; none needs a network."""


class Part(NamedTuple):
    """A sixth of a video, or all of it, measured alone: what is compared with the world's.

    looks: `look` at every frame.  places: `describe_background`.  tone: of the background.
    """

    looks: list[Look | None]
    places: np.ndarray
    tone: np.ndarray
    light: m.Exposure
    saturation: float
    sharpness: float
    frequency: float
    motion_smoothness: float
    dynamic_degree: float


def six_parts(frames: np.ndarray) -> list[Part]:
    """Everything about a video that follows from its frames, uint8 [P, H, W, 3], alone."""
    return [_part(x) for x in m.six_windows(frames)]


def _part(frames: np.ndarray) -> Part:
    found = m.masks(frames)
    mask = m.background(found)
    return Part(
        look(frames, found),
        m.describe_background(frames, mask),
        m.tone(frames, mask),
        m.exposure(frames, frames),
        m.saturation(frames, mask),
        m.sharpness(frames),
        m.average_frequency(frames),
        m.motion_smoothness(frames),
        m.dynamic_degree(frames),
    )


def measure_row(
    parts: list[Part], truth: list[Part], gone: tuple[Absence, ...], outlines: Outlines
) -> dict:
    """{"whole": Row, "windows": [Row] * 6} of a video beside the world's, both by `six_parts`.

    What is of the picture alone is measured by sixths; the whole has the mean of them.  None where
    there is nothing to be measured.
    """
    rows = [picture(*both) for both in zip(parts, truth, strict=True)]
    looks = [x for part in parts for x in part.looks]
    subject = subject_consistency(looks, outlines)
    whole = {name: mean([row[name] for row in rows]) for name in rows[0]}
    whole |= {
        "subject_colour": subject.colour,
        "subject_shape": subject.shape,
        "background_consistency": m.consistency(np.concatenate([part.places for part in parts])),
    }
    return {"whole": whole | reappearance(looks, gone, outlines), "windows": rows}


def picture(part: Part, truth: Part) -> Row:
    """What a part of a video looks like beside the same frames of the world."""
    compared = ("sharpness", "frequency", "saturation")
    ratios = {name: _ratio(getattr(part, name), getattr(truth, name)) for name in compared}
    off = {f"{k}_off": v and abs(float(np.log2(v))) for k, v in ratios.items()}
    return ratios | off | {
        "background_truth": m.consistency(part.places, truth.places),
        "motion_smoothness": part.motion_smoothness,
        "dynamic_degree": part.dynamic_degree,
        "colour_cast": float(np.linalg.norm(part.tone - truth.tone)),
        "exposure_off": abs(part.light.luminance - truth.light.luminance),
        "clipped": part.light.clipped,
    }  # fmt: skip


def reappearance(looks: list[Look | None], gone: tuple[Absence, ...], outlines: Outlines) -> Row:
    """What becomes of an object that leaves and comes back; all None where it never does."""
    found = returns(looks, gone, SPAN, outlines)
    left = [r for r in found if r.before is not None]
    tones = [_tone_drift(looks, r.absence) for r in found]
    away = [looks[r.absence.out + SLACK : r.absence.back - SLACK] for r in found]
    return {
        "returned": mean([float(r.after is not None) for r in left]),
        "colour_kept": mean([_number(r.colour_kept) for r in found]),
        "shape_kept": mean([_number(r.shape_kept) for r in found]),
        "tone_drift": mean(tones),
        "ghosts": mean([float(x is not None) for part in away for x in part]),
    }


def _tone_drift(looks: list[Look | None], absence: Absence) -> float | None:
    before = looks[max(absence.entered, absence.out - SPAN) : absence.out]
    after = looks[absence.back : min(absence.left, absence.back + SPAN)]
    tones = [[x.tone for x in part if x is not None] for part in (before, after)]
    if not all(tones):
        return None
    return float(np.linalg.norm(np.mean(tones[0], axis=0) - np.mean(tones[1], axis=0)))


def mean(values: list[float | None]) -> float | None:
    """The mean of those that there are; None without any."""
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if there else None


def _number(kept: bool | None) -> float | None:
    return None if kept is None else float(kept)


def _ratio(a: float, b: float) -> float | None:
    """a / b; None where either has nothing to compare."""
    return a / b if min(a, b) > 0 else None
