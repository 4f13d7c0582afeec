# SPDX-License-Identifier: Apache-2.0
"""The autoencoder without a reference: streaming, causality, gradients, tiles, errors."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core import params as P
from lvjax.core.errors import InputError
from lvjax.models import vae
from lvjax.models.config import WAN_VAE_2_1, VAEConfig

CFG = VAEConfig(
    base=8,
    z=4,
    dim_mult=(1, 2, 2),
    temporal_down=(True, True),
    patch=2,
    res_blocks=1,
    mean=(0.1, -0.2, 0.3, 0.0),
    std=(1.0, 2.0, 0.5, 1.5),
)

encode_start = jax.jit(partial(vae.encode_start, cfg=CFG))
encode_step = jax.jit(partial(vae.encode_step, cfg=CFG))
decode_start = jax.jit(partial(vae.decode_start, cfg=CFG))
decode_step = jax.jit(partial(vae.decode_step, cfg=CFG))
decode = jax.jit(partial(vae.decode, cfg=CFG, clamp=False), static_argnames="piece")
encode = jax.jit(partial(vae.encode, cfg=CFG), static_argnames="piece")


def close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.fixture(scope="module")
def params():
    """Every leaf at random, so that no bias or gain hides behind its neutral value."""
    rng = np.random.default_rng(0)

    def draw(p):
        scale = 0.1 if len(p.shape) == 1 else np.prod(p.shape[:-1]) ** -0.5
        return jnp.asarray((p.init == "ones") + scale * rng.normal(size=p.shape), jnp.float32)

    return P.map_spec(draw, vae.vae_spec(CFG))


@pytest.fixture(scope="module")
def latents():
    return jax.random.normal(jax.random.key(2), (1, 4, 2, 3, CFG.z))


@pytest.fixture(scope="module")
def video():
    return jax.random.uniform(jax.random.key(3), (1, 13, 16, 24, 3), minval=-1.0, maxval=1.0)


def stream(params, latents, pieces):
    state, first = decode_start(params, latents[:, 0])
    out, start = [first], 1
    for n in pieces:
        state, frames = decode_step(params, state, latents[:, start : start + n])
        out, start = [*out, frames], start + n
    return jnp.concatenate(out, axis=1)


def test_sizes_of_the_published_autoencoder():
    assert P.count(vae.vae_spec(WAN_VAE_2_1)) == 126_892_531
    assert (WAN_VAE_2_1.spatial_stride, WAN_VAE_2_1.temporal_stride) == (8, 4)
    assert (CFG.spatial_stride, CFG.temporal_stride) == (8, 4)


def test_decode_is_the_stream_bit_for_bit(params, latents):
    whole = decode(params, latents)
    assert whole.shape == (1, 13, 16, 24, 3) and whole.dtype == jnp.float32
    np.testing.assert_array_equal(whole, stream(params, latents, (1, 1, 1)))


@pytest.mark.parametrize("piece", [2, "all"])
def test_piece_changes_only_rounding(params, latents, piece):
    assert close(decode(params, latents, piece=piece), decode(params, latents))


def test_a_stream_may_take_several_latents_at_once(params, latents):
    assert close(stream(params, latents, (1, 2)), decode(params, latents))


def test_encode_is_the_stream_bit_for_bit(params, video):
    state, first = encode_start(params, video[:, :1])
    out = [first]
    for start in (1, 5, 9):
        state, z = encode_step(params, state, video[:, start : start + 4])
        out.append(z)
    whole = encode(params, video)
    assert whole.shape == (1, 4, 2, 3, CFG.z)
    np.testing.assert_array_equal(whole, jnp.concatenate(out, axis=1))
    assert close(encode(params, video, piece="all"), whole)


def test_later_frames_change_nothing_before_them(params, latents, video):
    before = decode(params, latents)
    after = decode(params, latents.at[:, 2:].add(1.0))
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    assert np.all(np.abs(after[:, 5:] - before[:, 5:]).max(axis=(0, 2, 3, 4)) > 0)
    before = encode(params, video)
    after = encode(params, video.at[:, 5:].add(0.5))
    np.testing.assert_array_equal(after[:, :2], before[:, :2])
    assert np.all(np.abs(after[:, 2:] - before[:, 2:]).max(axis=(0, 2, 3, 4)) > 0)


def test_a_prefix_decodes_to_a_prefix_clamped(params, latents):
    prefix = jax.jit(partial(vae.decode, cfg=CFG))(params, 2 * latents[:, :2])
    assert np.abs(prefix).max() == 1
    assert close(prefix, jnp.clip(decode(params, 2 * latents)[:, :5], -1, 1))


def test_gradient_reaches_every_parameter(params, video):
    def loss(params):
        mean, logvar = vae.encode_moments(params, video[:, :5], CFG)
        z = vae.normalise(mean, CFG)
        error = vae.decode(params, z, CFG, piece="all", clamp=False) - video[:, :5]
        return jnp.mean(jnp.abs(error)) + jnp.mean(logvar**2)

    grads = P.flatten(jax.jit(jax.grad(loss))(params))
    assert grads.keys() == P.flatten(vae.vae_spec(CFG)).keys()
    for path, g in grads.items():
        assert np.all(np.isfinite(g)), path
        assert np.abs(g).max() > 0, path


def test_normalise_and_fold_have_inverses(latents, video):
    again = vae.normalise(vae.denormalise(latents, CFG), CFG)
    np.testing.assert_allclose(again, latents, atol=1e-6)
    np.testing.assert_array_equal(vae.unfold(vae.fold(video, 2), 2), video)
    row, column, colour = 1, 0, 2
    folded = vae.fold(video, 2)[..., colour * 4 + column * 2 + row]
    np.testing.assert_array_equal(folded, video[:, :, row::2, column::2, colour])


def test_bfloat16_parameters_decode_in_bfloat16(params, latents):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    (_, exact), (_, y) = decode_start(params, latents[:, 0]), decode_start(half, latents[:, 0])
    assert y.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(y - exact) / np.linalg.norm(exact) < 5e-2


@pytest.mark.parametrize("mult, down", [((1, 2), (True,)), ((1, 2, 2, 4), (True, False, True))])
def test_other_topologies(mult, down):
    cfg = VAEConfig(base=4, z=2, dim_mult=mult, temporal_down=down, mean=(0.0, 0.0), std=(1.0, 1.0))
    params, s, t = P.abstract(vae.vae_spec(cfg)), cfg.spatial_stride, cfg.temporal_stride
    video = jax.ShapeDtypeStruct((1, 1 + 2 * t, s, 2 * s, 3), jnp.float32)
    z = jax.eval_shape(partial(vae.encode, cfg=cfg), params, video)
    assert z.shape == (1, 3, 1, 2, 2)
    assert jax.eval_shape(partial(vae.decode, cfg=cfg), params, z).shape == video.shape


def test_one_tile_is_no_tiling(params, latents):
    tiled = vae.decode_tiled(params, latents[:, :1], CFG, tile=3, overlap=0)
    assert close(tiled, jnp.clip(decode_start(params, latents[:, 0])[1], -1, 1))


def test_errors(params, video, latents):
    for frames, near in ((3, "1 and 5"), (12, "9 and 13")):
        with pytest.raises(InputError, match=f"video has {frames} frames.* nearest are {near}"):
            vae.encode(params, video[:, :frames], CFG)
    with pytest.raises(InputError, match="height is 15 .*divide by 8: the nearest are 8 and 16"):
        vae.encode(params, video[:, :1, :15], CFG)
    with pytest.raises(InputError, match="width is 5 .*the nearest are 8 and 16"):
        vae.encode_start(params, video[:, :1, :, :5], CFG)
    with pytest.raises(InputError, match="multiple of 4"):
        vae.encode_step(params, {}, video[:, :3], CFG)
    with pytest.raises(InputError, match="axis C must be 4"):
        vae.decode(params, latents[..., :3], CFG)
    with pytest.raises(InputError, match=re.escape("piece=0; give a number")):
        vae.decode(params, latents, CFG, piece=0)
    with pytest.raises(InputError, match="overlap must be less than the tile"):
        vae.decode_tiled(params, latents, CFG, tile=2, overlap=2)
