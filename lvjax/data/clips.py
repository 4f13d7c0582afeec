# SPDX-License-Identifier: Apache-2.0
"""Clips of the pocket world as arrays on disk: rendered once, read by memory map, in an order that
is a function of the step.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lvjax.core.checkpoint import write_atomic
from lvjax.core.errors import CheckpointError, InputError, StorageError
from lvjax.data.prompts import MAX_WORDS, SCENES, VOCABULARY, encode
from lvjax.data.world import CLIP_STRIDE, GIVEN, RADIUS, SIZE, Video

CLIP_FRAMES = CLIP_STRIDE + GIVEN


def prompt_ids(video: Video, clip: int) -> np.ndarray:
    """Token ids [MAX_WORDS] of a clip's own prompt: the one at its first new frame.  One prompt in
    four leaves the scene unnamed.
    """
    action = video.action(clip * CLIP_STRIDE + (GIVEN if clip else 0))
    named = (clip * 7 + int(video.canvas[0, 0, 0] * 997)) % 4 != 0
    return encode(action.prompt(scene=named))[0]


def camera_words(ids: np.ndarray) -> np.ndarray:
    """ids int32 [..., M] -> int32 [..., 2]: what the camera does and in which direction, 0 without
    one.
    """
    verb, direction = ids[..., 1], ids[..., 2]
    return np.stack([verb, np.where(verb == VOCABULARY["still"], 0, direction)], axis=-1)


def continues(ids: np.ndarray) -> np.ndarray:
    """ids int32 [..., K, M] of clips in order -> bool [..., K]: whether a clip goes on with the
    action of the clip before, the scene's name aside; the first always does.

    Where it does not, the first GIVEN frames of the clip follow another prompt than its own.
    """
    scene = [VOCABULARY[word] for word in ("over", *SCENES)]
    used = np.where(np.isin(ids, scene), 0, ids)
    # the words that are left keep their order: move the gaps behind them
    order = np.argsort(used == 0, axis=-1, kind="stable")
    used = np.take_along_axis(used, order, axis=-1)
    first = np.ones((*ids.shape[:-2], 1), bool)
    return np.concatenate([first, (used[..., 1:, :] == used[..., :-1, :]).all(-1)], axis=-1)


def comes_into_view(objects: np.ndarray) -> np.ndarray:
    """objects float32 [..., P, 2] of clips -> bool [...]: whether the object's centre is outside
    the picture in the first GIVEN frames and inside it in the last.
    """
    inside = ((objects > 0) & (objects < SIZE)).all(-1)
    return ~inside[..., :GIVEN].any(-1) & inside[..., -1]


class Rendered(NamedTuple):
    """Clips of a video.  frames: uint8 [K, P, H, W, 3].  ids: prompts, int32 [K, MAX_WORDS].
    objects: float32 [K, P, 2], the object's centre (x, y) in pixels, nan without one.
    """

    frames: np.ndarray
    ids: np.ndarray
    objects: np.ndarray


def coverage(objects: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """How much of each latent cell an object covers: objects float32 [B, P, 2] of clips whose
    latents are [B, T, h, w] = size -> float32 [B, *size] in 0..1, a disc for any shape.
    """
    t, h, w = size
    y, x = ((np.arange(n) + 0.5) * SIZE / n for n in (h, w))
    away = np.hypot(x[None, :] - objects[..., :1, None], y[:, None] - objects[..., 1:, None])
    cell = SIZE / max(h, w)
    near = np.nan_to_num(np.clip((RADIUS + cell / 2 - away) / cell, 0, 1))
    groups = near[:, 1:].reshape(len(near), t - 1, -1, h, w).mean(2)
    return np.concatenate([near[:, :1], groups], axis=1).astype(np.float32)


def render(index: int, clips: int, **kwargs) -> Rendered:
    """The first `clips` clips of video `index`.

    Clip i holds frames CLIP_STRIDE·i to CLIP_STRIDE·i + 16; its first GIVEN frames are the last of
    the clip before.
    """
    video = Video(index, **kwargs)
    frames = video.frames(0, CLIP_STRIDE * clips + GIVEN)
    poses = [video.pose(f) for f in range(len(frames))]
    objects = np.array([(p.object_x, p.object_y) for p in poses], np.float32)
    spans = [slice(CLIP_STRIDE * i, CLIP_STRIDE * i + CLIP_FRAMES) for i in range(clips)]
    ids = np.stack([prompt_ids(video, i) for i in range(clips)])
    return Rendered(
        np.stack([frames[s] for s in spans]), ids, np.stack([objects[s] for s in spans])
    )


class ClipStore:
    """`videos` rendered videos of `clips` clips each, in a folder; rendering continues where it
    stopped.
    """

    def __init__(self, folder, videos: int, clips: int = 6, split: str = "train", seed: int = 0):
        self.folder, self.videos, self.clips, self.kwargs = (
            Path(folder),
            videos,
            clips,
            {"split": split, "seed": seed},
        )
        shape = (videos, clips, CLIP_FRAMES, SIZE, SIZE, 3)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.frames = open_array(self.folder / "frames.npy", shape, np.uint8)
            self.ids = open_array(self.folder / "ids.npy", (videos, clips, MAX_WORDS), np.int32)
            places = (videos, clips, CLIP_FRAMES, 2)
            self.objects = open_array(self.folder / "objects.npy", places, np.float32)
        except OSError as e:
            raise StorageError(
                f"cannot hold rendered clips in {self.folder}: {e.strerror or e}; choose another "
                "work folder"
            ) from e

    @property
    def ready(self) -> int:
        """Videos rendered so far.  Raises: CheckpointError for a damaged mark."""
        return read_mark(self.folder / "ready", self.videos)

    def put(self, v: int, video: Rendered) -> None:
        """Store a rendered video as number `v`; `fill` marks it as ready."""
        self.frames[v], self.ids[v], self.objects[v] = video

    def fill(self, left: Callable[[], float] = lambda: math.inf) -> bool:
        """Render what is missing while left() is positive; whether all is there."""
        for v in range(self.ready, self.videos):
            if left() <= 0:
                return False
            self.put(v, render(v, self.clips, **self.kwargs))
            write_atomic(self.folder / "ready", str(v + 1).encode())
        return True


def read_mark(path: Path, most: int) -> int:
    """How much of something is done, as the file `path` says; 0 without it.

    Raises: CheckpointError when it holds no number from 0 to `most`.
    """
    text = path.read_text().strip() if path.exists() else "0"
    if not (text.isdecimal() and len(text) < 20 and int(text) <= most):
        raise CheckpointError(f"{path} is damaged: it holds {text[:20]!r}; remove {path.parent}")
    return int(text)


def open_array(path: Path, shape: tuple[int, ...], dtype) -> np.ndarray:
    """The array in the file `path`, mapped to be written; a new one of zeros without the file.

    Raises: CheckpointError for a file that is damaged or cut short; InputError for another shape.
    """
    if not path.exists():
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    try:
        found = np.load(path, mmap_mode="r")  # "r+" would fill up a file that is cut short
    except (ValueError, EOFError) as e:
        raise CheckpointError(f"{path} is damaged or cut short; remove {path.parent}") from e
    if found.shape != shape or found.dtype != dtype:
        raise InputError(
            f"{path} holds {found.dtype}{list(found.shape)}, this recipe needs "
            f"{np.dtype(dtype)}{list(shape)}; choose another folder or remove it"
        )
    return np.load(path, mmap_mode="r+")
