# SPDX-License-Identifier: Apache-2.0
"""Training spread over a mesh, by rows, parameters and tokens, gives the curve of one device, and
goes on from its checkpoint on another mesh.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from lvjax.core.mesh import make_mesh, shard_batch, shardings
from lvjax.models.dit import dit_spec
from lvjax.train.checkpoints import Checkpoints
from lvjax.train.extension import ExtensionTask, extension_loss
from lvjax.train.state import (
    TrainOptions,
    TrainState,
    init_state,
    make_optimizer,
    make_step,
    state_shardings,
)
from tests.drawn import drawn
from tests.tiny import DIT, relative

STEPS = 5
OPTIONS = TrainOptions(STEPS, 1e-3, 1, accumulate=2)
TASK = ExtensionTask(memory_layers=(1, 2), trained=2)
SPEC = {"dit": dit_spec(replace(DIT, num_heads=2))}


def batch(n):
    rng = np.random.default_rng(n)
    return {
        "latents": rng.standard_normal((4, 2, 4, 4, 4, 16)).astype(np.float32),
        "text": rng.standard_normal((4, 2, 5, 16)).astype(np.float32),
        "null": np.zeros((4, 5, 16), np.float32),
        "least": np.zeros((4, 2), np.int32),
        "frame": np.tile([0, 3], (4, 1)).astype(np.int32),
        "given": np.tile([0, 1], (4, 1)).astype(np.int32),
        "visible": np.ones((4, 2, 2), bool),
    }


def begin(mesh):
    state = init_state(drawn(SPEC, 0), make_optimizer(OPTIONS))
    return jax.device_put(state, state_shardings(state, shardings(SPEC, mesh), mesh))


LOSS = extension_loss(DIT, lambda params, rows: rows, TASK)


class Trained(NamedTuple):
    """step: compiled.  folder: of the checkpoint after two steps.  state: the last."""

    step: Callable
    folder: Path
    state: TrainState
    losses: list[float]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The training run over a mesh, by its shape."""

    @cache
    def run(shape):
        mesh, folder = make_mesh(*shape), tmp_path_factory.mktemp("run")
        step = make_step(LOSS, make_optimizer(OPTIONS), OPTIONS)
        state, losses = train(step, mesh, begin(mesh), range(2))
        with Checkpoints(folder) as saved:
            saved.save(state, {"batch": 2})
        state, more = train(step, mesh, state, range(2, STEPS))
        return Trained(step, folder, state, losses + more)

    return run


def train(step, mesh, state, batches):
    losses = []
    with jax.set_mesh(mesh):
        for n in batches:
            state, metrics = step(state, {}, shard_batch(batch(n), mesh))
            losses.append(float(metrics["loss"]))
    return state, losses


ONE, ALL = (1, 1, 1), (2, 2, 2)
LONG = [pytest.param(shape, marks=pytest.mark.long) for shape in ((2, 1, 4), (1, 2, 1))]


@pytest.mark.parametrize("shape", [ALL, *LONG], ids=str)
def test_the_curve_is_that_of_one_device(runs, shape):
    one, run = runs(ONE), runs(shape)
    np.testing.assert_allclose(run.losses, one.losses, rtol=1e-5)
    kernel = run.state.params["dit"]["blocks"]["ffn"]["fc1"]["kernel"]
    for tree in (run.state.params, run.state.ema, run.state.opt[1][0].mu):
        leaf = tree["dit"]["blocks"]["ffn"]["fc1"]["kernel"]
        assert leaf.addressable_shards[0].data.size * shape[1] == leaf.size
    assert relative(kernel, one.state.params["dit"]["blocks"]["ffn"]["fc1"]["kernel"]) < 1e-4


def test_tokens_are_really_spread():
    mesh = make_mesh(1, 1, 4)
    with jax.set_mesh(mesh):
        given = begin(mesh).params, shard_batch(batch(0), mesh), jax.random.key(0)
        program = jax.jit(LOSS).lower(*given).compile().as_text()
    assert "all-gather" in program  # of keys and values, which every query sees


@pytest.mark.parametrize("there, here", [(ALL, ONE), (ONE, ALL)], ids=str)
def test_a_checkpoint_goes_on_elsewhere(runs, there, here):
    mesh = make_mesh(*here)
    with Checkpoints(runs(there).folder) as saved:
        state, position = saved.restore(begin(mesh))
    assert position == {"batch": 2} and int(state.step) == 2
    _, losses = train(runs(here).step, mesh, state, range(2, STEPS))
    np.testing.assert_allclose(losses, runs(ONE).losses[2:], rtol=1e-5)
