# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile safetensors files, indices, and things that are no checkpoint at all."""

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

WEIGHTS = np.arange(6, dtype=np.float32)
HEADER = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
}
ONE = {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 2838276024\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>401</title></head><body>log in</body></html>"


def safetensors(header=HEADER, body: bytes = WEIGHTS.tobytes(), length: int | None = None) -> bytes:
    """A file of this header (text, or what JSON makes of it) and these bytes behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def changed(**fields) -> bytes:
    """The good file with other fields of array "b"; None removes one."""
    entry = {k: v for k, v in (HEADER["b"] | fields).items() if v is not None}
    return safetensors(HEADER | {"b": entry})


def values(dtype: str, array: np.ndarray) -> bytes:
    entry = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [0, array.nbytes]}
    return safetensors({"a": entry}, array.tobytes())


def _named(name: bytes) -> bytes:
    return safetensors(b"{" + name + b': {"dtype":"F32","shape":[6],"data_offsets":[0,24]}}')


def _repeated() -> bytes:
    one = b'"a": {"dtype":"F32","shape":[6],"data_offsets":[0,24]}'
    return safetensors(b"{" + one + b"," + one + b"}")


def _many(count: int) -> bytes:
    field = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return safetensors(("{" + ",".join(f'"{i}":{field}' for i in range(count)) + "}").encode(), b"")


GOOD = safetensors()
IMPOSSIBLE = "has impossible dtype, shape or place"
NONSENSE = "its header makes no sense"
CUT = "is not a safetensors file, or cut short"
NEITHER = "is neither safetensors, nor a PyTorch file"
NOTE = b'"n": "\\"{}[]"'
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn

FILES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "empty": (b"", "is empty"),
    "one byte": (GOOD[:1], NEITHER),
    "cut in the length": (GOOD[:7], NEITHER),
    "cut after the first brace": (GOOD[:9], CUT),
    "cut in the header": (GOOD[:80], CUT),
    "cut after the header": (GOOD[:-24], "is cut short or damaged"),
    "one byte short": (GOOD[:-1], "is cut short or damaged"),
    "one byte more": (GOOD + b"\0", "is cut short or damaged"),
    "header of 2^63 bytes": (safetensors(length=2**63), CUT),
    "header of 4 GB": (safetensors(length=2**32 - 1), CUT),
    "header longer than the file": (safetensors(length=len(GOOD)), CUT),
    "length in the other byte order": (struct.pack(">Q", len(GOOD) - 32) + GOOD[8:], CUT),
    "header is a list": (safetensors([HEADER]), NEITHER),
    "header is noise": (safetensors(b"{\xff\x00\x13noise"), NONSENSE),
    "header ends too early": (safetensors(json.dumps(HEADER).encode()[:-1]), NONSENSE),
    "header goes on": (safetensors(json.dumps(HEADER).encode() + b"{}"), "goes on after byte"),
    "comma at the end": (safetensors(json.dumps(HEADER).encode()[:-1] + b",}"), NONSENSE),
    "100,000 lists in each other": (safetensors(b'{"a":' + b"[" * 100_000), NONSENSE),
    "100,000 dicts in each other": (safetensors(b'{"a":' * 100_000), NONSENSE),
    "10 MB of lists": (lambda: safetensors(b'{"a":[' + b"[],[]," * 1_700_000), NONSENSE),
    "10 MB in one field": (
        lambda: safetensors(b'{"a":{"dtype":"F32","shape":[' + b"1.5," * 2_500_000 + b"]}}"),
        NONSENSE,
    ),
    "10 MB of metadata without an end": (
        lambda: safetensors(b'{"__metadata__":{"a":"' + b"\\n" * 5_000_000),
        NONSENSE,
    ),
    "20,000 lines of metadata": (
        safetensors(b'{"__metadata__":{' + b",".join([NOTE] * 20_000) + b"}}", b""),
        "more than 10000 lines of metadata",
    ),
    "metadata twice": (
        safetensors(b'{"__metadata__":{},"__metadata__":{}}', b""),
        "metadata stand",
    ),
    "metadata with a number": (safetensors(b'{"__metadata__":{"a":1}}', b""), NONSENSE),
    "110,000 arrays": (lambda: _many(110_000), "has more than 100000 arrays"),
    "no arrays": (safetensors({}, b""), "holds no arrays"),
    "a name twice": (_repeated(), "array 'a' stands there twice"),
    "a field twice": (
        safetensors(b'{"a":{"dtype":"F32","shape":[6],"shape":[6],"data_offsets":[0,24]}}'),
        "a name stands there twice",
    ),
    "a name that is a number": (_named(b"1"), NONSENSE),
    "a name that is null": (_named(b"null"), NONSENSE),
    "an empty name": (_named(b'""'), IMPOSSIBLE),
    "a name of 600 characters": (_named(b'"' + b"a" * 600 + b'"'), IMPOSSIBLE),
    "a name of 1 MB": (_named(b'"' + b"a" * 1_000_000 + b'"'), "a name of 1000002 bytes"),
    "a name that is not UTF-8": (_named(b'"\xff"'), "can't decode"),
    "a name with half a surrogate pair": (_named(b'"\\ud800"'), "can't encode"),
    "a name with a line break": (_named(b'"a\nb"'), NONSENSE),
    "no dtype": (changed(dtype=None), IMPOSSIBLE),
    "no fields": (safetensors(HEADER | {"b": {}}), IMPOSSIBLE),
    "no place": (changed(data_offsets=None), IMPOSSIBLE),
    "a field too many": (changed(order="C"), IMPOSSIBLE),
    "dtype of microscaling": (changed(dtype="F8_E8M0"), "as 'F8_E8M0'; lvjax reads"),
    "dtype of four bits": (changed(dtype="F4"), "as 'F4'; lvjax reads"),
    "dtype is a list": (changed(dtype=["F32"]), IMPOSSIBLE),
    "dtype of another size": (changed(dtype="F16"), IMPOSSIBLE),
    "shape is negative": (changed(shape=[-2]), IMPOSSIBLE),
    "shape is negative twice": (changed(shape=[-2, -1]), IMPOSSIBLE),
    "shape is a boolean": (changed(shape=[True, 2]), IMPOSSIBLE),
    "shape is a fraction": (changed(shape=[2.0]), IMPOSSIBLE),
    "shape is text": (changed(shape="2"), IMPOSSIBLE),
    "shape is a number": (changed(shape=2), IMPOSSIBLE),
    "shape of another size": (changed(shape=[3]), IMPOSSIBLE),
    "shape of nine axes": (changed(shape=[1] * 8 + [2]), IMPOSSIBLE),
    "shape that overflows 64 bits": (changed(shape=[2**62 + 1, 2]), IMPOSSIBLE),
    "shape without elements, and huge": (
        changed(shape=[0, 2**62], data_offsets=[16, 16]),
        IMPOSSIBLE,
    ),
    "shape of 900 digits": (changed(shape=[0, 10**900]), IMPOSSIBLE),
    "shape of 4,000 digits": (changed(shape=[0, 10**4000]), NONSENSE),
    "place is reversed": (changed(data_offsets=[24, 16]), IMPOSSIBLE),
    "place is negative": (changed(data_offsets=[-8, 0]), IMPOSSIBLE),
    "place is a boolean": (changed(shape=[0], data_offsets=[True, True]), IMPOSSIBLE),
    "place of three numbers": (changed(data_offsets=[16, 24, 24]), IMPOSSIBLE),
    "place behind the end": (changed(data_offsets=[2**40, 2**40 + 8]), "lies behind a gap"),
    "place overlaps": (changed(data_offsets=[8, 16]), "'b' overlaps another"),
    "place is another array's": (changed(shape=[4], data_offsets=[0, 16]), "overlaps another"),
    "place leaves a gap": (changed(data_offsets=[20, 28]), "lies behind a gap"),
    "place is the start of another's": (changed(data_offsets=[0, 8]), "overlaps another"),
    "NaN in F32": (values("F32", np.float32([1, np.nan])), "array 'a' is not finite"),
    "infinity in F32": (values("F32", np.float32([np.inf, 1])), "array 'a' is not finite"),
    "infinity in F64": (values("F64", np.float64([-np.inf])), "array 'a' is not finite"),
    "NaN in F16": (values("F16", np.float16([np.nan])), "array 'a' is not finite"),
    "NaN in BF16": (values("BF16", np.array([1, np.nan], BF16)), "array 'a' is not finite"),
    "NaN in F8": (values("F8_E4M3", np.array([1, np.nan], E4M3)), "array 'a' is not finite"),
    "NaN at the end of 6 MB": (
        lambda: values("F32", np.append(np.zeros(1_500_000, np.float32), np.float32(np.nan))),
        "array 'a' is not finite",
    ),
    "two wrapped names are one": (
        safetensors({"module.a": HEADER["a"], "module._orig_mod.a": HEADER["b"]}),
        "are the same name",
    ),
    "a web page": (HTML, "is a web page"),
    "an error in XML": (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied', "is a web page"),
    "a git-lfs pointer": (LFS, "is a git-lfs pointer"),
    "a GGUF file": (b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file"),
    "packed with gzip": (b"\x1f\x8b\x08" + bytes(64), "is packed; unpack it"),
    "a NumPy file": (b"\x93NUMPY\1\0v\0{'descr': '<f4'}" + bytes(64), NEITHER),
    "zeros": (bytes(4096), NEITHER),
    "JSON that is no index": (b'{"hidden_size": 4096}', "has no weight_map"),
}
"""Name: content of model.safetensors (large ones when asked for), words of the message."""


def _sparse(folder: Path) -> Path:
    path = folder / "model.safetensors"
    with path.open("wb") as f:
        f.write(safetensors(b"{", b"", length=99_000_000))
        f.truncate(100_000_000)
    return path


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors")
    return folder / "model.safetensors"


def _socket(folder: Path) -> Path:
    here = Path.cwd()
    os.chdir(folder)  # the name of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind("model.pth")
    finally:
        os.chdir(here)
    return folder / "model.pth"


def _folder(folder: Path) -> Path:
    (folder / "model.safetensors").mkdir()
    return folder


def _link(target: str, name: str = "model.safetensors"):
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def _two(folder: Path) -> Path:
    for name in "ab":
        (folder / f"{name}.safetensors").write_bytes(GOOD)
    return folder


def _beside(config: bytes):
    def make(folder: Path) -> Path:
        (folder / "model.safetensors").write_bytes(GOOD)
        (folder / "config.json").write_bytes(config)
        return folder

    return make


PLACES = {
    "a sparse header of 99 MB": (_sparse, CUT),
    "a pipe": (_fifo, "it is a pipe, socket or device"),
    "a socket": (_socket, "it is a pipe, socket or device"),
    "a device": (_link("/dev/zero"), "it is a pipe, socket or device"),
    "a folder with the name of a file": (_folder, "it is a folder"),
    "an empty folder": (lambda folder: folder, "holds no .safetensors or .pth file"),
    "two in a folder": (_two, "holds 2 checkpoints (a.safetensors, b.safetensors)"),
    "nothing there": (lambda folder: folder / "none.pth", "no such file or folder"),
    "a link to nothing": (_link("gone"), "a link that leads nowhere"),
    "a link to itself": (_link("model.safetensors"), "cannot read"),
    "a name with a NUL": (lambda folder: folder / "a\0b", "cannot read"),
    "a name of 300 characters": (lambda folder: folder / ("a" * 300), "cannot read"),
    "config.json is a git-lfs pointer": (_beside(LFS), "config.json is a git-lfs pointer"),
    "config.json is a web page": (_beside(HTML), "config.json is a web page"),
    "config.json is cut short": (_beside(b'{"dim": 15'), "config.json is damaged"),
    "config.json is a list": (_beside(b"[1]"), "is damaged (not an object)"),
    "config.json says a thing twice": (_beside(b'{"dim": 1, "dim": 2}'), "stands there twice"),
    "config.json with NaN": (_beside(b'{"eps": NaN}'), "NaN is no JSON"),
    "config.json of 3 MB": (_beside(b" " * 3_000_000), "more than the 2000000 that are read"),
    "config.json nested": (_beside(b'{"a":' + b"[" * 100_000), "nested too deeply"),
}
"""Name: (a function that makes it in a folder and returns its path, words of the message)."""


def index(places, shards: dict[str, bytes] | None = None, suffix=".safetensors"):
    """Makes an index (`places`: its weight_map, or all its bytes) and files beside it."""

    def make(folder: Path) -> Path:
        home = folder / "model"
        home.mkdir()
        (folder / "secret.safetensors").write_bytes(GOOD)
        for name, data in (shards or {"a.safetensors": GOOD}).items():
            (home / name).write_bytes(data)
        raw = isinstance(places, bytes)
        text = places if raw else json.dumps({"weight_map": places}).encode()
        (home / f"model{suffix}.index.json").write_bytes(text)
        return home

    return make


def _behind(link):
    """An index whose shard is what `link` makes."""

    def make(folder: Path) -> Path:
        index({"a": "b.safetensors", "b": "b.safetensors"})(folder)
        link(folder).rename(folder / "model" / "b.safetensors")
        return folder / "model"

    return make


def _outside(folder: Path) -> Path:
    return index(dict.fromkeys("ab", str(folder / "secret.safetensors")))(folder)


def both(shard) -> dict:
    return dict.fromkeys("ab", shard)


LEAVES = "which is not in its folder"
HALF = safetensors(ONE)
INDICES = {
    "shard in the folder above": (index(both("../secret.safetensors")), LEAVES),
    "shard by a whole path": (_outside, LEAVES),
    "shard in a folder below": (index(both("sub/a.safetensors")), LEAVES),
    "shard by a detour": (index(both("./a.safetensors")), LEAVES),
    "shard with a backslash": (index(both("..\\secret.safetensors")), LEAVES),
    "shard on a drive": (index(both("C:a.safetensors")), LEAVES),
    "shard with a NUL": (index(both("a.safetensors\0")), LEAVES),
    "shard with a line break": (index(both("a\n.safetensors")), LEAVES),
    "shard is the folder": (index(both(".")), LEAVES),
    "shard is the folder above": (index(both("..")), LEAVES),
    "shard has no name": (index(both("")), LEAVES),
    "shard of 300 characters": (index(both("a" * 300)), LEAVES),
    "shard is a number": (index(both(7)), "a shard without a name"),
    "shard is missing": (index(both("c.safetensors")), "cannot read"),
    "shard is a pipe": (_behind(_fifo), "it is a pipe, socket or device"),
    "shard is a device": (_behind(_link("/dev/zero")), "it is a pipe, socket or device"),
    "shard is a link to a folder": (_behind(_link("..")), "it is a folder"),
    "shard is a link to nothing": (_behind(_link("../gone")), "cannot read"),
    "shard is a link to itself": (_behind(_link("b.safetensors")), "cannot read"),
    "shard is the index": (
        index(both("model.safetensors.index.json")),
        "is an index and stands in one",
    ),
    "shard is a git-lfs pointer": (
        index(both("a.safetensors"), {"a.safetensors": LFS}),
        "is a git-lfs pointer",
    ),
    "shard lacks an array": (index(both("a.safetensors") | {"c": "a.safetensors"}), "disagree on"),
    "shard has one more": (index({"a": "a.safetensors"}), "index and shards disagree on 'b'"),
    "shards exchanged": (
        index(
            {"a": "b.safetensors", "b": "a.safetensors"},
            {"a.safetensors": HALF, "b.safetensors": HALF.replace(b'"a"', b'"b"')},
        ),
        "index and shards disagree",
    ),
    "array in two shards": (
        index(
            {"a": "a.safetensors", "b": "b.safetensors"},
            {"a.safetensors": HALF, "b.safetensors": HALF},
        ),
        "array 'a' is in two shards",
    ),
    "2,000 shards": (index({str(i): f"{i}.safetensors" for i in range(2000)}), "more than 1000"),
    "index without places": (index({}), "has no weight_map"),
    "index of a list": (index(["a.safetensors"]), "has no weight_map"),
    "index is a list": (index(b"[1]"), NEITHER),
    "index is nested": (index(b'{"weight_map":' * 100_000), "nested too deeply"),
    "index names an array twice": (
        index(b'{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}'),
        "a name stands there twice",
    ),
    "index of 3 MB": (index(b"{" + b" " * 3_000_000), "more than the 2000000 that are read"),
    "index is a git-lfs pointer": (index(LFS), "is a git-lfs pointer"),
    "index is a web page": (index(HTML), "is a web page"),
}
"""As `PLACES`."""
