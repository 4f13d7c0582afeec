# SPDX-License-Identifier: Apache-2.0
"""`make gpu` in its tiny mode: rows for every program, a table, a clock, an honest exit code."""

import json

import jax
import numpy as np
import pytest

from lvjax.bench import cases_attention, gpu
from lvjax.bench.measure import Case, Work, relative, run_case


def test_tiny_run_measures_every_program(tmp_path, capsys):
    assert gpu.main(["--tiny", "--out", str(tmp_path), "--minutes", "5"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {r["status"] for r in rows} == {"ok"}
    assert {r["case"] for r in rows} >= {
        "gemm",
        "attention",
        "block tiny",
        "decode",
        "forward tiny",
    }
    assert {r["impl"] for r in rows if r["case"] == "attention"} >= {"reference", "chunked"}
    for r in rows:
        assert r["device_kind"] and r["versions"]["jax"] == jax.__version__ and "commit" in r
        assert r["relative_error"] <= r.get("tolerance", 1e-2)
        if not r["case"].endswith(("CPU", "check", "mask")):
            assert r["median_seconds"] > 0 and r["iqr_seconds"] >= 0 and r["samples"] >= 5
    assert any(r["impl"].startswith("torch SDPA") for r in rows)
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "report.md").read_text() + "\n" and "No case failed." in shown
    assert shown.count("\n| ") == len(rows) + 2


def test_cases_that_no_longer_fit_are_named(tmp_path, capsys):
    assert gpu.run(tmp_path, seconds=6, tiny=True, only="decode") == 0
    assert "Left out, the time was up: decode against CPU" in capsys.readouterr().out
    assert (tmp_path / "results.jsonl").read_text() == ""


def test_a_wrong_kernel_fails_the_run(tmp_path, monkeypatch, capsys):
    def wrong(q, k, v, mask=None):
        return 1.1 * cases_attention.attend_reference(q, k, v, mask)

    monkeypatch.setitem(cases_attention.IMPLEMENTATIONS, "chunked", (wrong, lambda *_: True))
    monkeypatch.setattr(gpu, "rival", lambda *_: "")
    assert gpu.run(tmp_path, 300, True, only="attention check") == 1
    assert "Failed: attention check B=2 L=65 S=97" in capsys.readouterr().out


def _case(run, tolerance=None, **more):
    work = Work(run, (jax.numpy.ones(4),), lambda out: relative(out, np.ones(4)))
    return Case("test", {"n": 4}, "float32", "xla", lambda: work, tolerance=tolerance, **more)


def test_rows_of_cases_that_do_not_work(monkeypatch):
    def refuse(x):
        raise ValueError("not on this device")

    assert run_case(_case(refuse))["note"] == "ValueError: not on this device"
    nan = run_case(_case(lambda x: x / 0.0 * 0.0, tolerance=1e-3))
    assert nan["status"] == "failed" and "relative error nan" in nan["note"]
    monkeypatch.setattr("lvjax.bench.measure.device_memory", lambda: 2**30)
    assert run_case(_case(lambda x: x, memory=2**34))["status"] == "does not fit"


@pytest.mark.parametrize("mask", [None, "key"])
def test_the_truth_in_numpy_is_the_reference(mask):
    work = cases_attention.check_work("reference", (5, 7, 2), mask, "float32")
    assert work.error(work.run(*work.args)) < 1e-6
