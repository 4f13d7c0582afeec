# SPDX-License-Identifier: Apache-2.0
"""Held-out pocket-world clips, and one thing at a time that is wrong with them."""

from dataclasses import replace

import numpy as np

from lvjax.data.judge import object_masks
from lvjax.data.prompts import Action
from lvjax.data.world import Video
from lvjax.lab.metrics import LUMA

FRAMES = 17
CAMERAS = ("still", "pan left", "pan down", "still")
THINGS = (
    ("red", "circle", "left"),
    ("cyan", "square", "up"),
    ("yellow", "triangle", "stay"),
    ("blue", "diamond", "right"),
)
FIRST = 300_000  # indices of the held-out split that nothing else uses


def clip(index: int, frames: int = FRAMES, **changes) -> np.ndarray:
    """A clip with an object in sight; equal indices differ in `changes` of the action alone."""
    camera, thing = CAMERAS[index % 4], THINGS[(index // 4 + index) % 4]
    action = replace(Action(camera, "", *thing), **changes)
    kind = ("photo", "texture")[index % 2]
    video = Video(FIRST + index, split="held_out", kind=kind, first=action, enters=False)
    return video.frames(0, frames)


def _bytes(x) -> np.ndarray:
    return np.rint(np.clip(x, 0, 255)).astype(np.uint8)


def blurred(frames, sigma: float = 1.0) -> np.ndarray:
    x, steps = frames.astype(np.float32), np.arange(-4, 5)
    kernel = np.exp(-((steps / sigma) ** 2) / 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        pad = [(4, 4) if a == axis else (0, 0) for a in range(4)]
        wide = np.pad(x, pad, mode="edge")
        n = x.shape[axis]
        x = sum(w * wide.take(range(i, i + n), axis) for i, w in enumerate(kernel))
    return _bytes(x)


def noisy(frames, sigma: float = 12.0) -> np.ndarray:
    return _bytes(frames + np.random.default_rng(0).normal(0, sigma, frames.shape))


def saturated(frames, by: float = 1.5) -> np.ndarray:
    grey = (frames @ LUMA)[..., None]
    return _bytes(grey + by * (frames - grey))


def tinted(frames, by=(12, 0, -12)) -> np.ndarray:
    return _bytes(frames + np.array(by, np.float32))


def brighter(frames, by: float = 30.0) -> np.ndarray:
    return _bytes(frames.astype(np.float32) + by)


def frozen(frames) -> np.ndarray:
    return np.repeat(frames[:1], len(frames), axis=0)


def stuttering(frames) -> np.ndarray:
    """Every second frame shown twice."""
    return np.repeat(frames[::2], 2, axis=0)[: len(frames)]


def shuffled(frames) -> np.ndarray:
    return frames[np.random.default_rng(1).permutation(len(frames))]


def recoloured(frames, after: int | None = None) -> np.ndarray:
    """The object in another palette colour from frame `after` on, by default from the middle."""
    out, after = frames.copy(), len(frames) // 2 if after is None else after
    busy = object_masks(frames[after:]).any(-1)[..., None]
    out[after:] = np.where(busy, np.roll(frames[after:], 1, axis=-1), frames[after:])
    return out


def reshaped(index: int) -> np.ndarray:
    """A clip whose object takes another shape in the middle."""
    shape = THINGS[(index // 4 + index) % 4][1]
    other = clip(index, shape="square" if shape != "square" else "diamond")
    return np.concatenate([clip(index)[: FRAMES // 2], other[FRAMES // 2 :]])


def other_place(index: int) -> np.ndarray:
    """A clip whose scene is another from the middle on; the object stays what it is."""
    there = clip(index + 16)
    return np.concatenate([clip(index)[: FRAMES // 2], there[FRAMES // 2 :]])


CORRUPTIONS = {
    "blurred": blurred,
    "noisy": noisy,
    "saturated": saturated,
    "tinted": tinted,
    "brighter": brighter,
    "frozen": frozen,
    "stuttering": stuttering,
    "shuffled": shuffled,
    "recoloured": recoloured,
}
