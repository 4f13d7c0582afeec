# SPDX-License-Identifier: Apache-2.0
"""The autoencoder without a reference: streaming, causality, gradients, tiles, errors."""

import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core import params as P
from lvjax.core.errors import InputError
from lvjax.models import vae, vae_blocks
from lvjax.models.config import WAN_VAE_2_1, WAN_VAE_2_2, VAEConfig

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

# Wan 2.2, with one halving: a shortcut of each kind, and the identity.
RESIDUAL = replace(CFG, dim_mult=(2, 2), temporal_down=(True,), decoder_base=4, residual=True)

encode_start = jax.jit(vae.encode_start, static_argnames="cfg")
encode_step = jax.jit(vae.encode_step, static_argnames="cfg")
decode_start = jax.jit(vae.decode_start, static_argnames="cfg")
decode_step = jax.jit(vae.decode_step, static_argnames="cfg")
decode = jax.jit(partial(vae.decode, clamp=False), static_argnames=("cfg", "piece"))
encode = jax.jit(vae.encode, static_argnames=("cfg", "piece"))
both = pytest.mark.parametrize("cfg", [CFG, RESIDUAL], ids=["2.1", "2.2"])


def close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@cache
def params(cfg):
    """Every leaf at random, so that no bias or gain hides behind its neutral value."""
    rng = np.random.default_rng(0)

    def draw(p):
        scale = 0.1 if len(p.shape) == 1 else np.prod(p.shape[:-1]) ** -0.5
        return jnp.asarray((p.init == "ones") + scale * rng.normal(size=p.shape), jnp.float32)

    return P.map_spec(draw, vae.vae_spec(cfg))


@pytest.fixture(scope="module")
def latents():
    return jax.random.normal(jax.random.key(2), (1, 4, 2, 3, CFG.z))


def draw_video(cfg):
    """As many pixels as `latents` has."""
    size = (1, 1 + 3 * cfg.temporal_stride, 2 * cfg.spatial_stride, 3 * cfg.spatial_stride, 3)
    return jax.random.uniform(jax.random.key(3), size, minval=-1.0, maxval=1.0)


@pytest.fixture(scope="module")
def video():
    return draw_video(CFG)


def stream(cfg, latents, pieces):
    state, first = decode_start(params(cfg), latents[:, 0], cfg)
    out, start = [first], 1
    for n in pieces:
        state, frames = decode_step(params(cfg), state, latents[:, start : start + n], cfg)
        out, start = [*out, frames], start + n
    return jnp.concatenate(out, axis=1)


def test_sizes_of_the_published_autoencoders():
    assert P.count(vae.vae_spec(WAN_VAE_2_1)) == 126_892_531
    assert P.count(vae.vae_spec(WAN_VAE_2_2)) == 704_688_668
    assert (WAN_VAE_2_1.spatial_stride, WAN_VAE_2_1.temporal_stride) == (8, 4)
    assert (WAN_VAE_2_2.spatial_stride, WAN_VAE_2_2.temporal_stride) == (16, 4)
    assert (CFG.spatial_stride, CFG.temporal_stride) == (8, 4)


@both
def test_decode_is_the_stream_bit_for_bit(cfg, latents):
    whole = decode(params(cfg), latents, cfg)
    assert whole.shape == draw_video(cfg).shape and whole.dtype == jnp.float32
    np.testing.assert_array_equal(whole, stream(cfg, latents, (1, 1, 1)))


@pytest.mark.parametrize(("cfg", "piece"), [(CFG, 2), (CFG, "all"), (RESIDUAL, "all")])
def test_piece_changes_only_rounding(cfg, latents, piece):
    whole = decode(params(cfg), latents, cfg)
    assert close(decode(params(cfg), latents, cfg, piece=piece), whole)


@both
def test_a_stream_may_take_several_latents_at_once(cfg, latents):
    assert close(stream(cfg, latents, (1, 2)), decode(params(cfg), latents, cfg))


@both
def test_encode_is_the_stream_bit_for_bit(cfg):
    video, stride = draw_video(cfg), cfg.temporal_stride
    state, first = encode_start(params(cfg), video[:, :1], cfg)
    out = [first]
    for start in range(1, video.shape[1], stride):
        state, z = encode_step(params(cfg), state, video[:, start : start + stride], cfg)
        out.append(z)
    whole = encode(params(cfg), video, cfg)
    assert whole.shape == (1, 4, 2, 3, cfg.z)
    np.testing.assert_array_equal(whole, jnp.concatenate(out, axis=1))
    assert close(encode(params(cfg), video, cfg, piece="all"), whole)


@both
def test_later_frames_change_nothing_before_them(cfg, latents):
    video, n = draw_video(cfg), 1 + cfg.temporal_stride
    before = decode(params(cfg), latents, cfg)
    after = decode(params(cfg), latents.at[:, 2:].add(1.0), cfg)
    np.testing.assert_array_equal(after[:, :n], before[:, :n])
    assert np.all(np.abs(after[:, n:] - before[:, n:]).max(axis=(0, 2, 3, 4)) > 0)
    before = encode(params(cfg), video, cfg)
    after = encode(params(cfg), video.at[:, n:].add(0.5), cfg)
    np.testing.assert_array_equal(after[:, :2], before[:, :2])
    assert np.all(np.abs(after[:, 2:] - before[:, 2:]).max(axis=(0, 2, 3, 4)) > 0)


def test_a_prefix_decodes_to_a_prefix_clamped(latents):
    prefix = jax.jit(partial(vae.decode, cfg=CFG))(params(CFG), 2 * latents[:, :2])
    assert np.abs(prefix).max() == 1
    assert close(prefix, jnp.clip(decode(params(CFG), 2 * latents, CFG)[:, :5], -1, 1))


@both
def test_gradient_reaches_every_parameter(cfg):
    video = draw_video(cfg)[:, : 1 + cfg.temporal_stride]

    def loss(params):
        mean, logvar = vae.encode_moments(params, video, cfg)
        z = vae.normalise(mean, cfg)
        error = vae.decode(params, z, cfg, piece="all", clamp=False) - video
        return jnp.mean(jnp.abs(error)) + jnp.mean(logvar**2)

    # half the time to compile, for a program that runs once
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    grads = P.flatten(jax.jit(jax.grad(loss), compiler_options=quickly)(params(cfg)))
    assert grads.keys() == P.flatten(vae.vae_spec(cfg)).keys()
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


@both
def test_bfloat16_parameters_decode_in_bfloat16(cfg, latents):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params(cfg))
    (_, exact), (_, y) = (decode_start(p, latents[:, 0], cfg) for p in (params(cfg), half))
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


def test_a_single_frame_starts_from_zeros_in_time():
    """Every other channel of a shortcut that halves time is the mean over a frame of zeros."""
    folded = vae_blocks.average_down(jnp.ones((1, 1, 4, 4, 3)), True, 6, (2, 2, 2))
    np.testing.assert_array_equal(folded[..., 0::2], np.zeros((1, 1, 2, 2, 3)))
    np.testing.assert_array_equal(folded[..., 1::2], np.ones((1, 1, 2, 2, 3)))


def test_shortcuts_that_do_not_divide_are_refused():
    for mult in ((1, 3), (3, 3), (1, 2)):
        with pytest.raises(InputError, match=re.escape(f"VAEConfig.dim_mult is {mult}")):
            replace(RESIDUAL, dim_mult=mult)
        replace(RESIDUAL, dim_mult=mult, residual=False)
    with pytest.raises(InputError, match="VAEConfig.residual is 1; give True or False"):
        replace(CFG, residual=1)
    with pytest.raises(InputError, match="VAEConfig.decoder_base is 0"):
        replace(CFG, decoder_base=0)


def test_errors(video, latents):
    p = params(CFG)
    for frames, near in ((3, "1 and 5"), (12, "9 and 13")):
        with pytest.raises(InputError, match=f"video has {frames} frames.* nearest are {near}"):
            vae.encode(p, video[:, :frames], CFG)
    with pytest.raises(InputError, match="height is 15 .*divide by 8: the nearest are 8 and 16"):
        vae.encode(p, video[:, :1, :15], CFG)
    with pytest.raises(InputError, match="width is 5 .*the nearest are 8 and 16"):
        vae.encode_start(p, video[:, :1, :, :5], CFG)
    with pytest.raises(InputError, match="multiple of 4"):
        vae.encode_step(p, {}, video[:, :3], CFG)
    with pytest.raises(InputError, match="axis C must be 4"):
        vae.decode(p, latents[..., :3], CFG)
    with pytest.raises(InputError, match=re.escape("piece=0; give a number")):
        vae.decode(p, latents, CFG, piece=0)
