# SPDX-License-Identifier: Apache-2.0
"""The Python face: which options and pictures it takes, and what it says of the others."""

import dataclasses
import errno
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import lvjax
from lvjax import api
from lvjax.core.errors import CheckpointError, DoesNotFitError, InputError
from lvjax.run.bundle import Bundle
from tests.tiny import DEFAULTS, DIT, TEXT, VAE, tiny_bundle

PROMPT = "the camera pans left over a landscape"
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (24, 32, 3), np.uint8)
FLOAT = PICTURE.astype(np.float32) / 255
NAN = np.where(FLOAT > 0.5, np.nan, FLOAT)
EMPTY = Bundle("empty", DIT, VAE, TEXT, DEFAULTS, {})  # for what ends before the weights are used


def test_stream_takes_a_key_and_gives_the_frames_of_generate():
    bundle = tiny_bundle()
    key = jax.random.key(5)
    video = lvjax.generate(bundle, PROMPT, num_frames=5, key=key)
    clips = list(lvjax.stream(bundle, PROMPT, num_frames=5, key=key))
    np.testing.assert_array_equal(np.concatenate([c.frames for c in clips], 1), video.frames)
    other = next(lvjax.stream(bundle, PROMPT, num_frames=5))
    assert (other.frames != clips[0].frames).any()


@dataclasses.dataclass(frozen=True)
class Opened:
    """What stands for a session: the request that it was to be opened with."""

    request: object
    notices: tuple[str, ...] = ()


@pytest.fixture
def start(monkeypatch):
    """options -> the request's start frames and the session's notices."""
    monkeypatch.setattr(api, "open_session", lambda bundle, request: Opened(request, ("words",)))

    def ask(**options):
        session = lvjax.prepare(EMPTY, PROMPT, **options)
        return session.request.start, session.notices

    return ask


OPAQUE = np.dstack([PICTURE, np.full((24, 32), 255, np.uint8)])


@pytest.mark.parametrize(
    "same",
    [FLOAT, FLOAT.astype(np.float64), jnp.asarray(PICTURE), Image.fromarray(OPAQUE)],
    ids=["float32", "float64", "jax", "PIL RGBA"],
)
def test_a_picture_may_come_in_several_forms(start, same):
    expected, notices = start(image=PICTURE)
    assert expected.shape == (16, 16, 3) and np.abs(expected).max() <= 1 and notices == ("words",)
    np.testing.assert_array_equal(start(image=same)[0], expected)
    frames, _ = start(video=[np.zeros_like(PICTURE)] * 3 + [same] * 5)
    np.testing.assert_array_equal(frames, np.stack([expected] * 5))
    whole, _ = start(video=np.stack([PICTURE] * 3))
    np.testing.assert_array_equal(whole, np.stack([expected] * 3))


def test_half_precision_is_rounded_to_the_nearest(start):
    half, _ = start(image=jnp.asarray(FLOAT, jnp.bfloat16))
    np.testing.assert_allclose(half, start(image=PICTURE)[0], atol=0.01)


def test_what_was_changed_in_a_picture_is_a_notice_once(start):
    clear = Image.fromarray(np.dstack([PICTURE, np.zeros((24, 32), np.uint8)]))
    image, notices = start(image=clear)
    assert (image == 1).all() and "white" in notices[0] and notices[1:] == ("words",)
    assert len(start(video=[clear] * 5)[1]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": 2 * FLOAT - 1}, r"from -1 to 1; allowed is \[0, 1\].*\(x \+ 1\) / 2"),
        ({"image": 255 * FLOAT}, "x / 255"),
        ({"image": NAN}, "not finite"),
        ({"image": PICTURE.astype(np.int64)}, r"int64\[24, 32, 3\]; give uint8"),
        ({"image": PICTURE > 99}, "bool"),
        ({"image": PICTURE[..., 0]}, r"uint8\[24, 32\]"),
        ({"image": PICTURE[None]}, r"\[1, 24, 32, 3\]"),
        ({"image": PICTURE[:1, :1]}, "1x1 px"),
        ({"image": "photo.jpg"}, "of type str; give .* PIL image"),
        ({"image": [[1, 2], [3]]}, "no array"),
        ({"image": Image.new("F", (32, 32))}, "32-bit"),
        ({"video": PICTURE[None][:0]}, "without frames"),
        ({"video": []}, "without frames"),
        ({"video": "a.mp4"}, "without frames"),
        ({"video": np.stack([FLOAT, NAN])}, "video frame 1 .* not finite"),
        ({"video": PICTURE[..., 0]}, "video frame 19 is"),
        ({"video": [PICTURE], "image": PICTURE}, "both image and video"),
        ({"key": 3}, "jax.random.key"),
        ({"key": jax.random.PRNGKey(0)}, "uint32"),
        ({"key": jax.random.split(jax.random.key(0))}, "one typed key"),
        ({"key": jax.random.key(0), "seed": 1}, "both seed and key"),
        ({"seed": -1}, "from 0 to 4294967295"),
        ({"seed": 0.5}, "whole number"),
        ({"num_frames": 17.0}, "num_frames is 17.0; give a whole number"),
        ({"num_frames": 0}, "nearest are 1 and 5"),
        ({"seconds": "5"}, "seconds is '5'; give a number"),
        ({"height": True}, "height is True"),
        ({"guidence_scale": 2.0}, "did you mean 'guidance_scale'"),
        ({"prompt": 7}, "prompt is 7"),
        ({"offload": np.array([1, 2])}, "offload is array.*give one of"),
        ({"method": np.zeros((2, 2))}, "method is array.*give text"),
        ({"strength": np.zeros((2, 2))}, "strength is array.*give a number"),
        ({"negative_prompt": 5}, "negative_prompt is 5; give text"),
        ({"method": []}, r"method is \[\]; give text"),
        ({"seconds": 10**400}, "seconds is too large"),
        ({"video": {0: PICTURE}}, "without frames"),
        ({"height": 10**9}, "at most 16384"),
        ({"bundle": "pocket"}, "give what lvjax.load returns"),
        ({"prompt": [(0, PROMPT, "more"), (1, PROMPT)]}, "timeline is"),
    ],
    ids=lambda x: None if isinstance(x, str) else "-".join(x),
)
def test_what_cannot_be_used_is_one_line_with_the_remedy(options, message):
    for call in (lvjax.prepare, lvjax.stream, lvjax.generate):
        with pytest.raises(InputError, match=message) as e:
            call(**({"bundle": EMPTY, "prompt": PROMPT} | options))
        assert "\n" not in str(e.value) and e.value.code == 2


def test_a_run_that_does_not_fit_is_refused_before_it_starts():
    with pytest.raises(DoesNotFitError, match="would fit"):
        lvjax.stream(EMPTY, PROMPT, height=8192, width=8192)


@pytest.mark.parametrize("name", [None, 5, b"pocket", [], "a\0b"])
def test_what_is_no_name_of_a_model(name):
    with pytest.raises(InputError, match="give 'pocket' or the path"):
        lvjax.load(name)


def test_a_file_system_that_refuses_is_one_of_our_errors(monkeypatch):
    with pytest.raises(InputError, match="File name too long; give a shorter name"):
        lvjax.load("x" * 300)

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "a\nb")

    monkeypatch.setattr(api, "outline", refused)
    monkeypatch.setattr(api, "check_settings", refused)
    for call in (lvjax.load, lambda: lvjax.prepare(EMPTY, PROMPT)):
        with pytest.raises(CheckpointError, match=r"cannot use a\\nb: Permission denied; give one"):
            call()


@pytest.mark.parametrize("value", [np.array([1, 2]), np.zeros((3, 3)), 5, [], np.True_], ids=str)
def test_what_is_no_place_or_type_of_weights(value):
    for options in ({"offload": value}, {"dtype": value}):
        with pytest.raises(InputError, match=f"{next(iter(options))} is .*give") as e:
            lvjax.load(**options)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("options", [{"row": 1}, {"row": "a"}, {"upscale": 0}, {"upscale": 1.5}])
def test_a_video_is_saved_by_a_row_and_a_size_that_are_there(tmp_path, options):
    video = api.Video(np.zeros((1, 5, 16, 16, 3), np.uint8), np.zeros(0), 8)
    with pytest.raises(InputError, match=next(iter(options))):
        video.save(tmp_path / "a.mp4", **options)
    video.save(tmp_path / "a.mp4", upscale=2)


def test_a_negative_prompt_may_be_none(start):
    assert lvjax.prepare(EMPTY, PROMPT, negative_prompt=None).request.negative is None


def test_numbers_of_numpy_are_numbers(start):
    options = {"seed": np.int64(3), "num_frames": np.int32(17), "guidance_scale": np.float32(2)}
    request = lvjax.prepare(EMPTY, PROMPT, **options).request
    assert (request.seed, request.frames, request.guidance) == (3, 17, 2.0)
    assert {type(request.seed), type(request.frames), type(request.guidance)} == {int, float}


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys; before = set(sys.modules); import lvjax; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tops = {name.split(".")[0] for name in done.stdout.split()}
    assert tops - set(sys.stdlib_module_names) == {"lvjax"}


def test_every_public_name_is_there():
    for name in lvjax.__all__:
        assert isinstance(getattr(lvjax, name), types.FunctionType)
    with pytest.raises(AttributeError, match="generate"):
        _ = lvjax.generates
