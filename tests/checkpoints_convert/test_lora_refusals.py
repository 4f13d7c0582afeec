# SPDX-License-Identifier: Apache-2.0
"""What read_lora refuses, what it leaves over, alpha in settings, and names with underscores."""

import numpy as np
import pytest

from checkpoints_convert import keys_lora
from checkpoints_convert.lora import METADATA, read_lora
from lvjax.core.errors import CheckpointError
from lvjax.models.config import DiTConfig

BASE = dict(dim=256, num_heads=2, num_layers=2, ffn_dim=320, text_dim=64, dtype="float32")
CFG = DiTConfig(**BASE)
IMAGE = dict(condition_channels=20, image_dim=96, image_pos_len=514)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pair(key="blocks.0.self_attn.q", shape=(256, 256), rank=2):
    return {
        f"{key}.lora_down.weight": draw(0, rank, shape[1]),
        f"{key}.lora_up.weight": draw(1, shape[0], rank),
    }


def test_what_has_no_place_is_told():
    given = pair() | {
        "blocks.7.self_attn.q.lora_down.weight": draw(0, 2, 256),  # two layers only
        "lora_te_text_model_encoder_layers_0.lora_up.weight": draw(0, 4, 4),
        "lora_unet_blocks_0_self_attn_qq.alpha": np.float32(1),
        "blocks.0.norm2.diff_x": draw(0, 3),
        "blocks.0.self_attn.norm_q.diff_b": draw(0, 256),
        "blocks.1.ffn.0.alpha": np.float32(4),  # of no pair
        "pose_embed.0.weight": draw(0, 3),
        "patch_embedding.weight": draw(0, 3),
        "blocks.0.self_attn.q.lora_A.bias": draw(0, 2),
    }
    lora = read_lora(given, {}, CFG)
    assert len(lora.low_rank) == 1
    assert set(lora.unmatched) == given.keys() - pair().keys()


REFUSED = {
    "nothing": ({"blocks.0.attn.qkv.lora_A.weight": draw(0, 2, 256)}, "none of its 1 arrays"),
    "no arrays": ({}, "none of its 0 arrays"),
    "a checkpoint": ({"blocks.0.self_attn.q.weight": draw(0, 256, 256)}, "is it a LoRA"),
    "width": (
        pair(shape=(512, 512)),
        r"q.lora_down.weight' \[2, 512\] and .* \[512, 2\] do not fit .*\(layer 0\), which is "
        r"\[256, 256\]",
    ),
    "turned": (
        {
            "blocks.0.ffn.0.lora_A.weight": draw(0, 256, 2),
            "blocks.0.ffn.0.lora_B.weight": draw(0, 2, 320),
        },
        "no rank in common",
    ),
    "rank": (
        pair() | {"blocks.0.self_attn.q.lora_up.weight": draw(0, 256, 3)},
        "no rank in common",
    ),
    "scalar": (
        pair() | {"blocks.0.self_attn.q.lora_up.weight": np.float32(1)},
        "no rank in common",
    ),
    "difference": (
        {"blocks.0.self_attn.norm_q.diff": draw(0, 128)},
        r"norm_q.diff' \[128\] do not fit",
    ),
    "norm": (pair("blocks.0.norm3", (256, 1)), "do not fit blocks/norm3/scale"),
    "no up": (dict(list(pair().items())[:1]), "down.weight' is there without its B"),
    "no down": (dict(list(pair().items())[1:]), "up.weight' is there without its A"),
    "only a bias": ({"blocks.0.ffn.0.lora_B.bias": draw(0, 320)}, "without its A"),
    "not finite": (
        pair() | {"blocks.0.self_attn.q.lora_up.weight": np.full((256, 2), np.nan, np.float32)},
        "up.weight' is not finite",
    ),
    "infinite": ({"blocks.0.norm3.diff": np.full(256, np.inf, np.float32)}, "is not finite"),
    "empty": (
        pair() | {"blocks.0.self_attn.q.lora_down.weight": draw(0, 0, 256)},
        "is empty",
    ),
    "whole numbers": ({"blocks.0.norm3.diff": np.ones(256, np.int8)}, "is int8, not a float"),
    "alpha": (pair() | {"blocks.0.self_attn.q.alpha": np.float32(np.nan)}, "no finite number"),
    "alphas": (pair() | {"blocks.0.self_attn.q.alpha": draw(0, 2)}, "no finite number"),
    "twice": (
        pair() | pair("diffusion_model.blocks.0.attn1.to_q"),
        "'blocks.0.self_attn.q.lora_down.weight' and 'diffusion_model.* mean the same",
    ),
    "experts": (
        pair("transformer.blocks.0.attn1.to_q") | pair("transformer_2.blocks.0.attn1.to_q"),
        "mean the same",
    ),
    "norms": (
        {"blocks.0.norm2.diff": draw(0, 256), "blocks.0.norm3.diff": draw(0, 256)},
        "mean the same",
    ),
    "dora": (pair() | {"blocks.0.self_attn.q.dora_scale": draw(0, 256, 1)}, "DoRA"),
    "peft dora": (pair() | {"blocks.0.attn1.to_q.lora_magnitude_vector": draw(0, 256)}, "DoRA"),
    "loha": ({"lora_unet_blocks_0_self_attn_q.hada_w1_a": draw(0, 256, 2)}, "LoHa"),
    "lokr": ({"lora_unet_blocks_0_self_attn_q.lokr_w1": draw(0, 4, 4)}, "LoKr"),
    "oft": ({"lora_unet_blocks_0_self_attn_q.oft_blocks": draw(0, 4, 4)}, "OFT"),
    "tucker": (pair() | {"blocks.0.self_attn.q.lora_mid.weight": draw(0, 2, 2)}, "Tucker"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    arrays, says = REFUSED[case]
    with pytest.raises(CheckpointError, match=says) as caught:
        read_lora(arrays, {}, CFG, "style.safetensors")
    assert str(caught.value).startswith("style.safetensors") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config, says",
    (
        ({"use_dora": True}, "DoRA"),
        ({"lora_alpha": "many"}, "could not convert"),
        ({"lora_alpha": True}, "no finite number"),
        ({"lora_alpha": float("nan")}, "no finite number"),
        ({"lora_alpha": [1]}, "must be a number"),
        ({"lora_alpha": 10**400}, "too large"),
        ({"alpha_pattern": ["q"]}, "numbers by name"),
        ({"alpha_pattern": {"(a+)+q": 1}}, "no module's name"),
        ({"alpha_pattern": {"q": None}}, "numbers by name"),
        ({METADATA: "{"}, "damaged"),
        ({METADATA: "[1]"}, "damaged"),
        ({METADATA: None}, "damaged"),
        ({METADATA: '{"transformer.use_dora": true}'}, "DoRA"),
    ),
)
def test_settings_that_are_refused(config, says):
    with pytest.raises(CheckpointError, match=says):
        read_lora(pair(), config, CFG)


def test_settings():
    def scale(config):
        return read_lora(pair("transformer.blocks.0.attn1.to_q"), config, CFG)[0][0].scale

    assert scale({}) == 1
    assert scale({"_class_name": "WanTransformer3DModel", "num_layers": 2}) == 1
    assert scale({"lora_alpha": 8, "r": 99}) == 4  # the rank is that of the arrays
    assert scale({"lora_alpha": "8"}) == 4
    assert scale({"lora_alpha": 8, "use_rslora": True}) == pytest.approx(8 / 2**0.5)
    assert scale({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}) == 1
    assert scale({"lora_alpha": 8, "alpha_pattern": {"^attn1.to_q": 2, "n1.to_q": 3}}) == 4
    assert scale({"lora_alpha": 8, "alpha_pattern": {"^blocks.0.attn1.to_q": 6}}) == 3


def test_underscores_are_never_guessed():
    flat = keys_lora.underscored(["a.b_c", "a_b.c", "d.e", "d.e"])
    assert keys_lora.find_module("lora_unet_d_e", flat) == "d.e"
    assert keys_lora.find_module("lora_unet_d_f", flat) is None
    with pytest.raises(CheckpointError, match="'lora_unet_a_b_c' may mean a.b_c or a_b.c"):
        keys_lora.find_module("lora_unet_a_b_c", flat)
    for cfg in (CFG, DiTConfig(**BASE, **IMAGE)):  # none of Wan's is ambiguous
        assert all(len(found) == 1 for found in keys_lora.names_of(cfg).flat.values())
