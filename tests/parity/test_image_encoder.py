# SPDX-License-Identifier: Apache-2.0
"""The image encoder against transformers' on random weights, every parameter drawn anew, float32.

Each mutant is a mistake that is easily made; the same comparison must notice it.
"""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from checkpoints_convert.keys_clip import clip_config, clip_layout, clip_rules
from checkpoints_convert.rules import source_array, sources_of
from lvjax.core.errors import InputError
from lvjax.core.params import abstract, count, flatten
from lvjax.models import image_encoder
from lvjax.models.image_encoder import ImageEncoderConfig, encode_image, image_encoder_spec
from lvjax.nn.norm import layer_norm
from tests.checkpoints_convert.in_memory import convert
from tests.drawn import swapped
from tests.redrawn import arrays, redrawn
from tests.tiny import relative

TOLERANCE = 5e-6
NOTICED = 1e-4
CFG = ImageEncoderConfig(160, 2, 4, 96, patch=6, size=30, projection_dim=24)  # 25 patches
PIXELS = np.random.default_rng(0).normal(size=(2, 30, 30, 3)).astype(np.float32)


@cache
def oracle():
    """transformers' model with random parameters that all matter, and its arrays by name."""
    config = CLIPVisionConfig(
        hidden_size=CFG.dim,
        intermediate_size=CFG.mlp_dim,
        projection_dim=CFG.projection_dim,
        num_hidden_layers=CFG.num_layers,
        num_attention_heads=CFG.num_heads,
        image_size=CFG.size,
        patch_size=CFG.patch,
        hidden_act="gelu",
    )
    special = {
        "embedding": lambda noise, _: 0.005 * noise,  # so small that the first norm's epsilon shows
        "fc2.weight": lambda noise, fan: 4 * fan * noise,  # so large that the form of GELU shows
    }
    model = redrawn(CLIPVisionModelWithProjection(config), special)
    return model, {
        key if "vis" in key[:5] else f"vision_model.{key}": a for key, a in arrays(model).items()
    }


@cache
def wanted():
    with torch.no_grad():
        pixels = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
        return oracle()[0](pixels, output_hidden_states=True).hidden_states[-2].numpy()


@cache
def params():
    return convert(oracle()[1], clip_rules((), "transformers", CFG), image_encoder_spec(CFG))


def ours(params, cfg=CFG, pixels=PIXELS):
    return np.asarray(jax.jit(lambda *a: encode_image(*a, cfg))(params, pixels))


def test_equals_transformers():
    got = ours(params())
    assert got.shape == (2, CFG.num_tokens, CFG.dim) and got.dtype == np.float32
    assert relative(got, wanted()) <= TOLERANCE


def test_half_precision():
    halved = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params())
    got = ours(halved, replace(CFG, dtype="bfloat16"))
    assert got.dtype == np.float32 and 1e-4 < relative(got, wanted()) < 2e-2


def all_blocks():
    """As if there were one more block, so that what is the last becomes the last but one."""
    more = jax.tree.map(lambda a: np.concatenate([a, a[-1:]]), params()["blocks"])
    return ours(params() | {"blocks": more}, replace(CFG, num_layers=CFG.num_layers + 1))


def reordered():
    """Patches with colours fastest."""
    kernel = params()["patch_embedding"]["kernel"]
    kernel = rearrange(kernel, "(c h w) d -> (h w c) d", c=3, h=CFG.patch)
    return ours(params() | {"patch_embedding": {"kernel": kernel}})


def rolled():
    """The class token behind the patches."""
    return ours(params() | {"position": np.roll(params()["position"], 1, 0)})


def unnormed():
    plain, calls = image_encoder.layer_norm, []

    def norm(x, eps, params):
        calls.append(params)
        return x if len(calls) == 1 else plain(x, eps, params)

    return patched(image_encoder, "layer_norm", norm)


def patched(where, name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, value)
        return ours(params())


def tanh_gelu():
    plain = jax.nn.gelu
    return patched(jax.nn, "gelu", lambda x, approximate: plain(x, approximate=True))


def quick_gelu():
    return patched(jax.nn, "gelu", lambda x, approximate: x * jax.nn.sigmoid(1.702 * x))


MUTANTS = {
    "tanh GELU": tanh_gelu,
    "quick GELU": quick_gelu,
    "last block": all_blocks,
    "norm behind": lambda: layer_norm(ours(params()), CFG.eps, params()["post_norm"]),
    "no norm before": unnormed,
    "eps of 1e-6": lambda: ours(params(), replace(CFG, eps=1e-6)),
    "q and k swapped": lambda: ours(swapped(params(), "blocks/attn", "q", "k")),
    "k and v swapped": lambda: ours(swapped(params(), "blocks/attn", "k", "v")),
    "colours fastest": reordered,
    "positions moved": rolled,
    "rows and columns swapped": lambda: ours(params(), pixels=PIXELS.transpose(0, 2, 1, 3)),
    "other heads": lambda: ours(params(), replace(CFG, num_heads=4)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name):
    assert relative(MUTANTS[name](), wanted()) > NOTICED


OFFICIAL = (  # transformers -> official, in this order; q, k, v and three arrays have other shapes
    (r"^vision_model\.encoder\.layers\.", "visual.transformer."),
    (r"^vision_model\.embeddings\.patch_embedding", "visual.patch_embedding"),
    (r"^vision_model\.pre_layrnorm", "visual.pre_norm"),
    (r"^vision_model\.post_layernorm", "visual.post_norm"),
    (r"\.layer_norm([12])", r".norm\1"),
    (r"\.self_attn\.out_proj", ".attn.proj"),
    (r"\.mlp\.fc1", ".mlp.0"),
    (r"\.mlp\.fc2", ".mlp.2"),
)


def official():
    """The oracle's arrays as the official file has them, with some of its text encoder."""
    arrays = dict(oracle()[1])
    made = {
        "visual.cls_embedding": arrays.pop("vision_model.embeddings.class_embedding")[None, None],
        "visual.pos_embedding": arrays.pop("vision_model.embeddings.position_embedding.weight")[
            None
        ],
        "visual.head": arrays.pop("visual_projection.weight").T,
        "log_scale": np.zeros((), np.float32),
        "textual.blocks.1.attn.q.weight": np.zeros((4, 4), np.float32),
    }
    for layer in range(CFG.num_layers):
        for part in ("weight", "bias"):
            name = f"vision_model.encoder.layers.{layer}.self_attn.{{}}_proj.{part}"
            fused = np.concatenate([arrays.pop(name.format(x)) for x in "qkv"])
            made[f"visual.transformer.{layer}.attn.to_qkv.{part}"] = fused
    for key, a in arrays.items():
        for pattern, name in OFFICIAL:
            key = re.sub(pattern, name, key)
        made[key] = a
    return made


def test_official_names_give_the_same_tree():
    assert clip_layout(official()) == "official"
    got = convert(official(), clip_rules((), "official", CFG), image_encoder_spec(CFG))
    jax.tree.map(np.testing.assert_array_equal, got, params())
    shapes = jax.tree.map(lambda a: a.shape, abstract(image_encoder_spec(CFG)))
    assert jax.tree.map(lambda a: a.shape, got) == shapes
    found = clip_config({k: a.shape for k, a in official().items()}, {"num_heads": 40})
    assert found == CFG


@pytest.mark.parametrize("layout", ("official", "transformers"))
def test_the_way_back(layout):
    given = official() if layout == "official" else oracle()[1]
    unused = {"log_scale", "textual.blocks.1.attn.q.weight"}
    flat, rules = flatten(params()), clip_rules((), layout, CFG)
    names = sources_of(rules, image_encoder_spec(CFG))
    assert names.keys() == given.keys() - unused
    for name, (rule, layer) in names.items():
        back = source_array(rule, layer, lambda p, i: flat[p] if i is None else flat[p][i])
        np.testing.assert_array_equal(back, given[name])


def test_names_without_prefix_and_old_arrays():
    arrays = {key.removeprefix("vision_model."): a for key, a in oracle()[1].items()}
    del arrays["visual_projection.weight"]
    arrays["embeddings.position_ids"] = np.arange(CFG.num_tokens)[None]
    layout = clip_layout(arrays)
    said = {"num_attention_heads": 2, "hidden_size": 160, "hidden_act": "gelu"}
    cfg = clip_config({k: a.shape for k, a in arrays.items()}, said)
    assert cfg == replace(CFG, projection_dim=None)
    got = convert(arrays, clip_rules(arrays, layout, cfg), image_encoder_spec(cfg))
    whole = {k: a for k, a in params().items() if k != "projection"}
    jax.tree.map(np.testing.assert_array_equal, got, whole)


def test_sizes():
    assert count(image_encoder_spec(ImageEncoderConfig(projection_dim=1024))) == 632_076_800
    for wrong in (dict(num_heads=3), dict(size=225), dict(dtype="int8"), dict(projection_dim=0)):
        name = {"num_heads": "dim"}.get(*wrong, *wrong)
        with pytest.raises(InputError, match=f"ImageEncoderConfig.{name} is"):
            ImageEncoderConfig(**wrong)
    with pytest.raises(InputError, match="pixels has shape"):
        encode_image({}, np.zeros((1, 28, 30, 3), np.float32), CFG)
