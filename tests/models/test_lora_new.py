# SPDX-License-Identifier: Apache-2.0
"""New adapters, to be trained: nothing before that, then only what was asked for, and a LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.core.params import flatten, init, unflatten
from lvjax.models.dit import dit, dit_spec, embed_context
from lvjax.models.lora import Lora, LowRank, adapters, as_lora, attach, detach, lora_spec, within
from tests.drawn import drawn
from tests.tiny import SMALL_DIT as CFG
from tests.tiny import relative

TARGETS = [f"blocks/self_attn/{name}" for name in "qkvo"] + ["head/linear"]
RANK = 3
LATER = range(1, 2)  # of two layers


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def fresh():
    """Parameters that all matter, with untrained adapters in the later layer."""
    spec = lora_spec(dit_spec(CFG), TARGETS, RANK)
    beside = flatten(within(init(adapters(spec), jax.random.key(0)), LATER))
    base = flatten(drawn(dit_spec(CFG), 0))
    base["head/linear/kernel"] = 0.2 * draw(0, *base["head/linear/kernel"].shape)
    return unflatten(base | beside)


def run(params):
    context = embed_context(params, draw(1, 2, 5, 8), CFG)
    time = jnp.asarray([903.25, 17.0])
    return dit(params, draw(0, 2, 3, 4, 4, 4), time, context, CFG)[0]


@jax.jit
def value_and_gradients(params):
    return jax.value_and_grad(lambda p: jnp.sum(jnp.square(run(p) - 1)))(params)


forward = jax.jit(run)


def test_untrained_they_change_nothing(fresh):
    np.testing.assert_array_equal(forward(fresh), forward(detach(fresh)))
    found = flatten(adapters(fresh))
    assert len(found) == 3 * len(TARGETS) and {a.dtype.name for a in found.values()} == {"float32"}
    q = fresh["blocks"]["self_attn"]["q"]["lora"]
    assert {k: a.shape for k, a in q.items()} == {
        "a": (2, CFG.dim, RANK), "b": (2, RANK, CFG.dim), "scale": (2, RANK)
    }  # fmt: skip
    assert 0.8 < np.std(q["a"]) * np.sqrt(CFG.dim) < 1.2
    np.testing.assert_array_equal(q["scale"], [[0] * RANK, [1] * RANK])
    np.testing.assert_array_equal(fresh["head"]["linear"]["lora"]["scale"], [1] * RANK)


def test_the_spec_draws_each_by_itself():
    """Adapters alone, for weights that are read and not drawn, are those of the whole spec."""
    small = {"head": dit_spec(CFG)["head"]}
    spec = lora_spec(small, TARGETS[-1:], RANK)
    whole, alone = (flatten(init(s, jax.random.key(1))) for s in (spec, adapters(spec)))
    assert alone.keys() == flatten(adapters(spec)).keys() < whole.keys()
    for path, leaf in alone.items():
        np.testing.assert_array_equal(leaf, whole[path])
    assert flatten(detach(spec)) == flatten(small) and adapters(small) == {}


def test_gradients_reach_only_what_is_asked_for(fresh):
    """First b alone, as b = 0 hides a; a step later both, in the later layer."""
    for step in range(2):
        loss, found = value_and_gradients(fresh)
        flat, found = flatten(fresh), flatten(adapters(found))
        for path, g in found.items():
            layer = g[1] if path.startswith("blocks") else g
            assert path.endswith("/scale") or bool(np.any(layer)) == (step or path.endswith("b"))
            assert not path.startswith("blocks") or not np.any(g[0])
        steps = {k: flat[k] - 1e-5 * g for k, g in found.items() if not k.endswith("/scale")}
        fresh = unflatten(flat | steps)
        after, _ = value_and_gradients(fresh)
        assert after < loss


def test_they_are_a_lora(fresh):
    """`as_lora` after `attach` is what was attached, and `attach` after `as_lora`."""
    flat = flatten(fresh)
    flat |= {k: draw(i, *a.shape) for i, (k, a) in enumerate(flat.items()) if k.endswith("lora/b")}
    trained = unflatten(flat)
    lora = as_lora(trained)
    places = {(f"{target}/kernel", 1 if "blocks" in target else None) for target in TARGETS}
    assert {c[:2] for c in lora.low_rank} == places and lora.deltas == ()
    again = attach(detach(trained), [(lora, 1.0)])
    assert relative(forward(again), forward(detach(trained))) > 0.01
    np.testing.assert_array_equal(forward(again), forward(trained))
    with pytest.raises(InputError, match="no adapter that changes anything"):
        as_lora(detach(trained))


def test_several_at_several_strengths_become_one(fresh):
    base, path = detach(fresh), "blocks/self_attn/q/kernel"
    shape = CFG.dim, 2
    ones = [LowRank(path, i, np.array(draw(i, *shape)), np.array(draw(i, *shape[::-1])), 0.5)
            for i in (0, 1)]  # fmt: skip
    loras = [(Lora((c,), (), ()), strength) for c, strength in zip(ones, (0.25, 2.0), strict=True)]
    loras.append((Lora((ones[0],), (), ()), -1.0))
    both = as_lora(attach(base, loras)).low_rank
    assert [c.scale for c in both] == [1.0, 1.0] and [c.a.shape[1] for c in both] == [4, 2]
    for c, strength in zip(both, (0.25 - 1.0, 2.0), strict=True):
        wanted = strength * 0.5 * np.float64(ones[c.layer].a) @ ones[c.layer].b
        np.testing.assert_allclose(c.scale * c.a @ c.b, wanted, rtol=0, atol=1e-5)
    off = [(lora, 0.0) for lora, _ in loras[:1]] + loras[1:2]
    assert [c.layer for c in as_lora(attach(base, off)).low_rank] == [1]


def test_refusals(fresh):
    spec = dit_spec(CFG)
    for target in ("blocks/self_attn", "blocks/norm3", "nowhere", "blocks/self_attn/q/kernel"):
        with pytest.raises(InputError, match="takes no adapter; give some of blocks/cross_attn/k,"):
            lora_spec(spec, [target], RANK)
    with pytest.raises(InputError, match="'head/linear' takes no adapter"):
        lora_spec(lora_spec(spec, TARGETS, RANK), ["head/linear"], RANK)
    for rank in (0, 17, True, 2.0):
        with pytest.raises(InputError, match="give a whole number from 1 to 16 for head/linear"):
            lora_spec(spec, ["head/linear"], rank)
    for layers in (range(0), range(1, 3), range(-1, 1)):
        with pytest.raises(InputError, match=r"give some of range\(0, 2\)"):
            within(fresh, layers)
