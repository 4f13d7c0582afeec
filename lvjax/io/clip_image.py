# SPDX-License-Identifier: Apache-2.0
"""An image as CLIP's image encoder takes it, in the two ways in which Wan's references prepare it.

They see different pictures: the official code squeezes the whole image into the square and samples
it, diffusers keeps its shape, averages, and crops the middle.
Sources: Wan-Video/Wan2.1: wan/modules/clip.py; huggingface/transformers:
src/transformers/models/clip/image_processing_clip.py.
"""

import numpy as np
from PIL import Image

from lvjax.core.errors import InputError
from lvjax.core.shapes import expect
from lvjax.io.resize import resize_bicubic

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def _squeezed(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image as a square, in [0, 1] but for the overshoot of the cubic."""
    return resize_bicubic(image, (size, size)) * np.float32(0.5) + np.float32(0.5)


def _cropped(image: np.ndarray, size: int) -> np.ndarray:
    """The middle of the image, its short side `size`, in [0, 1]; in 8 bits, as Pillow resizes."""
    picture = Image.fromarray(np.round((image + 1) * 127.5).astype(np.uint8))
    short = min(picture.size)
    scaled = [size if n == short else int(size * n / short) for n in picture.size]
    picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = ((n - size) // 2 for n in scaled)
    picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture, np.float32) / np.float32(255)


MODES = {"official": _squeezed, "diffusers": _cropped}


def clip_pixels(image: np.ndarray, mode: str = "official", size: int = 224) -> np.ndarray:
    """Normalised pixels for `encode_image`.

    image: float32 [H, W, 3] in [-1, 1].  mode: "official" or "diffusers".
    Returns: float32 [size, size, 3].
    Raises: InputError for another mode, shape or range.
    """
    if mode not in MODES:
        raise InputError(f"mode={mode!r}; use one of {', '.join(MODES)}")
    expect(image, "H W C", "image", C=3)
    if not np.abs(image).max(initial=0) <= 1:  # not so for NaN
        raise InputError("the image has values outside [-1, 1]; from [0, 255] use x / 127.5 - 1")
    return (MODES[mode](image, size) - MEAN) / STD
