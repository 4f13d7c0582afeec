# SPDX-License-Identifier: Apache-2.0
"""T-RFlow: identities, the gain table, early stopping, and why it stops a chain of clips from
drifting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.flow.sampling import sample
from lvjax.flow.schedule import from_sigmas, make_schedule
from lvjax.flow.solvers import SOLVERS
from lvjax.flow.truncated import flow_window, gain, state_weights, step_weights, steps_needed
from tests.tiny import relative

WINDOWS = [(0.0, 1.0), (0.0, 0.7), (0.3, 0.7), (0.2, 0.8), (0.5, 0.7)]
GAINS = {  # conditional standard deviation -> gain for each window, two digits
    0.05: [1, 0.06, 0.09, 0.13, 0.14],
    0.1: [1, 0.12, 0.19, 0.25, 0.28],
    0.2: [1, 0.22, 0.36, 0.46, 0.53],
    0.5: [1, 0.46, 0.73, 0.80, 1.02],
    1.0: [1, 0.66, 1.00, 1.00, 1.27],
    2.0: [1, 0.81, 1.14, 1.10, 1.28],
    5.0: [1, 0.92, 1.13, 1.11, 1.16],
}


def noise(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, 3, 4, 4, 5)), jnp.float32)


def velocity(x, sigma, timestep, aux):
    return x - 0.6 * jnp.tanh(2 * x) + 0.3 * jnp.cos(3 * x) * sigma - 0.2, aux


@pytest.mark.parametrize("axis", ["flow", "index"])
@pytest.mark.parametrize("kind", ["unipc", "dpm++"])
@pytest.mark.parametrize("name", list(SOLVERS))
def test_the_whole_window_is_the_sampler(name, kind, axis):
    schedule = make_schedule(12, 5.0, kind=kind)
    whole, _ = sample(velocity, noise(), schedule, name)
    windowed, _ = sample(velocity, noise(), schedule, name, window=(0.0, 1.0), axis=axis)
    assert relative(windowed, whole) <= 1e-6


@pytest.mark.parametrize(
    "sigmas", [None, [1, 0.9375, 0.8333, 0.625, 0], [0.8, 0.7, 0.45, 0.31, 0.1, 0]]
)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("axis", ["flow", "index"])
def test_the_secant_is_the_weighted_sum(axis, window, sigmas):
    """z0 + s0 (z(b) - z(a)) / (b - a) = z0 - s0 sum_i w_i v_i with overlap weights, for Euler."""
    schedule = make_schedule(50, 5.0, kind="dpm++") if sigmas is None else from_sigmas(sigmas)
    levels, x, total = schedule.sigmas, np.asarray(noise(), np.float64), 0.0
    if sigmas and sigmas[0] < 1 and window == (0.0, 0.7) and axis == "flow":
        assert flow_window(levels, window)[0] == pytest.approx(0.2)  # clipped to the start
    weights = step_weights(levels, window, axis)
    assert weights.sum() == pytest.approx(1.0)
    start = x
    for i in range(schedule.steps):
        v = x - 0.6 * np.tanh(2 * x) + 0.3 * np.cos(3 * x) * levels[i] - 0.2
        total, x = total + weights[i] * v, x + (levels[i + 1] - levels[i]) * v
    got, _ = sample(velocity, noise(), schedule, "euler", window=window, axis=axis)
    assert relative(got, start - levels[0] * total) <= 1e-6


@pytest.mark.parametrize("std", list(GAINS))
def test_gain_table(std):
    """The closed form gives the table's values; sampling a Gaussian of that width gives the closed
    form."""
    np.testing.assert_allclose([gain(std, w) for w in WINDOWS], GAINS[std], atol=0.0051)
    tau = np.linspace(
        0, 1, 4001
    )  # Euler in float64 on the scalar flow of N(0, std**2), from eps = 1
    x = [1.0]
    for t, step in zip(tau[:-1], np.diff(tau), strict=True):
        s = 1 - t
        x.append(x[-1] - step * x[-1] * (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2))
    schedule = from_sigmas(1 - tau)
    for window in WINDOWS:
        weights = state_weights(schedule.sigmas, window)
        numeric = 1 + np.dot(weights, x[: len(weights)])
        assert numeric / std == pytest.approx(gain(std, window), abs=3e-3)


def test_what_the_condition_determines_passes_whole():
    """A component of zero conditional spread comes out at its mean for every window."""
    mean = noise(3)
    schedule = make_schedule(50, 5.0, kind="dpm++")
    for window in WINDOWS:
        got, _ = sample(
            lambda x, s, t, aux: ((x - mean) / s, aux), noise(), schedule, "euler", window=window
        )
        assert relative(got, mean) <= 1e-5


def chain(window, shift, clips=(1, 4, 7, 10), std=0.3, sharpen=1.05):
    """Standard deviation of clip k of x_k | x_(k-1) ~ N(x_(k-1), std**2), x_0 ~ N(0, 1), when the
    denoiser over-sharpens by 5 % from sigma = .3 on.  Sampling is linear here: x_k = keep x_(k-1) +
    add eps exactly."""
    schedule = make_schedule(50, shift, kind="euler")
    before = jnp.float32([1.0, 0.0])

    def over_sharp(x, s, t, aux):
        variance = np.float32(std**2)
        x0 = before + variance * (1 - s) / ((1 - s) ** 2 * variance + s**2) * (x - (1 - s) * before)
        return (x - x0 * jnp.where(s <= 0.3, jnp.float32(sharpen), jnp.float32(1.0))) / s, aux

    (keep, add), _ = sample(over_sharp, jnp.float32([0.0, 1.0]), schedule, "euler", window=window)
    variance, out = 1.0, []
    for _ in range(max(clips)):
        variance = float(keep) ** 2 * variance + float(add) ** 2
        out.append(variance**0.5)
    return [out[k - 1] for k in clips]


@pytest.mark.parametrize(
    "window, shift, reference",
    [
        ((0.0, 1.0), 1.0, [1.24, 2.14, 3.57, 5.86]),
        ((0.0, 0.7), 1.0, [1.00, 1.01, 1.02, 1.03]),
        ((0.3, 0.7), 1.0, [1.00, 1.03, 1.07, 1.10]),
        ((0.0, 1.0), 5.0, [1.12, 1.53, 2.05, 2.69]),
        ((0.3, 0.7), 5.0, [1.01, 1.03, 1.07, 1.09]),
    ],
)
def test_errors_accumulate_only_without_the_window(window, shift, reference):
    """The reference is a Monte Carlo estimate; ours is exact for 50 steps: 1.5 % apart at most."""
    np.testing.assert_allclose(chain(window, shift), reference, rtol=0.015)


def counted(schedule, name, **knobs):
    calls = []

    @jax.jit
    def run(x):
        def v(x, s, t, n):
            jax.debug.callback(lambda s: calls.append(float(s)), s)
            return velocity(x, s, t, None)[0], n + 1

        return sample(v, x, schedule, name, aux=jnp.int32(0), **knobs)

    out, n = run(noise())
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert int(n) == len(calls)
    return sorted(calls, reverse=True)


@pytest.mark.parametrize(
    "window, axis, evaluations",
    [
        (None, "flow", 50),
        ((0.3, 0.7), "flow", 47),
        ((0.3, 0.7), "index", 35),
        ((0.0, 1.0), "flow", 50),
    ],
)
def test_early_stop_runs_exactly_the_steps_needed(window, axis, evaluations):
    schedule = make_schedule(50, 5.0)
    sigmas = counted(schedule, "unipc", window=window, axis=axis)
    assert len(sigmas) == evaluations == steps_needed(schedule.sigmas, window, axis)
    np.testing.assert_allclose(sigmas, schedule.sigmas[:evaluations], rtol=1e-6)


def test_a_stopped_run_equals_a_full_run_read_at_the_window():
    """Early stopping changes nothing: coefficients come from the whole schedule."""
    schedule = make_schedule(20, 5.0)
    for name in SOLVERS:
        states = [noise()]
        history, table = SOLVERS[name].init(noise()), SOLVERS[name].coefficients(schedule.sigmas)
        for i in range(20):
            v, _ = velocity(states[-1], np.float32(schedule.sigmas[i]), None, None)
            x, history = SOLVERS[name].step(
                history, states[-1], v, {k: a[i] for k, a in table.items()}
            )
            states.append(x)
        tau, flat = 1 - schedule.sigmas, np.stack([np.asarray(x, np.float64) for x in states])
        at = [
            sum(np.interp(t, tau, np.eye(21)[i]) * flat[i] for i in range(21)) for t in (0.3, 0.7)
        ]
        want = flat[0] + schedule.sigmas[0] * (at[1] - at[0]) / 0.4
        got, _ = sample(velocity, noise(), schedule, name, window=(0.3, 0.7))
        assert relative(got, want) <= 1e-6


def test_the_two_axes_differ():
    """At shift 5 the index window spans sigma .92 to .68, a mass of .24 instead of .4."""
    levels = make_schedule(50, 5.0, kind="dpm++").sigmas
    a, b = flow_window(levels, (0.3, 0.7), "index")
    assert (round(1 - a, 2), round(1 - b, 2)) == (0.92, 0.68) and b - a == pytest.approx(
        0.24, abs=0.005
    )
    kept = np.flatnonzero(step_weights(levels, (0.3, 0.7), "flow"))
    assert (kept[0], kept[-1]) == (34, 46)  # of which 35 to 46 begin inside the window
    flow, _ = sample(velocity, noise(), make_schedule(50, 5.0), "euler", window=(0.3, 0.7))
    index, _ = sample(
        velocity, noise(), make_schedule(50, 5.0), "euler", window=(0.3, 0.7), axis="index"
    )
    assert relative(index, flow) > 1e-2
    even = make_schedule(10, 1.0, kind="dpm++").sigmas
    np.testing.assert_allclose(
        step_weights(even, (0.3, 0.7), "index"), step_weights(even, (0.3, 0.7)), atol=1e-9
    )


def test_few_steps_share_a_step_by_overlap():
    weights = step_weights([1, 0.9375, 0.8333, 0.625, 0], (0.3, 0.7))
    np.testing.assert_allclose(weights * 0.4, [0, 0, 0.075, 0.325], atol=1e-9)


@pytest.mark.parametrize(
    "window, axis", [((0.7, 0.3), "flow"), ((-0.1, 0.5), "flow"), ((0.3, 0.7), "time")]
)
def test_bad_windows_are_refused(window, axis):
    with pytest.raises(InputError):
        steps_needed(make_schedule(4, 5.0).sigmas, window, axis)


def test_a_window_before_the_start_is_refused():
    with pytest.raises(InputError, match="outside the schedule"):
        flow_window([0.5, 0.2, 0.0], (0.1, 0.4))
