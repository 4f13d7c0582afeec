# SPDX-License-Identifier: Apache-2.0
"""Key maps of the UMT5 text encoder, in the official and the transformers naming.

Sources: Wan-Video/Wan2.1, wan/modules/t5.py; huggingface/transformers,
src/transformers/models/umt5/modeling_umt5.py.
"""

from collections.abc import Iterable, Mapping

from checkpoints_convert.rules import Rule, column_of, linear_rules
from checkpoints_convert.sizes import Shapes, count_layers, shape_of, stated
from lvjax.models.umt5 import UMT5Config

LAYOUTS = ("transformers", "official")
# The names of the table of words.  transformers has two, of which a file may hold either or both:
# the first that is there is read, another must be equal to it.
_WORDS = {
    "transformers": ("shared.weight", "encoder.embed_tokens.weight"),
    "official": ("token_embedding.weight",),
}
_ATTENTION = ("encoder.block.{layer}.layer.0.SelfAttention", "blocks.{layer}.attn")
_FEED_FORWARD = "encoder.block.{layer}.layer.1.DenseReluDense"
_BIAS = (f"{_ATTENTION[0]}.relative_attention_bias", "blocks.{layer}.pos_embedding.embedding")
# Linears: ours -> (transformers, official).
_LINEARS = {
    **{f"attn/{name}": tuple(f"{place}.{name}" for place in _ATTENTION) for name in "qkvo"},
    "ffn/gate": (f"{_FEED_FORWARD}.wi_0", "blocks.{layer}.ffn.gate.0"),
    "ffn/fc1": (f"{_FEED_FORWARD}.wi_1", "blocks.{layer}.ffn.fc1"),
    "ffn/fc2": (f"{_FEED_FORWARD}.wo", "blocks.{layer}.ffn.fc2"),
}
# Arrays that stay as they are: ours -> (transformers, official).
_ARRAYS = {
    "norm": ("encoder.final_layer_norm", "norm"),
    "blocks/norm1": ("encoder.block.{layer}.layer.0.layer_norm", "blocks.{layer}.norm1"),
    "blocks/norm2": ("encoder.block.{layer}.layer.1.layer_norm", "blocks.{layer}.norm2"),
    "blocks/attn/relative_bias": _BIAS,
}
# A SentencePiece model that single-file checkpoints carry for their tokenizer.
_TOKENIZER = Rule("spiece_model", None)


def umt5_layout(names: Iterable[str]) -> str | None:
    """The naming of a UMT5 text encoder's arrays, None when they are not those of one."""
    names = set(names)
    for layout, bias in zip(LAYOUTS, _BIAS, strict=True):
        if f"{bias}.weight".format(layer=0) in names:
            return layout
    return None


def _words(names: Iterable[str], layout: str) -> tuple[str, ...]:
    """The names that the table of words has in a checkpoint, that which is read before others."""
    names = set(names)
    return tuple(name for name in _WORDS[layout] if name in names) or _WORDS[layout][:1]


def umt5_rules(names: Iterable[str], layout: str) -> tuple[Rule, ...]:
    """The table of a text encoder of any size; layout "transformers" or "official".

    names: of the checkpoint's arrays, which tell what the table of words is called; none for the
      way back, which calls it shared.weight.
    """
    column, (words, *copies) = column_of(layout, LAYOUTS), _words(names, layout)
    rules = [Rule(words, "embedding"), *(Rule(name, None, copy_of=words) for name in copies)]
    for path, sources in _ARRAYS.items():
        rules.append(Rule(f"{sources[column]}.weight", path))
    for path, sources in _LINEARS.items():
        rules += linear_rules(sources[column], f"blocks/{path}", bias=False)
    return (*rules, _TOKENIZER)


def umt5_config(shapes: Shapes, config: Mapping) -> UMT5Config:
    """The sizes of a text encoder, from the shapes of its arrays.

    config: what its config.json says, or nothing; it adds what shapes do not show (the largest
      distance, the norm's epsilon) and must not contradict them.  Not read for official names: the
      config.json beside such a file is that of the transformer.
    Raises: CheckpointError when arrays are missing or contradict config.json.
    """
    layout = umt5_layout(shapes) or LAYOUTS[0]
    column, config = column_of(layout, LAYOUTS), {} if layout == "official" else config

    def shape(sources: tuple[str, str]) -> tuple[int, ...]:
        return shape_of(shapes, f"{sources[column]}.weight".format(layer=0), 2)

    vocab, dim = shape_of(shapes, _words(shapes, layout)[0], 2)
    buckets, heads = shape(_BIAS)
    stated(config, "feed_forward_proj", "gated-gelu")
    return UMT5Config(
        vocab=stated(config, "vocab_size", vocab),
        dim=stated(config, "d_model", dim),
        head_dim=stated(config, "d_kv", shape(_LINEARS["attn/q"])[0] // heads),
        num_heads=stated(config, "num_heads", heads),
        ffn_dim=stated(config, "d_ff", shape(_LINEARS["ffn/fc1"])[0]),
        num_layers=stated(config, "num_layers", count_layers(shapes, f"{_BIAS[column]}.weight")),
        num_buckets=stated(config, "relative_attention_num_buckets", buckets),
        max_distance=config.get("relative_attention_max_distance", UMT5Config.max_distance),
        eps=config.get("layer_norm_epsilon", UMT5Config.eps),
    )
