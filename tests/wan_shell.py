# SPDX-License-Identifier: Apache-2.0
"""Wan models without their weights: outlines of any size, the types of what they would hold, and
XLA's account of the memory of their compiled programs.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from checkpoints_convert.recognise import KINDS
from lvjax.core.checkpoint import Slot, Stored
from lvjax.core.offload import BITS
from lvjax.core.params import flatten, unflatten
from lvjax.methods.wan import WanClip, WanState, _expert_alone, _finish_alone, stages
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import Context, dit_spec
from lvjax.models.vae import encode, vae_spec
from lvjax.rollout.condition import MASK
from lvjax.run import costs, open_wan
from lvjax.run.bundle import Bundle, specs
from lvjax.run.presets import PRESETS, preset_of
from lvjax.run.request import Request, resolved
from lvjax.run.weights import leaf_bytes

QUICKLY = {"xla_backend_optimization_level": 0}  # compiled; the memory is the same


def shell(dit: DiTConfig, vae: VAEConfig, experts: int = 1) -> Bundle:
    """The outline of a model that was converted to its activations' type."""
    narrow = dit.dtype == "bfloat16"
    parts = {"dit": _stored(dit_spec(dit), narrow), "vae": _stored(vae_spec(vae), False)}
    if experts == 2:
        parts["dit_low"] = parts["dit"]
    name = preset_of(dit, experts)
    return Bundle(name, dit, vae, None, replace(PRESETS[name], steps=2), {}, parts=parts)


def _stored(spec, narrow: bool) -> Stored:
    def kind(name):
        wide = not narrow or any(word in name for word in KINDS["dit"].precise)
        return np.dtype("float32" if wide else ml_dtypes.bfloat16)

    return Stored(Path("nowhere"), {k: Slot(kind(k), p.shape, 0, ()) for k, p in
                                    flatten(spec).items()}, {})  # fmt: skip


def request(frames: int, size: tuple[int, int], rows: int = 1, **fields) -> Request:
    return Request((((0.0, "a cat"),),) * rows, frames, size=size, **fields)


def params(bundle: Bundle) -> dict:
    """The types of the weights as a session without offload places them."""
    found = {}
    for part, spec in specs(bundle).items():
        tree = {}
        for name, (shape, size) in leaf_bytes(bundle, part, spec).items():
            bits = name.startswith("blocks/") and costs.waits(bundle.dit)
            narrow = BITS if bits else jnp.bfloat16
            tree[name] = jax.ShapeDtypeStruct(shape, narrow if size == 2 else jnp.float32)
        found[part] = unflatten(tree)
    return found


def context(dit: DiTConfig, rows: int) -> Context:
    """The types of a context."""
    dtype = BITS if costs.waits(dit) else jnp.dtype(dit.dtype)

    def heads(tokens):
        shape = (dit.num_layers, rows, tokens, dit.num_heads, dit.head_dim)
        return jax.ShapeDtypeStruct(shape, dtype)

    text, image = heads(dit.text_len), heads(costs.image_tokens(dit))
    return Context(text, text, *((image, image) if dit.image_dim else ()))


def bytes_of(tree) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _own(program, *given) -> int:
    """Bytes that a program allocates itself."""
    use = program.lower(*given).compile(QUICKLY).memory_analysis()
    return use.temp_size_in_bytes + use.output_size_in_bytes - use.alias_size_in_bytes


def peak(bundle: Bundle, wanted: Request) -> int:
    """Bytes of a run by XLA's account: its weights and the largest of its programs."""
    asked = resolved(bundle, wanted)
    chosen, weights = open_wan.settings(bundle, asked), params(bundle)
    batch, latents = len(asked.timelines), 1 + (asked.frames - 1) // MASK
    small = [n // bundle.vae.spatial_stride for n in asked.size]
    state = WanState(
        jax.ShapeDtypeStruct((batch, latents, *small, MASK + bundle.vae.z), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((batch, 2), jnp.uint32),
    )
    rows = [batch if scale is None else 2 * batch for scale in chosen.scales]
    clip = WanClip(tuple(context(bundle.dit, n) for n in rows))
    parts = stages(bundle.dit, bundle.vae, chosen)
    carry = jax.eval_shape(parts.begin, state)
    made = [
        _own(_expert_alone, part, weights[name], carry, state, own)
        for name, part, own in zip(bundle.experts, parts.experts, clip.contexts, strict=True)
    ]
    made.append(_own(_finish_alone, parts.finish, weights["vae"], carry, state))
    made = [bytes_of((state, carry, clip)) + size for size in made]
    if encoded := open_wan.clip_work(bundle, asked).encoded:
        frames = 1 + (encoded - 1) * MASK
        video = jax.ShapeDtypeStruct((batch, frames, *asked.size, 3), jnp.float32)
        code = jax.jit(encode, static_argnums=2)
        made.append(bytes_of(video) + _own(code, weights["vae"], video, bundle.vae))
    return bytes_of(weights) + max(made)
