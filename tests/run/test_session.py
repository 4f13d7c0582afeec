# SPDX-License-Identifier: Apache-2.0
"""Requests are checked, frame counts are exact, batches equal their rows, and the Python face
works.
"""

import math

import jax
import numpy as np
import pytest

import lvjax
from lvjax.core.errors import CheckpointError, InputError, NonFiniteError
from lvjax.run.bundle import load, save
from lvjax.run.session import check_frames, check_timeline, frame_count
from tests.tiny import tiny_bundle

PROMPT = "the camera pans left over a landscape"


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle()


def test_frame_counts():
    assert frame_count(60, 8) == 481 and frame_count(0.2, 8) == 1 and frame_count(1, 8) == 9
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match="seconds"):
            frame_count(bad, 8)
    with pytest.raises(InputError, match="17 and 21"):
        check_frames(20)
    with pytest.raises(InputError, match="nearest are 1 and 5"):
        check_frames(0)


@pytest.mark.parametrize("frames", [1, 5, 17, 21, 29, 33, 53])
def test_exactly_the_frames_asked_for(bundle, frames):
    sizes = [c.frames.shape[1] for c in lvjax.stream(bundle, PROMPT, num_frames=frames)]
    assert sum(sizes) == frames and all(sizes)


def test_image_is_the_first_frame_and_a_video_joins_at_its_last(bundle):
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    assert lvjax.generate(bundle, PROMPT, image=image, num_frames=21).frames.shape == (
        1,
        21,
        16,
        16,
        3,
    )
    video = np.stack([image] * 9)
    assert lvjax.generate(bundle, PROMPT, video=video, num_frames=25).frames.shape == (
        1,
        25,
        16,
        16,
        3,
    )


def test_a_prompt_only_changes_what_comes_after_it(bundle):
    a = lvjax.generate(bundle, [(0, PROMPT), (2.0, "a red circle moves up")], num_frames=41)
    b = lvjax.generate(bundle, [(0, PROMPT), (2.0, "a blue square moves down")], num_frames=41)
    np.testing.assert_array_equal(a.frames[:, :17], b.frames[:, :17])
    assert (a.frames[:, 29:] != b.frames[:, 29:]).any()


def test_batch_rows_equal_single_runs(bundle):
    prompts = [[PROMPT], ["a red circle moves up"], ["the camera zooms in"]]
    keys = {"num_frames": 29}
    whole = lvjax.generate(bundle, prompts, **keys)
    single = lvjax.generate(bundle, prompts[0], **keys)
    np.testing.assert_allclose(whole.latents[:, :1], single.latents, atol=1e-5, rtol=1e-5)


def test_a_batch_is_spread_over_the_devices(bundle):
    prompts = [[PROMPT]] * 7 + [["a red circle moves up"]]
    session = lvjax.prepare(bundle, prompts, num_frames=29)
    assert len(session.state.condition.sharding.device_set) == 8
    latents = np.stack([np.asarray(c.latents) for c in session.run()])
    last = lvjax.generate(bundle, prompts[:1], num_frames=29)
    np.testing.assert_allclose(latents[:, :1], last.latents, atol=1e-5, rtol=1e-5)


def test_key_and_seed_agree_and_callback_is_called(bundle):
    calls = []
    a = lvjax.generate(
        bundle,
        PROMPT,
        num_frames=29,
        key=jax.random.key(5),
        callback=lambda c: calls.append(c.clip),
    )
    b = lvjax.generate(bundle, PROMPT, num_frames=29, seed=5)
    np.testing.assert_array_equal(a.frames, b.frames)
    assert (
        calls == [0, 1] and (lvjax.generate(bundle, PROMPT, num_frames=29).frames != b.frames).any()
    )


def test_unknown_words_are_a_notice(bundle):
    video = lvjax.generate(bundle, "a crimson dragoon", num_frames=5)
    assert "crimson" in video.notices[0] and "nearest" in video.notices[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": [(0, "a"), (0, "b")]}, "increase"),
        ({"prompt": [(1.0, "a"), (2.0, "b")]}, "start at 0"),
        ({"width": 20}, "16 and 24"),
        ({"num_frames": 18}, "17 and 21"),
        ({"num_frames": 17, "seconds": 1.0}, "one of them"),
        ({"guidance_scale": math.nan}, "guidance"),
        ({"num_inference_steps": 0}, "steps"),
        ({"method": "magic"}, "error_free"),
    ],
)
def test_bad_requests_name_the_remedy(bundle, options, message):
    with pytest.raises(InputError, match=message):
        lvjax.generate(bundle, **({"prompt": PROMPT} | options))


def test_non_finite_weights_stop_the_run_at_the_clip(bundle):
    broken = jax.tree.map(lambda a: a, bundle.params)
    broken["dit"]["head"]["linear"]["bias"] = broken["dit"]["head"]["linear"]["bias"] * np.nan
    import dataclasses

    with pytest.raises(NonFiniteError, match="clip 0"):
        lvjax.generate(dataclasses.replace(bundle, params=broken), PROMPT, num_frames=17)


def test_bundle_round_trip_and_damage(bundle, tmp_path):
    save(tmp_path, bundle, dtype="float32")
    again = load(tmp_path)
    assert again.dit == bundle.dit and again.vae == bundle.vae and again.defaults == bundle.defaults
    jax.tree.map(np.testing.assert_array_equal, again.params, bundle.params)
    path = tmp_path / "vae.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="vae.safetensors"):
        load(tmp_path)


def test_timeline_times_must_be_finite():
    with pytest.raises(InputError):
        check_timeline(((0.0, "a"), (math.nan, "b")))
