# SPDX-License-Identifier: Apache-2.0
"""Temporal frequencies for long videos: the phase kernel and where it peaks, what jitter does to
it, and each policy by its published formula.
"""

import jax
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.nn.rope import TURN, axis_pairs, grid_table, turn_table, turns
from lvjax.nn.rope_policies import (
    POLICIES,
    coherence,
    frequencies,
    intrinsic,
    jittered,
)

HEAD = 128  # Wan's: 22 temporal pairs
DISTANCES = np.arange(621)


def peaks(theta: float) -> dict[int, float]:
    """Local maxima of the kernel's real part by distance."""
    c = coherence(HEAD, DISTANCES, theta).real
    inner = (c[1:-1] > c[:-2]) & (c[1:-1] > c[2:])
    return {int(d): float(c[d]) for d in np.flatnonzero(inner) + 1}


def test_the_kernel_peaks_where_videos_collapse():
    found = {d: c for d, c in peaks(1e4).items() if d >= 100}
    highest = sorted(found, key=found.get)[-2:]
    assert highest == [132, 201]
    assert found[132] == pytest.approx(0.541, abs=5e-4)
    assert found[201] == pytest.approx(0.544, abs=5e-4)
    c = coherence(HEAD, [131, 132, 133, 200, 201, 202])
    np.testing.assert_allclose(c.real, [0.4881, 0.5407, 0.5317, 0.5024, 0.5443, 0.5167], atol=5e-5)
    np.testing.assert_allclose(abs(c)[[1, 2, 4, 5]], [0.5464, 0.5573, 0.5530, 0.5522], atol=5e-5)


@pytest.mark.parametrize(
    ("theta", "listed"),
    [
        (6000, {38: 0.60, 125: 0.51, 207: 0.47, 308: 0.46, 402: 0.46, 597: 0.46}),
        (10000, {57: 0.57, 88: 0.55, 307: 0.50, 402: 0.37, 465: 0.48}),
        (20000, {76: 0.62, 119: 0.61, 188: 0.60, 295: 0.60, 464: 0.57}),
    ],
)
def test_the_published_list_of_peaks(theta, listed):
    found = peaks(theta)
    for distance, height in listed.items():
        assert found[distance] == pytest.approx(height, abs=6e-3)


def test_exponents_begin_at_zero():
    """From one on, as the paper prints them, the peak at 132 would be elsewhere."""
    omega = np.append(frequencies(HEAD), 1e4**-1.0)[1:]
    c = np.cos(omega[None] * DISTANCES[:, None]).mean(1)
    inner = (np.flatnonzero((c[1:-1] > c[:-2]) & (c[1:-1] > c[2:])) + 1).tolist()
    assert 132 not in inner and {133, 134} & set(inner)


def head_mean(jitter: float, draws: int = 50) -> np.ndarray:
    """Over heads and draws, of the phase kernel's real part."""
    rng = np.random.default_rng(0)
    theta = 1e4 * (1 + jitter * rng.uniform(-1, 1, (draws * 12,)))
    return coherence(HEAD, DISTANCES, theta).real.mean(0)


def test_jitter_lowers_the_peaks_and_leaves_near_frames():
    plain, small, strong = (head_mean(j) for j in (0.0, 0.1, 0.8))
    assert plain[132] == pytest.approx(0.541, abs=5e-4)
    assert small[132] == pytest.approx(0.536, abs=5e-3)
    assert strong[132] == pytest.approx(0.412, abs=0.02)
    assert strong[201] == pytest.approx(0.339, abs=0.02)
    assert np.abs(strong - plain)[:12].max() < 0.015
    assert strong[120:].max() < plain[120:].max() - 0.08


def test_no_jitter_is_the_model_itself():
    for one, heads in zip(
        turns(HEAD), jittered(jax.random.key(0), HEAD, 12, jitter=0.0), strict=True
    ):
        np.testing.assert_array_equal(heads, np.broadcast_to(one, heads.shape))
    frames = np.array([0, 5, 100_000], np.int32)
    many = turn_table(frames, 2, 3, jittered(jax.random.key(0), HEAD, 4, jitter=0.0))
    for a, b in zip(many, grid_table(frames, 2, 3, HEAD), strict=True):
        np.testing.assert_array_equal(a, np.broadcast_to(b, a.shape))


def test_jitter_is_of_heads_and_of_time_only():
    time, rows, columns = jittered(jax.random.key(1), HEAD, 12, jitter=0.8)
    own = turns(HEAD)
    np.testing.assert_array_equal(time[:, 0], np.broadcast_to(own[0][0], 12))  # theta**0
    assert len(np.unique(time[:, -1])) == 12 and not np.array_equal(time[0], own[0])
    for axis, found in zip(own[1:], (rows, columns), strict=True):
        np.testing.assert_array_equal(found, np.broadcast_to(axis, found.shape))
    again = jittered(jax.random.key(1), HEAD, 12, jitter=0.8)
    np.testing.assert_array_equal(again[0], time)
    theta = (time[:, -1] / TURN * 2 * np.pi) ** (-22 / 21)
    assert 1e4 * 0.2 <= theta.min() < theta.max() <= 1e4 * 1.8


@pytest.mark.parametrize("jitter", [1.0, -0.1, float("nan")])
def test_jitter_that_is_refused(jitter):
    with pytest.raises(InputError, match="give a number from 0 to below 1"):
        jittered(jax.random.key(0), HEAD, 12, jitter=jitter)


def omega_of(name: str, length: int) -> np.ndarray:
    return POLICIES[name](HEAD, 1e4, length)[0] / TURN * 2 * np.pi


def test_every_policy_by_its_formula():
    """100 s: 400 latent frames, s = 3.03."""
    omega, s = 1e4 ** (-np.arange(22) / 22), 400 / 132
    np.testing.assert_allclose(omega_of("pe", 400), omega, atol=1e-9)
    np.testing.assert_allclose(omega_of("pi", 400), omega / s, atol=1e-9)
    base = 1e4 * s ** (44 / 42)
    np.testing.assert_allclose(omega_of("ntk", 400), base ** (-np.arange(22) / 22), atol=1e-9)
    share = np.clip((132 * omega / (2 * np.pi) - 1) / 31, 0, 1)
    np.testing.assert_allclose(
        omega_of("yarn", 400), share * omega + (1 - share) * omega / s, atol=1e-9
    )
    rif = omega.copy()
    rif[7] = 0.9 * 2 * np.pi / 400
    np.testing.assert_allclose(omega_of("riflex", 400), rif, atol=1e-9)
    assert intrinsic(HEAD, 1e4) == 7 and round(2 * np.pi / omega[7]) == 118


@pytest.mark.parametrize("name", [n for n in POLICIES if n != "riflex"])
def test_a_video_of_the_trained_length_is_as_it_was(name):
    for found, own in zip(POLICIES[name](HEAD, 1e4, 132), turns(HEAD), strict=True):
        np.testing.assert_allclose(found, own, atol=1)
    assert axis_pairs(HEAD) == (22, 21, 21)
