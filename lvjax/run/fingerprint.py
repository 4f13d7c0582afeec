# SPDX-License-Identifier: Apache-2.0
"""What a part computes, in sixteen numbers: one run at a small size in float32.

Checksums say that the arrays are as they were written; this says that what is computed with them
still is.  Transformers and text encoders are read from the disk layer by layer, so that a model
larger than memory can be tried too; an autoencoder and an image encoder are held as a whole, which
is at most 3 GB.  Arrays that the run does not reach (words that are not among its twelve, CLIP's
last block) and changes below `TOLERANCE` do not show.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.core.checkpoint import Stored, layers
from lvjax.core.errors import CheckpointError
from lvjax.core.params import unflatten
from lvjax.models import dit as dits
from lvjax.models import image_encoder, umt5, vae
from lvjax.models.dit import Context
from lvjax.models.dit_block import block, cross_keys_values
from lvjax.models.parts import kind_of, stored_part
from lvjax.nn.rope import grid_table

NUMBERS = 16
TOLERANCE = 1e-4  # of the norm; another order of summation changes about 1e-6
GRID = (2, 4, 4)


def _draw(shape, seed: int):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _float32(tree):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a).astype(np.float32)), tree)


def _held(stored: Stored, stacked: str | None = None) -> dict:
    """The tree of a part in float32, without what is stacked by layer below `stacked`."""
    names = [name for name in stored if stacked is None or not name.startswith(f"{stacked}/")]
    return unflatten({name: _float32(stored[name]) for name in names})


def dit_inputs(cfg) -> dict:
    """What a transformer is run on: latents, a timestep, and what else it takes.

    latents [1,T,H,W,C].  timestep [1,1].  condition [1,T,H,W,Cc] or None.  text [1,8,D].
    image: tokens [1,M,Di] or None.
    """
    (t, h, w), patch, channels = GRID, cfg.patch, cfg.condition_channels
    size = (1, t * patch[0], h * patch[1], w * patch[2])
    tokens = cfg.image_pos_len or 257
    return {
        "latents": _draw((*size, cfg.in_channels), 0),
        "timestep": np.full((1, 1), 500, np.float32),
        "condition": _draw((*size, channels), 1) if channels else None,
        "text": _draw((1, 8, cfg.text_dim), 2),
        "image": None if cfg.image_dim is None else _draw((1, tokens, cfg.image_dim), 3),
    }


@partial(jax.jit, static_argnames="cfg")
def _dit_block(params, x, e0, tokens, rotation, cfg):
    """One layer, with the keys and values that it makes of text and image tokens itself."""
    cross = params["cross_attn"]
    pairs = [cross_keys_values(cross, tokens[0], cfg)]
    if len(tokens) > 1:
        pairs.append(cross_keys_values(cross, tokens[1], cfg, "_img"))
    context = Context(*(array for pair in pairs for array in pair))
    return block(params, x, e0, context, rotation, None, cfg)[0]


@partial(jax.jit, static_argnames="cfg")
def _dit_begin(params, given, cfg):
    """What the first layer takes: x, e0, tokens; and e, which the head takes."""
    tokens = [dits.embed_text(params["text_embedding"], given["text"], cfg)]
    if given["image"] is not None:
        tokens.append(dits.embed_image(params["image_embedding"], given["image"], cfg))
    e, e0 = dits.embed_time(params, given["timestep"], cfg)
    return dits.embed_latents(params, given["latents"], given["condition"], cfg), e0, tokens, e


_dit_end = jax.jit(dits.head, static_argnames=("grid", "cfg"))


def _dit(stored: Stored, cfg) -> np.ndarray:
    params, (t, h, w) = _held(stored, "blocks"), GRID
    x, e0, tokens, e = _dit_begin(params, dit_inputs(cfg), cfg=cfg)
    rotation = grid_table(np.arange(t), h, w, cfg.head_dim, cfg.theta)
    for layer in layers(stored, "blocks"):
        x = _dit_block(_float32(unflatten(layer)), x, e0, tokens, rotation, cfg=cfg)
    return np.asarray(_dit_end(params["head"], x, e, grid=GRID, cfg=cfg))


_decode = jax.jit(vae.decode, static_argnames="cfg")
_encode = jax.jit(vae.encode, static_argnames="cfg")
_umt5_block = jax.jit(umt5.block, static_argnames="cfg")
_encode_image = jax.jit(image_encoder.encode_image, static_argnames="cfg")


def _vae(stored: Stored, cfg) -> np.ndarray:
    params = _held(stored)
    frames = _decode(params, _draw((1, 2, 2, 2, cfg.z), 0), cfg=cfg)
    again = _encode(params, frames, cfg=cfg)
    return np.concatenate([np.asarray(frames).reshape(-1), np.asarray(again).reshape(-1)])


def text_ids(cfg) -> np.ndarray:
    """What a text encoder is run on, int32 [1, M]."""
    return np.random.default_rng(0).integers(2, cfg.vocab, (1, 12)).astype(np.int32)


def _text(stored: Stored, cfg) -> np.ndarray:
    ids = text_ids(cfg)
    mask = np.ones(ids.shape, bool)
    stored.check(["embedding"])
    x = _float32(np.stack([[stored.layer("embedding", int(i)) for i in row] for row in ids]))
    for layer in layers(stored, "blocks"):
        x = _umt5_block(_float32(unflatten(layer)), x, mask, cfg=cfg)
    return np.asarray(umt5.final_norm(_float32(stored["norm"]), x, mask, cfg))


def _image(stored: Stored, cfg) -> np.ndarray:
    pixels = _draw((1, cfg.size, cfg.size, cfg.channels), 0)
    return np.asarray(_encode_image(_held(stored), pixels, cfg=cfg))


RUNS = {"dit": _dit, "vae": _vae, "text": _text, "image": _image}


def fingerprint(stored: Stored) -> list[float]:
    """Sixteen projections of what the part computes in float32 on fixed inputs.

    Raises: CheckpointError when the part is damaged, or what it computes is not finite.
    """
    part, cfg = stored_part(stored)
    if part != "vae":
        cfg = dataclasses.replace(cfg, dtype="float32")
    with jax.default_matmul_precision("highest"):  # else an accelerator rounds what it multiplies
        out = RUNS[kind_of(part)](stored, cfg).astype(np.float64).reshape(-1)
    rng = np.random.default_rng(7)
    with np.errstate(invalid="ignore"):  # infinity is told below
        found = [float(out @ rng.standard_normal(len(out))) for _ in range(NUMBERS)]
    if not np.isfinite(found).all():
        raise CheckpointError(f"{stored.path}: what it computes is not finite; convert it again")
    return found


def is_fingerprint(found) -> bool:
    """Whether this, of a JSON file, is what `fingerprint` gave."""
    numbers = isinstance(found, list) and all(type(x) in (int, float) for x in found)
    return numbers and len(found) == NUMBERS and bool(np.isfinite(found).all())


def check_fingerprint(stored: Stored, facts: dict) -> list[float]:
    """The fingerprint of a part, compared with the one in its report, if there is one.

    Raises: CheckpointError when they differ by more than `TOLERANCE`, or the report has none.
    """
    now, before = np.asarray(fingerprint(stored)), facts.get("fingerprint")
    if before is not None:
        if not is_fingerprint(before):
            raise CheckpointError(
                f"the report of {stored.path} has {len(before) if type(before) is list else 'no'} "
                f"numbers as its fingerprint instead of {NUMBERS}; remove it and convert it again"
            )
        off = np.linalg.norm(now - before) / max(np.linalg.norm(before), 1e-30)
        if not off <= TOLERANCE:
            raise CheckpointError(
                f"{stored.path} computes something else than when it was converted (relative "
                f"difference {off:.2g}, allowed {TOLERANCE:g}); remove it and convert it again"
            )
        return list(before)
    return now.tolist()
