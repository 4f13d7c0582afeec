# SPDX-License-Identifier: Apache-2.0
"""Key maps of the CLIP image encoder, in the official and the transformers naming.

Sources: Wan-Video/Wan2.1, wan/modules/clip.py; huggingface/transformers,
src/transformers/models/clip/modeling_clip.py.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from checkpoints_convert.keys_dit import split
from checkpoints_convert.rules import Rule, Transform, column_of, linear_rules, norm_rules
from checkpoints_convert.sizes import Shapes, count_layers, shape_of, stated
from lvjax.core.errors import CheckpointError
from lvjax.models.image_encoder import ImageEncoderConfig

LAYOUTS = ("transformers", "official")
PREFIX = "vision_model."  # of transformers' files; its own models go without since version 5
HEAD_DIM = 80  # of ViT-H
_TO_QKV = "visual.transformer.{layer}.attn.to_qkv"
_QKV = tuple(f"blocks/attn/{name}" for name in "qkv")
# ours -> (transformers without prefix, official)
_LINEARS = {
    "attn/o": ("encoder.layers.{layer}.self_attn.out_proj", "visual.transformer.{layer}.attn.proj"),
    "mlp/fc1": ("encoder.layers.{layer}.mlp.fc1", "visual.transformer.{layer}.mlp.0"),
    "mlp/fc2": ("encoder.layers.{layer}.mlp.fc2", "visual.transformer.{layer}.mlp.2"),
}
_NORMS = {
    "pre_norm": ("pre_layrnorm", "visual.pre_norm"),  # spelled so in transformers
    "blocks/norm1": ("encoder.layers.{layer}.layer_norm1", "visual.transformer.{layer}.norm1"),
    "blocks/norm2": ("encoder.layers.{layer}.layer_norm2", "visual.transformer.{layer}.norm2"),
    "post_norm": ("post_layernorm", "visual.post_norm"),
}
_PATCH = ("embeddings.patch_embedding.weight", "visual.patch_embedding.weight")
_POSITION = ("embeddings.position_embedding.weight", "visual.pos_embedding")
# The official file holds the text encoder of its CLIP as well, which no Wan uses.
_TEXT_LINEARS = (
    *(f"textual.blocks.{{layer}}.{name}" for name in ("norm1", "norm2", "ffn.0", "ffn.2")),
    *(f"textual.blocks.{{layer}}.attn.{name}" for name in "qkvo"),
)
_TEXT = (
    "log_scale",
    *(f"textual.{name}_embedding.weight" for name in ("token", "type", "pos")),
    *(f"textual.{name}" for name in ("norm.weight", "norm.bias", "head.0.weight", "head.2.weight")),
    *(f"{name}.{part}" for name in _TEXT_LINEARS for part in ("weight", "bias")),
)
THIRDS = Transform(  # rows q, k, v of one Linear, weight [3*d,d] or bias [3*d], as three
    lambda a: tuple(part.T for part in np.split(a, 3)),
    lambda *parts: np.concatenate([part.T for part in parts]),
)
TOKEN = Transform(lambda a: a.reshape(-1), lambda a: a.reshape(1, 1, -1))  # [1,1,d] <-> [d]


def clip_layout(names: Iterable[str]) -> str | None:
    """The naming of a CLIP image encoder's arrays, None when they are not those of one."""
    names = set(names)
    for layout in LAYOUTS:
        if _prefix(names, layout) + _PATCH[column_of(layout, LAYOUTS)] in names:
            return layout
    return None


def _prefix(names: Iterable[str], layout: str) -> str:
    """What stands before most names of a checkpoint."""
    return "" if layout == "official" or _PATCH[0] in set(names) else PREFIX


def _official_rules() -> tuple[Rule, ...]:
    return (
        Rule("visual.cls_embedding", "class_embedding", TOKEN),
        Rule(_POSITION[1], "position", "squeeze"),
        Rule(f"{_TO_QKV}.weight", tuple(f"{path}/kernel" for path in _QKV), THIRDS),
        Rule(f"{_TO_QKV}.bias", tuple(f"{path}/bias" for path in _QKV), THIRDS),
        Rule("visual.head", "projection/kernel"),
        *(Rule(name, None) for name in _TEXT),
    )


def _transformers_rules(prefix: str) -> tuple[Rule, ...]:
    rules = [
        Rule(f"{prefix}embeddings.class_embedding", "class_embedding"),
        Rule(f"{prefix}{_POSITION[0]}", "position"),
        Rule(f"{prefix}embeddings.position_ids", None),
        *linear_rules("visual_projection", "projection", bias=False),
    ]
    for path in _QKV:
        rules += linear_rules(f"{prefix}encoder.layers.{{layer}}.self_attn.{path[-1]}_proj", path)
    return tuple(rules)


def clip_rules(names: Iterable[str], layout: str, cfg: ImageEncoderConfig) -> tuple[Rule, ...]:
    """The table of an image encoder; layout "transformers" or "official".

    names: of the checkpoint's arrays, which tell whether transformers' prefix is there; none for
      the way back, which has it.
    """
    column, prefix = column_of(layout, LAYOUTS), _prefix(names, layout)
    own = _official_rules() if layout == "official" else _transformers_rules(prefix)
    patch = split((cfg.channels,), (cfg.patch, cfg.patch))
    rules = [*own, Rule(prefix + _PATCH[column], "patch_embedding/kernel", patch)]
    for path, sources in _NORMS.items():
        rules += norm_rules(prefix + sources[column], path)
    for path, sources in _LINEARS.items():
        rules += linear_rules(prefix + sources[column], f"blocks/{path}")
    return tuple(rules)


def clip_config(shapes: Shapes, config: Mapping) -> ImageEncoderConfig:
    """The sizes of an image encoder, from the shapes of its arrays.

    config: what its config.json says, or nothing; it adds what shapes do not show (the heads, else
      80 wide, and the norm's epsilon) and must not contradict them.  Not read for official names:
      the config.json beside such a file is that of the transformer.
    Raises: CheckpointError when arrays are missing or contradict config.json.
    """
    layout = clip_layout(shapes) or LAYOUTS[0]
    column, prefix = column_of(layout, LAYOUTS), _prefix(shapes, layout)
    config = {} if layout == "official" else config

    def name(sources: tuple[str, str]) -> str:
        return prefix + sources[column]

    dim, channels, patch, _ = shape_of(shapes, name(_PATCH), 4)
    tokens = shape_of(shapes, name(_POSITION), 2 + column)[-2]
    side = math.isqrt(max(tokens - 1, 0))
    if side**2 + 1 != tokens:
        raise CheckpointError(f"{name(_POSITION)} has {tokens} rows, which is no square and one")
    head, axis = ("visual_projection.weight", 0) if column == 0 else ("visual.head", 1)
    stated(config, "hidden_act", "gelu")
    mlp = f"{name(_LINEARS['mlp/fc1'])}.weight"
    return ImageEncoderConfig(
        dim=stated(config, "hidden_size", dim),
        num_heads=config.get("num_attention_heads", dim // HEAD_DIM),
        num_layers=stated(config, "num_hidden_layers", count_layers(shapes, mlp)),
        mlp_dim=stated(config, "intermediate_size", shape_of(shapes, mlp.format(layer=0), 2)[0]),
        patch=stated(config, "patch_size", patch),
        size=stated(config, "image_size", side * patch),
        channels=stated(config, "num_channels", channels),
        projection_dim=shape_of(shapes, head, 2)[axis] if head in shapes else None,
        eps=config.get("layer_norm_eps", ImageEncoderConfig.eps),
    )
