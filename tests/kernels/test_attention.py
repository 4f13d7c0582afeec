# SPDX-License-Identifier: Apache-2.0
"""Every attention that runs on the CPU equals the definition, at odd sizes, with any mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.kernels import attention
from lvjax.kernels.attention import attend, attend_chunked, choose
from tests.tiny import relative

CPU = ("reference", "chunked")
MASKS = {
    "none": None,
    "keys": (1, 1, 1),
    "batch": (2, 1, 1),
    "heads": (1, 3, 1),
    "full": (2, 3, 37),
}


def draw(length=37, keys=53, heads=3, dim=24, batch=2, dtype=jnp.float32):
    key = jax.random.key(0)
    shapes = ((batch, length, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, dim))
    return [
        jax.random.normal(jax.random.fold_in(key, i), s).astype(dtype) for i, s in enumerate(shapes)
    ]


def by_hand(q, k, v, mask=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    for b, n, i in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
        scores = k[b, :, n] @ q[b, i, n] / np.sqrt(q.shape[-1])
        if mask is not None:
            scores[
                ~np.broadcast_to(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))[b, n, i]
            ] = -np.inf
        weights = np.exp(scores - scores.max())
        out[b, i, n] = weights / weights.sum() @ v[b, :, n]
    return out


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("impl", CPU)
def test_equals_the_definition(impl, kind):
    q, k, v = draw()
    mask = None
    if MASKS[kind] is not None:
        mask = np.random.default_rng(1).random((*MASKS[kind], 53)) < 0.5
        mask[..., 7] = True
    run = jax.jit(
        lambda *a: attend(*a, mask=None if mask is None else jnp.asarray(mask), impl=impl)
    )
    assert relative(run(q, k, v), by_hand(q, k, v, mask)) < 1e-6


@pytest.mark.parametrize("rows", (8, 37))
def test_chunks_of_any_size(rows):
    q, k, v = draw()
    mask = jnp.asarray(np.random.default_rng(2).random((1, 1, 37, 53)) < 0.7).at[..., 0].set(True)
    got = jax.jit(lambda *a: attend_chunked(*a, mask, rows))(q, k, v)
    assert relative(got, attend(q, k, v, mask=mask, impl="reference")) < 1e-6


def test_gradients_agree():
    def gradient(run):
        return jax.jit(jax.grad(lambda arrays: (run(*arrays) ** 2).sum()))(draw())

    wanted = gradient(lambda *a: attend(*a, impl="reference"))
    got = gradient(lambda *a: attend_chunked(*a, None, 8))
    for a, b in zip(got, wanted, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("impl", CPU)
def test_bfloat16_is_near_and_keeps_its_dtype(impl):
    q, k, v = draw(dtype=jnp.bfloat16)
    out = jax.jit(lambda *a: attend(*a, impl=impl))(q, k, v)
    assert out.dtype == jnp.bfloat16
    assert relative(out.astype(jnp.float32), by_hand(q, k, v)) < 1e-2


def test_large_logits_stay_finite():
    q, k, v = draw()
    for impl in CPU:
        assert bool(jnp.isfinite(attend(q * 1e4, k, v, impl=impl)).all())


def test_auto_chooses_by_size(monkeypatch):
    q, k, v = draw()
    assert choose(q, k, v) == "reference"
    monkeypatch.setattr(attention, "SMALL", 10)
    assert choose(q, k, v) == "chunked"


def test_a_name_runs_or_raises():
    q, k, v = draw()
    with pytest.raises(InputError, match="does not support"):
        attend(q, k, v, impl="cudnn")
    with pytest.raises(InputError, match="use 'auto'"):
        attend(q, k, v, impl="fast")
