# SPDX-License-Identifier: Apache-2.0
"""Reading other people's safetensors: one file, a sharded index, or a folder as diffusers saves it.

Owns: finding the files, checking a header before anything in it is believed, reading single arrays.
Does not own: what the names mean (keys_*.py, recognise.py).  Nothing is executed, and an
index cannot name a file outside its folder (symbolic links in it are followed: download caches are
made of them); `.pth` files, which are programs, are not read.
Source: huggingface/safetensors, README.md (the format).
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lvjax.core.checkpoint import DTYPES
from lvjax.core.errors import CheckpointError

HEADER_MAX = 100_000_000  # bytes; the format's own limit
JSON_MAX = 100_000_000
INDEX = ".safetensors.index.json"
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
LATER = "lvjax reads safetensors; {} come with a later release"


class Entry(NamedTuple):
    """Where an array is: its file, dtype name, shape, and first byte."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class Tensors(Mapping):
    """The arrays of a checkpoint by name; each is read from its file when asked for."""

    def __init__(self, entries: dict[str, Entry]):
        self.entries = entries

    def __getitem__(self, name: str) -> np.ndarray:
        """The array, in its stored dtype.

        Raises: CheckpointError when it is not finite or the file is gone.
        """
        entry = self.entries[name]
        dtype = np.dtype(DTYPES[entry.dtype])
        try:
            with entry.path.open("rb") as f:
                f.seek(entry.start)
                flat = np.fromfile(f, dtype, math.prod(entry.shape))
        except OSError as e:
            raise CheckpointError(f"cannot read {entry.path}: {e.strerror or e}") from e
        if flat.size != math.prod(entry.shape):
            raise CheckpointError(f"{entry.path} became shorter while it was read; try again")
        if not np.isfinite(flat).all():
            bad = f"{entry.path}: array {name!r} is not finite"
            raise CheckpointError(f"{bad}; download the file again from its source")
        return flat.reshape(entry.shape)

    def __contains__(self, name) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its header."""
        return self.entries[name].shape

    def dtypes(self) -> set[str]:
        """Names of the stored dtypes, as in the file."""
        return {e.dtype for e in self.entries.values()}

    def without(self, prefix: str) -> "Tensors":
        """The same arrays, `prefix` removed from every name."""
        return Tensors({k.removeprefix(prefix): e for k, e in self.entries.items()})


def _json(path: Path, text: bytes) -> dict:
    def once(pairs):
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("a name stands there twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        reason = str(e).splitlines()[0]
        raise CheckpointError(f"{path} is damaged ({reason}); download it again") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged (not an object); download it again")
    return value


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises: CheckpointError when it is missing, too large, or not one.
    """
    try:
        if path.stat().st_size > JSON_MAX:
            raise CheckpointError(f"{path} is larger than {JSON_MAX} bytes; it cannot be right")
        return _json(path, path.read_bytes())
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror or e}") from e


def read_header(path: Path) -> dict[str, Entry]:
    """The arrays of one safetensors file, every number in its header checked.

    Raises: CheckpointError saying what is wrong with the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > HEADER_MAX or length > size - 8:
                what = f"{path} is not a safetensors file, or cut short"
                raise CheckpointError(f"{what} ({size} bytes, a header of {length}); download it")
            header = _json(path, f.read(length))
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror or e}; give a file") from e
    header.pop("__metadata__", None)
    spans = sorted((_span(path, name, fields), name) for name, fields in header.items())
    end = 0
    for (start, stop), name in spans:
        if start != end:
            raise CheckpointError(f"{path} is damaged (array {name!r} overlaps); download it again")
        end = stop
    if 8 + length + end != size:
        what = f"{path} is cut short or damaged: {8 + length + end} bytes expected, {size} there"
        raise CheckpointError(f"{what}; download it again")
    return {
        name: Entry(path, header[name]["dtype"], tuple(header[name]["shape"]), 8 + length + start)
        for (start, _), name in spans
    }


def _span(path: Path, name: str, fields) -> tuple[int, int]:
    """First and last byte of an array in the body of the file."""
    try:
        dtype, shape, (start, stop) = fields["dtype"], fields["shape"], fields["data_offsets"]
        numbers = [*shape, start, stop]
        sound = all(type(n) is int and n >= 0 for n in numbers) and len(shape) <= 8
        if not sound or stop - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
            raise ValueError
    except (TypeError, KeyError, ValueError) as e:
        what = f"{path} is damaged (array {name!r} has impossible dtype, shape or place)"
        raise CheckpointError(f"{what}; download it again") from e
    return start, stop


def read_index(path: Path) -> dict[str, Entry]:
    """The arrays of a sharded checkpoint; shards are plain files beside the index.

    Raises: CheckpointError for names that leave the folder, and when index and shards disagree.
    """
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} has no weight_map; it is not the index of a checkpoint")
    entries = {}
    for shard in sorted({str(s) for s in places.values()}):
        if shard != Path(shard).name or "\\" in shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{path} names the file {shard!r}, which is not in its folder")
        found = read_header(path.parent / shard)
        if twice := entries.keys() & found.keys():
            raise CheckpointError(f"{path}: array {min(twice)!r} is in two shards; keep one")
        entries |= found
    if entries.keys() != places.keys():
        name = min(entries.keys() ^ places.keys())
        raise CheckpointError(f"{path}: index and shards disagree on {name!r}; download them again")
    return entries


def find(source: Path) -> Path:
    """The file to read for `source`: itself, or the one checkpoint in a folder.

    Raises: CheckpointError when there is none, several, or one of a kind that is not read yet.
    """
    if source.is_dir():
        found = sorted(source.glob(f"*{INDEX}")) or sorted(source.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(p.name for p in found[:4])
            raise CheckpointError(f"{source} holds {len(found)} checkpoints ({names}); name one")
        if old := [p.name for p in sorted(source.iterdir()) if p.suffix in PICKLES]:
            raise CheckpointError(f"{source} holds {old[0]}; {LATER.format('.pth files')}")
        raise CheckpointError(f"{source} holds no .safetensors file; give one, or its folder")
    if not source.is_file():
        raise CheckpointError(f"no such file or folder: {source}; give a .safetensors file")
    if source.suffix in PICKLES:
        raise CheckpointError(f"{source} is a PyTorch file; {LATER.format('.pth files')}")
    if source.name.endswith(INDEX) or source.suffix == ".safetensors":
        return source
    raise CheckpointError(f"{source} is neither .safetensors nor {INDEX}; give one of them")


def open_checkpoint(source) -> tuple[Tensors, dict]:
    """The arrays of a checkpoint, and the config.json beside it ({} without one).

    source: a .safetensors file, a .safetensors.index.json, or a folder with one of them.
    Raises: CheckpointError as `find`, `read_header` and `read_index`.
    """
    path = find(Path(source))
    entries = read_index(path) if path.name.endswith(INDEX) else read_header(path)
    if not entries:
        raise CheckpointError(f"{path} holds no arrays; download it again")
    config = path.parent / "config.json"
    return Tensors(entries), read_json(config) if config.is_file() else {}
