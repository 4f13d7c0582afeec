# SPDX-License-Identifier: Apache-2.0
"""Key map of a BERT encoder in the transformers naming.

It is no part of a Wan model, so `recognise` does not know it: sentence_folder.py opens it.
Source: huggingface/transformers, src/transformers/models/bert/modeling_bert.py.
"""

from collections.abc import Iterable, Mapping

from checkpoints_convert.rules import Rule, linear_rules, norm_rules
from checkpoints_convert.sizes import Shapes, count_layers, shape_of, stated
from lvjax.core.errors import CheckpointError
from lvjax.models.bert import BertConfig

PREFIX = "bert."  # of checkpoints that were saved with a head on top
_TABLES = {
    "embedding": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "type": "embeddings.token_type_embeddings",
}
_LAYER = "encoder.layer.{layer}"
_LINEARS = {
    "attn/q": f"{_LAYER}.attention.self.query",
    "attn/k": f"{_LAYER}.attention.self.key",
    "attn/v": f"{_LAYER}.attention.self.value",
    "attn/o": f"{_LAYER}.attention.output.dense",
    "mlp/fc1": f"{_LAYER}.intermediate.dense",
    "mlp/fc2": f"{_LAYER}.output.dense",
}
_NORMS = {
    "norm": "embeddings.LayerNorm",
    "blocks/norm1": f"{_LAYER}.attention.output.LayerNorm",
    "blocks/norm2": f"{_LAYER}.output.LayerNorm",
}
# What no token row needs: numbers 0 to positions - 1, the layer over [CLS], heads of pre-training.
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
_TRANSFORM = "cls.predictions.transform"
_HEADS = (
    "cls.predictions.bias",
    *(
        f"{name}.{part}"
        for name in (f"{_TRANSFORM}.dense", f"{_TRANSFORM}.LayerNorm", "cls.predictions.decoder")
        for part in ("weight", "bias")
    ),
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
)


def _prefix(names: Iterable[str]) -> str:
    return PREFIX if f"{PREFIX}{_TABLES['embedding']}.weight" in names else ""


def bert_rules(names: Iterable[str]) -> tuple[Rule, ...]:
    """The table of an encoder of any size.

    names: of the checkpoint's arrays, which tell whether the prefix is there.
    """
    prefix = _prefix(set(names))
    rules = [Rule(f"{prefix}{source}.weight", path) for path, source in _TABLES.items()]
    for path, source in _NORMS.items():
        rules += norm_rules(prefix + source, path)
    for path, source in _LINEARS.items():
        rules += linear_rules(prefix + source, f"blocks/{path}")
    rules += [Rule(prefix + name, None) for name in _UNUSED]
    return (*rules, *(Rule(name, None) for name in _HEADS))


def bert_config(shapes: Shapes, config: Mapping) -> BertConfig:
    """The sizes of an encoder, from the shapes of its arrays.

    config: what its config.json says.  It adds what shapes do not show (the heads, the norm's
      epsilon), must not contradict them, and must name this architecture: RoBERTa's arrays have
      the same names and other positions.
    Raises: CheckpointError for another architecture, or when arrays are missing or contradict
      config.json; InputError for sizes that cannot be.
    """
    for name, known, usual in (
        ("model_type", "bert", None),
        ("hidden_act", "gelu", None),
        ("position_embedding_type", "absolute", "absolute"),
        ("is_decoder", False, False),
    ):
        if (said := config.get(name, usual)) != known:
            raise CheckpointError(
                f"config.json says {name} {said!r}, and only {known!r} is read; give a BERT "
                "encoder, as all-MiniLM-L6-v2 has"
            )
    if "num_attention_heads" not in config:
        raise CheckpointError("config.json does not say num_attention_heads; download it again")
    prefix = _prefix(shapes)

    def shape(source: str) -> tuple[int, ...]:
        return shape_of(shapes, f"{prefix}{source}.weight".format(layer=0), 2)

    vocab, dim = shape(_TABLES["embedding"])
    layers = count_layers(shapes, f"{prefix}{_LINEARS['attn/q']}.weight")
    return BertConfig(
        vocab=stated(config, "vocab_size", vocab),
        dim=stated(config, "hidden_size", dim),
        num_heads=config["num_attention_heads"],
        ffn_dim=stated(config, "intermediate_size", shape(_LINEARS["mlp/fc1"])[0]),
        num_layers=stated(config, "num_hidden_layers", layers),
        positions=stated(config, "max_position_embeddings", shape(_TABLES["position"])[0]),
        types=stated(config, "type_vocab_size", shape(_TABLES["type"])[0]),
        eps=config.get("layer_norm_eps", BertConfig.eps),
    )
