# SPDX-License-Identifier: Apache-2.0
"""A dataset of latents on disk: what training needs of videos, so that it holds neither the
autoencoder nor a large text encoder.

    DATASET/
      dataset.json      the head: the model's parts, the kind of text, how videos are cut
      texts/            the prompts' rows and features, so many to a file
      samples/          a file per sample: consecutive clips of one video, in order of time
      videos.jsonl      a line per video with its samples
      skipped.jsonl     a line per video that could not be used, with the reason
      complete.json     written last: how many there are, and the sha256 of videos.jsonl

Every file of arrays has a checksum per array, and a clip is an array of its own, so that one clip
is read and checked without the rest.
Owns: the format, and reading it.  Does not own: writing (latent_writer.py), making latents
(run/dataset.py), batches (latent_feed.py).
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lvjax.core.checkpoint import open_arrays, unsealed
from lvjax.core.errors import CheckpointError, shown

FORMAT = "lvjax-latents/1"
HEAD, COMPLETE = "dataset.json", "complete.json"
VIDEOS, SKIPPED = "videos.jsonl", "skipped.jsonl"
SAMPLES, TEXTS = "samples", "texts"
NULL = ""  # the prompt that stands for none
BAD = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Layout:
    """How videos are cut into clips, and clips into samples.

    size: (height, width) in pixels.  frames: pixel frames of a clip.  latent: (T, h, w, z) of a
      clip.  overlap: latent frames that a clip shares with the one before.  clips: of a sample, at
      most.  tails: R; the last 1 + 4(m - 1) pixel frames of each clip are there too, encoded
      alone, for m = 1 to R.
    """

    fps: int
    size: tuple[int, int]
    frames: int
    latent: tuple[int, int, int, int]
    overlap: int
    clips: int
    tails: int

    @property
    def stride(self) -> int:
        """New latent frames per clip."""
        return self.latent[0] - self.overlap


@dataclass(frozen=True)
class Head:
    """What a dataset is of.

    model: its name, for people.  vae: the hash of the autoencoder.  text: {"kind": "ids", "length",
      "vocabulary"}, token ids for a text encoder that is trained with the rest; or {"kind": "rows",
      "dim", "encoder"}, rows of an encoder with that hash, None where it has none.
    """

    model: str
    vae: str
    text: dict
    layout: Layout


class Text(NamedTuple):
    """A prompt.  rows: token ids int32 [M], or float16 [its tokens, D].  feature: float32 [E], what
    clip selection compares.
    """

    rows: np.ndarray
    feature: np.ndarray


class Sample(NamedTuple):
    """Consecutive clips of a video.

    first: the number of the first in the video.  prompts: each clip's.  least: the fewest latent
      frames that each must be given, because another prompt may rule them.
    latents: float16 [T, h, w, z] each.  tails: float16 [R (R + 1) / 2, h, w, z] each, the m latent
      frames of row m = 1 to R one after another.
    """

    first: int
    prompts: list[str]
    least: list[int]
    latents: list[np.ndarray]
    tails: list[np.ndarray]


def array_name(kind: str, index: int) -> str:
    """The name of an array in a file of samples or texts."""
    return f"{kind}/{index:06d}"


def sample_path(folder, name: str) -> Path:
    """The file of a sample."""
    return Path(folder, SAMPLES, f"{name}.safetensors")


def read_head(folder) -> Head:
    """Raises: CheckpointError when there is no dataset, or its head is damaged or of another
    version.
    """
    path = Path(folder, HEAD)
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no dataset of latents; make one with `lvjax encode --videos`"
        )
    try:
        content = unsealed(path)
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{path} is of the format {shown(content['format'])}, this version reads {FORMAT}; "
                "encode the videos again"
            )
        layout = {k: tuple(v) if type(v) is list else v for k, v in content["layout"].items()}
        return Head(content["model"], content["vae"], content["text"], Layout(**layout))
    except BAD as e:
        raise CheckpointError(f"{path} is damaged ({type(e).__name__}); restore it") from e


def text_places(folder) -> dict[str, tuple[Path, int]]:
    """Where each prompt is: its file, and its number there.

    Raises: CheckpointError when a file is damaged.
    """
    found = {}
    for path in sorted(Path(folder, TEXTS).glob("*.safetensors")):
        prompts = open_arrays(path).meta.get("prompts", [])
        found |= {text: (path, i) for i, text in enumerate(prompts)}
    return found


@dataclass(frozen=True)
class Latents:
    """A dataset that is complete; nothing of it is held but names and counts.

    identity: sha256 of the head and of what videos.jsonl says of each video, in any order: another
      for other videos, captions or cuts.
    samples: their names, in order.  clips: int64 [S], of each.  rows: of the longest prompt.
    """

    folder: Path
    head: Head
    samples: tuple[str, ...]
    clips: np.ndarray
    texts: dict[str, tuple[Path, int]]
    rows: int
    identity: str

    def text(self, prompt: str) -> Text:
        """A prompt, its rows padded with zeros to those of the longest.

        Raises: CheckpointError when it is not there, or damaged.
        """
        if prompt not in self.texts:
            raise CheckpointError(
                f"{self.folder} has no text of the prompt {shown(prompt)}; encode it again"
            )
        path, index = self.texts[prompt]
        stored = open_arrays(path)
        rows, feature = (stored[array_name(kind, index)] for kind in ("rows", "feature"))
        behind = self.rows - len(rows)
        return Text(np.pad(rows, ((0, behind), *((0, 0),) * (rows.ndim - 1))), feature)

    def read(self, name: str, clips: range, tails: bool) -> Sample:
        """These clips of a sample; without their tails, if so asked.

        Raises: CheckpointError naming the file, and what is damaged in it.
        """
        path = sample_path(self.folder, name)
        stored = open_arrays(path)
        try:
            first, prompts, least = (stored.meta[k] for k in ("first", "prompts", "least"))
            kinds = ("latents", "tails") if tails else ("latents",)
            found = {kind: [stored[array_name(kind, i)] for i in clips] for kind in kinds}
            return Sample(
                first + clips.start,
                [prompts[i] for i in clips],
                [least[i] for i in clips],
                found["latents"],
                found.get("tails", []),
            )
        except BAD as e:
            raise CheckpointError(f"{path} is no sample of latents; restore it") from e


def open_latents(folder) -> Latents:
    """Open a dataset that `lvjax encode --videos` wrote; no latents are read.

    Raises: CheckpointError when there is none, it is not finished, or damaged.
    """
    folder = Path(folder)
    head, path = read_head(folder), folder / COMPLETE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not finished; the `lvjax encode` that began it goes on where it stopped"
        )
    try:
        content = unsealed(path)
        index = (folder / VIDEOS).read_bytes()
        if hashlib.sha256(index).hexdigest() != content["index"]:
            raise CheckpointError(f"{folder / VIDEOS} is not as it was written; restore it")
        lines = [json.loads(line) for line in index.splitlines()]
        samples = dict(sorted((name, n) for line in lines for name, n in line["samples"]))
    except BAD as e:
        raise CheckpointError(f"{folder} is damaged ({type(e).__name__}); restore it") from e
    texts = text_places(folder)
    if NULL not in texts:
        raise CheckpointError(f"{folder / TEXTS} lacks the null prompt; restore it")
    longest = max(_longest(path) for path in sorted({path for path, _ in texts.values()}))
    clips = np.fromiter(samples.values(), np.int64, len(samples))
    about = json.dumps(dataclasses.asdict(head), sort_keys=True).encode()
    identity = hashlib.sha256(b"\n".join([about, *sorted(index.splitlines())])).hexdigest()
    return Latents(folder, head, tuple(samples), clips, texts, longest, identity)


def _longest(path: Path) -> int:
    slots = open_arrays(path).slots
    return max(slot.shape[0] for name, slot in slots.items() if name.startswith("rows/"))
