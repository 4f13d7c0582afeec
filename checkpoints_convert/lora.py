# SPDX-License-Identifier: Apache-2.0
"""LoRA files of every family, as adapters of one model.

Owns: `read_lora`: halves that belong together, their factor alpha / rank, shapes, what is refused.
Does not own: names (keys_lora.py), what is done with the adapters (lvjax/models/lora.py).
"""

import json
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from checkpoints_convert.keys_lora import Part, find_part, names_of, refuse_others
from lvjax.core.errors import CheckpointError, some_of
from lvjax.models.config import DiTConfig
from lvjax.models.lora import Delta, Lora, LowRank

METADATA = "lora_adapter_metadata"  # diffusers' entry in a safetensors header
Arrays = Mapping[str, np.ndarray]
Group = dict[str, tuple[str, Part]]  # the arrays of one weight: by kind, their key and what it is


class Settings(NamedTuple):
    """Of PEFT.  alpha: None for the rank.  patterns: alpha by the end of a module's name.
    root: whether the factor is alpha / sqrt(rank).
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = {}
    root: bool = False

    def scale(self, module: str, rank: int) -> float:
        """The factor of a module's product."""
        alpha = next((a for p, a in self.patterns.items() if _ends(module, p)), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.root else rank)


def _ends(module: str, pattern: str) -> bool:
    """Whether the last words of a module's name are `pattern`; all of it, after "^"."""
    return module == pattern.removeprefix("^") or module.endswith(f".{pattern}")


def read_lora(tensors: Arrays, config: Mapping, cfg: DiTConfig, name: str = "the LoRA") -> Lora:
    """The adapters in a LoRA file that belong to the model `cfg`; every family, told by its keys.

    tensors: the arrays of the file by name.  config: the metadata of its safetensors header, or the
      adapter_config.json beside it; {} without.  name: of the file, for errors.
    The factor is alpha / rank with the array `alpha` of a module, else with `lora_alpha` of
      `config`, else 1.  Differences (diff, diff_b, diff_m) have no factor.
    Returns: the adapters, with the keys that this model has no place for in `unmatched` (an image
      branch that it lacks, layers that it lacks, a text encoder): tell them to the user.
    Raises: CheckpointError when no key belongs to the model, a half is missing, shapes are those of
      another model, two arrays mean the same, arrays are not finite or no floats, or the file
      holds another kind of adapter (DoRA, LoHa, LoKr, OFT).
    """
    refuse_others(tensors, name)
    settings = read_settings(config, name)
    groups, unmatched = _groups(tensors, cfg, name)
    low_rank, deltas = [], []
    for group in groups.values():
        if {"a", "b", "b_bias"} & group.keys():
            low, bias = _product(tensors, group, settings, name)
            low_rank += low
            deltas += bias
        elif "alpha" in group:
            unmatched.append(group["alpha"][0])
        for kind in ("diff", "diff_b"):
            if kind in group:
                deltas += _deltas(tensors, *group[kind], 1.0, name)
    if not low_rank and not deltas:
        raise CheckpointError(
            f"{name}: none of its {len(tensors)} arrays belongs to this model "
            f"({some_of(map(repr, tensors))}); is it a LoRA of Wan's transformer?"
        )
    return Lora(tuple(low_rank), tuple(deltas), tuple(sorted(unmatched)))


def read_settings(config: Mapping, name: str) -> Settings:
    """What PEFT wrote beside the arrays, in a safetensors header or in adapter_config.json.

    Raises: CheckpointError for DoRA and for values that are not understood.
    """
    if METADATA in config:
        try:
            packed = json.loads(config[METADATA])
            config = {re.sub(r"^transformer(_2)?\.", "", key): v for key, v in packed.items()}
        except (TypeError, ValueError, RecursionError, AttributeError) as e:
            raise CheckpointError(f"{name}: its entry {METADATA} is damaged; download it") from e
    if config.get("use_dora"):
        refuse_others(["use_dora"], name)
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    try:
        patterns = {key: _number(value) for key, value in patterns.items()}
        if not all(re.fullmatch(r"\^?[\w.]+", key) for key in patterns):
            raise ValueError("a pattern is no module's name")
        alpha = None if alpha is None else _number(alpha)
    except (TypeError, ValueError, OverflowError, AttributeError) as e:
        what = "lora_alpha must be a number, alpha_pattern numbers by name of module"
        raise CheckpointError(f"{name}: {what} ({e}); correct its configuration") from e
    return Settings(alpha, patterns, bool(config.get("use_rslora")))


def _number(value) -> float:
    """Raises: TypeError, ValueError unless it is a finite number, or the text of one."""
    number = math.nan if isinstance(value, bool) else float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is no finite number")
    return number


def _groups(tensors: Arrays, cfg: DiTConfig, name: str) -> tuple[dict, list[str]]:
    """The arrays by the weight that they belong to, and the keys that have none here."""
    names, groups, unmatched = names_of(cfg), {}, []
    for key in sorted(tensors):
        part = find_part(key, names)
        if part is None:
            unmatched.append(key)
            continue
        group: Group = groups.setdefault(part.anchor, {})
        if part.kind in group:
            what = f"{name}: {group[part.kind][0]!r} and {key!r} mean the same array"
            raise CheckpointError(f"{what}; give a file with one LoRA for one model")
        group[part.kind] = key, part
    return groups, unmatched


def _array(tensors: Arrays, key: str, name: str) -> np.ndarray:
    """Raises: CheckpointError when it is empty, not finite or of a dtype that is no float."""
    array = tensors[key]
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise CheckpointError(f"{name}: {key!r} is {array.dtype}, not a float; give another file")
    if not array.size or not np.isfinite(array).all():
        state = "not finite" if array.size else "empty"
        raise CheckpointError(f"{name}: {key!r} is {state}; download it again from its source")
    return array


def _product(tensors: Arrays, group: Group, settings: Settings, name: str):
    """A pair of halves for each kernel that the weight is made of, and a bias.

    A convolution whose stride is its kernel is a matrix here, so its halves are like others.
    """
    for kind, missing in (("a", "A (down)"), ("b", "B (up)")):
        if kind not in group:
            key = next(group[k][0] for k in ("a", "b", "b_bias") if k in group)
            what = f"{name}: {key!r} is there without its {missing}"
            raise CheckpointError(f"{what}; download it again from its source")
    (key_a, part), (key_b, _) = group["a"], group["b"]
    a, b = _array(tensors, key_a, name), _array(tensors, key_b, name)
    what = f"{key_a!r} {list(a.shape)} and {key_b!r} {list(b.shape)}"
    rank = a.shape[0] if min(a.ndim, b.ndim) > 1 else 0
    if not rank or b.size != b.shape[0] * rank:
        raise CheckpointError(f"{name}: {what} have no rank in common; download it again")
    scale = _scale(tensors, group, rank, settings, name)
    bias = _deltas(tensors, *group["b_bias"], scale, name) if "b_bias" in group else []
    for target in part.targets:
        rows, columns = target.shape[0], math.prod(target.shape[1:])
        matrix = target.rule.targets[0].endswith("/kernel")
        if matrix and (a.size, b.shape[0]) == (rank * columns, rows):
            halves = target.rule.arrays(a.reshape(rank, *target.shape[1:]))
            b = b.reshape(rows, rank).T
            paths = zip(target.rule.targets, halves, strict=True)
            return [LowRank(path, target.layer, a, b, scale) for path, a in paths], bias
    raise _mismatch(what, part, name)


def _scale(tensors: Arrays, group: Group, rank: int, settings: Settings, name: str) -> float:
    """alpha / rank of a pair."""
    if "alpha" not in group:
        return settings.scale(group["a"][1].module, rank)
    key = group["alpha"][0]
    alpha = np.asarray(tensors[key])
    if alpha.size != 1 or not np.isfinite(alpha := alpha.astype(np.float32)).all():
        raise CheckpointError(f"{name}: {key!r} is no finite number; download it again")
    return float(alpha.item()) / rank


def _deltas(tensors: Arrays, key: str, part: Part, scale: float, name: str) -> list[Delta]:
    """What is added to each leaf that an array is made of."""
    array = _array(tensors, key, name)
    for target in part.targets:
        if array.size == math.prod(target.shape) and array.shape[:1] == target.shape[:1]:
            arrays = target.rule.arrays(array.reshape(target.shape))
            paths = zip(target.rule.targets, arrays, strict=True)
            return [Delta(path, target.layer, a, scale) for path, a in paths]
    raise _mismatch(f"{key!r} {list(array.shape)}", part, name)


def _mismatch(what: str, part: Part, name: str) -> CheckpointError:
    """An error that tells the shapes in the file and that of the model's array."""
    shapes = " or ".join(str(list(target.shape)) for target in part.targets)
    path, layer = part.targets[0].rule.targets[0], part.targets[0].layer
    where = path if layer is None else f"{path} (layer {layer})"
    return CheckpointError(
        f"{name}: {what} do not fit {where}, which is {shapes} in a checkpoint of this model; "
        "use a LoRA of this size and kind of model"
    )
