# SPDX-License-Identifier: Apache-2.0
"""The clips that leave a bank, in files: one for each clip of each video, written once.

A clip is put away before the next one is made, so before the state that no longer holds it is
saved: whatever a crash leaves, every clip of a saved state is in the state or in its file, and what
is made again is the same.
Owns: the files, and moving clips between them and a state.  Does not own: which clips move
(lvjax/memory/spill.py).
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lvjax.core.checkpoint import load_arrays, save_arrays
from lvjax.core.errors import CheckpointError, InputError, storing
from lvjax.memory.cache import KVCache, read_clip, write_clip
from lvjax.memory.spill import Exchange, Move
from lvjax.rollout.clipwise import Clip, ClipState
from lvjax.rollout.method import Method, stream

NAME = "{row:06d}-{clip:08d}.safetensors"
OWN = re.compile(r"\.?\d{6,}-\d{8,}\.safetensors(\.tmp)?")  # what a kill leaves too
BATCH = {"k": 1, "v": 1, "frame": 0}  # the axis of the rows in what `read_clip` gives


@dataclass(frozen=True)
class ClipFiles:
    """A folder of clips.  run: what tells the run whose they are from others."""

    folder: Path
    run: str = ""

    def path(self, row: int, clip: int) -> Path:
        """The file of a clip of a video."""
        return self.folder / NAME.format(row=row, clip=clip)

    def save(self, row: int, clip: int, arrays: dict[str, np.ndarray]) -> None:
        """Raises: StorageError."""
        with storing(self.folder):
            self.folder.mkdir(exist_ok=True)
        save_arrays(self.path(row, clip), arrays, self._meta(row, clip))

    def load(self, row: int, clip: int, like: dict[str, Any]) -> dict[str, np.ndarray]:
        """The arrays of a clip; like: their shapes and types.

        Raises: CheckpointError naming the file when it is missing, damaged or of another run.
        """
        path = self.path(row, clip)
        if not path.is_file():
            raise CheckpointError(
                f"clip {clip} of video {row} has left the memory for {path}, which is not there; "
                f"restore {self.folder}, or start again with --overwrite"
            )
        arrays, meta = load_arrays(path)
        found, wanted = (
            {name: (a.shape, a.dtype) for name, a in each.items()} for each in (arrays, like)
        )
        if meta != self._meta(row, clip) or found != wanted:
            raise CheckpointError(
                f"{path} is not clip {clip} of video {row} of this run; restore it, or start again "
                "with --overwrite"
            )
        return arrays

    def _meta(self, row: int, clip: int) -> dict[str, Any]:
        return {"kind": "clip memory", "run": self.run, "row": row, "clip": clip}

    def size(self) -> int:
        """Bytes of the clips that are there."""
        return sum(path.stat().st_size for path in self._own())

    def clear(self) -> None:
        """Remove the clips, and the folder unless there is something else in it."""
        for path in self._own():
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _own(self) -> list[Path]:
        there = self.folder.is_dir() and not self.folder.is_symlink()
        return [p for p in self.folder.iterdir() if OWN.fullmatch(p.name)] if there else []


def clips_path(output) -> Path:
    """Where the clips go that leave the memory of the run that writes `output`."""
    return Path(f"{output}.clips")


def check_place(output) -> None:
    """Raises: InputError when something that is no folder lies at `clips_path`."""
    folder = clips_path(output)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(
            f"{folder} is in the place of the clips that leave the memory and is no folder; move "
            "it away or choose another --out"
        )


@contextmanager
def temporary_files() -> Iterator[ClipFiles]:
    """Files for as long as the body runs, in the system's place for such."""
    with tempfile.TemporaryDirectory(prefix="lvjax-clips-") as folder:
        yield ClipFiles(Path(folder))


class Moved(NamedTuple):
    """A clip, and for each row of the batch what is to be moved before it is made."""

    clip: Clip
    away: list[list[Move]]
    back: list[list[Move]]


def moved(clip: Clip, rows: list[Exchange]) -> Moved:
    """A clip with the moves of its rows."""
    return Moved(clip, [row.away for row in rows], [row.back for row in rows])


def moving_step(method: Method, latents: int, files: ClipFiles) -> Callable:
    """The step of a method with a bank, for `Moved` clips of so many latent frames."""

    def step(state: ClipState, given: Moved):
        _put_away(state.cache, given.away, latents, files)
        cache = _bring_back(state.cache, given.back, latents, files)
        return next(stream(method, state.replace(cache=cache), (given.clip,)))

    return step


_read = jax.jit(read_clip, static_argnames="frames")
_write = jax.jit(write_clip, donate_argnums=0)


def _rounds(cache: KVCache, moves: list[list[Move]]):
    """Moves of which each row has one at most: [(row, its passes, move)], and slots int32 [Bm].

    The passes of a row are its places in the batch of the bank, two with guidance.
    """
    batch, count = cache.frame.shape[0], len(moves)
    for each in zip_longest(*moves):
        found = [(row, [*range(row, batch, count)], m) for row, m in enumerate(each) if m]
        slots = np.zeros(batch, np.int32)
        for _, passes, move in found:
            slots[passes] = move.slot
        yield found, jax.device_put(slots, cache.frame.sharding)


def _put_away(cache: KVCache, moves: list[list[Move]], latents: int, files: ClipFiles) -> None:
    for found, slots in _rounds(cache, moves):
        arrays = jax.device_get(_read(cache, slots, frames=latents))
        for row, passes, move in found:
            own = {name: a.take(passes, BATCH[name]) for name, a in arrays.items()}
            files.save(row, move.clip, own)


def _bring_back(cache: KVCache, moves: list[list[Move]], latents: int, files: ClipFiles) -> KVCache:
    """The cache with clips in their slots; the given one is donated if there are any."""
    for found, slots in _rounds(cache, moves):
        shapes = jax.eval_shape(lambda c, s: read_clip(c, s, latents), cache, slots)
        arrays = {name: np.zeros(a.shape, a.dtype) for name, a in shapes.items()}
        for row, passes, move in found:
            places = {name: (slice(None),) * axis + (passes,) for name, axis in BATCH.items()}
            like = {name: a[places[name]] for name, a in arrays.items()}
            for name, own in files.load(row, move.clip, like).items():
                arrays[name][places[name]] = own
        rows = np.zeros(len(slots), bool)
        rows[[at for _, passes, _ in found for at in passes]] = True
        put = {n: jax.device_put(a, getattr(cache, n).sharding) for n, a in arrays.items()}
        cache = _write(cache, slots, put, jax.device_put(rows, cache.frame.sharding))
    return cache
