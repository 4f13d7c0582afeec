# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is, from the names and shapes of its arrays; file names decide nothing.

Owns: `Model`, a checkpoint with its part, naming and configuration; the choice between them.  Does
not own: the key maps and the sizes of each part (keys_*.py), LoRA files (lora.py).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from checkpoints_convert import hf_config, keys_clip, keys_dit, keys_umt5, keys_vae
from checkpoints_convert.keys_lora import is_lora
from checkpoints_convert.read import Tensors
from checkpoints_convert.rules import Plan, Rule, find_rules, make_plan
from lvjax.core.errors import CheckpointError, InputError
from lvjax.models.config import WAN_T2V_1_3B, WAN_VAE_2_1, WAN_VAE_2_2
from lvjax.models.image_encoder import ImageEncoderConfig
from lvjax.models.parts import part_spec
from lvjax.models.umt5 import UMT5Config

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
FLOATS = {"float64", "float32", "float16", "bfloat16"}


class Kind(NamedTuple):
    """What is known of one part of a model.

    title: for messages.  layout(names) -> naming, or None when the arrays are of another part.
    layouts: what its two namings are called, Hugging Face's first.
    config(shapes, layout, config.json) -> sizes; hf_config: the way back.
    rules(names, layout, cfg) -> key map; without names, that of the way back.
    precise: words in the paths of parameters that half precision would harm; they keep their type
      when the rest is narrowed.
    official_config: the config.json of the official naming, where it has one.
    """

    title: str
    layout: Callable[[Mapping], str | None]
    layouts: tuple[str, str]
    config: Callable[..., Any]
    hf_config: Callable[[Any], dict]
    rules: Callable[..., tuple[Rule, ...]]
    precise: tuple[str, ...]
    official_config: Callable[[Any], dict] | None = None


KINDS = {
    "dit": Kind(
        "a diffusion transformer",
        keys_dit.dit_layout,
        keys_dit.LAYOUTS,
        keys_dit.dit_config,
        hf_config.dit_json,
        lambda names, layout, cfg: keys_dit.dit_rules(cfg, layout),
        ("time_embedding", "time_projection", "modulation", "norm", "head"),
        hf_config.official_dit_json,
    ),
    "vae": Kind(
        "an autoencoder",
        keys_vae.vae_layout,
        keys_vae.LAYOUTS,
        keys_vae.vae_config,
        hf_config.vae_json,
        lambda names, layout, cfg: keys_vae.vae_rules(cfg, layout),
        ("",),  # all of it: every published run decodes in float32
    ),
    "text": Kind(
        "a text encoder",
        keys_umt5.umt5_layout,
        keys_umt5.LAYOUTS,
        lambda shapes, layout, config: keys_umt5.umt5_config(shapes, config),
        hf_config.text_json,
        lambda names, layout, cfg: keys_umt5.umt5_rules(names, layout),
        ("norm", "bias"),
    ),
    "image": Kind(
        "an image encoder",
        keys_clip.clip_layout,
        keys_clip.LAYOUTS,
        lambda shapes, layout, config: keys_clip.clip_config(shapes, config),
        hf_config.image_json,
        keys_clip.clip_rules,
        ("norm",),
    ),
}


class StrangerError(CheckpointError):
    """A sound checkpoint, but no part of a Wan model."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint that was recognised.

    kind: a name in `KINDS`.  layout: its naming.  tensors: with the names that the rules know.
    name: for messages.
    """

    kind: str
    layout: str
    cfg: Any
    tensors: Tensors
    name: str

    def spec(self) -> dict:
        """The parameters of lvjax's own tree."""
        return part_spec(self.cfg)

    def plan(self) -> Plan:
        """What goes where; raises CheckpointError for whatever does not fit."""
        if quantised := sorted(name for name in self.tensors if name.endswith(QUANTISED)):
            raise self._quantised(f"scales of quantised weights ({quantised[0]})")
        rules = KINDS[self.kind].rules(self.tensors, self.layout, self.cfg)
        try:
            plan = make_plan(self.tensors.shapes(), rules, self.spec())
        except CheckpointError as e:
            raise CheckpointError(f"{self.name}: {e}") from e
        used = [name for place in plan.places for name in place.sources]
        if other := sorted({str(self.tensors.dtype(name)) for name in used} - FLOATS):
            raise self._quantised(f"{other[0]} arrays")
        return plan

    def _quantised(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name} holds {what}; lvjax reads weights in float32, float16 or bfloat16: give "
            "a file that is not quantised"
        )


def recognise(tensors: Tensors, config: dict, name: str) -> Model:
    """The model that `tensors` hold.  config: of the config.json beside them.  name: for messages.

    Raises: StrangerError when it is none of Wan's; CheckpointError when it cannot be used as it is.
    """
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = tensors.without(prefix)
    for title, sign in STRANGERS.items():
        if sign(tensors):
            raise StrangerError(f"{name} is {title}")
    for kind, known in KINDS.items():
        if layout := known.layout(tensors):
            cfg = _config(known, tensors, layout, config, name)
            return Model(kind, layout, cfg, tensors, name)
    if title := _fragment(tensors):
        raise CheckpointError(
            f"{name} holds only some arrays of {title}; give all of it, of several files the index"
        )
    some = ", ".join(sorted(tensors)[:3])
    titles = " nor ".join(known.title for known in KINDS.values())
    raise StrangerError(f"{name} is neither {titles} of Wan's (it holds {some}, ...)")


def _fragment(tensors: Tensors) -> str | None:
    """What most of the arrays are of, by their names, though not all that tell it are there."""
    names = list(tensors)[:LOOKED_AT]
    for kind, samples in SAMPLES.items():
        for layout in KINDS[kind].layouts:
            for cfg in samples:
                rules = KINDS[kind].rules(tensors, layout, cfg)
                if 2 * sum(_has_place(key, rules) for key in names) > len(names):
                    return KINDS[kind].title
    return None


def _has_place(name: str, rules: tuple[Rule, ...]) -> bool:
    try:
        return bool(find_rules([name], rules))
    except CheckpointError:
        return False


SAMPLES = {
    "dit": (WAN_T2V_1_3B,),
    "vae": (WAN_VAE_2_1, WAN_VAE_2_2),
    "text": (UMT5Config(),),
    "image": (ImageEncoderConfig(),),
}
"""Models of every kind whose names differ."""
LOOKED_AT = 200  # arrays

STRANGERS = {
    "a part that lvjax wrote; give --to for the way back": lambda names: any(
        name.startswith(("blocks/", "encoder/", "decoder/")) for name in names
    ),
    "a LoRA, or a file of weight differences: give it with --lora beside the model that it "
    "changes, or write it under other names with lvjax convert LORA DST --base MODEL": is_lora,
    "a VACE model, which lvjax does not have": lambda names: any(
        "vace_blocks." in name for name in names
    ),
}
QUANTISED = (".scale_weight", ".weight_scale", ".scale_input", ".qweight", ".absmax", "scaled_fp8")


def _config(known: Kind, tensors: Tensors, layout: str, config: dict, name: str):
    """The sizes, with anything that does not fit together as a CheckpointError."""
    if layout == "official" and known is not KINDS["dit"]:
        config = {}  # in the official repositories the file beside it is the transformer's
    try:
        return known.config(tensors.shapes(), layout, config)
    except (CheckpointError, InputError) as e:
        raise CheckpointError(f"{name}: {e}") from e
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as e:
        raise CheckpointError(
            f"{name}: arrays or config.json are not those of a Wan model "
            f"({type(e).__name__}: {e}); "
            "download them again"
        ) from e


def check_together(configs: Mapping[str, Any]) -> None:
    """Whether parts belong to one model.  configs: their sizes by part, "dit_low" among them.

    Raises: CheckpointError naming the two that do not fit.
    """
    dit, vae, text, image = (configs.get(part) for part in ("dit", "vae", "text", "image"))
    low = configs.get("dit_low")
    if dit is None:
        return
    if low is not None and low != dit:
        raise CheckpointError("dit and dit_low are not two experts of one model; give one model's")
    for part, theirs, own, what in (
        ("autoencoder", vae and vae.z, dit.in_channels, "latent channels"),
        ("text encoder", text and text.dim, dit.text_dim, "numbers a token"),
        ("image encoder", image and dit.image_dim and image.dim, dit.image_dim, "numbers a token"),
    ):
        if theirs is not None and theirs != own:
            raise CheckpointError(
                f"the {part} gives {theirs} {what}, the transformer takes {own}; they are of two "
                "different models: give one model's"
            )
