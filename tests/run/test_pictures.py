# SPDX-License-Identifier: Apache-2.0
"""Start frames in a card: few are held, many are named, and either brings the same frames back."""

import json

import numpy as np
import pytest

from lvjax.core import checkpoint
from lvjax.core.errors import CheckpointError, StorageError
from lvjax.run import pictures
from lvjax.run.state import load_start, load_state, save_state

BITS = np.random.default_rng(0).integers(0, 256, (2, 20, 8, 6, 3), np.uint8)
FRAMES = pictures.as_frames(BITS)


@pytest.mark.parametrize("frames", [FRAMES[0, 0], FRAMES[0, :16], FRAMES[:, :8]])
def test_a_few_frames_are_held(frames):
    value = json.loads(json.dumps(pictures.to_card(frames, "video.mp4")))
    back = pictures.from_card(value)
    assert isinstance(value, list) and back.dtype == np.float32
    np.testing.assert_array_equal(back, frames if frames.ndim > 3 else frames[None])


def test_a_long_video_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = json.loads(json.dumps(pictures.to_card(FRAMES[0], "video.mp4")))
    assert value["video"] == str(tmp_path / "video.mp4") and len(str(value)) < 500
    assert pictures.from_card(value).shape == FRAMES[0].shape
    pictures.check(BITS[0], value, "video.mp4")
    changed = BITS[0].copy()
    changed[3, 2, 1, 0] ^= 1
    for other in (changed, BITS[0, :19], BITS[0].reshape(40, 4, 6, 3)):
        with pytest.raises(CheckpointError, match="video.mp4 has changed"):
            pictures.check(other, value, "video.mp4")


def test_large_pictures_of_a_video_are_named_and_those_without_a_file_are_held(monkeypatch):
    monkeypatch.setattr(pictures, "BYTES_MAX", 1000)
    assert isinstance(pictures.to_card(FRAMES[0, :2], "video.mp4"), list)
    assert isinstance(pictures.to_card(FRAMES[0, :16], "video.mp4"), dict)
    assert isinstance(pictures.to_card(FRAMES[0]), list)


def test_what_is_held_and_what_is_named_compare():
    held, named = pictures.to_card(FRAMES[0]), pictures.to_card(FRAMES[0], "video.mp4")
    other = pictures.to_card(-FRAMES[0], "video.mp4")
    assert pictures.identity(held) == pictures.identity(named) != pictures.identity(other)
    assert pictures.identity(None) is None


@pytest.mark.parametrize(
    "change",
    [{"shape": [20, 8, 6]}, {"shape": [20, 8, 6, 4]}, {"shape": [-20, 8, 6, 3]}, {"sha256": 3},
     {"video": None}, {"shape": "many"}, {"shape": [20.0, 8, 6, 3]}],
)  # fmt: skip
def test_a_damaged_description_is_refused(change):
    with pytest.raises((KeyError, TypeError, ValueError)):
        pictures.from_card(pictures.to_card(FRAMES[0], "video.mp4") | change)


def test_a_state_holds_the_frames_beside_its_own_arrays(tmp_path):
    path, own = tmp_path / "a.state", {"x": np.arange(3, dtype=np.float32)}
    save_state(path, own, {}, BITS[0])
    np.testing.assert_array_equal(load_start(path), BITS[0])
    np.testing.assert_array_equal(load_state(path, own)[0]["x"], own["x"])
    save_state(path, own, {})
    with pytest.raises(CheckpointError, match="a.state"):
        load_start(path)


def test_a_header_that_cannot_be_read_back_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "HEADER_MAX", 1000)
    checkpoint.save_arrays(tmp_path / "a", {}, {"text": "x" * 500})
    assert checkpoint.load_meta(tmp_path / "a") == {"text": "x" * 500}
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(StorageError, match="allowed are 1000") as e:
        checkpoint.save_arrays(tmp_path / "a", {}, {"text": "x" * 1000})
    assert "\n" not in str(e.value) and (tmp_path / "a").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
