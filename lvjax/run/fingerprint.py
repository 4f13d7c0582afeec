# SPDX-License-Identifier: Apache-2.0
"""What a part computes, in sixteen numbers: one run at a small size, layer by layer from the disk,
so that a model larger than memory can be tried too.

Checksums say that the arrays are as they were written; this says that what is computed with them
still is.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.export import part_config
from lvjax.core.checkpoint import Stored, layers
from lvjax.core.errors import CheckpointError
from lvjax.core.params import unflatten
from lvjax.models import dit as dits
from lvjax.models import image_encoder, umt5, vae
from lvjax.models.dit import Context
from lvjax.models.dit_block import block, cross_keys_values
from lvjax.nn.rope import grid_table

NUMBERS = 16
TOLERANCE = 1e-3  # of the norm; another order of summation changes about 1e-6
GRID = (2, 4, 4)


def _draw(shape, seed: int):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _float32(tree):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a).astype(np.float32)), tree)


def _head(stored: Stored, stacked: str = "blocks/") -> dict:
    """Everything that is not stacked by layer."""
    return unflatten({k: _float32(stored[k]) for k in stored if not k.startswith(stacked)})


def _dit(stored: Stored, cfg) -> np.ndarray:
    params = _head(stored)
    t, h, w = GRID
    h, w = h * cfg.patch[1], w * cfg.patch[2]
    latents = _draw((1, t * cfg.patch[0], h, w, cfg.in_channels), 0)
    channels = cfg.condition_channels
    condition = _draw((*latents.shape[:-1], channels), 1) if channels else None
    text = _draw((1, 8, cfg.text_dim), 2)
    tokens = [dits.embed_text(params["text_embedding"], text, cfg)]
    if cfg.image_dim is not None:
        image = _draw((1, cfg.image_pos_len or 257, cfg.image_dim), 3)
        tokens.append(dits.embed_image(params["image_embedding"], image, cfg))
    e, e0 = dits.embed_time(params, jnp.full((1, 1), 500.0), cfg)
    x = dits.embed_latents(params, latents, condition, cfg)
    rotation = grid_table(np.arange(GRID[0]), *GRID[1:], cfg.head_dim, cfg.theta)

    @jax.jit
    def layer(p, x, tokens):
        cross = p["cross_attn"]
        pairs = [cross_keys_values(cross, t, cfg, s) for t, s in zip(tokens, ("", "_img"))]  # noqa: B905
        context = Context(*(a for pair in pairs for a in pair))
        return block(p, x, e0, context, rotation, None, cfg)[0]

    for p in layers(stored, "blocks"):
        x = layer(_float32(unflatten(p)), x, tokens)
    return np.asarray(dits.head(params["head"], x, e, GRID, cfg))


def _vae(stored: Stored, cfg) -> np.ndarray:
    params = _float32(unflatten(dict(stored)))
    latents = _draw((1, 2, 2, 2, cfg.z), 0)
    frames = jax.jit(partial(vae.decode, cfg=cfg))(params, latents)
    again = jax.jit(partial(vae.encode, cfg=cfg))(params, frames)
    return np.concatenate([np.asarray(frames).reshape(-1), np.asarray(again).reshape(-1)])


def _text(stored: Stored, cfg) -> np.ndarray:
    ids = np.random.default_rng(0).integers(2, cfg.vocab, (1, 12)).astype(np.int32)
    mask = np.ones(ids.shape, bool)
    stored.check(["embedding"])
    x = jnp.asarray(np.stack([[stored.layer("embedding", int(i)) for i in ids[0]]])).astype(
        jnp.float32
    )
    run = jax.jit(umt5.block, static_argnames="cfg")
    for p in layers(stored, "blocks"):
        x = run(_float32(unflatten(p)), x, mask, cfg=cfg)
    return np.asarray(umt5.final_norm(_float32(stored["norm"]), x, mask, cfg))


def _image(stored: Stored, cfg) -> np.ndarray:
    params = _float32(unflatten(dict(stored)))
    pixels = _draw((1, cfg.size, cfg.size, cfg.channels), 0)
    return np.asarray(jax.jit(partial(image_encoder.encode_image, cfg=cfg))(params, pixels))


RUNS = {"dit": _dit, "vae": _vae, "text": _text, "image": _image}


def fingerprint(stored: Stored) -> list[float]:
    """Sixteen projections of what the part computes in float32 on fixed inputs.

    Raises: CheckpointError when the part is damaged, or what it computes is not finite.
    """
    kind, cfg = part_config(stored)
    if kind != "vae":
        cfg = dataclasses.replace(cfg, dtype="float32")
    with jax.default_matmul_precision("highest"):  # else an accelerator rounds what it multiplies
        out = RUNS[kind](stored, cfg).astype(np.float64).reshape(-1)
    rng = np.random.default_rng(7)
    found = [float(out @ rng.standard_normal(len(out))) for _ in range(NUMBERS)]
    if not np.isfinite(found).all():
        raise CheckpointError(f"{stored.path}: what it computes is not finite; convert it again")
    return found


def check_fingerprint(stored: Stored, facts: dict) -> list[float]:
    """The fingerprint of a part, compared with the one in its report, if there is one.

    Raises: CheckpointError when they differ by more than `TOLERANCE`.
    """
    now = np.asarray(fingerprint(stored))
    if (before := facts.get("fingerprint")) is not None:
        off = np.linalg.norm(now - before) / max(np.linalg.norm(before), 1e-30)
        if not off <= TOLERANCE:
            raise CheckpointError(
                f"{stored.path} computes something else than when it was converted (relative "
                f"difference {off:.2g}, allowed {TOLERANCE:g}); convert it again with --overwrite"
            )
        return list(before)
    return now.tolist()
