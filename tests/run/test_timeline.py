# SPDX-License-Identifier: Apache-2.0
"""Prompts over time: which clip follows which prompt, and what is said of the others."""

import dataclasses

import numpy as np

from lvjax.run.open_error_free import cuts
from lvjax.run.request import Request
from lvjax.run.timeline import Cuts, missed_notices, word_notices
from tests.tiny import DEFAULTS

PARTS = Cuts(frames=41, first=17, new=12, fps=8)  # clips begin at 0, 2.125 and 3.625 s


def test_clips_and_their_first_frames():
    assert PARTS.clips == 3 and [PARTS.begin(i) for i in range(4)] == [0, 17, 29, 41]
    for frames, clips in ((1, 1), (17, 1), (21, 2), (29, 2), (33, 3)):
        assert Cuts(frames, 17, 12, 8).clips == clips
    wanted = Request((((0.0, "the camera pans left"),),), 41)
    assert cuts(DEFAULTS, wanted) == PARTS
    start = np.zeros((7, 64, 64, 3), np.float32)
    assert cuts(DEFAULTS, dataclasses.replace(wanted, start=start)) == Cuts(41, 13, 12, 8)


def test_a_clip_follows_the_prompt_at_its_first_own_frame():
    timeline = ((0.0, "a"), (2.125, "b"), (3.65, "c"))  # 3.65 s is nearest to the frame at 3.625
    assert [PARTS.prompt(timeline, i) for i in range(3)] == ["a", "b", "c"]
    later = ((0.0, "a"), (2.2, "b"))
    assert [PARTS.prompt(later, i) for i in range(3)] == ["a", "a", "b"]


def test_prompts_that_no_clip_follows():
    assert PARTS.missed(((0.0, "a"), (2.125, "b"), (3.65, "c"))) == []
    close = ((0.0, "a"), (1.0, "b"), (2.0, "c"), (3.7, "d"), (60.0, "e"))
    assert PARTS.missed(close) == [(1.0, "b"), (3.7, "d"), (60.0, "e")]
    every = [(i / 8, str(i)) for i in range(60)]
    missed = set(PARTS.missed(every))
    followed = {PARTS.prompt(every, i) for i in range(PARTS.clips)}
    assert followed == {p for t, p in every if (t, p) not in missed} == {"0", "17", "29"}


def test_a_prompt_that_is_never_shown_is_a_notice():
    said = missed_notices([((0.0, "left"), (1.0, "up"), (1.5, "right"), (99.0, "down"))] * 2, PARTS)
    assert len(said) == 1
    for part in ("'up' at 1 s (and 1 more)", "0, 2.125, 3.625 s in 5.125 s", "longer"):
        assert part in said[0]
    assert missed_notices([((0.0, "left"), (2.125, "up"))], PARTS) == []


def test_words_beyond_the_model_are_a_notice():
    long = "the camera pans left over a landscape " * 4
    said = word_notices([long, "left"])
    assert len(said) == 1 and "16 words" in said[0] and "'landscape'" in said[0]
    negative = word_notices(["left", "crimson " + "up " * 17])
    assert len(negative) == 2 and "'crimson'" in negative[0] and "('up')" in negative[1]
