# SPDX-License-Identifier: Apache-2.0
"""A sampling run in pieces: where it is divided changes nothing, and where the official samplers
divide it or begin it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.flow.sampling import (
    advance,
    begin,
    finish,
    noised,
    prepare,
    sample,
    shortened,
    switch_step,
)
from lvjax.flow.schedule import from_sigmas, make_schedule
from lvjax.flow.solvers import SOLVERS
from tests.tiny import relative

STEPS = 12


def noise(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, 3, 4, 4, 5)), jnp.float32)


def high(x, sigma, timestep, calls):
    return x - 0.6 * jnp.tanh(2 * x) + 0.3 * jnp.cos(3 * x) * sigma - 0.2, calls + 1


def low(x, sigma, timestep, calls):
    return 0.5 * x + 0.2 * jnp.sin(2 * x) + timestep / 5000, calls + 10


def two(x, sigma, timestep, calls):
    """`high` down to timestep 900, then `low`, in one function."""
    parts = high(x, sigma, timestep, calls), low(x, sigma, timestep, calls)
    return jax.tree.map(lambda a, b: jnp.where(timestep >= 900, a, b), *parts)


@pytest.mark.parametrize("window", [None, (0.3, 0.7)])
@pytest.mark.parametrize("name", SOLVERS)
def test_divided_anywhere_the_run_is_the_same(name, window):
    """In one program, and in two with the carry on the host between them."""
    schedule = make_schedule(STEPS, 5.0)
    whole, calls = jax.jit(
        lambda x: sample(high, x, schedule, name, window=window, aux=jnp.int32(0))
    )(noise())
    sampler = prepare(schedule, name, window)
    assert sampler.steps == calls
    start = begin(sampler, noise(), jnp.int32(0))
    for switch in (1, 5):
        first = jax.jit(lambda c, n=switch: advance(sampler, high, c, last=n))
        second = jax.jit(lambda c, n=switch: advance(sampler, high, c, n))
        apart, counted = finish(second(jax.device_get(first(start))))
        together, _ = finish(jax.jit(lambda c, a=first, b=second: b(a(c)))(start))
        assert counted == calls
        assert relative(apart, whole) <= 1e-6 and relative(together, whole) <= 1e-6
    assert advance(sampler, high, start, 3, 3) is start


@pytest.mark.parametrize("name", SOLVERS)
def test_two_velocities_share_a_history(name):
    schedule = make_schedule(STEPS, 5.0)
    switch = switch_step(schedule, 0.9)
    assert 1 < switch < STEPS - 1
    whole, calls = sample(two, noise(), schedule, name, aux=jnp.int32(0))
    sampler = prepare(schedule, name)
    carry = advance(sampler, high, begin(sampler, noise(), jnp.int32(0)), 0, switch)
    got, counted = finish(advance(sampler, low, carry, switch))
    assert relative(got, whole) <= 1e-6 and counted == calls == switch + 10 * (STEPS - switch)
    if name != "euler":  # which has none
        new = carry._replace(history=SOLVERS[name].init(carry.x))
        forgot, _ = finish(advance(sampler, low, new, switch))
        assert relative(forgot, whole) > 1e-3


@pytest.mark.parametrize("first, last", [(-1, 3), (4, 3), (0, STEPS + 1)])
def test_steps_that_are_not_there_are_refused(first, last):
    sampler = prepare(make_schedule(STEPS, 5.0), "unipc")
    with pytest.raises(InputError, match=f"{first} to {last} .* has {STEPS}"):
        advance(sampler, high, begin(sampler, noise()), first, last)


@pytest.mark.parametrize(
    "shift, boundary, parts", [(12.0, 0.875, (26, 14)), (5.0, 0.9, (15, 25))], ids=["t2v", "i2v"]
)
def test_the_official_switch_of_a14b(shift, boundary, parts):
    schedule = make_schedule(40, shift)
    switch = switch_step(schedule, boundary)
    assert (switch, schedule.steps - switch) == parts
    assert schedule.timesteps[switch - 1] >= 1000 * boundary > schedule.timesteps[switch]


def test_the_switch_goes_by_the_truncated_timestep():
    """Sigma .9005 is above the boundary .9003, its timestep 900 below; at .9 it is not below."""
    schedule = from_sigmas([0.95, 0.9005, 0.5, 0.0])
    assert switch_step(schedule, 0.9003) == 1 and switch_step(schedule, 0.9) == 2
    assert switch_step(schedule, 0.96) == 0 and switch_step(schedule, 0.1) == 3


@pytest.mark.parametrize(
    "strength, steps", [(1.0, 50), (0.8, 40), (0.58, 28), (0.5, 25), (0.021, 1)]
)
def test_a_strength_keeps_the_last_steps(strength, steps):
    """50 * 0.58 is 28.999999999999996, which diffusers truncates."""
    schedule = make_schedule(50, 3.0)
    rest = shortened(schedule, strength)
    assert rest.steps == steps and len(rest.sigmas) == steps + 1
    np.testing.assert_array_equal(rest.sigmas, schedule.sigmas[50 - steps :])
    np.testing.assert_array_equal(rest.timesteps, schedule.timesteps[50 - steps :])


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, float("nan")])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(InputError, match="at most 1"):
        shortened(make_schedule(50, 3.0), strength)


def test_a_strength_without_a_step_is_refused():
    with pytest.raises(InputError, match="1/50 or more"):
        shortened(make_schedule(50, 3.0), 0.019)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_noised_video_comes_back_on_a_straight_flow(name):
    """With v = eps - x0 every solver is exact, from wherever it starts."""
    data, eps = noise(1), noise(2)
    schedule = shortened(make_schedule(20, 5.0), 0.6)
    start = noised(data, eps, schedule)
    s = np.float32(schedule.sigmas[0])
    assert 0.5 < s < 0.95 and relative(start, (1 - s) * data + s * eps) <= 1e-6
    got, _ = sample(lambda x, s, t, aux: (eps - data, aux), start, schedule, name)
    assert relative(got, data) <= 1e-6
