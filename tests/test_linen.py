# SPDX-License-Identifier: Apache-2.0
"""The Linen face has the functional tree, gives the same bits, and trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from lvjax.core.params import abstract
from lvjax.linen import WanDiT
from lvjax.models.dit import dit, dit_spec, embed_context
from tests.tiny import SMALL_DIT as CFG


def batch():
    key = jax.random.key(0)
    latents, condition, text = (
        jax.random.normal(jax.random.fold_in(key, i), s)
        for i, s in enumerate(((2, 2, 4, 4, 4), (2, 2, 4, 4, 3), (2, 5, 8)))
    )
    return latents, jnp.array([900.0, 20.5]), text, condition


def test_linen_face():
    latents, timestep, text, condition = batch()
    model = WanDiT(CFG)
    variables = jax.eval_shape(model.init, jax.random.key(1), latents, timestep, text)
    assert variables == {"params": abstract(dit_spec(CFG))}
    leaves, tree = jax.tree.flatten(variables["params"])
    rng = np.random.default_rng(0)
    draws = [0.3 * rng.normal(size=a.shape).astype(np.float32) for a in leaves]
    params = jax.tree.unflatten(tree, draws)

    def functional(params, latents, timestep, text, condition):
        context = embed_context(params, text, CFG)
        return dit(params, latents, timestep, context, CFG, condition=condition)[0]

    def face(params, latents, timestep, text, condition):
        return model.apply({"params": params}, latents, timestep, text, condition=condition)[0]

    args = (params, latents, timestep, text, condition)
    out = jax.jit(face)(*args)
    np.testing.assert_array_equal(out, jax.jit(functional)(*args))
    assert float(jnp.abs(out).max()) > 0.1

    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-3))

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: (face(p, *args[1:]) ** 2).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
        for _ in range(2):
            state, loss = step(state)
            losses.append(float(loss))
    assert losses[1] < losses[0]


def test_context_computed_before():
    latents, timestep, text, _ = batch()
    model = WanDiT(CFG)
    variables = jax.jit(lambda k: model.init(k, latents, timestep, text))(jax.random.key(1))
    assert float(jnp.abs(variables["params"]["blocks"]["ffn"]["fc1"]["kernel"]).max()) > 0
    assert float(jnp.abs(variables["params"]["head"]["linear"]["kernel"]).max()) == 0
    context = jax.jit(lambda v, t: model.apply(v, t, method="embed_context"))(variables, text)
    assert context.k.shape == (2, 2, 6, 2, 24)
