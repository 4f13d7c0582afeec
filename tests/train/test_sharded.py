# SPDX-License-Identifier: Apache-2.0
"""Training spread over a mesh, by rows, parameters and tokens, gives the curve of one device, and
goes on from its checkpoint on another mesh.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from lvjax.core.mesh import make_mesh, shard_batch, shardings
from lvjax.models.dit import dit_spec
from lvjax.train.checkpoints import Checkpoints
from lvjax.train.extension import ExtensionTask, extension_loss
from lvjax.train.state import TrainOptions, init_state, make_optimizer, make_step, state_shardings
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


def new_step():
    loss = extension_loss(DIT, lambda params, rows: rows, TASK)
    return make_step(loss, make_optimizer(OPTIONS), OPTIONS)


def train(mesh, state, first=0):
    step = make_step(
        extension_loss(DIT, lambda params, rows: rows, TASK), make_optimizer(OPTIONS), OPTIONS
    )
    losses = []
    with jax.set_mesh(mesh):
        for n in range(first, STEPS):
            state, metrics = step(state, {}, shard_batch(batch(n), mesh))
            losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def one():
    return train(make_mesh(), begin(make_mesh()))


LONG = [pytest.param(shape, marks=pytest.mark.long) for shape in ((2, 1, 4), (1, 2, 1))]


@pytest.mark.parametrize("shape", [(2, 2, 2), *LONG], ids=str)
def test_the_curve_is_that_of_one_device(one, shape):
    mesh = make_mesh(*shape)
    state, losses = train(mesh, begin(mesh))
    np.testing.assert_allclose(losses, one[1], rtol=1e-5)
    kernel = state.params["dit"]["blocks"]["ffn"]["fc1"]["kernel"]
    for tree in (state.params, state.ema, state.opt[1][0].mu):
        leaf = tree["dit"]["blocks"]["ffn"]["fc1"]["kernel"]
        assert leaf.addressable_shards[0].data.size * shape[1] == leaf.size
    assert relative(kernel, one[0].params["dit"]["blocks"]["ffn"]["fc1"]["kernel"]) < 1e-4


def test_tokens_are_really_spread():
    mesh = make_mesh(1, 1, 4)
    step = make_step(
        extension_loss(DIT, lambda params, rows: rows, TASK), make_optimizer(OPTIONS), OPTIONS
    )
    with jax.set_mesh(mesh):
        program = step.lower(begin(mesh), {}, shard_batch(batch(0), mesh)).compile().as_text()
    assert "all-gather" in program  # of keys and values, which every query sees


def test_a_checkpoint_goes_on_elsewhere(one, tmp_path):
    mesh, other = make_mesh(2, 2, 2), make_mesh(1, 2, 1)
    state = begin(mesh)
    step = make_step(
        extension_loss(DIT, lambda params, rows: rows, TASK), make_optimizer(OPTIONS), OPTIONS
    )
    with jax.set_mesh(mesh):
        for n in range(2):
            state, _ = step(state, {}, shard_batch(batch(n), mesh))
    with Checkpoints(tmp_path) as saved:
        saved.save(state, {"batch": 2})
        state, position = saved.restore(begin(other))
    assert position == {"batch": 2} and int(state.step) == 2
    _, losses = train(other, state, first=2)
    np.testing.assert_allclose(losses, one[1][2:], rtol=1e-5)
