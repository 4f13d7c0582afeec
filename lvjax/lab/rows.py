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


def measure_row(
    frames: np.ndarray, truth: np.ndarray, gone: tuple[Absence, ...], outlines: Outlines
) -> dict:
    """{"whole": Row, "windows": [Row] * 6} of a video, uint8 [P, H, W, 3], beside the world's.

    What is of the picture alone is measured by sixths; the whole has the mean of them.  None where
    there is nothing to be measured.
    """
    parts = [picture(a, b) for a, b in zip(*map(m.six_windows, (frames, truth)), strict=True)]
    subject = subject_consistency(frames, outlines)
    whole = {name: mean([part[name] for part in parts]) for name in parts[0]}
    whole |= {
        "subject_colour": subject.colour,
        "subject_shape": subject.shape,
        "background_consistency": m.background_consistency(frames),
    }
    return {"whole": whole | reappearance(frames, gone, outlines), "windows": parts}


def picture(frames: np.ndarray, truth: np.ndarray) -> Row:
    """What a part of a video looks like beside the same frames of the world."""
    light = m.exposure(frames, truth)
    ratios = {
        "sharpness": _ratio(m.sharpness(frames), m.sharpness(truth)),
        "frequency": _ratio(m.average_frequency(frames), m.average_frequency(truth)),
        "saturation": _ratio(m.saturation(frames), m.saturation(truth)),
    }
    off = {f"{k}_off": v and abs(float(np.log2(v))) for k, v in ratios.items()}
    return ratios | off | {
        "background_truth": m.background_consistency(frames, truth),
        "motion_smoothness": m.motion_smoothness(frames),
        "dynamic_degree": m.dynamic_degree(frames),
        "colour_cast": m.colour_cast(frames, truth),
        "exposure_off": abs(light.shift),
        "clipped": light.clipped,
    }  # fmt: skip


def reappearance(frames: np.ndarray, gone: tuple[Absence, ...], outlines: Outlines) -> Row:
    """What becomes of an object that leaves and comes back; all None where it never does."""
    looks = look(frames)
    found = returns(frames, list(gone), SPAN, outlines)
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
