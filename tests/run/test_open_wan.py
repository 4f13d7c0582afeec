# SPDX-License-Identifier: Apache-2.0
"""What a request of a Wan model becomes: by both faces the size and the length of a video that is
made of another one; and models that lack one of two experts.
"""

from dataclasses import replace

import numpy as np
import pytest

import lvjax
from lvjax import api
from lvjax.cli.request import make_request
from lvjax.core.errors import InputError
from lvjax.io.video import FragmentedWriter
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.rollout.condition import best_output_size, output_size
from lvjax.run.bundle import Bundle
from lvjax.run.defaults import Defaults
from lvjax.run.request import Request, resolved, whole_frames
from lvjax.run.session import check_settings
from tests.tiny import tiny_bundle

DIT = DiTConfig(32, 2, 3, 48, text_dim=8, text_len=4, freq_dim=16, dtype="float32")
VAE = VAEConfig(4, 16, (1, 1, 2), 1, (True, True), 1, (0.0,) * 16, (1.0,) * 16)
DEFAULTS = Defaults(size=(32, 64), steps=4, method="wan", guidance=(2.0, 3.0), boundary=0.9)
PROMPT = "a red circle moves"
ONE = replace(DEFAULTS, boundary=None, guidance=2.0)
T2V = Bundle("t2v", DIT, VAE, None, ONE, {})
I2V = replace(T2V, name="i2v", dit=replace(DIT, condition_channels=20))
TI2V = replace(T2V, name="ti2v", defaults=replace(ONE, impose=True))
PORTRAIT = (48, 24)


class Opened(Exception):
    """Where a session would be opened; with its request."""


def request(**fields):
    return Request((((0.0, PROMPT),),), 5, **fields)


def test_a_missing_expert_is_said():
    """Not replaced by the other one, unless all steps are asked of that."""
    two = replace(T2V, defaults=DEFAULTS, parts={"dit": None, "dit_low": None})
    check_settings(two, request())
    one = replace(two, parts={"dit": None})
    with pytest.raises(InputError, match="has two experts, of which only one is here; convert"):
        check_settings(one, request())
    check_settings(replace(one, defaults=replace(DEFAULTS, boundary=None)), request())
    with pytest.raises(InputError, match="two experts and defaults.boundary is None; give"):
        check_settings(replace(two, defaults=ONE), request())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guidance": (1.0, 2.0, 3.0)}, "guidance is .*; give a number from 0 to 100"),
        ({"guidance": ()}, "guidance is"),
        ({"guidance": ("1", 2.0)}, "guidance is"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": True}, "guidance is True"),
        ({"guidance": 101}, "guidance is 101"),
        ({"steps": "8"}, "steps is '8'; give a whole number from 1 to 1000"),
        ({"steps": 0}, "steps is 0"),
        ({"strength": "0.5"}, "strength is '0.5'; give a number above 0"),
        ({"negative": 5}, "negative is 5; give text"),
        ({"method": "other"}, "method is 'other'; give one of"),
    ],
)
def test_settings_that_are_none(fields, words):
    with pytest.raises(InputError, match=words):
        resolved(T2V, request(**fields))


def test_two_scales_are_a_tuple():
    assert resolved(T2V, request(guidance=[1, 2.5])).guidance == (1, 2.5)


@pytest.fixture(params=["command line", "Python"])
def ask(request, tmp_path, monkeypatch):
    """(model, frames of the video, options of the command line) -> the request."""

    def command(bundle, count, **options):
        path = tmp_path / f"{count}.mp4"
        if not path.exists():
            pictures = np.full((count, *PORTRAIT, 3), 99, np.uint8)
            with FragmentedWriter(path, PORTRAIT[::-1], bundle.defaults.fps, {}) as writer:
                writer.write_clip(pictures)
        return make_request(bundle, {"prompt": [PROMPT], "video": path} | options)[0]

    def python(bundle, count, frames=None, size=None, **options):
        if size is not None:
            options["width"], options["height"] = map(int, size.split("x"))
        video = np.full((count, *PORTRAIT, 3), 99, np.uint8)
        with pytest.raises(Opened) as opened:
            lvjax.prepare(bundle, PROMPT, video=video, num_frames=frames, **options)
        return opened.value.args[0]

    def open_session(bundle, asked):
        raise Opened(asked)

    monkeypatch.setattr(api, "open_session", open_session)

    return command if request.param == "command line" else python


@pytest.mark.parametrize(("model", "fit"), [(T2V, output_size), (I2V, output_size),
                                            (TI2V, best_output_size)])  # fmt: skip
def test_without_a_size_a_video_has_the_shape_of_the_one_given(ask, model, fit):
    asked = ask(model, 17, frames=5)
    assert asked.size == fit(PORTRAIT, 32 * 64, 8) and asked.size[0] > asked.size[1]
    assert asked.start.shape == (5 if model is T2V else 1, *asked.size, 3)
    assert ask(model, 17, frames=5, size="64x32").size == (32, 64)


def test_a_memory_has_the_size_of_the_model(ask):
    asked = ask(tiny_bundle(), 7)
    assert asked.size == (16, 16) and asked.start.shape[:1] == (5,)


def test_without_a_length_a_video_is_as_long_as_the_one_it_is_made_of(ask):
    """Rounded down to 1 + 4m; not where it goes on from that, or is asked for."""
    assert [whole_frames(n) for n in (1, 4, 5, 8, 9)] == [1, 1, 5, 5, 9]
    made = ask(T2V, 7)
    assert made.frames == 5 and made.start.shape[0] == 5
    assert ask(T2V, 60).frames < 60  # the usual length
    assert ask(I2V, 7).frames == ask(I2V, 60).frames > 7
    assert ask(T2V, 7, strength=0.5).frames == 5
    with pytest.raises(InputError, match="the video has 7 frames, 9 are asked for"):
        ask(T2V, 7, frames=9)
