# SPDX-License-Identifier: Apache-2.0
"""The dense layer, and the one place where a low-rank update is added to it."""

import jax
import jax.numpy as jnp

from lvjax.core.params import Param, Spec


def linear_spec(
    n_in: int,
    n_out: int,
    axes: tuple[str | None, str | None] = ("embed", "mlp"),
    init: str | float = "xavier",
    bias: bool = True,
) -> Spec:
    """{"kernel": [in, out], "bias": [out]}; the bias starts at zero."""
    spec = {"kernel": Param((n_in, n_out), axes, init)}
    if bias:
        spec["bias"] = Param((n_out,), axes[1:], "zeros")
    return spec


def _matmul(a, b):
    return jnp.dot(a, b.astype(a.dtype), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _reduced(x, kernel):
    return _matmul(x, kernel)


def _reduced_forward(x, kernel):
    return _matmul(x, kernel), (x, kernel)


def _reduced_backward(saved, g):
    x, kernel = saved
    g = g.astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return _matmul(g, kernel.T).astype(x.dtype), _matmul(rows[0].T, rows[1]).astype(kernel.dtype)


_reduced.defvjp(_reduced_forward, _reduced_backward)


def _dot(x, kernel):
    """x @ kernel in x's dtype, float32 out.

    Below float32 the backward products also run in x's dtype (accumulating in float32): jax's own
    rule would multiply the float32 cotangent by the reduced operand, that is, in float32.
    """
    return _matmul(x, kernel) if x.dtype == jnp.float32 else _reduced(x, kernel)


def _row(v, ndim: int):
    """v [n] as float32 [1, ..., 1, n] of `ndim` axes."""
    return v.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


def linear(params, x, dtype=None):
    """x [..., in] -> [..., out] of `dtype` (default: that of x).

    Multiplies in x's dtype, accumulates and adds the bias in float32, rounds once.  With
    params["lora"] = {"a": [in, r], "b": [r, out], "scale": [r]} the update ((x a) * scale) b is
    added before rounding; its products are of the same kind, `scale` is applied in float32.
    """
    y = _dot(x, params["kernel"])
    if "lora" in params:
        lora = params["lora"]
        h = _dot(x, lora["a"]) * _row(lora["scale"], y.ndim)
        y = y + _dot(h.astype(x.dtype), lora["b"])
    if "bias" in params:
        y = y + _row(params["bias"], y.ndim)
    return y.astype(x.dtype if dtype is None else dtype)
