# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is, from the names and shapes of its arrays.

Owns: part, naming and configuration of Wan's DiT and of the Wan 2.1 autoencoder; honest refusals of
what cannot be converted yet.  Shapes decide; a config.json beside the weights adds what shapes do
not show (heads, latent statistics) and must not contradict them.
"""

import dataclasses
import math
from typing import NamedTuple

from checkpoints_convert.keys_dit import dit_rules
from checkpoints_convert.keys_vae import vae_rules
from checkpoints_convert.read import Tensors
from checkpoints_convert.rules import Rule
from lvjax.core.errors import CheckpointError
from lvjax.models.config import WAN_VAE_2_1, DiTConfig, VAEConfig
from lvjax.models.dit import dit_spec
from lvjax.models.vae import vae_spec

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
HEAD_DIM = 128  # of every released Wan
FLOATS = {"F64", "F32", "F16", "BF16"}
LATER = "{} cannot be converted yet; that comes with a later release"


class Model(NamedTuple):
    """part: "dit" or "vae".  layout: "diffusers" or "official".  tensors: names as in `rules`."""

    part: str
    layout: str
    cfg: DiTConfig | VAEConfig
    tensors: Tensors

    def spec(self) -> dict:
        """The parameters of lvjax's own tree."""
        return dit_spec(self.cfg) if self.part == "dit" else vae_spec(self.cfg)

    def rules(self) -> tuple[Rule, ...]:
        """The key map to them."""
        make = dit_rules if self.part == "dit" else vae_rules
        return make(self.cfg, self.layout)


def recognise(tensors: Tensors, config: dict, name: str) -> Model:
    """The model that `tensors` hold.  name: of the checkpoint, for errors.

    Raises: CheckpointError when it is no Wan DiT or Wan 2.1 autoencoder.
    """
    _refuse(tensors, name)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = tensors.without(prefix)
    for layout, key in (("diffusers", "attn1.to_q"), ("official", "self_attn.q")):
        if "patch_embedding.weight" in tensors and f"blocks.0.{key}.weight" in tensors:
            return Model(
                "dit", layout, _checked(_dit_config, tensors, layout, config, name), tensors
            )
    for layout, key in (("diffusers", "conv_in"), ("official", "conv1")):
        ends = [f"{coder}.{key}.weight" for coder in ("encoder", "decoder")]
        if all(e in tensors and len(tensors.shape(e)) == 5 for e in ends):
            return Model(
                "vae", layout, _checked(_vae_config, tensors, layout, config, name), tensors
            )
    some = ", ".join(sorted(tensors)[:3])
    raise CheckpointError(
        f"{name} is neither a Wan DiT nor a Wan autoencoder (it holds {some}, ...)"
    )


def _refuse(tensors: Tensors, name: str) -> None:
    """What is known, and not converted yet."""
    nested = ("encoder.down_blocks.0.resnets.", "encoder.downsamples.0.downsamples.")
    kinds = {
        "a LoRA": lambda k: ".lora_" in k or ".lora." in k or k.startswith("lora_unet_"),
        "a file of weight differences": lambda k: k.endswith((".diff", ".diff_b", ".diff_m")),
        "a UMT5 text encoder": lambda k: (
            "SelfAttention.relative_attention_bias" in k or "pos_embedding.embedding" in k
        ),
        "a CLIP image encoder": lambda k: k.startswith(("visual.", "vision_model.")),
        "the Wan 2.2 autoencoder": lambda k: k.startswith(nested),
        "a VACE model": lambda k: "vace_blocks." in k,
    }
    for kind, fits in kinds.items():
        if any(map(fits, tensors)):
            raise CheckpointError(f"{name} is {kind}: {LATER.format('it')}")
    if other := sorted(tensors.dtypes() - FLOATS):
        raise CheckpointError(
            f"{name} holds {other[0]} arrays: {LATER.format('quantised weights')}"
        )


def _checked(make, tensors: Tensors, layout: str, config: dict, name: str):
    """A configuration, with anything that does not fit together as a CheckpointError."""
    try:
        return make(tensors, layout, config, name)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as e:
        what = (
            f"{name}: arrays or config.json are not those of a Wan model ({type(e).__name__}: {e})"
        )
        raise CheckpointError(what) from e


def _dit_config(tensors: Tensors, layout: str, config: dict, name: str) -> DiTConfig:
    inside = {
        "diffusers": ("ffn.net.0.proj", "proj_out", "condition_embedder.text_embedder.linear_1"),
        "official": ("ffn.0", "head.head", "text_embedding.0"),
    }
    time = {
        "diffusers": "condition_embedder.time_embedder.linear_1",
        "official": "time_embedding.0",
    }
    image = {
        "diffusers": "condition_embedder.image_embedder.",
        "official": "img_emb.",
    }[layout]
    norm = image + {"diffusers": "norm1.weight", "official": "proj.0.weight"}[layout]
    place = image + {"diffusers": "pos_embed", "official": "emb_pos"}[layout]
    ffn, head, text = inside[layout]
    dim, channels, *patch = tensors.shape("patch_embedding.weight")
    out_channels = tensors.shape(f"{head}.weight")[0] // math.prod(patch)
    layers = {int(k.split(".")[1]) for k in tensors if k.startswith("blocks.")}
    cfg = DiTConfig(
        dim=dim,
        num_heads=_heads(dim, config, name),
        num_layers=len(layers),
        ffn_dim=tensors.shape(f"blocks.0.{ffn}.weight")[0],
        in_channels=out_channels,
        out_channels=out_channels,
        condition_channels=channels - out_channels,
        patch=tuple(patch),
        text_dim=tensors.shape(f"{text}.weight")[1],
        text_len=int(config.get("text_len", 512)),
        image_dim=tensors.shape(norm)[0] if norm in tensors else None,
        image_pos_len=tensors.shape(place)[1] if place in tensors else 0,
        freq_dim=tensors.shape(f"{time[layout]}.weight")[1],
        eps=float(config.get("eps", 1e-6)),
    )
    second = cfg.in_channels == 48 or (cfg.condition_channels and cfg.image_dim is None)
    if second:
        raise CheckpointError(f"{name} is a Wan 2.2 model: {LATER.format('it')}")
    return cfg


def _heads(dim: int, config: dict, name: str) -> int:
    """Attention heads: from config.json, else by Wan's head size."""
    heads = config.get("num_attention_heads", config.get("num_heads"))
    if heads is None and dim % HEAD_DIM:
        what = f"{name}: width {dim} is not a multiple of {HEAD_DIM}"
        raise CheckpointError(f"{what}; put its config.json, which tells the heads, beside it")
    heads = dim // HEAD_DIM if heads is None else int(heads)
    size = int(config.get("attention_head_dim", dim // heads))
    if heads * size != dim:
        raise CheckpointError(
            f"{name}: config.json says {heads} heads of {size}, the width is {dim}"
        )
    return heads


def _vae_config(tensors: Tensors, layout: str, config: dict, name: str) -> VAEConfig:
    first = {"diffusers": "encoder.conv_in", "official": "encoder.conv1"}[layout]
    last = {"diffusers": "post_quant_conv", "official": "conv2"}[layout]
    base, channels = tensors.shape(f"{first}.weight")[:2]
    z = tensors.shape(f"{last}.weight")[0]
    mean = tuple(map(float, config.get("latents_mean", WAN_VAE_2_1.mean)))
    std = tuple(map(float, config.get("latents_std", WAN_VAE_2_1.std)))
    if len(mean) != z or len(std) != z:
        what = f"{name} has {z} latent channels, their statistics are of {len(mean)}"
        raise CheckpointError(f"{what}; put its config.json (latents_mean, latents_std) beside it")
    given = {
        "dim_mult": config.get("dim_mult"),
        "res_blocks": config.get("num_res_blocks"),
        "temporal_down": config.get("temperal_downsample"),
    }
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    patch = math.isqrt(channels // 3)
    return dataclasses.replace(
        WAN_VAE_2_1, base=base, z=z, patch=patch, mean=mean, std=std, **given
    )
