# SPDX-License-Identifier: Apache-2.0
"""The training loop: optimiser, EMA, snapshots that resume exactly, metrics as JSON lines.

A batch is a function of the step and every random draw is folded from the step, so a snapshot
(parameters, EMA, optimiser state, step) is the whole state of a run, the data position included.
Losses are elsewhere in this package.
"""

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from lvjax.core.checkpoint import load_arrays, restore_tree, save_arrays, tree_arrays
from lvjax.core.errors import NonFiniteError
from lvjax.core.mesh import make_mesh, shard_batch
from lvjax.core.signals import stoppable


@struct.dataclass
class TrainState:
    """params, ema: parameter trees (float32).  opt: optax state.  step: int32, steps done."""

    params: Any
    ema: Any
    opt: Any
    step: jax.Array


SNAPSHOT = "snapshot.safetensors"  # in the folder of a stage


@dataclass(frozen=True)
class TrainOptions:
    """steps: of the whole run.  learning_rate: after `warmup` steps, decaying linearly to zero from
    step `decay_from`·steps.

    ema: decay of the average, lower at the beginning: min(ema, (1 + n) / (10 + n)).  save_every:
      seconds between snapshots.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    decay_from: float = 0.4
    b2: float = 0.99
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    save_every: float = 60.0
    log_every: int = 20


def make_optimizer(o: TrainOptions) -> optax.GradientTransformation:
    """AdamW with global-norm clipping and a trapezoidal learning rate."""
    hold = max(int(o.steps * o.decay_from), o.warmup)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, o.learning_rate, o.warmup),
            optax.constant_schedule(o.learning_rate),
            optax.linear_schedule(o.learning_rate, 0.0, max(o.steps - hold, 1)),
        ],
        [o.warmup, hold],
    )
    return optax.chain(
        optax.clip_by_global_norm(o.clip), optax.adamw(rate, b2=o.b2, weight_decay=o.weight_decay)
    )


def init_state(params, optimizer) -> TrainState:
    """The state before the first step; the average begins at the parameters."""
    return TrainState(
        params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32)
    )


def make_step(loss: Callable, optimizer, o: TrainOptions, frozen: tuple[str, ...] = ()) -> Callable:
    """`loss(params, batch, key) -> (scalar, metrics)`; returns step(state, batch) -> (state,
    metrics), jitted, state donated.

    frozen: subtrees that keep their values, by path from the root, such as "dit/text_embedding".
    """

    def step(state: TrainState, batch):
        key = jax.random.fold_in(jax.random.key(o.seed), state.step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        grads = _without(grads, frozen)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its int32 counter with floats
            updates, opt = optimizer.update(grads, state.opt, state.params)
        updates = _without(updates, frozen)
        params = optax.apply_updates(state.params, updates)
        n = state.step.astype(jnp.float32)
        decay = jnp.minimum(o.ema, (1 + n) / (10 + n))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
        metrics = metrics | {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return TrainState(params, ema, opt, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def _without(tree, frozen: tuple[str, ...]):
    """The tree with zeros in the frozen subtrees."""

    def leaf(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/") + "/"
        return jnp.zeros_like(x) if any(name.startswith(f + "/") for f in frozen) else x

    return jax.tree_util.tree_map_with_path(leaf, tree) if frozen else tree


def save_snapshot(path, state: TrainState, meta: dict | None = None) -> None:
    """Write a state as `load_snapshot` reads it, atomically."""
    save_arrays(path, tree_arrays(state), (meta or {}) | {"step": int(state.step)})


def load_snapshot(path, like: TrainState) -> TrainState:
    """Raises: CheckpointError when the file is damaged or of another model."""
    arrays, _ = load_arrays(path)
    return jax.tree.map(jnp.asarray, restore_tree(like, arrays, str(path)))


class Metrics:
    """JSON lines in `path`; lines after `step` of an interrupted run are dropped, so the curve has
    no repeats.
    """

    def __init__(self, path, step: int):
        self.path = Path(path)
        if self.path.exists():
            lines = [
                x
                for x in self.path.read_text().splitlines()
                if x.endswith("}") and json.loads(x)["step"] <= step
            ]
            self.path.write_text("".join(x + "\n" for x in lines))

    def write(self, **values) -> None:
        """Append one line."""
        with self.path.open("a") as f:
            f.write(
                json.dumps(
                    {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
                )
                + "\n"
            )


def fit(
    step: Callable,
    state: TrainState,
    batches: Callable[[int], Any],
    o: TrainOptions,
    folder,
    *,
    seconds: float | None = None,
    devices: int = 1,
    report=None,
) -> TrainState:
    """Train to `o.steps` from the newest snapshot in `folder`, for at most `seconds` if given.

    batches: step number -> pytree of arrays with the batch first.  report: called with each logged
      dict.
    SIGINT and SIGTERM wait for the step in flight and a snapshot, then take their course.
    Raises: NonFiniteError when the loss is not finite; the last snapshot stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    snapshot = folder / SNAPSHOT
    if snapshot.exists():
        state = load_snapshot(snapshot, state)
    mesh = make_mesh(data=devices)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    metrics = Metrics(folder / "metrics.jsonl", int(state.step))
    start = saved = mark = time.monotonic()
    n = first = begun = int(state.step)
    with stoppable() as stop:
        while n < o.steps and (seconds is None or time.monotonic() - start < seconds):
            state, values = step(state, shard_batch(batches(n), mesh))
            n += 1
            if n % o.log_every == 0 or n == o.steps:
                values = _finite(values, n, snapshot)
                now = time.monotonic()
                line = {"step": n, "seconds_per_step": (now - mark) / (n - first), **values}
                mark, first = now, n
                metrics.write(**line)
                if report:
                    report(line)
            if stop.signal is not None:
                break
            if time.monotonic() - saved > o.save_every:
                _finite(values, n, snapshot)
                save_snapshot(snapshot, state)
                saved = time.monotonic()
        if n > begun:
            _finite(values, n, snapshot)
        save_snapshot(snapshot, state)
    if stop.signal is not None:
        signal.raise_signal(stop.signal)
    return state


def _finite(values: dict, step: int, snapshot) -> dict[str, float]:
    """The metrics of a step as floats; the gradient norm among them is finite only if all is."""
    values = {k: float(v) for k, v in values.items()}
    if not all(map(math.isfinite, values.values())):
        raise NonFiniteError(
            f"step {step}: loss is {values['loss']}; lower the learning rate and rerun: it "
            f"resumes from {snapshot}"
        )
    return values
