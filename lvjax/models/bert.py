# SPDX-License-Identifier: Apache-2.0
"""BERT's encoder and the sentence features that Sentence-BERT makes of it: `bert_spec`,
`encode_bert`, `sentence_features`.

Owns: token ids to one row per token, and to one vector per text.  Does not own: text to ids
(data/wordpiece.py).
Source: arXiv:1810.04805 (BERT); arXiv:1908.10084 (Sentence-BERT).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from lvjax.core.errors import InputError
from lvjax.core.params import Param, Spec, stack
from lvjax.core.shapes import expect_tokens
from lvjax.kernels.attention import attend
from lvjax.models.config import check, check_real, check_sizes
from lvjax.models.dit_block import norm_spec
from lvjax.nn.linear import linear, linear_spec
from lvjax.nn.norm import layer_norm

POOLINGS = ("mean", "cls")
"""How a text's tokens become one vector: their mean, or the first token, [CLS]."""


@dataclass(frozen=True)
class BertConfig:
    """BERT's encoder.  Defaults: all-MiniLM-L6-v2.

    positions: rows of the learned table of positions, the longest text.  types: rows of the table
      of token types; a text on its own is all of the first.
    hidden_act: "gelu", which is the exact one.
    """

    vocab: int = 30522
    dim: int = 384
    num_layers: int = 6
    num_heads: int = 12
    ffn_dim: int = 1536
    positions: int = 512
    types: int = 2
    eps: float = 1e-12
    hidden_act: str = "gelu"

    def __post_init__(self):
        check_sizes(self, "vocab", "dim", "num_layers", "num_heads", "ffn_dim", "positions")
        check_sizes(self, "types")
        check_real(self, "eps", 0, 1)
        check(self, "hidden_act", self.hidden_act == "gelu", "gelu")
        divides = self.dim % self.num_heads == 0
        check(self, "dim", divides, f"a multiple of num_heads, {self.num_heads}")


def _block_spec(cfg: BertConfig) -> Spec:
    attn = {name: linear_spec(cfg.dim, cfg.dim, ("embed", "heads")) for name in "qkv"}
    return {
        "attn": attn | {"o": linear_spec(cfg.dim, cfg.dim, ("heads", "embed"))},
        "norm1": norm_spec(cfg.dim),
        "mlp": {
            "fc1": linear_spec(cfg.dim, cfg.ffn_dim, ("embed", "mlp")),
            "fc2": linear_spec(cfg.ffn_dim, cfg.dim, ("mlp", "embed")),
        },
        "norm2": norm_spec(cfg.dim),
    }


def bert_spec(cfg: BertConfig) -> Spec:
    """Parameters of the encoder; the blocks are stacked on a leading axis."""
    return {
        "embedding": Param((cfg.vocab, cfg.dim), (None, "embed"), 0.02),
        "position": Param((cfg.positions, cfg.dim), (None, "embed"), 0.02),
        "type": Param((cfg.types, cfg.dim), (None, "embed"), 0.02),
        "norm": norm_spec(cfg.dim),
        "blocks": stack(_block_spec(cfg), cfg.num_layers),
    }


def _embed(params, ids, cfg: BertConfig):
    """ids int32 [B, M] -> the residual stream float32 [B, M, C], normed.

    Ids are not checked here: one beyond the table gets its last row.
    """
    x = params["embedding"][ids] + params["type"][0][None, None]
    x = x + params["position"][: ids.shape[1]][None]
    return layer_norm(x.astype(jnp.float32), cfg.eps, params["norm"])


def _attention(params, x, mask, cfg: BertConfig):
    """Self-attention over the tokens, x float32 [B, M, C], mask bool [B, M]."""
    split = "b m (n d) -> b m n d"
    q, k, v = (rearrange(linear(params[name], x), split, n=cfg.num_heads) for name in "qkv")
    h = attend(q, k, v, mask=mask[:, None, None, :])
    return linear(params["o"], rearrange(h, "b m n d -> b m (n d)"))


def _feed_forward(params, x):
    return linear(params["fc2"], jax.nn.gelu(linear(params["fc1"], x), approximate=False))


def _block(params, x, mask, cfg: BertConfig):
    """One layer of the residual stream x, float32 [B, M, C]; each norm stands behind its sum."""
    with jax.named_scope("self_attention"):
        x = layer_norm(x + _attention(params["attn"], x, mask, cfg), cfg.eps, params["norm1"])
    with jax.named_scope("feed_forward"):
        return layer_norm(x + _feed_forward(params["mlp"], x), cfg.eps, params["norm2"])


def encode_bert(params, ids, mask, cfg: BertConfig):
    """Rows for the tokens of texts that stand on their own.

    ids: int32 [B, M], M <= cfg.positions, each id below cfg.vocab.
    mask: bool or int [B, M], true for tokens, false for padding, which no token sees.
    Returns: float32 [B, M, dim]; rows of padding hold numbers without a meaning.
    Raises: InputError for wrong shapes or a text that is too long.
    """
    expect_tokens(ids, mask, cfg.positions)
    mask = mask.astype(bool)

    def layer(x, p):
        return _block(p, x, mask, cfg), None

    return lax.scan(layer, _embed(params, ids, cfg), params["blocks"])[0]


def pool(tokens, mask, pooling: str = "mean"):
    """One vector per text: tokens float32 [B, M, C], mask bool [B, M] -> float32 [B, C].

    A text without a token has zeros as its mean.
    Raises: InputError for a pooling that is not in `POOLINGS`.
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling is {pooling!r}; give one of {', '.join(POOLINGS)}")
    if pooling == "cls":
        return tokens[:, 0]
    count = jnp.maximum(mask.sum(1, keepdims=True), 1).astype(jnp.float32)
    return jnp.where(mask[..., None], tokens, 0.0).sum(1) / count


def sentence_features(
    params, ids, mask, cfg: BertConfig, pooling: str = "mean", normalise: bool = True
):
    """What Sentence-BERT compares texts by.

    ids, mask: as in `encode_bert`.  pooling: one of `POOLINGS`.  normalise: to unit length.
    Returns: float32 [B, dim].
    Raises: InputError as `encode_bert` and `pool`.
    """
    x = pool(encode_bert(params, ids, mask, cfg), mask.astype(bool), pooling)
    if not normalise:
        return x
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
