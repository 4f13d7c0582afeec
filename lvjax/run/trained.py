# SPDX-License-Identifier: Apache-2.0
"""What a training leaves: a model folder that `lvjax.load` reads, and adapters as a LoRA file.

Parts that training does not touch are not copied: they become other names of the same files, or
copies where the file system cannot do that.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np

from checkpoints_convert.export_lora import lora_arrays, write_lora
from lvjax.core.checkpoint import Stored, save_arrays, sealed, write_atomic
from lvjax.core.params import flatten
from lvjax.data.latents import Layout
from lvjax.models.lora import as_lora
from lvjax.models.pocket_text import PocketTextConfig
from lvjax.run.bundle import MODEL, OWN, TOKENIZER, Bundle
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
    """Another name of a part's file, or a copy of it."""
    if to.exists():
        return
    if stored.path.is_dir():
        shutil.copytree(stored.path, to, copy_function=_same)
    else:
        _same(stored.path, to)


def _same(old, new) -> None:
    try:
        os.link(os.path.realpath(old), new)
    except OSError:
        shutil.copyfile(old, new)


def _describe(place: Path, model: Bundle) -> None:
    head = {"name": f"{model.name}-extension", "defaults": dataclasses.asdict(model.defaults)}
    if isinstance(model.text, PocketTextConfig):
        head |= {k: dataclasses.asdict(getattr(model, k)) for k in OWN}
        write_atomic(place / MODEL, (json.dumps(head, indent=1) + "\n").encode())
        return
    write_atomic(place / MODEL, sealed(head))
    tokenizer = model.folder / TOKENIZER
    if tokenizer.is_file() and not (place / TOKENIZER).exists():
        _same(tokenizer, place / TOKENIZER)
