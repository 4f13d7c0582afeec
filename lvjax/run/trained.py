# SPDX-License-Identifier: Apache-2.0
"""What a training leaves: a model folder that `lvjax.load` reads, and adapters as a LoRA file.

Parts that training does not touch are not copied: they become other names of the same files, or
copies where the file system cannot do that.
"""

import dataclasses
import filecmp
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np

from checkpoints_convert.export_lora import lora_arrays, write_lora
from lvjax.core.checkpoint import BLOCK, Stored, atomic, save_arrays, sealed, write_atomic
from lvjax.core.errors import StorageError
from lvjax.core.params import flatten
from lvjax.data.latents import Layout
from lvjax.models.lora import as_lora
from lvjax.models.pocket_text import PocketTextConfig
from lvjax.run.bundle import MODEL, OWN, TOKENIZER, Bundle, part_places
from lvjax.run.defaults import Defaults
from lvjax.run.training import Open
from lvjax.train.state import TrainState, joined

BUNDLE, LORA = "bundle", "lora.safetensors"  # in the folder of a run


def defaults_of(opened: Open, layout: Layout) -> Defaults:
    """What the trained model is asked for: clips as the data has them.

    layout: of the data.
    """
    d = opened.bundle.defaults
    guidance = d.guidance[0] if isinstance(d.guidance, (tuple, list)) else d.guidance
    return dataclasses.replace(
        d,
        method="error_free",
        guidance=guidance,
        fill=opened.training.task.fill,
        capacity=max(Defaults.capacity, 1 + d.max_selected) if opened.layers else 1,
        spill=d.spill and opened.layers is not None,
        layers=opened.layers,
        fps=layout.fps,
        size=layout.size,
        clip_latents=layout.latent[0],
        overlap=layout.overlap,
    )


def trained_bundle(opened: Open, state: TrainState, fixed, layout: Layout) -> Bundle:
    """The model as it is now, by the average; without the autoencoder's weights."""
    params = joined(state.ema, fixed)
    return dataclasses.replace(opened.bundle, params=params, defaults=defaults_of(opened, layout))


def save_trained(opened: Open, state: TrainState, fixed, layout: Layout, folder) -> Path:
    """Write folder/"bundle", and folder/"lora.safetensors" where adapters were trained; returns the
    bundle.

    Raises: StorageError.
    """
    place = Path(folder, BUNDLE)
    place.mkdir(parents=True, exist_ok=True)
    model = trained_bundle(opened, state, fixed, layout)
    if opened.training.adapters is None:
        _save_part(place, "dit", model)
    else:
        _link(opened.bundle.parts["dit"], place / "dit.safetensors")
        lora = as_lora(model.params["dit"])
        write_lora(Path(folder, LORA), lora_arrays(lora, opened.cfg))
    for part in opened.bundle.parts.keys() - {"dit"}:
        if part in model.params:
            _save_part(place, part, model)
        else:
            stored = opened.bundle.parts[part]
            _link(stored, place / f"{part}{_suffix(stored.path)}")
    _describe(place, model)
    return place


def _save_part(place: Path, part: str, model: Bundle) -> None:
    """A part that was trained, in the type that the model has it."""
    stored, arrays = model.parts[part], {}
    for name, leaf in flatten(model.params[part]).items():
        slot = stored.slots.get(name)
        kind = np.float32 if slot is None else slot.dtype
        arrays[name] = np.asarray(jax.device_get(leaf)).astype(kind)
    meta = {"part": part, "config": dataclasses.asdict(model.config(part))}
    save_arrays(place / f"{part}.safetensors", arrays, meta)


def _suffix(path: Path) -> str:
    return path.suffix if path.is_file() else ""


def _link(stored: Stored, to: Path) -> None:
    """Another name of a part's file or folder, or a copy, in place of what is there."""
    for other in part_places(to.parent, to.stem):
        if other != to:  # the part of another model, in the other format
            _remove(other)
    if not stored.path.is_dir():
        _same(stored.path, to)
        return
    files = {p.relative_to(stored.path) for p in stored.path.rglob("*") if p.is_file()}
    for path in [p for p in to.rglob("*") if p.is_file() and p.relative_to(to) not in files]:
        _remove(path)
    for name in sorted(files):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        _same(stored.path / name, to / name)


def _same(old: Path, new: Path) -> None:
    """The file `old` under another name, or a copy of it: whole or not at all.

    Raises: StorageError.
    """
    old, beside = Path(os.path.realpath(old)), new.with_name(f".{new.name}.tmp")
    try:
        if new.exists() and (new.samefile(old) or filecmp.cmp(old, new, shallow=False)):
            return
        beside.unlink(missing_ok=True)
        try:
            os.link(old, beside)
        except OSError:  # another file system, or one without links
            with open(old, "rb") as source, atomic(new) as copy:
                shutil.copyfileobj(source, copy, BLOCK)
        else:
            os.replace(beside, new)
    except OSError as e:
        raise StorageError(f"cannot write {new}: {e.strerror or e}; free space there") from e


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _describe(place: Path, model: Bundle) -> None:
    head = {"name": f"{model.name}-extension", "defaults": dataclasses.asdict(model.defaults)}
    if isinstance(model.text, PocketTextConfig):
        head |= {k: dataclasses.asdict(getattr(model, k)) for k in OWN}
        write_atomic(place / MODEL, (json.dumps(head, indent=1) + "\n").encode())
        return
    write_atomic(place / MODEL, sealed(head))
    tokenizer = model.folder / TOKENIZER
    if tokenizer.is_file():
        _same(tokenizer, place / TOKENIZER)
