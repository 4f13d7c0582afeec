# SPDX-License-Identifier: Apache-2.0
"""The dense layer's low-rank update: NumPy float64, identities, gradients, dtypes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.nn.linear import linear
from tests.tiny import relative


@cache
def setup():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    lora = {"a": draw(24, 5), "b": draw(5, 16), "scale": draw(5)}
    return {"kernel": draw(24, 16), "bias": draw(16), "lora": lora}, draw(2, 7, 24)


def wanted(params, x):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    kernel = p["kernel"] + p["lora"]["a"] @ np.diag(p["lora"]["scale"]) @ p["lora"]["b"]
    return np.asarray(x, np.float64) @ kernel + p["bias"]


def without(params):
    return {k: a for k, a in params.items() if k != "lora"}


@pytest.mark.parametrize("dtype, tolerance", (("float32", 1e-6), ("bfloat16", 1e-2)))
def test_each_component_has_its_own_scale(dtype, tolerance):
    params, x = setup()
    x = x.astype(dtype)
    out = jax.jit(linear)(params, x)
    assert out.dtype == x.dtype
    assert relative(out, wanted(params, x)) < tolerance
    assert relative(linear(without(params), x), wanted(params, x)) > 0.5


@pytest.mark.parametrize("zeroed", ("b", "scale"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_zero_is_the_identity(zeroed, dtype):
    params, x = setup()
    off = params | {"lora": params["lora"] | {zeroed: jnp.zeros_like(params["lora"][zeroed])}}
    x = x.astype(dtype)
    np.testing.assert_array_equal(jax.jit(linear)(off, x), jax.jit(linear)(without(params), x))


def test_gradients_reach_the_adapter():
    params, x = setup()

    def loss(lora, dtype):
        out = linear(without(params) | {"lora": lora}, x.astype(dtype), jnp.float32)
        return (out**2).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    value = jax.jit(loss, static_argnums=1)
    full, half = (gradient(params["lora"], d) for d in ("float32", "bfloat16"))
    step, at = 1e-3, params["lora"]
    for name, g in full.items():
        towards = at | {name: at[name] + step * g / jnp.linalg.norm(g)}
        back = at | {name: at[name] - step * g / jnp.linalg.norm(g)}
        slope = (value(towards, "float32") - value(back, "float32")) / (2 * step)
        assert abs(float(slope) / float(jnp.linalg.norm(g)) - 1) < 2e-2, name
        assert half[name].dtype == jnp.float32 and relative(half[name], g) < 2e-2, name
