# SPDX-License-Identifier: Apache-2.0
"""Each metric sees what it is for, by the margins measured on held-out clips, and nothing else."""

from functools import cache

import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.data.judge import object_masks
from lvjax.lab import metrics as m
from lvjax.lab.measure import measure
from tests.lab.corrupted import CORRUPTIONS, clip, noisy, other_place, saturated

CLIPS = (2, 5, 6, 12)  # pan down, left, down over a photo, texture, photo; still over a photo
PANS = CLIPS[:3]


@cache
def shown(index: int, corruption: str) -> np.ndarray:
    if corruption == "other_place":
        return other_place(index)
    return clip(index) if corruption == "clean" else CORRUPTIONS[corruption](shown(index, "clean"))


@cache
def values(metric, corruption: str, clips=CLIPS) -> np.ndarray:
    """A metric of the frames alone, for each clip."""
    return np.array([metric(shown(i, corruption)) for i in clips])


@cache
def beside(metric, corruption: str) -> np.ndarray:
    """A metric of frames and the clean clip as their reference, for each clip."""
    return np.array([metric(shown(i, corruption), shown(i, "clean")) for i in CLIPS])


def ratios(metric, corruption: str) -> np.ndarray:
    return values(metric, corruption) / values(metric, "clean")


def test_blocks_are_their_means_to_the_last_bit():
    x = np.random.default_rng(0).random((3, 21, 30), np.float32)
    blocks = x[:, :16, :24].reshape(3, 2, 8, 3, 8)
    assert np.array_equal(m._blocks(x), blocks.mean((2, 4)))


def test_sharpness_tells_blur_from_noise_and_ignores_light_and_order():
    assert ratios(m.sharpness, "blurred").max() < 0.8  # measured: .56 to .76
    assert ratios(m.sharpness, "noisy").min() > 3  # 4.6
    for name in ("tinted", "brighter"):
        np.testing.assert_allclose(ratios(m.sharpness, name), 1, atol=0.01)
    np.testing.assert_allclose(ratios(m.sharpness, "shuffled"), 1, atol=1e-5)
    ramp = np.broadcast_to(np.arange(0, 128, 2, dtype=np.uint8)[:, None, None], (1, 64, 64, 3))
    assert m.sharpness(ramp) < 1e-6
    dot = np.zeros((1, 5, 5, 3), np.uint8)
    dot[0, 2, 2] = 255
    assert m.sharpness(dot) == pytest.approx((4 + 4 * 1) / 9)


def test_a_colour_cast_is_measured_as_large_as_it_is():
    by = np.array([12, 0, -12]) / 255
    y = by @ m.LUMA
    true = np.hypot(0.564 * (by[2] - y), 0.713 * (by[0] - y))
    np.testing.assert_allclose(beside(m.colour_cast, "tinted"), true, rtol=0.02)
    assert beside(m.colour_cast, "saturated").min() > 0.002
    for name in ("clean", "brighter", "noisy", "blurred", "recoloured", "shuffled"):
        assert beside(m.colour_cast, name).max() < 0.0015


def test_saturation_follows_colour_but_not_light_or_the_object():
    np.testing.assert_allclose(ratios(m.saturation, "saturated"), 1.5, atol=0.1)
    for name in ("brighter", "recoloured", "shuffled"):
        np.testing.assert_allclose(ratios(m.saturation, name), 1, atol=0.01)
    grey = saturated(shown(5, "clean"), 0.0)
    assert m.saturation(grey) < 0.005 < 0.02 < m.saturation(shown(5, "clean"))


def test_exposure_counts_clipped_pixels_and_the_shift_of_light():
    bright = [m.exposure(shown(i, "brighter"), shown(i, "clean")) for i in CLIPS]
    np.testing.assert_allclose([e.shift for e in bright], 30 / 255, atol=0.001)
    for name in ("clean", "blurred", "shuffled", "saturated"):
        for i in CLIPS:
            assert abs(m.exposure(shown(i, name), shown(i, "clean")).shift) < 0.002
    for i in CLIPS:
        assert m.exposure(shown(i, "saturated"), shown(i, "clean")).clipped > 0.015
        assert m.exposure(shown(i, "clean"), shown(i, "clean")).clipped == 0
    half = np.zeros((1, 4, 4, 3), np.uint8)
    half[:, :2] = 100
    assert m.exposure(half, half).clipped == 0.5


def test_motion_is_smooth_whatever_its_direction_and_not_when_frames_are_out_of_order():
    clean = values(m.motion_smoothness, "clean")
    assert clean.min() > 0.996  # measured: .9973
    assert values(m.motion_smoothness, "frozen").min() == 1
    for name, most in (("shuffled", 0.985), ("stuttering", 0.996), ("noisy", 0.975)):
        assert values(m.motion_smoothness, name).max() < most
    for name in ("stuttering", "shuffled"):
        assert (clean - values(m.motion_smoothness, name)).min() > 0.003
    for name in ("tinted", "brighter", "blurred", "recoloured"):
        np.testing.assert_allclose(values(m.motion_smoothness, name), clean, atol=0.001)


def test_dynamic_degree_is_the_motion_in_pixels_and_no_noise():
    clean = values(m.dynamic_degree, "clean")
    assert 1.6 < clean[:3].min() and clean[:3].max() < 2.1  # pans of 2 pixels per frame
    assert 0 < clean[3] < 0.6  # the object alone
    assert values(m.dynamic_degree, "frozen").max() == 0
    for i in CLIPS:
        assert m.dynamic_degree(noisy(shown(i, "frozen"))) < 0.15  # measured: .00 to .05
    for name in ("tinted", "brighter", "blurred", "saturated"):
        np.testing.assert_allclose(values(m.dynamic_degree, name), clean, atol=0.1)


def test_background_consistency_knows_the_place_and_not_the_object():
    clean = values(m.background_consistency, "clean")
    moved = values(m.background_consistency, "other_place")
    assert clean.min() > 0.98 and (clean - moved).min() > 0.002 and moved.mean() < 0.97
    np.testing.assert_allclose(values(m.background_consistency, "recoloured"), clean, atol=0.001)
    for name in ("blurred", "brighter", "noisy"):  # the same throughout
        np.testing.assert_allclose(values(m.background_consistency, name), clean, atol=0.006)
    to_clean = beside(m.background_consistency, "clean")
    for name in ("brighter", "tinted"):
        assert (to_clean - beside(m.background_consistency, name)).min() > 0.01
    assert values(m.background_consistency, "frozen").min() == pytest.approx(1)


def test_the_background_is_what_is_no_object():
    frames = shown(6, "clean")
    busy = object_masks(frames).any(-1)
    own = m.background(m.masks(frames))
    assert busy.any() and not (own & busy).any() and 0.5 < own.mean() < 0.99
    flat = np.full((2, 8, 8, 3), (232, 36, 36), np.uint8)
    assert m.background(m.masks(flat)).all()  # nothing else is there
    assert m.background_consistency(flat) == pytest.approx(1)


def test_average_frequency_of_known_pictures():
    n, k = 64, 5
    wave = np.cos(2 * np.pi * k * np.arange(n) / n)
    grey = np.stack([np.tile(wave, (n, 1)), np.tile(wave[:, None], (1, n))])
    assert m.average_frequency(grey) == pytest.approx(k / n)
    both = np.cos(2 * np.pi * k * np.add.outer(np.arange(n), np.arange(n)) / n)[None]
    assert m.average_frequency(both) == pytest.approx(np.sqrt(2) * k / n)
    # a mean of 3 and an amplitude of 2: magnitudes 3 at 0 and 1 at both ends of f
    assert m.average_frequency(3 + 2 * grey) == pytest.approx(2 / 5 * k / n)
    assert m.average_frequency(3 + 2 * grey, keep_dc=False) == pytest.approx(k / n)
    assert m.average_frequency(3 + 2 * grey, normalised=False) == pytest.approx(2 * k / n)
    noise = np.random.default_rng(0).standard_normal((4, 256, 256))
    known = (np.sqrt(2) + np.arcsinh(1)) / 6
    assert m.average_frequency(noise, keep_dc=False) == pytest.approx(known, rel=0.005)
    for level in (0.0, 0.1, 77.0):
        for keep in (True, False):
            flat = np.full((1, 16, 16), level)
            assert m.average_frequency(flat, keep_dc=keep) == pytest.approx(0, abs=1e-12)
    colour = np.random.default_rng(1).integers(0, 255, (2, 8, 8, 3), np.uint8)
    assert m.average_frequency(colour) == pytest.approx(m.average_frequency(colour @ m.LUMA))


def test_average_frequency_falls_with_blur_and_sees_the_mean_only_when_it_is_kept():
    assert ratios(m.average_frequency, "blurred").max() < 0.99  # measured: .80 to .98
    assert ratios(m.average_frequency, "noisy").min() > 1.3  # 1.43
    np.testing.assert_allclose(ratios(m.average_frequency, "shuffled"), 1, atol=1e-12)
    assert ratios(m.average_frequency, "brighter").max() < 0.98  # .94 to .97: the mean counts
    for i in CLIPS:
        own = [m.average_frequency(shown(i, n), keep_dc=False) for n in ("clean", "brighter")]
        assert own[0] == pytest.approx(own[1], rel=0.005)


def test_all_of_them_by_name():
    row = measure(shown(12, "brighter"), shown(12, "clean"))
    assert row["luminance_shift"] == pytest.approx(30 / 255, abs=0.001)
    assert row["sharpness"] == pytest.approx(ratios(m.sharpness, "brighter")[3])
    assert row["subject_seen"] == 1 and row["subject_colour"] > 0.999
    assert row["background_reference"] < row["background_consistency"]
    empty = measure(np.zeros((3, 32, 32, 3), np.uint8), np.zeros((3, 32, 32, 3), np.uint8))
    assert empty["subject_colour"] is None and empty["sharpness"] is None
    assert empty["dynamic_degree"] == 0 and empty["clipped"] == 1


def test_windows_are_equal_parts_in_order():
    parts = m.six_windows(np.arange(1441))
    assert [len(p) for p in parts] == [240, 240, 240, 241, 240, 240]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(1441))
    with pytest.raises(InputError, match="5 frames are given for 6 parts"):
        m.six_windows(np.zeros((5, 4, 4, 3), np.uint8))


def test_what_is_no_video_is_refused():
    good = np.zeros((4, 32, 32, 3), np.uint8)
    for bad in (good.astype(np.float32), good[0], good[..., :2], good[:0]):
        with pytest.raises(InputError, match="give uint8"):
            m.saturation(bad)
    for metric in (m.motion_smoothness, m.dynamic_degree):
        with pytest.raises(InputError, match="at least 3 frames"):
            metric(good[:2])
        with pytest.raises(InputError, match="motion needs"):
            metric(good[:, :12])
    with pytest.raises(InputError, match="at least 2 frames"):
        m.background_consistency(good[:1])
    with pytest.raises(InputError, match="3x3"):
        m.sharpness(good[:, :2])
    with pytest.raises(InputError, match=r"give \[P, H, W, 3\]"):
        m.average_frequency(good[0, 0])
