# SPDX-License-Identifier: Apache-2.0
"""LoRAs of every family written under one naming: what is read again is what was read before, and
diffusers reads the same; `lvjax convert --base`.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.numpy import load_file

import lvjax
from checkpoints_convert.export_lora import lora_arrays, write_lora
from checkpoints_convert.keys_dit import dit_rules
from checkpoints_convert.lora import read_lora
from checkpoints_convert.lora_file import open_lora, read_parts
from checkpoints_convert.read import open_tensors
from checkpoints_convert.rules import sources_of
from lvjax.cli.main import main
from lvjax.core.checkpoint import load_arrays
from lvjax.core.errors import CheckpointError
from lvjax.core.params import flatten, init, unflatten
from lvjax.models.config import DiTConfig
from lvjax.models.dit import dit_spec
from lvjax.models.lora import Delta, adapters, as_lora, attach, detach, lora_spec, within
from lvjax.run.weights import save
from tests.checkpoints_convert.tiny_checkpoints import draw as draw_published
from tests.checkpoints_convert.tiny_checkpoints import tiny
from tests.checkpoints_convert.tiny_checkpoints import write as checkpoint
from tests.drawn import drawn
from tests.lora_files import TWO, draw, write_two_experts
from tests.lora_files import lora_arrays as made_for
from tests.lora_files import write_lora as write
from tests.tiny import DIT, tiny_bundle

T2V = DiTConfig(dim=32, num_heads=2, num_layers=2, ffn_dim=48, text_dim=16, dtype="float32")
I2V = replace(T2V, condition_channels=20, image_dim=24, image_pos_len=514)


def shapes(cfg, layout):
    """Of every array of a checkpoint, by name."""
    spec, found = dit_spec(cfg), {}
    for name, (rule, _) in sources_of(dit_rules(cfg, layout), spec).items():
        ours = [spec_at(spec, path) for path in rule.targets]
        stacked = "{layer}" in rule.source
        given = (np.broadcast_to(np.uint8(0), p.shape[stacked:]) for p in ours)
        found[name] = rule.layout.inverse(*given).shape
    return found


def spec_at(spec, path):
    for word in path.split("/"):
        spec = spec[word]
    return spec


def halves(cfg, layout, rename=lambda module: module, down="lora_A", up="lora_B"):
    """Products of every matrix and convolution, of other ranks, half of them with alpha."""
    arrays = {}
    matrices = {k: s for k, s in shapes(cfg, layout).items() if len(s) > 1 and "weight" in k}
    for i, (name, (out, *rest)) in enumerate(matrices.items()):
        rank, module = 1 + i % 3, rename(name.removesuffix(".weight"))
        arrays[f"{module}.{down}.weight"] = draw(i, rank, *rest)
        arrays[f"{module}.{up}.weight"] = draw(i + 99, out, rank, *(1,) * (len(rest) - 1))
        if i % 2:
            arrays[f"{module}.alpha"] = np.float32(0.3 + i)
    return arrays


def differences(cfg):
    """Of every array that is no matrix, and of the convolution."""
    patch = shapes(cfg, "official")["patch_embedding.weight"]
    arrays = {"diffusion_model.patch_embedding.diff": draw(0, *patch)}
    for i, (name, shape) in enumerate(shapes(cfg, "official").items()):
        stem, _, kind = name.rpartition(".")
        ending = {"weight": f"{stem}.diff", "bias": f"{stem}.diff_b"}.get(kind, f"{name}.diff")
        if len(shape) == 1 or kind not in ("weight", "bias"):
            arrays[f"diffusion_model.{ending}"] = draw(i, *shape)
    return arrays


FILES = {
    "diffusers": (T2V, lambda: halves(T2V, "diffusers", "transformer.{}".format)),
    "kohya": (
        I2V,
        lambda: halves(
            I2V,
            "official",
            lambda module: "lora_unet_" + module.replace(".", "_"),
            "lora_down",
            "lora_up",
        ),
    ),
    "text on image": (I2V, lambda: halves(T2V, "official")),
    "differences": (I2V, lambda: differences(I2V)),
    "half precision": (
        T2V,
        lambda: {k: a.astype(ml_dtypes.bfloat16) for k, a in halves(T2V, "official").items()},
    ),
}


def contents(lora):
    """Everything that a LoRA does, by place."""
    found = {}
    for c in lora.low_rank:
        found[c.path, c.layer, "product"] = c.a, c.b, np.float64(c.scale)
    for c in lora.deltas:
        found[c.path, c.layer, "difference"] = c.array, np.float64(c.scale)
    assert len(found) == len(lora.low_rank) + len(lora.deltas)
    return found


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_is_what_was_read(name, tmp_path):
    cfg, make = FILES[name]
    lora = read_lora(make(), {}, cfg)
    arrays = lora_arrays(lora, cfg)
    assert lora.unmatched == ()
    assert all(key.startswith("diffusion_model.") for key in arrays)
    write_lora(tmp_path / "a.safetensors", arrays)
    tensors = open_tensors(tmp_path / "a.safetensors")
    assert tensors.metadata["format"] == "pt"
    assert open_lora(tmp_path / "a.safetensors").config == {}
    assert load_arrays(tmp_path / "a.safetensors")[0].keys() == arrays.keys()  # with checksums
    again = read_lora(tensors, {}, cfg)
    one, other = contents(lora), contents(again)
    assert one.keys() == other.keys() and again.unmatched == ()
    for place, parts in one.items():
        for a, b in zip(parts, other[place], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_nothing_is_left_out():
    """What a file cannot hold is refused, not dropped."""
    lora = read_lora(halves(I2V, "official"), {}, I2V)
    at = {c.path: i for i, c in enumerate(lora.low_rank)}
    two, one = at["condition_embedding/kernel"], at["patch_embedding/kernel"]

    def changed(i, **new):
        low = list(lora.low_rank)
        low[i] = low[i]._replace(**new)
        return lora._replace(low_rank=tuple(low))

    def without(i):
        return lora._replace(low_rank=lora.low_rank[:i] + lora.low_rank[i + 1 :])

    assert len(lora_arrays(without(two), I2V)) == len(lora_arrays(lora, I2V))  # only of the noise
    nowhere = Delta("blocks/norm3/scale", 2, draw(0, 32), 1.0)
    part = Delta("condition_embedding/kernel", None, draw(0, *lora.low_rank[two].shape), 1.0)
    for bad, place in (
        (lora._replace(low_rank=lora.low_rank + lora.low_rank[:1]), lora.low_rank[0].path),
        (changed(two, b=2 * lora.low_rank[two].b), "condition_embedding/kernel"),
        (changed(two, scale=9.0), "condition_embedding/kernel"),
        (without(one), "condition_embedding/kernel"),
        (changed(0, path="blocks/nowhere/kernel"), "blocks/nowhere/kernel"),
        (lora._replace(deltas=(nowhere,)), r"blocks/norm3/scale \(layer 2\)"),
        (lora._replace(deltas=(part,)), "condition_embedding/kernel"),
    ):
        with pytest.raises(CheckpointError, match=f"changes {place}.* no LoRA file can hold"):
            lora_arrays(bad, I2V)


def test_new_adapters_are_written_and_read_again(tmp_path):
    """What training leaves beside the weights is a LoRA file; untrained layers are not in it."""
    spec = lora_spec(dit_spec(T2V), [f"blocks/self_attn/{name}" for name in "qkvo"], 3)
    beside = within(init(adapters(spec), jax.random.key(0)), range(1, 2))
    flat = flatten(drawn(dit_spec(T2V), 0)) | flatten(beside)
    flat |= {k: jnp.asarray(draw(i, *a.shape)) for i, (k, a) in enumerate(flat.items())
             if k.endswith("lora/b")}  # fmt: skip
    params = unflatten(flat)
    path = tmp_path / "a.safetensors"
    write_lora(path, lora_arrays(as_lora(params), T2V))
    assert all(name.startswith("diffusion_model.blocks.1.self_attn.") for name in load_file(path))
    file = open_lora(path)
    again = attach(detach(params), [(read_lora(file.tensors, file.config, T2V), 1.0)])
    for name, leaf in flatten(adapters(params)).items():
        scale = flat[name.rpartition("/")[0] + "/scale"][:, :1]
        wanted = leaf if leaf.ndim == 2 else leaf * scale[..., None]
        np.testing.assert_array_equal(flatten(again)[name], wanted, name)


def test_a_bias_of_a_pair_becomes_a_difference():
    at = "blocks.0.self_attn.q"
    given = {f"{at}.lora_A.weight": draw(0, 2, 32), f"{at}.lora_B.weight": draw(1, 32, 2)}
    given |= {f"{at}.lora_B.bias": draw(2, 32), f"{at}.diff_b": draw(3, 32)}
    arrays = lora_arrays(read_lora(given, {"lora_alpha": 3}, T2V), T2V)
    wanted = np.float32(1.5) * given[f"{at}.lora_B.bias"] + given[f"{at}.diff_b"]
    np.testing.assert_allclose(arrays[f"diffusion_model.{at}.diff_b"], wanted, rtol=1e-6)
    assert arrays[f"diffusion_model.{at}.alpha"] == 3


def test_diffusers_reads_the_same():
    """alpha in the blocks only, as trainers write it."""
    given = halves(T2V, "diffusers")
    given = {k: a for k, a in given.items() if "blocks." in k or not k.endswith("alpha")}
    given = {k: a for k, a in given.items() if "patch" not in k}  # diffusers leaves that out
    lora = read_lora(given, {}, T2V)
    ours = {k: torch.from_numpy(np.array(a)) for k, a in lora_arrays(lora, T2V).items()}
    found = theirs._convert_non_diffusers_wan_lora_to_diffusers(ours)
    again = read_lora({k: a.numpy() for k, a in found.items()}, {}, T2V)
    products = {(c.path, c.layer): c.scale * c.a @ c.b for c in lora.low_rank}
    assert len(again.low_rank) == len(products)
    for c in again.low_rank:
        wanted = products[c.path, c.layer]
        np.testing.assert_allclose(c.scale * c.a @ c.b, wanted, rtol=1e-5, atol=1e-6)


def test_convert(tmp_path, capsys):
    save(tmp_path / "model", tiny_bundle())
    extra = {"lora_te_0.lora_down.weight": draw(0, 2, 3)}
    src = write(tmp_path / "style.safetensors", made_for(DIT, prefix="") | extra)
    command = ["convert", src, str(tmp_path / "out"), "--base", str(tmp_path / "model")]
    assert main(command) == 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and "1 of its" in said[0] and "lora_te_0" in said[0]
    total = len(made_for(DIT))
    assert f"LoRA ({total} of {total + 1} arrays)" in said[1]
    found = load_file(tmp_path / "out" / "style.safetensors")
    wanted = made_for(DIT)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[k], wanted[k]) for k in wanted)
    for args, code, says in (
        ([], 2, "is there; use --overwrite"),
        (["--overwrite"], 0, "-> "),
        (["--dtype", "bfloat16"], 2, "--dtype is not for LoRAs"),
        (["--keep-unused"], 2, "--keep-unused is not for LoRAs"),
    ):
        assert main([*command, *args]) == code
        assert says in capsys.readouterr().err
    here = ["convert", src, str(tmp_path), "--base", str(tmp_path / "model"), "--overwrite"]
    assert main(here) == 2 and "is SRC" in capsys.readouterr().err
    assert main(["convert", src, str(tmp_path / "x"), "--base", "nowhere"]) == 3
    assert main(["convert", src, str(tmp_path / "x"), "--base", "pocket"]) == 3
    said = capsys.readouterr().err.strip().splitlines()
    assert "no model 'nowhere'" in said[0] and "use a LoRA of this size" in said[1]
    assert not (tmp_path / "x").exists()


def test_convert_of_two_experts(tmp_path, capsys):
    base = write_two_experts(tmp_path / "two")
    both = made_for(TWO, 5, "transformer.") | made_for(TWO, 6, "transformer_2.")
    src = write(tmp_path / "both.safetensors", both)
    one = write(tmp_path / "one.safetensors", made_for(TWO, 5))
    for name in (src, one):
        assert main(["convert", name, str(tmp_path / "out"), "--base", base]) == 0
    made = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert made == ["both.high.safetensors", "both.low.safetensors", "one.safetensors"]
    for name, seed in (("both.high", 5), ("both.low", 6), ("one", 5)):
        found, wanted = load_file(tmp_path / "out" / f"{name}.safetensors"), made_for(TWO, seed)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize(("expert", "part"), [("low", "dit_low"), ("high", "dit")])
def test_a_lora_of_one_expert_stays_one(tmp_path, capsys, expert, part):
    base = write_two_experts(tmp_path / "two")
    both = made_for(TWO, 5, "transformer.") | made_for(TWO, 6, "transformer_2.")
    given = made_for(TWO, 6, "transformer_2.") if expert == "low" else both
    src = write(tmp_path / "x.safetensors", given)
    assert main(["convert", src, str(tmp_path / "out"), "--base", base]) == 0
    path = tmp_path / "out" / f"x.{expert}.safetensors"
    assert path.exists() and len(list(path.parent.iterdir())) == 1 + (expert == "high")
    plain, changed = lvjax.load(base), lvjax.load(base, lora=str(path))
    (adapter,) = changed.loras
    assert set(adapter.parts) == {part}
    for name in ("dit", "dit_low"):
        same = changed.params[name]["head"] is plain.params[name]["head"]
        a, b = (b.params[name]["blocks"]["ffn"]["fc1"] for b in (changed, plain))
        assert (a.keys() == b.keys()) == (name != part), same
    # again, and who names the other expert is right
    assert main(["convert", str(path), str(tmp_path / "again"), "--base", base]) == 0
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    other = {"low": "high", "high": "low"}[expert]
    (adapter,) = lvjax.load(base, lora=(str(path), 1.0, other)).loras
    assert set(adapter.parts) == {"dit", "dit_low"} - {part}
    # a model with one transformer takes none of them
    with pytest.raises(
        CheckpointError, match=f"for the {'first' if expert == 'high' else 'second'}"
    ):
        read_parts(open_lora(path), TWO, ("dit",))
    capsys.readouterr()
    assert main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    assert (
        f"for the {expert}-noise expert" in said and "--lora" in said and "official names" in said
    )


def test_the_base_needs_no_more_than_its_transformer(tmp_path, capsys):
    base = Path(write_two_experts(tmp_path / "two"))
    src = write(tmp_path / "x.safetensors", made_for(TWO, 5))
    alone = tmp_path / "alone"
    alone.mkdir()
    for part in ("dit", "dit_low"):
        (base / f"{part}.safetensors").rename(alone / f"{part}.safetensors")
    for given in (alone, alone / "dit.safetensors"):
        assert (
            main(["convert", src, str(tmp_path / "out"), "--base", str(given), "--overwrite"]) == 0
        )
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.safetensors"]
    published = checkpoint(draw_published(tiny("wan2.1-t2v-1.3b.official")[0]), tmp_path / "p", "d",
                           "file")  # fmt: skip
    capsys.readouterr()
    for given in (published, published.parent):
        assert main(["convert", src, str(tmp_path / "no"), "--base", str(given)]) == 3
        assert "use a LoRA of this size" in capsys.readouterr().err
    for given, says in ((base, "has no transformer"), (tmp_path / "none", "no model")):
        assert main(["convert", src, str(tmp_path / "no"), "--base", str(given)]) == 3
        assert says in capsys.readouterr().err
