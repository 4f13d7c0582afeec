# SPDX-License-Identifier: Apache-2.0
"""All metrics that need no ground truth, of a video and its reference, by name."""

import numpy as np

from lvjax.lab import metrics as m
from lvjax.lab.object_metrics import Outlines, look, subject_consistency


def measure(
    frames: np.ndarray, reference: np.ndarray, outlines: Outlines | None = None
) -> dict[str, float | None]:
    """The row of a table: frames, uint8 [P, H, W, 3], beside a reference of the same world, for
    instance the video's own first clip.  outlines: `shape_outlines` through the autoencoder of the
    model that made them, by default the world's.

    saturation, sharpness and average_frequency are ratios to the reference's, and
    background_reference is the background's consistency with it; the others are of the frames
    alone, or say themselves how they compare.  None where there is no object to look at.
    """
    subject, light = subject_consistency(look(frames), outlines), m.exposure(frames, reference)
    of_both = (m.saturation, m.sharpness, m.average_frequency)
    ratios = {f.__name__: _ratio(f(frames), f(reference)) for f in of_both}
    return {
        "subject_colour": subject.colour,
        "subject_shape": subject.shape,
        "subject_seen": subject.seen,
        "background_consistency": m.background_consistency(frames),
        "background_reference": m.background_consistency(frames, reference),
        "motion_smoothness": m.motion_smoothness(frames),
        "dynamic_degree": m.dynamic_degree(frames),
        "colour_cast": m.colour_cast(frames, reference),
        "clipped": light.clipped,
        "luminance_shift": light.shift,
    } | ratios


def _ratio(a: float, b: float) -> float | None:
    """a / b; None where the reference has nothing to compare with."""
    return a / b if b > 0 else None
