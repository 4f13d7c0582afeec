# SPDX-License-Identifier: Apache-2.0
"""The saved states of a run, through Orbax: everything that is needed to go on commits together, or
not at all.

A checkpoint is a folder named by its step with the state (parameters, average, optimiser, step,
key), laid out over the devices of a mesh as it is, and one JSON file: where the data are, and a
checksum of every array, because Orbax notices no damage in them.
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from lvjax.core.digest import digests
from lvjax.core.errors import CheckpointError, not_stored
from lvjax.train.state import TrainState

FORMAT = "lvjax-train/1"
CHECKPOINTS = "checkpoints"  # in the folder of a run
BAD = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
"""What Orbax may end with where its own small files are damaged, or of another tree."""
REMEDY = "free space or choose another folder"
KEPT = 2  # the newest, and one to go back to


def is_begun(folder) -> bool:
    """Whether a run has saved a state in `folder`."""
    return any(path.name.isdecimal() for path in Path(folder, CHECKPOINTS).glob("*"))


def disk_bytes(state) -> int:
    """What the checkpoints of a run take at most, those that are kept and the one being written.

    state: its arrays, or their shapes.
    """
    leaves = jax.tree.leaves(state)
    return (KEPT + 1) * sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in leaves)


class Checkpoints:
    """Those of the run in `folder`: the newest `KEPT`.  To be closed, or used by `with`."""

    def __init__(self, folder):
        self.folder = Path(folder, CHECKPOINTS).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as e:
            raise not_stored(f"save a checkpoint in {self.folder}", e, REMEDY) from e

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._manager.close()

    @property
    def newest(self) -> int | None:
        """The step of the newest one that is complete, None without any."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: dict | None = None) -> None:
        """Save a state, unless its step is there.

        position: JSON, what the data need to go on.
        Raises: StorageError when the disk is full; the ones before stay.
        """
        step = int(state.step)
        if self.newest is not None and self.newest >= step:
            return
        facts = {"format": FORMAT, "digests": digests(state), "position": position or {}}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(facts)
                ),
                force=True,
            )
        except (OSError, ValueError) as e:  # tensorstore reports a full disk as a ValueError
            raise not_stored(f"save a checkpoint in {self.folder}", e, REMEDY) from e

    def restore(self, like: Any) -> tuple[TrainState, dict]:
        """The newest state, and the position of its data.

        like: a state of the same shapes; one of `jax.ShapeDtypeStruct`s with shardings, or of
          arrays, whose layout the new one has.
        Raises: CheckpointError when there is none, it is damaged, or of another model.
        """
        step = self.newest
        if step is None:
            raise CheckpointError(f"there is no checkpoint in {self.folder}; train first")
        path = self.folder / str(step)
        remedy = f"remove {path} to go on from the one before it"
        found = self._read(step, like)
        if isinstance(found, str):
            raise CheckpointError(f"{path} is damaged or of another model ({found}); {remedy}")
        state, sums, position = found
        now = digests(state)
        if wrong := sorted(name for name in now | sums if now.get(name) != sums.get(name)):
            raise CheckpointError(f"{path}: array {wrong[0]!r} is damaged; {remedy}")
        return state, position

    def _read(self, step: int, like) -> tuple | str:
        """State, checksums and position; or why not, with nothing left of Orbax's attempt."""
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(_abstract(like)), facts=ocp.args.JsonRestore()
        )
        try:
            found = self._manager.restore(step, args=args)
            return found.state, found.facts["digests"], found.facts["position"]
        except BAD as e:
            return f"{type(e).__name__}: {_first_line(e)}"


def _first_line(e: Exception) -> str:
    return str(e).partition("\n")[0][:200]


def _abstract(like):
    """Shapes, types and layout of a tree: one device where it has none."""
    alone = SingleDeviceSharding(jax.devices()[0])

    def leaf(a):
        place = getattr(a, "sharding", None) or alone
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)

    return jax.tree.map(leaf, like)
