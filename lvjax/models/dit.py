# SPDX-License-Identifier: Apache-2.0
"""Wan's diffusion transformer as pure functions: `dit_spec`, `embed_context`, `dit`.

The pieces that `dit` is made of are public too, for callers who hold one layer at a time.

Everything that a long-video method varies enters as an argument: a rotation table, a memory,
timesteps per frame or token, condition channels.  Nothing here knows a method.
Source: Wan-Video/Wan2.1: wan/modules/model.py; Wan-Video/Wan2.2 (per-token timesteps);
arXiv:2503.20314.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct
from jax import lax

from lvjax.core.errors import InputError
from lvjax.core.mesh import constrain
from lvjax.core.offload import fetch, is_ready, pick, scan_ahead
from lvjax.core.params import Param, Spec, stack
from lvjax.core.shapes import expect
from lvjax.memory.cache import Past
from lvjax.models.config import DiTConfig
from lvjax.models.dit_block import block, block_spec, cross_keys_values, modulate, norm_spec
from lvjax.nn.embed import patchify, sinusoid, unpatchify
from lvjax.nn.linear import linear, linear_spec
from lvjax.nn.norm import layer_norm
from lvjax.nn.rope import grid_table


@struct.dataclass
class Context:
    """Cross-attention keys and values of every layer, computed once per prompt.

    k, v: [layers, B, M, N, D] of the text; image_k, image_v: the same for image tokens, or None.
    """

    k: jax.Array
    v: jax.Array
    image_k: jax.Array | None = None
    image_v: jax.Array | None = None


def dit_spec(cfg: DiTConfig) -> Spec:
    """Parameters of the transformer; the blocks are stacked on a leading axis.

    Text and time embeddings start as Xavier like everything else.  Wan draws N(0, 0.02), which is
    Xavier's size at its widths; at pocket widths it is a fourth of it and mutes the text.
    """
    d, cells = cfg.dim, cfg.patch[0] * cfg.patch[1] * cfg.patch[2]
    spec = {
        "patch_embedding": linear_spec(cfg.in_channels * cells, d, ("channels_in", "embed")),
        "text_embedding": {
            "fc1": linear_spec(cfg.text_dim, d, ("channels_in", "embed")),
            "fc2": linear_spec(d, d, ("embed", None)),
        },
        "time_embedding": {
            "fc1": linear_spec(cfg.freq_dim, d, ("channels_in", "embed")),
            "fc2": linear_spec(d, d, ("embed", None)),
        },
        "time_projection": linear_spec(d, 6 * d, ("embed", "mlp")),
        "blocks": stack(block_spec(cfg), cfg.num_layers),
        "head": {
            "modulation": Param((2, d), (None, "embed"), d**-0.5),
            "linear": linear_spec(d, cfg.out_channels * cells, ("embed", "channels_out"), "zeros"),
        },
    }
    if cfg.condition_channels:
        spec["condition_embedding"] = linear_spec(
            cfg.condition_channels * cells, d, ("channels_in", "embed"), "zeros", bias=False
        )
    if cfg.image_dim is not None:
        spec["image_embedding"] = _image_spec(cfg)
    return spec


def _image_spec(cfg: DiTConfig) -> Spec:
    n = cfg.image_dim
    spec = {
        "norm1": norm_spec(n),
        "fc1": linear_spec(n, n, ("channels_in", "mlp")),
        "fc2": linear_spec(n, cfg.dim, ("mlp", "embed")),
        "norm2": norm_spec(cfg.dim),
    }
    if cfg.image_pos_len:
        spec["pos"] = Param((cfg.image_pos_len, n), (None, "channels_in"), "zeros")
    return spec


def embed_text(params, text, cfg: DiTConfig):
    """text [B, M, text_dim] -> [B, text_len, C].

    Rows are padded with zeros before the MLP, and the padding is attended to, as Wan does.
    """
    found = expect(text, "B M C", "text", C=cfg.text_dim)
    if found["M"] > cfg.text_len:
        raise InputError(
            f"text has {found['M']} rows, the model takes {cfg.text_len}; shorten the prompt"
        )
    text = jnp.pad(text, ((0, 0), (0, cfg.text_len - found["M"]), (0, 0))).astype(cfg.dtype)
    hidden = jax.nn.gelu(linear(params["fc1"], text, jnp.float32), approximate=True)
    return linear(params["fc2"], hidden.astype(text.dtype))


def embed_image(params, image, cfg: DiTConfig):
    """CLIP tokens image [B, M, image_dim] -> [B, M, C]."""
    rows = {"M": cfg.image_pos_len} if cfg.image_pos_len else {}
    expect(image, "B M C", "image", C=cfg.image_dim, **rows)
    image = image.astype(jnp.float32)
    if "pos" in params:
        image = image + params["pos"].astype(jnp.float32)[None]
    h = layer_norm(image, 1e-5, params["norm1"]).astype(cfg.dtype)
    h = jax.nn.gelu(linear(params["fc1"], h, jnp.float32), approximate=False).astype(cfg.dtype)
    return layer_norm(linear(params["fc2"], h), 1e-5, params["norm2"])


def embed_context(params, text, cfg: DiTConfig, image=None) -> Context:
    """Everything cross-attention needs of a prompt: it depends on neither latents nor timestep.

    text: [B, M, text_dim], M <= cfg.text_len; rows behind the last real token are exact zeros.
    image: CLIP tokens [B, M, image_dim] for models with an image branch, else None; models with a
        position table take those of the first and the last image, concatenated along M.
    Raises: InputError for wrong shapes, or when an image is missing or not wanted.
    """
    if cfg.image_dim is None and image is not None:
        raise InputError("this model has no image branch; pass image=None")
    if cfg.image_dim is not None and image is None:
        raise InputError(f"this model needs image tokens [B, M, {cfg.image_dim}]")
    cross = params["blocks"]["cross_attn"]

    def project(tokens, suffix):
        # of layers that wait, what makes queries and the output does not come
        used = {name + suffix: cross[name + suffix] for name in ("k", "norm_k", "v")}
        return lax.map(lambda p: cross_keys_values(fetch(p), tokens, cfg, suffix), used)

    k, v = project(embed_text(params["text_embedding"], text, cfg), "")
    if image is None:
        return Context(k, v)
    return Context(k, v, *project(embed_image(params["image_embedding"], image, cfg), "_img"))


def embed_time(params, timestep, cfg: DiTConfig):
    """timestep [B, U] -> e [B, U, C] for the head, e0 [B, U, 6, C] for the blocks, float32."""
    mlp = params["time_embedding"]
    features = sinusoid(timestep.astype(jnp.float32), cfg.freq_dim)
    e = linear(mlp["fc2"], jax.nn.silu(linear(mlp["fc1"], features)))
    e0 = linear(params["time_projection"], jax.nn.silu(e))
    return e, rearrange(e0, "b u (s c) -> b u s c", s=6)


def embed_latents(params, latents, condition, cfg: DiTConfig):
    """Tokens [B, L, C] float32, rounded to cfg.dtype once.

    Wan's convolution over [noise, mask, condition] is the sum of two projections.
    """

    def project(name, video):
        tokens = patchify(video, cfg.patch).astype(cfg.dtype)
        return linear(params[name], tokens, jnp.float32)

    x = project("patch_embedding", latents)
    if condition is not None:
        x = x + project("condition_embedding", condition)
    return x.astype(cfg.dtype).astype(jnp.float32)


def _layers(params, x, e0, context, rotation, past, span, cfg: DiTConfig, remat: bool):
    """Run layers span = (first, last) under `lax.scan`.

    What passes write of the past is carried, never scanned over, so that its slots change in
    place.  A partial span indexes the stacked weights inside the loop: slices taken outside would
    be copies.  Weights that wait in the host's memory are fetched a layer ahead.
    """
    first, last = span
    stacked = (params, context)

    def layer(carry, i, own):
        x, written = carry
        p, ctx = pick(stacked, first + i) if own is None else own
        memory = None if past is None else (past.with_written(written), i)
        x, memory, keys = block(p, x, e0, ctx, rotation, memory, cfg)
        return ((x, None), None) if memory is None else ((x, memory.written), keys)

    # Matrix products are kept for the backward pass, what lies between them is computed again.
    # Measured on two CPU cores, six layers of width 256: 11 % less time and 55 % less memory than
    # with everything kept.
    saved = jax.checkpoint_policies
    policy = saved.save_only_these_names("attention") if remat else saved.dots_saveable
    layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)
    carry = x, None if past is None else past.written
    if is_ready(stacked):
        index = jnp.arange(last - first, dtype=jnp.int32)
        whole = stacked if span == (0, cfg.num_layers) else None
        (x, written), keys = lax.scan(lambda c, xs: layer(c, *xs), carry, (index, whole))
    else:
        (x, written), keys = scan_ahead(layer, carry, stacked, span)
    return x, None if past is None else past.with_written(written), keys


def _blocks(params, x, e0, context, rotation, past, cfg: DiTConfig, remat: bool):
    """All layers: those before the memory, those with it, those after it."""
    first, last = (0, 0) if past is None else past.layers
    keys = None
    for span, memory in (((0, first), None), ((first, last), past), ((last, cfg.num_layers), None)):
        if span[0] == span[1]:
            continue
        x, memory, found = _layers(params, x, e0, context, rotation, memory, span, cfg, remat)
        past, keys = (past, keys) if memory is None else (memory, found)
    return x, past, keys


def head(params, x, e, grid: tuple[int, int, int], cfg: DiTConfig):
    """Tokens x [B, L, C] float32 and e [B, U, C] -> velocity [B, T, H, W, Cout]."""
    m = params["modulation"].astype(jnp.float32)[None, None] + e[:, :, None]
    x = modulate(layer_norm(x, cfg.eps), m[:, :, 0], m[:, :, 1])
    return unpatchify(linear(params["linear"], x), grid, cfg.patch)


def _check(latents, timestep, condition, past, cfg: DiTConfig):
    """Sizes by letter, and the token grid (t, h, w)."""
    size = expect(latents, "B T H W C", "latents", C=cfg.in_channels)
    sides = [size[axis] for axis in "THW"]
    if any(side % n for side, n in zip(sides, cfg.patch, strict=True)):
        raise InputError(f"latents [T, H, W] = {sides} must be multiples of the patch {cfg.patch}")
    grid = tuple(side // n for side, n in zip(sides, cfg.patch, strict=True))
    tokens = grid[0] * grid[1] * grid[2]
    if timestep.ndim != 2 or timestep.shape[0] != size["B"] or tokens % timestep.shape[1]:
        raise InputError(
            f"timestep has shape {timestep.shape}; expected [B={size['B']}] or [B, U] "
            f"with U a divisor of {tokens} tokens"
        )
    if condition is not None:
        if not cfg.condition_channels:
            raise InputError("this model takes no condition channels; pass condition=None")
        expect(condition, "B T H W C", "condition", **(size | {"C": cfg.condition_channels}))
    if past is not None:
        past.check(tokens)
    return grid


def dit(
    params,
    latents,
    timestep,
    context: Context,
    cfg: DiTConfig,
    *,
    condition=None,
    rotation=None,
    past: Past | None = None,
    remat: bool = False,
):
    """Velocity (noise minus data) of noisy latents.

    latents: [B, T, H, W, C].
    timestep: float32 [B] or [B, U] in 0..1000, one value for L/U consecutive tokens (U: 1, T or L).
    condition: [B, T, H, W, Cc], mask and condition latents; None adds nothing.
    rotation: (cos, sin) [L, 1|N, D/2] for the clip's own queries and keys; default: frames 0..T-1.
    past: memory opened for this clip (memory/cache.py); in its layers attention runs over what is
        visible of it, the clip's own keys and values among it.
    remat: keep only attention outputs for the backward pass, instead of every matrix product.
    Returns: velocity float32 [B, T, H, W, Cout]; past after the writes, or None; the clip's own
        keys [layers with memory, B, L, N, D], normalised, not rotated, or None.
    Raises: InputError for wrong shapes.
    """
    timestep = timestep[:, None] if timestep.ndim == 1 else timestep
    t, h, w = grid = _check(latents, timestep, condition, past, cfg)
    if rotation is None:
        rotation = grid_table(np.arange(t), h, w, cfg.head_dim, cfg.theta)
    e, e0 = embed_time(params, timestep, cfg)
    x = constrain(embed_latents(params, latents, condition, cfg), "batch", "length", "embed")
    x, past, keys = _blocks(params["blocks"], x, e0, context, rotation, past, cfg, remat)
    return head(params["head"], x, e, grid, cfg), past, keys
