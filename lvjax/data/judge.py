# SPDX-License-Identifier: Apache-2.0
"""Classical judges of pocket-world videos: what the camera did, which colour the object has, where
it went.

No network is involved and no judge sees the prompt.  They are validated on ground-truth clips
before any figure of a model is believed (`lvjax.lab.obedience`).
"""

import numpy as np

from lvjax.data.prompts import COLOURS, DIRECTIONS

GAP = 4  # frames between the compared pictures: one latent frame
SPEEDS = (1.0, 1.5, 2.0, 2.5)  # pixels per frame
ZOOMS = (1.02, 1.03, 1.04)  # scale per frame
BORDER = 12  # pixels left out on every side, so that all hypotheses see the same interior


def _palette() -> np.ndarray:
    return np.array(list(COLOURS.values()), np.float32) / 255


def object_masks(frames: np.ndarray) -> np.ndarray:
    """Pixels near the ray of each palette colour: bool [P, H, W, colours] from uint8 frames [P, H,
    W, 3].

    A pixel belongs to the nearest ray c if its projection on it is .55–1.2 of |c| and its distance
    below .18 of |c|.
    """
    x = frames.astype(np.float32) / 255
    palette = _palette()
    norm = (palette**2).sum(-1)
    t = x @ palette.T / norm
    off = np.maximum((x**2).sum(-1, keepdims=True) - t**2 * norm, 0)  # Pythagoras: squared distance
    distance = np.where((t > 0.55) & (t < 1.2), np.sqrt(off / norm), np.inf)
    nearest = distance.argmin(-1)
    return (np.arange(len(palette)) == nearest[..., None]) & (distance.min(-1) < 0.18)[..., None]


def colour_of(frames: np.ndarray, least: float = 20.0) -> str | None:
    """The palette colour with the largest area over the clip; None below `least` pixels a frame."""
    area = object_masks(frames).sum((0, 1, 2)) / len(frames)
    return list(COLOURS)[int(area.argmax())] if area.max() >= least else None


def object_direction(frames: np.ndarray, least_speed: float = 0.4) -> str | None:
    """ "left", "right", "up", "down" or "stay" from a line through the object's centroids; None
    without an object.
    """
    colour = colour_of(frames)
    if colour is None:
        return None
    mask = object_masks(frames)[..., list(COLOURS).index(colour)]
    area = mask.sum((1, 2))
    seen = np.flatnonzero(area >= 20)
    if len(seen) < 3:
        return None
    rows, cols = np.mgrid[: mask.shape[1], : mask.shape[2]]
    centre = (
        np.array([[(cols * mask[f]).sum(), (rows * mask[f]).sum()] for f in seen])
        / area[seen, None]
    )
    steps = np.diff(centre, axis=0) / np.diff(seen)[:, None]
    steps = steps[
        np.abs(steps).max(-1) < 12
    ]  # leaving on one side and entering on the other is no step
    if not len(steps):
        return None
    velocity = np.median(steps, axis=0)
    if np.abs(velocity).max() < least_speed:
        return "stay"
    axis = int(np.abs(velocity).argmax())
    return next(d for d, v in DIRECTIONS.items() if v[axis] == np.sign(velocity[axis]))


def _warp(image: np.ndarray, dx: float, dy: float, zoom: float) -> np.ndarray:
    """Bilinear view of float `image` [H, W, C] shifted by (dx, dy) and scaled about its centre,
    clamped at the border.
    """
    h, w = image.shape[:2]
    cols = (np.arange(w) + 0.5 - w / 2) / zoom + w / 2 - 0.5 + dx
    rows = (np.arange(h) + 0.5 - h / 2) / zoom + h / 2 - 0.5 + dy
    cols, rows = np.clip(cols, 0, w - 1.001), np.clip(rows, 0, h - 1.001)
    c0, r0 = cols.astype(int), rows.astype(int)
    fc, fr = (cols - c0)[None, :, None], (rows - r0)[:, None, None]
    top = image[r0][:, c0] * (1 - fc) + image[r0][:, c0 + 1] * fc
    bottom = image[r0 + 1][:, c0] * (1 - fc) + image[r0 + 1][:, c0 + 1] * fc
    return (top * (1 - fr) + bottom * fr).astype(np.float32)


def camera_hypotheses(gap: int = GAP) -> list[tuple[str, float, float, float]]:
    """(label, dx, dy, zoom) over `gap` frames; a pan left shows at (x, y) what was at (x - shift,
    y).
    """
    out = [("still", 0.0, 0.0, 1.0)]
    out += [
        (f"pan {d}", gap * s * v[0], gap * s * v[1], 1.0)
        for d, v in DIRECTIONS.items()
        for s in SPEEDS
    ]
    out += [("zoom in", 0.0, 0.0, z**gap) for z in ZOOMS] + [
        ("zoom out", 0.0, 0.0, z**-gap) for z in ZOOMS
    ]
    return out


def camera_of(frames: np.ndarray, gap: int = GAP) -> str:
    """The camera motion whose warp explains the clip best: mean of min(|residual|, .25) over the
    common interior, objects left out.
    """
    x = frames.astype(np.float32) / 255
    busy = object_masks(frames).any(-1)
    inside = np.zeros(x.shape[1:3], bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    costs = {}
    for label, dx, dy, zoom in camera_hypotheses(gap):
        total, weight = 0.0, 0
        for a in range(0, len(x) - gap, 2):
            moved = _warp(x[a], dx, dy, zoom)
            valid = (
                inside
                & ~busy[a + gap]
                & (_warp(busy[a][..., None].astype(np.float32), dx, dy, zoom)[..., 0] < 0.5)
            )
            residual = np.minimum(np.abs(moved - x[a + gap]).mean(-1), 0.25)
            total, weight = total + residual[valid].sum(), weight + valid.sum()
        costs[label] = min(costs.get(label, np.inf), total / max(weight, 1))
    return min(costs, key=costs.get)
