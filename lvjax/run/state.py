# SPDX-License-Identifier: Apache-2.0
"""The saved state of a run: one file, atomic, a checksum per array."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lvjax.core.checkpoint import load_arrays, restore_tree, save_arrays, tree_arrays


def save_state(path, state, meta: dict[str, Any]) -> None:
    """state: any pytree of arrays; meta: position, byte offset, digest, and what else resuming
    needs (JSON-able).
    """
    save_arrays(path, tree_arrays(jax.device_get(state)), meta)


def load_state(path, like, place: Callable = jax.device_put) -> tuple[Any, dict[str, Any]]:
    """Returns (state, meta).

    like: the state's shapes and types, arrays or `jax.ShapeDtypeStruct`s.  place: moves the state
    from the host to the devices.
    Raises: CheckpointError naming the file, and the array that is damaged or of another run.
    """
    arrays, meta = load_arrays(path)
    return place(restore_tree(like, arrays, str(path))), meta


def state_path(output) -> Path:
    """Where the state of the run that writes `output` lies."""
    return Path(f"{output}.state")


def chain(digest: str, latents) -> str:
    """Running sha256 over every clip's latents: equal digests mean equal latents throughout."""
    return hashlib.sha256(digest.encode() + np.ascontiguousarray(latents).tobytes()).hexdigest()
