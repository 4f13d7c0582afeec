# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints a path means: one, or the parts of a model as its publishers lay them out.

A folder is searched two levels deep, which covers the official repositories (weights of all parts
side by side, the experts of Wan 2.2 in a folder each) and those of diffusers.  Each file is
recognised by what is in it; a name is looked at only to tell the two experts apart, which are equal
in everything else.
"""

from pathlib import Path
from typing import NamedTuple

from checkpoints_convert.read import open_checkpoint
from checkpoints_convert.recognise import KINDS, Model, recognise
from lvjax.core.errors import CheckpointError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
INDEX = ".index.json"
DEPTH = 2
LOW, HIGH = ("low_noise", "transformer_2"), ("high_noise", "transformer")
PARTS = ("dit", "dit_low", "vae", "text", "image")


class Source(NamedTuple):
    """A checkpoint and the part that it is: one of `PARTS`; "dit_low" is the second expert."""

    part: str
    path: Path
    model: Model


def checkpoints(folder: Path, depth: int = DEPTH) -> list[Path]:
    """Every checkpoint in a folder: an index stands for its shards."""
    inside = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    found = [p for p in inside if p.name.endswith(INDEX) and p.is_file()]
    stems = tuple(p.name.removesuffix(INDEX).rsplit(".", 1)[0] for p in found)
    for p in inside:
        shard = any(p.name.startswith(f"{stem}-") for stem in stems)
        if p.suffix in SUFFIXES and not p.is_dir() and not shard:
            found.append(p)
    for p in inside:
        if p.is_dir() and depth:
            found += checkpoints(p, depth - 1)
    return found


def find_sources(
    src: Path, part: str | None = None, weights: str | None = None
) -> tuple[list[Source], list[str]]:
    """The parts at `src`, in the order of `PARTS`, and lines on what was left out.

    part: only this one.  weights: which of several sets of weights a .pt file is asked for.
    Raises: CheckpointError when there is none, or two of a kind.
    """
    if not src.is_dir():
        model = _open(src, weights)
        if part not in (None, model.kind) and (part, model.kind) != ("dit_low", "dit"):
            raise CheckpointError(f"{src} is {KINDS[model.kind].title}; leave --part {part} out")
        return [Source(part or model.kind, src, model)], []
    if weights is not None:
        raise CheckpointError(f"{src} is a folder; name the file that has the weights {weights!r}")
    found: dict[str, Source] = {}
    left = []
    for path in checkpoints(src):
        try:
            model = _open(path, None)
        except CheckpointError as e:
            left.append(f"left out: {e}")
            continue
        name = model.kind
        if name == "dit" and _expert(path.relative_to(src)) == "low":
            name = "dit_low"
        if name in found:
            one, other = found[name].path.relative_to(src), path.relative_to(src)
            raise CheckpointError(
                f"{src} holds {KINDS[model.kind].title} twice ({one}, {other}); name one of them"
            )
        found[name] = Source(name, path, model)
    chosen = [found[p] for p in PARTS if p in found and part in (None, p)]
    if not chosen:
        what = "no part of a Wan model" if part is None else f"no part {part!r}"
        why = f"; {left[0]}" if left else ""
        raise CheckpointError(f"{src} holds {what}{why}; give a checkpoint or a model's folder")
    return chosen, left


def _open(path: Path, weights: str | None) -> Model:
    tensors, config = open_checkpoint(path, weights)
    return recognise(tensors, config, str(path))


def _expert(path: Path) -> str | None:
    """Which expert of Wan 2.2 a path inside a model's folder names."""
    words = [part.lower() for part in path.parts]
    low = any(w.startswith(LOW) for w in words)
    return "low" if low else "high" if any(w.startswith(HIGH) for w in words) else None
