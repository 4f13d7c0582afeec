# SPDX-License-Identifier: Apache-2.0
"""A bundle: everything that a model is, in one frozen value, loaded from the package or from a
folder.

A folder holds `model.json` (sizes, defaults, vocabulary name) and one safetensors file each for
"dit", "vae" and "text".
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lvjax.core.checkpoint import load_arrays, save_arrays, write_atomic
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.params import abstract, flatten, unflatten
from lvjax.flow.solvers import SOLVERS
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import dit_spec
from lvjax.models.pocket_text import PocketTextConfig, text_spec
from lvjax.models.vae import vae_spec
from lvjax.rollout.clipwise import FILLS, POSITIONS

PARTS = ("dit", "vae", "text")


def _whole(x, low: int = 1, high: float = math.inf) -> bool:
    return type(x) is int and low <= x <= high


def _real(x, low: float, high: float) -> bool:
    return type(x) in (int, float) and low <= x <= high


def _pair(x, test) -> bool:
    return isinstance(x, (tuple, list)) and len(x) == 2 and all(map(test, x))


ALLOWED = {
    "fps": (lambda x: _whole(x, 1, 240), "a whole number from 1 to 240"),
    "size": (lambda x: _pair(x, _whole), "(height, width) in pixels, for example (64, 64)"),
    "clip_latents": (lambda x: _whole(x, 2), "a whole number from 2"),
    "overlap": (_whole, "a whole number from 1"),
    "steps": (lambda x: _whole(x, 1, 1000), "a whole number from 1 to 1000"),
    "shift": (lambda x: _real(x, 1e-3, 1e3), "a number from 0.001 to 1000, for example 3.0"),
    "solver": (lambda x: x in tuple(SOLVERS), f"one of {', '.join(SOLVERS)}"),
    "guidance": (lambda x: _real(x, 0, 100), "a number from 0 to 100; 1 is none"),
    "window": (
        lambda x: _pair(x, lambda y: _real(y, 0, 1)) and x[0] < x[1],
        "(low, high) with 0 <= low < high <= 1, for example (0.3, 0.7)",
    ),
    "positions": (lambda x: x in tuple(POSITIONS), f"one of {', '.join(POSITIONS)}"),
    "fill": (lambda x: x in FILLS, f"one of {', '.join(FILLS)}"),
    "capacity": (_whole, "a whole number from 1"),
    "layers": (
        lambda x: x is None or (_pair(x, lambda y: _whole(y, 0)) and x[0] < x[1]),
        "None or (first, last) with 0 <= first < last",
    ),
    "upscale": (lambda x: _whole(x, 1, 64), "a whole number from 1 to 64"),
    "lookahead": (lambda x: type(x) is bool, "True or False"),
}
"""What each field of `Defaults` may be: a test, and the same in words."""


@dataclass(frozen=True)
class Defaults:
    """What `generate` uses when nothing else is said.

    size: (height, width) in pixels.  clip_latents: latent frames per clip.  overlap: latent frames
      shared by neighbours.
    steps, shift, solver, guidance, window: the sampler.  upscale: whole-number enlargement of what
      is shown.
    positions, fill, capacity: see `methods.error_free`.
    lookahead: choose what the bank keeps by the whole timeline.  A later prompt can then change
      what earlier clips remember, and so their pictures (never their prompts).
    Raises: InputError naming the field, what was given and what is allowed.
    """

    fps: int = 8
    size: tuple[int, int] = (64, 64)
    clip_latents: int = 5
    overlap: int = 2
    steps: int = 16
    shift: float = 3.0
    solver: str = "unipc"
    guidance: float = 2.0
    window: tuple[float, float] = (0.3, 0.7)
    positions: str = "relative"
    fill: str = "position"
    capacity: int = 6
    layers: tuple[int, int] | None = None
    upscale: int = 6
    lookahead: bool = False

    def __post_init__(self):
        for name, (test, words) in ALLOWED.items():
            if not test(value := getattr(self, name)):
                raise InputError(f"defaults.{name} is {value!r}; give {words}")
        if self.overlap >= self.clip_latents:
            raise InputError(
                f"defaults.overlap is {self.overlap}, clip_latents {self.clip_latents}; give an "
                f"overlap from 1 to {self.clip_latents - 1}, or longer clips"
            )


@dataclass(frozen=True)
class Bundle:
    """A loaded model.  params: {"dit", "vae", "text"} trees.  hashes: sha256 per file."""

    name: str
    dit: DiTConfig
    vae: VAEConfig
    text: PocketTextConfig
    defaults: Defaults
    params: dict[str, Any] = field(repr=False)
    hashes: dict[str, str] = field(default_factory=dict)


def specs(dit: DiTConfig, vae: VAEConfig, text: PocketTextConfig) -> dict:
    """The parameter specs of a bundle's parts."""
    return {"dit": dit_spec(dit), "vae": vae_spec(vae), "text": text_spec(text)}


def _config(cls, values: dict, path):
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


def outline(name: str | Path = "pocket") -> Bundle:
    """A model without its weights: params and hashes are empty.

    name: "pocket", the model inside the package, or a folder that `save` wrote.
    Raises: CheckpointError when its model.json is missing, damaged or of another version.
    """
    path = _folder(name) / "model.json"
    try:
        head = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(
            f"no model in {path.parent} ({type(e).__name__}); give 'pocket' or a folder with "
            "model.json"
        ) from e
    if missing := {"name", "defaults", *PARTS} - set(head if isinstance(head, dict) else ()):
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; restore it")
    kinds = {"dit": DiTConfig, "vae": VAEConfig, "text": PocketTextConfig, "defaults": Defaults}
    configs = {k: _config(cls, head[k], path) for k, cls in kinds.items()}
    bundle = Bundle(str(head["name"]), **configs, params={})
    unit = bundle.vae.spatial_stride * bundle.dit.patch[1]
    if any(n % unit for n in bundle.defaults.size):
        raise CheckpointError(
            f"{path}: defaults.size is {bundle.defaults.size}; this model makes multiples of "
            f"{unit}: restore the file"
        )
    return bundle


def load(name: str | Path = "pocket") -> Bundle:
    """A model with its weights, named as in `outline`; half precision becomes float32.

    Raises: CheckpointError when a file is missing, damaged, or does not match the model's spec.
    """
    folder, bundle = _folder(name), outline(name)
    spec = specs(bundle.dit, bundle.vae, bundle.text)
    params, hashes = {}, {}
    for part in PARTS:
        path = folder / f"{part}.safetensors"
        arrays, _ = load_arrays(path)
        params[part] = unflatten(_match(arrays, flatten(abstract(spec[part])), path))
        hashes[part] = hashlib.sha256(path.read_bytes()).hexdigest()
    sizes = {part: dataclasses.asdict(getattr(bundle, part)) for part in PARTS}
    hashes["model"] = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()
    return dataclasses.replace(bundle, params=params, hashes=hashes)


def _folder(name: str | Path) -> Path:
    if not isinstance(name, (str, Path)) or "\0" in str(name):
        raise InputError(f"the model is {name!r}; give 'pocket' or the path of a folder")
    inside = Path(str(resources.files("lvjax") / "assets" / "pocket"))
    return inside if str(name) == "pocket" else Path(name)


def _match(arrays: dict[str, np.ndarray], wanted: dict, path) -> dict:
    """Raises: CheckpointError listing what is missing, left over, misshapen or not finite."""
    wrong = [f"{k} is missing" for k in sorted(set(wanted) - set(arrays))]
    wrong += [f"{k} is not of this model" for k in sorted(set(arrays) - set(wanted))]
    shared = [k for k in wanted if k in arrays]
    wrong += [
        f"{k} has shape {arrays[k].shape}, expected {wanted[k].shape}"
        for k in shared
        if arrays[k].shape != wanted[k].shape
    ]
    kinds = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
    wrong += [f"{k} is {arrays[k].dtype}" for k in shared if arrays[k].dtype not in kinds]
    wrong += [
        f"{k} is not finite" for k in shared if not np.isfinite(arrays[k].astype(np.float32)).all()
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: "
            f"{'; '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}"
        )
    return {k: jnp.asarray(arrays[k].astype(np.float32)) for k in wanted}


def _narrow(name: str, weight, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        out = np.asarray(jax.device_get(weight)).astype(dtype)
    if not np.isfinite(out.astype(np.float32)).all():
        raise InputError(f"{name} is not finite in {dtype}; save with dtype='float32'")
    return out


def save(folder, bundle: Bundle, dtype: str = "float16") -> None:
    """Write a bundle as a folder that `load` reads; weights in `dtype`.

    Raises: InputError when a weight is too large for `dtype`; StorageError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        flat = {k: _narrow(k, v, dtype) for k, v in flatten(bundle.params[part]).items()}
        save_arrays(folder / f"{part}.safetensors", flat)
    head = {"name": bundle.name} | {
        k: dataclasses.asdict(getattr(bundle, k)) for k in ("dit", "vae", "text", "defaults")
    }
    write_atomic(folder / "model.json", (json.dumps(head, indent=1) + "\n").encode())
