# SPDX-License-Identifier: Apache-2.0
"""Which pixel frames of a clip are given, what that is in masks and latents, and sizes of pictures;
the rest of `condition` is in test_rollout.py."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.rollout.condition import (
    best_output_size,
    condition,
    frame_mask,
    frame_timesteps,
    output_size,
    pin,
    pixel_frames,
    start_condition,
)

SIZE = (2, 4, 2, 3, 5)  # B T h w z: 13 pixel frames
P = pixel_frames(SIZE[1])


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


def code(frames):
    """A codec that shows what it is given: a latent cell has the sums of its frames' red, one frame
    each in the channels 1 to 4, and the number of frames."""
    red = frames[..., 0]
    first = [red[:, :1], *(jnp.zeros_like(red[:, :1]),) * 3]
    rest = [red[:, 1 + k :: 4] for k in range(4)]
    cells = [jnp.concatenate([a, b], 1) for a, b in zip(first, rest, strict=True)]
    count = jnp.full_like(cells[0], red.shape[1])
    return jnp.stack([*cells, count], -1)


def channel_by_definition(t, given):
    """The mask where pixel frame 4j + k - 3 is that of channel k of latent frame j."""
    mask = np.zeros((t, 4), np.float32)
    for j in range(t):
        for k in range(4):
            mask[j, k] = max(0, 4 * j + k - 3) in given
    return mask


@pytest.mark.parametrize("latents", [1, 2, 5, 21])
@pytest.mark.parametrize("first", [0, 1, 5, 6])
@pytest.mark.parametrize("last", [False, True])
def test_the_mask_by_its_definition(latents, first, last):
    frames = pixel_frames(latents)
    given = set(range(min(first, frames))) | ({frames - 1} if last else set())
    want = channel_by_definition(latents, given)
    np.testing.assert_array_equal(frame_mask(latents, first, last), want)


def test_first_and_last_frame():
    """Both are encoded with mid-grey between them as one clip; of the last latent frame only
    channel 3 is given, and it is not pinned."""
    image, last = draw(2, 2, 3, 3), draw(2, 2, 3, 3, seed=1)
    both = condition(code, image[:, None], SIZE, "pixel", last)
    assert both.shape == (*SIZE[:4], 9)
    mask = np.zeros((4, 4))
    mask[0], mask[3, 3] = 1, 1
    np.testing.assert_array_equal(both[1, :, 1, 2, :4], mask)
    np.testing.assert_array_equal(both[1, :, 0, 0, :4], mask)
    np.testing.assert_array_equal(both[:, 0, ..., 4], image[..., 0])
    np.testing.assert_array_equal(both[:, 3, ..., 7], last[..., 0])
    np.testing.assert_array_equal(both[..., 8], float(P))  # one clip
    assert not np.any(both[:, 1:3, ..., 4:8]) and not np.any(both[:, 3, ..., 4:7])
    pinned = pin(jnp.ones(SIZE), both)
    np.testing.assert_array_equal(pinned[:, 0], both[:, 0, ..., 4:])
    np.testing.assert_array_equal(pinned[:, 1:], 1)
    without = condition(code, image[:, None], SIZE, "pixel")
    np.testing.assert_array_equal(without[:, :3], both[:, :3])
    assert not np.any(without[:, 3, ..., :8])


def test_a_clip_of_one_frame():
    one = condition(code, draw(2, 1, 2, 3, 3), (2, 1, 2, 3, 5), "pixel")
    np.testing.assert_array_equal(one[..., :4], 1)
    with pytest.raises(InputError, match="1 frames and a last one are given, the clip has 1"):
        condition(code, draw(2, 1, 2, 3, 3), (2, 1, 2, 3, 5), "pixel", draw(2, 2, 3, 3))


def test_a_last_frame_needs_grey_frames_before_it():
    for fill in ("latent", "position"):
        with pytest.raises(InputError, match="needs fill='pixel'"):
            condition(code, draw(2, 1, 2, 3, 3), SIZE, fill, draw(2, 2, 3, 3))
    with pytest.raises(InputError, match="frames given"):
        condition(code, None, SIZE, "pixel", draw(2, 2, 3, 3))


def test_a_video_to_start_from_is_not_given():
    video = draw(2, P, 2, 3, 3)
    start = start_condition(code, video, SIZE)
    assert start.shape == (*SIZE[:4], 9) and not np.any(start[..., :4])
    np.testing.assert_array_equal(start[..., 4:], code(video))
    np.testing.assert_array_equal(pin(jnp.ones(SIZE), start), 1)
    with pytest.raises(InputError, match="P must be 13"):
        start_condition(code, video[:, :9], SIZE)


def test_frames_that_are_known_have_timestep_0():
    image = condition(code, draw(2, 1, 2, 3, 3), SIZE)
    nothing = condition(code, None, SIZE)
    both = jnp.concatenate([image[:1], nothing[:1]])
    times = frame_timesteps(jnp.float32(937.0), both)
    assert times.tolist() == [[0.0, 937.0, 937.0, 937.0], [937.0] * 4]
    ends = condition(code, draw(2, 1, 2, 3, 3), SIZE, "pixel", draw(2, 2, 3, 3))
    assert frame_timesteps(jnp.float32(5.0), ends)[0].tolist() == [0.0, 5.0, 5.0, 5.0]


AREAS = {"480p": 480 * 832, "720p": 720 * 1280}


@pytest.mark.parametrize(
    "image, area, size",
    [
        ((480, 832), "480p", (480, 832)),  # the official floats give 464
        ((832, 480), "480p", (832, 480)),
        ((1080, 1920), "480p", (464, 832)),  # 473.96 and 842.6
        ((1080, 1920), "720p", (720, 1280)),
        ((512, 512), "480p", (624, 624)),  # 631.9
        ((512, 512), "720p", (960, 960)),
        ((3024, 4032), "480p", (544, 720)),  # 547.3 and 729.7
        ((1000, 333), "720p", (1648, 544)),  # 1663.6 and 554
    ],
)
def test_sizes_of_image_to_video(image, area, size):
    assert output_size(image, AREAS[area], 16) == size


def test_sizes_are_those_of_the_official_floats_unless_these_miss_a_whole_number():
    draw, missed = np.random.default_rng(0), 0
    for height, width in draw.integers(64, 4000, (2000, 2)).tolist():
        for area in AREAS.values():
            sides = math.sqrt(area * (height / width)), math.sqrt(area / (height / width))
            floats = tuple(int(side // 8 // 2 * 2 * 8) for side in sides)
            exact = output_size((height, width), area, 16)
            if floats != exact:
                off = [side for side, n in zip(sides, exact, strict=True) if 0 < n - side < 1e-9]
                assert off, (height, width)
                missed += 1
    assert missed < 5


@pytest.mark.parametrize(
    "image, size",
    [  # by Wan 2.2's function, with sides of 32 in an area of 704 x 1280
        ((704, 1280), (704, 1280)),
        ((1280, 704), (1280, 704)),
        ((720, 1280), (704, 1248)),
        ((512, 512), (928, 960)),
        ((3, 4), (800, 1088)),
        ((2, 3), (768, 1152)),
        ((1000, 333), (1632, 544)),
    ],
)
def test_sizes_of_ti2v(image, size):
    assert best_output_size(image, 704 * 1280, 32) == size


def test_the_better_of_two_shapes():
    """A square of area 30 * 30 in sides of 4: 28 leaves 32 for the other side, either way; the tie
    goes to the height.  At 5:3 in 838 the sides are 37.4 and 22.4: rounding the longer one to 36
    leaves 23.3, so 22; rounding the shorter one to 22 leaves 38.1, so 38, which is further off."""
    assert best_output_size((1, 1), 900, 4) == (28, 32)
    assert best_output_size((5, 3), 838, 2) == (36, 22)
    assert best_output_size((3, 5), 838, 2) == (22, 36)


@pytest.mark.parametrize("size", [output_size, best_output_size])
def test_pictures_without_a_size_are_refused(size):
    with pytest.raises(InputError, match="crop it"):
        size((10, 100_000), 480 * 832, 16)
    with pytest.raises(InputError, match="positive"):
        size((0, 10), 480 * 832, 16)
