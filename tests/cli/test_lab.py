# SPDX-License-Identifier: Apache-2.0
"""`lvjax lab`: a whole experiment with a tiny model, and its videos for VBench."""

import json

import numpy as np
import pytest

from lvjax.cli import lab
from lvjax.cli.main import main
from lvjax.data.prompts import SHAPES
from lvjax.io.video import read_video
from lvjax.lab import error_free
from lvjax.lab.object_metrics import GRID

OUTLINES = {shape: np.full((GRID, GRID), i + 1.0) for i, shape in enumerate(SHAPES)}
ARGS = ("--quick", "--seconds", "3", "--timelines", "1", "--steps", "2", "--cell", "full")
BOTH = (*ARGS, "--cell", "baseline")


@pytest.fixture
def run(model, monkeypatch):
    monkeypatch.setattr(error_free, "BATCH", 2)
    monkeypatch.setattr(lab, "EVERY", 0)
    # nothing can be seen through a random autoencoder
    monkeypatch.setattr(error_free, "shape_outlines", lambda through: OUTLINES)
    return lambda folder, *args: main(
        ["lab", "error-free", "--model", model, "--folder", str(folder), *args]
    )


def fails(capsys, code, done) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert done == code and len(lines) == 1 and lines[0].startswith("lvjax: ")
    return lines[0]


def test_a_whole_experiment_again_and_exported(run, tmp_path, capsys):
    folder, out = tmp_path / "runs", tmp_path / "vbench"
    assert run(folder, *BOTH) == 0
    said = capsys.readouterr()
    assert f"wrote {folder / 'report.md'}" in said.out and "frames/s" in said.err
    names = {"report.md", "report.json", "windows.png", "sheet-00.jpg"}
    before = {name: (folder / name).read_bytes() for name in names}
    (folder / "baseline" / "seed-100.json").unlink()
    assert run(folder, *BOTH, "--quiet") == 0 and not capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in names} == before
    figures = json.loads(before["report.json"])
    assert {k: len(v) for k, v in figures["rows"].items()} == {"full": 1, "baseline": 1}
    assert figures["about"]["sampler"]["steps"] == 2 and figures["about"]["quick"]
    assert figures["rows"]["full"] != figures["rows"]["baseline"]
    frames, fps = read_video(folder / "full" / "seed-100-timeline-00.mp4")
    assert frames.shape == (25, 128, 128, 3) and fps == 8
    assert (
        "seeds was 1, is 0" in before["report.md"].decode()
        or b"quick version" in before["report.md"]
    )
    other = fails(capsys, 2, run(folder, *ARGS))
    assert "cells was ['full', 'baseline'], is ['full']" in other

    assert main(["lab", "export-vbench", str(out), "--from", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"wrote 3 folders of videos to {out}; " in said and "imaging_quality" in said
    cells = {"reference", "full", "baseline"}
    assert {p.name for p in out.iterdir()} == cells | {f"{cell}.json" for cell in cells}
    for cell in cells:
        prompts = json.loads((out / f"{cell}.json").read_text())
        assert set(prompts) == {p.name for p in (out / cell).iterdir()} and len(prompts) == 1
        for name, prompt in prompts.items():
            assert prompt.startswith("the camera pans")
            assert (out / cell / name).read_bytes() == (folder / cell / name).read_bytes()
    capsys.readouterr()
    again = main(["lab", "export-vbench", str(out), "--from", str(folder)])
    assert "is not empty" in fails(capsys, 2, again)


def test_what_cannot_be_is_refused_before_anything_is_made(run, tmp_path, capsys):
    for args, words in (
        (("--cell", "fll"), "the cell is ['fll']"),
        (("--seconds", "1"), "give 3 or more"),
        (("--seeds", "0"), "seeds is 0"),
        (("--folder", ""), "--folder is empty"),
    ):
        folder = tmp_path / "none"
        assert words in fails(capsys, 2, run(folder, *args))
        assert not folder.exists()
    nothing = main(["lab", "export-vbench", str(tmp_path / "o"), "--from", str(tmp_path)])
    assert "has no runs" in fails(capsys, 2, nothing)
