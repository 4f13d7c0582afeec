# SPDX-License-Identifier: Apache-2.0
"""Properties of the transformer that need no reference implementation."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.core.mesh import RULES
from lvjax.core.params import count, flatten, init
from lvjax.models import config
from lvjax.models.dit import dit, dit_spec, embed_context
from lvjax.nn.embed import patchify, sinusoid, unpatchify
from lvjax.nn.linear import linear
from tests.tiny import SMALL_DIT as CFG
from tests.tiny import relative


@cache
def setup():
    """Parameters that all matter, latents, timestep, text, condition."""
    leaves, tree = jax.tree.flatten(jax.jit(lambda k: init(dit_spec(CFG), k))(jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    params = jax.tree.unflatten(tree, [a + 0.2 * draw(*a.shape) for a in leaves])
    return (
        params,
        draw(2, 3, 4, 4, 4),
        jnp.array([903.25, 17.0]),
        draw(2, 5, 8),
        draw(2, 3, 4, 4, 3),
    )


@cache
def program(remat=False, cfg=CFG):
    @jax.jit
    def run(params, latents, timestep, text, condition):
        context = embed_context(params, text, cfg)
        return dit(params, latents, timestep, context, cfg, condition=condition, remat=remat)[0]

    return run


@cache
def gradient(remat):
    return jax.jit(jax.grad(lambda *a: (program(remat)(*a) ** 2).sum()))(*setup())


def test_remat_changes_nothing():
    for (path, a), b in zip(
        flatten(gradient(True)).items(), flatten(gradient(False)).values(), strict=True
    ):
        assert relative(a, b) < 1e-5, path


def test_every_parameter_gets_a_finite_gradient():
    for path, g in flatten(gradient(False)).items():
        assert bool(jnp.isfinite(g).all()), path
        assert float(jnp.abs(g).max()) > 0, path


def test_timesteps_per_clip_frame_and_token_agree():
    params, latents, timestep, text, condition = setup()
    one = program()(params, latents, timestep, text, condition)
    for repeats in (3, 3 * 2 * 2):  # frames, tokens
        repeated = jnp.repeat(timestep[:, None], repeats, 1)
        assert relative(program()(params, latents, repeated, text, condition), one) < 1e-6
    frames = timestep[:, None] * jnp.array([[0.0, 0.5, 1.0]])
    by_frame = program()(params, latents, frames, text, condition)
    by_token = program()(params, latents, jnp.repeat(frames, 4, 1), text, condition)
    assert relative(by_token, by_frame) < 1e-6
    assert relative(by_frame, one) > 1e-3


def test_a_condition_starts_as_nothing():
    params, *arrays = setup()
    fresh = jax.jit(lambda k: init(dit_spec(CFG), k))(jax.random.key(1))
    assert float(jnp.abs(fresh["head"]["linear"]["kernel"]).max()) == 0
    zeroed = params | {"condition_embedding": fresh["condition_embedding"]}
    with_condition = program()(zeroed, *arrays)
    np.testing.assert_array_equal(with_condition, program()(zeroed, *arrays[:-1], None))
    assert relative(program()(params, *arrays), with_condition) > 1e-3


def test_context_is_computed_once_per_prompt():
    params, latents, timestep, text, condition = setup()
    context = jax.jit(lambda p, t: embed_context(p, t, CFG))(params, text)
    assert context.k.shape == (2, 2, 6, 2, 24) and context.image_k is None
    out = jax.jit(lambda p, x, t, c, v: dit(p, x, t, c, CFG, condition=v)[0])(
        params, latents, timestep, context, condition
    )
    assert relative(out, program()(params, latents, timestep, text, condition)) < 1e-6


def test_text_is_padded_with_zeros_before_the_mlp():
    params, latents, timestep, text, condition = setup()
    padded = jnp.pad(text, ((0, 0), (0, 1), (0, 0)))
    one, other = (program()(params, latents, timestep, t, condition) for t in (text, padded))
    np.testing.assert_array_equal(one, other)


def test_bfloat16_is_near_float32():
    params, *arrays = setup()
    half = replace(CFG, dtype="bfloat16")
    out = program(cfg=half)(params, *arrays)
    assert out.dtype == jnp.float32
    assert relative(out, program()(params, *arrays)) < 3e-2


def test_bfloat16_gradient_is_near_float32():
    key = jax.random.key(0)
    params = {"kernel": jax.random.normal(key, (24, 16)), "bias": jnp.zeros(16)}
    x = jax.random.normal(key, (2, 5, 24))

    def loss(dtype):
        return lambda p, x: (linear(p, x.astype(dtype), jnp.float32) ** 2).sum()

    half, full = (
        jax.jit(jax.grad(loss(d), (0, 1)))(params, x) for d in (jnp.bfloat16, jnp.float32)
    )
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        assert a.dtype == jnp.float32 and relative(a, b) < 2e-2


def test_low_rank_update():
    rng = np.random.default_rng(0)
    kernel, a, b, x = (
        rng.normal(size=s).astype(np.float32) for s in ((6, 5), (6, 2), (2, 5), (3, 6))
    )
    scale = np.array([0.5, -2.0], np.float32)  # one for each column of a
    lora = {"a": a, "b": b, "scale": scale}
    out = linear({"kernel": kernel, "lora": jax.tree.map(jnp.asarray, lora)}, jnp.asarray(x))
    np.testing.assert_allclose(out, x @ (kernel + a @ np.diag(scale) @ b), rtol=1e-5)


def test_sinusoid_is_accurate_for_any_timestep():
    t = np.array([0.0, 0.125, 1.0, 499.9, 937.5, 999.0, 1000.0], np.float32)
    angle = t.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(128) / 128)
    wanted = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    np.testing.assert_allclose(jax.jit(lambda t: sinusoid(t, 256))(t), wanted, rtol=0, atol=2e-6)


def test_patch_orders():
    x = np.arange(2 * 2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 2, 4, 6, 3)
    tokens = patchify(x, (1, 2, 2))
    assert tokens.shape == (2, 2 * 2 * 3, 12)
    np.testing.assert_array_equal(tokens[0, 4, :4], x[0, 0, 2:4, 2:4, 0].ravel())  # c slowest
    out = unpatchify(np.arange(12, dtype=np.float32).reshape(1, 1, 12), (1, 1, 1), (1, 2, 2))
    np.testing.assert_array_equal(out[0, 0, 0, 1], [3, 4, 5])  # c fastest


@pytest.mark.parametrize(
    "name, parameters",
    (
        ("WAN_T2V_1_3B", 1_418_996_800),
        ("WAN_T2V_14B", 14_288_491_584),
        ("WAN_I2V_14B", 16_394_878_784),
        ("WAN_FLF2V_14B", 16_395_536_704),
        ("WAN_2_2_I2V_A14B", 14_288_901_184),
        ("WAN_2_2_TI2V_5B", 4_999_787_712),
    ),
)
def test_published_sizes_and_axes(name, parameters):
    spec = dit_spec(getattr(config, name))
    assert count(spec) == parameters
    for path, p in flatten(spec).items():
        assert all(a is None or a in RULES for a in p.axes), path


def test_wrong_shapes_are_refused():
    params, latents, timestep, text, condition = setup()
    context = jax.eval_shape(lambda p, t: embed_context(p, t, CFG), params, text)

    def call(latents=latents, timestep=timestep, condition=condition, cfg=CFG):
        dit(params, latents, timestep, context, cfg, condition=condition)

    with pytest.raises(InputError, match="axis C must be 4"):
        call(latents=jnp.zeros((2, 3, 4, 4, 5)))
    with pytest.raises(InputError, match="multiples of the patch"):
        call(latents=jnp.zeros((2, 3, 4, 5, 4)))
    with pytest.raises(InputError, match="divisor of 12 tokens"):
        call(timestep=jnp.zeros((2, 5)))
    with pytest.raises(InputError, match="condition"):
        call(condition=condition[:, :2])
    with pytest.raises(InputError, match="shorten the prompt"):
        embed_context(params, jnp.zeros((2, 7, 8)), CFG)
    with pytest.raises(InputError, match="no image branch"):
        embed_context(params, text, CFG, jnp.zeros((2, 3, 8)))
