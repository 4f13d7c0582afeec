# SPDX-License-Identifier: Apache-2.0
"""One block of Wan's diffusion transformer: self-attention, cross-attention, feed-forward.

The residual stream, modulation and normalisation are float32; matrix products and attention run
in cfg.dtype.
Source: Wan-Video/Wan2.1: wan/modules/model.py (WanAttentionBlock); arXiv:2503.20314.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from lvjax.core.params import Param, Spec
from lvjax.kernels.attention import attend
from lvjax.models.config import DiTConfig
from lvjax.nn.linear import linear, linear_spec
from lvjax.nn.norm import layer_norm, rms_norm
from lvjax.nn.rope import rotate


def norm_spec(dim: int) -> Spec:
    """An affine LayerNorm."""
    return {"scale": Param((dim,), ("embed",), "ones"), "bias": Param((dim,), ("embed",), "zeros")}


def _attention_spec(cfg: DiTConfig, image: bool = False) -> Spec:
    d = cfg.dim
    gain = Param((d,), ("heads",), "ones")
    spec = {name: linear_spec(d, d, ("embed", "heads")) for name in ("q", "k", "v")}
    spec |= {"o": linear_spec(d, d, ("heads", "embed")), "norm_q": gain, "norm_k": gain}
    if image:
        spec |= {name: linear_spec(d, d, ("embed", "heads")) for name in ("k_img", "v_img")}
        spec["norm_k_img"] = gain
    return spec


def block_spec(cfg: DiTConfig) -> Spec:
    """Parameters of one block."""
    return {
        "modulation": Param((6, cfg.dim), (None, "embed"), cfg.dim**-0.5),
        "self_attn": _attention_spec(cfg),
        "norm3": norm_spec(cfg.dim),
        "cross_attn": _attention_spec(cfg, image=cfg.image_dim is not None),
        "ffn": {
            "fc1": linear_spec(cfg.dim, cfg.ffn_dim, ("embed", "mlp")),
            "fc2": linear_spec(cfg.ffn_dim, cfg.dim, ("mlp", "embed")),
        },
    }


def split_heads(x, cfg: DiTConfig):
    """[B, L, N*D] -> [B, L, N, D]."""
    return rearrange(x, "b l (n d) -> b l n d", n=cfg.num_heads)


def merge_heads(x):
    """[B, L, N, D] -> [B, L, N*D]."""
    return rearrange(x, "b l n d -> b l (n d)")


def modulate(x, shift, scale):
    """x [B, L, C] float32 times 1 + scale, plus shift, each [B, U, C]: one for L/U tokens."""
    groups = rearrange(x, "b (u r) c -> b u r c", u=shift.shape[1])
    return rearrange(groups * (1.0 + scale[:, :, None]) + shift[:, :, None], "b u r c -> b (u r) c")


def gated(x, y, gate):
    """x [B, L, C] float32 plus gate [B, U, C] times y [B, L, C]."""
    groups = rearrange(y.astype(jnp.float32), "b (u r) c -> b u r c", u=gate.shape[1])
    return x + rearrange(groups * gate[:, :, None], "b u r c -> b (u r) c")


def self_attention(params, x, rotation, memory, cfg: DiTConfig):
    """x [B, L, C] -> [B, L, C], the memory after the write, the un-rotated keys [B, L, N, D].

    memory: None, or (past, layer): rotated keys and values go there, and attention runs over what
        is visible of it.
    """
    q = split_heads(rms_norm(params["norm_q"], linear(params["q"], x), cfg.eps), cfg)
    keys = split_heads(rms_norm(params["norm_k"], linear(params["k"], x), cfg.eps), cfg)
    v = split_heads(linear(params["v"], x), cfg)
    q, k, mask = rotate(q, rotation), rotate(keys, rotation), None
    past = None
    if memory is not None:
        past, layer = memory
        past, k, v, mask = past.extend(layer, k, v)
        k, v = k.astype(q.dtype), v.astype(q.dtype)
    out = checkpoint_name(attend(q, k, v, mask=mask), "attention")
    return linear(params["o"], merge_heads(out)), past, keys


def cross_keys_values(params, tokens, cfg: DiTConfig, suffix: str = ""):
    """Keys and values [B, M, N, D] of context tokens [B, M, C]; suffix "_img" for the image's."""
    k = rms_norm(params["norm_k" + suffix], linear(params["k" + suffix], tokens), cfg.eps)
    return split_heads(k, cfg), split_heads(linear(params["v" + suffix], tokens), cfg)


def cross_attention(params, x, context, cfg: DiTConfig):
    """x [B, L, C] attends to one layer's context; text and image are summed, then projected."""
    q = split_heads(rms_norm(params["norm_q"], linear(params["q"], x), cfg.eps), cfg)
    out = attend(q, context.k, context.v)
    if context.image_k is not None:
        out = out + attend(q, context.image_k, context.image_v)
    return linear(params["o"], merge_heads(checkpoint_name(out, "attention")))


def feed_forward(params, x):
    """Linear, GELU (tanh form), Linear."""
    hidden = jax.nn.gelu(linear(params["fc1"], x, jnp.float32), approximate=True)
    return linear(params["fc2"], hidden.astype(x.dtype))


def block(params, x, e0, context, rotation, memory, cfg: DiTConfig):
    """x [B, L, C] float32 and e0 [B, U, 6, C] float32 -> (x, past, keys).

    context: this layer's.  memory, past, keys: see `self_attention`.
    """
    dtype = jnp.dtype(cfg.dtype)
    m = params["modulation"].astype(jnp.float32)[None, None] + e0
    shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, :, i] for i in range(6))
    with jax.named_scope("self_attention"):
        h = modulate(layer_norm(x, cfg.eps), shift1, scale1).astype(dtype)
        y, past, keys = self_attention(params["self_attn"], h, rotation, memory, cfg)
        x = gated(x, y, gate1)
    with jax.named_scope("cross_attention"):
        h = layer_norm(x, cfg.eps, params["norm3"]).astype(dtype)
        x = x + cross_attention(params["cross_attn"], h, context, cfg).astype(jnp.float32)
    with jax.named_scope("feed_forward"):
        h = modulate(layer_norm(x, cfg.eps), shift2, scale2).astype(dtype)
        x = gated(x, feed_forward(params["ffn"], h), gate2)
    return x, past, keys
