# SPDX-License-Identifier: Apache-2.0
"""The transformer against diffusers' on random weights, every parameter drawn anew, float32.

Each mutant is a mistake that is easily made; the same comparison must notice it.
"""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange

from checkpoints_convert.keys_dit import dit_rules
from lvjax.core.params import abstract
from lvjax.models import dit as dit_module
from lvjax.models import dit_block
from lvjax.models.config import DiTConfig
from lvjax.models.dit import dit, dit_spec, embed_context
from lvjax.nn import rope
from tests.checkpoints_convert.in_memory import convert
from tests.parity.dit_oracle import transformer
from tests.redrawn import arrays
from tests.tiny import relative

TOLERANCE = 5e-6
NOTICED = 1e-3
BASE = dict(dim=256, num_heads=2, num_layers=2, ffn_dim=320, text_dim=64, dtype="float32")
IMAGE = dict(condition_channels=20, image_dim=96)
VARIANTS = {
    "t2v": DiTConfig(**BASE),
    "i2v": DiTConfig(**BASE, **IMAGE),
    "flf2v": DiTConfig(**BASE, **IMAGE, image_pos_len=514),
    "i2v_2_2": DiTConfig(**BASE, condition_channels=20),
    "ti2v": DiTConfig(**BASE, in_channels=48, out_channels=48),
}
FRAMES, HEIGHT, WIDTH = 3, 6, 8  # 36 tokens after the patch


@cache
def oracle(name):
    """diffusers' model with random parameters that all matter, and its arrays by name."""
    model = transformer(VARIANTS[name])
    return model, arrays(model)


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@cache
def inputs(name):
    cfg = VARIANTS[name]
    grid = (2, FRAMES, HEIGHT, WIDTH)
    given = {
        "latents": draw(*grid, cfg.in_channels, seed=1),
        "text": draw(2, 9, cfg.text_dim, seed=2),
        "timestep": np.array([937.5, 41.0], np.float32),
        "condition": draw(*grid, cfg.condition_channels, seed=3)
        if cfg.condition_channels
        else None,
        "image": None,
    }
    if cfg.image_dim:
        given["image"] = draw(2, cfg.image_pos_len or 257, cfg.image_dim, seed=4)
    if name == "ti2v":  # the first frame is given: its tokens have timestep 0
        tokens = FRAMES * HEIGHT * WIDTH // 4
        given["timestep"] = np.repeat(given["timestep"][:, None], tokens, 1)
        given["timestep"][:, : tokens // FRAMES] = 0
    return given


@cache
def wanted(name):
    cfg, given = VARIANTS[name], inputs(name)
    video = [given["latents"]] + ([given["condition"]] if cfg.condition_channels else [])
    video = torch.from_numpy(np.concatenate(video, -1)).permute(0, 4, 1, 2, 3)
    text = np.zeros((2, 512, cfg.text_dim), np.float32)
    text[:, : given["text"].shape[1]] = given["text"]
    image = given["image"]
    if cfg.image_pos_len:  # first and last image as two rows of the batch
        image = rearrange(image, "b (two m) c -> (b two) m c", two=2)
    with torch.no_grad():
        out = oracle(name)[0](
            video,
            torch.from_numpy(given["timestep"]),
            torch.from_numpy(text),
            None if image is None else torch.from_numpy(image),
            return_dict=False,
        )[0]
    return out.permute(0, 2, 3, 4, 1).numpy()


@cache
def params(name):
    return convert(
        oracle(name)[1], dit_rules(VARIANTS[name], "diffusers"), dit_spec(VARIANTS[name])
    )


def ours(name):
    cfg, given = VARIANTS[name], inputs(name)

    def run(params, latents, text, timestep, condition, image):
        context = embed_context(params, text, cfg, image)
        return dit(params, latents, timestep, context, cfg, condition=condition)[0]

    return np.asarray(jax.jit(run)(params(name), **given))


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_diffusers(name):
    assert relative(ours(name), wanted(name)) <= TOLERANCE


def test_per_frame_timesteps_equal_per_token():
    cfg, given = VARIANTS["ti2v"], inputs("ti2v")
    frames = given["timestep"].reshape(2, FRAMES, -1)[:, :, 0]
    context = embed_context(params("ti2v"), given["text"], cfg)
    out = jax.jit(lambda p, *a: dit(p, *a, cfg)[0])(
        params("ti2v"), given["latents"], frames, context
    )
    assert relative(np.asarray(out), wanted("ti2v")) <= TOLERANCE


def swap_norms(monkeypatch):
    """norm3 loaded into the norm before the feed-forward, as its name in diffusers suggests."""
    plain, stash = dit_block.layer_norm, []

    def swapped(x, eps, params=None):
        if params is not None:
            stash.append(params)
            return plain(x, eps)
        return plain(x, eps, stash.pop() if stash else None)

    monkeypatch.setattr(dit_block, "layer_norm", swapped)


def wrong_split(monkeypatch):
    monkeypatch.setattr(rope, "axis_pairs", lambda head_dim: (21, 22, 21))  # 42/44/42


def half_split(monkeypatch):
    def rotate(x, rotation):
        cos, sin = (part[None] for part in rotation)
        low, high = jnp.split(x, 2, -1)
        return jnp.concatenate([low * cos - high * sin, low * sin + high * cos], -1)

    monkeypatch.setattr(dit_block, "rotate", rotate)


def scale_before_shift(monkeypatch):
    plain = dit_block.modulate
    for module in (dit_block, dit_module):
        monkeypatch.setattr(module, "modulate", lambda x, shift, scale: plain(x, scale, shift))


@pytest.mark.parametrize("mutate", (swap_norms, wrong_split, half_split, scale_before_shift))
def test_mistakes_are_noticed(mutate, monkeypatch):
    mutate(monkeypatch)
    assert relative(ours("t2v"), wanted("t2v")) > NOTICED


OFFICIAL = (  # diffusers -> official, in this order; norm2 and norm3 trade places
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
)


def official_name(key):
    for pattern, name in OFFICIAL:
        key = re.sub(pattern, name, key)
    return key


@pytest.mark.parametrize("name", ("t2v", "flf2v"))
def test_official_names_give_the_same_tree(name):
    cfg = VARIANTS[name]
    renamed = {official_name(key): a for key, a in oracle(name)[1].items()}
    got = convert(renamed, dit_rules(cfg, "official"), dit_spec(cfg))
    jax.tree.map(np.testing.assert_array_equal, got, params(name))
    shapes = jax.tree.map(lambda a: a.shape, abstract(dit_spec(cfg)))
    assert jax.tree.map(lambda a: a.shape, got) == shapes


def test_patch_rule_inverts():
    rule = next(
        r for r in dit_rules(VARIANTS["i2v"], "official") if "patch_embedding.weight" in r.source
    )
    weight = oracle("i2v")[1]["patch_embedding.weight"]
    np.testing.assert_array_equal(rule.transform.inverse(*rule.transform.forward(weight)), weight)
