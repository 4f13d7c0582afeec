# SPDX-License-Identifier: Apache-2.0
"""Backgrounds of the pocket world: photographs shipped with the package and procedural textures, as
periodic canvases.

The held-out split uses photographs and texture seeds that training never sees.
"""

from functools import cache
from importlib import resources

import numpy as np

CANVAS = 512  # canvases are CANVAS x CANVAS and tile without a seam
PHOTOS = {
    "hillside": "landscape", "sunset": "landscape", "bridge": "landscape", "sea": "landscape",
    "stream": "plants", "dragonfly": "plants", "dahlia": "plants", "fig": "room",
    "brushes": "room", "wine": "room", "clock": "room", "dogs": "animal", "nuthatch": "animal",
    "astronaut": "person", "rocket": "building",
}  # fmt: skip
HELD_OUT_PHOTOS = {
    "mountains": "landscape",
    "pagoda": "landscape",
    "dandelion": "plants",
    "coffee": "room",
    "cat": "animal",
}
TEXTURES = ("clouds", "marble", "cells", "waves")
# blur of photographs in pixels: a 64-pixel view is a close-up, as out of a camera, not a thumbnail
SOFTNESS = 1.3
SATURATION = 0.5  # backgrounds are muted, so that an object's colour is unambiguous


@cache
def photo(name: str) -> np.ndarray:
    """A shipped photograph, uint8 [H, W, 3]."""
    from PIL import Image

    with resources.files("lvjax").joinpath("assets", "photos", f"{name}.jpg").open("rb") as f:
        return np.asarray(Image.open(f).convert("RGB"))


def mute(image: np.ndarray, saturation: float = SATURATION) -> np.ndarray:
    """Scale the colour of float RGB [..., 3] in [0, 1] towards its own grey, and its range into
    [.1, .9].
    """
    grey = image @ np.array([0.299, 0.587, 0.114], image.dtype)
    return (0.1 + 0.8 * (grey[..., None] + saturation * (image - grey[..., None]))).astype(
        np.float32
    )


def photo_canvas(name: str, rng: np.random.Generator) -> np.ndarray:
    """A photograph at a random scale, mirrored into a seamless canvas, float32 [CANVAS, CANVAS, 3]
    in [0, 1].
    """
    from PIL import Image, ImageFilter

    image = Image.fromarray(photo(name))
    short = int(round(np.exp(rng.uniform(np.log(150), np.log(CANVAS / 2)))))
    scale = short / min(image.size)
    half = CANVAS // 2
    size = (max(half, round(image.width * scale)), max(half, round(image.height * scale)))
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
    )
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(SOFTNESS)))
    pixels = (
        pixels if size == (pixels.shape[1], pixels.shape[0]) else _mirror(pixels, size[1], size[0])
    )
    top, left = (rng.integers(0, n - half + 1) for n in (size[1], size[0]))
    crop = pixels[top : top + half, left : left + half].astype(np.float32) / 255
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return _mirror(mute(crop), CANVAS, CANVAS)


def _mirror(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Continue an image by reflection to (height, width)."""
    h, w = image.shape[:2]
    rows, cols = np.arange(height) % (2 * h), np.arange(width) % (2 * w)
    return image[np.where(rows < h, rows, 2 * h - 1 - rows)][
        :, np.where(cols < w, cols, 2 * w - 1 - cols)
    ]


def _noise(rng: np.random.Generator, low: float, high: float, slope: float) -> np.ndarray:
    """Periodic Gaussian noise [CANVAS, CANVAS], band-limited to [low, high] cycles per canvas, zero
    mean, unit variance.
    """
    f = np.hypot(
        *np.meshgrid(
            np.fft.fftfreq(CANVAS) * CANVAS, np.fft.rfftfreq(CANVAS) * CANVAS, indexing="ij"
        )
    )
    spectrum = np.where((f >= low) & (f <= high), np.maximum(f, 1.0) ** -slope, 0.0)
    field = np.fft.irfft2(
        spectrum * np.fft.rfft2(rng.standard_normal((CANVAS, CANVAS))), s=(CANVAS, CANVAS)
    )
    return (field - field.mean()) / field.std()


def texture_canvas(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A procedural texture coloured by a random three-colour ramp, float32 [CANVAS, CANVAS, 3] in
    [0, 1].
    """
    if kind == "clouds":
        field = _noise(rng, 2, 40, 1.6)
    elif kind == "marble":
        field = 1.5 * np.sin(1.6 * _noise(rng, 3, 14, 0.8) + 0.5 * _noise(rng, 2, 30, 1.4))
    elif kind == "cells":
        field = 2.5 * np.tanh(2.2 * _noise(rng, 9, 16, 0.0))
    elif kind == "waves":
        field = _noise(rng, 6, 20, 0.5) + 0.6 * np.abs(_noise(rng, 4, 12, 0.5))
    else:
        raise ValueError(f"texture {kind!r}; allowed: {TEXTURES}")
    level = 1 / (1 + np.exp(-1.2 * field))
    ramp = np.sort(rng.uniform(0.05, 0.95, 3))[:, None] + 0.35 * (rng.random((3, 3)) - 0.5)
    ramp = np.clip(ramp if rng.random() < 0.5 else ramp[::-1], 0, 1)
    colours = [np.interp(level, (0, 0.5, 1), ramp[:, c]) for c in range(3)]
    return mute(np.stack(colours, -1).astype(np.float32))


def draw_scene(
    rng: np.random.Generator, held_out: bool, kind: str | None = None
) -> tuple[str, np.ndarray]:
    """A scene word and its canvas; `kind` "photo" or "texture", by default either with equal
    chance.
    """
    if kind == "photo" or (kind is None and rng.random() < 0.5):
        names = HELD_OUT_PHOTOS if held_out else PHOTOS
        name = list(names)[rng.integers(len(names))]
        return names[name], photo_canvas(name, rng)
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    return texture, texture_canvas(texture, rng)
