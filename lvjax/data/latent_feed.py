# SPDX-License-Identifier: Apache-2.0
"""Batches for `train.extension_loss` from a dataset of latents, in an order that the seed decides.

grain shuffles by a permutation that is computed place by place, a new one in each epoch, and reads
ahead in threads.  A batch is a function of its number, so that however many read, and wherever
training goes on, it is the same.
Does not own: the files (latents.py), which clips see which (memory/placement.py).
"""

from collections.abc import Callable, Sequence

import grain
import numpy as np

from lvjax.core.errors import CheckpointError, InputError, some_of
from lvjax.data.latents import NULL, Latents, Sample
from lvjax.memory.placement import Select, plan_bank

ATTEMPTS = 8  # damaged samples that are replaced by another, one after another


class LatentFeed:
    """Windows of consecutive clips, each once in an epoch; see `train.loop.Feed`.

    Batches have float16 latents [B, K, T, h, w, z], text [B, K, M, ...] and null [B, M, ...] padded
    to the longest prompt of the dataset, least, and what else `extension_loss` takes: with more
    than one clip frame, given and visible; with `tails` float32 tails.
    damaged: {sample: what is wrong with it}, of those met so far.  Another window, that the row's
      number decides, stands for each.
    """

    def __init__(
        self,
        data: Latents,
        batch: int,
        clips: int = 1,
        *,
        seed: int = 0,
        tails: int = 0,
        feature: Callable[[str], np.ndarray] | None = None,
        max_selected: int = 5,
        delta: float = 0.02,
        select: Select | None = None,
        readers: int = 2,
    ):
        """clips: K, of a sample.  tails: R, the most latent frames that are given at the end.
        feature: of a prompt, what clip selection compares; None for that of the model which made
          the dataset.  max_selected, delta, select: see `placement.plan_bank`.
        readers: threads, each with a batch of its own that waits; 0 reads when asked.

        Raises: InputError when no video has as many clips, or the dataset not as many tails;
          CheckpointError when the null prompt is damaged.
        """
        _check(data, batch, clips, seed, tails, readers)
        self.data, self.clips, self.seed, self.tails = data, clips, seed, tails
        self._feature = feature
        self._policy = {"max_selected": max_selected, "delta": delta, "select": select}
        self._ends = np.cumsum(np.maximum(data.clips - clips + 1, 0))
        self._null = data.text(NULL).rows
        order = grain.MapDataset.range(self.windows).seed(seed).shuffle().repeat()
        rows = order.map_with_index(self._row).batch(
            batch, drop_remainder=True, batch_fn=self._stacked
        )
        self._batches = iter(rows.to_iter_dataset(grain.ReadOptions(readers, max(readers, 1))))
        self._next = 0
        self.damaged: dict[str, str] = {}

    @property
    def windows(self) -> int:
        """Rows in an epoch."""
        return int(self._ends[-1])

    def __next__(self) -> dict[str, np.ndarray]:
        """Raises: CheckpointError when too much is damaged."""
        batch, damaged = next(self._batches)
        self.damaged |= damaged
        self._next += 1
        return batch

    def position(self) -> dict:
        """The number of the next batch, of which data, and what was damaged so far."""
        return {
            "batch": self._next,
            "windows": self.windows,
            "data": self.data.identity,
            "damaged": self.damaged,
        }

    def seek(self, position: dict) -> None:
        """See `train.loop.Feed`.

        Raises: InputError when the dataset is not the one that the position is of.
        """
        if (windows := position.get("windows", self.windows)) != self.windows:
            raise InputError(
                f"{self.data.folder} has {self.windows} windows of {self.clips} clips, it had "
                f"{windows} when training stopped; give the dataset as it was, or begin anew"
            )
        if position.get("data", self.data.identity) != self.data.identity:
            raise InputError(
                f"{self.data.folder} has other videos, captions or settings than when training "
                "stopped; give the dataset as it was, or begin anew"
            )
        self._next, self.damaged = position.get("batch", 0), dict(position.get("damaged", {}))
        self._batches.set_state({"next_index": self._next})

    def _row(self, number: int, window: int) -> tuple[dict, dict]:
        """Row `number` of all, and the damaged samples in whose place it stands."""
        damaged: dict[str, str] = {}
        for attempt in range(ATTEMPTS):
            if attempt:
                rng = np.random.default_rng([self.seed, number, attempt])
                window = int(rng.integers(self.windows))
            at = int(np.searchsorted(self._ends, window, side="right"))
            last = int(self.data.clips[at] - (self._ends[at] - window - 1))
            name = self.data.samples[at]
            try:
                clips = range(last - self.clips, last)
                return self._arrays(self.data.read(name, clips, bool(self.tails))), damaged
            except CheckpointError as e:
                damaged[name] = str(e)
        raise CheckpointError(
            f"{self.data.folder}: {ATTEMPTS} samples in a row are damaged ({some_of(damaged)}); "
            "restore them, or encode the videos again"
        )

    def _arrays(self, sample: Sample) -> dict[str, np.ndarray]:
        """A row of a batch."""
        layout, k = self.data.head.layout, self.clips
        texts = {prompt: self.data.text(prompt) for prompt in sample.prompts}
        row = {
            "latents": np.stack(sample.latents),
            "text": np.stack([texts[prompt].rows for prompt in sample.prompts]),
            "null": self._null,
            "least": np.array(sample.least, np.int32),
        }
        if self.tails:
            row["tails"] = np.stack([_square(packed, self.tails) for packed in sample.tails])
        if k == 1:
            return row
        number = sample.first + np.arange(k)
        feature = self._feature or (lambda prompt: texts[prompt].feature)
        features = np.stack([feature(prompt) for prompt in sample.prompts])
        return row | {
            "frame": np.arange(1 - k, 1, dtype=np.int32) * np.int32(layout.stride),
            "given": np.where(number == 0, 0, layout.overlap).astype(np.int32),
            "visible": plan_bank(features, k, **self._policy).visible,
        }

    def _stacked(self, rows: Sequence[tuple[dict, dict]]) -> tuple[dict, dict]:
        found = [row for row, _ in rows]
        damaged = {name: why for _, one in rows for name, why in one.items()}
        return {name: np.stack([row[name] for row in found]) for name in found[0]}, damaged


def _square(packed: np.ndarray, rows: int) -> np.ndarray:
    """float16 [at least R (R + 1) / 2, h, w, z] -> float32 [R, R, h, w, z]: m latent frames in row
    m - 1, zeros behind them.
    """
    out = np.zeros((rows, rows, *packed.shape[1:]), np.float32)
    out[np.tril_indices(rows)] = packed[: rows * (rows + 1) // 2]
    return out


def _check(data: Latents, batch: int, clips: int, seed: int, tails: int, readers: int) -> None:
    """Raises: InputError for settings that cannot be."""
    counts = ("batch", batch, 1), ("clips", clips, 1), ("tails", tails, 0), ("readers", readers, 0)
    for name, value, least in counts:
        if type(value) is not int or value < least:
            raise InputError(f"{name} is {value!r}; give a whole number from {least}")
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise InputError(f"seed is {seed!r}; give a number from 0 to {2**31 - 1}")
    if (most := int(data.clips.max())) < clips:
        raise InputError(
            f"samples of {clips} clips are asked for, {data.folder} has at most {most} in a row; "
            "ask for fewer, or encode longer videos, or with a larger --clips"
        )
    if tails > data.head.layout.tails:
        raise InputError(
            f"{tails} latent frames may be given at the end, {data.folder} has "
            f"{data.head.layout.tails} encoded alone; encode the videos with --tails {tails}, or "
            "give fewer"
        )
