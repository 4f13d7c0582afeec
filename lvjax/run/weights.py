# SPDX-License-Identifier: Apache-2.0
"""The weights of a bundle: read array by array, hashed, counted, and written.

Owns: `load`, `save`, the weights of an outline, and the hashes that a run card compares.
Does not own: what a model is (bundle.py), LoRAs (loras.py).
"""

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lvjax.core.checkpoint import Stored, raw, save_arrays, write_atomic
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.offload import wait
from lvjax.core.params import flatten, unflatten
from lvjax.models.parts import check_part, part_spec
from lvjax.models.pocket_text import PocketTextConfig
from lvjax.run.adapters import beside_bytes, by_part, merged_bytes
from lvjax.run.bundle import MODEL, OWN, Bundle, outline, specs, typed

HALF = (np.float16, ml_dtypes.bfloat16)


def load(name: str | Path = "pocket", dtype: str | None = None) -> Bundle:
    """A model with its weights, named as in `outline`.

    dtype: of the activations of the transformer and of a large text encoder, "bfloat16" or
      "float32"; None for what the model says.
    Weights keep their stored type, but become float32 where the activations are, and in the
    autoencoder always.
    Raises: CheckpointError when a file is missing, damaged, or does not match the model's spec.
    """
    return read_weights(typed(outline(name), dtype))


def read_weights(bundle: Bundle, change: Callable[[str, str, Any], Any] | None = None) -> Bundle:
    """An outline with its weights and their hashes; what it has already is read again.

    change(part, path, leaf): the leaf to hold instead, one at a time; the hashes are of the files.
    Raises: CheckpointError as `load`.
    """
    params, hashes = {}, {}
    for part in specs(bundle):
        keep = (lambda path, leaf: leaf) if change is None else partial(change, part)
        if part in bundle.experts and bundle.offload != "none":
            keep = partial(_waiting, keep)
        params[part], hashes[part] = _part(bundle, part, keep)
    if "image" in bundle.parts and (known := stored_hash(bundle.parts["image"])) is not None:
        hashes["image"] = known  # read when needed; of a text encoder, a run compares the rows
    if bundle.sentence is not None:
        hashes["selection encoder"] = bundle.sentence.sha256
    sizes = [[part, *_unusual(bundle.config(part))] for part in sorted(params)]
    hashes["model"] = _hash(sizes)
    return dataclasses.replace(bundle, params=params, hashes=hashes)


def read_part(bundle: Bundle, part: str) -> tuple[dict, str]:
    """The weights of one part of an outline as `load` has them, and their hash.

    Raises: CheckpointError as `load`.
    """
    return _part(bundle, part, lambda path, leaf: leaf)


def part_hash(bundle: Bundle, part: str) -> str:
    """The hash of one part; where it is not known, the part is read, and not held.

    Raises: CheckpointError as `load`.
    """
    if part in bundle.hashes:
        return bundle.hashes[part]
    return _part(bundle, part, lambda path, leaf: None)[1]


def _part(bundle: Bundle, part: str, change: Callable) -> tuple[dict, str]:
    if part not in bundle.parts:
        raise CheckpointError(f"{bundle.folder} has no file of the part {part!r}; restore it")
    return _load(bundle.parts[part], bundle.config(part), _wide(bundle, part), change)


def _waiting(change: Callable, path: str, leaf):
    """As `change` gives it, those of the blocks in the host's memory."""
    leaf = change(path, leaf)
    return wait(leaf) if path.startswith("blocks/") else leaf


def weight_bytes(bundle: Bundle) -> int:
    """Bytes of the weights that are held in memory, in the types that `load` gives them; with LoRAs
    and, where they are merged into a copy, the weights that they are merged into.
    """
    total, loras = 0, by_part(bundle.loras)
    for part, spec in specs(bundle).items():
        leaves = leaf_bytes(bundle, part, spec)
        total += sum(math.prod(shape) * width for shape, width in leaves.values())
        if part in loras and not bundle.merged:
            total += beside_bytes(loras[part], leaves)
        elif part in bundle.base:
            total += merged_bytes(loras[part], leaves)
    return total


def leaf_bytes(bundle: Bundle, part: str, spec: dict) -> dict[str, tuple[tuple[int, ...], int]]:
    """For each parameter of a part that is held in memory, its shape and an element's bytes."""
    leaves = {}
    for name, param in flatten(spec).items():
        slot = bundle.parts[part].slots.get(name) if part in bundle.parts else None
        narrow = slot is not None and slot.dtype in HALF and not _wide(bundle, part)
        leaves[name] = param.shape, 2 if narrow else 4
    return leaves


def _wide(bundle: Bundle, part: str) -> bool:
    """Whether the weights of a part become float32."""
    return part in ("vae", "text") or bundle.dit.dtype == "float32"


def _load(stored: Stored, cfg, wide: bool, change: Callable) -> tuple[dict, str]:
    """A part on the device, array by array, each as change(path, array) gives it, and its hash.

    Raises: CheckpointError listing what is missing, left over, misshapen or not finite.
    """
    check_part(stored, cfg)
    arrays, found = {}, []
    for name in flatten(part_spec(cfg)):
        array, slot = stored[name], stored.slots[name]
        if not np.isfinite(array).all():
            raise CheckpointError(f"{stored.path}: {name} is not finite; restore it")
        crc = slot.crc if slot.pieces else zlib.crc32(raw(array))  # others' files have none
        found.append([name, str(array.dtype), list(array.shape), crc])
        keep = array.dtype in HALF and not wide
        arrays[name] = change(name, jnp.asarray(array if keep else array.astype(np.float32)))
    return unflatten(arrays), _hash(found)


def stored_hash(stored: Stored) -> str | None:
    """sha256 of the names, types, shapes and checksums of a part on the disk; None where it has no
    checksums.
    """
    sums = [[k, str(s.dtype), list(s.shape), s.crc] for k, s in sorted(stored.slots.items())]
    return _hash(sums) if all(slot.pieces for slot in stored.slots.values()) else None


def _unusual(config) -> list:
    """Fields of a configuration that are not as in every other, so that a new field changes no
    hash.
    """
    fields = ((f.name, getattr(config, f.name), f.default) for f in dataclasses.fields(config))
    return [[name, value] for name, value, usual in fields if value != usual]


def _hash(sums: list) -> str:
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _narrow(name: str, weight, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        out = np.asarray(jax.device_get(weight)).astype(dtype)
    if not np.isfinite(out.astype(np.float32)).all():
        raise InputError(f"{name} is not finite in {dtype}; save with dtype='float32'")
    return out


def save(folder, bundle: Bundle, dtype: str = "float16") -> None:
    """Write a model of the pocket model's kind as a folder that `load` reads; weights in `dtype`.

    Raises: InputError for another kind of model, or a weight that is too large for `dtype` or has
      LoRAs beside it; StorageError.
    """
    if not isinstance(bundle.text, PocketTextConfig) or bundle.params.keys() != OWN.keys():
        what = f"{bundle.name} is not of the pocket model's kind with all its parts in memory"
        raise InputError(f"{what}; write other models with `lvjax convert`")
    if bundle.loras and not bundle.merged:
        raise InputError("LoRAs are kept beside these weights; merge them before they are saved")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part, params in bundle.params.items():
        flat = {k: _narrow(k, v, dtype) for k, v in flatten(params).items()}
        save_arrays(folder / f"{part}.safetensors", flat)
    head = {"name": bundle.name} | {
        k: dataclasses.asdict(getattr(bundle, k)) for k in (*OWN, "defaults")
    }
    write_atomic(folder / MODEL, (json.dumps(head, indent=1) + "\n").encode())
