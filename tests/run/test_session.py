# SPDX-License-Identifier: Apache-2.0
"""Requests are checked, frame counts are exact, batches equal their rows, and the Python face
works.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lvjax
from lvjax.core.errors import CheckpointError, InputError, NonFiniteError
from lvjax.data.captions import check_timeline
from lvjax.data.prompts import encode
from lvjax.models.pocket_text import encode_text
from lvjax.models.vae import encode as encode_video
from lvjax.run.encoders import _pooled
from lvjax.run.request import check_frames, frame_count
from lvjax.run.session import _check_finite
from lvjax.run.weights import load, save
from tests.lora_files import lora_arrays, write_lora
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
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (9, 16, 16, 3), np.uint8)
    without = lvjax.generate(bundle, PROMPT, num_frames=25)
    pixels = jnp.asarray(video[None].astype(np.float32) / 127.5 - 1)
    for given, frames, made in (
        (1, pixels[:, -1:], lvjax.generate(bundle, PROMPT, image=video[-1], num_frames=25)),
        (2, pixels[:, -5:], lvjax.generate(bundle, PROMPT, video=video, num_frames=25)),
    ):
        assert made.frames.shape == (1, 25, 16, 16, 3)
        seen = encode_video(bundle.params["vae"], frames, bundle.vae)
        np.testing.assert_allclose(made.latents[0][:, :given], seen, atol=1e-5)
        assert np.abs(without.latents[0][:, :given] - seen).max() > 0.01


def test_a_prompt_only_changes_what_comes_after_it(bundle):
    a = lvjax.generate(bundle, [(0, PROMPT), (2.0, "a red circle moves up")], num_frames=41)
    b = lvjax.generate(bundle, [(0, PROMPT), (2.0, "a blue square moves down")], num_frames=41)
    np.testing.assert_array_equal(a.frames[:, :17], b.frames[:, :17])
    assert (a.frames[:, 29:] != b.frames[:, 29:]).any()


def test_batch_rows_equal_single_runs(bundle):
    prompts = [[PROMPT], ["a red circle moves up"], ["the camera zooms in"]]
    keys = {"num_frames": 29}
    whole = lvjax.generate(bundle, prompts, **keys)
    session = lvjax.prepare(bundle, prompts, **keys)
    for row, prompt in enumerate(prompts):
        alone = dataclasses.replace(
            lvjax.prepare(bundle, prompt, **keys), keys=session.keys[row : row + 1]
        )
        single = np.stack([np.asarray(c.latents) for c in alone.run()])
        np.testing.assert_allclose(whole.latents[:, row : row + 1], single, atol=1e-5, rtol=1e-5)


def test_a_batch_is_spread_over_the_devices(bundle):
    prompts = [[PROMPT]] * 7 + [["a red circle moves up"]]
    session = lvjax.prepare(bundle, prompts, num_frames=29)
    assert len(session.state().condition.sharding.device_set) == 8
    latents = np.stack([np.asarray(c.latents) for c in session.run()])
    last = lvjax.generate(bundle, prompts[:1], num_frames=29)
    np.testing.assert_allclose(latents[:, :1], last.latents, atol=1e-5, rtol=1e-5)


STORY = np.random.default_rng(3).integers(0, 6, 24)
PROMPTS = [f"a {colour} circle moves up" for colour in ("red", "green", "blue", "cyan")] + [
    "the camera pans left over a landscape",
    "the camera zooms in",
]


def places(bundle, *stories, start=0):
    """Slots [K, B] and visible [K, B, capacity] of a session whose clip i follows prompt story[i]
    in each row; nothing is sampled.
    """
    begins = [0.0] + [(17 + 12 * i) / 8 for i in range(len(stories[0]) - 1)]
    rows = [[(t, PROMPTS[p]) for t, p in zip(begins, story, strict=True)] for story in stories]
    session = lvjax.prepare(bundle, rows, num_frames=17 + 12 * (len(begins) - 1))
    clips = list(session.clips(start))
    assert len(clips) == len(begins) - start and session.notices == ()
    return np.stack([c.slot for c in clips]), np.stack([c.visible for c in clips])


def remembering(bundle, **defaults):
    return dataclasses.replace(bundle, defaults=dataclasses.replace(bundle.defaults, **defaults))


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_later_prompt_does_not_change_what_earlier_clips_remember(bundle, lookahead):
    """With lookahead it does, once clips have to go."""
    few = remembering(bundle, capacity=3, lookahead=lookahead)
    before, changed = places(few, STORY), False
    for clip in (8, 15, 23):
        other = STORY.copy()
        other[clip:] = (other[clip:] + 1) % 6
        after = places(few, other)
        changed |= any((a[:clip] != b[:clip]).any() for a, b in zip(before, after, strict=True))
    assert changed == lookahead


def test_a_row_remembers_what_it_remembers_alone(bundle):
    few, other = remembering(bundle, capacity=3), STORY[::-1]
    whole, alone = places(few, STORY, other), places(few, other)
    np.testing.assert_array_equal(whole[0][:, 1], alone[0][:, 0])
    np.testing.assert_array_equal(whole[1][:, 1], alone[1][:, 0])
    assert (whole[0][:, 0] != whole[0][:, 1]).any()


def test_a_resumed_session_places_its_clips_as_the_first_did(bundle):
    few = remembering(bundle, capacity=3)
    for whole, rest in zip(places(few, STORY), places(few, STORY, start=17), strict=True):
        np.testing.assert_array_equal(whole[17:], rest)


def test_a_session_runs_twice_and_from_the_middle(bundle):
    session = lvjax.prepare(bundle, PROMPT, num_frames=41)
    first = next(runs := session.run())
    state = jax.tree.map(np.asarray, first.state)  # before it is donated
    rest = [c.frames for c in runs]
    again = [c.frames for c in session.run()]
    resumed = [c.frames for c in session.run(session.place(state), 1)]
    np.testing.assert_array_equal(
        np.concatenate(again, 1), np.concatenate([first.frames, *rest], 1)
    )
    np.testing.assert_array_equal(np.concatenate(resumed, 1), np.concatenate(rest, 1))
    like = session.abstract_state()
    assert jax.tree.structure(like) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_padding_does_not_take_part_in_the_choice_of_clips(bundle):
    pooled = partial(_pooled, bundle.params["text"], cfg=bundle.text)
    ids = np.stack([encode(PROMPT).ids, np.zeros(16, np.int32)])
    text = encode_text(bundle.params["text"], ids, bundle.text)
    words = int((ids[0] > 0).sum())
    expected = np.stack([text[0, :words].sum(0), text[1].sum(0)])
    np.testing.assert_allclose(pooled(ids), expected, rtol=1e-4, atol=1e-5)


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
    with pytest.raises(NonFiniteError, match="latents of clip 0 .* after sampling"):
        lvjax.generate(dataclasses.replace(bundle, params=broken), PROMPT, num_frames=17)


def test_non_finite_frames_are_told_from_non_finite_latents():
    good, bad = np.zeros((2, 1, 4)), np.array([[[0.0] * 4], [[0.0, np.inf, 0.0, 0.0]]])
    _check_finite(good, good, 7)
    with pytest.raises(NonFiniteError, match=r"frames of clip 7 .* after decoding \(row 1\)"):
        _check_finite(good, bad, 7)


def test_loras_are_among_the_remedies_where_there_are_any(bundle, tmp_path):
    path = write_lora(tmp_path / "a.safetensors", lora_arrays(bundle.dit))
    with pytest.raises(NonFiniteError, match="try LoRAs of less strength, another seed"):
        lvjax.generate(lvjax.with_lora(bundle, (path, 1e38)), PROMPT, num_frames=5)
    with pytest.raises(NonFiniteError, match="try another seed"):
        _check_finite(*np.full((2, 1, 4), np.nan), 0)


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
    with pytest.raises(CheckpointError, match="no file of the part 'vae'"):
        load(tmp_path)


def test_timeline_times_must_be_finite():
    with pytest.raises(InputError):
        check_timeline(((0.0, "a"), (math.nan, "b")))
