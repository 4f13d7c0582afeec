# SPDX-License-Identifier: Apache-2.0
"""The Wan 2.1 autoencoder against diffusers' with random weights, and its rule tables."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert.keys_vae import vae_rules
from checkpoints_convert.rules import TRANSFORMS
from lvjax.core import params as P
from lvjax.core.errors import CheckpointError
from lvjax.models import vae, vae_blocks
from lvjax.models.config import WAN_VAE_2_1, VAEConfig
from lvjax.nn import conv
from tests.checkpoints_convert.in_memory import convert
from tests.parity.vae_oracle import (
    NOTICED,
    QUICKLY,
    TOLERANCE,
    arrays,
    compiled,
    difference,
    draw_latents,
    draw_video,
    official_name,
    parameters,
    posterior,
    stream_differences,
    torch_decode,
)

STATISTICS = {"mean": (0.1, -0.2, 0.3, 0.0), "std": (1.0, 2.0, 0.5, 1.5)}
WAN = VAEConfig(base=16, z=4, **STATISTICS)
POCKET = VAEConfig(
    base=16,
    z=4,
    dim_mult=(1, 2, 2),
    temporal_down=(True, True),
    patch=2,
    res_blocks=1,
    **STATISTICS,
)
both = pytest.mark.parametrize("cfg", [WAN, POCKET], ids=["wan", "pocket"])


@both
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_encode_and_decode(cfg, frames):
    encoded, decoded = stream_differences(cfg, frames)
    assert encoded <= TOLERANCE and decoded <= TOLERANCE


def test_moments():
    video = draw_video(POCKET, 9, 2, 3)
    ours = compiled("encode_moments", POCKET)(parameters(POCKET), video)
    for a, b in zip(ours, posterior(POCKET, video), strict=True):
        assert difference(a, b) <= TOLERANCE


def swap_halves(params, monkeypatch):
    """The later frame of every temporal upsampling first."""
    flat = P.flatten(params)
    for path, a in flat.items():
        if path.startswith("decoder") and "/up/time/" in path:
            flat[path] = jnp.roll(a, a.shape[-1] // 2, axis=-1)
    return P.unflatten(flat)


def stale_history(params, monkeypatch):
    """Every history one frame too old."""
    right = conv.last_frames

    def one_too_old(history, x, n):
        older = jnp.concatenate([right(history, x, n)[:, :1], right(history, x, n)[:, :-1]], axis=1)
        return older

    monkeypatch.setattr(conv, "last_frames", one_too_old)
    return params


def plain_norm(params, monkeypatch):
    """The norm without the factor sqrt(C)."""
    right = vae_blocks.channel_norm
    monkeypatch.setattr(
        vae_blocks, "channel_norm", lambda g, x: right(g, x) / float(x.shape[-1]) ** 0.5
    )
    return params


def first_frame_in_history(params, monkeypatch):
    """The temporal upsampling remembers the first frame."""
    right = vae_blocks.upsample

    def wrong(params, x, state):
        y, new = right(params, x, state)
        if state is None and "time" in new:
            new["time"] = conv.last_frames(None, x, 2)
        return y, new

    monkeypatch.setattr(vae_blocks, "upsample", wrong)
    return params


MUTATIONS = [swap_halves, stale_history, plain_norm, first_frame_in_history]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_a_wrong_network_is_noticed(mutate, monkeypatch):
    params = mutate(parameters(POCKET), monkeypatch)
    latents = draw_latents(POCKET, 3, 2, 2)
    decode = jax.jit(partial(vae.decode, cfg=POCKET, piece="all"), compiler_options=QUICKLY)
    assert difference(decode(params, latents), torch_decode(POCKET, latents)) > NOTICED


def test_official_names_give_the_same_parameters():
    renamed = {official_name(name, WAN): a for name, a in arrays(WAN).items()}
    assert {"conv1.weight", "decoder.upsamples.3.time_conv.weight", "encoder.head.0.gamma"} <= set(
        renamed
    )
    again = convert(renamed, vae_rules(WAN, "official"), vae.vae_spec(WAN))
    jax.tree.map(np.testing.assert_array_equal, again, parameters(WAN))


@both
def test_transforms_have_inverses(cfg):
    rules = {rule.source: rule for rule in vae_rules(cfg, "diffusers")}
    for name, a in arrays(cfg).items():
        transform = TRANSFORMS[rules[name].transform]
        np.testing.assert_array_equal(transform.inverse(transform.forward(a)), a)


def test_the_table_of_the_published_model_fills_its_spec():
    targets = [rule.target for rule in vae_rules(WAN_VAE_2_1, "diffusers")]
    assert len(set(targets)) == len(targets)
    extra = set(targets) - P.flatten(vae.vae_spec(WAN_VAE_2_1)).keys()
    assert all("/shortcut/" in path or "/time/" in path for path in extra)
    assert set(P.flatten(vae.vae_spec(WAN_VAE_2_1))) <= set(targets)


@both
def test_a_wrong_checkpoint_is_refused(cfg):
    own = arrays(cfg)
    rules, spec = vae_rules(cfg, "diffusers"), vae.vae_spec(cfg)
    strange = own | {f"decoder.extra.{i}": np.zeros(1) for i in range(7)}
    with pytest.raises(CheckpointError, match="7 arrays have no place .*extra.4 and 2 more"):
        convert(strange, rules, spec)
    less = {k: v for k, v in own.items() if k != "decoder.conv_in.bias"}
    with pytest.raises(CheckpointError, match="1 arrays are missing: decoder/conv_in/bias"):
        convert(less, rules, spec)
    with pytest.raises(CheckpointError, match=r"other shapes: decoder.conv_in.bias \[3\]"):
        convert(own | {"decoder.conv_in.bias": np.zeros(3)}, rules, spec)
