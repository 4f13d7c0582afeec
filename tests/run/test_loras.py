# SPDX-License-Identifier: Apache-2.0
"""LoRAs of a bundle: beside the weights and merged, several, for two experts, taken off again."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lvjax
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.params import flatten
from lvjax.models.dit import dit, embed_context
from lvjax.run import loras as module
from lvjax.run.bundle import outline
from lvjax.run.session import _placed, data_mesh
from lvjax.run.weights import load, save, weight_bytes
from tests.lora_files import PROMPT, draw, lora_arrays, write_lora
from tests.tiny import relative

TOLERANCE = 1e-4
NOTICED = 1e-2


def latents(bundle):
    return lvjax.generate(bundle, PROMPT, num_frames=5).latents


def same(one, other) -> bool:
    """Whether two trees hold the same bits."""
    one, other = flatten(one), flatten(other)
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and np.array_equal(one[k], other[k]) for k in one
    )


def velocity(params, cfg, rows=1, mesh=None):
    """Of a transformer for `rows` videos, spread over the devices of a mesh; one more row changes
    none before it.
    """
    video, condition, text = (
        draw(i, rows, *shape)
        for i, shape in enumerate(
            ((2, 4, 4, cfg.in_channels), (2, 4, 4, cfg.condition_channels), (4, cfg.text_dim))
        )
    )
    if mesh is not None:
        video = jax.device_put(video, NamedSharding(mesh, PartitionSpec("data")))
    return _velocity(params, video, condition, text, cfg)


@partial(jax.jit, static_argnames="cfg")
def _velocity(params, video, condition, text, cfg):
    context = embed_context(params, text, cfg)
    return dit(params, video, jnp.full(len(video), 500.0), context, cfg, condition=condition)[0]


def test_beside_and_merged_are_the_same(plain, files):
    def found(*asked, merge=False):
        return velocity(lvjax.with_lora(plain, list(asked), merge).params["dit"], plain.dit)

    a, b = files / "a.safetensors", files / "b.safetensors"
    merged = found((a, 0.75), b, merge=True)
    assert relative(found((a, 0.75), b), merged) <= TOLERANCE
    assert relative(found(), merged) > NOTICED
    assert relative(found((a, 0.7), b), merged) > TOLERANCE


def test_two_experts_each_with_its_own(two, files):
    own = [(files / "high.safetensors", 1.0, "high"), (files / "low.safetensors", 0.5, "low")]
    merged = latents(lvjax.with_lora(two, own, merge=True))
    assert relative(latents(lvjax.with_lora(two, own)), merged) <= TOLERANCE
    for other in (own[:1], own[1:], [(*own[0][:2], "low"), (*own[1][:2], "high")]):
        found = lvjax.with_lora(two, other, merge=True)
        assert relative(latents(found), merged) > NOTICED


def test_the_pocket_model(tmp_path):
    pocket = lvjax.load("pocket", dtype="float32")
    cfg = pocket.dit
    path = write_lora(tmp_path / "a.safetensors", lora_arrays(cfg, size=0.2))
    beside, merged = (lvjax.with_lora(pocket, path, merge) for merge in (False, True))
    assert beside.notices == ()
    wanted = velocity(merged.params["dit"], cfg)
    assert relative(velocity(beside.params["dit"], cfg), wanted) <= TOLERANCE
    assert relative(velocity(pocket.params["dit"], cfg), wanted) > NOTICED


def test_other_strengths_compile_nothing(two, files):
    own = [(files / "high.safetensors", 0.5, "high"), (files / "low.safetensors", 1.0, "low")]
    one = lvjax.with_lora(two, own)
    first, compiled = latents(one), []

    def listen(event, seconds, **_):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        found = latents(lvjax.with_strength(one, [-0.25, 0]))
        before = compiled.count("/jax/core/compile/backend_compile_duration")
        jax.jit(lambda x: x - 0.25)(1.0)
        after = compiled.count("/jax/core/compile/backend_compile_duration")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert (before, after) == (0, 1)
    again = lvjax.with_lora(two, [(own[0][0], -0.25, "high"), (own[1][0], 0, "low")])
    assert same(again.params, lvjax.with_strength(one, [-0.25, 0.0]).params)
    np.testing.assert_array_equal(found, latents(again))
    assert relative(found, first) > NOTICED
    zero = lvjax.with_strength(one, 0)
    assert [a.strength for a in zero.loras] == [0.0, 0.0]
    assert relative(latents(zero), latents(two)) <= 1e-6


@pytest.mark.parametrize("merge", (False, True))
def test_taken_off_the_weights_are_what_they_were(plain, files, merge):
    before = jax.tree.map(np.array, plain.params)
    changed = lvjax.with_lora(plain, [files / "a.safetensors", files / "b.safetensors"], merge)
    assert not same(changed.params["dit"], before["dit"])
    again = lvjax.without_lora(changed)
    assert same(again.params, before) and same(plain.params, before)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (again.params, plain.params))))  # noqa: B905
    assert again.hashes == plain.hashes and again.loras == () and again.notices == ()
    assert lvjax.without_lora(plain) is plain and lvjax.with_lora(plain, []) is plain


def test_what_no_lora_changes_is_shared(plain, files):
    base = flatten(plain.params)
    for merge in (False, True):
        new = flatten(lvjax.with_lora(plain, files / "a.safetensors", merge).params)
        copied = {path for path in base if new[path] is not base[path]}
        added = {"dit/blocks/norm3/scale", "dit/blocks/self_attn/q/bias"}
        matrices = {p for p in base if p.startswith("dit/") and p.endswith("/kernel")}
        matrices -= {"dit/patch_embedding/kernel", "dit/condition_embedding/kernel"}
        assert copied == (added | matrices if merge else added)


def test_merged_on_the_way_in_only_one_copy_is_held(files, plain):
    asked = [(files / "a.safetensors", 0.5), (files / "b.safetensors", -1.0)]
    found = lvjax.load(files / "model", lora=asked, merge=True)
    wanted = lvjax.with_lora(plain, asked, merge=True)
    assert same(found.params, wanted.params) and found.hashes == wanted.hashes
    assert found.base == {} and wanted.base.keys() == {"dit"}
    assert weight_bytes(found) == weight_bytes(plain) < weight_bytes(wanted)
    off = lvjax.without_lora(found)  # read again
    assert same(off.params, plain.params) and off.hashes == plain.hashes
    weaker = lvjax.with_strength(found, 0.1)
    assert same(weaker.params, lvjax.with_strength(wanted, 0.1).params)
    beside = lvjax.load(files / "model", lora=asked)
    assert same(beside.params, lvjax.with_lora(plain, asked).params)
    assert same(lvjax.without_lora(beside).params, plain.params)


def test_weights_that_changed_meanwhile_are_no_base(files, plain, tmp_path):
    save(tmp_path, plain, dtype="float32")
    found = lvjax.load(tmp_path, lora=files / "a.safetensors", merge=True)
    before = dataclasses.replace(found, hashes=found.hashes | {"dit": "0" * 64})
    with pytest.raises(CheckpointError, match="have changed; load the model again"):
        lvjax.without_lora(before)
    other = jax.tree.map(lambda a: a * 1.01, plain.params)
    save(tmp_path, dataclasses.replace(plain, params=other), dtype="float32")
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        lvjax.without_lora(found)


def test_several_are_one_after_another(plain, files):
    a, b = (files / "a.safetensors", 0.5), (files / "b.safetensors", 2.0)
    together = lvjax.with_lora(plain, [a, b])
    added = lvjax.with_lora(lvjax.with_lora(plain, a), b)
    assert same(added.params, together.params) and added.hashes == together.hashes
    assert [x.path.name for x in added.loras] == ["a.safetensors", "b.safetensors"]
    merged = lvjax.with_lora(added, [], merge=True)
    assert same(merged.params, lvjax.with_lora(plain, [a, b], merge=True).params)
    back = lvjax.with_lora(merged, [], merge=False)  # beside the weights again
    assert same(back.params, together.params) and back.hashes == together.hashes


def test_one_more_is_added_as_those_before(plain, files):
    """Merged to merged ones, and beside those that are beside, unless it is said."""
    a, b = files / "a.safetensors", files / "b.safetensors"
    for merge in (False, True):
        both = lvjax.with_lora(lvjax.with_lora(plain, a, merge), b)
        wanted = lvjax.with_lora(plain, [a, b], merge)
        assert both.merged == merge and both.hashes == wanted.hashes
        assert same(both.params, wanted.params)
    with pytest.raises(InputError, match="no LoRA is given to be merged"):
        lvjax.load(files / "model", merge=True)
    with pytest.raises(InputError, match="merge is 1; give True, False or None"):
        lvjax.with_lora(plain, a, merge=1)


def kinds(params) -> set:
    """In which memory the blocks' arrays are."""
    flat = flatten(params["dit"]["blocks"])
    return {leaf.sharding.memory_kind for leaf in flat.values()}


@pytest.mark.parametrize("merge", (False, True))
def test_weights_that_wait_are_changed_where_they_are(plain, files, merge):
    """Both on the way in and later; with differences, which are never kept beside."""
    asked = [(files / "a.safetensors", 0.5), files / "b.safetensors"]
    waits = lvjax.load(files / "model", offload="layers")
    assert kinds(waits.params) == {"pinned_host"} and kinds(plain.params) == {"device"}
    wanted = lvjax.with_lora(plain, asked, merge)
    changed = lvjax.with_lora(waits, asked, merge)
    whole = lvjax.load(files / "model", lora=asked, merge=merge, offload="layers")
    for found in (changed, whole):
        assert kinds(found.params) == {"pinned_host"} and same(found.params, wanted.params)
    again = lvjax.without_lora(changed)
    assert same(again.params, plain.params) and kinds(again.params) == {"pinned_host"}


def test_hashes_tell_file_strength_order_expert_and_place(plain, two, files, tmp_path):
    a, b = files / "a.safetensors", files / "b.safetensors"
    ways = [[a], [(a, 0.5)], [b], [a, b], [b, a]]
    found = [lvjax.with_lora(plain, way).hashes for way in ways]
    found.append(lvjax.with_lora(plain, a, merge=True).hashes)
    high = files / "high.safetensors"
    found += [lvjax.with_lora(two, (high, 1, e)).hashes for e in ("high", "low", None)]
    assert len({json.dumps(h, sort_keys=True) for h in found}) == len(found)
    assert all(plain.hashes.items() <= h.items() for h in found[:6])
    assert found[3].keys() - plain.hashes.keys() == {"lora 1", "lora 2"}
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(a.read_bytes())
    assert lvjax.with_lora(plain, moved).hashes == found[0]


def test_a_batch_is_spread_over_the_devices(plain, files):
    changed = lvjax.with_lora(plain, [(files / "a.safetensors", 0.75), files / "b.safetensors"])
    mesh = data_mesh(8)
    spread = _placed(changed, mesh)["dit"]
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(spread)} == {8}
    found = velocity(spread, plain.dit, 8, mesh)
    assert len(found.sharding.device_set) == 8
    assert relative(found[:1], velocity(changed.params["dit"], plain.dit)) <= 1e-5


def test_the_plan_counts_them(plain, files):
    base = weight_bytes(plain)

    def extra(name, merge=False):
        found = lvjax.with_lora(plain, files / f"{name}.safetensors", merge)
        leaves = flatten(found.params["dit"])
        shared = {id(a) for a in jax.tree.leaves(plain.params)}
        more = sum(a.nbytes for a in leaves.values() if id(a) not in shared)
        sizes = lvjax.with_lora(outline(files / "model"), files / f"{name}.safetensors", merge)
        return weight_bytes(found) - base, weight_bytes(sizes) - base, more

    for name in ("a", "b"):
        held, planned, more = extra(name)
        assert held == planned == more > 0
    held, planned, more = extra("a", True)
    assert held == more > 0 and planned == 0  # on the way in there is one copy


def test_merged_weights_can_be_saved(plain, files, tmp_path):
    beside, merged = (lvjax.with_lora(plain, files / "a.safetensors", m) for m in (False, True))
    with pytest.raises(InputError, match="merge them before"):
        save(tmp_path, beside)
    save(tmp_path, merged, dtype="float32")
    assert same(load(tmp_path).params, merged.params)


def experts_change_places(monkeypatch):
    swap = {"dit": "dit_low", "dit_low": "dit"}
    own = module.by_part
    monkeypatch.setattr(module, "by_part", lambda a: {swap[k]: v for k, v in own(a).items()})


def strengths_are_lost(monkeypatch):
    own = module.by_part
    lost = lambda a: {k: [(x, 1.0) for x, _ in v] for k, v in own(a).items()}  # noqa: E731
    monkeypatch.setattr(module, "by_part", lost)


@pytest.mark.parametrize("mutate", (experts_change_places, strengths_are_lost))
def test_mistakes_are_noticed(two, files, mutate, monkeypatch):
    own = [(files / "high.safetensors", 1.0, "high"), (files / "low.safetensors", 0.5, "low")]
    merged = latents(lvjax.with_lora(two, own, merge=True))
    mutate(monkeypatch)
    assert relative(latents(lvjax.with_lora(two, own)), merged) > NOTICED
