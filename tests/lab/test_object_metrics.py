# SPDX-License-Identifier: Apache-2.0
"""The object's colour and shape are read right, and drift is found where it is and nowhere else."""

import math
from functools import cache

import numpy as np
import pytest

from lvjax.data.judge import object_masks
from lvjax.data.prompts import COLOURS, SHAPES, Action
from lvjax.data.world import Pose, Video, combinations
from lvjax.lab.object_metrics import (
    GRID,
    absences,
    judged,
    look,
    outline,
    returns,
    shape_of,
    shape_outlines,
    subject_consistency,
)
from tests.lab.corrupted import (
    CORRUPTIONS,
    FIRST,
    blurred,
    clip,
    other_place,
    recoloured,
    reshaped,
)

CLIPS = (2, 5, 6, 12)
LONG = FIRST + 101  # a held-out video, see `world`
FRAMES = 110


@cache
def world() -> tuple[Video, np.ndarray]:
    """A red square moves through a landscape: in sight in 0-14, 27-58 and 71-102."""
    video = Video(LONG, split="held_out")
    return video, video.frames(0, FRAMES)


def test_colour_and_shape_are_read_right_where_training_never_showed_them():
    wrong = 0
    things = combinations(held_out=True)
    for i, (colour, shape, motion) in enumerate(things):
        kind = ("photo", "texture")[i % 2]
        action = Action(("still", "pan left")[i % 2], "", colour, shape, motion)
        video = Video(5000 + i, split="held_out", kind=kind, first=action, enters=motion != "stay")
        wrong += judged(look(video.frames(0, 24))) != (colour, shape)
    assert len(things) >= 15 and wrong == 0  # measured on both kinds: 0 of 32


def test_the_subject_is_consistent_until_it_changes():
    for i in CLIPS:
        clean = subject_consistency(look(clip(i)))
        assert clean.colour > 0.999 and clean.shape > 0.99  # measured: 1.0000
        assert subject_consistency(look(recoloured(clip(i)))).colour < 0.75  # .54 to .70
        assert subject_consistency(look(reshaped(i))).shape < 0.8  # .69 to .73
        assert subject_consistency(look(reshaped(i))).colour > 0.999
        assert subject_consistency(look(recoloured(clip(i)))).shape > 0.99


@pytest.mark.parametrize("name", ["blurred", "noisy", "tinted", "brighter", "frozen", "shuffled"])
def test_the_subject_is_what_it_is_in_another_light(name):
    for i in CLIPS:
        found = subject_consistency(look(CORRUPTIONS[name](clip(i))))
        assert found.colour > 0.999 and found.shape > 0.99, i


def test_the_subject_is_not_the_background():
    for i in CLIPS:
        found = subject_consistency(look(other_place(i)))
        assert found.colour > 0.999 and found.shape > 0.99, i
    nothing = subject_consistency(look(np.full((4, 64, 64, 3), 90, np.uint8)))
    assert nothing == (None, None, 0.0)


def drawn(rows: slice, cols: slice, extra=()):
    """Chroma and mask of a red square on grey."""
    mask = np.zeros((64, 64), bool)
    mask[rows, cols] = True
    for place in extra:
        mask[place] = True
    return np.where(mask[..., None], np.float32([-0.1, 0.3]), np.float32(0)), mask


def test_an_outline_is_centred_and_scaled_and_not_cut():
    plain = outline(*drawn(slice(20, 36), slice(18, 34)))
    inside = slice(GRID // 2 - 4, GRID // 2 + 4)  # the square has 10 of the 24 cells
    assert plain.shape == (GRID, GRID) and plain[inside, inside].min() > 0.999
    assert plain.mean() == pytest.approx((1 / 2.4) ** 2, rel=0.05)
    for moved in (drawn(slice(31, 47), slice(30, 46)), drawn(slice(20, 40), slice(22, 42))):
        assert np.abs(outline(*moved) - plain).mean() < 0.02
    tones, mask = drawn(slice(20, 36), slice(18, 34))
    tones[20:36, 34] = tones[20:36, 33] / 2  # beside the mask, half the object's
    assert np.abs(outline(tones, mask) - plain).sum() > 1  # measured: 1.8
    speck = outline(*drawn(slice(20, 36), slice(18, 34), [(0, 60), (55, 50)]))
    assert np.abs(speck - plain).mean() < 0.02
    apart = drawn(slice(31, 34), slice(2, 8), [(slice(31, 34), slice(56, 62))])
    apart[0][:] = np.where(apart[1][..., None], apart[0], np.float32(0))
    assert outline(*apart) is None  # nothing of it is in the middle
    for cut in ((slice(0, 16), slice(20, 36)), (slice(20, 36), slice(50, 64))):
        assert outline(*drawn(*cut)) is None


def test_shapes_are_told_apart_by_what_a_blur_leaves_of_them():
    """Of a decoder that blurs, the world's own outlines are the wrong ones to compare with."""

    def blur(clips):
        return np.stack([blurred(clip, 2.5) for clip in clips])

    own = shape_outlines(blur)
    right = {"world": 0, "own": 0}
    shapes = [(s, i) for s in SHAPES for i in range(2)]
    for shape, i in shapes:
        action = Action("still", "", ("blue", "red")[i], shape, "right")
        video = Video(FIRST + i, split="held_out", first=action, enters=True)
        looks = look(blur(video.frames(8, 25)[None])[0])
        right["world"] += shape_of(looks) == shape
        right["own"] += shape_of(looks, own) == shape
    assert right["own"] == len(shapes) and right["world"] < len(shapes)


def test_absences_are_those_of_the_world():
    video, frames = world()
    found = absences(video, FRAMES)
    assert [a[:4] for a in found] == [(0, 15, 27, 59), (27, 59, 71, 103)]
    assert {a[4:] for a in found} == {("red", "square")}
    area = object_masks(frames)[..., list(COLOURS).index("red")].sum((1, 2))
    whole = np.median(area[30:56])
    for a in found:
        assert area[a.entered : a.out].min() > 0.4 * whole
        assert area[a.back : a.left].min() > 0.4 * whole
        assert area[a.out : a.back].max() < 0.6 * whole
        assert area[a.out : a.back].min() == 0
    assert absences(video, 30) == [] != absences(video, 31)  # 4 frames of it are an appearance
    assert absences(Video(0, first=Action("still", "")), 12) == []


class Scripted:
    """A world of which object is where in the middle of the picture, or none."""

    def __init__(self, *shown):
        self.shown = [x for part, frames in shown for x in [part] * frames]

    def pose(self, f):
        return Pose(0, 0, 1, *((32, 32) if self.shown[f] else (math.nan, math.nan)))

    def action(self, f):
        return Action("still", "", *(self.shown[f] or (None, None)), "stay")


def test_only_the_same_object_returns_however_long_it_was_away():
    red, blue, circle = ("red", "square"), ("blue", "square"), ("red", "circle")
    assert absences(Scripted((red, 9), (None, 40), (red, 8)), 57) == [(0, 9, 49, 57, *red)]
    for other in (blue, circle):
        assert absences(Scripted((red, 9), (None, 40), (other, 8)), 57) == []
    assert absences(Scripted((red, 9), (None, 40), (red, 3)), 52) == []
    several = Scripted((None, 5), (red, 9), (None, 2), (blue, 9), (None, 2), (blue, 9))
    assert absences(several, 36) == [(16, 25, 27, 36, *blue)]


def test_what_returns_is_what_left_in_the_worlds_own_video():
    video, frames = world()
    found = returns(look(frames), absences(video, FRAMES))
    assert [r.before for r in found] == [r.after for r in found] == [("red", "square")] * 2
    assert all(r.colour_kept and r.shape_kept for r in found)


def test_drift_is_found_at_the_return_where_it_happens():
    video, frames = world()
    gone = absences(video, FRAMES)
    turned = recoloured(frames, gone[0].back)
    first, second = returns(look(turned), gone)
    assert (first.colour_kept, first.shape_kept) == (False, True)
    assert (second.colour_kept, second.shape_kept) == (True, True)
    assert [r.colour_kept for r in returns(look(turned), gone, span=6)] == [False, True]
    # what comes back is a circle, of the same colour
    circle = Action("still", "", "red", "circle", "stay")
    other = frames.copy()
    other[gone[0].back : gone[0].left] = Video(0, first=circle, enters=False).frames(0, 1)
    first, second = returns(look(other), gone)
    assert (first.colour_kept, first.shape_kept) == (True, False)
    assert (second.colour_kept, second.shape_kept) == (True, False)  # it left as a circle


def test_an_object_that_does_not_come_back_is_neither_kept_nor_changed():
    video, frames = world()
    gone = absences(video, FRAMES)
    lost = frames.copy()
    lost[gone[0].out :] = frames[(gone[0].out + gone[0].back) // 2]
    first, second = returns(look(lost), gone)
    assert first.before == ("red", "square") and first.after is None
    assert first.colour_kept is None and first.shape_kept is None
    assert second.before is None and second.colour_kept is None
    assert returns(look(frames[:80]), gone) == returns(look(frames), gone)[:1]  # of what is there
