# SPDX-License-Identifier: Apache-2.0
"""Key maps of Wan's diffusion transformer, in the official and the diffusers naming, and its sizes.

Sources: Wan-Video/Wan2.1, wan/modules/model.py; huggingface/diffusers,
scripts/convert_wan_to_diffusers.py.
"""

import math
from collections.abc import Mapping

import numpy as np

from checkpoints_convert.rules import Rule, Transform, column_of, linear_rules, norm_rules
from checkpoints_convert.sizes import Shapes, count_layers, shape_of, stated
from lvjax.core.errors import CheckpointError
from lvjax.models.config import DiTConfig

# Linears: ours -> (diffusers, official).
_DIT_LINEARS = {
    **{
        f"text_embedding/fc{i + 1}": (
            f"condition_embedder.text_embedder.linear_{i + 1}",
            f"text_embedding.{2 * i}",
        )
        for i in range(2)
    },
    **{
        f"time_embedding/fc{i + 1}": (
            f"condition_embedder.time_embedder.linear_{i + 1}",
            f"time_embedding.{2 * i}",
        )
        for i in range(2)
    },
    "time_projection": ("condition_embedder.time_proj", "time_projection.1"),
    "image_embedding/fc1": ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    "image_embedding/fc2": ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    **{
        f"blocks/{ours}/{name}": (
            f"blocks.{{layer}}.{theirs}.{'to_out.0' if name == 'o' else 'to_' + name}",
            f"blocks.{{layer}}.{ours}.{name}",
        )
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name in "qkvo"
    },
    **{
        f"blocks/cross_attn/{name}_img": (
            f"blocks.{{layer}}.attn2.add_{name}_proj",
            f"blocks.{{layer}}.cross_attn.{name}_img",
        )
        for name in "kv"
    },
    "blocks/ffn/fc1": ("blocks.{layer}.ffn.net.0.proj", "blocks.{layer}.ffn.0"),
    "blocks/ffn/fc2": ("blocks.{layer}.ffn.net.2", "blocks.{layer}.ffn.2"),
    "head/linear": ("proj_out", "head.head"),
}
# LayerNorms with weight and bias.  Before cross-attention: norm3 officially, norm2 in diffusers.
_DIT_NORMS = {
    "blocks/norm3": ("blocks.{layer}.norm2", "blocks.{layer}.norm3"),
    "image_embedding/norm1": ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    "image_embedding/norm2": ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
}
# Single arrays: ours -> (diffusers, official, transform).
_DIT_ARRAYS = {
    "patch_embedding/bias": ("patch_embedding.bias", "patch_embedding.bias", "same"),
    "blocks/modulation": (
        "blocks.{layer}.scale_shift_table",
        "blocks.{layer}.modulation",
        "squeeze",
    ),
    "head/modulation": ("scale_shift_table", "head.modulation", "squeeze"),
    "image_embedding/pos": (
        "condition_embedder.image_embedder.pos_embed",
        "img_emb.emb_pos",
        "squeeze",
    ),
    **{
        f"blocks/{ours}/norm_{name}": (
            f"blocks.{{layer}}.{theirs}.norm_{'added_k' if name == 'k_img' else name}.weight",
            f"blocks.{{layer}}.{ours}.norm_{name}.weight",
            "same",
        )
        for ours, theirs, names in (
            ("self_attn", "attn1", ("q", "k")),
            ("cross_attn", "attn2", ("q", "k", "k_img")),
        )
        for name in names
    },
}


def split(channels: tuple[int, ...], patch: tuple[int, int, int]) -> Transform:
    """A convolution whose stride is its kernel, as one matrix for each group of input channels.

    [d, sum(channels), *patch] <-> matrices [c * pt * ph * pw, d] with c slowest; the convolution is
    the sum of their products.  One group gives one matrix, several give a tuple.
    """
    edges = [sum(channels[: i + 1]) for i in range(len(channels) - 1)]

    def forward(a):
        parts = [p.reshape(p.shape[0], -1).T for p in np.split(a, edges, axis=1)]
        return parts[0] if len(parts) == 1 else tuple(parts)

    def inverse(*parts):
        return np.concatenate([p.T.reshape(p.shape[1], -1, *patch) for p in parts], axis=1)

    return Transform(forward, inverse)


LAYOUTS = ("diffusers", "official")


def _dit_table(layout: str) -> tuple[Rule, ...]:
    """Every DiT array but patch_embedding.weight, whose split depends on the model."""
    column = column_of(layout, LAYOUTS)
    rules = []
    for path, names in _DIT_LINEARS.items():
        rules += linear_rules(names[column], path)
    for path, names in _DIT_NORMS.items():
        rules += norm_rules(names[column], path)
    rules += [Rule(names[column], path, names[2]) for path, names in _DIT_ARRAYS.items()]
    return tuple(rules)


def dit_rules(cfg: DiTConfig, layout: str) -> tuple[Rule, ...]:
    """The table of a DiT; layout "diffusers" or "official".

    Rules for an image branch are always among them: beside the spec, a plan shows what is missing.
    """
    channels, target = (cfg.in_channels,), "patch_embedding/kernel"
    if cfg.condition_channels:
        channels += (cfg.condition_channels,)
        target = (target, "condition_embedding/kernel")
    patch = Rule("patch_embedding.weight", target, split(channels, cfg.patch))
    return (*_dit_table(layout), patch)


# Where sizes are read, and what tells a naming: ours -> (diffusers, official).
_SIZES = {
    "layers": ("blocks.{layer}.attn1.to_q.weight", "blocks.{layer}.self_attn.q.weight"),
    "ffn": ("blocks.0.ffn.net.0.proj.weight", "blocks.0.ffn.0.weight"),
    "head": ("proj_out.weight", "head.head.weight"),
    "text": ("condition_embedder.text_embedder.linear_1.weight", "text_embedding.0.weight"),
    "time": ("condition_embedder.time_embedder.linear_1.weight", "time_embedding.0.weight"),
    "image": ("condition_embedder.image_embedder.norm1.weight", "img_emb.proj.0.weight"),
    "place": ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
}
HEAD_DIM = 128  # of every released Wan


def dit_layout(names) -> str | None:
    """The naming of a DiT's arrays, None when they are not those of one."""
    for column, layout in enumerate(LAYOUTS):
        first = _SIZES["layers"][column].format(layer=0)
        if "patch_embedding.weight" in names and first in names:
            return layout
    return None


def dit_config(shapes: Shapes, layout: str, config: Mapping) -> DiTConfig:
    """The sizes of a DiT, from the shapes of its arrays.

    config: what its config.json says, or nothing; it adds what shapes do not show (heads, eps, the
      text's length) and must not contradict them.
    Raises: CheckpointError when arrays are missing, or something does not fit together.
    """
    name = {size: names[column_of(layout, LAYOUTS)] for size, names in _SIZES.items()}
    dim, channels, *patch = shape_of(shapes, "patch_embedding.weight", 5)
    out_channels = shape_of(shapes, name["head"], 2)[0] // math.prod(patch)
    image = name["image"] in shapes
    return DiTConfig(
        dim=dim,
        num_heads=_heads(dim, config),
        num_layers=stated(config, "num_layers", count_layers(shapes, name["layers"])),
        ffn_dim=stated(config, "ffn_dim", shape_of(shapes, name["ffn"], 2)[0]),
        in_channels=out_channels,
        out_channels=out_channels,
        condition_channels=channels - out_channels,
        patch=tuple(patch),
        text_dim=stated(config, "text_dim", shape_of(shapes, name["text"], 2)[1]),
        text_len=config.get("text_len", DiTConfig.text_len),
        image_dim=shape_of(shapes, name["image"], 1)[0] if image else None,
        image_pos_len=shape_of(shapes, name["place"], 3)[1] if name["place"] in shapes else 0,
        freq_dim=stated(config, "freq_dim", shape_of(shapes, name["time"], 2)[1]),
        eps=config.get("eps", DiTConfig.eps),
    )


def _heads(dim: int, config: Mapping) -> int:
    """Attention heads: from config.json, else by Wan's head size."""
    heads = config.get("num_attention_heads", config.get("num_heads"))
    if heads is None and dim % HEAD_DIM:
        raise CheckpointError(
            f"width {dim} is not a multiple of {HEAD_DIM}; put its config.json, which tells the "
            "heads, beside it"
        )
    heads = dim // HEAD_DIM if heads is None else int(heads)
    size = int(config.get("attention_head_dim", dim // heads))
    if heads * size != dim:
        raise CheckpointError(f"config.json says {heads} heads of {size}, the width is {dim}")
    return heads
