# SPDX-License-Identifier: Apache-2.0
"""The way back: an lvjax part as a checkpoint in the official or the Hugging Face naming.

Writes safetensors, in shards where it is large, with the config.json that diffusers and
transformers ask for; every array is what the conversion read, bit for bit, unless a narrower type
was asked for then.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoints_convert.pipeline_json import text
from checkpoints_convert.recognise import KINDS
from checkpoints_convert.rules import source_array, sources_of
from checkpoints_convert.sources import INDEX
from checkpoints_convert.unused import digest, open_unused
from lvjax.core.checkpoint import Stored, open_arrays, write_atomic
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.streaming import Kind, Kinds, clean, total_bytes, write_stream
from lvjax.models.parts import kind_of, part_spec, stored_part

SHARD = 5_000_000_000  # bytes
PLACES = {
    "diffusers": {
        "dit": ("transformer", "diffusion_pytorch_model"),
        "dit_low": ("transformer_2", "diffusion_pytorch_model"),
        "vae": ("vae", "diffusion_pytorch_model"),
        "text": ("text_encoder", "model"),
        "image": ("image_encoder", "model"),
    },
    "official": {
        "dit": ("", "diffusion_pytorch_model"),
        "dit_low": ("low_noise_model", "diffusion_pytorch_model"),
        "vae": ("", "Wan2.1_VAE"),
        "text": ("", "models_t5_umt5-xxl-enc-bf16"),
        "image": ("", "models_clip_open-clip-xlm-roberta-large-vit-huge-14"),
    },
}
"""Where each layout keeps a part, and how it names the file."""

TOKENIZERS = {"diffusers": "tokenizer", "official": "google/umt5-xxl"}
PICKLED = ("vae", "text", "image")
"""Parts that Wan's own code reads from PyTorch files (.pth) of these names."""


class Export(NamedTuple):
    """An export that was planned, and not written yet.

    folder, stem: where the files go, and how their names begin.
    files: what each file of arrays holds.  array(name): an array of the checkpoint.  texts: small
      files.  identity: of the part, written into every file.
    left_out: names of unused arrays that were kept, and have no place in this naming.
    """

    folder: Path
    stem: str
    files: dict[Path, Kinds]
    array: Callable[[str], np.ndarray]
    texts: dict[Path, bytes]
    identity: str
    left_out: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(map(total_bytes, self.files.values()))


def _place(part: str, cfg, layout: str, experts: int) -> tuple[str, str]:
    """The folder of a part and how its files are called, see `PLACES`."""
    place, stem = PLACES[layout][part]
    if layout == "official" and part == "dit":
        alone = cfg.condition_channels and cfg.image_dim is None  # only Wan 2.2's experts are so
        place = "high_noise_model" if experts == 2 or alone else place
    if layout == "official" and part == "vae" and cfg.residual:
        stem = "Wan2.2_VAE"
    return place, stem


def plan_export(
    stored: Stored, folder: Path, layout: str, shard: int = SHARD, *, experts: int = 1
) -> Export:
    """What the way back writes below `folder`, with the unused arrays that were kept.

    layout: "official" or "diffusers" (for encoders: the naming of transformers).
    shard: bytes of one file at most, where no array is larger.
    experts: how many transformers its model has.
    Raises: CheckpointError when the part, or what was kept beside it, does not say what it is;
      InputError for a layout that is none.
    """
    part, cfg = stored_part(stored)
    known = KINDS[kind_of(part)]
    if layout not in PLACES:
        raise InputError(f"layout is {layout!r}; give 'official' or 'diffusers'")
    own = known.layouts[layout == "official"]
    names = sources_of(known.rules((), own, cfg), part_spec(cfg))
    unused, copies, left_out = open_unused(stored, own)

    def array(name: str) -> np.ndarray:
        if name in unused:
            return unused[name]
        rule, layer = names[copies.get(name, name)]

        def read(path: str, at: int | None) -> np.ndarray:
            return stored[path] if at is None else stored.layer(path, at)

        return np.ascontiguousarray(source_array(rule, layer, read))

    kinds = _kinds(names, stored)
    kinds |= {name: kinds[other] for name, other in copies.items()}
    kinds |= {name: Kind(unused.slots[name].dtype, unused.slots[name].shape) for name in unused}
    place, stem = _place(part, cfg, layout, experts)
    folder = folder / place
    shards = _shards(dict(sorted(kinds.items())), shard)
    files, texts = _file_names(stem, len(shards)), {}
    if len(files) > 1:
        places = {name: f for f, kinds in zip(files, shards, strict=True) for name in kinds}
        index = {"metadata": {"total_size": sum(map(total_bytes, shards))}, "weight_map": places}
        texts[folder / f"{stem}.safetensors{INDEX}"] = text(index)
    config = known.hf_config if layout == "diffusers" else known.official_config
    if config is not None:
        texts[folder / "config.json"] = text(config(cfg))
    files = {folder / file: kinds for file, kinds in zip(files, shards, strict=True)}
    identity = f"{layout} {digest(stored)}"
    return Export(folder, stem, files, array, texts, identity, left_out)


def export_part(
    stored: Stored,
    plan: Export,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda size: None,
) -> list[Path]:
    """Write what was planned; returns the files of the arrays.  What an earlier run has finished is
    checked and kept.

    overwrite: whether other weights in that place may be replaced.
    progress: called with bytes, `plan.size` in the end.
    Raises: CheckpointError when the part is damaged; InputError when something else is in the
      place; StorageError.
    """
    meta = {"export": plan.identity}
    done = {path for path, kinds in plan.files.items() if _is_written(path, kinds, meta)}
    others = _others(plan, done)
    check_free(others, overwrite)
    stored.check()
    for path, kinds in plan.files.items():
        if path in done:
            clean(path)
            progress(total_bytes(kinds))
            continue
        pieces = {name: lambda index, name=name: plan.array(name) for name in kinds}
        write_stream(path, kinds, meta, pieces.__getitem__, progress=progress)
    for path in others:
        if path not in plan.files and path not in plan.texts:
            path.unlink(missing_ok=True)
    for path, content in plan.texts.items():
        write_atomic(path, content)
    return list(plan.files)


def check_free(others: list[Path], overwrite: bool) -> None:
    """Raises: InputError when something else is in the place of an export, and may not be
    replaced.
    """
    if others and not overwrite:
        raise InputError(
            f"{others[0]} is there and is not of this export; use --overwrite, or another DST"
        )


def _is_written(path: Path, kinds: Kinds, meta: dict) -> bool:
    """Whether a file of this export is there, and whole."""
    try:
        stored = open_arrays(path)
        if stored.meta != meta or stored.slots.keys() != kinds.keys():
            return False
        stored.check()
    except CheckpointError:
        return False
    return True


def _others(plan: Export, done: set[Path]) -> list[Path]:
    """Files that are in the place of an export, or would be read with it, and are not of it."""
    ends = rf"(-\d+-of-\d+)?\.safetensors({re.escape(INDEX)})?"
    own, texts = re.compile(re.escape(plan.stem) + ends), plan.texts
    near = sorted(plan.folder.iterdir()) if plan.folder.is_dir() else []
    near = [path for path in near if own.fullmatch(path.name) and path not in {*done, *texts}]
    return near + other_texts(texts)


def other_texts(texts: dict[Path, bytes]) -> list[Path]:
    """Those of these small files that are there and say something else."""
    return [path for path in texts if path.exists() and path.read_bytes() != texts[path]]


def _kinds(names: dict, stored: Stored) -> Kinds:
    """Type and shape of every array in the checkpoint's layout, without reading one."""
    kinds = {}
    for name, (rule, layer) in names.items():

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
