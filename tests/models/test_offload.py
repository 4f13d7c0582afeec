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
from lvjax.core.compat import SLICES_WIDEN
from lvjax.core.mesh import make_mesh
from lvjax.core.params import map_spec
from lvjax.memory.cache import init_cache, open_past
from lvjax.models.config import WAN_VAE_2_1, DiTConfig
from lvjax.models.dit import dit, dit_spec, embed_context
from lvjax.nn.rope import grid_table
from tests.full import full_compiler  # noqa: F401
from tests.tiny import SMALL_DIT
from tests.wan_shell import QUICKLY, bytes_of, shell
from tests.wan_shell import context as context_of
from tests.wan_shell import params as params_of

CFG = replace(SMALL_DIT, num_layers=4)
HALF = replace(CFG, dtype="bfloat16")
WIDE, VAE = DiTConfig(256, 2, 12, 512, text_dim=16, text_len=16), replace(WAN_VAE_2_1, base=4)
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
    return offload.place(tree, MESH) | {"blocks": blocks}


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


@pytest.mark.parametrize(
    "cfg, dtype, moved, layers",
    [
        (CFG, "float32", on_host, None),
        (CFG, "float32", on_host, (1, 3)),
        (HALF, "bfloat16", as_bits, (2, 4)),
        (HALF, "bfloat16", both, (0, 4)),
    ],
    ids=["no memory", "a memory in the middle", "bits", "bits on the host"],
)
def test_where_weights_wait_changes_nothing(cfg, dtype, moved, layers):
    tree = params(dtype)
    there = moved(tree)
    assert not offload.is_ready(there["blocks"]) and offload.is_ready(there["head"])
    equal(run(there, cfg, layers), run(tree, cfg, layers))


def test_weights_that_are_there_are_not_moved(monkeypatch):
    """Training has the program that it had."""

    def loss(params):
        context = embed_context(params, jnp.ones((1, 5, 8)), CFG)
        return (dit(params, jnp.ones((1, 3, 4, 4, 4)), jnp.ones(1), context, CFG)[0] ** 2).sum()

    monkeypatch.setattr("lvjax.models.dit.scan_ahead", None)
    assert offload.fetch(params()) is params()
    jax.make_jaxpr(jax.grad(loss))(params())
    with pytest.raises(TypeError, match="not callable"):
        jax.make_jaxpr(jax.grad(loss))(on_host(params()))


def test_layers_come_in_order_each_once():
    """Step i sees layer first + i of the stack."""
    stack = {"w": offload.wait(jnp.arange(12.0).reshape(6, 2))}
    seen = []

    def step(carry, i, layer):
        jax.debug.callback(lambda i, w: seen.append((int(i), w.tolist())), i, layer["w"])
        return carry + layer["w"], layer["w"].sum()

    total, sums = jax.jit(lambda s: offload.scan_ahead(step, jnp.zeros(2), s, (2, 5)))(stack)
    jax.effects_barrier()
    assert sorted(seen) == [(0, [4, 5]), (1, [6, 7]), (2, [8, 9])]
    assert total.tolist() == [18, 21] and sums.tolist() == [9, 13, 17]


def test_bits_are_the_same_memory(monkeypatch):
    tree = {"a": jnp.arange(4, dtype=jnp.bfloat16), "b": jnp.ones(3)}
    tree["c"] = offload.wait(tree["a"] + 1)
    monkeypatch.setattr(offload, "SLICES_WIDEN", True)
    bits = offload.as_bits(tree)
    assert bits["b"] is tree["b"] and bits["a"].dtype == bits["c"].dtype == offload.BITS
    for name in ("a", "c"):
        assert bits[name].unsafe_buffer_pointer() == tree[name].unsafe_buffer_pointer()
        assert bits[name].sharding == tree[name].sharding
    equal(offload.fetch(bits), tree)
    for name, value in (("SLICES_WIDEN", False), ("jax.default_backend", lambda: "gpu")):
        monkeypatch.setattr(offload, "SLICES_WIDEN", True)
        monkeypatch.setattr(f"lvjax.core.offload.{name}", value)
        assert offload.as_bits(tree) is tree


def test_no_stack_is_widened():
    """XLA on the CPU makes float32 copies of whole stacks of bfloat16 before jax 0.11, but not of
    what a session holds.
    """
    bundle = shell(replace(WIDE, dtype="bfloat16"), VAE)
    plain = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), params_of(bundle))
    latents, now = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 1, 8, 8, 16), (1,)))

    def held(params, context):
        program = jax.jit(lambda p, c, x, t: dit(p, x, t, c, bundle.dit)[0])
        compiled = program.lower(params["dit"], context, latents, now).compile(QUICKLY)
        return compiled.memory_analysis().temp_size_in_bytes / bytes_of(params["dit"])

    own = context_of(bundle.dit, 1)
    assert held(params_of(bundle), own) < 0.5
    wide = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), own)
    assert (held(plain, wide) > 1.5) == SLICES_WIDEN
