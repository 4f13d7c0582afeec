# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert`: published Wan weights to lvjax weights.

Reads a .safetensors file, a sharded index, or a folder as diffusers saves it (also a pipeline, with
transformer/ and vae/); writes DST/dit.safetensors or DST/vae.safetensors and a JSON with the
configuration beside each.  Every array must have its place and every place its array.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from checkpoints_convert.read import open_checkpoint
from checkpoints_convert.recognise import LATER, Model, recognise
from checkpoints_convert.rules import convert
from lvjax.core.checkpoint import save_arrays, write_atomic
from lvjax.core.errors import CheckpointError, StorageError
from lvjax.core.params import count, flatten

FOLDERS = {"dit": "transformer", "vae": "vae"}  # of a diffusers pipeline
DTYPES = ("keep", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help=".safetensors, .index.json, or their folder")
    parser.add_argument("dst", metavar="DST", help="folder for the weights and their JSON")
    parser.add_argument("--part", choices=tuple(FOLDERS), help="what SRC must be, or which of both")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="default: as stored")


def run(args) -> int:
    for source in sources(Path(args.src), args.part):
        tensors, config = open_checkpoint(source)
        model = recognise(tensors, config, str(source))
        if args.part not in (None, model.part):
            kinds = {"dit": "a diffusion transformer", "vae": "an autoencoder"}
            raise CheckpointError(f"{source} is {kinds[model.part]}; leave --part {args.part} out")
        path = write(model, Path(args.dst), args.dtype, source)
        millions = count(model.spec()) / 1e6
        what = f"{model.part} ({model.layout} naming, {millions:.1f} M parameters)"
        print(f"{what}: {source} -> {path}", file=sys.stderr)
    return 0


def sources(src: Path, part: str | None) -> list[Path]:
    """The checkpoints to convert: `src`, or the parts of a pipeline.

    Raises: CheckpointError for a pipeline of two experts, or without the part that was asked for.
    """
    if not src.is_dir() or any(src.glob("*.safetensors")):
        return [src]
    if (src / "transformer_2").is_dir():
        raise CheckpointError(f"{src} is a Wan 2.2 pipeline: {LATER.format('it')}")
    found = {p: src / folder for p, folder in FOLDERS.items() if (src / folder).is_dir()}
    if part is not None and found:
        if part not in found:
            raise CheckpointError(
                f"{src} has no folder {FOLDERS[part]!r}; give the checkpoint's own"
            )
        return [found[part]]
    return list(found.values()) or [src]


def write(model: Model, folder: Path, dtype: str, source: Path) -> Path:
    """Convert, cast and save one part; returns the path of its weights.

    Raises: CheckpointError, or StorageError when the folder cannot be written.
    """
    tree = convert(model.tensors, model.rules(), model.spec())
    arrays = {name: cast(name, a, dtype) for name, a in flatten(tree).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        what = f"cannot make the folder {folder}: {e.strerror or e}"
        raise StorageError(f"{what}; choose another place") from e
    path = folder / f"{model.part}.safetensors"
    meta = {"part": model.part, "config": dataclasses.asdict(model.cfg)}
    save_arrays(path, arrays, meta)
    facts = {"source": source.name, "naming": model.layout}
    facts["dtypes"] = sorted({str(a.dtype) for a in arrays.values()})
    with path.open("rb") as f:
        facts["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
    text = json.dumps({"format": "lvjax-part/1", **meta, **facts}, indent=1) + "\n"
    write_atomic(folder / f"{model.part}.json", text.encode())
    return path


def cast(name: str, a: np.ndarray, dtype: str) -> np.ndarray:
    """The array in `dtype`, "keep" for its own.

    Raises: CheckpointError when a value does not fit.
    """
    if dtype == "keep":
        return a
    with np.errstate(over="ignore"):
        out = a.astype(jnp.dtype(dtype))
    if not np.isfinite(out).all():
        largest = float(np.abs(a.astype(np.float64)).max())
        what = f"{name} reaches {largest:.3g}, more than {dtype} holds"
        raise CheckpointError(f"{what}; use --dtype bfloat16 or float32")
    return out
