# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert`: names that wrappers add, sets of weights in a file, types, and the report."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import torch
from tqdm import tqdm

from checkpoints_convert.recognise import Model
from lvjax.cli import convert as command
from lvjax.cli import convert_back
from lvjax.core.checkpoint import load_arrays, save_arrays
from tests.checkpoints_convert.convert_shell import (
    convert,
    fails,
    weights,
)
from tests.checkpoints_convert.tiny_checkpoints import (
    bits,
    opened,
    tensor,
    write,
)

# ---- names and sets of weights -----------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model."])
def test_prefixes_of_other_programs(tmp_path, src, prefix):
    own = {prefix + k: a for k, a in weights().items()}
    path = write(own, tmp_path / "src", "comfy", "file")
    assert convert(path, tmp_path / "a") == convert(src, tmp_path / "b") == 0
    files = [(tmp_path / name / "dit.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    facts = json.loads((tmp_path / "a" / "dit.report.json").read_text())
    assert facts["source"]["arrays"] == facts["source"]["used"] == len(own)


def _wrapped(key: str) -> str:
    """A name as FSDP with activation checkpointing gives it."""
    if key.startswith("blocks."):
        _, i, rest = key.split(".", 2)
        key = f"blocks.{i}._fsdp_wrapped_module._checkpoint_wrapped_module.{rest}"
    return f"model._fsdp_wrapped_module.{key}"


def test_several_sets_of_weights_in_one_file(tmp_path, capsys):
    sets = {name: weights(seed=i) for i, name in enumerate(("generator", "generator_ema", "c"))}
    state = {
        "generator": {_wrapped(k): tensor(a) for k, a in sets["generator"].items()},
        "generator_ema": {f"model.{k}": tensor(a) for k, a in sets["generator_ema"].items()},
        "critic": {k: tensor(a) for k, a in sets["c"].items()},
        "step": 600,
    }
    path, dst = tmp_path / "model.pt", tmp_path / "dst"
    torch.save(state, path)
    for given, name in (
        ((), "generator_ema"),
        (("--weights", "generator"), "generator"),
        (("--weights", "critic"), "c"),
    ):
        capsys.readouterr()
        assert convert(path, dst, *given, "--overwrite") == 0
        chosen = given[1] if given else name
        assert f"dit (weights {chosen!r}, official naming" in capsys.readouterr().err
        assert convert(dst, tmp_path / name, "--to", "official") == 0
        assert bits(tmp_path / name) == bits(sets[name])
        facts = json.loads((dst / "dit.report.json").read_text())
        assert facts["source"]["weights"] == chosen
    # what is there is of one set, and is not taken for another
    assert "is not of this conversion" in fails(capsys, 2, path, dst)
    assert "no weights 'ema' in it" in fails(capsys, 3, path, tmp_path / "no", "--weights", "ema")
    assert "is a folder" in fails(capsys, 3, tmp_path, tmp_path / "no", "--weights", "generator")


# ---- types -------------------------------------------------------------------------------


def test_types(tmp_path, src, capsys):
    own = weights()
    wide = ("time_embedding", "time_projection", "modulation", "norm", "head")
    for dtype in ("bfloat16", "float16", "float32", "keep"):
        assert convert(src, tmp_path / dtype, "--dtype", dtype) == 0
        arrays, _ = load_arrays(tmp_path / dtype / "dit.safetensors")
        for path, a in arrays.items():
            stays = dtype in ("keep", "float32") or any(word in path for word in wide)
            assert a.dtype == (np.float32 if stays else np.dtype(dtype)), path
    q = own["blocks.1.self_attn.q.weight"]
    arrays, _ = load_arrays(tmp_path / "bfloat16" / "dit.safetensors")
    rounded = q.T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(arrays["blocks/self_attn/q/kernel"][1], rounded)
    own["blocks.0.ffn.0.weight"] *= np.float32(1e7)
    big = write(own, tmp_path / "big", "x", "file")
    says = fails(capsys, 3, big, tmp_path / "no", "--dtype", "float16")
    assert "more than float16 holds; use --dtype bfloat16" in says
    assert not (tmp_path / "no").exists()


def test_layers_of_two_types(tmp_path, capsys):
    own = weights()
    key = "blocks.1.ffn.0.weight"
    own[key] = own[key].astype(ml_dtypes.bfloat16)
    path = write(own, tmp_path / "src", "x", "file")
    says = fails(capsys, 3, path, tmp_path / "dst")
    assert "['bfloat16', 'float32']; use --dtype float32" in says
    assert not (tmp_path / "dst").exists()
    assert convert(path, tmp_path / "dst", "--dtype", "float32") == 0


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize("fmt", ["safetensors", "orbax"])
def test_progress_counts_what_is_written(tmp_path, src, monkeypatch, dtype, fmt):
    bars = []

    def bar(size, title):
        bars.append((size, tqdm(total=size, disable=False, file=open(os.devnull, "w"))))  # noqa: SIM115
        return bars[-1][1]

    for module in (command, convert_back):
        monkeypatch.setattr(module, "bar", bar)
    assert convert(src, tmp_path / "dst", "--dtype", dtype, "--format", fmt) == 0
    assert convert(tmp_path / "dst", tmp_path / "back", "--to", "official") == 0
    stored = opened(tmp_path / "dst", "dit")
    written = sum(a.nbytes for a in stored.values())
    assert len(bars) == 2
    for size, shown in bars:
        assert size == shown.n == written
        shown.fp.close()


def test_the_report_says_what_the_types_were(tmp_path):
    own = weights()
    own["blocks.1.ffn.0.weight"] = own["blocks.1.ffn.0.weight"].astype(ml_dtypes.bfloat16)
    path = write(own, tmp_path / "src", "x", "file")
    assert convert(path, tmp_path / "dst", "--dtype", "float32") == 0
    arrays = json.loads((tmp_path / "dst" / "dit.report.json").read_text())["arrays"]
    assert arrays["blocks/ffn/fc1/kernel"]["source_dtype"] == "bfloat16 + float32"
    assert arrays["blocks/ffn/fc2/kernel"]["source_dtype"] == "float32"
    assert {line["dtype"] for line in arrays.values()} == {"float32"}


@pytest.mark.parametrize("wrong", ["left out", "used twice"])
def test_the_report_is_a_proof(tmp_path, src, capsys, monkeypatch, wrong):
    """A plan that is wrong ends the conversion, also where Python leaves assertions out."""
    plan = Model.plan

    def bad(model):
        made = plan(model)
        places = made.places[:-1] if wrong == "left out" else (*made.places, made.places[0])
        return made._replace(places=places)

    monkeypatch.setattr(Model, "plan", bad)
    assert "is not used exactly once" in fails(capsys, 3, src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_configuration_with_fewer_words_is_the_same(tmp_path, src):
    """A part of a version that knew fewer sizes: what it does not say is as usual."""
    dst = tmp_path / "dst"
    assert convert(src, dst) == 0
    stored = opened(dst, "dit")
    config = {k: v for k, v in stored.meta["config"].items() if k != "theta"}
    assert len(config) < len(stored.meta["config"])
    save_arrays(dst / "dit.safetensors", dict(stored), {"part": "dit", "config": config})
    before = (dst / "dit.safetensors").read_bytes()
    assert convert(src, dst) == 0 and (dst / "dit.safetensors").read_bytes() == before
