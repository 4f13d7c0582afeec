# SPDX-License-Identifier: Apache-2.0
"""An image as CLIP's image encoder takes it: the whole of it, squeezed into a square.

diffusers takes another picture: it keeps the shape, averages, and crops the middle.
Source: Wan-Video/Wan2.1: wan/modules/clip.py.
"""

import numpy as np

from lvjax.core.errors import InputError
from lvjax.core.shapes import expect
from lvjax.io.resize import resize_bicubic

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def clip_pixels(image: np.ndarray, size: int = 224) -> np.ndarray:
    """Normalised pixels for `encode_image`.

    image: float32 [H, W, 3] in [-1, 1].
    Returns: float32 [size, size, 3].
    Raises: InputError for another shape or range.
    """
    expect(image, "H W C", "image", C=3)
    if not np.abs(image).max(initial=0) <= 1:  # not so for NaN
        raise InputError("the image has values outside [-1, 1]; from [0, 255] use x / 127.5 - 1")
    # in [0, 1] but for the overshoot of the cubic
    square = resize_bicubic(image, (size, size)) * np.float32(0.5) + np.float32(0.5)
    return (square - MEAN) / STD
