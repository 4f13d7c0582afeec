# SPDX-License-Identifier: Apache-2.0
"""Convolutions over pictures and causal convolutions over video, channels-last.

Owns: the 2-D convolution, the 2-D convolution after doubling a picture, the causal 3-D convolution
with an explicit history of input frames, and their specs.  Kernels are stored [kh,kw,i,o] and
[kt,kh,kw,i,o], biases [o].
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from lvjax.core.params import Param, Spec

IMPLEMENTATIONS = ("taps", "conv3d")
CHANNELS = ("channels_in", "channels_out")


def conv2d_spec(n_in: int, n_out: int, size: int = 3) -> Spec:
    """A 2-D convolution of `size` x `size` with bias."""
    kernel = Param((size, size, n_in, n_out), (None, None, *CHANNELS), "fan_in")
    return {"kernel": kernel, "bias": Param((n_out,), ("channels_out",), "zeros")}


def conv3d_spec(n_in: int, n_out: int, size: tuple[int, int, int] = (3, 3, 3)) -> Spec:
    """A 3-D convolution of `size` = (time, height, width) with bias."""
    kernel = Param((*size, n_in, n_out), (None, None, None, *CHANNELS), "fan_in")
    return {"kernel": kernel, "bias": Param((n_out,), ("channels_out",), "zeros")}


def _conv(x, kernel, stride=1, padding=None):
    """x [N,H,W,i], kernel [kh,kw,i,o] -> float32 [N,H',W',o]; zero padding keeps the size."""
    kh, kw = kernel.shape[:2]
    if padding is None:
        padding = ((kh // 2, kh // 2), (kw // 2, kw // 2))
    kernel = kernel.astype(x.dtype)
    f32 = jnp.float32
    if (kh, kw, stride) == (1, 1, 1):
        return jnp.einsum("nhwi,io->nhwo", x, kernel[0, 0], preferred_element_type=f32)
    strides, dims = (stride, stride), ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dims, preferred_element_type=f32
    )


def _over_frames(f, x):
    """Apply `f`, a function of pictures [N,H,W,C], to every picture of x [...,H,W,C]."""
    y = f(x.reshape(-1, *x.shape[-3:]))
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def _add_bias(params, y, dtype):
    """Add the bias in float32 and round once to `dtype`."""
    bias = params["bias"].astype(jnp.float32)
    return (y + bias.reshape((1,) * (y.ndim - 1) + (-1,))).astype(dtype)


def conv2d(params, x, *, stride: int = 1, padding=None):
    """Convolve every picture of x [...,H,W,C]; float32 accumulation, returns x.dtype.

    padding: ((top, bottom), (left, right)) of zeros; by default half the kernel on each side.
    """
    conv = partial(_conv, kernel=params["kernel"], stride=stride, padding=padding)
    return _add_bias(params, _over_frames(conv, x), x.dtype)


def _merged(kernel, axis: int):
    """The two-tap kernels that even and odd outputs see along `axis` of a doubled input."""
    first, middle, last = (lax.index_in_dim(kernel, i, axis) for i in range(3))
    return (
        jnp.concatenate([first, middle + last], axis=axis),
        jnp.concatenate([first + middle, last], axis=axis),
    )


def upsample_conv2d(params, x):
    """`conv2d` with a 3x3 kernel on x [...,H,W,C] doubled by repetition, to [...,2H,2W,o].

    Computed as four 2x2 convolutions of x itself, one for each parity of the output pixel: 16
    products for each input pixel and channel pair in place of 36.  Equal up to rounding.
    """

    def pictures(x):
        n, h, w, _ = x.shape
        rows = []
        for a, by_row in enumerate(_merged(params["kernel"], 0)):
            pad = [((1 - a, a), (1 - b, b)) for b in (0, 1)]
            kernels = _merged(by_row, 1)
            rows.append(jnp.stack([_conv(x, kernels[b], padding=pad[b]) for b in (0, 1)], axis=3))
        return jnp.stack(rows, axis=2).reshape(n, 2 * h, 2 * w, -1)  # [n,h,2,w,2,o]

    return _add_bias(params, _over_frames(pictures, x), x.dtype)


def _window(history, x, start: int, n: int, stride: int):
    """Frames start, start+stride, ... (n of them) of [history; x], copying no more than needed."""
    past = history.shape[1]
    if start >= past:
        start = start - past
    elif stride == 1:
        pieces = [history[:, start : start + n], x[:, : max(0, start + n - past)]]
        return jnp.concatenate(pieces, axis=1)
    else:
        x = jnp.concatenate([history, x], axis=1)
    return lax.slice_in_dim(x, start, start + stride * (n - 1) + 1, stride, axis=1)


def _taps(kernel, x, history, stride):
    """The sum over time taps of 2-D convolutions; history None, zeros, costs nothing."""
    taps, frames = kernel.shape[0], x.shape[1]
    tap = [partial(_over_frames, partial(_conv, kernel=kernel[j])) for j in range(taps)]
    if history is None:
        y = tap[-1](x)
        for late in range(1, min(taps, frames)):
            part = tap[-1 - late](x[:, : frames - late])
            y = y + jnp.pad(part, ((0, 0), (late, 0), (0, 0), (0, 0), (0, 0)))
        return y
    n = (history.shape[1] + frames - taps) // stride + 1
    return sum(tap[j](_window(history, x, j, n, stride)) for j in range(taps))


def _conv3d(kernel, x, history, stride):
    """The same by XLA's 3-D convolution."""
    kt, kh, kw = kernel.shape[:3]
    padding = ((kt - 1 if history is None else 0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2))
    if history is not None:
        x = jnp.concatenate([history, x], axis=1)
    strides, dims = (stride, 1, 1), ("NDHWC", "DHWIO", "NDHWC")
    kernel, f32 = kernel.astype(x.dtype), jnp.float32
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dims, preferred_element_type=f32
    )


def causal_conv3d(params, x, history=None, *, time_stride: int = 1, impl: str = "auto"):
    """Convolve video in time with the past only; returns (y, new_history).

    x [B,T,H,W,C]; history [B,P,H,W,C], the P input frames before x, or None for kt-1 frames of
    zeros (cheaper than passing them).  y has (P+T-kt)//time_stride + 1 frames in x.dtype (T when
    P = kt-1 and time_stride = 1), accumulated in float32; height and width are zero-padded to keep
    their size.  new_history: the last P input frames.
    impl: "taps", a 2-D convolution for each time tap, summed; "conv3d", one 3-D convolution;
    "auto", "taps" on the CPU and "conv3d" elsewhere.
    Raises: ValueError for an unknown `impl`, for too few frames, or for a stride without a history.
    """
    if impl == "auto":
        impl = "taps" if jax.default_backend() == "cpu" else "conv3d"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown; use 'auto' or one of {IMPLEMENTATIONS}")
    if history is None and time_stride != 1:
        raise ValueError(f"time_stride={time_stride} needs a history; pass the frames before x")
    kernel = params["kernel"]
    past = kernel.shape[0] - 1 if history is None else history.shape[1]
    if past + x.shape[1] < kernel.shape[0]:
        raise ValueError(f"{past} + {x.shape[1]} frames are fewer than {kernel.shape[0]} time taps")
    y = (_taps if impl == "taps" else _conv3d)(kernel, x, history, time_stride)
    return _add_bias(params, y, x.dtype), last_frames(history, x, past)


def last_frames(history, x, n: int):
    """The last n frames of [history; x]; history None stands for zeros."""
    own = x[:, max(0, x.shape[1] - n) :]
    missing = n - own.shape[1]
    if missing == 0:
        return own
    if history is None:
        return jnp.pad(own, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([history[:, history.shape[1] - missing :], own], axis=1)
