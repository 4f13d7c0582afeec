# SPDX-License-Identifier: Apache-2.0
"""The recipes of causal streaming: their published settings, any policy with any memory on one set
of weights, frames as they come, one program for ever.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.core.functional import bound
from lvjax.flow.schedule import make_schedule
from lvjax.memory.window import Window
from lvjax.methods.causal import Causal, causal_method, causvid, lol, longlive, self_forcing
from lvjax.models.dit import dit_spec, embed_context
from lvjax.models.vae import decode, decode_next, decoder_state, vae_spec
from lvjax.nn.rope import turns
from lvjax.nn.rope_policies import POLICIES
from lvjax.rollout.causal import CausalClip
from lvjax.rollout.method import _step, stream
from tests.drawn import drawn
from tests.tiny import DIT, VAE, relative

CFG = replace(DIT, condition_channels=0)
SIZE = (2, 2, 16)


@cache
def weights(condition=False):
    cfg = DIT if condition else CFG
    tree = drawn(dit_spec(cfg), 0)
    kernel = tree["head"]["linear"]["kernel"]
    rng = np.random.default_rng(1)
    tree["head"]["linear"]["kernel"] = 0.1 * rng.standard_normal(kernel.shape).astype(np.float32)
    return {"dit": tree, "vae": drawn(vae_spec(VAE), 1)}


def clip(batch=1, since=0, cfg=CFG):
    rows = np.random.default_rng(2).standard_normal((batch, 5, cfg.text_dim))
    tree = weights(cfg is DIT)["dit"]
    return CausalClip(embed_context(tree, jnp.asarray(rows, jnp.float32), cfg), jnp.int32(since))


def run(settings, clips=4, vae=None, cfg=CFG, state=None, batch=1):
    method = causal_method(weights(cfg is DIT), cfg, vae, settings)
    keys = jax.random.split(jax.random.key(3), 1)
    state = method.init(SIZE, keys) if state is None else state
    made = [out for _, out in stream(method, state, [clip(batch, cfg=cfg)] * clips)]
    return [np.concatenate([np.asarray(x) for x in part], 1) if part[0] is not None else None
            for part in zip(*made, strict=True)]  # fmt: skip


def test_the_recipes_have_their_published_settings():
    few = [1000, 937.5, 833.3333, 625]
    for made, window, levels in (
        (self_forcing(), Window(21, 0, 3), few),
        (causvid(), Window(21, 0, 3), [1000, 960, 888.8889, 727.2727]),
        (longlive(), Window(12, 3, 3), few),
        (lol(jax.random.key(0), 12), Window(12, 3, 3), few),
    ):
        assert made.window == window and made.solver is None and made.guidance is None
        np.testing.assert_allclose(made.schedule.timesteps, levels, rtol=1e-6)


@pytest.mark.parametrize("clips", [1, 4])
def test_frames_are_those_of_the_whole_decoded(clips):
    latents, frames = run(longlive(6), clips, VAE)
    assert frames.shape == (1, 12 * clips, 16, 16, 3)
    whole = jax.jit(decode, static_argnums=2)(weights()["vae"], latents, VAE)
    assert relative(frames[:, 3:], whole) < 1e-6 and not frames[:, :3].any()


def test_one_latent_frame_at_a_time_is_decoded_too():
    params = weights()["vae"]
    z = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, *SIZE)), jnp.float32)
    state, out = decoder_state(params, z[:, :1], VAE), []
    step = jax.jit(decode_next, static_argnums=4)
    for i in range(4):
        state, video = step(params, state, z[:, i : i + 1], jnp.bool_(i == 0), VAE)
        out.append(video)
    assert relative(jnp.concatenate(out, 1)[:, 3:], decode(params, z, VAE)) < 1e-6


def test_one_program_serves_every_clip_and_every_stream():
    settings = longlive(6)
    run(settings, 1, VAE)
    before = _step._cache_size()
    run(settings, 7, VAE)
    method = causal_method(weights(), CFG, VAE, settings)
    state = method.init(SIZE, jax.random.split(jax.random.key(9), 1))
    far = state.cache.replace(next_frame=jnp.int32(65_532))
    for _, (z, _) in stream(method, state.replace(cache=far), [clip()] * 3):
        assert np.isfinite(z).all()
    assert _step._cache_size() == before


def policies():
    yield "plain", turns
    for name, policy in POLICIES.items():
        yield name, bound(policy, length=400)
    yield "lol", lol(jax.random.key(0), CFG.num_heads).turns


@pytest.mark.parametrize("window", [Window(12, 0, 3), Window(6, 3, 3), Window(4, 1, 1)], ids=str)
def test_any_positions_with_any_memory_on_one_set_of_weights(window):
    found = {}
    for name, policy in policies():
        found[name], _ = run(Causal(window, turns=policy), 3)
        assert np.isfinite(found[name]).all()
    np.testing.assert_array_equal(found["plain"], found["pe"])
    others = [name for name in found if name not in ("plain", "pe")]
    for name in others:
        assert relative(found[name], found["plain"]) > 1e-6, name
    relative_ones, _ = run(Causal(window, positions="relative"), 6 if window.clip == 1 else 3)
    assert np.isfinite(relative_ones).all()


def test_no_jitter_is_the_baseline_bit_for_bit():
    base, _ = run(longlive(6))
    none, _ = run(lol(jax.random.key(0), CFG.num_heads, 0.0, window=6))
    some, _ = run(lol(jax.random.key(0), CFG.num_heads, window=6))
    np.testing.assert_array_equal(none, base)
    assert relative(some, base) > 1e-5


def test_undistilled_models_with_guidance_hold_their_memory_twice():
    settings = longlive(6, schedule=make_schedule(4, 5.0), solver="unipc", guidance=3.0)
    latents, _ = run(settings, batch=2)
    assert np.isfinite(latents).all()
    with pytest.raises(InputError, match="give guidance=None, or a solver"):
        run(longlive(6, guidance=3.0))


def test_a_model_with_condition_channels_is_given_nothing():
    found = [run(longlive(6, fill=fill), 2, cfg=DIT)[0] for fill in ("latent", "position")]
    plain = run(longlive(6), 2)[0]
    assert relative(found[0], plain) < 1e-5  # the projection of an untrained model is zero
    assert np.isfinite(found[1]).all()
