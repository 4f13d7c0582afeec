# SPDX-License-Identifier: Apache-2.0
"""Pictures for the image encoder against torch."""

import numpy as np
import pytest
import torch

from lvjax.core.errors import InputError
from lvjax.io import resize
from lvjax.io.clip_image import MEAN, STD, clip_pixels
from lvjax.io.resize import resize_bicubic
from tests.tiny import relative

SIZES = ((40, 64), (7, 5), (300, 224), (224, 224), (500, 301))


def picture(height, width):
    """uint8 noise with edges, and the same in [-1, 1]."""
    eight = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    eight[: height // 2, width // 2 :] = (255, 0, 128)
    return eight, eight.astype(np.float32) / np.float32(127.5) - np.float32(1)


def torch_bicubic(image, size, dtype=torch.float64, **kind):
    """In float64: in float32 torch rounds the places, and is wrong by 1e-4 in 500 pixels."""
    video = torch.from_numpy(image).to(dtype).permute(2, 0, 1)[None]
    made = torch.nn.functional.interpolate(video, size, mode="bicubic", **kind)
    return made[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("given", SIZES)
@pytest.mark.parametrize("size", ((48, 80), (224, 224), (9, 301)))
def test_bicubic_is_that_of_torch(given, size):
    image = picture(*given)[1]
    got = resize_bicubic(image, size)
    assert got.dtype == np.float32 and got.shape == (*size, 3)
    assert relative(got, torch_bicubic(image, size, align_corners=False)) < 1e-7
    assert relative(got, torch_bicubic(image, size, torch.float32, align_corners=False)) < 1e-4


def test_other_bicubics_are_noticed(monkeypatch):
    image, size = picture(500, 301)[1], (224, 200)
    got = resize_bicubic(image, size)
    assert relative(got, torch_bicubic(image, size, align_corners=True)) > 1e-2
    assert relative(got, torch_bicubic(image, size, antialias=True)) > 1e-2
    monkeypatch.setattr(resize, "SHARPNESS", -0.5)
    assert relative(resize_bicubic(image, size), got) > 1e-2


@pytest.mark.parametrize("given", SIZES)
def test_the_official_way(given):
    image = picture(*given)[1]
    wanted = torch_bicubic(image, (224, 224), align_corners=False) * 0.5 + 0.5
    got = clip_pixels(image)
    assert got.dtype == np.float32
    assert relative(got, (wanted - MEAN) / STD) < 5e-7


def test_a_small_square_is_normalised_too():
    grey = clip_pixels(np.zeros((30, 90, 3), np.float32), 28)
    assert grey.shape == (28, 28, 3)
    np.testing.assert_allclose(grey * STD + MEAN, 0.5, atol=1e-6)


def test_refusals():
    image = picture(20, 30)[1]
    with pytest.raises(InputError, match="axis C must be 3"):
        clip_pixels(image[:, :, :2])
    for wrong in (image + 1, image * np.nan):
        with pytest.raises(InputError, match=r"outside \[-1, 1\]"):
            clip_pixels(wrong)
    with pytest.raises(InputError, match="cannot resize"):
        resize_bicubic(image, (0, 3))
    with pytest.raises(InputError, match="cannot resize"):
        resize_bicubic(image[:0], (2, 3))
