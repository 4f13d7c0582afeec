# SPDX-License-Identifier: Apache-2.0
"""The pocket model's text encoder: word and position embeddings and one transformer block over at
most 16 words.

It stands where UMT5 stands in Wan, but for the padding, which is a word like any other here and
leaves the encoder as rows that know the prompt.  Rows of zeros, which a pretrained Wan expects, are
a trap for a model trained from nothing: before the words mean anything, the attention of every
layer flees to the one thing that is always the same, and through rows of zeros no gradient leads
back.
"""

from dataclasses import dataclass

import jax
from einops import rearrange

from lvjax.core.params import Param, Spec
from lvjax.core.shapes import expect
from lvjax.kernels.attention import attend
from lvjax.models.config import check, check_real, check_sizes
from lvjax.nn.linear import linear, linear_spec
from lvjax.nn.norm import layer_norm


@dataclass(frozen=True)
class PocketTextConfig:
    """vocabulary counts the padding id 0; length is the largest number of words; dim the width of
    the output.
    """

    vocabulary: int
    length: int = 16
    dim: int = 128
    num_heads: int = 2
    eps: float = 1e-6

    def __post_init__(self):
        check_sizes(self, "vocabulary", "length", "dim", "num_heads")
        check_real(self, "eps", 0, 1)
        divides = self.dim % self.num_heads == 0
        check(self, "dim", divides, f"a multiple of num_heads, {self.num_heads}")


def text_spec(cfg: PocketTextConfig) -> Spec:
    """Parameters of the encoder."""
    norm = {
        "scale": Param((cfg.dim,), ("embed",), "ones"),
        "bias": Param((cfg.dim,), ("embed",), "zeros"),
    }
    return {
        "word": Param((cfg.vocabulary, cfg.dim), (None, "embed"), 1.0),
        "position": Param((cfg.length, cfg.dim), (None, "embed"), 0.5),
        "norm1": norm,
        "qkv": linear_spec(cfg.dim, 3 * cfg.dim),
        "out": linear_spec(cfg.dim, cfg.dim, ("mlp", "embed")),
        "norm2": norm,
        "fc1": linear_spec(cfg.dim, 2 * cfg.dim),
        "fc2": linear_spec(2 * cfg.dim, cfg.dim, ("mlp", "embed")),
        "norm": norm,
    }


def encode_text(params, ids, cfg: PocketTextConfig):
    """ids int32 [B, M] (0 = padding; all 0 is the null prompt) -> text float32 [B, M, dim]."""
    expect(ids, "B M", "ids", M=cfg.length)
    x = params["word"][ids] + params["position"][None]
    qkv = linear(params["qkv"], layer_norm(x, cfg.eps, params["norm1"]))
    q, k, v = rearrange(qkv, "b m (s n d) -> s b m n d", s=3, n=cfg.num_heads)
    x = x + linear(params["out"], rearrange(attend(q, k, v), "b m n d -> b m (n d)"))
    x = x + linear(
        params["fc2"], jax.nn.gelu(linear(params["fc1"], layer_norm(x, cfg.eps, params["norm2"])))
    )
    return layer_norm(x, cfg.eps, params["norm"])
