# SPDX-License-Identifier: Apache-2.0
"""diffusers' AutoencoderKLWan for any `VAEConfig`, and ours beside it with the same weights."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLWan

from checkpoints_convert.keys_vae import vae_rules
from lvjax.models import vae
from tests.checkpoints_convert.in_memory import convert
from tests.redrawn import redrawn
from tests.tiny import relative

TOLERANCE = 1e-5
NOTICED = 1e-3
# Compiling without LLVM's optimisations takes half the time; such models run quickly anyhow.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def difference(a, b):
    """The relative difference; infinite when the shapes differ."""
    return relative(a, b) if np.shape(a) == np.shape(b) else np.inf


def build(cfg):
    """diffusers' model of the sizes of `cfg`."""
    return AutoencoderKLWan(
        base_dim=cfg.base,
        decoder_base_dim=cfg.decoder_base,
        z_dim=cfg.z,
        dim_mult=list(cfg.dim_mult),
        num_res_blocks=cfg.res_blocks,
        temperal_downsample=list(cfg.temporal_down),
        latents_mean=list(cfg.mean),
        latents_std=list(cfg.std),
        is_residual=cfg.residual,
        in_channels=3 * cfg.patch**2,
        out_channels=3 * cfg.patch**2,
        patch_size=cfg.patch if cfg.patch > 1 else None,
        scale_factor_temporal=cfg.temporal_stride,
        scale_factor_spatial=cfg.spatial_stride,
    ).eval()


@cache
def reference(cfg):
    """diffusers' model, every parameter drawn anew (gains and biases too)."""
    return redrawn(build(cfg), {"bias": lambda noise, _: 0.1 * noise})


def arrays(cfg):
    """The reference's parameters by diffusers' names."""
    return {name: a.numpy() for name, a in reference(cfg).state_dict().items()}


@cache
def parameters(cfg):
    """The reference's parameters in our tree, through the key map."""
    tree = convert(arrays(cfg), vae_rules(cfg, "diffusers"), vae.vae_spec(cfg))
    return jax.tree.map(jnp.asarray, tree)


@cache
def compiled(name, cfg):
    """The named function of `vae`, compiled once for all tests of a configuration."""
    return jax.jit(partial(getattr(vae, name), cfg=cfg), compiler_options=QUICKLY)


def in_chunks(coder, cfg, x):
    """`encode` or `decode` as the stream it is defined by: two programs for every length."""
    params, size = parameters(cfg), cfg.temporal_stride if coder == "encode" else 1
    state, y = compiled(f"{coder}_start", cfg)(params, x[:, :1])
    out = [y]
    for start in range(1, x.shape[1], size):
        state, y = compiled(f"{coder}_step", cfg)(params, state, x[:, start : start + size])
        out.append(y)
    return np.concatenate(out, axis=1)


def channels_last(x):
    return x.permute(0, 2, 3, 4, 1).numpy()


def posterior(cfg, video):
    """diffusers' mean and log-variance, [B,T,h,w,z]."""
    with torch.no_grad():
        found = reference(cfg).encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3)).latent_dist
    return channels_last(found.mean), channels_last(found.logvar)


def torch_encode(cfg, video):
    """Normalised latents of diffusers."""
    return (posterior(cfg, video)[0] - np.float32(cfg.mean)) / np.float32(cfg.std)


def torch_decode(cfg, latents):
    z = latents * np.float32(cfg.std) + np.float32(cfg.mean)
    with torch.no_grad():
        return channels_last(reference(cfg).decode(torch.from_numpy(z).permute(0, 4, 1, 2, 3))[0])


def draw_video(cfg, frames, h, w):
    """Random pixels for h x w latent pixels."""
    size = (1, frames, h * cfg.spatial_stride, w * cfg.spatial_stride, 3)
    return np.random.default_rng(frames).uniform(-1, 1, size).astype(np.float32)


def draw_latents(cfg, frames, h, w):
    return np.random.default_rng(0).normal(size=(1, frames, h, w, cfg.z)).astype(np.float32)


def stream_differences(cfg, frames):
    """How far encoding and decoding, chunk by chunk, are from diffusers'."""
    video = draw_video(cfg, frames, 2, 3)
    latents = torch_encode(cfg, video)
    pixels = np.clip(in_chunks("decode", cfg, latents), -1, 1)
    return (
        difference(in_chunks("encode", cfg, video), latents),
        difference(pixels, torch_decode(cfg, latents)),
    )


_OFFICIAL = (  # diffusers -> official
    (r"^quant_conv", r"conv1"),
    (r"^post_quant_conv", r"conv2"),
    (r"(encoder|decoder)\.conv_in", r"\1.conv1"),
    (r"(encoder|decoder)\.norm_out", r"\1.head.0"),
    (r"(encoder|decoder)\.conv_out", r"\1.head.2"),
    (r"mid_block\.resnets\.0", r"middle.0"),
    (r"mid_block\.attentions\.0", r"middle.1"),
    (r"mid_block\.resnets\.1", r"middle.2"),
    (r"\.norm1\.", r".residual.0."),
    (r"(\d)\.conv1\.", r"\1.residual.2."),
    (r"\.norm2\.", r".residual.3."),
    (r"(\d)\.conv2\.", r"\1.residual.6."),
    (r"conv_shortcut", r"shortcut"),
)
_NESTED = (
    (r"(down|up)_blocks\.(\d)\.resnets\.(\d)", r"\1samples.\2.\1samples.\3"),
    # after the stage's residual blocks: two in the published encoder, three in the decoder
    (r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.2"),
    (r"up_blocks\.(\d)\.upsampler", r"upsamples.\1.upsamples.3"),
)
_FLAT = (
    (r"down_blocks\.(\d+)", r"downsamples.\1"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}"),
)


def official_name(name, cfg):
    """The official name of diffusers' array, for two residual blocks per stage as published."""
    for pattern, new in (*(_NESTED if cfg.residual else _FLAT), *_OFFICIAL):
        name = re.sub(pattern, new, name)
    return name
