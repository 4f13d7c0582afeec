# SPDX-License-Identifier: Apache-2.0
"""A bundle: everything that a model is, in one frozen value, from the package, from a folder that
lvjax wrote, or from a checkpoint as its publishers lay it out.

A folder of lvjax's holds `model.json` (name and defaults) and its parts: "dit", "vae", "text",
"dit_low" where there are two experts, "image" where there are image tokens.  A part says itself
what it is; those of the pocket model are described in model.json.  The transformer and the
autoencoder are held in memory; a large text or image encoder is read from the disk when it is
needed, layer by layer (encoders.py).
"""

import dataclasses
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.files import HEAD, opened
from checkpoints_convert.foreign import open_foreign
from checkpoints_convert.read import open_tensors
from checkpoints_convert.recognise import check_together
from checkpoints_convert.sources import find_sources
from lvjax.core.checkpoint import OLD, Stored, sealed, unsealed, write_atomic
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.orbax_layout import OWN as OWN_FOLDER
from lvjax.core.streaming import TARGETS, open_stored
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.image_encoder import ImageEncoderConfig
from lvjax.models.parts import (
    EXPERTS,
    PARTS,
    check_part,
    kind_of,
    part_spec,
    read_config,
    stored_part,
)
from lvjax.models.pocket_text import PocketTextConfig
from lvjax.models.umt5 import UMT5Config
from lvjax.run.adapters import Adapter
from lvjax.run.defaults import Defaults
from lvjax.run.presets import PRESETS, preset_of, presets_of
from lvjax.run.sentence import SentenceEncoder

OWN = {"dit": DiTConfig, "vae": VAEConfig, "text": PocketTextConfig}  # described in model.json
MODEL, TOKENIZER = "model.json", "tokenizer.json"


@dataclass(frozen=True)
class Bundle:
    """A model, loaded or in outline.

    text: None where prompts come as embeddings only.  image: the encoder of image tokens, if any.
    params: trees by part, of those that are held in memory; empty in an outline.
    parts: the files of every part, to read what is not held.  folder: where they are, and the
      tokenizer of UMT5.
    embeddings: rows of prompts that were encoded before, {prompt: float32 [M, D]}.
    hashes: sha256 by part, of its sizes and the checksums of its arrays; and of every LoRA, and of
      `sentence`.  None of UMT5: of what it is used for, a run card has the rows.
    loras: what changes the transformers, in order.  merged: whether it is added up with their
      weights, or kept beside them.
    base: trees by part as they are without LoRAs, where they are in memory.
    offload: where the blocks of the transformers wait while a session runs: "none" on the devices;
      in the host's memory, from where "layers" brings a layer at a time, and "expert" a transformer
      for its steps.
    sentence: what clip selection compares prompts by; None for the text encoder.
    left_out: a line on each file in the folder that could have been a part and is none.
    """

    name: str
    dit: DiTConfig
    vae: VAEConfig
    text: PocketTextConfig | UMT5Config | None
    defaults: Defaults
    params: dict[str, Any] = field(repr=False)
    hashes: dict[str, str] = field(default_factory=dict)
    image: ImageEncoderConfig | None = None
    parts: Mapping[str, Stored] = field(default_factory=dict, repr=False)
    folder: Path | None = None
    embeddings: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    loras: tuple[Adapter, ...] = ()
    merged: bool = False
    base: Mapping[str, Any] = field(default_factory=dict, repr=False)
    offload: str = "none"
    sentence: SentenceEncoder | None = field(default=None, repr=False)
    left_out: tuple[str, ...] = ()

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of its files and LoRAs."""
        loras = (lora.notice for lora in self.loras if lora.notice is not None)
        return (*self.left_out, *loras)

    @property
    def experts(self) -> tuple[str, ...]:
        """The parts that are transformers: high noise first."""
        return transformers(self.parts)

    def config(self, part: str):
        """The sizes of a part."""
        return getattr(self, kind_of(part))


def specs(bundle: Bundle) -> dict:
    """The parameters of the parts that are held in memory."""
    held = (*bundle.experts, "vae", *(["text"] * isinstance(bundle.text, PocketTextConfig)))
    return {part: part_spec(bundle.config(part)) for part in held}


def part_path(folder: Path, part: str, suffix: str) -> Path:
    """Where a part of a folder lies."""
    return folder / f"{part}{suffix}"


def transformers(parts: Container[str]) -> tuple[str, ...]:
    """The parts of a model that are transformers: high noise first."""
    return tuple(EXPERTS.values()) if EXPERTS["low"] in parts else ("dit",)


def part_places(folder: Path, part: str) -> list[Path]:
    """Where a part is in a folder: nowhere, in one format, or by an interrupted run in both."""
    places = [part_path(folder, part, target.suffix) for target in TARGETS.values()]
    return [path for path in places if os.path.lexists(path)]


def is_own(path: Path) -> bool:
    """Whether lvjax wrote a file or folder of arrays, as it says in the beginning."""
    if path.is_dir():
        return (path / OWN_FOLDER).is_file()
    with opened(path) as f:
        head = f.read(HEAD)[8:200]
    if not head.startswith(b"{") or b'"lvjax' in head:
        return head.startswith(b"{")
    return open_tensors(path).metadata.get("format") == OLD


def open_parts(folder: Path, others: bool = False) -> dict[str, Stored]:
    """The parts of a folder of lvjax's, by name; no array is read.

    others: whether parts of other people's may have their names.
    Raises: CheckpointError when one is damaged, or there twice.
    """
    found = {}
    for part in PARTS:
        there = [path for path in part_places(folder, part) if not others or is_own(path)]
        if len(there) > 1:
            raise CheckpointError(
                f"{there[0]} and {there[1]} are the same part; finish the conversion, or remove one"
            )
        if there:
            found[part] = open_stored(there[0])
    return found


def outline(name: str | Path = "pocket") -> Bundle:
    """A model without its weights: params and hashes are empty.

    name: "pocket", the model inside the package; a folder that lvjax wrote; or a checkpoint, or the
      folder of a whole model, as its publishers or diffusers lay it out.
    Raises: CheckpointError when something is missing, damaged or of another version.
    """
    folder = _folder(name)
    if not _has(folder):
        return _foreign_outline(folder)
    bundle = described(folder)
    for part, stored in bundle.parts.items():
        check_part(stored, bundle.config(part))
    return bundle


def described(folder: Path) -> Bundle:
    """A folder of lvjax's in outline, as it describes itself; whether the arrays fit is not looked
    at.

    Raises: CheckpointError as `outline`.
    """
    path, head = folder / MODEL, _read(folder / MODEL)
    if missing := {"name", "defaults"} - set(head):
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; restore it")
    if unknown := sorted(set(head) - {"name", "defaults", *OWN}):
        raise CheckpointError(
            f"{path} says {unknown[0]!r}, which this version of lvjax does not know; restore it"
        )
    parts = open_parts(folder)
    if "dit" in head:
        if missing := set(OWN) - set(head):
            raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; restore it")
        configs = {part: read_config(cls, head[part], path) for part, cls in OWN.items()}
    else:
        configs = _configs(parts, folder)
    defaults = read_config(Defaults, head["defaults"], path)
    return _checked(Bundle(str(head["name"]), **_fields(configs), defaults=defaults, params={},
                           parts=parts, folder=folder), path)  # fmt: skip


def _read(path: Path) -> dict:
    try:
        return unsealed(path)
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(
            f"no model in {path.parent} ({type(e).__name__}); give 'pocket' or a folder with "
            f"{MODEL}"
        ) from e


def _configs(parts: Mapping[str, Stored], folder: Path) -> dict:
    """What the parts say of themselves.

    Raises: CheckpointError when the transformer or the autoencoder is missing.
    """
    if missing := [part for part in ("dit", "vae") if part not in parts]:
        raise CheckpointError(
            f"{folder} has no part {missing[0]!r} yet; convert the model's "
            f"{'autoencoder' if missing == ['vae'] else 'transformer'} into it too"
        )
    configs = {}
    for part, stored in parts.items():
        if stored.meta.get("part") != part:
            raise CheckpointError(f"{stored.path} says that it is {stored.meta.get('part')!r}")
        configs[part] = stored_part(stored)[1]
    try:
        check_together(configs)
    except CheckpointError as e:
        raise CheckpointError(f"{folder}: {e}") from e
    return configs


def _fields(configs: dict) -> dict:
    """The configurations as fields of a bundle."""
    found = {part: configs.get(part) for part in ("dit", "vae", "text")}
    return found | {"image": configs.get("image")}


def _foreign_outline(folder: Path) -> Bundle:
    """A model as its publishers lay it out."""
    if not folder.exists():
        raise CheckpointError(
            f"no model {str(folder)!r}; give 'pocket', a folder that lvjax wrote, or a checkpoint"
        )
    if folder.is_dir() and (own := open_parts(folder, others=True)):
        _configs(own, folder)  # says which part is not there yet
        raise CheckpointError(f"{folder} has no {MODEL}: its conversion was stopped; run it again")
    parts, left = open_foreign(folder)
    configs = _configs(parts, folder)
    name = preset_of(configs["dit"], len(transformers(parts)))
    return _checked(Bundle(name, **_fields(configs), defaults=PRESETS[name], params={},
                           parts=parts, folder=folder, left_out=tuple(left)), folder)  # fmt: skip


def transformer(name: str | Path) -> tuple[DiTConfig, tuple[str, ...]]:
    """The sizes of a model's transformer, and the parts that are one; nothing else of it need be
    there.  name: as in `outline`, or the transformer alone.

    Raises: CheckpointError when there is none, or it is damaged.
    """
    folder = _folder(name)
    if _has(folder) and "dit" in (head := _read(folder / MODEL)):
        return read_config(DiTConfig, head["dit"], folder / MODEL), ("dit",)
    if not folder.exists():
        raise CheckpointError(f"no model {str(folder)!r}; give the folder of one")
    if folder.is_dir() and not is_own(folder):
        parts = {part: stored_part(s)[1] for part, s in open_parts(folder, others=True).items()}
    else:
        parts = dict([stored_part(open_stored(folder))]) if is_own(folder) else {}
    if not parts:
        parts = {s.part: s.model.cfg for s in find_sources(folder)[0]}
    if not (own := [cfg for part, cfg in parts.items() if part in EXPERTS.values()]):
        raise CheckpointError(f"{folder} has no transformer; give the folder of a model")
    return own[0], transformers(parts)


def _checked(bundle: Bundle, path: Path) -> Bundle:
    unit = bundle.vae.spatial_stride * bundle.dit.patch[1]
    if any(n % unit for n in bundle.defaults.size):
        raise CheckpointError(
            f"{path}: defaults.size is {bundle.defaults.size}; this model makes multiples of "
            f"{unit}: restore the file"
        )
    return bundle


def describe(folder: Path, preset: str | None = None) -> None:
    """Write the model.json of a folder whose parts say what they are, once they are all there.

    preset: a name in `PRESETS` that fits; None for that of one which is there already, where it
      fits (somebody may have changed its defaults), and else for what the structure says.
    """
    parts, head = open_parts(folder), _read(folder / MODEL) if _has(folder) else {}
    if "dit" not in parts or "dit" in head:
        return
    fits = presets_of(stored_part(parts["dit"])[1], len(transformers(parts)))
    if head.get("name") not in (fits if preset is None else (preset,)):
        name = preset or fits[0]
        head = {"name": name, "defaults": dataclasses.asdict(PRESETS[name])}
        write_atomic(folder / MODEL, sealed(head))


def _has(folder: Path) -> bool:
    return (folder / MODEL).is_file()


def typed(bundle: Bundle, dtype: str | None) -> Bundle:
    """An outline with activations of another type, which its defaults name then; None for the type
    that they name, if any.  See `weights.load`.

    Raises: InputError for a type that there is not.
    """
    dtype = bundle.defaults.dtype if dtype is None else dtype
    if dtype is None:
        return bundle
    bundle = dataclasses.replace(bundle, defaults=dataclasses.replace(bundle.defaults, dtype=dtype))
    own = {"dit": dataclasses.replace(bundle.dit, dtype=dtype)}
    if isinstance(bundle.text, UMT5Config):
        own["text"] = dataclasses.replace(bundle.text, dtype=dtype)
    return dataclasses.replace(bundle, **own)


def _folder(name: str | Path) -> Path:
    if not isinstance(name, (str, Path)) or "\0" in str(name):
        raise InputError(f"the model is {name!r}; give 'pocket' or the path of a folder")
    inside = Path(str(resources.files("lvjax") / "assets" / "pocket"))
    return inside if str(name) == "pocket" else Path(name)
