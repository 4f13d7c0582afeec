# SPDX-License-Identifier: Apache-2.0
"""The lab's timelines show what their prompts say, and an object that is away long enough."""

import numpy as np
import pytest

from lvjax.data.judge import camera_of, object_direction
from lvjax.data.world import CLIP_STRIDE, FPS, GIVEN, SIZE, is_held_out
from lvjax.lab.object_metrics import judged, look
from lvjax.lab.timelines import draw_timelines
from lvjax.run.timeline import Cuts

FRAMES = 289


@pytest.fixture(scope="module")
def drawn():
    return draw_timelines(4, FRAMES)


def test_the_object_is_away_for_two_clips_and_more_and_no_prompt_names_it_then(drawn):
    for t in drawn:
        assert len(t.gone) == 2
        for a in t.gone:
            assert a.back - a.out >= 4 * CLIP_STRIDE
            away = [t.video.action(f) for f in range(a.out + CLIP_STRIDE, a.back - CLIP_STRIDE)]
            assert len(away) >= 2 * CLIP_STRIDE and {x.colour for x in away} == {None}
            assert t.video.action(a.entered) == t.video.action(a.back)
            first = t.video.action(a.entered)
            assert is_held_out(first.colour, first.shape, first.motion)


def test_the_world_shows_what_the_prompts_say(drawn):
    for t in drawn[:2]:
        for s in t.video.segments[:4]:
            part = t.video.frames(s.start, s.stop)
            if s.action.colour is None:
                assert camera_of(part) == s.action.camera
                assert judged(look(part)) is None
            else:
                assert object_direction(part) == s.action.motion
        assert judged(look(t.start[None])) is None


def test_the_camera_comes_back_to_where_it_was(drawn):
    for t in drawn:
        second, third = (t.video.segments[i].pose for i in (4, 8))
        assert (second.x, second.y) == (third.x, third.y)


def test_prompts_change_where_clips_begin(drawn):
    cuts = Cuts(FRAMES, CLIP_STRIDE + GIVEN, CLIP_STRIDE, FPS)
    for t in drawn:
        assert cuts.missed(t.moments) == []
        for clip in range(cuts.clips):
            shown = range(cuts.begin(clip), min(FRAMES, cuts.begin(clip + 1)))
            assert {t.video.action(f).prompt() for f in shown} == {cuts.prompt(t.moments, clip)}


def test_timelines_are_fixed_and_a_longer_one_begins_as_a_shorter_one(drawn):
    again, longer = draw_timelines(2, 29), draw_timelines(1, 2 * FRAMES)
    assert len({t.video.scene for t in drawn}) > 2
    for t, other in zip(drawn, again, strict=False):
        assert np.array_equal(t.start, other.start) and other.moments == t.moments[:1]
        assert t.start.shape == (SIZE, SIZE, 3)
    assert longer[0].moments[: len(drawn[0].moments)] == drawn[0].moments
    assert longer[0].gone[:2] == drawn[0].gone
