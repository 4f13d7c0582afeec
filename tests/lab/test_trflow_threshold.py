# SPDX-License-Identifier: Apache-2.0
"""The search for the lower threshold, on curves whose answer is known."""

import numpy as np
import pytest

from lvjax.core.errors import InputError, NonFiniteError
from lvjax.lab import tune_trflow as t
from lvjax.run.request import Request
from lvjax.run.session import open_session
from tests.tiny import tiny_bundle

PROMPTS = ("the camera pans left", "a red circle moves up")


def made(targets) -> list[t.Run]:
    """Runs of which only the target counts."""
    return [t.Run("p", i, None, None, None, x) for i, x in enumerate(targets)]


def curve(monkeypatch, af, targets, **knobs) -> t.Curve:
    """The curve of runs whose AF is af(low, target)."""
    monkeypatch.setattr(t, "frequency", lambda bundle, run, low, high: af(low, run.target))
    return t.tune(None, made(targets), **knobs)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_crossing_is_found_between_points_of_the_grid(monkeypatch, sign):
    targets = (0.09, 0.11)
    found = curve(monkeypatch, lambda low, y: y + sign * (low**2 - 0.333**2), targets)
    assert abs(found.low - 0.333) <= t.WIDTH / 2 and len(found.tried) == 4
    assert found.crossings == [(pytest.approx(0.3), pytest.approx(0.35))]
    assert found.nearest == pytest.approx(0.35)
    np.testing.assert_allclose(found.each(), [0.333] * 2, atol=0.002)
    np.testing.assert_allclose(found.lows, np.arange(14) * 0.05)
    text = t.table(found)
    assert f"low {found.low:.3f} gives the AF of [0, 1]" in text and "2 of 2 cross" in text
    assert found.as_dict()["low"] == found.low and found.as_dict()["target"] == pytest.approx(0.1)


def test_the_mean_over_the_runs_decides(monkeypatch):
    roots = {0.09: 0.1, 0.11: 0.5}
    found = curve(monkeypatch, lambda low, y: y + low - roots[y], tuple(roots))
    assert abs(found.low - 0.3) <= t.WIDTH / 2
    np.testing.assert_allclose(found.each(), list(roots.values()))


def test_without_a_crossing_the_nearest_is_said_to_be_no_root(monkeypatch):
    found = curve(monkeypatch, lambda low, y: y - 0.01 - (low - 0.2) ** 2, (0.1,), grid=7)
    assert found.low is None and found.tried == [] and found.each() == [None]
    assert found.nearest == pytest.approx(0.2)
    assert "no low gives the AF of [0, 1]; the nearest on the grid is 0.200" in t.table(found)
    assert found.as_dict()["low"] is None


def test_of_several_crossings_the_lowest_is_taken_and_their_number_said(monkeypatch):
    found = curve(monkeypatch, lambda low, y: y + (low - 0.12) * (low - 0.43), (0.1,))
    assert abs(found.low - 0.12) <= t.WIDTH / 2 and len(found.crossings) == 2
    assert "the first of 2 crossings" in t.table(found)


def test_a_difference_of_zero_on_the_grid_is_a_root(monkeypatch):
    found = curve(monkeypatch, lambda low, y: y + low, (0.1, 0.2), high=1.0)
    assert found.low == 0 and found.crossings == [(0, 0)] and found.each() == [0, 0]
    assert "low 0.000 gives the AF of [0, 1]\n" in t.table(found)
    found = curve(monkeypatch, lambda low, y: y + (low - 0.25) ** 2, (0.1,), high=1.0, grid=4)
    assert found.low == 0.25 and found.each() == [0.25] and not found.tried


def test_the_clip_is_the_one_that_a_session_makes():
    bundle = tiny_bundle()
    requests = [Request((((0.0, p),),), 17) for p in PROMPTS]
    found = list(t.runs(bundle, requests, [0, 5]))
    assert [(r.prompt, r.seed) for r in found] == [(p, s) for p in PROMPTS for s in (0, 5)]
    own = next(open_session(bundle, Request((((0.0, PROMPTS[1]),),), 17, seed=0)).run())
    low, high = bundle.defaults.window
    want = t.average_frequency(own.frames[0])
    assert t.frequency(bundle, found[2], low, high) == pytest.approx(want, rel=2e-4)
    assert abs(want / found[2].target - 1) > 1e-3  # measured: 2e-3
    whole = t.tune(bundle, found[2:3], high=1.0, grid=2)
    assert whole.low == 0 and whole.af[0] == found[2].target
    assert len({r.target for r in found}) == 4
    (other,) = t.runs(bundle, requests[1:], [0], keep_dc=False)
    np.testing.assert_array_equal(other.states, found[2].states)
    without = t.average_frequency(own.frames[0], keep_dc=False)
    assert t.frequency(bundle, other, low, high) == pytest.approx(without, rel=2e-4)
    assert other.target > 1.01 * found[2].target


def test_what_is_not_finite_stops_and_is_named():
    bundle = tiny_bundle()
    head = bundle.params["dit"]["head"]["linear"]
    head["kernel"] = np.full_like(head["kernel"], np.nan)
    with pytest.raises(NonFiniteError, match="'a red circle moves up' with seed 4"):
        list(t.runs(bundle, [Request((((0.0, PROMPTS[1]),),), 17)], [4]))


def test_thresholds_that_cannot_be_are_refused():
    for high in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(InputError, match="--high"):
            t.check(high, 14)
    for grid in (1, 0, 10**6):
        with pytest.raises(InputError, match="--grid"):
            t.check(0.7, grid)
