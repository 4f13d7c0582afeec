# SPDX-License-Identifier: Apache-2.0
"""Convolutions: both implementations agree, and a video in pieces is the video whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core import params as P
from lvjax.nn.conv import (
    causal_conv3d,
    conv2d,
    conv2d_spec,
    conv3d_spec,
    upsample_conv2d,
)


def draw(spec, seed=0):
    params = P.init(spec, jax.random.key(seed))
    return params | {"bias": jax.random.normal(jax.random.key(seed + 1), params["bias"].shape)}


def video(frames, c=5, seed=3):
    return jax.random.normal(jax.random.key(seed), (2, frames, 6, 4, c))


@pytest.mark.parametrize("size", [(3, 3, 3), (3, 1, 1), (1, 3, 3)])
@pytest.mark.parametrize("past", [None, "full"])
def test_taps_equal_conv3d(size, past):
    params, x = draw(conv3d_spec(5, 7, size)), video(3)
    history = None if past is None else video(size[0] - 1, seed=4)
    a, ha = causal_conv3d(params, x, history, impl="taps")
    b, hb = causal_conv3d(params, x, history, impl="conv3d")
    assert a.shape == (2, 3, 6, 4, 7) and a.dtype == x.dtype
    np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_array_equal(ha, hb)


def test_time_stride_with_one_frame_of_history():
    params, x, history = draw(conv3d_spec(5, 7, (3, 1, 1))), video(4), video(1, seed=4)
    a, ha = causal_conv3d(params, x, history, time_stride=2, impl="taps")
    b, hb = causal_conv3d(params, x, history, time_stride=2, impl="conv3d")
    assert a.shape[1] == 2
    np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_array_equal(ha, x[:, -1:])
    np.testing.assert_array_equal(hb, x[:, -1:])


@pytest.mark.parametrize("impl", ["taps", "conv3d"])
@pytest.mark.parametrize("pieces", [(1, 4), (1, 1, 3), (3, 2), (4, 1)])
def test_pieces_with_history_equal_the_whole(pieces, impl):
    params, x = draw(conv3d_spec(5, 7)), video(sum(pieces))
    whole, last = causal_conv3d(params, x, impl=impl)
    history, parts, start = None, [], 0
    for n in pieces:
        y, history = causal_conv3d(params, x[:, start : start + n], history, impl=impl)
        parts, start = [*parts, y], start + n
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)
    np.testing.assert_array_equal(history, last)


def test_no_history_means_zeros():
    params, x = draw(conv3d_spec(5, 7)), video(3)
    zeros = jnp.zeros((2, 2, 6, 4, 5))
    for frames in (1, 2, 3):
        a, ha = causal_conv3d(params, x[:, :frames])
        b, hb = causal_conv3d(params, x[:, :frames], zeros)
        np.testing.assert_allclose(a, b, atol=2e-5)
        np.testing.assert_array_equal(ha, hb)


def test_gradients_of_both_implementations_agree():
    params, x, history = draw(conv3d_spec(5, 7)), video(3), video(2, seed=4)

    def loss(params, x, history, impl):
        y, last = causal_conv3d(params, x, history, impl=impl)
        return jnp.sum(jnp.sin(y)) + jnp.sum(last**2)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    a, b = grad(params, x, history, "taps"), grad(params, x, history, "conv3d")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), a, b)


def test_upsample_conv2d_is_conv2d_of_the_doubled_picture():
    params, x = draw(conv2d_spec(5, 3)), video(2)
    doubled = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    np.testing.assert_allclose(upsample_conv2d(params, x), conv2d(params, doubled), atol=2e-5)


def test_conv2d_against_sums_over_a_window():
    params, x = draw(conv2d_spec(5, 3)), video(1)[:, 0]
    padded = np.pad(np.asarray(x), ((0, 0), (0, 1), (0, 1), (0, 0)))
    y = conv2d(params, x, stride=2, padding=((0, 1), (0, 1)))
    assert y.shape == (2, 3, 2, 3)
    window = padded[:, 2:5, 2:5]  # around output (1, 1)
    expected = np.einsum("nhwi,hwio->no", window, params["kernel"]) + params["bias"][None]
    np.testing.assert_allclose(y[:, 1, 1], expected, atol=2e-5)


def test_bfloat16_accumulates_in_float32():
    params, x = draw(conv3d_spec(64, 8)), video(2, c=64).astype(jnp.bfloat16)
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params)
    exact, _ = causal_conv3d(rounded, x.astype(jnp.float32))
    y, _ = causal_conv3d(jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)


def test_errors():
    params, x = draw(conv3d_spec(5, 7)), video(3)
    with pytest.raises(ValueError, match="'nothing' is unknown; use 'auto' or one of"):
        causal_conv3d(params, x, impl="nothing")
    with pytest.raises(ValueError, match="needs a history"):
        causal_conv3d(params, x, time_stride=2)
    with pytest.raises(ValueError, match="fewer than 3 time taps"):
        causal_conv3d(params, x[:, :1], x[:, :1])
