# SPDX-License-Identifier: Apache-2.0
"""Clips of the pocket world as arrays on disk: rendered once, read by memory map, in an order that
is a function of the step.
"""

from pathlib import Path

import numpy as np

from lvjax.core.errors import InputError, StorageError
from lvjax.data.prompts import MAX_WORDS, encode
from lvjax.data.world import CLIP_STRIDE, GIVEN, SIZE, Video

CLIP_FRAMES = CLIP_STRIDE + GIVEN


def prompt_ids(video: Video, clip: int) -> np.ndarray:
    """Token ids [MAX_WORDS] of a clip's own prompt: the one at its first new frame.  One prompt in
    four leaves the scene unnamed.
    """
    action = video.action(clip * CLIP_STRIDE + (GIVEN if clip else 0))
    named = (clip * 7 + int(video.canvas[0, 0, 0] * 997)) % 4 != 0
    return encode(action.prompt(scene=named))[0]


def render(index: int, clips: int, **kwargs) -> tuple[np.ndarray, np.ndarray]:
    """The first `clips` clips of video `index`: frames uint8 [K, P, H, W, 3] and prompt ids int32
    [K, MAX_WORDS].

    Clip i holds frames CLIP_STRIDE·i to CLIP_STRIDE·i + 16; its first GIVEN frames are the last of
    the clip before.
    """
    video = Video(index, **kwargs)
    frames = video.frames(0, CLIP_STRIDE * clips + GIVEN)
    clip = [frames[CLIP_STRIDE * i : CLIP_STRIDE * i + CLIP_FRAMES] for i in range(clips)]
    return np.stack(clip), np.stack([prompt_ids(video, i) for i in range(clips)])


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
            self.frames = _open(self.folder / "frames.npy", shape, np.uint8)
            self.ids = _open(self.folder / "ids.npy", (videos, clips, MAX_WORDS), np.int32)
        except OSError as e:
            raise StorageError(
                f"cannot hold rendered clips in {self.folder}: {e.strerror or e}; choose another "
                "work folder"
            ) from e

    @property
    def ready(self) -> int:
        """Videos rendered so far."""
        mark = self.folder / "ready"
        return int(mark.read_text()) if mark.exists() else 0

    def fill(self, stop: int | None = None) -> None:
        """Render what is missing, up to `stop` videos."""
        for v in range(self.ready, self.videos if stop is None else min(stop, self.videos)):
            self.frames[v], self.ids[v] = render(v, self.clips, **self.kwargs)
            (self.folder / "ready").write_text(str(v + 1))


def _open(path: Path, shape, dtype) -> np.ndarray:
    if not path.exists():
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    found = np.load(path, mmap_mode="r+")
    if found.shape != shape or found.dtype != dtype:
        raise InputError(
            f"{path} holds {found.dtype}{list(found.shape)}, this recipe needs "
            f"{np.dtype(dtype)}{list(shape)}; choose another folder or remove it"
        )
    return found
