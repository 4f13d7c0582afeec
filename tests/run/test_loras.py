# SPDX-License-Identifier: Apache-2.0
"""LoRAs of a bundle: beside the weights and merged, several, for two experts, taken off again."""

import dataclasses
import errno
import json
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lvjax
from checkpoints_convert.lora import METADATA
from checkpoints_convert.lora_file import TRAINER, open_lora
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.params import flatten
from lvjax.models.dit import dit, embed_context
from lvjax.run import loras as module
from lvjax.run.adapters import Asked, as_asked, parse
from lvjax.run.bundle import outline
from lvjax.run.encoders import load_embeddings
from lvjax.run.session import _placed, data_mesh
from lvjax.run.weights import load, save, weight_bytes
from tests.lora_files import PROMPT, TWO, deltas, draw, lora_arrays, write_lora, write_two_experts
from tests.tiny import DIT, relative, tiny_bundle

TOLERANCE = 1e-4
NOTICED = 1e-2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model and LoRAs; `two` is for a model with two experts."""
    folder = tmp_path_factory.mktemp("loras")
    save(folder / "model", tiny_bundle(), dtype="float32")
    write_two_experts(folder / "two")
    write_lora(folder / "a.safetensors", lora_arrays() | deltas())
    write_lora(folder / "b.safetensors", lora_arrays(seed=50))
    write_lora(folder / "high.safetensors", lora_arrays(TWO, seed=5))
    write_lora(folder / "low.safetensors", lora_arrays(TWO, seed=6))
    halves = lora_arrays(TWO, 5, "transformer."), lora_arrays(TWO, 6, "transformer_2.")
    write_lora(folder / "both.safetensors", halves[0] | halves[1])
    write_lora(folder / "second.safetensors", halves[1])
    return folder


@pytest.fixture(scope="module")
def plain(files):
    return lvjax.load(files / "model")


@pytest.fixture(scope="module")
def two(files):
    embeddings = load_embeddings(files / "two" / "prompts.safetensors", TWO.text_dim)
    return dataclasses.replace(lvjax.load(files / "two"), embeddings=embeddings)


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


def test_which_expert_a_file_is_for(files):
    sizes = outline(files / "two")

    def parts(name, *more):
        (adapter,) = lvjax.with_lora(sizes, (files / f"{name}.safetensors", 1.0, *more)).loras
        return adapter.parts

    high, low = parts("high")["dit"], parts("low")["dit"]

    def is_lora(found, wanted):
        pairs = zip(found.low_rank, wanted.low_rank, strict=True)
        return all(np.array_equal(a.b, b.b) and a[:2] == b[:2] for a, b in pairs)

    assert not is_lora(high, low)
    assert parts("high").keys() == {"dit", "dit_low"} and is_lora(parts("high")["dit_low"], high)
    assert parts("high", "high").keys() == {"dit"} and parts("high", "low").keys() == {"dit_low"}
    both = parts("both")
    assert is_lora(both["dit"], high) and is_lora(both["dit_low"], low) and len(both) == 2
    assert is_lora(parts("both", "low")["dit_low"], low) and len(parts("both", "low")) == 1
    assert is_lora(parts("both", "high")["dit"], high)
    assert parts("second").keys() == {"dit_low"} and is_lora(parts("second")["dit_low"], low)
    assert parts("second", "high").keys() == {"dit"}


def test_experts_that_a_model_does_not_have(plain, two, files, tmp_path):
    for bundle, expert in ((plain, "high"), (two, "mid"), (two, ["high"])):
        with pytest.raises(InputError, match="the expert of a LoRA is"):
            lvjax.with_lora(bundle, (files / "a.safetensors", 1.0, expert))
    arrays = lora_arrays(prefix="transformer.") | lora_arrays(prefix="transformer_2.")
    path = write_lora(tmp_path / "a.safetensors", arrays)
    with pytest.raises(CheckpointError, match="each of two experts, the model has one"):
        lvjax.with_lora(plain, path)
    path = write_lora(tmp_path / "b.safetensors", lora_arrays(prefix="transformer_2."))
    with pytest.raises(CheckpointError, match="the second of two experts, the model has one"):
        lvjax.with_lora(plain, path)


def peft(prefix="transformer.", dim=DIT.dim):
    at = f"{prefix}blocks.0.attn1.to_q"
    return {f"{at}.lora_A.weight": draw(0, 2, dim), f"{at}.lora_B.weight": draw(1, dim, 2)}


def scales(path, model="model"):
    (adapter,) = lvjax.with_lora(outline(path.parents[1] / model), path).loras
    return {part: lora.low_rank[0].scale for part, lora in adapter.parts.items()}


def test_alpha_in_a_header_and_beside_the_file(files):
    folder = files / "peft"
    packed = {"transformer.lora_alpha": 8, "transformer.r": 2}
    headers = {
        "none": {"format": "pt"},
        "diffusers": {METADATA: json.dumps(packed)},
        "trainer": {TRAINER: json.dumps({"rank": 2, "lora_alpha": 6})},
        "text": {"lora_alpha": "4"},
    }
    found = {}
    for name, header in headers.items():
        path = folder / f"{name}.safetensors"
        write_lora(path, peft(), header)
        found[name] = scales(path)["dit"]
    assert found == {"none": 1.0, "diffusers": 4.0, "trainer": 3.0, "text": 2.0}
    before = lvjax.with_lora(outline(files / "model"), folder / "none.safetensors").hashes
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 10, "r": 2}))
    assert scales(folder / "none.safetensors")["dit"] == 5.0
    assert scales(folder / "diffusers.safetensors")["dit"] == 4.0  # its own come first
    after = lvjax.with_lora(outline(files / "model"), folder / "none.safetensors").hashes
    assert after != before  # the settings are part of what it is
    assert open_lora(folder / "none.safetensors").files[-1].name == "adapter_config.json"


def test_each_half_has_its_own_alpha(files):
    packed = {"transformer.lora_alpha": 8, "transformer_2.lora_alpha": 2}
    arrays = peft(dim=TWO.dim) | peft("transformer_2.", TWO.dim)
    path = files / "halves" / "a.safetensors"
    write_lora(path, arrays, {METADATA: json.dumps(packed)})
    assert scales(path, "two") == {"dit": 4.0, "dit_low": 1.0}
    write_lora(path, arrays, {METADATA: "{"})
    with pytest.raises(CheckpointError, match=f"{METADATA} is damaged"):
        scales(path, "two")
    write_lora(path, arrays, {TRAINER: "[1]"})
    with pytest.raises(CheckpointError, match=f"{TRAINER} is damaged"):
        scales(path, "two")


def test_a_folder_with_one_file_is_a_lora(plain, tmp_path):
    write_lora(tmp_path / "style" / "adapter_model.safetensors", peft("base_model.model."))
    (tmp_path / "style" / "adapter_config.json").write_text('{"lora_alpha": 4, "r": 2}')
    (adapter,) = lvjax.with_lora(plain, tmp_path / "style").loras
    assert adapter.parts["dit"].low_rank[0].scale == 2.0
    assert adapter.path == tmp_path / "style"
    write_lora(tmp_path / "style" / "other.safetensors", peft())
    with pytest.raises(CheckpointError, match="holds 2 checkpoints"):
        lvjax.with_lora(plain, tmp_path / "style")


def test_what_has_no_place_is_a_notice(plain, tmp_path):
    extra = {f"lora_te_{i}.lora_down.weight": draw(i, 2, 3) for i in range(7)}
    path = write_lora(tmp_path / "x.safetensors", peft() | extra)
    found = lvjax.with_lora(plain, path)
    (notice,) = found.notices
    assert notice.startswith("the LoRA x.safetensors has no place in this model for 7 of its 9")
    assert "lora_te_0.lora_down.weight" in notice and "2 more" in notice
    assert notice in lvjax.prepare(found, PROMPT, num_frames=5).notices
    with pytest.raises(CheckpointError, match="none of its 7 arrays belongs to this model"):
        lvjax.with_lora(plain, write_lora(tmp_path / "y.safetensors", extra))


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


@pytest.mark.parametrize(
    "given, asked",
    (
        ("a", [("a", 1.0, None)]),
        (("a", 2), [("a", 2.0, None)]),
        (["a", ("b", np.float32(0.5), "low")], [("a", 1.0, None), ("b", 0.5, "low")]),
        ([], []),
        (None, []),
    ),
)
def test_ways_to_ask(given, asked):
    found = as_asked(given)
    assert [(str(a.path), a.strength, a.expert) for a in found] == asked
    assert all(type(a.strength) is float for a in found)


@pytest.mark.parametrize("given", (5, (), "", ("a", 1.0, "low", 2), [["a"]], "a\0b", {"a": 1}))
def test_what_is_no_way_to_ask(given, plain):
    with pytest.raises(InputError, match="a LoRA is .*give a path"):
        lvjax.with_lora(plain, given)


NO_NUMBERS = ("1", None, True, float("nan"), float("inf"), [1], 10**400, 10**5000,
              Fraction(10**400), np.array([1.0]), np.zeros((3, 3)), np.array(np.nan),
              np.bool_(True), np.array("1"), np.complex64(1), jax.random.key(0),
              jnp.ones((2, 2)))  # fmt: skip


@pytest.mark.parametrize("strength", NO_NUMBERS, ids=lambda x: type(x).__name__)
def test_strengths_that_are_no_numbers(strength, plain, files):
    path = files / "a.safetensors"
    for call in (
        lambda: lvjax.with_lora(plain, (path, strength)),
        lambda: lvjax.with_strength(lvjax.with_lora(plain, path), [strength]),
    ):
        with pytest.raises(InputError, match="the strength of a LoRA is .* one finite number") as e:
            call()
        assert "\n" not in str(e.value) and len(str(e.value)) < 200


HALVES = (0.5, Fraction(1, 2), np.float16(0.5), np.array(0.5), jnp.float32(0.5), jnp.bfloat16(0.5))


@pytest.mark.parametrize("number", HALVES, ids=lambda x: type(x).__name__)
def test_a_strength_is_a_number_of_python_numpy_or_jax(number, plain, files):
    bundle = lvjax.with_lora(plain, files / "a.safetensors")
    (found,) = lvjax.with_strength(bundle, number).loras
    assert found.strength == 0.5 and type(found.strength) is float


def test_a_file_system_that_refuses_is_one_of_our_errors(plain, files, monkeypatch):
    path = files / "a.safetensors"
    merged = lvjax.load(files / "model", lora=path, merge=True)

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "secret")

    monkeypatch.setattr(module, "read_weights", refused)
    monkeypatch.setattr(module, "open_adapter", refused)
    for call in (
        lambda: lvjax.with_lora(plain, path),
        lambda: lvjax.with_strength(merged, 0.5),
        lambda: lvjax.without_lora(merged),
    ):
        with pytest.raises(CheckpointError, match="cannot use secret: Permission denied; give one"):
            call()


@pytest.mark.parametrize("model", (5, "pocket", None, np.zeros((3, 3))), ids=repr)
def test_what_is_no_model(model, files):
    for call in (
        lambda: lvjax.with_lora(model, files / "a.safetensors"),
        lambda: lvjax.with_strength(model, 1.0),
        lambda: lvjax.without_lora(model),
    ):
        with pytest.raises(InputError, match="the model is .*give what lvjax.load returns") as e:
            call()
        assert "\n" not in str(e.value)


def test_strengths_one_for_each(plain, files):
    with pytest.raises(InputError, match="1 strengths are given for 0"):
        lvjax.with_strength(plain, [1.0])
    with pytest.raises(InputError, match="2 strengths are given for 1"):
        lvjax.with_strength(lvjax.with_lora(plain, files / "a.safetensors"), [1.0, 2.0])
    with pytest.raises(InputError, match=r"an array of shape \[2, 1\]; give one number for all"):
        lvjax.with_strength(lvjax.with_lora(plain, files / "a.safetensors"), np.ones((2, 1)))
    with pytest.raises(InputError, match="merge is 1; give True, False or None"):
        lvjax.with_lora(plain, files / "a.safetensors", merge=1)


def test_the_command_line_writes_a_strength_and_an_expert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").write_text("")
    wanted = {
        "x.safetensors": ("x.safetensors", 1.0, None),
        "x=0.8": ("x", 0.8, None),
        "x=-1e-1": ("x", -0.1, None),
        "high:x": ("x", 1.0, "high"),
        "low:/y/x=2": ("/y/x", 2.0, "low"),
        "./high:x": ("./high:x", 1.0, None),
        "a=b": ("a=b", 1.0, None),
        "a=b=0.5": ("a=b", 0.5, None),
        "mid:x": ("mid:x", 1.0, None),
    }
    for text, (path, *rest) in wanted.items():
        assert parse(text) == Asked(module.Path(path), *rest)
    for text in ("x=", "x=strong", "x=nan", "x=0.8,0.9", "c=d", "x=1_0"):
        with pytest.raises(InputError, match="the strength is"):
            parse(text)
    for text in ("", "high:", "=1", "a\0"):
        with pytest.raises(InputError, match="has no path"):
            parse(text)


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
