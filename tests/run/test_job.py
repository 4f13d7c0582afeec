# SPDX-License-Identifier: Apache-2.0
"""A run with files: what its card holds, what may be resumed with it, and what is made once."""

import copy
import json

import numpy as np
import pytest

from lvjax.core.checkpoint import load_meta
from lvjax.core.errors import CheckpointError, InputError
from lvjax.io.video import read_video
from lvjax.run import card as cards
from lvjax.run import job, pictures
from lvjax.run.request import Request
from lvjax.run.state import state_path
from tests.tiny import tiny_bundle

ROWS = (((0.0, "the camera pans left"), (2.5, "a red circle moves up")),)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3)).astype(np.float32) / 127.5 - 1


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle()


def card_of(bundle, request):
    return cards.make_card(job.options_of(request, bundle, "tiny"), weights={}, inputs={})


def saved(card):
    """The card as it comes back from a file."""
    return json.loads(json.dumps(card))


@pytest.mark.parametrize("start", [PIXELS[0, 0], PIXELS[0], PIXELS], ids=["image", "video", "rows"])
def test_a_card_brings_the_request_back(bundle, start):
    request = Request(ROWS * 2, 41, "zooms", start, (16, 16), 4, 2.0, 7)
    again = job.request_of(saved(job.options_of(request, bundle, "tiny")))
    assert again.timelines == request.timelines and (again.seed, again.steps) == (7, 4)
    np.testing.assert_array_equal(again.start, start if start.ndim > 3 else start[None])


def test_the_settings_of_a_resumed_run(bundle):
    old = saved(card_of(bundle, Request(ROWS, 41, seed=2)))
    job.check_same(old, card_of(bundle, Request(ROWS, 41, seed=2)))
    d = bundle.defaults  # naming what is the default is no difference
    job.check_same(
        old, card_of(bundle, Request(ROWS, 41, "", None, d.size, d.steps, d.guidance, 2))
    )
    older = copy.deepcopy(old)
    del older["options"]["defaults"]["lookahead"]  # saved before there was such a setting
    job.check_same(older, card_of(bundle, Request(ROWS, 41, seed=2)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"timelines": ((*ROWS[0][:1], (2.5, "a blue square moves up")),)}, "prompts was "),
        ({"seed": 3}, "seed was 2, is 3"),
        ({"frames": 53}, "frames was 41, is 53"),
        ({"steps": 5}, "steps was 4, is 5"),
        ({"guidance": 1.0}, "guidance was 2.0, is 1.0"),
        ({"negative": "left"}, "negative was '', is 'left'"),
        ({"size": (16, 24)}, "size was (16, 16), is (16, 24)"),
        ({"start": PIXELS[0]}, "start frames differ"),
        ({"method": "other"}, "method was 'error_free', is 'other'"),
        ({"seed": 3, "frames": 53}, "frames was 41, is 53; seed was 2, is 3"),
    ],
)
def test_other_settings_do_not_resume_a_run(bundle, change, said):
    old, new = ({"timelines": ROWS, "frames": 41, "seed": 2} | c for c in ({}, change))
    with pytest.raises(InputError) as e:
        job.check_same(*(saved(card_of(bundle, Request(**r))) for r in (old, new)))
    assert said in str(e.value) and "--overwrite" in str(e.value) and "\n" not in str(e.value)


def test_other_defaults_do_not_resume_a_run(bundle):
    now = card_of(bundle, Request(ROWS, 41))
    old = copy.deepcopy(now)
    old["options"]["defaults"] |= {"shift": 5.0, "window": [0.2, 0.7]}
    with pytest.raises(InputError, match=r"defaults.shift was 5.0, is 3.0; defaults.window was"):
        job.check_same(old, now)


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"format": cards.FORMAT},
        {"format": cards.FORMAT, "options": {}},
        {"format": cards.FORMAT, "options": {"defaults": 3, "timelines": 3}},
        {"format": cards.FORMAT, "options": {"defaults": {"steps": "many"}}},
    ],
)
def test_a_card_that_lacks_something_is_named(bundle, broken):
    good = card_of(bundle, Request(ROWS, 41))
    with pytest.raises(CheckpointError):
        job.with_defaults(bundle, broken)
    for pair in ((good, broken), (broken, good)):
        with pytest.raises(CheckpointError):
            job.check_same(*pair)
    with pytest.raises(CheckpointError):
        job.request_of(broken.get("options", {}))


@pytest.mark.parametrize("key", ["timelines", "start", "size", "frames", "seed", "method"])
def test_options_that_lack_something_are_of_another_version(bundle, key):
    options = saved(job.options_of(Request(ROWS, 41), bundle, "tiny"))
    job.request_of(options)
    without = {k: v for k, v in options.items() if k != key}
    for wrong in (without, options | {key: {"no": "such"}}):
        with pytest.raises(CheckpointError, match="another version") as e:
            job.request_of(wrong)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("key", job.LATER)
def test_older_options_are_read_and_damaged_ones_are_not(bundle, key):
    now = saved(card_of(bundle, Request(ROWS, 41)))
    assert not job.is_older(now["options"])
    older = copy.deepcopy(now)
    del older["options"][key]
    assert job.is_older(older["options"]) and job.request_of(older["options"]) == Request(
        ROWS, 41, size=(16, 16)
    )
    job.check_same(older, now)
    with pytest.raises(CheckpointError, match="another version"):
        job.request_of(now["options"] | {key: {"no": "such"}})


def test_a_long_video_is_named_held_and_compared(bundle, monkeypatch):
    monkeypatch.setattr(pictures, "MOST", 4)
    request = Request(ROWS, 41, start=PIXELS[0], size=(16, 16))
    options = saved(job.options_of(request, bundle, "tiny", "a.mp4", "p.safetensors"))
    assert job.named_video(options).endswith("/a.mp4")
    assert job.embeddings_of(options).endswith("/p.safetensors")
    again = job.request_of(options)
    assert again.start.shape == PIXELS[0].shape and not again.start.any()
    bits = pictures.as_bits(PIXELS[0])
    again = job.with_start(again, options, bits, "a.mp4")
    np.testing.assert_array_equal(again.start, PIXELS[0])
    with pytest.raises(CheckpointError, match="has changed"):
        job.with_start(again, options, 255 - bits, "a.mp4")
    held = card_of(bundle, request)
    job.check_same(held, held | {"options": options})
    other = job.options_of(Request(ROWS, 41, start=-PIXELS[0]), bundle, "tiny", "a.mp4")
    with pytest.raises(InputError, match="start frames differ"):
        job.check_same(held, held | {"options": other})
    with pytest.raises(CheckpointError, match="another version"):
        job.embeddings_of(options | {"embeddings": 3})


def test_activations_have_the_type_of_the_card(bundle):
    card = card_of(bundle, Request(ROWS, 41))
    assert job.with_defaults(bundle, card).dit.dtype == bundle.dit.dtype
    card["options"]["defaults"]["dtype"] = "bfloat16"
    assert job.with_defaults(bundle, card).dit.dtype == "bfloat16"
    with pytest.raises(InputError, match="defaults.dtype was 'bfloat16', is None"):
        job.check_same(card, card_of(bundle, Request(ROWS, 41)))


def test_a_run_opens_one_session_and_saves_no_empty_memory(bundle, tmp_path, monkeypatch):
    opened, original = [], job.open_session

    def counted(*args):
        opened.append(original(*args))
        return opened[-1]

    monkeypatch.setattr(job, "open_session", counted)
    output, request = tmp_path / "a.mp4", Request(ROWS, 29)
    said = job.start(bundle, request, output, card_of(bundle, request))
    assert len(said) == 1 and "will not be shown" in said[0] and not opened
    assert load_meta(state_path(output))["clip"] == 0 == job.position(output)[1]
    assert state_path(output).stat().st_size < 10_000
    steps = [p.frame for p in job.proceed(bundle, output, stop=lambda: True)]
    assert steps == [17] and len(opened) == 1
    assert [p.frame for p in job.proceed(bundle, output)] == [29] and len(opened) == 2
    assert read_video(output)[0].shape[0] == 29 and job.is_complete(output)


def test_starting_refuses_what_cannot_run(bundle, tmp_path):
    for wrong, said in (
        (Request(ROWS, 40), "37 and 41"),
        (Request((), 41), "no prompt"),
        (Request(ROWS, 41, start=PIXELS[0, :, :8]), "fit it"),
        (Request(ROWS, 41, method="magic"), "magic"),
    ):
        with pytest.raises(InputError, match=said):
            job.start(bundle, wrong, tmp_path / "a.mp4", {})
    assert not list(tmp_path.iterdir())
