# SPDX-License-Identifier: Apache-2.0
"""The pocket world is deterministic, unambiguous to the judges, and keeps its splits apart."""

import numpy as np
import pytest

from lvjax.core.errors import CheckpointError, InputError
from lvjax.data.clips import CLIP_FRAMES, ClipStore, render
from lvjax.data.judge import camera_of, colour_of, object_direction
from lvjax.data.prompts import (
    CAMERAS,
    COLOURS,
    DIRECTIONS,
    MAX_WORDS,
    SHAPES,
    VOCABULARY,
    Action,
    encode,
)
from lvjax.data.scenes import HELD_OUT_PHOTOS, PHOTOS
from lvjax.data.world import CLIP_STRIDE, GIVEN, MOTIONS, Video, combinations, is_held_out


def test_a_video_is_a_function_of_split_seed_and_index():
    a, b = Video(3).frames(40, 60), Video(3).frames(40, 60)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(Video(3).frames(0, 60)[40:], a)
    assert (Video(3, seed=1).frames(0, 4) != Video(3).frames(0, 4)).any()
    assert (Video(3, split="held_out").frames(0, 4) != Video(3).frames(0, 4)).any()


def test_any_length_and_prompts_change_where_clips_begin():
    video = Video(7)
    assert video.frames(20_000, 20_002).shape == (2, 64, 64, 3)
    starts = [s.start for s in video.segments]
    assert all((s - GIVEN) % CLIP_STRIDE == 0 for s in starts[1:])
    assert all(2 <= (s.stop - s.start) / 8 <= 5 for s in video.segments)


def test_training_shows_every_camera_move():
    """A range of scales too small for a zoom once kept all zooms out of the training videos."""
    moves = [Video(i).segment(f).action.camera for i in range(60) for f in range(0, 77, 12)]
    shares = {move: moves.count(move) / len(moves) for move in CAMERAS}
    assert min(shares.values()) > 0.02 and max(shares.values()) < 0.5


def test_objects_leave_and_come_back():
    video = Video(0, first=Action("still", "", "red", "circle", "right"), enters=True)
    seen = [colour_of(video.frames(f, f + 1)) == "red" for f in range(0, video.segments[0].stop)]
    assert not seen[0] and any(seen)
    torus = [video.pose(f).object_x for f in range(video.segments[0].stop)]
    assert max(torus) > 20


def test_splits_share_no_photograph_and_no_combination():
    assert not set(PHOTOS) & set(HELD_OUT_PHOTOS)
    train, held = set(combinations(False)), set(combinations(True))
    assert not train & held and len(train | held) == len(COLOURS) * len(SHAPES) * len(MOTIONS)
    assert {m for *_, m in held} == set(MOTIONS) and {c for c, *_ in held} == set(COLOURS)
    for index in range(12):
        for split in ("train", "held_out"):
            video = Video(index, split=split)
            video.frames(0, 200)
            for s in video.segments:
                if s.action.colour and s.action.motion != "stay":
                    assert is_held_out(s.action.colour, s.action.shape, s.action.motion) == (
                        split == "held_out"
                    )


@pytest.mark.parametrize("camera", CAMERAS)
def test_judges_see_what_the_world_shows(camera):
    things = [c for c in combinations(True) if c[2] in DIRECTIONS]
    for i in range(2):
        thing = things[(5 * i + CAMERAS.index(camera)) % len(things)]
        video = Video(500 + i, split="held_out", first=Action(camera, "", *thing), enters=True)
        frames = video.frames(0, CLIP_FRAMES)
        assert camera_of(frames) == camera
        assert colour_of(frames) == thing[0] and object_direction(frames) == thing[2]


def test_a_frozen_or_shuffled_clip_fools_no_judge():
    """The judges can say no: frozen frames are still, reversed frames pan the other way."""
    frames = Video(501, split="held_out", first=Action("pan left", "")).frames(0, CLIP_FRAMES)
    assert camera_of(np.repeat(frames[:1], CLIP_FRAMES, 0)) == "still"
    assert camera_of(frames[::-1]) == "pan right"
    assert colour_of(np.full((17, 64, 64, 3), 90, np.uint8)) is None


def test_prompts_become_ids_and_unknown_words_are_named():
    ids, unknown, cut = encode("The camera pans left over a landscape, a red circle moves up")
    assert ids.shape == (MAX_WORDS,) and not unknown and not cut
    assert ids[0] == VOCABULARY["camera"] and ids[8] == VOCABULARY["up"]
    ids, unknown, _ = encode("a crimson dragoon ÄÖ 猫")
    assert ids.sum() == 0 and {w for w, _ in unknown} == {"crimson", "dragoon", "äö", "猫"}
    assert all(near for _, near in unknown)
    long = encode("left " * 15 + "the camera pans up")  # as many words as fit, and two more
    assert long.ids.all() and long.cut == ["pans", "up"]


def test_every_prompt_of_the_world_is_inside_the_vocabulary():
    for index in range(20):
        for s in range(0, 200, 40):
            assert not encode(Video(index).action(s).prompt())[1]


def test_clips_overlap_by_the_given_frames_and_the_store_resumes(tmp_path):
    frames, ids, _ = render(2, 3)
    assert frames.shape == (3, CLIP_FRAMES, 64, 64, 3) and ids.shape == (3, MAX_WORDS)
    np.testing.assert_array_equal(frames[1, :GIVEN], frames[0, -GIVEN:])
    store = ClipStore(tmp_path, 3, clips=2)
    left = iter((1.0, 0.0))
    assert not store.fill(lambda: next(left)) and store.ready == 1
    again = ClipStore(tmp_path, 3, clips=2)
    assert again.ready == 1
    assert again.fill()
    np.testing.assert_array_equal(again.frames[2], render(2, 2)[0])
    with pytest.raises(InputError, match="another folder"):
        ClipStore(tmp_path, 4, clips=2)


@pytest.mark.parametrize("name", ["frames.npy", "ids.npy", "objects.npy"])
def test_clips_that_are_damaged_are_not_filled_up(tmp_path, name):
    ClipStore(tmp_path, 2, clips=2).fill()
    data = (tmp_path / name).read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"junk" * 99):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged or cut short; remove"):
            ClipStore(tmp_path, 2, clips=2)
        assert (tmp_path / name).read_bytes() == damaged


@pytest.mark.parametrize("text", ["", "x", "-5", "99"])
def test_a_mark_that_cannot_be(tmp_path, text):
    store = ClipStore(tmp_path, 2, clips=2)
    (tmp_path / "ready").write_text(text)
    with pytest.raises(CheckpointError, match="ready is damaged"):
        store.fill()


def test_unknown_split():
    with pytest.raises(InputError, match="allowed"):
        Video(0, split="test")
