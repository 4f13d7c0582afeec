# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert`: what is already in DST, and the way back."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from lvjax.run import lock
from tests.checkpoints_convert.bad_files import ROOT
from tests.checkpoints_convert.convert_shell import (
    VAE,
    convert,
    fails,
    listing,
    plain,
    weights,
)
from tests.checkpoints_convert.tiny_checkpoints import (
    bits,
    family,
    opened,
    tokenizer,
    write,
)

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
