# SPDX-License-Identifier: Apache-2.0
"""LoRAs as they are asked for: files and settings, experts, strengths, what is refused."""

import errno
import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lvjax
from checkpoints_convert.lora import METADATA
from checkpoints_convert.lora_file import TRAINER, open_lora
from lvjax.core.errors import CheckpointError, InputError
from lvjax.run import loras as module
from lvjax.run.adapters import Asked, as_asked, parse
from lvjax.run.bundle import outline
from tests.lora_files import PROMPT, TWO, draw, lora_arrays, write_lora
from tests.tiny import DIT


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
