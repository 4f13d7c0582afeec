# SPDX-License-Identifier: Apache-2.0
"""Solvers against diffusers in float64 with injected sigmas, and against exact solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.flow.guidance import combine, guided
from lvjax.flow.sampling import sample
from lvjax.flow.schedule import from_sigmas, make_schedule
from lvjax.flow.solvers import SOLVERS
from tests.tiny import relative

TOLERANCE = 1e-6  # float32 against float64 over a whole run


def noise(seed=0):
    return np.random.default_rng(seed).standard_normal((3, 2, 4, 4, 5)).astype(np.float32)


def field(x, sigma, lib):
    """A smooth velocity, neither linear nor autonomous, the same in any array library."""
    return x - 0.6 * lib.tanh(2.0 * x) + 0.5 * lib.cos(3.0 * x) * sigma - 0.2


def velocity(x, sigma, timestep, aux):
    return field(x, sigma, jnp), aux


def diffusers_run(name, schedule, x):
    import torch
    from diffusers import (
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    make = {
        "unipc": lambda: UniPCMultistepScheduler(**flow),
        "dpm++": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **flow),
        "euler": FlowMatchEulerDiscreteScheduler,
    }
    scheduler = make[name]()
    scheduler.set_timesteps(schedule.steps)
    scheduler.sigmas = torch.tensor(schedule.sigmas)
    scheduler.timesteps = torch.arange(schedule.steps, 0, -1).float()  # distinct labels only
    x = torch.tensor(x, dtype=torch.float64)
    for sigma, t in zip(schedule.sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(field(x, sigma, torch), t, x, return_dict=False)[0].double()
    return x.numpy()


@pytest.mark.parametrize("steps, shift", [(1, 5.0), (2, 5.0), (4, 5.0), (20, 3.0), (50, 5.0)])
@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.filterwarnings("ignore")
def test_parity_with_diffusers(name, steps, shift):
    schedule = make_schedule(steps, shift, kind=name)
    assert (schedule.sigmas[0] == 1) == (name != "unipc")
    got, _ = sample(velocity, jnp.asarray(noise()), schedule, name)
    assert relative(got, diffusers_run(name, schedule, noise())) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_parity_from_the_middle():
    schedule = from_sigmas([0.8, 0.7, 0.45, 0.3, 0.1, 0.0])
    for name in SOLVERS:
        got, _ = sample(velocity, jnp.asarray(noise()), schedule, name)
        assert relative(got, diffusers_run(name, schedule, noise())) <= TOLERANCE


def mutated(name, **change):
    solver = SOLVERS[name]

    def coefficients(sigmas):
        table = dict(solver.coefficients(sigmas))
        for key, f in change.items():
            table[key] = f(table[key])
        return table

    return solver._replace(coefficients=coefficients)


def test_mutations_are_seen():
    """Dropping the corrector, or a second-order term of either half, moves the result far beyond
    the tolerance."""
    schedule = make_schedule(8, 1.0)
    x = jnp.asarray(noise())
    truth = {name: sample(velocity, x, schedule, name)[0] for name in ("unipc", "dpm++")}
    no_corrector = {"here": np.ones_like, "keep_c": np.zeros_like, "gain_c": np.zeros_like}
    cases = [
        ("unipc", no_corrector),
        ("unipc", {"far": np.zeros_like}),
        ("unipc", {"far": np.zeros_like, "near": lambda a: np.full_like(a, 0.5)}),
        ("unipc", {"slope": np.zeros_like}),
        ("dpm++", {"slope": np.zeros_like}),
    ]
    for name, change in cases:
        got, _ = sample(velocity, x, schedule, mutated(name, **change))
        assert relative(got, truth[name]) > 1e-3, (name, list(change))


@pytest.mark.parametrize("kind", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("name", list(SOLVERS))
def test_exact_on_a_linear_flow(name, kind):
    data, eps = noise(1), noise(2)
    schedule = make_schedule(7, 5.0, kind=kind)
    s = np.float32(schedule.sigmas[0])
    start = (1 - s) * data + s * eps
    got, _ = sample(lambda x, s, t, aux: (jnp.asarray(eps - data), aux), start, schedule, name)
    assert relative(got, data) <= TOLERANCE


@pytest.mark.parametrize("name, order", [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_order_of_convergence(name, order):
    """On the exact flow between Gaussians, halving the step divides the error by 2**order."""

    def error(steps):
        sigmas = 1 / (
            1 + np.exp(np.linspace(-2, 3, steps + 1))
        )  # even in log SNR, first order never last
        schedule = from_sigmas(sigmas, integer_timesteps=False)

        def v(x, s, t, aux):
            return x * (s - (1 - s) * np.float32(0.25)) / (
                (1 - s) ** 2 * np.float32(0.25) + s**2
            ), aux

        end = [np.hypot(0.5 * (1 - s), s) for s in (sigmas[0], sigmas[-1])]
        got = sample(v, jnp.ones((1,)), schedule, name)[0]
        return abs(float(got[0]) - end[1] / end[0])

    assert np.log2(error(10) / error(20)) > order - 0.35


def test_coefficients_are_finite_at_both_ends():
    for solver in SOLVERS.values():
        for sigmas in ([1.0, 0.5, 0.2, 0.0], [1.0, 0.0], [0.9, 0.3]):
            table = solver.coefficients(np.array(sigmas))
            assert all(np.all(np.isfinite(a)) and a.dtype == np.float32 for a in table.values())


def test_official_grids():
    """First sigma and timestep at shift 5; the grid of diffusers is another one."""
    unipc, dpm = make_schedule(50, 5.0), make_schedule(50, 5.0, kind="dpm++")
    assert round(unipc.sigmas[0], 5) == 0.99980 and unipc.timesteps[0] == 999
    assert dpm.sigmas[0] == 1.0 and dpm.timesteps[0] == 1000
    assert unipc.sigmas[-1] == dpm.sigmas[-1] == 0 and len(unipc.sigmas) == 51
    base = 1 - 0.999 * np.arange(50) / 50
    theirs = np.trunc(1000 * 5 * base / (1 + 4 * base))
    theirs[0] = 999
    assert np.sum(theirs != unipc.timesteps) == 27
    few = make_schedule(4, 5.0, kind="euler", integer_timesteps=False)
    np.testing.assert_allclose(few.timesteps, [1000, 937.5, 833.3333, 625], rtol=1e-6)
    assert make_schedule(4, 5.0, kind="euler").timesteps.tolist() == [1000, 937, 833, 625]


@pytest.mark.parametrize("bad", [[1.0], [0.5, 0.5, 0.0], [1.2, 0.0], [0.5, -0.1]])
def test_bad_sigmas_are_refused(bad):
    with pytest.raises(InputError):
        from_sigmas(bad)


def test_bad_names_are_refused():
    with pytest.raises(InputError, match="choose one of"):
        make_schedule(4, 5.0, kind="ddim")
    with pytest.raises(InputError, match="choose one of"):
        sample(velocity, jnp.ones((1,)), make_schedule(4, 5.0), "heun")


def test_guidance_is_one_pass_over_a_doubled_batch():
    calls = []

    def v(x, sigma, timestep, aux):
        calls.append(x.shape)
        return (x * jnp.repeat(jnp.float32([2.0, 3.0]), 2)[:, None]).astype(jnp.bfloat16), aux

    x = jnp.ones((2, 4))
    got, _ = guided(v, 5.0)(x, 1.0, 1000.0, None)
    assert calls == [(4, 4)] and got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.full((2, 4), 3.0 + 5.0 * (2.0 - 3.0)))
    assert guided(v, None) is v
    np.testing.assert_array_equal(combine(jnp.concatenate([x, 2 * x]), 1.0), x)


def test_aux_is_threaded_and_one_program_serves():
    schedule = make_schedule(6, 5.0)

    @jax.jit
    def run(x):
        return sample(
            lambda x, s, t, n: (field(x, s, jnp), n + 1), x, schedule, "unipc", aux=jnp.int32(0)
        )

    assert int(run(jnp.asarray(noise()))[1]) == 6
