# SPDX-License-Identifier: Apache-2.0
"""Every released checkpoint: each of its names has its place at full size; a narrow one with the
same names converts, with a report that accounts for all of them, and comes back bit by bit.

What does not come back without --keep-unused: the text tower and the scale of the official CLIP
file, which no Wan uses, and the second name of UMT5's table of words.
"""

import json
import zlib
from collections import Counter

import numpy as np
import pytest

from checkpoints_convert.recognise import KINDS, recognise
from checkpoints_convert.rules import sources_of
from checkpoints_convert.tensors import Entry, Tensors
from lvjax.cli.main import main
from lvjax.core.params import flatten
from lvjax.models import config as sizes
from lvjax.models.image_encoder import ImageEncoderConfig
from lvjax.models.umt5 import UMT5Config
from tests.checkpoints_convert.tiny_checkpoints import (
    NAMES,
    bits,
    draw,
    manifest,
    opened,
    part_of,
    tiny,
    translated,
    usual,
    write,
)

RELEASED = {
    "wan2.1-t2v-1.3b": sizes.WAN_T2V_1_3B,
    "wan2.1-t2v-14b": sizes.WAN_T2V_14B,
    "wan2.1-i2v-14b": sizes.WAN_I2V_14B,
    "wan2.1-flf2v-14b": sizes.WAN_FLF2V_14B,
    "wan2.2-t2v-a14b": sizes.WAN_T2V_14B,
    "wan2.2-i2v-a14b": sizes.WAN_2_2_I2V_A14B,
    "wan2.2-ti2v-5b": sizes.WAN_2_2_TI2V_5B,
    "wan2.1-vae": sizes.WAN_VAE_2_1,
    "wan2.2-vae": sizes.WAN_VAE_2_2,
    "umt5-xxl-encoder": UMT5Config(),
    "clip-xlmr-vith14": ImageEncoderConfig(projection_dim=1024),
    "clip-vith14-vision": ImageEncoderConfig(projection_dim=1024),
}
OFFICIAL = [name for name in NAMES if name.endswith(".official")]


def model(name: str) -> str:
    return name.rsplit(".", 1)[0]


def counterpart(name: str) -> str:
    """The manifest of the same part by the names of diffusers and transformers."""
    wanted = "clip-vith14-vision" if part_of(name) == "image" else model(name)
    return next(n for n in NAMES if n != name and model(n) == wanted)


def not_needed(name: str, keys) -> tuple[set[str], set[str]]:
    """(what the model does not use, second names) among the names of a checkpoint."""
    unused = {k for k in keys if k.startswith("textual.") or k == "log_scale"}
    assert not unused or name == "clip-xlmr-vith14.official"
    return unused, {"encoder.embed_tokens.weight"} & set(keys)


def convert(*arguments) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


def test_all_22_are_there():
    assert len(NAMES) == 22 and set(RELEASED) == set(map(model, NAMES))


@pytest.mark.parametrize("with_config", (False, True), ids=("bare", "config.json"))
@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_released_checkpoint_has_its_place(tmp_path, name, with_config):
    shapes, facts = manifest(name)
    tensors = Tensors({k: Entry(tmp_path / "none", "BF16", s, 0) for k, s in shapes.items()})
    found = recognise(tensors, facts["config"] if with_config else {}, name)
    assert (found.kind, found.layout) == (part_of(name), facts["naming"])
    assert found.cfg == RELEASED[model(name)]
    plan = found.plan()
    unused, copies = not_needed(name, shapes)
    uses = Counter((source, place.part) for place in plan.places for source in place.sources)
    used = {source for source, _ in uses}
    assert set(uses.values()) == {1} and used == shapes.keys() - unused - copies
    assert set(plan.unused) == unused and {copy for copy, _ in plan.copies} == copies
    assert len(used) + len(plan.unused) + len(plan.copies) == facts["n_tensors"]
    # the numbers of the manifest are all there, once each
    count = sum(int(np.prod(place.param.shape)) for place in plan.places)
    assert count == sum(int(np.prod(shapes[k])) for k in used)
    rest = sum(int(np.prod(shapes[k])) for k in unused | copies)
    assert count + rest == facts["n_params"]
    assert {place.path for place in plan.places} == flatten(found.spec()).keys()
    back = sources_of(KINDS[found.kind].rules((), found.layout, found.cfg), found.spec())
    assert back.keys() == used


def check_report(folder, name: str, arrays: dict, dtype: str) -> None:
    """A report against the checkpoint that was converted and the part that was made of it."""
    part = part_of(name)
    facts = json.loads((folder / f"{part}.report.json").read_text())
    stored = opened(folder, part)
    unused, copies = not_needed(name, arrays)
    source = facts["source"]
    assert source["arrays"] == len(arrays) and facts["naming"] == name.rsplit(".", 1)[1]
    assert source["used"] == len(arrays) - len(unused) - len(copies)
    assert set(source["unused"]) == unused and set(source["copies"]) == copies
    assert facts["part"] == part and facts["dtype"] == dtype
    assert facts["finite"] == facts["source"]["used"] > 0
    assert facts["config"] == json.loads(json.dumps(stored.meta["config"]))
    used = [a for k, a in arrays.items() if k not in unused | copies]
    assert facts["parameters"] == sum(a.size for a in used)
    assert sum(a["sources"] for a in facts["arrays"].values()) >= source["used"]
    assert facts["arrays"].keys() == set(stored)
    for path, line in facts["arrays"].items():
        array = stored[path]
        assert (line["dtype"], tuple(line["shape"])) == (str(array.dtype), array.shape)
        assert line["source_dtype"] == line["dtype"] or dtype != "keep"
        assert int(line["crc32"], 16) == zlib.crc32(np.ascontiguousarray(array).view(np.uint8))
    if dtype == "keep":
        assert sum(stored[k].nbytes for k in stored) == sum(a.nbytes for a in used)


def only(root):
    """The one folder below `root` with arrays."""
    (folder,) = {file.parent for file in root.rglob("*.safetensors")}
    return folder


@pytest.mark.parametrize("fmt", ("safetensors", "orbax"))
@pytest.mark.parametrize("dtype", ("float32", "mixed"))
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(tmp_path, capsys, name, dtype, fmt):
    shapes, _ = tiny(name)
    arrays = draw(shapes, dtype)
    src = write(arrays, tmp_path / "src", *usual(name))
    dst, back = tmp_path / "dst", tmp_path / "back"
    convert(src, dst, "--format", fmt, "--keep-unused")
    n = len(arrays)
    assert f"{n} of {n} arrays accounted for" in capsys.readouterr().err
    check_report(dst, name, arrays, "keep")
    convert(dst, back, "--to", "official" if name.endswith(".official") else "diffusers")
    assert bits(only(back)) == bits(arrays)


@pytest.mark.parametrize("name", ["clip-xlmr-vith14.official", "umt5-xxl-encoder.transformers"])
def test_what_is_not_needed_stays_away_unless_it_is_kept(tmp_path, capsys, name):
    arrays = draw(tiny(name)[0], "mixed")
    src, part = write(arrays, tmp_path / "src", *usual(name)), part_of(name)
    convert(src, tmp_path / "dst")
    unused, copies = not_needed(name, arrays)
    assert f", {len(unused | copies)} of them not needed): " in capsys.readouterr().err
    kept = tmp_path / "dst" / f"{part}.unused.safetensors"
    assert not kept.exists()
    own, other = ("official", "diffusers")[:: 1 if name.endswith(".official") else -1]
    convert(tmp_path / "dst", tmp_path / "less", "--to", own)
    wanted = {k: a for k, a in arrays.items() if k not in unused | copies}
    assert bits(only(tmp_path / "less")) == bits(wanted)
    # it can be kept later, and has no place in the other naming
    convert(src, tmp_path / "dst", "--keep-unused")
    assert f"and kept in {kept.name}" in capsys.readouterr().err
    convert(tmp_path / "dst", tmp_path / "other", "--to", other)
    said = capsys.readouterr().err
    if unused:
        assert f"{len(unused)} unused arrays" in said and "have no place in this naming" in said
    assert not bits(only(tmp_path / "other")).keys() & (unused | copies)
    # it belongs to these weights, and not to others
    again = write(draw(tiny(name)[0], "mixed", seed=1), tmp_path / "src", *usual(name))
    data = kept.read_bytes()
    convert(again, tmp_path / "dst", "--overwrite")
    assert not kept.exists()
    kept.write_bytes(data)
    assert main(["convert", str(tmp_path / "dst"), str(tmp_path / "no"), "--to", own]) == 3
    assert "belongs to another" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", OFFICIAL)
def test_both_namings_give_the_same_part(tmp_path, name):
    """By a key map that shares nothing with ours, and the same file comes out, to the last bit."""
    own, part = draw(tiny(name)[0], "mixed"), part_of(name)
    theirs, other = translated(own, name), counterpart(name)
    wanted = {k: s for k, s in tiny(other)[0].items() if k != "encoder.embed_tokens.weight"}
    assert {k: a.shape for k, a in theirs.items()} == wanted
    found = set()
    for arrays, source in ((own, name), (theirs, other)):
        folder = tmp_path / source
        src = write(arrays, folder / "src", *usual(source))
        if source == other:
            (src.parent / "config.json").write_text(json.dumps(tiny(other)[1]))
        convert(src, folder / "dst")
        found.add((folder / "dst" / f"{part}.safetensors").read_bytes())
        convert(folder / "dst", folder / "back", "--to", "diffusers")
        assert bits(only(folder / "back")) == bits(theirs)
    assert len(found) == 1


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b.official", "umt5-xxl-encoder.transformers"])
def test_however_it_lies_on_the_disk(tmp_path, name):
    arrays, part = draw(tiny(name)[0], "bfloat16"), part_of(name)
    found = set()
    for how in ("file", "shards", "pth"):
        src = write(arrays, tmp_path / how, "weights", how)
        for fmt in ("safetensors", "orbax"):
            convert(src, tmp_path / f"{how}-{fmt}", "--format", fmt)
            stored = opened(tmp_path / f"{how}-{fmt}", part)
            sums = sorted((k, s.crc, str(s.dtype), s.shape) for k, s in stored.slots.items())
            found.add((json.dumps(stored.meta), *sums))
            stored.check()
    assert len(found) == 1
