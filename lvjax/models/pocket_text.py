# SPDX-License-Identifier: Apache-2.0
"""The pocket model's text encoder: word and position embeddings and one transformer block over at
most 16 words.

It stands where UMT5 stands in Wan: rows of padding leave it as exact zeros, and the DiT attends to
  them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange

from lvjax.core.params import Param, Spec
from lvjax.core.shapes import expect
from lvjax.kernels.attention import attend
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


def text_spec(cfg: PocketTextConfig) -> Spec:
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
    """ids int32 [B, M] (0 = padding) -> text float32 [B, M, dim]; padding rows are zero, a prompt
    without words is all zeros.
    """
    expect(ids, "B M", "ids", M=cfg.length)
    real = ids > 0
    x = params["word"][ids] + params["position"][None]
    qkv = linear(params["qkv"], layer_norm(x, cfg.eps, params["norm1"]))
    q, k, v = rearrange(qkv, "b m (s n d) -> s b m n d", s=3, n=cfg.num_heads)
    see = (real | ~real.any(-1, keepdims=True))[:, None, None, :]
    x = x + linear(params["out"], rearrange(attend(q, k, v, mask=see), "b m n d -> b m (n d)"))
    x = x + linear(
        params["fc2"], jax.nn.gelu(linear(params["fc1"], layer_norm(x, cfg.eps, params["norm2"])))
    )
    return jnp.where(real[..., None], layer_norm(x, cfg.eps, params["norm"]), 0.0)
