# SPDX-License-Identifier: Apache-2.0
"""What a training run carries from step to step, and the step itself.

Owns: `TrainState`, its optimiser, its layout over a mesh, and `make_step`.  A step is a pure
function: every random draw is folded from the run's key and the number of the step.
Does not own: losses, data, and when a state is saved (loop.py, checkpoints.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from lvjax.core.errors import InputError
from lvjax.core.fields import check_fields, one_of, real, whole
from lvjax.core.params import flatten, unflatten


@struct.dataclass
class TrainState:
    """params: what is trained, float32.  ema: its running average.  opt: optax's state.  step:
    int32 [], steps done.  key: uint32, the data of the run's key.
    """

    params: Any
    ema: Any
    opt: Any
    step: jax.Array
    key: jax.Array


RANGES = {
    "steps": whole(),
    "learning_rate": real(0),
    "warmup": whole(0),
    "decay_from": real(0, 1),
    "b2": real(0, 1),
    "weight_decay": real(0),
    "clip": real(1e-12),
    "ema": real(0, 1),
    "seed": whole(0, 2**31 - 1),
    "save_every": real(0),
    "log_every": whole(),
    "accumulate": whole(),
    "nonfinite": one_of(("stop", "skip")),
    "sample_every": whole(0),
}


@dataclass(frozen=True)
class TrainOptions:
    """steps: of the whole run.  learning_rate: after `warmup` steps, in which it grows from zero,
    decaying linearly to zero from step `decay_from`·steps.

    b2, weight_decay: of AdamW, whose b1 is 0.9.  clip: the gradient's largest global norm.
    ema: decay of the average, lower at the beginning: min(ema, (1 + n) / (10 + n)).
    seed: of every random draw.  accumulate: parts that a batch is done in, one after another; the
      loss is the mean of theirs, each over the frames of its own rows.
    nonfinite: what a gradient that is not finite does: "stop" the run, or "skip" the step, at most
      ten in a row.
    save_every: seconds between checkpoints.  log_every, sample_every: steps; 0 makes no samples.
    Raises: InputError naming the field.
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
    accumulate: int = 1
    nonfinite: str = "stop"
    sample_every: int = 0

    def __post_init__(self):
        check_fields(self, "options", RANGES)


FREE = ("steps", "learning_rate", "save_every", "log_every", "sample_every")
"""Options that a run may go on with changed: what does not touch the steps that are done, and the
rate of a run that has diverged."""

IN_A_ROW = 10  # steps that "skip" leaves out before it gives up


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
    chain = optax.chain(
        optax.clip_by_global_norm(o.clip), optax.adamw(rate, b2=o.b2, weight_decay=o.weight_decay)
    )
    return chain if o.nonfinite == "stop" else optax.apply_if_finite(chain, IN_A_ROW)


def init_state(params, optimizer, seed: int = 0) -> TrainState:
    """The state before the first step, which takes over the parameters (a step donates them); the
    average begins as a copy.
    """
    key = jax.random.key_data(jax.random.key(seed))
    step = jnp.zeros((), jnp.int32)
    return TrainState(params, jax.tree.map(jnp.copy, params), optimizer.init(params), step, key)


# ---- which parameters --------------------------------------------------------------


def split(tree, fixed: Iterable[str] = ()) -> tuple[dict, dict]:
    """(trained, fixed): a tree of parameters, or a spec, divided by path.

    fixed: subtrees that keep their values, by path from the root, such as "dit/text_embedding".
    Raises: InputError for a path that is not there.
    """
    flat, fixed = flatten(tree), tuple(f"{path}/" for path in fixed)
    for path in fixed:
        if not any(f"{name}/".startswith(path) for name in flat):
            raise InputError(f"there are no parameters {path[:-1]!r}; they begin {sorted(tree)}")
    stays = {name for name in flat if f"{name}/".startswith(fixed)}
    return tuple(
        unflatten({name: leaf for name, leaf in flat.items() if (name in stays) == kept})
        for kept in (False, True)
    )


def joined(trained, fixed) -> dict:
    """The tree that `split` divided."""
    return unflatten(flatten(trained) | flatten(fixed))


# ---- over a mesh -------------------------------------------------------------------


def state_shardings(state: TrainState, shardings: dict, mesh) -> TrainState:
    """Where each array of a state lies, given that for the parameters (`core.mesh.shardings`, of
    what is trained): the average and the optimiser's moments lie as they do, the rest everywhere.
    """
    places, everywhere = flatten(shardings), NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = [p for n, p in places.items() if name.endswith(f"/{n}")]
        return found[0] if found and leaf.ndim else everywhere

    return jax.tree_util.tree_map_with_path(place, state)


# ---- the step ----------------------------------------------------------------------


def make_step(loss: Callable, optimizer, o: TrainOptions, places=None) -> Callable:
    """One optimiser step, jitted: step(state, fixed, batch) -> (state, metrics); the state is
    donated.

    loss(params, batch, key) -> (scalar, {name: scalar}), of the trained and fixed parameters
      joined.  batch: arrays with the rows of the batch first.
    places: where the arrays of the state lie over a mesh, and are to stay (`state_shardings`);
      without it the compiler may lay them out anew.
    metrics: those of the loss, "loss" and "grad_norm", float32; with nonfinite="skip" also
      "skipped", steps left out so far, and "in_a_row".
    Raises: InputError for a batch that does not divide into `o.accumulate` parts.
    """

    def gradients(params, fixed, batch, key):
        def value(params):
            return loss(joined(params, fixed), batch, key)

        (found, metrics), grads = jax.value_and_grad(value, has_aux=True)(params)
        return grads, metrics | {"loss": found}

    def step(state: TrainState, fixed, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, metrics = _accumulated(gradients, state.params, fixed, batch, key, o.accumulate)
        metrics["grad_norm"] = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its int32 counter with floats
            updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        if o.nonfinite == "skip":
            metrics["skipped"] = opt.total_notfinite.astype(jnp.float32)
            metrics["in_a_row"] = opt.notfinite_count.astype(jnp.float32)
        n = state.step.astype(jnp.float32)
        decay = jnp.minimum(o.ema, (1 + n) / (10 + n))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
        return TrainState(params, ema, opt, state.step + 1, state.key), metrics

    if places is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None))


def _accumulated(gradients: Callable, params, fixed, batch, key, parts: int):
    """Gradients and metrics, the mean over `parts` of a batch; part i has the rows i, i + parts,
    ..., so that a batch that is spread over devices stays where it is.
    """
    if parts == 1:
        return gradients(params, fixed, batch, key)
    rows = {len(a) for a in jax.tree.leaves(batch)}
    if any(n % parts for n in rows):
        raise InputError(f"a batch of {max(rows)} rows is no multiple of accumulate={parts}")
    batch = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1), batch)
    like = jax.eval_shape(lambda b: gradients(params, fixed, b, key), jax.tree.map(_first, batch))
    total = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

    def add(total, xs):
        part, index = xs
        found = gradients(params, fixed, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, found), None

    total, _ = jax.lax.scan(add, total, (batch, jnp.arange(parts)))
    return jax.tree.map(lambda a: a / parts, total)


def _first(a):
    return a[0]
