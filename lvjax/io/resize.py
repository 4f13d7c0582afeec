# SPDX-License-Identifier: Apache-2.0
"""Resizing as PyTorch does it, where a pretrained model expects just that."""

import numpy as np

from lvjax.core.errors import InputError
from lvjax.core.shapes import expect

SHARPNESS = -0.75  # the cubic's free parameter, in PyTorch; Pillow's is -0.5


def _taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of n_out places the four neighbours' indices and weights, both [4, n_out].

    Pixel centres lie at halves; beyond the border its pixel is repeated.
    """
    centre = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    index = np.floor(centre)[None] + np.arange(-1, 3)[:, None]
    d, a = np.abs(centre[None] - index), SHARPNESS
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return index.clip(0, n_in - 1).astype(np.int64), np.where(d <= 1, near, far)


def resize_bicubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic without antialiasing: a picture that shrinks is sampled, not averaged.

    image: floating point [H, W, C].  size: (height, width).  Weights and sums are float64.
    Returns: float32 [height, width, C]; overshoot beyond the image's range is kept.
    Raises: InputError for another shape or a size below 1.
    Source: torch.nn.functional.interpolate, mode="bicubic", align_corners=False, antialias=False.
    """
    found = expect(image, "H W C", "image")
    if min(found.values()) < 1 or min(size) < 1:
        raise InputError(
            f"cannot resize {tuple(found.values())} to {tuple(size)}; sides start at 1"
        )
    rows, columns = (_taps(found[axis], n) for axis, n in zip("HW", size, strict=True))
    image = sum(w[:, None, None] * image[i] for i, w in zip(*rows, strict=True))
    image = sum(w[:, None] * image[:, i] for i, w in zip(*columns, strict=True))
    return image.astype(np.float32)
