# SPDX-License-Identifier: Apache-2.0
"""The parts of a model: what they are called, the sizes that describe each, and its parameters.

Owns: the one table of parts.  Does not own: where they lie on the disk (run/bundle.py), and what
other people call their arrays (checkpoints_convert).
"""

import dataclasses
from typing import Any

from lvjax.core.errors import CheckpointError, InputError, some_of
from lvjax.core.params import flatten
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import dit_spec
from lvjax.models.image_encoder import ImageEncoderConfig, image_encoder_spec
from lvjax.models.pocket_text import PocketTextConfig, text_spec
from lvjax.models.umt5 import UMT5Config, umt5_spec
from lvjax.models.vae import vae_spec

PARTS = {
    "dit": DiTConfig,
    "dit_low": DiTConfig,  # the second expert
    "vae": VAEConfig,
    "text": UMT5Config,
    "image": ImageEncoderConfig,
}
"""What a part that was converted is described by.  The pocket model has a text encoder of its own.
"""

EXPERTS = {"high": "dit", "low": "dit_low"}
"""Names of the experts of a model with two, by the noise that they begin with, and their parts."""

TYPES = ("float16", "bfloat16", "float32", "float64")  # of weights

_SPECS = {
    DiTConfig: dit_spec,
    VAEConfig: vae_spec,
    UMT5Config: umt5_spec,
    ImageEncoderConfig: image_encoder_spec,
    PocketTextConfig: text_spec,
}


def kind_of(part: str) -> str:
    """What a part is: both experts are of kind "dit"."""
    return part.removesuffix("_low")


def part_spec(cfg) -> dict:
    """The tree of parameters of a part with these sizes."""
    return _SPECS[type(cfg)](cfg)


def misfits(stored, cfg) -> dict[str, str]:
    """What is wrong with each array of a part that does not fit its sizes; no array is read.

    stored: a `Stored`, or what has its slots.
    """
    wanted, found = flatten(part_spec(cfg)), stored.slots
    wrong = {name: f"{name} is missing" for name in wanted.keys() - found.keys()}
    wrong |= {name: f"{name} is not of this model" for name in found.keys() - wanted.keys()}
    for name in wanted.keys() & found.keys():
        shape, dtype = tuple(found[name].shape), str(found[name].dtype)
        if shape != wanted[name].shape:
            wrong[name] = f"{name} has shape {shape}, expected {wanted[name].shape}"
        elif dtype not in TYPES:
            wrong[name] = f"{name} is {dtype}, expected are weights in {' or '.join(TYPES)}"
    return wrong


def check_part(stored, cfg) -> None:
    """Raises: CheckpointError naming arrays of a part that do not fit its sizes, see `misfits`."""
    if wrong := misfits(stored, cfg):
        raise CheckpointError(f"{stored.path}: {some_of(wrong.values())}; convert it again")


def read_config(cls: type, values: Any, path):
    """A configuration from JSON.  path: of the file that it is in, for messages.

    Raises: CheckpointError naming the field that is missing, unknown or wrong.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: {cls.__name__} is {values!r}; restore the file")
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - names):
        raise CheckpointError(
            f"{path}: {cls.__name__} has no field {unknown[0]!r}; the model needs another "
            "version of lvjax"
        )
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (InputError, TypeError) as e:
        raise CheckpointError(f"{path}: {e}; restore the file") from e


def stored_part(stored) -> tuple[str, Any]:
    """Which part stored arrays say that they are, and its configuration.

    Raises: CheckpointError when they do not say, or not in words of this version.
    """
    part = stored.meta.get("part")
    if part not in PARTS:
        raise CheckpointError(
            f"{stored.path} does not say which part of a model it is; give what `lvjax convert` "
            "wrote"
        )
    return part, read_config(PARTS[part], stored.meta.get("config"), stored.path)
