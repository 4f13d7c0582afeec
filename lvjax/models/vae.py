# SPDX-License-Identifier: Apache-2.0
"""Wan's causal video autoencoders (2.1 and 2.2): pure functions with an explicit streaming state.

The network is defined chunk by chunk: the first frame alone, then `cfg.temporal_stride` pixel
frames for each latent frame.  `decode` and `encode` are the start function followed by a scan of
the step function, so a streamed video and a whole one are the same.  Video is [B,P,H,W,3] float32
in [-1,1]; latents are [B,T,h,w,z] float32, normalised per channel by cfg.mean and cfg.std.
Activations have the dtype of the parameters.  The blocks are in vae_blocks.py.
Sources: Wan, arXiv:2503.20314, section 4.1; Wan-Video/Wan2.1, wan/modules/vae.py; Wan-Video/Wan2.2,
wan/modules/vae2_2.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from lvjax.core.errors import InputError
from lvjax.core.params import Spec
from lvjax.core.shapes import expect
from lvjax.models.config import VAEConfig
from lvjax.models.vae_blocks import (
    average_down,
    chain,
    downsample_spec,
    head,
    head_spec,
    middle,
    middle_spec,
    repeat_up,
    stage,
    stage_spec,
    upsample_spec,
)
from lvjax.nn.conv import causal_conv3d, conv2d, conv2d_spec, conv3d_spec


def encoder_spec(cfg: VAEConfig) -> Spec:
    """Parameters of the encoder."""
    widths = cfg.encoder_widths
    spec = {"conv_in": conv3d_spec(3 * cfg.patch**2, widths[0])}
    for i, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        spec[f"stage{i}"] = stage_spec(n_in, n_out, cfg.res_blocks)
        if i < len(cfg.dim_mult) - 1:
            spec[f"stage{i}"]["down"] = downsample_spec(n_out, cfg.temporal_down[i])
    return spec | {"mid": middle_spec(widths[-1]), "head": head_spec(widths[-1], 2 * cfg.z)}


def decoder_spec(cfg: VAEConfig) -> Spec:
    """Parameters of the decoder."""
    widths = cfg.decoder_widths
    spec = {"conv_in": conv3d_spec(cfg.z, widths[0]), "mid": middle_spec(widths[0])}
    n_in = widths[0]
    for i, n_out in enumerate(widths[1:]):
        spec[f"stage{i}"] = stage_spec(n_in, n_out, cfg.res_blocks + 1)
        if i < len(cfg.dim_mult) - 1:
            n_in = n_out if cfg.residual else n_out // 2
            spec[f"stage{i}"]["up"] = upsample_spec(n_out, n_in, cfg.temporal_down[::-1][i])
    return spec | {"head": head_spec(widths[-1], 3 * cfg.patch**2)}


def vae_spec(cfg: VAEConfig) -> Spec:
    """Parameters of the autoencoder: {"encoder", "quant", "decoder", "post_quant"}."""
    return {
        "encoder": encoder_spec(cfg),
        "quant": conv2d_spec(2 * cfg.z, 2 * cfg.z, 1),
        "decoder": decoder_spec(cfg),
        "post_quant": conv2d_spec(cfg.z, cfg.z, 1),
    }


def _stages(cfg: VAEConfig, coder: str) -> dict:
    """{name: block} of the stages of "encoder" or "decoder", with their shortcuts if they have any.

    The decoder's last stage has none.
    """
    blocks = {f"stage{i}": stage for i in range(len(cfg.dim_mult))}
    if not cfg.residual:
        return blocks
    cells = [(2 if temporal else 1, 2, 2) for temporal in cfg.temporal_down]
    if coder == "encoder":
        kind, channels, cells = average_down, cfg.encoder_widths[1:], [*cells, (1, 1, 1)]
    else:
        kind, channels, cells = repeat_up, cfg.decoder_widths[1:-1], cells[::-1]
    for i, (n, cell) in enumerate(zip(channels, cells, strict=True)):
        blocks[f"stage{i}"] = partial(stage, shortcut=partial(kind, channels=n, cell=cell))
    return blocks


def _statistics(cfg: VAEConfig):
    mean, std = (np.asarray(v, np.float32).reshape(1, 1, 1, 1, -1) for v in (cfg.mean, cfg.std))
    return mean, std


def normalise(mean, cfg: VAEConfig):
    """Posterior means -> latents of about unit variance, [B,T,h,w,z] float32."""
    m, s = _statistics(cfg)
    return (mean - m) / s


def denormalise(latents, cfg: VAEConfig):
    """The inverse of `normalise`."""
    m, s = _statistics(cfg)
    return latents * s + m


def fold(video, patch: int):
    """Each patch x patch square into channels, index (colour, column, row) with the row fastest."""
    return rearrange(video, "b t (h r) (w q) c -> b t h w (c q r)", r=patch, q=patch)


def unfold(x, patch: int):
    """The inverse of `fold`."""
    return rearrange(x, "b t h w (c q r) -> b t (h r) (w q) c", r=patch, q=patch)


def _decode(params, state, latents, cfg: VAEConfig):
    """A chunk of latents to pixel frames; state None for the first chunk, one latent frame."""
    with jax.named_scope("vae_decode"):
        x = denormalise(latents.astype(jnp.float32), cfg)
        x = conv2d(params["post_quant"], x.astype(params["post_quant"]["kernel"].dtype))
        blocks = {"conv_in": causal_conv3d, "mid": middle} | _stages(cfg, "decoder")
        blocks |= {"head": head}
        x, state = chain(blocks, params["decoder"], x, state)
        return state, unfold(x, cfg.patch).astype(jnp.float32)


def _encode(params, state, video, cfg: VAEConfig):
    """A chunk of pixel frames to moments [B,n,h,w,2z] float32; state None for the first frame."""
    with jax.named_scope("vae_encode"):
        x = fold(video, cfg.patch).astype(params["quant"]["kernel"].dtype)
        blocks = {"conv_in": causal_conv3d} | _stages(cfg, "encoder")
        blocks |= {"mid": middle, "head": head}
        x, state = chain(blocks, params["encoder"], x, state)
        return state, conv2d(params["quant"], x).astype(jnp.float32)


def _check_piece(piece: int | str) -> None:
    if piece != "all" and (not isinstance(piece, int) or piece < 1):
        raise InputError(f"piece={piece!r}; give a number of latent frames from 1, or 'all'")


def _in_pieces(step, state, x, size: int, piece: int | str):
    """Outputs of `step` over x [B,n*size,...] in pieces of `piece` * size frames, as a list."""
    n = x.shape[1] // size
    if n == 0:
        return []
    piece = n if piece == "all" else min(piece, n)
    whole = n // piece
    if whole == 1:
        state, y = step(state, x[:, : piece * size])
    else:
        pieces = rearrange(x[:, : whole * piece * size], "b (k n) ... -> k b n ...", k=whole)
        state, y = jax.lax.scan(step, state, pieces)
        y = rearrange(y, "k b n ... -> b (k n) ...")
    rest = x[:, whole * piece * size :]
    return [y, step(state, rest)[1]] if rest.shape[1] else [y]


def decode_start(params, latent, cfg: VAEConfig):
    """The first latent frame [B,1,h,w,z] or [B,h,w,z] to (state, pixel frame [B,1,H,W,3]).

    Pixels are float32 and not clamped.  Raises: InputError for another shape.
    """
    latent = latent[:, None] if latent.ndim == 4 else latent
    expect(latent, "B T H W C", "latent", T=1, C=cfg.z)
    return _decode(params, None, latent, cfg)


def decode_step(params, state, latents, cfg: VAEConfig):
    """The next n >= 1 latent frames [B,n,h,w,z] to (state, [B,n*temporal_stride,H,W,3]).

    Pixels are float32 and not clamped.  Raises: InputError for another shape.
    """
    expect(latents, "B T H W C", "latents", C=cfg.z)
    return _decode(params, state, latents, cfg)


def decoder_state(params, latents, cfg: VAEConfig):
    """The state of `decode_next` before a video, for latents of this shape [B,n,h,w,z]: zeros.

    latents: an array, or a `jax.ShapeDtypeStruct`.
    """
    first = jax.ShapeDtypeStruct((latents.shape[0], 1, *latents.shape[2:]), jnp.float32)
    shapes = jax.eval_shape(lambda p, z: decode_start(p, z, cfg)[0], params, first)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def decode_next(params, state, latents, first, cfg: VAEConfig):
    """The next n >= 1 latent frames [B,n,h,w,z] to (state, [B,n*temporal_stride,H,W,3]), clamped;
    one program for the beginning of a video and for what follows.

    first: bool [], whether the video begins here; then temporal_stride - 1 frames of zeros stand in
      front, as its first latent frame is one pixel frame.
    """

    def begin(state, latents):
        del state
        state, video = decode_start(params, latents[:, :1], cfg)
        if latents.shape[1] > 1:
            state, rest = decode_step(params, state, latents[:, 1:], cfg)
            video = jnp.concatenate([video, rest], axis=1)
        return state, jnp.pad(video, ((0, 0), (cfg.temporal_stride - 1, 0), *((0, 0),) * 3))

    def follow(state, latents):
        return decode_step(params, state, latents, cfg)

    state, video = jax.lax.cond(first, begin, follow, state, latents)
    return state, jnp.clip(video, -1.0, 1.0)


def decode(params, latents, cfg: VAEConfig, piece: int | str = 1, clamp: bool = True):
    """Normalised latents [B,T,h,w,z] to video [B,1+(T-1)*temporal_stride,H,W,3], clamped to [-1,1].

    piece: latent frames of one step; 1 is the definition and equals streaming; "all" takes the rest
    at once (for training): equal up to float32 rounding, with memory that grows with T.
    Raises: InputError for another shape or an unknown piece.
    """
    expect(latents, "B T H W C", "latents", C=cfg.z)
    _check_piece(piece)
    state, first = decode_start(params, latents[:, :1], cfg)

    def step(state, latents):
        return decode_step(params, state, latents, cfg)

    video = jnp.concatenate([first, *_in_pieces(step, state, latents[:, 1:], 1, piece)], axis=1)
    return jnp.clip(video, -1.0, 1.0) if clamp else video


def _nearest(n: int, stride: int, least: int) -> str:
    """Give "a and b", the two of least, least + stride, ... that are nearest to n."""
    below = least + max(0, n - least) // stride * stride
    return f"{below} and {below + stride}"


def _check_sides(size: dict[str, int], cfg: VAEConfig) -> None:
    stride = cfg.spatial_stride
    for axis, name in (("H", "height"), ("W", "width")):
        if size[axis] < 1 or size[axis] % stride:
            raise InputError(
                f"{name} is {size[axis]} pixels; it must divide by {stride}: "
                f"the nearest are {_nearest(size[axis], stride, stride)}"
            )


def check_video(video, cfg: VAEConfig) -> None:
    """Raise InputError, with the nearest legal sizes, unless `video` [B,P,H,W,3] can be encoded."""
    size = expect(video, "B P H W C", "video", C=3)
    stride = cfg.temporal_stride
    if size["P"] < 1 or (size["P"] - 1) % stride:
        raise InputError(
            f"video has {size['P']} frames; the count must be 1 + a multiple of {stride}: "
            f"the nearest are {_nearest(size['P'], stride, 1)}"
        )
    _check_sides(size, cfg)


def encode_start(params, frame, cfg: VAEConfig):
    """The first pixel frame [B,1,H,W,3] to (state, normalised latent [B,1,h,w,z])."""
    _check_sides(expect(frame, "B P H W C", "frame", P=1, C=3), cfg)
    state, moments = _encode(params, None, frame, cfg)
    return state, normalise(moments[..., : cfg.z], cfg)


def encode_step(params, state, frames, cfg: VAEConfig):
    """The next n*temporal_stride pixel frames to (state, normalised latents [B,n,h,w,z])."""
    count = expect(frames, "B P H W C", "frames", C=3)["P"]
    if count < 1 or count % cfg.temporal_stride:
        raise InputError(f"got {count} frames; a step takes a multiple of {cfg.temporal_stride}")
    state, moments = _encode(params, state, frames, cfg)
    return state, normalise(moments[..., : cfg.z], cfg)


def encode_moments(params, video, cfg: VAEConfig, piece: int | str = "all"):
    """Mean and log-variance of the posterior, each [B,T,h,w,z] float32, not normalised.

    video [B,P,H,W,3], P = 1 + (T-1)*temporal_stride; `piece` as in `decode`; the log-variance is
    clipped to [-30,20].  Raises: InputError naming the nearest legal frame counts or sizes.
    """
    check_video(video, cfg)
    _check_piece(piece)
    state, first = _encode(params, None, video[:, :1], cfg)

    def step(state, frames):
        return _encode(params, state, frames, cfg)

    rest = _in_pieces(step, state, video[:, 1:], cfg.temporal_stride, piece)
    mean, logvar = jnp.split(jnp.concatenate([first, *rest], axis=1), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def encode(params, video, cfg: VAEConfig, piece: int | str = 1):
    """Video [B,P,H,W,3] in [-1,1] to normalised posterior means [B,T,h,w,z].

    P = 1 + (T-1)*temporal_stride; `piece` as in `decode`.
    Raises: InputError naming the nearest legal frame counts or sizes.
    """
    return normalise(encode_moments(params, video, cfg, piece)[0], cfg)
