# SPDX-License-Identifier: Apache-2.0
"""Writing a dataset of latents piece by piece: what is finished stays, whatever happens next.

The format is that of latents.py.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lvjax.core.checkpoint import save_arrays, sealed, write_atomic
from lvjax.core.errors import CheckpointError, InputError, shown, storing
from lvjax.data.captioned import Skipped, Source
from lvjax.data.latents import (
    BAD,
    COMPLETE,
    FORMAT,
    HEAD,
    SAMPLES,
    SKIPPED,
    TEXTS,
    VIDEOS,
    Head,
    Layout,
    Sample,
    Text,
    array_name,
    read_head,
    sample_path,
    text_places,
)

FEW = 3  # videos named in a line

Written = list[tuple[str, int]]
"""The samples of a video: (name, clips) of each."""


class LatentWriter:
    """A dataset being written.  What an earlier run with the same head wrote stays, that of videos
    which are gone by now too.

    texts: the prompts that are there.
    Raises: InputError when `folder` holds a dataset with another head, or something else;
      StorageError when it cannot be written; CheckpointError when what is there is damaged.
    """

    def __init__(self, folder, head: Head):
        self.folder = Path(folder)
        with storing(self.folder):
            if (self.folder / HEAD).exists():
                _check_same(read_head(folder), head, self.folder)
            else:
                _check_empty(self.folder)
                self.folder.mkdir(parents=True, exist_ok=True)
                made = dataclasses.asdict(head) | {"format": FORMAT}
                write_atomic(self.folder / HEAD, sealed(made))
            for name in (SAMPLES, TEXTS):
                (self.folder / name).mkdir(exist_ok=True)
            (self.folder / COMPLETE).unlink(missing_ok=True)
        self.texts = set(text_places(self.folder))
        self._lines = _whole_lines(self.folder / VIDEOS)
        self._write_lines()

    def put_texts(self, texts: dict[str, Text]) -> None:
        """Write some prompts, into a file of their own."""
        number = len(list((self.folder / TEXTS).glob("*.safetensors")))
        arrays = {}
        for i, text in enumerate(texts.values()):
            arrays |= {array_name("rows", i): text.rows, array_name("feature", i): text.feature}
        path = self.folder / TEXTS / f"{number:06d}.safetensors"
        save_arrays(path, arrays, {"prompts": list(texts)})
        self.texts |= set(texts)

    def has(self, source: Source) -> bool:
        """Whether a video is done as it is now, by its size in bytes and its captions; what is
        there of it from before a change is removed.

        Raises: InputError when it is gone.
        """
        line = self._lines.get(source.name)
        if line is None:
            return False
        if _is_of(line, source):
            return True
        del self._lines[source.name]
        self._write_lines()
        self.drop(line["samples"])
        return False

    def put_sample(self, source: Source, number: int, sample: Sample) -> tuple[str, int]:
        """Write sample `number` of a video, at once or not at all; returns (name, clips)."""
        own = hashlib.sha256(source.name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        name = f"{own}-{number:06d}"
        arrays = {array_name("latents", i): a for i, a in enumerate(sample.latents)}
        arrays |= {array_name("tails", i): a for i, a in enumerate(sample.tails)}
        meta = {k: getattr(sample, k) for k in ("first", "prompts", "least")}
        save_arrays(sample_path(self.folder, name), arrays, meta | {"video": source.name})
        return name, len(sample.latents)

    def finish(self, source: Source, samples: Written) -> None:
        """A video is done."""
        size, timeline = _state(source)
        line = {"video": source.name, "bytes": size, "timeline": timeline, "samples": samples}
        self._lines[source.name] = line
        with storing(self.folder / VIDEOS), open(self.folder / VIDEOS, "a") as f:
            f.write(json.dumps(line) + "\n")

    def drop(self, samples: Written) -> None:
        """Remove the samples of a video that is not to be used."""
        with storing(self.folder):
            for name, _ in samples:
                sample_path(self.folder, name).unlink(missing_ok=True)

    def complete(self, skipped: list[Skipped]) -> dict[str, int]:
        """The last call: how many {"videos", "samples", "clips", "skipped"} there are.  What is
        there of a video that cannot be used any more is removed, and what kills left.

        Raises: CheckpointError when no video can be used.
        """
        lines = "".join(json.dumps(s._asdict()) + "\n" for s in skipped)
        write_atomic(self.folder / SKIPPED, lines.encode())
        for video, _ in skipped:
            self._lines.pop(video, None)
        self._write_lines()
        self._sweep()
        clips = [n for line in self._lines.values() for _, n in line["samples"]]
        if not clips:
            raise CheckpointError(
                f"no video can be used: {skipped_words(skipped)}; {self.folder / SKIPPED} lists "
                "them: give others"
            )
        index = hashlib.sha256((self.folder / VIDEOS).read_bytes()).hexdigest()
        counts = {"videos": len(self._lines), "samples": len(clips), "clips": sum(clips)}
        counts["skipped"] = len(skipped)
        write_atomic(self.folder / COMPLETE, sealed(counts | {"index": index}))
        return counts

    def _sweep(self) -> None:
        """Remove samples of no video."""
        known = {
            f"{name}.safetensors" for line in self._lines.values() for name, _ in line["samples"]
        }
        with storing(self.folder):
            for path in (self.folder / SAMPLES).iterdir():
                if path.suffix in (".safetensors", ".tmp") and path.name not in known:
                    path.unlink()

    def _write_lines(self) -> None:
        lines = "".join(json.dumps(line) + "\n" for line in self._lines.values())
        write_atomic(self.folder / VIDEOS, lines.encode())


def finished(folder, videos: Iterable[Source]) -> set[str]:
    """The names of the videos that are done in a dataset, as `LatentWriter.has` finds them; nothing
    is changed.

    Raises: CheckpointError when what is there is damaged.
    """
    lines, found = _whole_lines(Path(folder, VIDEOS)), set()
    for video in videos:
        with suppress(InputError):  # it is gone: has it been done or not, nothing can be
            if video.name in lines and _is_of(lines[video.name], video):
                found.add(video.name)
    return found


def skipped_words(skipped: list[Skipped]) -> str:
    """The first few videos that are left out, with the reasons."""
    few = "; ".join(f"{s.video}: {s.reason}" for s in skipped[:FEW])
    return few + (f"; and {len(skipped) - FEW} more" if len(skipped) > FEW else "")


def _check_empty(folder: Path) -> None:
    """Raises: InputError when something is there, the hidden lock of a run aside."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is no folder; choose another --out")
    there = sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))
    if there:
        raise InputError(
            f"{folder} holds {shown(there[0])} and is no dataset of latents; choose another --out"
        )


def _check_same(there: Head, wanted: Head, folder: Path) -> None:
    """Raises: InputError naming the first thing in which two heads differ."""
    for name, what in (("vae", "autoencoder"), ("text", "text encoder")):
        if getattr(there, name) != getattr(wanted, name):
            raise InputError(
                f"{folder} was begun with another {what}; give the same model, or another --out"
            )
    for field in dataclasses.fields(Layout):
        a, b = (getattr(head.layout, field.name) for head in (there, wanted))
        if a != b:
            raise InputError(
                f"{folder} was begun with {field.name} {a}, now it is {b}; give the same settings, "
                "or another --out"
            )


def _state(source: Source) -> list:
    """What a video is encoded from, as JSON has it: its size in bytes, and its captions.

    Raises: InputError when it is gone.
    """
    try:
        size = source.path.stat().st_size
    except OSError as e:
        raise InputError(f"cannot read {source.path}: {e.strerror or e}") from e
    return [size, [[t, text] for t, text in source.timeline]]


def _is_of(line: dict, source: Source) -> bool:
    """Whether a line is of a video as it is now.  Raises: InputError when that is gone."""
    return [line["bytes"], line["timeline"]] == _state(source)


def _whole_lines(path: Path) -> dict[str, dict]:
    """The lines of an index by video; one that a kill has cut short is left out.

    Raises: CheckpointError for a line that is damaged.
    """
    if not path.exists():
        return {}
    text = path.read_bytes()
    try:
        lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
        if any(line.keys() != {"video", "bytes", "timeline", "samples"} for line in lines):
            raise ValueError("a line of another kind")
        return {line["video"]: line for line in lines}
    except BAD as e:
        raise CheckpointError(f"{path} is damaged; remove {path.parent} and encode again") from e
