# SPDX-License-Identifier: Apache-2.0
"""Other people's checkpoints: one file, shards with an index, or a folder with one of these.

Owns: finding the files, telling what a file is by its content (a suffix decides nothing), indices,
the names that wrappers of PyTorch add.  Does not own: the formats (read_safetensors.py,
read_torch.py), what the names mean (keys_*.py, recognise.py).  Nothing in a file is executed.

Where an index may lead.  An index is a text that came with the download, so a shard in it must be
the bare name of a file beside the index: no separator, no drive, no "..", no control character.
What lies under that name belongs to whoever fills the folder, and caches of downloads are made of
symbolic links, so links are followed, to anywhere; but to regular files only: a folder, pipe,
socket or device behind a link is refused, as is a link that leads nowhere.  "Beside the index"
means beside the path that was given, before its own links are resolved.  No message quotes the
content of a file that is no checkpoint, so that a link to a secret shows nothing of it.
"""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from checkpoints_convert.files import HEAD, opened, read_json, shown, sign
from checkpoints_convert.read_safetensors import read_header
from checkpoints_convert.read_torch import read_torch
from checkpoints_convert.tensors import TENSORS_MAX, Entry, Tensors, renamed, stamps
from lvjax.core.errors import CheckpointError

__all__ = ["Tensors", "beside", "find", "open_checkpoint", "open_tensors", "read_json"]

KINDS = (".safetensors.index.json", ".safetensors", ".bin.index.json")
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
SHARDS_MAX = 1000
WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
OUTER = ("model.", "module.")  # stripped where every name has them


def open_checkpoint(source, weights: str | None = None) -> tuple[Tensors, dict]:
    """The arrays of a checkpoint, and the config.json beside it ({} without one).

    source: a safetensors or PyTorch file, an index of either, or a folder with one of them.
    weights: which set of weights, where a file has several (`Tensors.chosen` tells what was taken).
    Raises: CheckpointError saying what is wrong with it.
    """
    path = find(Path(source))
    return open_tensors(path, weights), beside(path, "config.json")


def open_tensors(path: Path, weights: str | None = None, lora: bool = False) -> Tensors:
    """The arrays of a file, or of an index, as `find` gives it; weights as in `open_checkpoint`.

    lora: whether, of several sets of weights, a LoRA is wanted before a model.
    Raises: CheckpointError saying what is wrong with it.
    """
    kind = kind_of(path)
    chosen, metadata = None, {}
    if kind == "torch":
        entries, chosen = read_torch(path, weights, lora)
    elif weights is not None:
        raise CheckpointError(f"{path} is one set of weights, without {shown(weights)}; name none")
    elif kind == "safetensors":
        entries, metadata = read_header(path)
    else:
        entries = read_index(path)
    if not entries:
        raise CheckpointError(f"{path} holds no arrays; download it again")
    return Tensors(unwrapped(entries), chosen, metadata, stamps(entries))


def beside(path: Path, name: str) -> dict:
    """The JSON file `name` in the folder of `path`, {} without one.

    Raises: CheckpointError when it is damaged.
    """
    place = path.parent / name
    return read_json(place) if os.path.lexists(place) else {}


def find(source: Path) -> Path:
    """The file to read for `source`: itself, or the one checkpoint in a folder.

    Raises: CheckpointError when there is none, or several.
    """
    if not _is_folder(source):
        return source
    try:
        names = sorted(os.listdir(source))
    except OSError as e:
        raise CheckpointError(f"cannot read {source}: {e.strerror or e}; give a file") from e
    for suffixes in (*KINDS, PICKLES):
        found = [name for name in names if name.endswith(suffixes) and not name.startswith(".")]
        if len(found) == 1:
            return source / found[0]
        if found:
            first = ", ".join(found[:4])
            raise CheckpointError(f"{source} holds {len(found)} checkpoints ({first}); name one")
    raise CheckpointError(f"{source} holds no .safetensors or .pth file; give one, or its folder")


def _is_folder(source: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(source).st_mode)
    except FileNotFoundError as e:
        what = "a link that leads nowhere" if os.path.islink(source) else "no such file or folder"
        raise CheckpointError(f"{what}: {source}; give a checkpoint, or its folder") from e
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        reason = getattr(e, "strerror", None) or e
        raise CheckpointError(f"cannot read {source}: {reason}; give a checkpoint") from e


def kind_of(path: Path) -> str:
    """What a file is by its first bytes: "torch", "safetensors" or "json".

    Raises: CheckpointError when it is something else, saying what.
    """
    with opened(path) as f:
        head = f.read(HEAD)
    if head.startswith(b"PK\3\4"):
        return "torch"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{") and b"\0" not in head:
        return "json"
    if head[8:9] == b"{" and (head[4:8] == bytes(4) or head[:4] == bytes(4)):
        return "safetensors"  # the length of its header is a number of 8 bytes
    what = sign(head) or "neither safetensors, nor a PyTorch file, nor an index; give one of them"
    raise CheckpointError(f"{path} is {what}")


def read_index(path: Path) -> dict[str, Entry]:
    """The arrays of a sharded checkpoint; shards are files beside the index.

    Raises: CheckpointError for names that leave the folder, and when index and shards disagree.
    """
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} has no weight_map; it is not the index of a checkpoint")
    if not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{path} is damaged (a shard without a name); download it again")
    shards = sorted(set(places.values()))
    if len(shards) > SHARDS_MAX:
        raise CheckpointError(f"{path} names {len(shards)} files, more than {SHARDS_MAX}")
    entries: dict[str, Entry] = {}
    for shard in shards:
        check_shard(path, shard)
        found = _read_shard(path.parent / shard)
        if twice := entries.keys() & found.keys():
            raise CheckpointError(f"{path}: array {shown(min(twice))} is in two shards; keep one")
        entries |= found
        if len(entries) > TENSORS_MAX:
            raise CheckpointError(f"{path} has more than {TENSORS_MAX} arrays; is it a checkpoint?")
        wrong = [n for n in found if places.get(n) != shard]
        if wrong:
            _disagree(path, min(wrong))
    if missing := places.keys() - entries.keys():
        _disagree(path, min(missing))
    return entries


def _disagree(path: Path, name: str) -> None:
    what = f"{path}: index and shards disagree on {shown(name)}"
    raise CheckpointError(f"{what}; download them again")


def check_shard(path: Path, shard: str) -> None:
    """Raises: CheckpointError unless a name in an index is the bare name of a file beside it."""
    bare = shard.isprintable() and not set(shard) & set("/\\:") and shard not in ("", ".", "..")
    if not bare or len(shard) > 255:
        raise CheckpointError(f"{path} names the file {shown(shard)}, which is not in its folder")


def _read_shard(path: Path) -> dict[str, Entry]:
    kind = kind_of(path)
    if kind == "json":
        raise CheckpointError(f"{path} is an index and stands in one; give the shards themselves")
    if kind == "safetensors":
        return read_header(path)[0]
    entries, chosen = read_torch(path)
    if chosen is not None:
        raise CheckpointError(
            f"{path} is a shard and holds a dict {shown(chosen)}; it must be flat"
        )
    return entries


def unwrapped(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The arrays without what FSDP, DDP, checkpointing and torch.compile put into their names.

    Wrappers go wherever they stand; `OUTER` goes where every name begins with it.
    Raises: CheckpointError when two names become one.
    """
    names = {name: WRAPPERS.sub("", name) for name in entries}
    while common := [p for p in OUTER if all(n.startswith(p) and n != p for n in names.values())]:
        names = {old: new.removeprefix(common[0]) for old, new in names.items()}
    return renamed(dict(entries), names)
