# SPDX-License-Identifier: Apache-2.0
"""The way back: an lvjax part as a checkpoint in the official or the Hugging Face naming.

Writes safetensors, in shards where it is large, with the config.json that diffusers and
transformers ask for; every array is what the conversion read, bit for bit, unless a narrower type
was asked for then.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from checkpoints_convert.recognise import KINDS
from checkpoints_convert.rules import source_array, sources_of
from lvjax.core.checkpoint import Stored, write_atomic
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.streaming import Kind, Kinds, write_stream

SHARD = 5_000_000_000  # bytes
# Where diffusers keeps a part, and how it names the file.
PLACES = {
    "dit": ("transformer", "diffusion_pytorch_model"),
    "dit_low": ("transformer_2", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
    "text": ("text_encoder", "model"),
    "image": ("image_encoder", "model"),
}


def export_part(
    stored: Stored,
    folder: Path,
    layout: str,
    *,
    shard: int = SHARD,
    progress: Callable[[int], None] = lambda size: None,
) -> list[Path]:
    """Write a part below `folder`; returns the files of its arrays.

    layout: "official" or "diffusers" (for encoders: the naming of transformers).
    shard: bytes of one file at most, where no array is larger.
    Raises: CheckpointError when the part is damaged; InputError for a layout that is none;
      StorageError.
    """
    kind, cfg = part_config(stored)
    known = KINDS[kind]
    if layout not in ("official", "diffusers"):
        raise InputError(f"layout is {layout!r}; give 'official' or 'diffusers'")
    own = known.layouts[layout == "official"]
    spec = known.spec(cfg)
    names = sources_of(known.rules((), own, cfg), spec)
    stored.check()

    def array(name: str) -> np.ndarray:
        rule, layer = names[name]

        def read(path: str, at: int | None) -> np.ndarray:
            return stored[path] if at is None else stored.layer(path, at)

        return np.ascontiguousarray(source_array(rule, layer, read))

    place, stem = PLACES[stored.meta["part"]]
    folder = folder / place
    shards = _shards(_kinds(names, stored), shard)
    files = _file_names(stem, len(shards))
    for file, kinds in zip(files, shards, strict=True):
        identity = json.dumps(stored.meta, sort_keys=True)
        pieces = {name: lambda index, name=name: array(name) for name in kinds}
        write_stream(folder / file, kinds, {}, pieces.__getitem__, identity=identity)
        progress(sum(k.piece_bytes for k in kinds.values()))
    if len(files) > 1:
        places = {name: f for f, kinds in zip(files, shards, strict=True) for name in kinds}
        total = sum(k.piece_bytes for kinds in shards for k in kinds.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_atomic(folder / f"{stem}.safetensors.index.json", _text(index))
    if layout == "diffusers":
        write_atomic(folder / "config.json", _text(known.hf_config(cfg)))
    return [folder / file for file in files]


def part_config(stored: Stored):
    """The kind of a part, and its configuration.

    Raises: CheckpointError when the file does not say, or not in words of this version.
    """
    try:
        kind = stored.meta["kind"]
        given = {
            k: tuple(v) if isinstance(v, list) else v for k, v in stored.meta["config"].items()
        }
        return kind, KINDS[kind].config_type(**given)
    except (KeyError, TypeError, AttributeError, InputError) as e:
        raise CheckpointError(
            f"{stored.path} does not say what it is ({type(e).__name__}: {e}); give what `lvjax "
            "convert` wrote"
        ) from e


def _kinds(names: dict, stored: Stored) -> Kinds:
    """Type and shape of every array in the checkpoint's layout, without reading one."""
    kinds = {}
    for name, (rule, layer) in sorted(names.items()):

        def empty(path: str, at: int | None):
            shape = stored.slots[path].shape
            return np.broadcast_to(np.uint8(0), shape if at is None else shape[1:])

        shape = source_array(rule, layer, empty).shape
        kinds[name] = Kind(stored.slots[rule.targets[0]].dtype, shape)
    return kinds


def _shards(kinds: Kinds, most: int) -> list[Kinds]:
    """The arrays in order, as many in a file as fit."""
    shards, size = [{}], 0
    for name, kind in kinds.items():
        if shards[-1] and size + kind.piece_bytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = kind
        size += kind.piece_bytes
    return shards


def _file_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _text(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
