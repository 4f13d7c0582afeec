# SPDX-License-Identifier: Apache-2.0
"""Few-step sampling: the published levels, the update against the public loop's formula, and that
it finds the data of a Gaussian.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.flow.few_step import few_step_schedule, sample_few


@pytest.mark.parametrize(
    ("shift", "timesteps"),
    [(5.0, [1000, 937.5, 833.333, 625]), (8.0, [1000, 960, 888.889, 727.273])],
)
def test_the_published_levels(shift, timesteps):
    made = few_step_schedule(shift=shift)
    np.testing.assert_allclose(made.timesteps, timesteps, rtol=1e-6)
    np.testing.assert_allclose(made.sigmas, [*(np.array(timesteps) / 1000), 0], rtol=1e-6)


@pytest.mark.parametrize("steps", [(), (900, 500), (1000, 500, 0), (1000, 500, 700), ((1000,),)])
def test_lists_that_are_refused(steps):
    with pytest.raises(InputError):
        few_step_schedule(steps)


def test_each_step_denoises_and_adds_fresh_noise():
    schedule = few_step_schedule()
    noise = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32)
    weight = np.float32(0.3)

    def velocity(x, sigma, timestep, aux):
        return weight * x + timestep / 1000, (*aux[1:], x)

    start = tuple(jnp.zeros((3, 4)) for _ in range(4))
    made, states = sample_few(velocity, lambda i: jnp.asarray(noise)[i], schedule, aux=start)
    x, seen = noise[0], []
    for i, (s, after) in enumerate(
        zip([1, 0.9375, 5 / 6, 0.625], [0.9375, 5 / 6, 0.625, 0], strict=True)
    ):
        seen.append(x)
        clean = x - s * (weight * x + s)
        x = (1 - after) * clean + after * noise[i + 1]
    np.testing.assert_allclose(made, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.stack(states), seen, rtol=1e-5, atol=1e-6)


def test_the_right_velocity_of_a_gaussian_gives_its_mean_and_spread():
    """x0 ~ N(m, s^2): re-noising with the true posterior mean keeps the mean, and narrows."""
    m, s = 0.7, 0.5

    def velocity(x, sigma, timestep, aux):
        a, total = 1 - sigma, (1 - sigma) ** 2 * s**2 + sigma**2
        clean = m + a * s**2 / total * (x - a * m)
        return (x - clean) / sigma, aux

    def draw(i):
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (20_000,))

    made, _ = sample_few(velocity, draw, few_step_schedule(), aux=None)
    assert float(made.mean()) == pytest.approx(m, abs=0.01)
    assert 0.1 < float(made.std()) < s
