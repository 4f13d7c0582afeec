# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints a path means: one, or the parts of a model as its publishers lay them out.

A folder is searched two levels deep, which covers the official repositories (weights of all parts
side by side, the experts of Wan 2.2 in a folder each) and those of diffusers.  Each file is
recognised by what is in it; a name is looked at only to tell the two experts apart, which are equal
in everything else.  A file that is whole and of something else is left out; one that is damaged is
not, as a model without one of its parts is another model.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from checkpoints_convert.read import open_checkpoint, read_json
from checkpoints_convert.recognise import KINDS, Model, StrangerError, check_together, recognise
from lvjax.core.errors import CheckpointError
from lvjax.models.parts import EXPERTS, PARTS

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
INDEX = ".index.json"
DEPTH = 2
WORDS = {"low_noise": "low", "transformer_2": "low", "high_noise": "high"}  # in names of files


class Source(NamedTuple):
    """A checkpoint and the part that it is: one of `PARTS`, of models/parts.py.

    expert: "high" or "low" noise where a name has told that, not the arrays and not the user.
    """

    part: str
    path: Path
    model: Model
    expert: str | None = None


def checkpoints(folder: Path, depth: int = DEPTH) -> list[Path]:
    """Every checkpoint in a folder: an index stands for its shards.

    Raises: CheckpointError for a folder that cannot be read.
    """
    try:
        inside = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as e:
        raise CheckpointError(f"cannot read {folder}: {e.strerror or e}; give another") from e
    found = [p for p in inside if p.name.endswith(INDEX) and p.is_file()]
    shards = set().union(*map(_shards, found))
    for p in inside:
        if p.suffix in SUFFIXES and not p.is_dir() and p.name not in shards:
            found.append(p)
    for p in inside:
        if p.is_dir() and depth:
            found += checkpoints(p, depth - 1)
    return found


def _shards(index: Path) -> set[str]:
    """The files that an index names; none of a damaged one, which says so when it is opened."""
    try:
        files = read_json(index).get("weight_map")
    except CheckpointError:
        return set()
    return {f for f in files.values() if isinstance(f, str)} if isinstance(files, dict) else set()


def find_sources(
    src: Path, part: str | None = None, weights: str | None = None
) -> tuple[list[Source], list[str]]:
    """The parts at `src`, in the order of `PARTS`, and lines on what was left out.

    part: only this one; of a transformer by itself, the expert that it is, whatever its names say.
    weights: which of several sets of weights a .pt file is asked for.
    Raises: CheckpointError when there is none, two of a kind, one expert of two, or parts of two
      models; and for a file that cannot be read, unless the one that is asked for is there.
    """
    if not src.is_dir():
        model = _open(src, weights)
        if part not in (None, model.kind) and (part, model.kind) != ("dit_low", "dit"):
            raise CheckpointError(f"{src} is {KINDS[model.kind].title}; leave --part {part} out")
        return [_alone(Source(model.kind, src, model), _names(src)[-2:], part)], []
    if weights is not None:
        raise CheckpointError(f"{src} is a folder; name the file that has the weights {weights!r}")
    found, left = _search(src, part)
    one_of_two = False
    if len(experts := found.keys() & EXPERTS.values()) == 1:
        alone = len(found) == 1  # then SRC may be an expert's own folder
        own, source = _names(src)[-1:] if alone else (), found.pop(*experts)
        one_of_two = source.expert is not None and source.expert != _expert(own)
        if alone and not one_of_two:
            source = _alone(source, own, part)
        found[source.part] = source
    chosen = [found[p] for p in PARTS if p in found and part in (None, p)]
    if not chosen:
        what = "no part of a Wan model" if part is None else f"no part {part!r}"
        why = f"; {left[0]}" if left else ""
        raise CheckpointError(f"{src} holds {what}{why}; give a checkpoint or a model's folder")
    if part is None:
        if one_of_two:
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
        expert = _expert(path.relative_to(src).parts) if model.kind == "dit" else None
        name = EXPERTS[expert] if expert else model.kind
        if name in found and part in (None, name):
            one, other = found[name].path.relative_to(src), path.relative_to(src)
            raise CheckpointError(
                f"{src} holds {KINDS[model.kind].title} twice ({one}, {other}); name one of them"
            )
        found[name] = Source(name, path, model, expert)
    return found, damaged + others


def _open(path: Path, weights: str | None) -> Model:
    tensors, config = open_checkpoint(path, weights)
    return recognise(tensors, config, str(path))


def _alone(source: Source, names: Sequence[str], part: str | None) -> Source:
    """A part by itself: of a transformer the expert that is asked for, or that its names tell."""
    if source.model.kind != "dit":
        return source
    if part in EXPERTS.values():
        return source._replace(part=part, expert=None)
    expert = _expert(names)
    return source._replace(part=EXPERTS.get(expert, "dit"), expert=expert)


def _names(src: Path) -> tuple[str, ...]:
    """The names on the way to a file or folder; of links, not of what they lead to."""
    return Path(os.path.abspath(src)).parts


def _expert(names: Sequence[str]) -> str | None:
    """Which expert of Wan 2.2 the last of these names is of that is of one."""
    said = (WORDS[word] for name in reversed(names) for word in WORDS if word in name.lower())
    return next(said, None)
