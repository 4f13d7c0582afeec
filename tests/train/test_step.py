# SPDX-License-Identifier: Apache-2.0
"""One optimiser step: a batch in parts is the batch, and AdamW is as its options say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lvjax.train.state import TrainOptions, init_state, make_optimizer, make_step


def loss(params, batch, key):
    return jnp.square(batch["x"] * params["w"][None] - batch["y"]).mean(), {}


def batch():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((8, 3)).astype(np.float32) for name in "xy"}


def after(o: TrainOptions, steps: int):
    optimizer = make_optimizer(o)
    step, state = make_step(loss, optimizer, o), init_state({"w": jnp.ones(3)}, optimizer)
    for _ in range(steps):
        state, metrics = step(state, {}, batch())
    return state, metrics


@pytest.mark.parametrize("parts", (2, 4, 8))
def test_parts_of_a_batch_give_the_step_of_the_whole(parts):
    found = [after(TrainOptions(9, 0.1, 0, accumulate=n), 2) for n in (1, parts)]
    whole, divided = ((state.params["w"], metrics) for state, metrics in found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), whole, divided)
    assert not np.allclose(whole[0], 1, atol=0.01)


def test_three_steps_are_those_of_torch():
    """Clipped by global norm, warmed up from zero, held, and decaying to zero."""
    o = TrainOptions(4, 0.1, 1, 0.5, b2=0.98, weight_decay=0.1, clip=0.05)
    data = {k: torch.from_numpy(v) for k, v in batch().items()}
    w = torch.ones(3, requires_grad=True)
    theirs = torch.optim.AdamW([w], lr=0.1, betas=(0.9, 0.98), weight_decay=0.1, eps=1e-8)
    for rate in (0.0, 0.1, 0.1):
        theirs.param_groups[0]["lr"] = rate
        theirs.zero_grad()
        (data["x"] * w - data["y"]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([w], 0.05)
        theirs.step()
    state, _ = after(o, 3)
    np.testing.assert_allclose(state.params["w"], w.detach().numpy(), rtol=1e-5)
    ema = np.asarray(state.ema["w"])
    assert np.all(np.abs(ema - 1) < np.abs(np.asarray(state.params["w"]) - 1) + 1e-7)
