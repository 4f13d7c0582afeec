# SPDX-License-Identifier: Apache-2.0
"""The autoencoder's training loss."""

import jax
import jax.numpy as jnp

from lvjax.models.config import VAEConfig
from lvjax.models.vae import decode, encode_moments, normalise


def autoencoder_loss(
    cfg: VAEConfig, *, kl: float = 1e-4, latent_noise: float = 0.1, motion: float = 1.0
):
    """loss(params, video, key) for video uint8 [B, P, H, W, 3], P = 1 + 4m.

    L1 + L2 of the pixels + `motion` · L1 of the frame differences + `kl` · mean square of the
    latent means; the decoder sees latents with Gaussian noise of a random size up to
    `latent_noise` (in units of the latent), as it will from a generator. Reports psnr in dB over
    the batch (peak 1, noisy latents).
    """

    def loss(params, video, key):
        video = video.astype(jnp.float32) / 127.5 - 1
        mean, _ = encode_moments(params, video, cfg, piece="all")
        size_key, noise_key = jax.random.split(key)
        size = latent_noise * jax.random.uniform(size_key, (len(video), 1, 1, 1, 1))
        latents = normalise(mean, cfg) + size * jax.random.normal(noise_key, mean.shape)
        error = decode(params, latents, cfg, piece="all", clamp=False) - video
        square = jnp.mean(error**2)
        value = jnp.mean(jnp.abs(error)) + square + kl * jnp.mean(mean**2)
        if video.shape[1] > 1 and motion:
            value = value + motion * jnp.mean(jnp.abs(jnp.diff(error, axis=1)))
        return value, {"psnr": -10 * jnp.log10(square / 4)}

    return loss


def inflate(params):
    """Start a drawn autoencoder as an image model: 3-D kernels act on the newest frame only,
    temporal halving is the mean of two frames, temporal doubling repeats the frame.  Then training
    on images trains the weights that clips will use.
    """

    def leaf(a):
        if a.ndim != 5 or a.shape[0] != 3:
            return a
        if a.shape[1] == 3:
            return a.at[:2].set(0.0).at[2].multiply(3**0.5)
        eye = jnp.eye(a.shape[3], dtype=a.dtype)
        if a.shape[4] == 2 * a.shape[3]:
            return jnp.zeros_like(a).at[2, 0, 0].set(jnp.concatenate([eye, eye], axis=1))
        return jnp.zeros_like(a).at[1:, 0, 0].set(0.5 * eye)

    return jax.tree.map(leaf, params)
