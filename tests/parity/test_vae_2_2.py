# SPDX-License-Identifier: Apache-2.0
"""The Wan 2.2 autoencoder against diffusers' with random weights, float32.

Each mutant is a mistake that is easily made; the same comparison must notice it.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AvgDown3D, DupUp3D
from einops import rearrange

from checkpoints_convert.keys_vae import vae_rules
from lvjax.core.errors import CheckpointError
from lvjax.models import vae, vae_blocks
from lvjax.models.config import VAEConfig
from tests.checkpoints_convert.in_memory import convert
from tests.parity.vae_oracle import (
    NOTICED,
    TOLERANCE,
    arrays,
    channels_last,
    difference,
    draw_latents,
    draw_video,
    official_name,
    parameters,
    stream_differences,
    torch_decode,
    torch_encode,
)


def residual_config(z, **sizes):
    """Mean and spread of the latents are another number for each channel."""
    numbers = tuple(0.1 * i for i in range(z))
    return VAEConfig(
        z=z, patch=2, mean=numbers, std=tuple(0.5 + n for n in numbers), residual=True, **sizes
    )


# The published stages and halvings.
WAN = residual_config(6, base=8, decoder_base=12, res_blocks=1)
# Every axis of a shortcut's cell has its own place among the channels, in both coders.
SMALL = residual_config(
    4, base=8, dim_mult=(1, 1, 4, 4), temporal_down=(True, False, True), res_blocks=1
)


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_encode_and_decode(frames):
    encoded, decoded = stream_differences(WAN, frames)
    assert encoded <= TOLERANCE and decoded <= TOLERANCE


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("n_in", "n_out", "cell"),
    [(8, 8, (1, 1, 1)), (8, 4, (1, 1, 1)), (8, 32, (2, 2, 2)), (8, 16, (1, 2, 2))],
)
def test_shortcuts(n_in, n_out, cell, first):
    """By themselves, for every ratio of channels; diffusers' run channels-first."""
    time, space = cell[0], cell[1]
    x = np.random.default_rng(0).normal(size=(2, 1 if first else 4, 6, 4, n_in))
    x = torch.from_numpy(x.astype(np.float32)).permute(0, 4, 1, 2, 3)
    down, up = AvgDown3D(n_in, n_out, time, space), DupUp3D(n_out, n_in, time, space)
    small = down(x)
    ours = vae_blocks.average_down(channels_last(x), first, n_out, cell)
    assert difference(ours, channels_last(small)) <= TOLERANCE
    ours = vae_blocks.repeat_up(channels_last(small), first, n_in, cell)
    np.testing.assert_array_equal(ours, channels_last(up(small, first)))


def shortcuts(kind, change):
    """A mutation: `change` of a shortcut's function and its arguments."""

    def mutate(monkeypatch):
        right = getattr(vae, kind)
        monkeypatch.setattr(vae, kind, lambda *a, **k: change(right, *a, **k))

    return mutate


def folded(order):
    """`average_down` with another order of the folded channels."""

    def wrong(right, x, first, channels, cell):
        time, rows, columns = cell
        x = jnp.pad(x, ((0, 0), (time - 1 if first else 0, 0), (0, 0), (0, 0), (0, 0)))
        pattern = f"b (t i) (h r) (w q) c -> b t h w ({order})"
        x = rearrange(x, pattern, i=time, r=rows, q=columns)
        return jnp.mean(x.reshape(*x.shape[:-1], channels, -1), axis=-1)

    return shortcuts("average_down", wrong)


def unfolded(order):
    """`repeat_up` with another order of the repeated channels."""

    def wrong(right, x, first, channels, cell):
        time, rows, columns = cell
        x = jnp.repeat(x, channels * time * rows * columns // x.shape[-1], axis=-1)
        pattern = f"b t h w ({order}) -> b (t i) (h r) (w q) c"
        x = rearrange(x, pattern, i=time, r=rows, q=columns)
        return x[:, time - 1 :] if first else x

    return shortcuts("repeat_up", wrong)


def none(right, x, first, channels, cell):
    made = jax.eval_shape(partial(right, first=first, channels=channels, cell=cell), x)
    return jnp.zeros(made.shape, made.dtype)


def not_in_the_last_stage(right, x, first, channels, cell):
    """Where the shortcut is the identity."""
    y = right(x, first, channels, cell)
    return jnp.zeros_like(y) if cell == (1, 1, 1) else y


def repeated_padding(right, x, first, channels, cell):
    """The first frame in place of the zeros before it."""
    return right(jnp.repeat(x, cell[0], axis=1) if first else x, False, channels, cell)


def padding_after(right, x, first, channels, cell):
    """The zeros after the first frame."""
    pad = ((0, 0), (0, cell[0] - 1 if first else 0), (0, 0), (0, 0), (0, 0))
    return right(jnp.pad(x, pad), False, channels, cell)


def padding_not_counted(right, x, first, channels, cell):
    """The first frame's mean over the frames that are there."""
    return right(x, first, channels, cell) * (float(cell[0]) if first else 1.0)


def summed(right, x, first, channels, cell):
    return right(x, first, channels, cell) * float(x.shape[-1] * np.prod(cell) // channels)


def no_frame_dropped(right, x, first, channels, cell):
    return right(x, False, channels, cell)


def last_frames_dropped(right, x, first, channels, cell):
    """The first frame of the first chunk's cell in place of the last."""
    y = right(x, False, channels, cell)
    return y[:, :1] if first else y


def swapped_pixels(monkeypatch):
    """Rows and columns of the folded pixels swapped."""
    fold, unfold = vae.fold, vae.unfold

    def turned(x):
        return x.swapaxes(2, 3)

    monkeypatch.setattr(vae, "fold", lambda x, patch: turned(fold(turned(x), patch)))
    monkeypatch.setattr(vae, "unfold", lambda x, patch: turned(unfold(turned(x), patch)))


ENCODER = {
    "no_shortcut": shortcuts("average_down", none),
    "none_in_the_last_stage": shortcuts("average_down", not_in_the_last_stage),
    "channels_fastest": folded("i r q c"),
    "rows_fastest": folded("c i q r"),
    "time_fastest": folded("c r q i"),
    "repeated_padding": shortcuts("average_down", repeated_padding),
    "padding_after": shortcuts("average_down", padding_after),
    "padding_not_counted": shortcuts("average_down", padding_not_counted),
    "summed": shortcuts("average_down", summed),
    "swapped_pixels": swapped_pixels,
}
DECODER = {
    "no_shortcut": shortcuts("repeat_up", none),
    "channels_fastest": unfolded("i r q c"),
    "rows_fastest": unfolded("c i q r"),
    "time_fastest": unfolded("c r q i"),
    "last_frames_dropped": shortcuts("repeat_up", last_frames_dropped),
    "swapped_pixels": swapped_pixels,
}


@cache
def first_frame():
    """A frame with diffusers' latent, and a latent with diffusers' frame."""
    video, latent = draw_video(SMALL, 1, 2, 3), draw_latents(SMALL, 1, 2, 3)
    return video, torch_encode(SMALL, video), latent, torch_decode(SMALL, latent)


# Without jit: every mutant reuses the operations that were compiled for the ones before it.
def encode_first():
    video, wanted, _, _ = first_frame()
    return difference(vae.encode_start(parameters(SMALL), video, SMALL)[1], wanted)


def decode_first():
    _, _, latent, wanted = first_frame()
    return difference(vae.decode(parameters(SMALL), latent, SMALL), wanted)


def test_the_first_frame_of_the_right_network():
    assert encode_first() <= TOLERANCE and decode_first() <= TOLERANCE


@pytest.mark.parametrize("name", ENCODER)
def test_mistakes_in_the_encoder_are_noticed(name, monkeypatch):
    ENCODER[name](monkeypatch)
    assert encode_first() > NOTICED


@pytest.mark.parametrize("name", DECODER)
def test_mistakes_in_the_decoder_are_noticed(name, monkeypatch):
    DECODER[name](monkeypatch)
    assert decode_first() > NOTICED


def test_frames_that_are_not_dropped_do_not_fit(monkeypatch):
    shortcuts("repeat_up", no_frame_dropped)(monkeypatch)
    latent = draw_latents(SMALL, 1, 2, 3)
    with pytest.raises(TypeError, match="incompatible shapes"):
        jax.eval_shape(partial(vae.decode, cfg=SMALL), parameters(SMALL), latent)


def test_halved_channels_do_not_fit(monkeypatch):
    """The kept channels of the upsampling convolution, halved as in 2.1."""
    right = vae.upsample_spec
    monkeypatch.setattr(vae, "upsample_spec", lambda n, n_out, t: right(n, n_out // 2, t))
    with pytest.raises(CheckpointError, match=r"6 arrays .*up_blocks.2.upsampler.resample.1.bias"):
        convert(arrays(WAN), vae_rules(WAN, "diffusers"), vae.vae_spec(WAN))


def test_official_names_give_the_same_parameters():
    cfg = replace(WAN, res_blocks=2)
    renamed = {official_name(name, cfg): a for name, a in arrays(cfg).items()}
    assert {
        "conv1.weight",
        "encoder.downsamples.1.downsamples.2.time_conv.weight",
        "decoder.upsamples.2.upsamples.0.shortcut.weight",
        "decoder.upsamples.0.upsamples.3.resample.1.bias",
    } <= set(renamed)
    again = convert(renamed, vae_rules(cfg, "official"), vae.vae_spec(cfg))
    jax.tree.map(np.testing.assert_array_equal, again, parameters(cfg))
