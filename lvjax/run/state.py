# SPDX-License-Identifier: Apache-2.0
"""The saved state of a run: one file, atomic, a checksum per array."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lvjax.core.checkpoint import (
    load_arrays,
    open_arrays,
    readable,
    restore_tree,
    save_arrays,
    tree_arrays,
)

START = "start frames"


def save_state(path, state, meta: dict[str, Any], start: np.ndarray | None = None) -> None:
    """state: any pytree of arrays; meta: position, byte offset, digest, and what else resuming
    needs (JSON-able); start: the frames uint8 that the run goes on from, where meta lacks them.
    """
    own = {} if start is None else {START: start}
    save_arrays(path, tree_arrays(jax.device_get(state)) | own, meta)


def load_start(path) -> np.ndarray:
    """The start frames of a state.

    Raises: CheckpointError naming the file when they are not there, or damaged.
    """
    with readable(path):
        return open_arrays(path)[START]


def load_state(path, like, place: Callable = jax.device_put) -> tuple[Any, dict[str, Any]]:
    """Returns (state, meta).

    like: the state's shapes and types, arrays or `jax.ShapeDtypeStruct`s.  place: moves the state
    from the host to the devices.
    Raises: CheckpointError naming the file, and the array that is damaged or of another run.
    """
    arrays, meta = load_arrays(path)
    arrays.pop(START, None)
    return place(restore_tree(like, arrays, str(path))), meta


def state_path(output) -> Path:
    """Where the state of the run that writes `output` lies."""
    return Path(f"{output}.state")


def chain(digest: str, latents) -> str:
    """Running sha256 over every clip's latents: equal digests mean equal latents throughout."""
    return hashlib.sha256(digest.encode() + np.ascontiguousarray(latents).tobytes()).hexdigest()
