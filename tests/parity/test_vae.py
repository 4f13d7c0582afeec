# SPDX-License-Identifier: Apache-2.0
"""The autoencoder against diffusers' AutoencoderKLWan with random weights, and its rule tables."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert.keys_vae import vae_rules
from checkpoints_convert.rules import TRANSFORMS, convert
from lvjax.core import params as P
from lvjax.core.errors import CheckpointError
from lvjax.models import vae, vae_blocks
from lvjax.models.config import WAN_VAE_2_1, VAEConfig
from lvjax.nn import conv

TOLERANCE = 1e-5
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


def difference(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def reference(cfg):
    """diffusers' model of `cfg`, every parameter drawn anew (gains and biases too)."""
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    folded = {"patch_size": cfg.patch, "in_channels": 12, "out_channels": 12}
    model = AutoencoderKLWan(
        base_dim=cfg.base,
        z_dim=cfg.z,
        dim_mult=list(cfg.dim_mult),
        num_res_blocks=cfg.res_blocks,
        temperal_downsample=list(cfg.temporal_down),
        **(folded if cfg.patch > 1 else {}),
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            if name.endswith("gamma"):
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(0.1 * noise if p.ndim == 1 else noise / p[0].numel() ** 0.5)
    return model


@pytest.fixture(scope="module", params=[WAN, POCKET], ids=["wan", "pocket"])
def pair(request):
    cfg = request.param
    model = reference(cfg)
    arrays = {name: a.numpy() for name, a in model.state_dict().items()}
    params = convert(arrays, vae_rules(cfg, "diffusers"), vae.vae_spec(cfg))
    return model, cfg, jax.tree.map(jnp.asarray, params)


@cache
def compiled(name, cfg):
    """The named function of `vae`, compiled once for all tests of a configuration."""
    return jax.jit(partial(getattr(vae, name), cfg=cfg))


def in_chunks(coder, cfg, params, x, size):
    """`encode` or `decode` as the stream it is defined by: two programs for every length."""
    state, y = compiled(f"{coder}_start", cfg)(params, x[:, :1])
    out = [y]
    for start in range(1, x.shape[1], size):
        state, y = compiled(f"{coder}_step", cfg)(params, state, x[:, start : start + size])
        out.append(y)
    return np.concatenate(out, axis=1)


def torch_encode(model, cfg, video):
    """Normalised latents of diffusers."""
    import torch

    with torch.no_grad():
        mean = model.encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3)).latent_dist.mean
    return np.asarray(vae.normalise(mean.permute(0, 2, 3, 4, 1).numpy(), cfg))


def torch_decode(model, cfg, latents):
    import torch

    z = torch.from_numpy(np.array(vae.denormalise(latents, cfg))).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        return model.decode(z).sample.permute(0, 2, 3, 4, 1).numpy()


def draw_latents(frames, h, w, seed=0):
    return np.random.default_rng(seed).normal(size=(1, frames, h, w, 4)).astype(np.float32)


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_encode_and_decode(pair, frames):
    model, cfg, params = pair
    video = np.random.default_rng(frames).uniform(-1, 1, (1, frames, 16, 24, 3)).astype(np.float32)
    expected = torch_encode(model, cfg, video)
    latents = in_chunks("encode", cfg, params, video, cfg.temporal_stride)
    assert difference(latents, expected) <= TOLERANCE
    pixels = np.clip(in_chunks("decode", cfg, params, expected, 1), -1, 1)
    assert difference(pixels, torch_decode(model, cfg, expected)) <= TOLERANCE


@pytest.fixture(scope="module")
def pocket():
    model = reference(POCKET)
    arrays = {name: a.numpy() for name, a in model.state_dict().items()}
    return model, jax.tree.map(
        jnp.asarray, convert(arrays, vae_rules(POCKET, "diffusers"), vae.vae_spec(POCKET))
    )


def test_moments(pocket):
    import torch

    model, params = pocket
    video = np.random.default_rng(7).uniform(-1, 1, (1, 9, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3)).latent_dist
    ours = compiled("encode_moments", POCKET)(params, video)
    for a, b in zip(ours, (posterior.mean, posterior.logvar), strict=True):
        assert difference(a, b.permute(0, 2, 3, 4, 1).numpy()) <= TOLERANCE


def test_tiled_decode(pocket):
    """Tiles of 4 latent pixels, 1 of them overlap, over a picture that leaves smaller tiles."""
    model, params = pocket
    latents = draw_latents(1, 6, 7)
    model.enable_tiling(32, 32, 24, 24)
    try:
        expected = torch_decode(model, POCKET, latents)
    finally:
        model.use_tiling = False
    tiled = vae.decode_tiled(params, latents, POCKET, tile=4, overlap=1)
    assert difference(tiled, expected) <= TOLERANCE
    assert difference(torch_decode(model, POCKET, latents), expected) > 1e-3


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
def test_a_wrong_network_is_noticed(pocket, mutate, monkeypatch):
    model, params = pocket
    params = mutate(params, monkeypatch)
    latents = draw_latents(3, 2, 2)
    decode = jax.jit(lambda params, latents: vae.decode(params, latents, POCKET, piece="all"))
    assert difference(decode(params, latents), torch_decode(model, POCKET, latents)) > 1e-3


OFFICIAL_NAMES = [  # diffusers -> official, for the published topology
    (r"^quant_conv", r"conv1"),
    (r"^post_quant_conv", r"conv2"),
    (r"(encoder|decoder)\.conv_in", r"\1.conv1"),
    (r"(encoder|decoder)\.norm_out", r"\1.head.0"),
    (r"(encoder|decoder)\.conv_out", r"\1.head.2"),
    (r"mid_block\.resnets\.0", r"middle.0"),
    (r"mid_block\.attentions\.0", r"middle.1"),
    (r"mid_block\.resnets\.1", r"middle.2"),
    (r"down_blocks\.(\d+)", r"downsamples.\1"),
    (r"\.norm1\.", r".residual.0."),
    (r"(downsamples\.\d+|resnets\.\d|middle\.\d)\.conv1\.", r"\1.residual.2."),
    (r"\.norm2\.", r".residual.3."),
    (r"(downsamples\.\d+|resnets\.\d|middle\.\d)\.conv2\.", r"\1.residual.6."),
    (r"conv_shortcut", r"shortcut"),
]


def official_name(name):
    for pattern, new in OFFICIAL_NAMES:
        name = re.sub(pattern, new, name)
    name = re.sub(
        r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name
    )
    return re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name
    )


@pytest.mark.parametrize("pair", [WAN], ids=["wan"], indirect=True)
def test_official_names_give_the_same_parameters(pair):
    model, cfg, params = pair
    arrays = {official_name(name): a.numpy() for name, a in model.state_dict().items()}
    assert {"conv1.weight", "decoder.upsamples.3.time_conv.weight", "encoder.head.0.gamma"} <= set(
        arrays
    )
    again = convert(arrays, vae_rules(cfg, "official"), vae.vae_spec(cfg))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_transforms_have_inverses(pair):
    model, cfg, _ = pair
    rules = {rule.source: rule for rule in vae_rules(cfg, "diffusers")}
    for name, a in model.state_dict().items():
        transform = TRANSFORMS[rules[name].transform]
        np.testing.assert_array_equal(transform.inverse(transform.forward(a.numpy())), a.numpy())


def test_the_table_of_the_published_model_fills_its_spec():
    targets = [rule.target for rule in vae_rules(WAN_VAE_2_1, "diffusers")]
    assert len(set(targets)) == len(targets)
    extra = set(targets) - P.flatten(vae.vae_spec(WAN_VAE_2_1)).keys()
    assert all("/shortcut/" in path or "/time/" in path for path in extra)
    assert set(P.flatten(vae.vae_spec(WAN_VAE_2_1))) <= set(targets)


def test_a_wrong_checkpoint_is_refused(pair):
    model, cfg, _ = pair
    arrays = {name: a.numpy() for name, a in model.state_dict().items()}
    rules, spec = vae_rules(cfg, "diffusers"), vae.vae_spec(cfg)
    strange = arrays | {f"decoder.extra.{i}": np.zeros(1) for i in range(7)}
    with pytest.raises(CheckpointError, match="7 arrays have no place .*extra.4 and 2 more"):
        convert(strange, rules, spec)
    less = {k: v for k, v in arrays.items() if k != "decoder.conv_in.bias"}
    with pytest.raises(CheckpointError, match="1 arrays are missing: decoder/conv_in/bias"):
        convert(less, rules, spec)
    with pytest.raises(CheckpointError, match=r"other shapes: decoder.conv_in.bias \[3\]"):
        convert(arrays | {"decoder.conv_in.bias": np.zeros(3)}, rules, spec)
