# SPDX-License-Identifier: Apache-2.0
"""What a dataset of latents will need, before a model is read: videos, clips and disk, by what the
videos say of their length.

Does not own: encoding (dataset.py).
"""

import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lvjax.core.errors import InputError, StorageError, storing
from lvjax.data.captioned import Source
from lvjax.data.latent_writer import finished
from lvjax.data.latents import NULL, Layout, text_places
from lvjax.io.video import seconds_of
from lvjax.models.pocket_text import PocketTextConfig
from lvjax.rollout.condition import pixel_frames
from lvjax.run.bundle import Bundle

HEADER = 250  # bytes of the header of a file for each of its arrays, measured
LINE = 300  # and of an index for each video and each file, its captions aside
PER_TOKEN = 3  # bytes of a caption for each of its tokens, at least; English has more than four


@dataclass(frozen=True)
class DatasetPlan:
    """What is left to encode.

    done, videos: how many are finished, and how many are not; of these `unknown` do not say how
      long they are, and `unreadable` cannot be read.  clips: of those that say it.  disk: bytes.
    """

    done: int
    videos: int
    unknown: int
    unreadable: int
    clips: int
    disk: int


def plan_dataset(bundle: Bundle, videos: list[Source], layout: Layout, folder) -> DatasetPlan:
    """The plan of `encode_folder`; of the model its outline suffices, of videos no frame is read.

    Raises: CheckpointError when what is in `folder` is damaged.
    """
    done, there = finished(folder, videos), set(text_places(folder))
    left = [video for video in videos if video.name not in done]
    clips = unknown = unreadable = files = 0
    for video in left:
        try:
            seconds = seconds_of(video.path)
        except InputError:
            unreadable += 1
            continue
        unknown += seconds is None
        own = 0 if seconds is None else clips_in(seconds, layout)
        clips, files = clips + own, files + math.ceil(own / layout.clips)
    texts = {NULL, *(text for video in videos for _, text in video.timeline)} - there
    told = sum(len(text.encode()) for video in left for _, text in video.timeline)
    disk = clips * _clip_bytes(layout) + _text_bytes(bundle, texts)
    disk += LINE * (len(left) + files) + 2 * told  # captions are in the index, and with the clips
    return DatasetPlan(len(done), len(left), unknown, unreadable, clips, disk)


def clips_in(seconds: float, layout: Layout) -> int:
    """How many clips a video of this length has."""
    frames = math.ceil(seconds * layout.fps - 0.1)  # as io/video.py counts them
    new = layout.frames - pixel_frames(layout.overlap)
    return 0 if frames < layout.frames else 1 + (frames - layout.frames) // new


def _clip_bytes(layout: Layout) -> int:
    latents, *cell = layout.latent
    tails = layout.tails * (layout.tails + 1) // 2
    return 2 * (latents + tails) * math.prod(cell) + 2 * HEADER


def _text_bytes(bundle: Bundle, texts: Iterable[str]) -> int:
    """Bytes of prompts, by a guess at their tokens where a large encoder makes rows of them."""
    if isinstance(bundle.text, PocketTextConfig):
        each = 4 * (bundle.text.length + bundle.text.dim)
        return sum(each + len(text.encode()) + 2 * HEADER for text in texts)
    dim, most = bundle.dit.text_dim, math.inf if bundle.text is None else bundle.text.length
    bytes_of = {text: len(text.encode()) for text in texts}
    rows = {text: min(1 + size // PER_TOKEN, most) for text, size in bytes_of.items()}
    return sum(2 * dim * (rows[text] + 2) + bytes_of[text] + 2 * HEADER for text in rows)


def describe(plan: DatasetPlan) -> str:
    """The plan in one line for the user."""
    told = f"plan: {plan.videos} video{'s' * (plan.videos != 1)} to encode"
    told += f" ({plan.done} are done)" if plan.done else ""
    told += f", about {plan.clips} clips, {_size(plan.disk)} on disk"
    told += f"; of unknown length: {plan.unknown}" if plan.unknown else ""
    return told + (f"; unreadable: {plan.unreadable}" if plan.unreadable else "")


def check_disk(plan: DatasetPlan, folder) -> None:
    """Raises: StorageError when the disk is too small for the plan."""
    place = Path(os.path.realpath(folder))
    while not place.exists():
        place = place.parent
    with storing(place, "choose another --out"):
        free = shutil.disk_usage(place).free
    if plan.disk > free:
        raise StorageError(
            f"the dataset needs {_size(plan.disk)} on {place}, {_size(free)} are free; free space, "
            "choose another --out, or give fewer videos"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
