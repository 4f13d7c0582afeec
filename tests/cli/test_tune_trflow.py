# SPDX-License-Identifier: Apache-2.0
"""`lvjax tune-trflow`: the figures of a run, and what cannot be."""

import importlib.util
import json

import pytest

from lvjax.cli.main import main
from lvjax.lab import tune_trflow as tuning
from lvjax.run import lock

PROMPTS = ("the camera pans left", "a red circle moves up")
ARGS = ("--steps", "3", "--grid", "3", "--high", "0.6")


def tune(model, out, *args) -> int:
    return main(["tune-trflow", "--model", model, "--out", str(out), *args])


def fails(capsys, code, model, out, *args) -> str:
    capsys.readouterr()
    assert tune(model, out, *args) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lvjax: ")
    return lines[0]


def test_a_run_prints_the_curve_and_writes_its_figures(model, tmp_path, capsys):
    out, file = tmp_path / "t.json", tmp_path / "p.txt"
    file.write_text(f"# a comment\n{PROMPTS[1]}\n{PROMPTS[0]}\n")
    given = ("--prompt", PROMPTS[0], "--prompt-file", str(file), "--seed", "7", *ARGS)
    assert tune(model, out, *given) == 0
    said = capsys.readouterr()
    figures = json.loads(out.read_text())
    assert figures["lows"] == pytest.approx([0, 0.2, 0.4]) and figures["high"] == 0.6
    assert figures["runs"] == [{"prompt": p, "seed": 7} for p in PROMPTS]
    assert figures["sampler"]["steps"] == 3 and figures["sampler"]["guidance"] == 2.0
    assert len(figures["af_of_each"]) == 2 and {"dit", "vae"} < figures["weights"].keys()
    assert "AF of [0, 1]" in said.out and f"wrote {out}" in said.out
    for low, af in zip(figures["lows"], figures["af"], strict=True):
        assert f"{low:6.3f}  {af:16.5f}" in said.out
    assert "plan: " in said.out and "run 2/2: AF of [0, 1]" in said.err
    assert "already exists" in fails(capsys, 2, model, out, *given)
    before = out.read_bytes()
    assert tune(model, out, *given, "--overwrite", "--quiet") == 0
    assert not capsys.readouterr().err
    assert out.read_bytes() == before
    unknown = ("--prompt", "a red zebra", "--seed", "7", *ARGS, "--overwrite", "--quiet")
    assert tune(model, out, *unknown, "--no-dc") == 0
    assert capsys.readouterr().err.count("zebra") == 1
    assert figures["keep_dc"] and not json.loads(out.read_text())["keep_dc"]


def test_the_plot_is_a_picture_of_the_curve(model, tmp_path):
    from PIL import Image

    out, picture = tmp_path / "t.json", tmp_path / "t.png"
    given = ("--prompt", PROMPTS[0], "--seed", "0", *ARGS, "--quiet")
    assert tune(model, out, *given, "--plot", str(picture)) == 0
    with Image.open(picture) as image:
        assert min(image.size) >= 400 and len(set(image.convert("L").tobytes())) > 10


def test_what_cannot_be_is_refused_before_anything_is_read(model, tmp_path, capsys, monkeypatch):
    out, prompt = tmp_path / "t.json", ("--prompt", PROMPTS[0])
    monkeypatch.setattr(tuning, "runs", None)
    for args, words in (
        ((), "no prompt is given"),
        (("--prompt", " "), "a prompt is empty"),
        ((*prompt, "--high", "0"), "--high is 0.0"),
        ((*prompt, "--grid", "1"), "--grid is 1"),
        ((*prompt, "--seed", "-1"), "--seed is -1"),
        ((*prompt, "--steps", "0"), "steps is 0"),
        ((*prompt, "--size", "15x16"), "the nearest are"),
        ((*prompt, "--plot", "t.jpg"), "must end in .png"),
        ((*prompt, "--prompt-file", str(tmp_path / "none.txt")), "cannot read"),
    ):
        assert words in fails(capsys, 2, model, out, *args), args
    assert "must end in .json" in fails(capsys, 2, model, tmp_path / "t.txt", *prompt)
    assert "is no folder" in fails(capsys, 2, model, tmp_path / "no" / "t.json", *prompt)
    assert "no model" in fails(capsys, 3, str(tmp_path / "no_model"), out, *prompt)
    with lock.hold(out):
        assert "--out" in fails(capsys, 7, model, out, *prompt)
    assert not out.exists()


def test_without_matplotlib_only_a_plot_is_refused(model, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else found(n, *a)
    )
    given = ("--prompt", PROMPTS[0], "--seed", "0", *ARGS)
    line = fails(capsys, 2, model, tmp_path / "a.json", *given, "--plot", str(tmp_path / "a.png"))
    assert "--plot needs matplotlib" in line and "lvjax[plot]" in line
    assert tune(model, tmp_path / "a.json", *given, "--quiet") == 0
