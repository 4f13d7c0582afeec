# SPDX-License-Identifier: Apache-2.0
"""LoRAs as they are asked for, opened, and named in a run card.

Owns: what a user may write for a LoRA, `Adapter`, its identity, its lines in a card, its bytes.
Does not own: the files (checkpoints_convert/lora_file.py), what it is put into (loras.py).
"""

import hashlib
import json
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from checkpoints_convert.lora_file import LoraFile, open_lora, read_parts
from lvjax.core.errors import CheckpointError, InputError, shown, some_of
from lvjax.models.config import DiTConfig
from lvjax.models.lora import Lora, Loras
from lvjax.models.parts import EXPERTS
from lvjax.run.card import file_hash


class Asked(NamedTuple):
    """A LoRA that is asked for.  path: of a file, or of a folder with one.  strength: 0 is off, 1
    as trained.  expert: "high" or "low" noise, None for all that the model has.
    """

    path: Path
    strength: float = 1.0
    expert: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA, read for a model.

    path: absolute.  sha256: of its file; where there are several, of their hashes.
    strength, expert: see `Asked`.  parts: the adapters by part of the model.
    arrays: how many the file has.
    """

    path: Path
    sha256: str
    strength: float
    expert: str | None
    arrays: int
    parts: Mapping[str, Lora] = field(repr=False, compare=False)

    @property
    def identity(self) -> list:
        """What it does to a model: the file, the strength, the expert."""
        return [self.sha256, self.strength, self.expert]

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Names in the file that the model has no place for."""
        return tuple(sorted({name for lora in self.parts.values() for name in lora.unmatched}))

    @property
    def notice(self) -> str | None:
        """What the user should know of it."""
        if not (left := self.unmatched):
            return None
        return (
            f"the LoRA {self.path.name} has no place in this model for {len(left)} of its "
            f"{self.arrays} arrays, which are left out: {some_of(left)}"
        )


def as_asked(given) -> tuple[Asked, ...]:
    """LoRAs as Python asks for them: a path, (path, strength), (path, strength, expert), or a list
    of these; None for none.

    Raises: InputError.
    """
    if given is None:
        return ()
    return tuple(map(_one, given)) if isinstance(given, list) else (_one(given),)


def _one(given) -> Asked:
    path, *rest = given if isinstance(given, tuple) and given else (given,)
    wrong = not isinstance(path, (str, Path)) or not str(path) or "\0" in str(path)
    if wrong or len(rest) > 2:
        raise InputError(
            f"a LoRA is {shown(given)}; give a path, (path, strength), (path, strength, 'high' or "
            "'low'), or a list of these"
        )
    strength, expert = (*rest, *(1.0, None)[len(rest) :])
    return Asked(Path(path), as_strength(strength), expert)


def as_strength(given) -> float:
    """Raises: InputError unless it is one finite number, of Python, NumPy or JAX."""
    scalar = getattr(given, "shape", None) == () and jnp.issubdtype(given.dtype, jnp.number)
    number = given.item() if scalar else given
    try:
        real = isinstance(number, numbers.Real) and not isinstance(number, bool)
        if real and math.isfinite(number):
            return float(number)
    except OverflowError:  # a whole number beyond those with a point
        pass
    what = f"the strength of a LoRA is {shown(given)}"
    raise InputError(f"{what}; give one finite number, 1 is as trained")


def parse(text: str) -> Asked:
    """A LoRA as the command line asks for it: [high:|low:]PATH[=STRENGTH].  A path may have "=" in
    it, if something lies there.

    Raises: InputError for a strength that is no number, or where no path is left.
    """
    expert, colon, rest = text.partition(":")
    expert, rest = (expert, rest) if colon and expert in EXPERTS else (None, text)
    path, equals, number = rest.rpartition("=")
    if not equals or os.path.lexists(rest):
        path, number = rest, "1"
    try:
        strength = as_strength(float(number.replace("_", "?")))  # 1_0 would be ten
    except ValueError as e:  # InputError is one
        what = f"--lora {text!r}: the strength is {number!r}"
        raise InputError(f"{what}; write PATH=STRENGTH with a number, for example 0.8") from e
    if not path or "\0" in path:
        raise InputError(f"--lora {text!r} has no path; write PATH or PATH=STRENGTH")
    return Asked(Path(path), strength, expert)


def open_adapter(asked: Asked, cfg: DiTConfig, experts: tuple[str, ...]) -> Adapter:
    """Read a LoRA for a model with this transformer and these parts that are one.

    Raises: CheckpointError when it is missing, damaged, of another model, or of a kind that cannot
      be used; InputError for an expert that the model does not have.
    """
    file = open_lora(asked.path)
    parts = read_parts(file, cfg, experts, asked.expert)
    path = Path(os.path.abspath(asked.path))
    return Adapter(path, _sha256(file), asked.strength, asked.expert, len(file.tensors), parts)


def content(path) -> str:
    """The sha256 of a LoRA that is not read.

    Raises: CheckpointError when it is missing or damaged.
    """
    return _sha256(open_lora(path))


def _sha256(file: LoraFile) -> str:
    sums = list(map(file_hash, file.files))
    return sums[0] if len(sums) == 1 else _digest(sums)


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def hashes(adapters: Iterable[Adapter], merged: bool) -> dict[str, str]:
    """An entry for each LoRA beside the hashes of a model's parts: of its file, its strength, where
    it goes, and whether it is merged, which rounds otherwise.
    """
    each = enumerate(adapters, 1)
    return {f"lora {i}": _digest([*adapter.identity, merged]) for i, adapter in each}


def by_part(adapters: Iterable[Adapter]) -> dict[str, Loras]:
    """For each part that is changed, its adapters and their strengths, in order."""
    found: dict[str, list] = {}
    for adapter in adapters:
        for part, lora in adapter.parts.items():
            found.setdefault(part, []).append((lora, adapter.strength))
    return found


# ---- in a card ---------------------------------------------------------------------


def for_card(adapters: Iterable[Adapter], merged: bool) -> dict[str, Any]:
    """The LoRAs of a run as options of its card."""
    names = ("sha256", "strength", "expert")
    entries = [
        {"path": str(adapter.path)} | {name: getattr(adapter, name) for name in names}
        for adapter in adapters
    ]
    return {"lora": entries, "merge_lora": merged}


def of_card(options: Mapping[str, Any]) -> tuple[list[tuple[Asked, str]], bool]:
    """The LoRAs that the options of a card ask for, each with its sha256, and whether they are
    merged; older cards ask for none.

    Raises: CheckpointError when they are not of this version.
    """
    found, merged, made = options.get("lora", []), options.get("merge_lora", False), []
    try:
        for entry in found:
            asked = _one((entry["path"], entry["strength"], entry["expert"]))
            if asked.expert not in (None, *EXPERTS) or not isinstance(entry["sha256"], str):
                raise TypeError(f"expert {asked.expert!r}, sha256 {entry['sha256']!r}")
            made.append((asked, entry["sha256"]))
        if not isinstance(merged, bool):
            raise TypeError(f"merge_lora is {merged!r}")
    except (KeyError, TypeError, InputError) as e:
        what = f"no {e}" if isinstance(e, KeyError) else e
        raise CheckpointError(
            f"the LoRAs in the run card cannot be read ({what}); start again with the settings "
            "written out"
        ) from e
    return made, merged


# ---- memory ------------------------------------------------------------------------


def beside_bytes(loras: Loras, leaves: Mapping[str, tuple[tuple[int, ...], int]]) -> int:
    """Bytes of LoRAs kept beside the weights of one part, and of the copies that differences need.

    leaves: by path, the shape and the bytes of an element.  At most: ranks are those of the layer
    where each LoRA has the largest.
    """
    total = sum(_copy_bytes(leaves, {c.path for lora, _ in loras for c in lora.deltas}))
    for lora, _ in loras:
        ranks: dict[str, int] = {}
        for c in lora.low_rank:
            ranks[c.path] = max(ranks.get(c.path, 0), c.a.shape[1])
        for path, rank in ranks.items():
            shape, width = leaves[path]
            layers = math.prod(shape[:-2])
            total += layers * rank * (sum(shape[-2:]) * width + 4)  # the scale is float32
    return total


def merged_bytes(loras: Loras, leaves: Mapping[str, tuple[tuple[int, ...], int]]) -> int:
    """Bytes of the weights of one part that LoRAs change."""
    changes = (c for lora, _ in loras for c in (*lora.low_rank, *lora.deltas))
    return sum(_copy_bytes(leaves, {c.path for c in changes}))


def _copy_bytes(leaves, paths: Iterable[str]) -> Iterable[int]:
    return (math.prod(leaves[path][0]) * leaves[path][1] for path in paths)
