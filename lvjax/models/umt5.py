# SPDX-License-Identifier: Apache-2.0
"""The text encoder of every Wan, UMT5's: `umt5_spec`, `encode_text`, and its layers one by one.

Owns: token ids to text rows.  `embed`, `block` and `final_norm` are what `encode_text` is made of,
for callers who hold one layer of the weights at a time.  Does not own: text to ids
(data/tokenizer.py).
Source: google-research/t5x (UMT5), arXiv:2304.09151; Wan-Video/Wan2.1: wan/modules/t5.py.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from lvjax.core.params import Param, Spec, stack
from lvjax.core.shapes import expect_tokens
from lvjax.models.config import check, check_real, check_sizes
from lvjax.nn.linear import linear, linear_spec
from lvjax.nn.norm import rms_norm

HEADS = 8
"""Heads whose scores exist at once: 8 MiB of float32 for a text of 512 tokens."""


@dataclass(frozen=True)
class UMT5Config:
    """UMT5's encoder.  Defaults: UMT5-XXL, which every released Wan uses.

    head_dim: width of a head; num_heads * head_dim need not be dim.  num_buckets: rows of a layer's
      table of relative biases, half of them for keys behind the query.  max_distance: tokens from
      which on all distances share a row.  length: the longest text.
    dtype: activations, "float32" or "bfloat16"; parameters keep their stored dtype.
    """

    vocab: int = 256384
    dim: int = 4096
    head_dim: int = 64
    num_heads: int = 64
    ffn_dim: int = 10240
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    length: int = 512
    dtype: str = "bfloat16"

    def __post_init__(self):
        check_sizes(self, "vocab", "dim", "head_dim", "num_heads", "ffn_dim", "num_layers")
        check_sizes(self, "num_buckets", "max_distance", "length")
        check(self, "num_buckets", self.num_buckets % 4 == 0, "a multiple of 4")
        exact = self.num_buckets // 4
        check(self, "max_distance", self.max_distance > exact, f"more than {exact}")
        check_real(self, "eps", 0, 1)
        right = self.dtype in ("float32", "bfloat16")
        check(self, "dtype", right, "float32 or bfloat16: its activations overflow float16")


def _block_spec(cfg: UMT5Config) -> Spec:
    inner, gain = cfg.num_heads * cfg.head_dim, Param((cfg.dim,), ("embed",), "ones")
    into = {"n_in": cfg.dim, "bias": False}
    attn = {name: linear_spec(n_out=inner, axes=("embed", "heads"), **into) for name in "qkv"}
    attn["o"] = linear_spec(inner, cfg.dim, ("heads", "embed"), bias=False)
    attn["relative_bias"] = Param((cfg.num_buckets, cfg.num_heads), (None, "heads"), 0.1)
    ffn = {name: linear_spec(n_out=cfg.ffn_dim, **into) for name in ("gate", "fc1")}
    ffn["fc2"] = linear_spec(cfg.ffn_dim, cfg.dim, ("mlp", "embed"), bias=False)
    return {"norm1": gain, "attn": attn, "norm2": gain, "ffn": ffn}


def umt5_spec(cfg: UMT5Config) -> Spec:
    """Parameters of the encoder; the blocks are stacked on a leading axis, nothing has a bias."""
    return {
        "embedding": Param((cfg.vocab, cfg.dim), (None, "embed"), 1.0),
        "blocks": stack(_block_spec(cfg), cfg.num_layers),
        "norm": Param((cfg.dim,), ("embed",), "ones"),
    }


def bucket(distance: np.ndarray, cfg: UMT5Config) -> np.ndarray:
    """The row of the bias table for key position minus query position, int [...] -> int32 [...].

    Distances below num_buckets / 4 have a row each, farther ones share rows that widen as powers up
    to max_distance; keys behind the query come in the upper half.  Where a row begins is found in
    whole numbers: the usual logarithm is rounded, differently by machine, at 16, 32 and 64.
    """
    half = cfg.num_buckets // 2
    exact = half // 2
    steps = half - exact
    # The row exact + i begins at the first n with n / exact >= (max_distance / exact) ** (i/steps).
    begins = list(range(exact + 1))
    for i in range(1, steps):
        n = begins[-1]
        while n**steps < cfg.max_distance**i * exact ** (steps - i):
            n += 1
        begins.append(n)
    row = np.searchsorted(begins, np.abs(distance), side="right") - 1
    return (row + half * (distance > 0)).astype(np.int32)


def _attend(q, k, v, relative_bias, mask, cfg: UMT5Config):
    """softmax(q k^T + relative bias) v, without any scale, a few heads at a time.

    q, k, v: [B, M, N, D].  relative_bias: [num_buckets, N].  mask: bool [B, M], True = a token.
    Scores and softmax in float32; probabilities are rounded to v's dtype.
    """
    positions = np.arange(q.shape[1])
    rows = bucket(positions[None, :] - positions[:, None], cfg)

    def head(xs):
        q, k, v, bias = xs
        scores = jnp.einsum("bld,bsd->bls", q, k, preferred_element_type=jnp.float32)
        scores = scores + bias.astype(jnp.float32)[rows][None]
        scores = jnp.where(mask[:, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bls,bsd->bld", weights, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype)

    heads = tuple(rearrange(a, "b m n d -> n b m d") for a in (q, k, v))
    out = lax.map(head, (*heads, relative_bias.T), batch_size=HEADS)
    return rearrange(out, "n b m d -> b m (n d)")


def embed(embedding, ids):
    """ids int32 [B, M] -> the residual stream, float32 [B, M, C].

    Ids are not checked here: one beyond the table gets its last row.
    """
    return embedding[ids].astype(jnp.float32)


def block(params, x, mask, cfg: UMT5Config):
    """One layer: x float32 [B, M, C] -> the same, mask bool [B, M]; params without layer axis.

    The residual stream is float32, as the norms are; matrix products run in cfg.dtype.
    """
    dtype = jnp.dtype(cfg.dtype)
    attn, ffn = params["attn"], params["ffn"]
    with jax.named_scope("self_attention"):
        h = rms_norm(params["norm1"], x, cfg.eps).astype(dtype)
        q, k, v = (
            rearrange(linear(attn[name], h), "b m (n d) -> b m n d", n=cfg.num_heads)
            for name in "qkv"
        )
        h = _attend(q, k, v, attn["relative_bias"], mask, cfg)
        x = x + linear(attn["o"], h, jnp.float32)
    with jax.named_scope("feed_forward"):
        h = rms_norm(params["norm2"], x, cfg.eps).astype(dtype)
        gate = jax.nn.gelu(linear(ffn["gate"], h, jnp.float32), approximate=True)
        h = (gate * linear(ffn["fc1"], h, jnp.float32)).astype(dtype)
        return x + linear(ffn["fc2"], h, jnp.float32)


def final_norm(weight, x, mask, cfg: UMT5Config):
    """x float32 [B, M, C] -> text rows [B, M, C] of cfg.dtype; zeros where mask [B, M] is False."""
    y = rms_norm(weight, x, cfg.eps)
    return jnp.where(mask[..., None], y, 0.0).astype(cfg.dtype)


def encode_text(params, ids, mask, cfg: UMT5Config):
    """Text rows for the transformer.

    ids: int32 [B, M], M <= cfg.length, each id below cfg.vocab.  Padding behind the text changes
        nothing, so M may be the longest text's length as well as cfg.length.
    mask: bool or int [B, M], true for tokens (the end-of-text token among them), false for padding.
    Returns: [B, M, dim] of cfg.dtype; padding rows are exact zeros, as Wan's transformers expect.
    Raises: InputError for wrong shapes or a text that is too long.
    """
    expect_tokens(ids, mask, cfg.length)
    mask = mask.astype(bool)

    def layer(x, p):
        return block(p, x, mask, cfg), None

    x, _ = lax.scan(layer, embed(params["embedding"], ids), params["blocks"])
    return final_norm(params["norm"], x, mask, cfg)
