# SPDX-License-Identifier: Apache-2.0
"""The training loop: from the newest checkpoint to the last step, with metrics, samples, and an
orderly end at any moment.

A batch comes from a `Feed`, whose position is saved with the state: a run that was killed goes on
with the same batches, and ends with the same parameters, bit for bit.
Does not own: the step (state.py), the checkpoints (checkpoints.py), losses and data.
"""

import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax

from lvjax.core.checkpoint import write_atomic
from lvjax.core.errors import InputError, NonFiniteError
from lvjax.core.mesh import shard_batch
from lvjax.core.signals import Stop, interruptible, stoppable
from lvjax.train.checkpoints import Checkpoints
from lvjax.train.state import IN_A_ROW, TrainOptions, TrainState

METRICS = "metrics.jsonl"


class Feed(Protocol):
    """Batches in order: trees of arrays on the host, the rows of the batch first."""

    def __next__(self) -> Any:
        """The next batch."""

    def position(self) -> dict:
        """JSON: where the next batch is."""

    def seek(self, position: dict) -> None:
        """Go to where `position` said; {} is the beginning."""


class Indexed:
    """Batches that are a function of their number."""

    def __init__(self, batches: Callable[[int], Any]):
        self.batches, self.next = batches, 0

    def __next__(self) -> Any:
        batch = self.batches(self.next)
        self.next += 1
        return batch

    def position(self) -> dict:
        """The number of the next batch."""
        return {"batch": self.next}

    def seek(self, position: dict) -> None:
        """See `Feed`."""
        self.next = position.get("batch", 0)


class Metrics:
    """JSON lines in `folder`; lines after `step` of an interrupted run are dropped, so the curve
    has no repeats.  tensorboard: also in its format.

    Raises: InputError when TensorBoard's writer is not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False):
        self.path, self._board = folder / METRICS, None
        if self.path.exists():
            lines = [x for x in self.path.read_text().splitlines() if _step_of(x) <= step]
            write_atomic(self.path, "".join(x + "\n" for x in lines).encode())
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as e:
                raise InputError(
                    "TensorBoard's writer is not installed; pip install 'lvjax[log]', or leave "
                    "tensorboard out"
                ) from e
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        """Append one line."""
        short = {k: float(f"{v:.9g}") for k, v in values.items()}  # float32 comes back as it is
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, **short}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what TensorBoard's writer still holds."""
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    """The step of a line, infinity where a kill has cut it short."""
    return json.loads(line)["step"] if line.endswith("}") else math.inf


@dataclass
class Outside:
    """What happens beside training.

    seconds: at most this long.  report: called with every logged line.  sample: called with the
    state every `sample_every` steps, when it is saved; outside the mesh, whatever `fit` trains on.
    tensorboard: see `Metrics`.
    """

    seconds: float = math.inf
    report: Callable[[dict], None] = lambda line: None
    sample: Callable[[TrainState], None] = lambda state: None
    tensorboard: bool = False


def fit(
    step: Callable,
    state: TrainState,
    feed: Feed,
    o: TrainOptions,
    folder,
    *,
    fixed=None,
    mesh=None,
    outside: Outside | None = None,
) -> TrainState:
    """Train to `o.steps` from the newest checkpoint in `folder`, else from `state`.

    step: of `make_step`.  state, fixed: where they are to be, on the mesh; with a checkpoint the
      state is better `jax.ShapeDtypeStruct`s with shardings, or there are two in memory.
    mesh: None for one device.
    SIGINT and SIGTERM wait for the step in flight and a checkpoint, then take their course; a
      sample they end at once.  A second SIGINT interrupts the step too, and nothing is saved.
    Raises: NonFiniteError when the loss or a gradient is not finite; the last checkpoint stays.
      CheckpointError, StorageError as `Checkpoints`.
    """
    outside, fixed, folder = outside or Outside(), {} if fixed is None else fixed, Path(folder)
    with Checkpoints(folder) as saved, stoppable() as stop:
        if saved.newest is not None:
            state, position = saved.restore(state)
            feed.seek(position)
        n = first = int(state.step)
        look, step, values = _Looks(n, saved), _over(mesh, step), {}
        with closing(Metrics(folder, n, outside.tensorboard)) as metrics:
            start = kept = mark = time.monotonic()
            while n < o.steps and time.monotonic() - start < outside.seconds:
                state, values = step(state, fixed, next(feed))
                n += 1
                if n % o.log_every == 0 or n == o.steps:
                    line, now = look(values, n), time.monotonic()
                    line = {"seconds_per_step": (now - mark) / (n - first), **line}
                    mark, first = now, n
                    metrics.write(n, **line)
                    outside.report({"step": n, **line})
                sample = o.sample_every and n % o.sample_every == 0
                if stop.signal is None and (time.monotonic() - kept > o.save_every or sample):
                    look(values, n)
                    saved.save(state, feed.position())
                    kept = time.monotonic()
                if sample:
                    began = time.monotonic()
                    _sample(outside.sample, state, stop)
                    mark += time.monotonic() - began  # it is no time of a step
                if stop.signal is not None:
                    break
            if values:
                look(values, n)
            saved.save(state, feed.position())
    if stop.signal is not None:
        signal.raise_signal(stop.signal)
    return state


def _over(mesh, step: Callable) -> Callable:
    """The step for a batch on the host; only it sees the mesh, and no sample does."""

    def spread(state: TrainState, fixed, batch):
        with jax.set_mesh(mesh):
            return step(state, fixed, shard_batch(batch, mesh))

    return step if mesh is None else spread


def _sample(sample: Callable[[TrainState], None], state: TrainState, stop: Stop) -> None:
    """Make a sample of a state that is saved, unless a signal came, and until one comes."""
    try:
        with interruptible():
            if stop.signal is None:
                sample(state)
    except KeyboardInterrupt as e:
        stop.signal = e.args[0] if e.args else signal.SIGINT


class _Looks:
    """The metrics of those steps that are looked at; the others cost no wait for the device."""

    def __init__(self, step: int, saved: Checkpoints):
        self._seen, self._saved = step, saved

    def __call__(self, values: dict, step: int) -> dict[str, float]:
        """As floats; the gradient norm among them is finite only if all is.

        With "skip" they are not finite in a step that was left out, and that is no error until the
        optimiser gives up.
        Raises: NonFiniteError.
        """
        values = {k: float(v) for k, v in values.items()}
        wrong = {k: v for k, v in values.items() if not math.isfinite(v)}
        if wrong and not values.get("in_a_row", math.inf) <= IN_A_ROW:
            raise NonFiniteError(self._words(wrong, step))
        self._seen = step
        return {k: v for k, v in values.items() if k not in wrong}

    def _words(self, wrong: dict[str, float], step: int) -> str:
        name, newest = "loss" if "loss" in wrong else min(wrong), self._saved.newest
        since = f", none since {self._seen} was looked at" if self._seen < step - 1 else ""
        there = f"it resumes from step {newest} in {self._saved.folder}"
        there = "there is no checkpoint yet" if newest is None else there
        return (
            f"{name} is {wrong[name]} at step {step}{since}; lower the learning rate and rerun: "
            f"{there}"
        )
