# SPDX-License-Identifier: Apache-2.0
"""Weights that wait in the host's memory, or as bits: the transformer gives the same numbers, bit
for bit, and takes the layers from where they are.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core import offload
from lvjax.core.mesh import make_mesh
from lvjax.core.params import map_spec
from lvjax.memory.cache import init_cache, open_past
from lvjax.models.dit import dit, dit_spec, embed_context
from lvjax.nn.rope import grid_table
from tests.tiny import SMALL_DIT

CFG = replace(SMALL_DIT, num_layers=4)
HALF = replace(CFG, dtype="bfloat16")
MESH = make_mesh(devices=jax.devices()[:1])


@cache
def params(dtype="float32"):
    draw = np.random.default_rng(0)

    def fill(p):
        return jnp.asarray(draw.standard_normal(p.shape) * 0.2 + (p.init == "ones"), dtype)

    return map_spec(fill, dit_spec(CFG))


def on_host(tree):
    """Parameters whose blocks wait in the host's memory."""
    blocks = offload.place(tree["blocks"], MESH, offload.HOST)
    return offload.place({**tree, "blocks": tree["blocks"]}, MESH) | {"blocks": blocks}


def as_bits(tree):
    """Parameters whose blocks of bfloat16 are integers, whatever jax version runs."""
    view = partial(jax.tree.map, lambda a: jnp.asarray(np.asarray(a).view(np.uint16)))
    return {**tree, "blocks": view(tree["blocks"])}


def both(tree):
    return on_host(as_bits(tree))


def run(params, cfg, layers):
    """Velocities of two steps in one loop, with a memory in some of the layers or with none."""
    draw = np.random.default_rng(1)
    latents, condition, text = (
        jnp.asarray(draw.standard_normal(shape), jnp.float32)
        for shape in ((2, 3, 4, 4, 4), (2, 3, 4, 4, 3), (2, 5, 8))
    )

    def turn(frames):
        return grid_table(frames, 2, 2, cfg.head_dim, cfg.theta)

    past = None
    if layers is not None:
        cache = init_cache(cfg, 2, 6, (2, 2), layers)
        cache = cache.replace(frame=jnp.tile(jnp.array([3, 4, 5, -1, -1, -1]), (2, 1)))
        past = open_past(cache, turn, 0)

    def program(params):
        context = embed_context(params, text, cfg)

        def step(carry, timestep):
            x, past = carry
            timestep = jnp.broadcast_to(timestep, (2,))
            v, past, keys = dit(params, x, timestep, context, cfg, condition=condition, past=past)
            return (x - 0.1 * v, past), keys

        return jax.lax.scan(step, (latents, past), jnp.array([900.0, 500.0]))

    return jax.jit(program)(params)


def equal(a, b):
    a, b = (jax.tree.leaves(tree) for tree in (a, b))
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("layers", [None, (2, 4), (1, 3), (0, 4)], ids=str)
@pytest.mark.parametrize(
    "cfg, dtype, moved",
    [(CFG, "float32", on_host), (HALF, "bfloat16", on_host), (HALF, "bfloat16", as_bits),
     (HALF, "bfloat16", both)],
    ids=["float32", "bfloat16", "bits", "bits on the host"],
)  # fmt: skip
def test_where_weights_wait_changes_nothing(cfg, dtype, moved, layers):
    tree = params(dtype)
    there = moved(tree)
    assert not offload.is_ready(there["blocks"]) and offload.is_ready(there["head"])
    equal(run(there, cfg, layers), run(tree, cfg, layers))
