# SPDX-License-Identifier: Apache-2.0
"""Names in LoRA files: which array of a Wan transformer they mean, and as what.

A key is wrappers, the name of a module (official or diffusers', with dots, or with underscores as
kohya writes it), and an ending that tells its part.  Modules are looked up among those of the
model; where the dots of an underscored name were is never guessed.  What FSDP and the like put into
names is taken off by read.py.
Sources: huggingface/diffusers, src/diffusers/loaders/lora_conversion_utils.py; huggingface/peft,
src/peft/utils/save_and_load.py; kohya-ss/musubi-tuner, networks/lora.py; ModelTC/LightX2V,
lightx2v/utils/lora_loader.py; comfyanonymous/ComfyUI, comfy/lora.py.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from checkpoints_convert.keys_dit import dit_rules
from checkpoints_convert.rules import LAYER, Rule, sources_of
from lvjax.core.errors import CheckpointError
from lvjax.core.params import flatten
from lvjax.models.config import DiTConfig
from lvjax.models.dit import dit_spec

_NAME = r"(?:\.(?!(?:weight|bias)$)[^.]+)?"  # PEFT may put the adapter's name there
_ENDINGS = {
    "a": rf"\.lora_(?:A|down){_NAME}(?:\.weight)?|[._]lora\.down\.weight",
    "b": rf"\.lora_(?:B|up){_NAME}(?:\.weight)?|[._]lora\.up\.weight",
    "b_bias": rf"\.lora_(?:B|up){_NAME}\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff|\.w_norm",
    "diff_b": r"\.diff_b|\.b_norm",
    "diff_m": r"\.diff_m",
}
_PARTS = {part: re.compile(rf"(.+?)(?:{ending})") for part, ending in _ENDINGS.items()}
_DORA = "DoRA, which also rescales the weights that it is added to"
_OTHERS = {  # what is no sum of low-rank products
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector", "use_dora"), _DORA),
    "hada_w": "LoHa, a product of two low-rank matrices element by element",
    "lokr_w": "LoKr, a Kronecker product",
    ".oft_": "OFT, a rotation of the weights",
    "lora_mid": "a Tucker decomposition",
}
_OUTSIDE = {
    "model",
    "diffusion_model",
    "unet",
    "base_model",
    "transformer",
    "transformer_2",
    "pipe",
    "dit",
    "net",
    "module",
}
_SIGN = re.compile(r"\.lora_|[._]lora\.|^lora_|\.diff(_[bm])?$|dora_scale|hada_w|lokr_w|\.oft_")
_KOHYA = re.compile(r"lora_(?:unet|transformer)_+")


def is_lora(names: Iterable[str]) -> bool:
    """Whether one of these is the name of a LoRA's array, or of a difference of weights."""
    return any(map(_SIGN.search, names))


class Target(NamedTuple):
    """An array of the model.  layer: None where it is not stacked.  shape: in a checkpoint."""

    rule: Rule
    layer: int | None
    shape: tuple[int, ...]


class Part(NamedTuple):
    """What one array of a LoRA file is.

    kind: "a", "b", "b_bias", "alpha", or what is added as it is: "diff", "diff_b".
    module: the name of its module, wrappers taken off.
    anchor: the weight that it belongs to, equal for both namings: our path and layer.
    targets: what it is added to, by itself or with others; several where shapes decide.
    """

    kind: str
    module: str
    anchor: tuple[str, int | None]
    targets: tuple[Target, ...]


class Names(NamedTuple):
    """arrays: every array of the model, under its names in both namings.
    flat: the modules by their names with underscores for dots.
    """

    arrays: Mapping[str, tuple[Target, ...]]
    flat: Mapping[str, tuple[str, ...]]


@lru_cache(maxsize=8)
def names_of(cfg: DiTConfig) -> Names:
    """The names that a LoRA for this model may use.

    A change of patch_embedding.weight may be that of the text-to-video model: it has the noise
    channels, which come first, and leaves the condition's projection as it is.
    """
    arrays = _targets(cfg)
    if cfg.condition_channels:
        noise = _targets(replace(cfg, condition_channels=0))["patch_embedding.weight"]
        arrays["patch_embedding.weight"] += noise
    return Names(arrays, underscored(name.rpartition(".")[0] for name in arrays))


def _targets(cfg: DiTConfig) -> dict[str, tuple[Target, ...]]:
    spec, arrays = dit_spec(cfg), {}
    flat = flatten(spec)
    for layout in ("diffusers", "official"):
        for name, (rule, layer) in sources_of(dit_rules(cfg, layout), spec).items():
            stacked = LAYER in rule.source
            ours = (flat[path].shape[stacked:] for path in rule.targets)
            shape = rule.layout.inverse(*(np.broadcast_to(np.uint8(0), s) for s in ours)).shape
            arrays[name] = (Target(rule, layer if stacked else None, shape),)
    return arrays


def underscored(modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Modules by their names with underscores for dots."""
    flat = {}
    for module in sorted(set(modules)):
        name = module.replace(".", "_")
        flat[name] = (*flat.get(name, ()), module)
    return flat


def find_module(module: str, flat: Mapping[str, tuple[str, ...]]) -> str | None:
    """The name of a module in the model's own words, wrappers taken off; None for an underscored
    name that the model does not have.

    Raises: CheckpointError when an underscored name fits several modules.
    """
    if found := _KOHYA.match(module):
        fits = flat.get(module[found.end() :], ())
        if len(fits) > 1:
            raise CheckpointError(f"{module!r} may mean {' or '.join(fits)}; write it with dots")
        return fits[0] if fits else None
    parts = module.split(".")
    while len(parts) > 1 and parts[0] in _OUTSIDE:
        parts.pop(0)
    return ".".join(parts)


def refuse_others(keys: Iterable[str], name: str) -> None:
    """Raises: CheckpointError for files that are no sum of low-rank products."""
    for key in keys:
        for word, kind in _OTHERS.items():
            if word in key:
                what = f"{name} holds {key!r}: {kind}"
                raise CheckpointError(f"{what}; only low-rank products and differences can be used")


def find_part(key: str, names: Names) -> Part | None:
    """What an array of a LoRA file is; None for what this model has no place for.

    Raises: CheckpointError as `find_module`.
    """
    for kind, pattern in _PARTS.items():
        if not (found := pattern.fullmatch(key)):
            continue
        if (module := find_module(found[1], names.flat)) is None:
            return None
        if kind == "diff" and module in names.arrays:  # "blocks.0.modulation.diff"
            anchor = own = module
        elif kind == "diff_m":
            kind, anchor = "diff", f"{module}.modulation"
            own = anchor
        else:
            anchor = f"{module}.weight"
            own = f"{module}.bias" if kind in ("b_bias", "diff_b") else anchor
        if anchor not in names.arrays or own not in names.arrays:
            return None
        first = names.arrays[anchor][0]
        return Part(kind, module, (first.rule.targets[0], first.layer), names.arrays[own])
    return None
