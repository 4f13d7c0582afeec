# SPDX-License-Identifier: Apache-2.0
"""What a LoRA file is, from the names and shapes of its arrays: for people, before it is used.

Does not own: reading it for a model (lora.py), which refuses what does not fit.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from checkpoints_convert.keys_lora import Part, find_part, names_of, refuse_others
from checkpoints_convert.sizes import Shapes
from lvjax.core.errors import CheckpointError
from lvjax.models.config import WAN_FLF2V_14B, DiTConfig

WIDE = {  # weights whose inputs (A), or outputs (B), are as wide as the transformer
    "a": ("blocks/self_attn/", "blocks/cross_attn/q", "blocks/cross_attn/o", "blocks/ffn/fc1"),
    "b": ("blocks/self_attn/", "blocks/cross_attn/", "blocks/ffn/fc2"),
}
ALL = WAN_FLF2V_14B  # the names of its arrays are those of every other Wan too


class LoraFacts(NamedTuple):
    """family: the way of naming, in words.  modules: how many weights have a low-rank product.
    ranks: of these, each once.  differences: arrays that are added as they are.
    layers: up to the last block that is changed.  width: of the transformer, None when no array
      tells it.
    models: which of the transformers asked about it fits.  unused: arrays that belong to none.
    """

    family: str
    modules: int
    ranks: tuple[int, ...]
    differences: int
    layers: int
    width: int | None
    models: tuple[str, ...]
    unused: int


def lora_facts(shapes: Shapes, models: Mapping[str, DiTConfig], name: str) -> LoraFacts:
    """What the arrays of a LoRA say.  models: transformers by name, to find which it fits.

    Raises: CheckpointError for other kinds of adapters, and when nothing belongs to a Wan.
    """
    refuse_others(shapes, name)
    parts = {key: part for key in shapes if (part := find_part(key, names_of(ALL))) is not None}
    if not parts:
        raise CheckpointError(
            f"{name} is a LoRA of something else: none of its {len(shapes)} arrays belongs to a "
            "transformer of Wan's"
        )
    if flat := [key for key, part in parts.items() if part.kind in ("a", "b") and not shapes[key]]:
        raise CheckpointError(f"{name}: {flat[0]!r} is a number, not a matrix; download it again")
    ranks = {key: shapes[key][0] for key, part in parts.items() if part.kind == "a"}
    layers = [1 + part.anchor[1] for part in parts.values() if part.anchor[1] is not None]
    return LoraFacts(
        _family(parts),
        len(ranks),
        tuple(sorted(set(ranks.values()))),
        sum(part.kind in ("diff", "diff_b", "b_bias") for part in parts.values()),
        max(layers, default=0),
        _width(shapes, parts),
        tuple(model for model, cfg in models.items() if _fits(shapes, parts, cfg)),
        len(shapes) - len(parts),
    )


def _family(parts: Mapping[str, Part]) -> str:
    if any(key.startswith(("lora_unet_", "lora_transformer_")) for key in parts):
        return "kohya's names"
    diffusers = any(".attn1." in key or ".attn2." in key for key in parts)
    return "diffusers' names" if diffusers else "official names"


def _width(shapes: Shapes, parts: Mapping[str, Part]) -> int | None:
    """What the projections in the blocks lead from and to."""
    for key, part in parts.items():
        known = WIDE.get(part.kind, ())
        if len(shapes[key]) == 2 and part.anchor[0].startswith(known):
            return shapes[key][part.kind == "a"]
    return None


def _fits(shapes: Shapes, parts: Mapping[str, Part], cfg: DiTConfig) -> bool:
    """Whether every array has a place of its shape in a transformer."""
    for key in parts:
        part, size = find_part(key, names_of(cfg)), math.prod(shapes[key])
        if part is None:
            return False
        wanted = [target.shape for target in part.targets]
        if part.kind == "a":
            right = any(size == shapes[key][0] * math.prod(shape[1:]) for shape in wanted)
        elif part.kind == "b":
            right = any(shapes[key][0] == shape[0] for shape in wanted)
        else:
            right = part.kind == "alpha" or any(size == math.prod(shape) for shape in wanted)
        if not right:
            return False
    return True
