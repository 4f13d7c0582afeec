# SPDX-License-Identifier: Apache-2.0
"""The adapters of a LoRA under one naming, whatever the file was that they were read from.

The names are the official ones with "diffusion_model." before them, as ComfyUI has them and
diffusers reads them too; factors other than 1 are arrays `alpha`, so that no half is changed by a
bit.
Sources: comfyanonymous/ComfyUI, comfy/lora.py; huggingface/diffusers,
src/diffusers/loaders/lora_conversion_utils.py.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from checkpoints_convert.keys_dit import dit_rules
from checkpoints_convert.keys_lora import Target, names_of
from checkpoints_convert.lora_file import EXPERT, KIND
from checkpoints_convert.rules import sources_of
from lvjax.core.checkpoint import save_arrays
from lvjax.core.errors import CheckpointError
from lvjax.models.config import DiTConfig
from lvjax.models.dit import dit_spec
from lvjax.models.lora import Delta, Lora, LowRank

PREFIX = "diffusion_model."


def lora_arrays(lora: Lora, cfg: DiTConfig) -> dict[str, np.ndarray]:
    """The arrays of a file with these adapters, by name.

    lora: as `read_lora` gave it for a model `cfg`.
    Products have `lora_down.weight`, `lora_up.weight` and, unless it is their rank, `alpha`;
    differences of weights and of other arrays have `diff`, those of biases `diff_b`.  Halves and
    differences keep their type, unless a difference had a factor.
    Raises: CheckpointError for what such a file cannot hold: two products for one weight, changes
      of something that the model does not have, or changes of only some weights, or different ones,
      where several are one array of a checkpoint.
    """
    known = names_of(cfg).arrays
    names = sources_of(dit_rules(cfg, "official"), dit_spec(cfg))
    low, deltas = _by_place(lora.low_rank), _by_place(lora.deltas)
    arrays = {}
    for name in names:
        for target in known[name]:
            places = [(path, target.layer) for path in target.rule.targets]
            if _is_one_product([low.get(place, ()) for place in places]):
                parts = [low.pop(place)[0] for place in places]
                arrays |= _product(PREFIX + name.removesuffix(".weight"), parts, target)
            if all(place in deltas for place in places):
                parts = [_sum(deltas.pop(place)) for place in places]
                arrays[PREFIX + _ending(name)] = target.rule.layout.inverse(*parts)
    if left := [*low, *deltas]:
        path, layer = left[0]
        where = path if layer is None else f"{path} (layer {layer})"
        raise CheckpointError(
            f"the LoRA changes {where} in a way that no LoRA file can hold ({len(left)} such "
            "changes); give one product for each weight, or merge it into the model"
        )
    return arrays


def write_lora(path: Path, arrays: Mapping[str, np.ndarray], expert: str | None = None) -> None:
    """A safetensors file, with checksums as in every other that lvjax writes.

    expert: the one of two that it is for, "high" or "low", which its names do not say; None for
      both.  Nothing else in it is a setting of the LoRA.
    Raises: StorageError.
    """
    save_arrays(path, dict(arrays), {KIND: "lora", EXPERT: expert})


def _is_one_product(found: list[Sequence[LowRank]]) -> bool:
    """Whether there is one product for each matrix of an array, with one B and factor for all."""
    if any(len(products) != 1 for products in found):
        return False
    first, *others = (product for (product,) in found)
    return all(p.scale == first.scale and np.array_equal(p.b, first.b) for p in others)


def _by_place(changes: Iterable[LowRank | Delta]) -> dict[tuple, list]:
    found = defaultdict(list)
    for change in changes:
        found[change.path, change.layer].append(change)
    return found


def _ending(name: str) -> str:
    """The name of the difference of an array."""
    if name.endswith(".bias"):
        return f"{name.removesuffix('.bias')}.diff_b"
    return f"{name.removesuffix('.weight')}.diff"


def _product(module: str, parts: list[LowRank], target: Target) -> dict[str, np.ndarray]:
    """The halves of one array of a checkpoint; of several matrices, B is the same."""
    down = target.rule.layout.inverse(*(part.a for part in parts))
    rank = parts[0].b.shape[0]
    up = parts[0].b.T.reshape(-1, rank, *(1,) * (down.ndim - 2))
    made = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    if parts[0].scale != 1:  # diffusers knows alpha in blocks only
        made[f"{module}.alpha"] = np.float32(parts[0].scale * rank)
    return made


def _sum(changes: list[Delta]) -> np.ndarray:
    """What is added to one array: a difference, or a bias of a product too."""
    if len(changes) == 1 and changes[0].scale == 1:
        return changes[0].array
    return sum(np.float32(c.scale) * c.array.astype(np.float32) for c in changes)
