# SPDX-License-Identifier: Apache-2.0
"""Blocks of Wan's causal video autoencoder: specs, and functions (params, x, state) -> (x, state).

x is [B,T,H,W,C].  A state mirrors the block's parameters and holds the last input frames of each
causal convolution; state None marks the first chunk, one frame, which the temporal resampling
layers pass through.  Sources: Wan-Video/Wan2.1, wan/modules/vae.py; Wan-Video/Wan2.2,
wan/modules/vae2_2.py (the shortcuts).
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from lvjax.core.params import Param, Spec
from lvjax.kernels.attention import attend
from lvjax.nn.conv import causal_conv3d, conv2d, conv2d_spec, conv3d_spec, upsample_conv2d
from lvjax.nn.norm import channel_norm


def norm_spec(n: int) -> Param:
    """Parameters of a channel norm."""
    return Param((n,), (None,), "ones")


def chain(blocks: dict, params, x, state):
    """Run `blocks`, {name: block}, in order; the states of all of them under their names."""
    new = {}
    for name, block in blocks.items():
        x, new[name] = block(params[name], x, None if state is None else state[name])
    return x, new


def norm_silu_conv(norm, conv, x, history):
    """Channel norm, SiLU and a causal convolution."""
    return causal_conv3d(conv, jax.nn.silu(channel_norm(norm, x)), history)


def residual_spec(n_in: int, n_out: int) -> Spec:
    """Parameters of a residual block."""
    spec = {
        "norm1": norm_spec(n_in),
        "conv1": conv3d_spec(n_in, n_out),
        "norm2": norm_spec(n_out),
        "conv2": conv3d_spec(n_out, n_out),
    }
    if n_in != n_out:
        spec["shortcut"] = conv2d_spec(n_in, n_out, 1)
    return spec


def residual(params, x, state):
    """Two norm-SiLU-conv layers beside the identity (a pointwise conv where channels change)."""
    past = state or {"conv1": None, "conv2": None}
    new = {}
    h, new["conv1"] = norm_silu_conv(params["norm1"], params["conv1"], x, past["conv1"])
    h, new["conv2"] = norm_silu_conv(params["norm2"], params["conv2"], h, past["conv2"])
    return (conv2d(params["shortcut"], x) if "shortcut" in params else x) + h, new


def attention_spec(n: int) -> Spec:
    """Parameters of the attention within a frame."""
    return {"norm": norm_spec(n), "qkv": conv2d_spec(n, 3 * n, 1), "out": conv2d_spec(n, n, 1)}


def attention(params, x, state):
    """Self-attention with one head over the positions of each frame; no state."""
    b, t, h, w, c = x.shape
    qkv = conv2d(params["qkv"], channel_norm(params["norm"], x)).reshape(b * t, h * w, 3, c)
    with jax.named_scope("attention"):
        y = attend(qkv[:, :, 0:1], qkv[:, :, 1:2], qkv[:, :, 2:3])
    return x + conv2d(params["out"], y.reshape(x.shape)), {}


def middle_spec(n: int) -> Spec:
    """Parameters of residual block, attention, residual block."""
    return {"res0": residual_spec(n, n), "attn": attention_spec(n), "res1": residual_spec(n, n)}


def middle(params, x, state):
    """Residual block, attention, residual block."""
    return chain({"res0": residual, "attn": attention, "res1": residual}, params, x, state)


def downsample_spec(n: int, temporal: bool) -> Spec:
    """Parameters of a halving."""
    spec = {"conv": conv2d_spec(n, n)}
    if temporal:
        spec["time"] = conv3d_spec(n, n, (3, 1, 1))
    return spec


def downsample(params, x, state):
    """Halve height and width and, with a temporal convolution, the frames after the first one."""
    x = conv2d(params["conv"], x, stride=2, padding=((0, 1), (0, 1)))
    if "time" not in params:
        return x, {}
    if state is None:
        return x, {"time": x[:, -1:]}
    y, history = causal_conv3d(params["time"], x, state["time"], time_stride=2)
    return y, {"time": history}


def upsample_spec(n: int, n_out: int, temporal: bool) -> Spec:
    """Parameters of a doubling."""
    spec = {"conv": conv2d_spec(n, n_out)}
    if temporal:
        spec["time"] = conv3d_spec(n, 2 * n, (3, 1, 1))
    return spec


def upsample(params, x, state):
    """Double height and width and, with a temporal convolution, the frames after the first one.

    The first frame does not enter the temporal history: the second chunk starts from two frames of
    zeros.
    """
    new = {}
    if "time" in params and state is None:
        new["time"] = jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
    elif "time" in params:
        b, t, h, w, c = x.shape
        y, new["time"] = causal_conv3d(params["time"], x, state["time"])
        y = y.reshape(b, t, h, w, 2, c)  # the first half of the channels is the earlier frame
        x = jnp.moveaxis(y, 4, 2).reshape(b, 2 * t, h, w, c)
    return upsample_conv2d(params["conv"], x), new


def stage_spec(n_in: int, n_out: int, depth: int) -> Spec:
    """`depth` residual blocks, the first changing the channels; callers add "down" or "up"."""
    return {f"res{i}": residual_spec(n_in if i == 0 else n_out, n_out) for i in range(depth)}


def stage(params, x, state, shortcut=None):
    """Residual blocks in order, then "down" or "up" where the stage has one.

    shortcut: a function of x and whether the chunk is the first, added to what the stage makes.
    """
    blocks = {f"res{i}": residual for i in range(sum(name.startswith("res") for name in params))}
    blocks |= {n: f for n, f in (("down", downsample), ("up", upsample)) if n in params}
    y, new = chain(blocks, params, x, state)
    return (y if shortcut is None else y + shortcut(x, state is None)), new


def average_down(x, first: bool, channels: int, cell: tuple[int, int, int]):
    """Fold cells of (time, height, width) into channels, and average neighbours to `channels`.

    A folded channel's index is (channel, time, row, column), the column fastest.  The first chunk's
    frame is the last of its cell; the frames before it are zeros, and they count.
    """
    time, rows, columns = cell
    if first:
        x = jnp.pad(x, ((0, 0), (time - 1, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (t i) (h r) (w q) c -> b t h w (c i r q)", i=time, r=rows, q=columns)
    return jnp.mean(x.reshape(*x.shape[:-1], channels, -1), axis=-1)


def repeat_up(x, first: bool, channels: int, cell: tuple[int, int, int]):
    """Repeat each channel, and unfold the result to `channels` of cells of (time, height, width).

    The order is that of `average_down`; of the first chunk's cell only the last frame is kept.
    """
    time, rows, columns = cell
    x = jnp.repeat(x, channels * time * rows * columns // x.shape[-1], axis=-1)
    x = rearrange(x, "b t h w (c i r q) -> b (t i) (h r) (w q) c", i=time, r=rows, q=columns)
    return x[:, time - 1 :] if first else x


def head_spec(n_in: int, n_out: int) -> Spec:
    """Parameters of the last norm and convolution."""
    return {"norm": norm_spec(n_in), "conv": conv3d_spec(n_in, n_out)}


def head(params, x, state):
    """Norm, SiLU, convolution."""
    y, history = norm_silu_conv(params["norm"], params["conv"], x, state and state["conv"])
    return y, {"conv": history}
