# SPDX-License-Identifier: Apache-2.0
"""The lab makes what is missing, once, and only with the settings that a folder was begun with."""

import dataclasses
import json
import os

import numpy as np
import pytest

from lvjax.core.errors import CheckpointError, InputError, NonFiniteError
from lvjax.lab import error_free as lab
from lvjax.lab.measure import measure
from lvjax.lab.metrics import six_windows
from lvjax.lab.object_metrics import look, world_outlines
from lvjax.lab.report import write_report
from lvjax.lab.rows import METRICS, measure_row, reappearance, six_parts
from lvjax.lab.timelines import draw_timelines
from tests.tiny import tiny_bundle

SMALL = lab.Settings(seconds=4.0, seeds=2, timelines=2, cells=("full", "baseline"), quick=True)
REAL = ("shift", "guidance", "delta")  # fields of Defaults that are no whole numbers
QUALITY = {"full": 4, "baseline": 40}  # what is added to the world's frames


def measured(parts, truth, gone, outlines):
    """Every figure is the noise, which is quick to measure."""
    parts = zip(parts, truth, strict=True)
    noise = [float(np.abs(a.astype(float) - b).mean()) for a, b in parts]
    rows = [dict.fromkeys(METRICS, x) for x in noise]
    return {"whole": dict.fromkeys(METRICS, float(np.mean(noise))), "windows": rows}


@pytest.fixture
def bundle(monkeypatch):
    """A model of which nothing runs: the world itself with noise, more of it in the baseline."""
    calls = []

    def sample(bundle, cell, seed, timelines, steps=None):
        name = next(k for k, c in lab.CELLS.items() if c == cell)
        calls.append(lab.Run(name, seed))
        rng = np.random.default_rng(seed)
        world = np.stack([t.video.frames(0, t.frames) for t in timelines]).astype(int)
        made = world + rng.integers(-QUALITY[name], QUALITY[name] + 1, world.shape)
        made = np.clip(made, 0, 255).astype(np.uint8)
        yield from np.split(made, [17], axis=1)

    monkeypatch.setattr(lab, "sample", sample)
    monkeypatch.setattr(lab, "autoencoder", lambda bundle: lambda clips: clips)
    monkeypatch.setattr(lab, "shape_outlines", lambda through: None)
    monkeypatch.setattr(lab, "six_parts", six_windows)
    monkeypatch.setattr(lab, "measure_row", measured)
    return dataclasses.replace(tiny_bundle(), name="calls", hashes={"dit": "0"}), calls


def make(bundle, folder, settings=SMALL):
    folder.mkdir(exist_ok=True)
    about = lab.claim(bundle, settings, folder)
    assert lab.run_cells(bundle, settings, folder)
    return {p.name: p.read_bytes() for p in write_report(folder, settings, about)}


def test_what_is_missing_is_made_again_and_the_report_has_the_same_bytes(bundle, tmp_path):
    bundle, calls = bundle
    before = make(bundle, tmp_path)
    assert calls == lab.runs(SMALL) and len(calls) == 4
    assert make(bundle, tmp_path) == before and len(calls) == 4
    calls[2].figures(tmp_path).unlink()
    calls[1].video(tmp_path, 0).unlink()
    cut = calls[3].video(tmp_path, 1)
    os.truncate(cut, cut.stat().st_size - 1)
    assert make(bundle, tmp_path) == before and calls[4:] == calls[1:4]
    assert set(before) >= {"report.md", "report.json", "sheet-00.jpg", "sheet-01.jpg"}
    text, figures = before["report.md"].decode(), json.loads(before["report.json"])
    assert "quick version" in text and "| here |" in text
    verdicts = {(c["metric"], c["where"]): c for c in figures["claims"]}
    sharper = verdicts["sharpness_off", 0]
    assert sharper["verdict"] == "reproduced" and sharper["pairs"] == 4
    shown = f"{sharper['difference']:+.4f} ± {sharper['std']:.4f}, 4"
    assert f"reproduced ({shown})" in text
    assert len(figures["rows"]["full"]) == 4 and len(figures["reference"]) == 2
    assert figures["rows"]["full"][0]["whole"]["sharpness"] > 1


def test_a_model_that_is_not_finite_is_named_by_its_run(bundle, tmp_path, monkeypatch):
    bundle, _ = bundle

    def sample(*_):
        raise NonFiniteError("latents of clip 0 are not finite")
        yield

    monkeypatch.setattr(lab, "sample", sample)
    with pytest.raises(NonFiniteError, match="of full, seed 100, are not finite; the runs"):
        lab.run_cells(bundle, SMALL, tmp_path)


def test_a_run_that_is_stopped_leaves_nothing_of_itself(bundle, tmp_path):
    bundle, calls = bundle
    lab.claim(bundle, SMALL, tmp_path)
    told = []
    assert not lab.run_cells(bundle, SMALL, tmp_path, told.append, stop=lambda: len(calls) == 2)
    done = [lab.is_done(tmp_path, run, SMALL) for run in lab.runs(SMALL)]
    assert done == [True, False, False, False] and not calls[1].figures(tmp_path).exists()
    assert "baseline, seed 100 (2/4): 17/33 frames of 2 videos" in told[-1]
    assert lab.run_cells(bundle, SMALL, tmp_path) and calls[2:] == lab.runs(SMALL)[1:]


def test_other_settings_are_refused_but_seeds_may_be_added(bundle, tmp_path):
    bundle, _ = bundle
    lab.claim(bundle, SMALL, tmp_path)
    for change in (
        {"seconds": 5.0},
        {"timelines": 3},
        {"cells": ("full",)},
        {"steps": 3},
        {"quick": False},
        {"seeds": 1},
    ):
        name = next(iter(change))
        with pytest.raises(InputError, match=f"other settings: (sampler.)?{name} was"):
            lab.claim(bundle, dataclasses.replace(SMALL, **change), tmp_path)
    other = dataclasses.replace(bundle, hashes={"dit": "1"})
    with pytest.raises(InputError, match="weights.dit was 0, is 1"):
        lab.claim(other, SMALL, tmp_path)
    more = dataclasses.replace(SMALL, seeds=3)
    lab.claim(bundle, more, tmp_path)
    assert lab.settings_in(tmp_path) == more
    path = tmp_path / lab.SETTINGS
    path.write_text(path.read_text().replace("4.0", "4.5"))
    with pytest.raises(CheckpointError, match="checksum"):
        lab.claim(bundle, more, tmp_path)
    path.write_text("")
    with pytest.raises(CheckpointError, match="give another --folder"):
        lab.claim(bundle, more, tmp_path)
    path.unlink()
    lab.claim(bundle, SMALL, tmp_path)
    path.unlink()
    (tmp_path / "full").mkdir()
    with pytest.raises(CheckpointError, match="holds runs, but no settings.json"):
        lab.claim(bundle, SMALL, tmp_path)
    assert not path.exists()


def test_every_default_that_decides_figures_is_refused_when_it_changes(tmp_path):
    changed = {"selection": "last", "layers": (0, 1), "solver": "euler", "positions": "absolute"}
    changed |= {"fill": "latent", "negative": "blurred", "dtype": "bfloat16"}
    bundle = tiny_bundle()
    lab.claim(bundle, SMALL, tmp_path)
    for f in dataclasses.fields(bundle.defaults):
        if f.name in lab.NOT_MODELS:
            continue
        value = changed.get(f.name) or getattr(bundle.defaults, f.name) * 1.25
        value = value if f.name in changed or f.name in REAL else round(value + 1)
        other = dataclasses.replace(bundle.defaults, **{f.name: value})
        with pytest.raises(InputError, match=f"sampler.{f.name} was"):
            lab.claim(dataclasses.replace(bundle, defaults=other), SMALL, tmp_path)
    spills = dataclasses.replace(bundle.defaults, spill=True)
    lab.claim(dataclasses.replace(bundle, defaults=spills), SMALL, tmp_path)


@pytest.mark.parametrize(
    "rows", [None, [], [{}] * 2, [None] * 2, [{"whole": {}, "windows": [{}] * 5}] * 2], ids=str
)
def test_figures_that_are_none_are_refused(rows, tmp_path):
    run = lab.Run("full", 100)
    (tmp_path / "full").mkdir()
    run.figures(tmp_path).write_text(json.dumps({"rows": rows}))
    with pytest.raises(CheckpointError, match="remove it"):
        lab.rows_of(tmp_path, run, SMALL)


@pytest.mark.parametrize("change", [{"seeds": "2"}, {"seconds": None}, {"cells": ["fill"]}, {}])
def test_settings_that_are_none_are_refused(change, tmp_path):
    said = dataclasses.asdict(SMALL) | change if change else {}
    (tmp_path / lab.SETTINGS).write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="another version"):
        lab.settings_in(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"cells": ("fill",)}, "the cell is"),
        ({"cells": ()}, "the cell is"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": 10**12}, "seeds is 10"),
        ({"timelines": 0}, "timelines is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"seconds": 2}, "seconds is 2"),
        ({"seconds": -1}, "seconds is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        lab.check(tiny_bundle(), dataclasses.replace(SMALL, **change))


def test_a_model_of_other_clips_is_refused():
    bundle = tiny_bundle()
    other = dataclasses.replace(bundle.defaults, overlap=1)
    lab.check(bundle, SMALL)
    with pytest.raises(InputError, match="clips of 17 frames that share 1"):
        lab.check(dataclasses.replace(bundle, defaults=other), SMALL)


def test_cells_differ_in_memory_and_window_alone(monkeypatch):
    asked = []

    class Session:
        def run(self):
            return iter(())

    def opened(bundle, request):
        asked.append((bundle.defaults, request))
        return Session()

    monkeypatch.setattr(lab, "open_session", opened)
    bundle, timelines = tiny_bundle(), draw_timelines(2, 101)
    spills = dataclasses.replace(bundle.defaults, spill=True)  # beside lookahead: no such defaults
    bundle = dataclasses.replace(bundle, defaults=spills)
    for cell in lab.CELLS.values():
        list(lab.sample(bundle, cell, 100, timelines, steps=3))
    found = [(d.capacity, d.window) for d, _ in asked]
    assert found == [(6, (0.3, 0.7)), (1, (0.3, 0.7)), (6, (0, 1)), (1, (0, 1)), (6, (0, 0.7))]
    for d, request in asked:
        same = dataclasses.replace(asked[0][0], window=d.window, capacity=d.capacity)
        assert d == same and (request.seed, request.steps) == (100, 3)
        assert np.array_equal(request.start, asked[0][1].start)
        assert request.timelines == tuple(t.moments for t in timelines)
    start = np.rint((asked[0][1].start[1, 0] + 1) * 127.5)
    assert np.array_equal(start, timelines[1].start)


def test_the_worlds_own_video_is_cut_into_clips_and_put_together_again(tmp_path):
    timelines, seen = draw_timelines(2, 101), []

    def through(clips):
        seen.append(clips.shape)
        return np.concatenate([clips[:, :5] // 2, clips[:, 5:]], axis=1)

    made = lab.world_videos(tmp_path, timelines, through)
    truth = np.stack([t.video.frames(0, 101) for t in timelines])
    assert seen == [(8, 17, 64, 64, 3)] * 2
    assert np.array_equal(made[:, 5:], truth[:, 5:]) and np.array_equal(
        made[:, :5], truth[:, :5] // 2
    )
    assert np.array_equal(lab.world_videos(tmp_path, timelines, None), made)
    os.truncate(tmp_path / lab.WORLD, 10_000)
    with pytest.raises(CheckpointError, match="remove it to make it again"):
        lab.world_videos(tmp_path, timelines, None)


def test_a_row_tells_a_place_that_changes_and_when():
    t = draw_timelines(1, 29)[0]
    world = t.video.frames(0, 29)
    truth = six_parts(world)
    same = measure_row(truth, truth, t.gone, world_outlines())
    assert same["whole"]["sharpness_off"] == same["whole"]["colour_cast"] == 0
    assert same["whole"]["sharpness"] == same["whole"]["saturation"] == 1
    assert same["whole"]["colour_kept"] is None and len(same["windows"]) == 6
    turned = np.concatenate([world[:20], world[20:, :, :, ::-1]])  # red for blue
    row = measure_row(six_parts(turned), truth, t.gone, world_outlines())
    assert row["windows"][5]["colour_cast"] > 0.01 > row["windows"][0]["colour_cast"]
    alone = measure(turned[24:], world[24:])  # the last sixth is 5 of 29 frames
    same = ("colour_cast", "saturation", "sharpness", "clipped", "motion_smoothness")
    assert [alone[name] for name in same] == [row["windows"][5][name] for name in same]
    assert alone["background_reference"] == row["windows"][5]["background_truth"]
    parts = [part["colour_cast"] for part in row["windows"]]
    assert row["whole"]["colour_cast"] == pytest.approx(np.mean(parts))


def test_a_row_tells_what_becomes_of_an_object_that_left():
    t = draw_timelines(2, 197)[1]
    world = t.video.frames(0, 197)
    seen = look(world)
    same = reappearance(seen, t.gone, world_outlines())
    assert same["colour_kept"] == same["shape_kept"] == same["returned"] == 1
    assert same["ghosts"] == 0 and same["tone_drift"] < 0.01
    (gone,) = t.gone
    changed = world.copy()
    changed[gone.back - 12 :] = changed[gone.back - 12 :, :, :, ::-1]  # cyan to yellow
    row = reappearance(look(changed), t.gone, world_outlines())
    assert row["colour_kept"] == 0 and row["tone_drift"] > 0.1
    lost = world.copy()
    lost[gone.out :] = world[0]
    row = reappearance(look(lost), t.gone, world_outlines())
    assert row["returned"] == 0 and row["colour_kept"] is None and row["tone_drift"] is None
    stays = world.copy()
    stays[gone.out :] = world[gone.out - 10]
    assert reappearance(look(stays), t.gone, world_outlines())["ghosts"] == 1
    assert set(reappearance(seen[:100], t.gone, world_outlines()).values()) == {None}
