# SPDX-License-Identifier: Apache-2.0
"""Whole Wan models, tiny and random, as diffusers lays them out: for tests from prompts to frames.

Float32, every parameter drawn anew so that all of them matter; only the transformers' heads are
damped, so that rounding does not grow from step to step.  Needs torch, diffusers, transformers.
"""

from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from lvjax.models.config import WAN_VAE_2_2_MEAN, WAN_VAE_2_2_STD
from tests.redrawn import redrawn

FAMILIES = ("t2v", "i2v", "flf2v", "t2v-a14b", "i2v-a14b", "ti2v")
TEXT_DIM, IMAGE_DIM = 32, 24
IMAGE_SIZE, PATCH = 224, 56  # CLIP's own size, in so few patches that a picture has 17 tokens
IMAGE_TOKENS = 1 + (IMAGE_SIZE // PATCH) ** 2
LINES = (
    "A red fox runs over the snow, at dawn; the camera pans left.",
    "A small boat on a wide lake, waves, wind and low clouds.",
    "Two children walk along the beach with a dog, cinematic light.",
    "overexposed, blurred details, low quality, subtitles, walking backwards",
)


@cache
def _trained() -> str:
    """A small tokenizer.json with the special tokens of UMT5, the end of a text among them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer.to_str()


def wan_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every model here, as transformers uses it."""
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained()), **special)


def _transformer(family: str) -> WanTransformer3DModel:
    clip, z = family in ("i2v", "flf2v"), 48 if family == "ti2v" else 16
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=20 + z if clip or family == "i2v-a14b" else z,
        out_channels=z,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        image_dim=IMAGE_DIM if clip else None,
        added_kv_proj_dim=48 if clip else None,
        pos_embed_seq_len=2 * IMAGE_TOKENS if family == "flf2v" else None,
    )


def _autoencoder(family: str) -> AutoencoderKLWan:
    sizes = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    if family != "ti2v":
        return AutoencoderKLWan(**sizes, z_dim=16)
    return AutoencoderKLWan(
        **sizes,
        z_dim=48,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        latents_mean=list(WAN_VAE_2_2_MEAN),
        latents_std=list(WAN_VAE_2_2_STD),
    )


def _text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(wan_tokenizer()),
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config)


def _image_encoder() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config)


_SPECIAL = {
    "relative_attention_bias": lambda noise, _: 0.5 * noise,
    "class_embedding": lambda noise, _: 0.3 * noise,
    "shared": lambda noise, _: noise,
    "position_embedding": lambda noise, _: noise,
    ".SelfAttention.q.": lambda noise, fan: 0.5 * fan * noise,  # nothing scales UMT5's scores
    "proj_out.weight": lambda noise, fan: 0.1 * fan * noise,
}


def wan_modules(family: str, seed: int = 0) -> dict[str, torch.nn.Module]:
    """The models of a family of `FAMILIES`, by the names that diffusers' pipelines give them."""
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}; use one of {FAMILIES}")
    found = {"transformer": _transformer(family)}
    if family.endswith("a14b"):
        found["transformer_2"] = _transformer(family)
    found |= {"vae": _autoencoder(family), "text_encoder": _text_encoder()}
    if family in ("i2v", "flf2v"):
        found["image_encoder"] = _image_encoder()
    return {name: redrawn(m, _SPECIAL, 10 * seed + i) for i, (name, m) in enumerate(found.items())}


def save_modules(modules: dict[str, torch.nn.Module], path: Path) -> Path:
    """Write models, and the tokenizer, into a folder as diffusers does."""
    for name, module in modules.items():
        module.save_pretrained(path / name)
    wan_tokenizer().save_pretrained(path / "tokenizer")
    if "image_encoder" in modules:
        CLIPImageProcessor().save_pretrained(path / "image_processor")
    return path


def wan_folder(path: Path, family: str, seed: int = 0) -> Path:
    """Write a whole model; returns its folder, which `lvjax.load` and `lvjax convert` take."""
    return save_modules(wan_modules(family, seed), Path(path))
