# SPDX-License-Identifier: Apache-2.0
"""What becomes of the object of a pocket-world video: does it keep its colour and its shape?

The object is found by its saturated colour (`data.judge`), its shape by comparing its outline with
those that the world draws; no judge sees the prompt.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import numpy as np

from lvjax.data.prompts import COLOURS, DIRECTIONS, SHAPES, Action
from lvjax.data.world import RADIUS, SIZE, Video
from lvjax.lab.metrics import check_frames, chroma, masks

LEAST = 30  # pixels of an object that is there; a whole one has 130 to 330
GRID = 24  # cells per side of an outline
REACH = 1.2  # an outline covers this many square roots of its area on each side of the centre
WHOLE = RADIUS + 3  # an object whose centre is so far off the border is whole
EXTENT = RADIUS + 6  # no part of an object is farther from its centre, blur included
EXAMPLES = 12  # videos per shape that its outline is the mean of
FAINT = 0.15  # a pixel that is less of the object than this is none of it
DOUBT = 0.1  # of the distance between shapes: how much an outline may be off, see `likeness`

Outlines = dict[str, np.ndarray]
"""For each of SHAPES the mean outline, float64 [GRID, GRID]."""


class Look(NamedTuple):
    """The object in one frame.

    colour: name of the nearest palette colour.  tone: its mean chroma, float32 [2].  outline: how
    much of each cell is object, float64 [GRID, GRID] in [0, 1], centred and scaled to its area;
    None near the border of the picture, which may cut it, and of pieces far apart.
    """

    colour: str
    tone: np.ndarray
    outline: np.ndarray | None


class SubjectConsistency(NamedTuple):
    """colour: cosine of the object's mean chroma.  shape: cosine of how much its outline is like
    each shape of the world.  Both to the first and to the previous appearance, half and half; None
    where it does not appear (whole, for its shape) twice.  seen: share of frames that show it.
    """

    colour: float | None
    shape: float | None
    seen: float


class Absence(NamedTuple):
    """Frames out..back-1, in which less than half of the world's object, or none, is in sight.

    Before and after it is the same object: in sight in entered..out-1 and in back..left-1.  The
    world's objects come back at once, on the other side: all of one is out of sight for 2 frames,
    more than half for 12.  For longer ones make the timeline, and this, by hand.
    """

    entered: int
    out: int
    back: int
    left: int
    colour: str
    shape: str


class Return(NamedTuple):
    """An object before it leaves and after it returns.

    before, after: (colour, shape) as judged, None where it is not seen.  shape None where its
    outline is never whole.
    """

    absence: Absence
    before: tuple[str, str | None] | None
    after: tuple[str, str | None] | None

    @property
    def colour_kept(self) -> bool | None:
        """Whether it came back in its colour; None when it was not there before or after."""
        return self._same(0)

    @property
    def shape_kept(self) -> bool | None:
        """Whether it came back in its shape; None when that cannot be seen."""
        return self._same(1)

    def _same(self, which: int) -> bool | None:
        values = [look and look[which] for look in (self.before, self.after)]
        return None if None in values else values[0] == values[1]


def look(frames: np.ndarray, found: np.ndarray | None = None) -> list[Look | None]:
    """The object of each frame: that of the palette colour with the largest area, None below
    `LEAST` pixels.  found: `metrics.masks` of the frames, where they are known.
    """
    found = masks(check_frames(frames)) if found is None else found
    tones = chroma(frames)
    area = found.sum((1, 2))
    out: list[Look | None] = []
    for f, c in enumerate(area.argmax(-1)):
        mask = found[f, ..., c]
        if area[f, c] < LEAST:
            out.append(None)
            continue
        tone = tones[f][mask].mean(0)
        out.append(Look(list(COLOURS)[c], tone, outline(tones[f], mask)))
    return out


def outline(tones: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """The outline of `Look`, from a frame's chroma [H, W, 2] and the object's mask bool [H, W].

    Each pixel counts by how far its chroma lies between the surroundings' and the object's, so that
    a blurred edge, where the mask is of no use, keeps its form.
    """
    h, w = mask.shape
    rows, cols = np.mgrid[:h, :w]
    y, x = rows[mask].mean(), cols[mask].mean()
    if min(y, x, h - 1 - y, w - 1 - x) < WHOLE:
        return None
    away = np.hypot(rows - y, cols - x)
    around = np.median(tones[np.abs(away - EXTENT) < 2], axis=0)
    axis = tones[mask].mean(0) - around
    share = np.clip((tones - around) @ axis / max(float(axis @ axis), 1e-12), 0, 1)
    share = np.where((away < EXTENT) & (share > FAINT), share, 0)
    area = share.sum()
    if not area:  # a mask in several pieces, with nothing of it in the middle
        return None
    y, x = (share * rows).sum() / area, (share * cols).sum() / area
    steps = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * REACH * np.sqrt(area)
    return _at(share, y + steps, x + steps)


def _at(picture: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """picture [H, W] between its pixels, bilinear: [len(rows), len(cols)]; 0 outside."""
    wide = np.pad(picture, 1)
    y, x = (np.clip(v + 1, 0, n - 1.001) for v, n in ((rows, len(wide)), (cols, wide.shape[1])))
    r, c = y.astype(int), x.astype(int)
    fr, fc = (y - r)[:, None], (x - c)[None]
    top = wide[np.ix_(r, c)] * (1 - fc) + wide[np.ix_(r, c + 1)] * fc
    below = wide[np.ix_(r + 1, c)] * (1 - fc) + wide[np.ix_(r + 1, c + 1)] * fc
    return top * (1 - fr) + below * fr


def shape_outlines(through: Callable[[np.ndarray], np.ndarray] | None = None) -> Outlines:
    """The mean outline of each shape, over training videos of the world with every colour.

    through: what the frames [n, P, H, W, 3] pass first, for instance `obedience.round_trip` of a
      model, whose autoencoder blurs corners: what it draws is to be compared with its own shapes.
      Of 32 held-out clips through the pocket autoencoder 26 are read right so, 8 by the world's
      outlines; of the clips themselves all 32 by either.
    """
    means = {}
    for shape in SHAPES:
        clips = np.stack([_example(shape, i) for i in range(EXAMPLES)])
        clips = clips if through is None else through(clips)
        seen = [x.outline for clip in clips for x in look(clip) if x and x.outline is not None]
        means[shape] = np.mean(seen, axis=0)
    return means


def _example(shape: str, i: int) -> np.ndarray:
    """17 frames of the training split with an object that has come into sight."""
    colour, motion = list(COLOURS)[i % len(COLOURS)], list(DIRECTIONS)[i % len(DIRECTIONS)]
    action = Action(("still", "pan left")[i % 2], "", colour, shape, motion)
    kind = ("photo", "texture")[i // 2 % 2]
    return Video(i, kind=kind, first=action, enters=True).frames(8, 25)


@cache
def world_outlines() -> Outlines:
    """`shape_outlines` of the world itself."""
    return shape_outlines()


def distances(outline: np.ndarray, outlines: Outlines | None = None) -> np.ndarray:
    """How far an outline, or a mean of some, is from each of SHAPES: squared difference as a share
    of the shape's own square, float64 [4].
    """
    known = world_outlines() if outlines is None else outlines
    return np.array([((known[s] - outline) ** 2).sum() / (known[s] ** 2).sum() for s in SHAPES])


def likeness(outline: np.ndarray, outlines: Outlines | None = None) -> np.ndarray:
    """How much an outline is like each of SHAPES, float64 [4] of norm 1."""
    known = world_outlines() if outlines is None else outlines
    apart = np.mean([distances(known[s], known) for s in SHAPES])
    off = distances(outline, known)
    shares = np.exp(-(off - off.min()) / (DOUBT * apart))
    return shares / np.linalg.norm(shares)


def shape_of(looks: list[Look | None], outlines: Outlines | None = None) -> str | None:
    """The shape that the mean of the outlines is nearest to; None where none is whole."""
    seen = [x.outline for x in looks if x is not None and x.outline is not None]
    return SHAPES[int(distances(np.mean(seen, axis=0), outlines).argmin())] if seen else None


def judged(
    looks: list[Look | None], outlines: Outlines | None = None
) -> tuple[str, str | None] | None:
    """(colour, shape) of an object over some frames, the colour by majority; None when none shows
    it.
    """
    colours = [x.colour for x in looks if x is not None]
    if not colours:
        return None
    return max(COLOURS, key=colours.count), shape_of(looks, outlines)


def subject_consistency(
    looks: list[Look | None], outlines: Outlines | None = None
) -> SubjectConsistency:
    """Whether the object stays itself, from `look` at every frame; see `SubjectConsistency`.

    Where it is, how large a part of it shows, and the background have no part in it.
    VBench's "subject consistency" has the same form, to the first and the previous frame, with DINO
    features of whole frames; ours looks at the object alone, and skips frames without it.
    """
    seen = [x for x in looks if x is not None]
    tones = [x.tone / max(np.linalg.norm(x.tone), 1e-6) for x in seen]
    shapes = [likeness(x.outline, outlines) for x in seen if x.outline is not None]
    return SubjectConsistency(_consistency(tones), _consistency(shapes), len(seen) / len(looks))


def _consistency(values: list[np.ndarray]) -> float | None:
    """Mean cosine of unit vectors with the first and with the one before."""
    if len(values) < 2:
        return None
    x = np.array(values, np.float64)
    return float((x[1:] @ x[0] + (x[1:] * x[:-1]).sum(-1)).mean() / 2)


def absences(video: Video, frames: int) -> list[Absence]:
    """The times within a world video's first `frames` at which its object leaves, and the same one
    returns; in sight, at least half of it, for 4 frames or more before and after.
    """
    things = [video.action(f) for f in range(frames)]
    inside = [_in_sight(video.pose(f)) for f in range(frames)]
    spans, start = [], None
    for f in range(frames + 1):
        now = f < frames and inside[f]
        if now and start is None:
            start = f
        if not now and start is not None:
            spans.append((start, f))
            start = None
    out = []
    for (a, b), (c, d) in zip(spans, spans[1:], strict=False):
        thing = things[a].colour, things[a].shape
        if (things[c].colour, things[c].shape) == thing and min(b - a, d - c) >= 4:
            out.append(Absence(a, b, c, d, *thing))
    return out


def _in_sight(pose) -> bool:
    """Whether at least half of the object is in the picture."""
    return all(0 <= v < SIZE for v in (pose.object_x, pose.object_y))  # false for NaN


def returns(
    looks: list[Look | None],
    gone: Iterable[Absence],
    span: int = 24,
    outlines: Outlines | None = None,
) -> list[Return]:
    """For each absence that a video is to follow: what is seen before it, and after it.

    looks: `look` at every frame of a video made from the prompts of the world's (`absences`).  At
    most `span` frames before and after are judged.  In the world's own video everything is kept.
    VBench has no such axis; it is nearest to "subject consistency" between two appearances.
    """
    return [
        Return(
            a,
            judged(looks[max(a.entered, a.out - span) : a.out], outlines),
            judged(looks[a.back : min(a.left, a.back + span)], outlines),
        )
        for a in gone
        if a.left <= len(looks)
    ]
