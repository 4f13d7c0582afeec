# SPDX-License-Identifier: Apache-2.0
"""One bit, anywhere in the files of a converted part: a thousand times it is found, and the array,
or the file beside the arrays, is named.  Orbax alone finds none of those in arrays.
"""

import random
import re
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

import lvjax
from lvjax.cli.main import main
from lvjax.core.checkpoint import Stored
from lvjax.core.errors import CheckpointError
from lvjax.core.params import flatten
from lvjax.core.streaming import open_stored
from lvjax.run.encoders import encode_prompts
from tests.checkpoints_convert.tiny_checkpoints import draw, tiny, tokenizer, usual, write

# (manifest, flips): 500 in each format
FLIPS = {
    "wan2.1-t2v-1.3b.official": 150,
    "wan2.1-vae.official": 80,
    "umt5-xxl-encoder.transformers": 170,
    "clip-xlmr-vith14.official": 100,
}
PARTS = ("dit", "vae", "text", "image")
FORMATS = {"safetensors": ".safetensors", "orbax": ""}


@pytest.fixture(scope="module", params=FORMATS)
def folder(request, tmp_path_factory):
    """A converted model with all kinds of parts, narrow and of one layer."""
    root = tmp_path_factory.mktemp("model")
    for name in FLIPS:
        path = write(draw(tiny(name, 1)[0], "mixed"), root / "src" / name, *usual(name))
        own = ["convert", str(path), str(root / "dst"), "--format", request.param]
        assert main([*own, "--keep-unused"]) == 0
    (root / "dst" / "tokenizer.json").write_text(tokenizer())
    return root / "dst"


def files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


@contextmanager
def flipped(file: Path, at: int, bit: int):
    """A file with one bit changed."""

    def flip():
        with open(file, "r+b") as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1 << bit]))

    flip()
    try:
        yield
    finally:
        flip()


def part_at(folder: Path, part: str) -> Path:
    """Where a part is, in whatever format."""
    return next(p for s in FORMATS.values() if (p := folder / f"{part}{s}").exists())


def place(stored: Stored, file: Path, at: int) -> str:
    """What a byte belongs to: the name of an array, or else of the file."""
    for name, slot in stored.slots.items():
        if any(f == file and start <= at < start + size for f, start, size in slot.pieces):
            return name
    return file.name


def found(path: Path) -> str:
    """What reading all of a part ends with."""
    try:
        dict(open_stored(path))
    except CheckpointError as e:
        return str(e)
    return ""


def random_places(path: Path, count: int, seed: int):
    """Random bits: half of them anywhere, the other half in a file as good as in any other, or in
    the header of a single one, as metadata are little of the whole.
    """
    rng, all_files = random.Random(seed), files(path)
    sizes = [file.stat().st_size for file in all_files]
    for i in range(count):
        (file,) = rng.choices(all_files, sizes if i % 2 else None)
        size = file.stat().st_size
        if i % 2 == 0 and len(all_files) == 1:
            size = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
        yield file, rng.randrange(size), rng.randrange(8)


@pytest.mark.parametrize("part", PARTS)
def test_every_flip_is_found(folder, part):
    path = part_at(folder, part)
    stored, missed, kinds = open_stored(path), [], []
    count = list(FLIPS.values())[PARTS.index(part)]
    for file, at, bit in random_places(path, count, PARTS.index(part)):
        with flipped(file, at, bit):
            says, own = found(path), place(stored, file, at)
        is_array = own in stored.slots
        named = f"array {own!r} does not match its checksum" if is_array else own
        if named not in says or "\n" in says:
            missed.append((file.name, at, bit, own, says))
        kinds.append(is_array)
    assert not missed and len(kinds) == count and 0.2 < np.mean(kinds) < 0.98
    assert not found(path)


def test_a_thousand_of_them():
    assert sum(FLIPS.values()) * len(FORMATS) == 1000


@pytest.mark.parametrize("fmt", FORMATS)
def test_bits_of_the_metadata(tmp_path, fmt):
    """Where a bit may also make another sound text: letters, digits, names, lengths."""
    name = "umt5-xxl-encoder.official"
    src = write(draw(tiny(name, 1)[0]), tmp_path, *usual(name))
    assert main(["convert", str(src), str(tmp_path / "dst"), "--format", fmt]) == 0
    path = part_at(tmp_path / "dst", "text")
    if fmt == "orbax":
        sizes = {f: f.stat().st_size for f in files(path) if f.name in ("lvjax.json", "_METADATA")}
    else:
        sizes = {path: 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]}
    bits = [(f, at, bit) for f, size in sizes.items() for at in range(size) for bit in range(8)]
    for file, at, bit in random.Random(0).sample(bits, 1000):
        with flipped(file, at, bit), pytest.raises(CheckpointError, match=re.escape(file.name)):
            open_stored(path)
    assert not found(path)


def test_loading_a_model_finds_them(folder):
    """By the same functions that everybody uses: the parts that are held when the model is loaded,
    the text encoder when a prompt is read, and what is not needed on the way back.
    """
    rng = random.Random(3)

    def damaged(part: str, name: str):
        file, start, size = open_stored(part_at(folder, part)).slots[name].pieces[-1]
        return flipped(file, start + rng.randrange(size), rng.randrange(8))

    for part in ("dit", "vae"):
        for name in rng.sample(sorted(open_stored(part_at(folder, part))), 3):
            with damaged(part, name), pytest.raises(CheckpointError, match=f"array '{name}' does"):
                lvjax.load(folder)
    bundle = lvjax.load(folder)
    good = encode_prompts(bundle, ["a b"])["a b"]
    for name in ("embedding", "blocks/attn/q/kernel", "norm"):
        with damaged("text", name), pytest.raises(CheckpointError, match=f"array '{name}' does"):
            encode_prompts(lvjax.load(folder), ["a b"])
    np.testing.assert_array_equal(encode_prompts(bundle, ["a b"])["a b"], good)
    unused, back = folder / "image.unused.safetensors", folder.parent / "back"
    own = ["convert", str(folder), str(back), "--part", "image", "--to", "official"]
    for at in (3, 90, unused.stat().st_size - 5):
        with flipped(unused, at, 5):
            assert main(own) == 3
    assert main(own) == 0


@pytest.mark.parametrize("folder", ["orbax"], indirect=True)
def test_orbax_alone_finds_none(folder):
    """Of fifty bits in arrays: every damaged folder is restored, with other numbers in it."""
    path, rng = folder / "dit", random.Random(5)
    stored = open_stored(path)
    good = flatten(ocp.PyTreeCheckpointer().restore(path))
    for _ in range(50):
        name = rng.choice(sorted(stored))
        file, _, size = rng.choice(stored.slots[name].pieces)
        with flipped(file, rng.randrange(size), rng.randrange(8)):
            restored = flatten(ocp.PyTreeCheckpointer().restore(path))
            assert f"array {name!r} does not match its checksum" in found(path)
        changed = [k for k in good if restored[k].tobytes() != good[k].tobytes()]
        assert changed == [name]
