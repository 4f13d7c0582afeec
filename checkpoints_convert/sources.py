# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints a path means: one, or the parts of a model as its publishers lay them out.

A folder is searched two levels deep, which covers the official repositories (weights of all parts
side by side, the experts of Wan 2.2 in a folder each) and those of diffusers.  Each file is
recognised by what is in it; a name is looked at only to tell the two experts apart, which are equal
in everything else.  A file that is whole and of something else is left out; one that is damaged is
not, as a model without one of its parts is another model.
"""

from pathlib import Path
from typing import NamedTuple

from checkpoints_convert.read import open_checkpoint
from checkpoints_convert.recognise import KINDS, Model, StrangerError, check_together, recognise
from lvjax.core.errors import CheckpointError
from lvjax.models.parts import PARTS

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
INDEX = ".index.json"
DEPTH = 2
EXPERTS = (("low", "low_noise"), ("low", "transformer_2"), ("high", "high_noise"))


class Source(NamedTuple):
    """A checkpoint and the part that it is: one of `PARTS`, of models/parts.py."""

    part: str
    path: Path
    model: Model


def checkpoints(folder: Path, depth: int = DEPTH) -> list[Path]:
    """Every checkpoint in a folder: an index stands for its shards.

    Raises: CheckpointError for a folder that cannot be read.
    """
    try:
        inside = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as e:
        raise CheckpointError(f"cannot read {folder}: {e.strerror or e}; give another") from e
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
    Raises: CheckpointError when there is none, two of a kind, one expert of two, or parts of two
      models; and for a file that cannot be read, unless the one that is asked for is there.
    """
    if not src.is_dir():
        model = _open(src, weights)
        if part not in (None, model.kind) and (part, model.kind) != ("dit_low", "dit"):
            raise CheckpointError(f"{src} is {KINDS[model.kind].title}; leave --part {part} out")
        return [Source(part or model.kind, src, model)], []
    if weights is not None:
        raise CheckpointError(f"{src} is a folder; name the file that has the weights {weights!r}")
    found, left = _search(src, part)
    dit = found.get("dit")
    high = dit is not None and _expert(dit.path.relative_to(src)) == "high"
    if part == "dit_low" and found.keys() == {"dit"} and not high:
        found[part] = dit._replace(part=part)  # its own folder was given
    chosen = [found[p] for p in PARTS if p in found and part in (None, p)]
    if not chosen:
        what = "no part of a Wan model" if part is None else f"no part {part!r}"
        why = f"; {left[0]}" if left else ""
        raise CheckpointError(f"{src} holds {what}{why}; give a checkpoint or a model's folder")
    if part is None:
        low = "dit_low" in found
        if (low and dit is None) or (high and not low):
            raise CheckpointError(
                f"{src} holds one expert of two; give the other one too, or name this one with "
                "--part"
            )
        check_together({s.part: s.model.cfg for s in chosen})
    return chosen, [f"left out: {line}" for line in left]


def _search(src: Path, part: str | None) -> tuple[dict[str, Source], list[str]]:
    """What is in a folder by part, and why the rest is left out; as `find_sources`."""
    found: dict[str, Source] = {}
    damaged, others = [], []
    for path in checkpoints(src):
        try:
            model = _open(path, None)
        except StrangerError as e:
            others.append(str(e))
            continue
        except CheckpointError as e:
            if part is None:
                raise
            damaged.append(str(e))
            continue
        low = model.kind == "dit" and _expert(path.relative_to(src)) == "low"
        name = "dit_low" if low else model.kind
        if name in found and part in (None, name):
            one, other = found[name].path.relative_to(src), path.relative_to(src)
            raise CheckpointError(
                f"{src} holds {KINDS[model.kind].title} twice ({one}, {other}); name one of them"
            )
        found[name] = Source(name, path, model)
    return found, damaged + others


def _open(path: Path, weights: str | None) -> Model:
    tensors, config = open_checkpoint(path, weights)
    return recognise(tensors, config, str(path))


def _expert(path: Path) -> str | None:
    """Which expert of Wan 2.2 a path inside a model's folder names."""
    words = path.as_posix().lower()
    return next((name for name, word in EXPERTS if word in words), None)
