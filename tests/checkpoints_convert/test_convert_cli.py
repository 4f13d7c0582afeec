# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert`: names that wrappers add, sets of weights, types, what is already in DST, and
everything that is not converted.  Whole models are in test_convert_folders.py, every released
checkpoint in test_manifests.py.
"""

import json
import os
import shutil
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from tqdm import tqdm

from checkpoints_convert import convert as converter
from checkpoints_convert.convert import part_kinds
from checkpoints_convert.recognise import Model, recognise
from checkpoints_convert.tensors import Entry, Tensors
from lvjax.cli import convert as command
from lvjax.cli import convert_back
from lvjax.cli.main import main
from lvjax.core.checkpoint import load_arrays, save_arrays
from lvjax.core.streaming import total_bytes
from lvjax.run import lock
from tests.checkpoints_convert.bad_files import ROOT
from tests.checkpoints_convert.tiny_checkpoints import (
    bits,
    draw,
    family,
    opened,
    tensor,
    tiny,
    tokenizer,
    write,
)

DIT, VAE = "wan2.1-t2v-1.3b.official", "wan2.1-vae.official"


def weights(name: str = DIT, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    return draw(tiny(name)[0], dtype, seed)


@pytest.fixture
def src(tmp_path):
    """A transformer in one file."""
    return write(weights(), tmp_path / "src", "x", "file")


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def fails(capsys, code: int, *arguments) -> str:
    """The one line of an exit with this code."""
    capsys.readouterr()
    assert convert(*arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lvjax: ")
    return lines[0]


def listing(folder) -> dict:
    """Everything below a folder, and when and how it changed."""
    found = sorted(folder.rglob("*"))
    return {p: (p.lstat().st_mtime_ns, p.lstat().st_size, p.lstat().st_ino) for p in found}


def plain(stored) -> dict:
    """The arrays of a part, whatever its format."""
    return bits(dict(stored))


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


# ---- what is in DST ----------------------------------------------------------------------


def test_a_second_run_reads_and_changes_nothing(tmp_path, src, capsys):
    dst = tmp_path / "dst"
    assert convert(src, dst) == 0
    before = listing(dst)
    assert convert(src, dst) == 0 and listing(dst) == before
    assert convert(src, dst, "--overwrite") == 0 and listing(dst) == before
    # damage is found, and mended where that is allowed
    data = bytearray((dst / "dit.safetensors").read_bytes())
    good = bytes(data)
    data[-9] ^= 4
    (dst / "dit.safetensors").write_bytes(data)
    assert "does not match its checksum" in fails(capsys, 3, src, dst)
    assert convert(src, dst, "--overwrite") == 0
    assert (dst / "dit.safetensors").read_bytes() == good


def test_other_weights_under_the_same_name(tmp_path, src, capsys):
    """Of the same names, types and sizes, as another training of the same model is."""
    dst = tmp_path / "dst"
    assert convert(src, dst) == 0
    first = (dst / "dit.safetensors").read_bytes()
    times = src.stat()
    for change in ("another seed", "one weight, and the time of change"):
        own = weights(seed=1) if change == "another seed" else weights()
        own["head.head.bias"][3] += 1
        write(own, tmp_path / "src", "x", "file")
        if change == "another seed":  # as an archive unpacks it
            os.utime(src, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert src.stat().st_size == times.st_size
        says = fails(capsys, 2, src, dst)
        assert f"{dst / 'dit.safetensors'} is there and is not of this conversion" in says
        assert (dst / "dit.safetensors").read_bytes() == first
    assert convert(src, dst, "--overwrite") == 0
    assert convert(dst, tmp_path / "back", "--to", "official") == 0
    assert bits(tmp_path / "back") == bits(own)


def test_the_other_format_is_replaced(tmp_path, src, capsys):
    dst = tmp_path / "dst"
    for fmt, other, name, gone in (
        ("safetensors", "orbax", "dit", "dit.safetensors"),
        ("orbax", "safetensors", "dit.safetensors", "dit"),
    ):
        assert convert(src, dst, "--format", fmt, "--overwrite") == 0
        before = listing(dst)
        says = fails(capsys, 2, src, dst, "--format", other)
        assert f"{dst / gone} is there" in says and listing(dst) == before
        assert convert(src, dst, "--format", other, "--overwrite") == 0
        names = {path.name for path in dst.iterdir()}
        assert names == {name, "dit.report.json", "model.json"}
        assert plain(opened(dst, "dit")).keys() == plain(opened(dst, "dit")).keys()
        assert convert(src, dst, "--format", other) == 0
    for path in (".dit.safetensors.partial", ".dit.safetensors.log", ".dit.safetensors.old"):
        (dst / path).write_bytes(b"left by a killed run")
    assert convert(src, dst) == 0 and {p.name for p in dst.iterdir()} == names


def test_dst_is_src(tmp_path, capsys):
    """Whatever is asked for, nothing of SRC is replaced."""
    official, diffusers = (family(tmp_path, "wan2.1-t2v-14b", n) for n in ("official", "diffusers"))
    (official / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer()), indent=3))
    before = listing(official)
    for options in ((), ("--overwrite",), ("--format", "orbax", "--overwrite")):
        assert convert(official, official, *options) == 0
        after = listing(official)
        assert {p: after[p] for p in before} == before
    # diffusers' folders have the names of ours
    before = listing(diffusers)
    for options in ((), ("--overwrite",), ("--format", "orbax", "--overwrite")):
        assert "/vae is part of SRC" in fails(capsys, 2, diffusers, diffusers, *options)
        part = ("--part", "dit", *options)
        assert "/vae is a folder of others" in fails(capsys, 2, diffusers, diffusers, *part)
        assert listing(diffusers) == before


def test_src_is_in_the_place_of_the_result(tmp_path, capsys):
    dst = tmp_path / "dst"
    for how, name in (("file", "dit.safetensors"), ("shards", "dit")):
        folder = dst if how == "file" else dst / "dit"
        path = write(weights(), folder, "dit" if how == "file" else "a", how)
        before = listing(dst)
        for options in ((), ("--overwrite",), ("--format", "orbax", "--overwrite")):
            assert f"{name} is part of SRC" in fails(capsys, 2, path, dst, *options)
            assert listing(dst) == before
        (dst / "dit.safetensors").unlink(missing_ok=True)
    # by another way to the same place, too
    (tmp_path / "link").symlink_to(dst)
    path = write(weights(), dst / "dit", "a", "file")
    assert "is part of SRC" in fails(capsys, 2, path, tmp_path / "link", "--overwrite")
    # inside DST, but not in the way
    inner = write(weights(VAE), dst / "sources" / "vae", "a", "pth")
    data = inner.read_bytes()
    (dst / "dit" / "a.safetensors").rename(tmp_path / "a.safetensors")
    for file in sorted((dst / "dit").iterdir()):
        file.unlink()
    (dst / "dit").rmdir()
    assert convert(inner, dst) == 0 and inner.read_bytes() == data
    # and DST inside SRC: what is there does not come back as a source
    src = family(tmp_path, "wan2.1-t2v-14b", "official")
    before = listing(src)
    assert convert(src, src / "lvjax") == convert(src, src / "lvjax") == 0
    after = listing(src)
    assert {p: after[p] for p in before} == before


def test_a_dst_of_something_else(tmp_path, src, capsys):
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    assert "is a file; give a folder" in fails(capsys, 2, src, file)
    assert fails(capsys, 6, src, file / "below") and file.read_bytes() == b"mine"
    pocket = tmp_path / "pocket"
    shutil.copytree(ROOT / "lvjax" / "assets" / "pocket", pocket)
    before = listing(pocket)
    for options in ((), ("--overwrite",)):
        assert "is not of a converted model" in fails(capsys, 2, src, pocket, *options)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.json").write_text('{"model_type": "llama"}')
    assert "is not of a converted model" in fails(capsys, 2, src, other, "--overwrite")
    (other / "model.json").unlink()
    (other / "dit.safetensors").write_bytes(b"mine")
    assert "is there and is not of this conversion" in fails(capsys, 2, src, other)
    assert (other / "dit.safetensors").read_bytes() == b"mine" and listing(pocket) == before


def test_another_tokenizer(tmp_path, capsys):
    src = family(tmp_path, "wan2.1-t2v-14b", "official")
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is there and is another" in fails(capsys, 2, src, dst)
    assert [path.name for path in dst.iterdir()] == ["tokenizer.json"]
    assert convert(src, dst, "--overwrite") == 0
    assert (dst / "tokenizer.json").read_text() == tokenizer()
    (src / "google/umt5-xxl/tokenizer.json").unlink()
    capsys.readouterr()
    assert convert(src, tmp_path / "without") == 0
    assert "has no tokenizer yet" in capsys.readouterr().err


@contextmanager
def a_user():
    """Somebody who may not write everywhere, as root may."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_place_that_cannot_be_written(tmp_path, src, capsys):
    assert convert(src, tmp_path / "dst") == 0
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        for path in (root, *map((root / "x").joinpath, ("", "closed"))):
            path.mkdir(exist_ok=True)
            path.chmod(0o777)
        shutil.copy(src, root / "x.safetensors")
        (root / "x.safetensors").chmod(0o644)
        dst = root / "x" / "closed"
        dst.chmod(0o555)
        with a_user():
            says = fails(capsys, 6, root / "x.safetensors", dst)
        assert "Permission denied" in says and not list(dst.iterdir())
        dst.chmod(0o777)
        (root / "x").chmod(0o555)  # what is around DST need not be writable
        with a_user():
            assert convert(root / "x.safetensors", dst) == 0
        (root / "x").chmod(0o777)


def test_dst_in_use(tmp_path, src, capsys):
    with lock.hold(tmp_path / "dst", "DST", inside=True):
        says = fails(capsys, 7, src, tmp_path / "dst")
        assert "is being written by process" in says
        assert "is being written" in fails(capsys, 7, src, tmp_path / "src" / ".." / "dst")
    assert not list((tmp_path / "dst").iterdir())
    assert convert(src, tmp_path / "dst") == 0 and not (tmp_path / "dst" / ".lock").exists()


# ---- the way back ------------------------------------------------------------------------


def test_exports_do_not_replace_others(tmp_path, src, capsys):
    dst, back = tmp_path / "dst", tmp_path / "back"
    assert convert(src, dst) == 0
    original = write(weights(seed=5), back / "transformer", "diffusion_pytorch_model", "shards")
    (back / "transformer" / "config.json").write_text("{}")
    (back / "transformer" / "notes.txt").write_text("mine")
    before = listing(back)
    says = fails(capsys, 2, dst, back, "--to", "diffusers")
    assert "is there and is not of this export; use --overwrite" in says
    assert listing(back) == before
    assert convert(dst, back, "--to", "diffusers", "--overwrite") == 0
    assert {path.name for path in (back / "transformer").iterdir()} == {
        "diffusion_pytorch_model.safetensors", "config.json", "notes.txt",
    }  # fmt: skip
    assert not original.exists()
    # the same again is kept as it is; a damaged file is not kept
    before = listing(back)
    file = back / "transformer" / "diffusion_pytorch_model.safetensors"
    assert convert(dst, back, "--to", "diffusers") == 0
    after = listing(back)
    assert before[file] == after[file]
    good = bytearray(file.read_bytes())
    good[-7] ^= 1
    file.write_bytes(good)
    assert "is not of this export" in fails(capsys, 2, dst, back, "--to", "diffusers")
    # of other weights it is another export
    assert convert(write(weights(seed=2), tmp_path, "y", "file"), tmp_path / "two") == 0
    assert "is not of this" in fails(capsys, 2, tmp_path / "two", back, "--to", "diffusers")


def test_exports_in_shards(tmp_path, src, monkeypatch):
    from checkpoints_convert import export

    assert convert(src, tmp_path / "dst", "--format", "orbax") == 0
    monkeypatch.setattr(export.plan_export, "__defaults__", (300_000,))
    assert convert(tmp_path / "dst", tmp_path / "back", "--to", "official") == 0
    folder = tmp_path / "back"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name.endswith(f"-00001-of-{len(shards):05d}.safetensors")
    assert bits(folder) == bits(weights())
    index = json.loads(next(folder.glob("*.index.json")).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in weights().values())
    assert convert(folder, tmp_path / "again", "--format", "orbax") == 0
    one, two = (opened(tmp_path / name, "dit") for name in ("dst", "again"))
    assert one.meta == two.meta and plain(one) == plain(two)


def test_options_that_do_not_go_together(tmp_path, src, capsys):
    assert convert(src, tmp_path / "dst") == 0
    for options in (
        ("--dtype", "bfloat16"),
        ("--format", "orbax"),
        ("--weights", "x"),
        ("--keep-unused",),
        ("--verify",),
        ("--preset", "wan2.1-t2v-1.3b"),
    ):
        says = fails(capsys, 2, tmp_path / "dst", tmp_path / "no", "--to", "official", *options)
        assert f"{options[0]} is not for the way back" in says
    says = fails(capsys, 3, src.parent, tmp_path / "no", "--to", "official")
    assert "holds no part that `lvjax convert` wrote" in says
    says = fails(capsys, 3, src, tmp_path / "no", "--to", "official")
    assert "is not a readable lvjax file" in says
    says = fails(capsys, 3, tmp_path / "dst", tmp_path / "no")
    assert "is a part that lvjax wrote; give --to" in says
    assert not (tmp_path / "no").exists()


# ---- what is not converted ---------------------------------------------------------------


def _later(key):
    return {key: np.zeros((2, 2), np.float32)}


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (_later("blocks.0.self_attn.q.lora_A.weight"), "is a LoRA, or a file of"),
        (
            _later("blocks.0.norm3.diff"),
            "a LoRA, or a file of weight differences: give it with --lora",
        ),
        (_later("vace_blocks.0.x"), "is a VACE model"),
        (_later("model.embed_tokens.weight"), "is neither a diffusion transformer nor"),
        (weights() | _later("blocks.0.extra.weight"), "x.safetensors: 1 arrays have no place in"),
        (weights() | _later("blocks.0.ffn.0.scale_weight"), "scales of quantised weights"),
        (weights() | _later("scaled_fp8"), "scales of quantised weights (scaled_fp8)"),
        ({k: v for k, v in weights(VAE).items() if "middle.1" not in k}, "are missing"),
        ({k: v for k, v in weights().items() if k != "head.head.bias"}, "1 arrays are missing"),
        ({k: v[..., :96] for k, v in weights().items()}, "does the configuration fit"),
        ({k: v * np.float32(np.nan) for k, v in weights().items()}, "is not finite"),
    ],
)
def test_what_is_not_converted(tmp_path, capsys, arrays, says):
    arrays = {k: np.ascontiguousarray(a) for k, a in arrays.items()}
    path = write(arrays, tmp_path, "x", "file")
    assert says in fails(capsys, 3, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_wrong_part(tmp_path, src, capsys):
    says = fails(capsys, 3, src, tmp_path / "out", "--part", "vae")
    assert "is a diffusion transformer; leave --part vae out" in says
    assert "holds no part 'vae'" in fails(capsys, 3, src.parent, tmp_path / "out", "--part", "vae")
    assert convert(src, tmp_path / "out", "--part", "dit_low") == 0
    assert opened(tmp_path / "out", "dit_low").meta["part"] == "dit_low"


def test_configurations_that_contradict_the_weights(tmp_path, capsys):
    name = "wan2.1-t2v-14b.diffusers"
    path = write(weights(name), tmp_path, "x", "file")
    for config, says in (
        ({"num_attention_heads": 3}, "config.json says 3 heads"),
        ({"num_attention_heads": 1, "attention_head_dim": 128}, "1 heads of 128, the width is 256"),
        ({"num_attention_heads": "many"}, "are not those of a Wan model"),
        ({"num_layers": 30}, "config.json says num_layers 30, the arrays say 2"),
        ([1], "is damaged"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert says in fails(capsys, 3, path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    assert "twice" in fails(capsys, 3, path, tmp_path / "out")


def test_damaged_files(tmp_path, capsys):
    path = write(weights(), tmp_path, "x", "file")
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = next(k for k in header if k != "__metadata__")

    def with_header(change):
        changed = json.loads(json.dumps(header))
        change(changed[name])
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    for bad, says in (
        (data[:-7], "cut short or damaged"),
        (data + b"\0", "cut short or damaged"),
        (data[:100], "cut short"),
        (b"", "is empty"),
        (b"<html>not found</html>", "is a web page"),
        (struct.pack("<Q", 2**40) + data[8:], "is not a safetensors file, or cut short"),
        (data[:8] + b"x" + data[9:], "is neither safetensors, nor a PyTorch file"),
        (with_header(lambda e: e.update(dtype="F99")), "as 'F99'; lvjax reads"),
        (with_header(lambda e: e.update(shape=[-1])), "impossible dtype, shape or place"),
        (with_header(lambda e: e.update(data_offsets=[8, 4])), "impossible dtype"),
        (with_header(lambda e: e.clear()), "impossible dtype, shape or place"),
    ):
        path.write_bytes(bad)
        assert says in fails(capsys, 3, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_that_are_not_there(tmp_path, capsys):
    assert "no such file or folder" in fails(capsys, 3, tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "holds no part of a Wan model" in fails(capsys, 3, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "model.pth").touch()
    assert "is empty" in fails(capsys, 3, tmp_path / "model.pth", tmp_path / "out")
    assert "is empty" in fails(capsys, 3, tmp_path, tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert "is a GGUF file" in fails(capsys, 3, tmp_path / "x.gguf", tmp_path / "out")
    (tmp_path / "link").symlink_to("gone")
    assert "a link that leads nowhere" in fails(capsys, 3, tmp_path / "link", tmp_path / "out")


def test_the_total_of_a_plan_is_what_is_written():
    shapes = tiny(DIT)[0]
    entries = {k: Entry("none", "F32", shape, 0) for k, shape in shapes.items()}
    model = recognise(Tensors(entries), {}, "x")
    narrow = total_bytes(part_kinds(model, model.plan(), "bfloat16"))
    assert (
        narrow
        < total_bytes(part_kinds(model, model.plan()))
        == 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    )
    assert converter.SAMPLE >= 1024
