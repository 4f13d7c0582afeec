# SPDX-License-Identifier: Apache-2.0
"""Every window read off one recorded run is what sampling with that window gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.flow.sampling import sample
from lvjax.flow.schedule import make_schedule
from lvjax.flow.trajectory import trajectory, windowed
from tests.tiny import relative

NOISE = jax.random.normal(jax.random.key(0), (2, 5, 3))
WINDOWS = ((0.0, 1.0), (0.0, 0.7), (0.3, 0.7), (0.05, 0.1), (0.613, 0.7), (0.31, 0.9999))


def velocity(x, sigma, timestep, aux):
    """Of a curved field, which counts its calls and sums what it is told."""
    v = jnp.sin(3 * x) + (sigma + timestep / 1000) * x
    return v, {"calls": aux["calls"] + 1, "told": aux["told"] + timestep}


def start():
    return {"calls": jnp.array(0, jnp.int32), "told": jnp.array(0.0, jnp.float32)}


@pytest.mark.parametrize("kind", ["euler", "unipc", "dpm++"])
@pytest.mark.parametrize("axis", ["flow", "index"])
def test_windows_of_one_run_are_those_of_the_sampler(kind, axis):
    schedule = make_schedule(12, 3.0, kind)
    states, aux = trajectory(velocity, NOISE, schedule, kind, aux=start())
    assert states.shape == (13, *NOISE.shape) and int(aux["calls"]) == 12
    assert float(aux["told"]) == pytest.approx(schedule.timesteps.sum())
    np.testing.assert_array_equal(states[0], NOISE)
    plain, _ = sample(velocity, NOISE, schedule, kind, aux=start())
    np.testing.assert_array_equal(states[-1], plain)
    for window in WINDOWS:
        want, _ = sample(velocity, NOISE, schedule, kind, window=window, axis=axis, aux=start())
        found = windowed(np.asarray(states), schedule, window, axis)
        assert found.dtype == np.float32
        narrow = window == (0.05, 0.1)  # where the sampler's own float32 sum loses most
        assert relative(found, want) < (3e-6 if narrow else 1e-6), window


def test_states_behind_the_window_do_not_matter_and_those_before_do():
    schedule = make_schedule(10, 1.0, "euler")
    states = np.asarray(trajectory(velocity, NOISE, schedule, "euler", aux=start())[0])
    whole = windowed(states, schedule, (0.3, 0.7))
    late, within = states.copy(), states.copy()
    late[8:] = np.nan  # tau .8 and on
    np.testing.assert_array_equal(windowed(late, schedule, (0.3, 0.7)), whole)
    within[7] += 1
    assert relative(windowed(within, schedule, (0.3, 0.7)), whole) > 0.1
    with pytest.raises(InputError, match="must satisfy"):
        windowed(states, schedule, (0.7, 0.3))
