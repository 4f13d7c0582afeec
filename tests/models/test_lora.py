# SPDX-License-Identifier: Apache-2.0
"""Adapters beside the weights and merged into them: equal to each other and to sums in NumPy."""

from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lvjax.core.errors import InputError
from lvjax.core.mesh import make_mesh
from lvjax.core.offload import wait
from lvjax.core.params import flatten
from lvjax.memory.cache import Past
from lvjax.models import lora as module
from lvjax.models.dit import dit, dit_spec, embed_context
from lvjax.models.lora import Delta, Lora, LowRank, attach, detach, merge
from lvjax.nn.linear import linear
from tests.full import QUICK
from tests.tiny import SMALL_DIT as CFG
from tests.tiny import relative

KERNELS = [k for k in flatten(dit_spec(CFG)) if k.endswith("/kernel")]
DELTAS = ("blocks/norm3/scale", "blocks/self_attn/q/bias", "blocks/modulation", "head/modulation")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@cache
def base():
    """Parameters that all matter."""
    flat = flatten(dit_spec(CFG))
    arrays = {k: jnp.asarray(0.2 * draw(i, *p.shape)) for i, (k, p) in enumerate(flat.items())}
    return module.unflatten(arrays)


def make(seed, kernels=tuple(KERNELS), deltas=(), layers=(0, 1)):
    """A LoRA of every kernel, of another rank in every layer."""
    low, whole, flat = [], [], flatten(base())
    for i, path in enumerate(kernels):
        leaf = flat[path]
        for layer in layers if leaf.ndim == 3 else (None,):
            rank = 1 + (i + (layer or 0) + seed) % 3
            a, b = draw(i, leaf.shape[-2], rank), draw(i + 50, rank, leaf.shape[-1])
            low.append(LowRank(path, layer, 0.1 * a, b, 0.5 + 0.25 * rank))
    for i, path in enumerate(deltas):
        layer = 1 if path.startswith("blocks") else None
        whole.append(Delta(path, layer, 0.3 * draw(i, *flat[path].shape[layer is not None :]), 0.5))
    return Lora(tuple(low), tuple(whole), ())


@cache
def inputs():
    past = [draw(i, 1, 2, 20, CFG.num_heads, CFG.head_dim) for i in (1, 2)]
    return {
        "latents": draw(3, 2, 3, 4, 4, 4),
        "timestep": np.array([903.25, 17.0], np.float32),
        "text": draw(4, 2, 5, 8),
        "condition": draw(5, 2, 3, 4, 4, 3),
        "past": Past(*map(jnp.asarray, past), jnp.zeros(2, jnp.int32), None, (1, 2)),
    }


@jax.jit
def run(params, latents, timestep, text, condition, past):
    context = embed_context(params, text, CFG)
    return dit(params, latents, timestep, context, CFG, condition=condition, past=past)[0]


def forward(params, memory=False):
    given = inputs() | ({} if memory else {"past": None})
    return np.asarray(run(params, **given))


def total(leaf, path, loras):
    """The leaf and everything that is added to it, in NumPy float64."""
    out = np.array(leaf, np.float64)
    for lora, strength in loras:
        for c in lora.low_rank + lora.deltas:
            if c.path == path:
                wide = [np.float64(a) for a in c[2:-1]]
                add = strength * c.scale * (wide[0] @ wide[1] if len(wide) > 1 else wide[0])
                out[() if c.layer is None else c.layer] += add
    return out


TWO = ((make(0, deltas=DELTAS), 0.75), (make(1, tuple(KERNELS[::2]), DELTAS[:2], (1,)), -0.5))


def test_merged_leaves_are_sums_and_the_base_is_kept():
    before = jax.tree.map(np.array, base())
    merged, touched = flatten(merge(base(), TWO)), {*KERNELS, *DELTAS}
    for path, leaf in flatten(base()).items():
        if path in touched:
            np.testing.assert_allclose(merged[path], total(leaf, path, TWO), rtol=0, atol=3e-7)
            assert relative(merged[path], leaf) > 0.02
        else:
            assert merged[path] is leaf
    jax.tree.map(np.testing.assert_array_equal, base(), before)  # nothing of it was donated


@pytest.mark.parametrize("memory", (False, True))  # with memory in one of the two layers
def test_attached_equals_merged(memory):
    plain, merged, beside = (
        forward(p, memory) for p in (base(), merge(base(), TWO), attach(base(), TWO))
    )
    assert relative(beside, merged) < 1e-6
    assert relative(merged, plain) > 0.05


def test_layers_are_changed_in_place_and_stay_sharded():
    """Beside a leaf only its copy is made, on the devices where the leaf is."""
    sharding = NamedSharding(make_mesh(fsdp=8), PartitionSpec(None, None, "fsdp"))
    leaf = jax.device_put(jnp.asarray(draw(0, 2, 48, 64)), sharding)
    places = {shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}
    out = module._added(leaf, 1, draw(1, 48, 64), None)
    assert {shard.data.unsafe_buffer_pointer() for shard in out.addressable_shards} == places
    params = {"blocks": {"ffn": {"fc1": {"kernel": out}}}}
    loras = [(make(0, ("blocks/ffn/fc1/kernel",)), 1.0)]
    merged, beside = (f(params, loras)["blocks"]["ffn"]["fc1"] for f in (merge, attach))
    assert merged["kernel"].sharding == sharding and beside["kernel"] is out
    x = jnp.asarray(draw(2, 3, 48))
    pick = jax.jit(lambda p, x: linear(jax.tree.map(lambda a: a[1], p), x))
    assert relative(pick(beside, x), pick(merged, x)) < 1e-6


def test_weights_that_wait_are_changed_where_they_are():
    """Host in, host out, also over several devices; the base is kept."""
    sharding = NamedSharding(make_mesh(fsdp=8), PartitionSpec(None, None, "fsdp"))
    flat = flatten(base())
    spread = jax.device_put(flat["blocks/ffn/fc1/kernel"], sharding)
    flat["blocks/ffn/fc1/kernel"] = spread
    waits = {k: wait(a) if k.startswith("blocks/") else a for k, a in flat.items()}
    before = jax.tree.map(np.array, waits)
    for change in (merge, attach):
        found, wanted = (flatten(change(module.unflatten(tree), TWO)) for tree in (waits, flat))
        assert found.keys() == wanted.keys()
        for path, leaf in found.items():
            np.testing.assert_array_equal(leaf, wanted[path], path)
            kind = "pinned_host" if path.startswith("blocks/") else "device"
            assert leaf.sharding.memory_kind == kind, path
        there = sharding.with_memory_kind("pinned_host")
        assert found["blocks/ffn/fc1/kernel"].sharding == there
    jax.tree.map(np.testing.assert_array_equal, waits, before)  # nothing of it was donated


def silenced(lora):
    return lora._replace(low_rank=tuple(c._replace(b=0 * c.b) for c in lora.low_rank), deltas=())


@pytest.mark.parametrize("memory", (False, True))
def test_zero_is_the_identity(memory):
    plain = forward(base(), memory)
    for loras in ([(silenced(lora), 1.0) for lora, _ in TWO], [(lora, 0) for lora, _ in TWO]):
        np.testing.assert_array_equal(forward(merge(base(), loras), memory), plain)
        beside = forward(attach(base(), loras), memory)
        assert relative(beside, plain) < 1e-6
        if not QUICK:  # another program, which the quick suite's compiler rounds otherwise
            np.testing.assert_array_equal(beside, plain)


def test_order_matters_only_to_rounding():
    for change in (attach, merge):
        assert relative(forward(change(base(), TWO)), forward(change(base(), TWO[::-1]))) < 1e-6


def test_another_strength_compiles_nothing():
    forward(attach(base(), TWO))
    before = run._cache_size()
    for strength in (0, 0.3, -0.75):
        loras = [(lora, strength) for lora, _ in TWO]
        out = forward(attach(base(), loras))
        assert relative(out, forward(merge(base(), loras))) < 1e-6
    assert run._cache_size() == before


def test_layers_and_ranks_are_filled_with_zeros():
    path = "blocks/ffn/fc1"
    loras = [(make(0, (f"{path}/kernel",)), 2.0), (make(2, (f"{path}/kernel",), (), (1,)), 0.5)]
    found = attach(base(), loras)["blocks"]["ffn"]["fc1"]["lora"]
    ranks = [
        sum(c.a.shape[1] for one, _ in loras for c in one.low_rank if c.layer == i) for i in (0, 1)
    ]
    assert ranks == [1, 3]
    assert {k: a.shape for k, a in found.items()} == {
        "a": (2, 48, 3), "b": (2, 3, 64), "scale": (2, 3)
    }  # fmt: skip
    for i, rank in enumerate(ranks):
        assert not np.any(found["a"][i][:, rank:]) and not np.any(found["b"][i][rank:])
        assert not np.any(found["scale"][i][rank:]) and np.all(found["scale"][i][:rank])
    np.testing.assert_array_equal(found["scale"], [[1.5, 0, 0], [2, 2, 0.375]])


def test_detached_is_the_base():
    adapted = attach(base(), [(make(0), 1.0)])
    assert len(flatten(adapted)) == len(flatten(base())) + 3 * len(KERNELS)
    back = flatten(detach(adapted))
    assert list(back) == list(flatten(base()))
    assert all(back[path] is leaf for path, leaf in flatten(base()).items())


def test_half_weights_are_rounded_once():
    path = "blocks/self_attn/q/kernel"
    leaf = jnp.asarray(draw(1, 2, 48, 48), jnp.bfloat16)
    params, low = {"blocks": {"self_attn": {"q": {"kernel": leaf}}}}, make(0, (path,))
    tiny = Delta(path, 1, 2e-3 * draw(2, 48, 48), 1.0)  # below half a unit of most weights
    loras = [(Lora(low.low_rank, (tiny,) * 3, ()), 1.0)]
    merged = merge(params, loras)["blocks"]["self_attn"]["q"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    wanted = total(np.float64(leaf), path, loras).astype(ml_dtypes.bfloat16)
    assert np.mean(np.asarray(merged) != wanted) < 1e-3  # float32 sums, float64 here
    beside = attach(params, loras)["blocks"]["self_attn"]["q"]
    assert {a.dtype.name for a in (beside["lora"]["a"], beside["lora"]["b"])} == {"bfloat16"}
    assert beside["lora"]["scale"].dtype == jnp.float32


def test_refusals():
    one = make(0)

    def refused(says, params=None, loras=((one, 1.0),)):
        for change in (attach, merge):
            with pytest.raises(InputError, match=says):
                change(base() if params is None else params, loras)

    for strength in (float("nan"), float("inf"), "1", None, True):
        refused("is no finite number", loras=[(one, strength)])
    wide = one.low_rank[0]._replace(a=draw(0, 5, 2))
    refused("the LoRA has", loras=[(Lora((wide,), (), ()), 1.0)])
    beyond = next(c for c in one.low_rank if c.layer == 1)._replace(layer=2)
    refused("read it for the model", loras=[(Lora((beyond,), (), ()), 1.0)])
    refused("is not there", {k: v for k, v in base().items() if k != "head"})
    with pytest.raises(InputError, match="attach all of them at once"):
        attach(attach(base(), [(one, 1.0)]), [(one, 1.0)])


def forget_scale(monkeypatch):
    plain = module._packed
    monkeypatch.setattr(
        module, "_packed", lambda cs, *a: plain([(c._replace(scale=1.0), s) for c, s in cs], *a)
    )


def forget_strength(monkeypatch):
    plain = module._packed
    monkeypatch.setattr(module, "_packed", lambda cs, *a: plain([(c, 1.0) for c, _ in cs], *a))


def last_layer_everywhere(monkeypatch):
    plain = module._stacked

    def shifted(kernel, changes):
        moved = changes if None in changes else {1 - i: c for i, c in changes.items()}
        return plain(kernel, moved)

    monkeypatch.setattr(module, "_stacked", shifted)


@pytest.mark.parametrize("mutate", (forget_scale, forget_strength, last_layer_everywhere))
def test_mistakes_are_noticed(mutate, monkeypatch):
    merged = forward(merge(base(), TWO))
    mutate(monkeypatch)
    assert relative(forward(attach(base(), TWO)), merged) > 1e-3
