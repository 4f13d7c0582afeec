# SPDX-License-Identifier: Apache-2.0
"""The plan against what it stands for: the program's operations, the files, the measured peak."""

import dataclasses
import math
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import numpy as np
import pytest

from lvjax.core.errors import CheckpointError, DoesNotFitError, StorageError
from lvjax.rollout.method import compile_step
from lvjax.run import plan as plans
from lvjax.run.bundle import outline
from lvjax.run.machine import measured_rate
from lvjax.run.opening import ClipWork
from lvjax.run.plan import Work, make_plan, work_of
from lvjax.run.request import Request
from lvjax.run.session import open_session
from lvjax.run.state import save_state
from lvjax.run.weights import load, save
from tests.tiny import tiny_bundle

CLIP = ClipWork(latents=5, passes=15, encoded=2, kept=30, layers=(2, 4))
WORK = Work(batch=1, size=(64, 64), clips=3, frames=41, guided=True, clip=CLIP)


@pytest.fixture(scope="module")
def pocket():
    return outline("pocket")


def change(work: Work, **fields) -> Work:
    return dataclasses.replace(work, **fields)


def request(rows: int = 1, **fields) -> Request:
    return Request(((((0.0, "the camera pans left"),)),) * rows, 41, **fields)


def test_an_outline_is_the_model_without_its_weights(pocket, tmp_path):
    whole = load("pocket")
    assert (pocket.dit, pocket.vae, pocket.text) == (whole.dit, whole.vae, whole.text)
    assert pocket.defaults == whole.defaults and pocket.params == {}
    save(tmp_path, tiny_bundle())
    assert outline(str(tmp_path)).dit == tiny_bundle().dit
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model.json lacks"):
        outline(str(tmp_path))


def test_work_is_what_the_request_costs(pocket):
    assert work_of(request(3), pocket) == change(WORK, batch=3)
    assert not work_of(request(guidance=1.0), pocket).guided
    for shape, clips in (((64, 64, 3), 3), ((3, 64, 64, 3), 3), ((2, 9, 64, 64, 3), 4)):
        assert work_of(request(start=np.zeros(shape, np.float32)), pocket).clips == clips
    left = work_of(request(), pocket, clip=2)
    assert (left.clips, left.frames) == (1, 12)
    assert work_of(request(), pocket, clip=3) == change(WORK, clips=0, frames=0)


def operations(jaxpr) -> float:
    """Of every matrix product and convolution in a program, loops counted as often as they run."""
    total = 0.0
    for e in jaxpr.eqns:
        shapes = [v.aval.shape for v in (*e.invars, *e.outvars) if hasattr(v.aval, "shape")]
        if e.primitive.name == "dot_general":
            (contract, _), _ = e.params["dimension_numbers"]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[0][i] for i in contract)
        elif e.primitive.name == "conv_general_dilated":
            spec = e.params["dimension_numbers"].rhs_spec
            kernel = math.prod(shapes[1]) / shapes[1][spec[0]]
            total += 2 * math.prod(shapes[-1]) * kernel
        times = e.params["length"] if e.primitive.name == "scan" else 1
        inner = (v for p in e.params.values() for v in (p if isinstance(p, tuple) else (p,)))
        for p in inner:
            p = getattr(p, "jaxpr", p)
            if hasattr(p, "eqns"):
                total += times * operations(p)
    return total


@pytest.mark.parametrize(
    "change", [{}, {"guidance": 1.0}, {"size": (96, 64)}, {"steps": 5}], ids=str
)
def test_operations_are_those_of_the_program(change):
    bundle = load("pocket")
    bundle = dataclasses.replace(bundle, defaults=dataclasses.replace(bundle.defaults, capacity=3))
    wanted = request(**change)
    session = open_session(bundle, wanted)
    clip = next(iter(session.clips(0)))
    found = operations(jax.make_jaxpr(session.method.step)(session.abstract_state(), clip).jaxpr)
    plan = make_plan(bundle, work_of(wanted, bundle))
    assert plan.flops / plan.clips == pytest.approx(found, rel=0.1)


def test_what_guidance_given_frames_and_videos_cost(pocket):
    plain = make_plan(pocket, WORK)
    alone = make_plan(pocket, change(WORK, guided=False))
    assert alone.device_bytes < plain.device_bytes and 1.5 < plain.flops / alone.flops < 2
    assert alone.disk < plain.disk
    assert make_plan(pocket, change(WORK, clips=1)).flops == plain.flops / 3
    two = make_plan(pocket, change(WORK, batch=2))
    assert two.devices == 2 and two.memory == plain.memory and two.flops == 2 * plain.flops


def test_the_state_is_twice_on_disk(tmp_path):
    bundle = tiny_bundle()
    bundle = dataclasses.replace(
        bundle, defaults=dataclasses.replace(bundle.defaults, capacity=200)
    )
    session = open_session(bundle, request())
    save_state(tmp_path / "state", session.state(), {})
    size = (tmp_path / "state").stat().st_size
    plan = make_plan(bundle, work_of(request(), bundle))
    videos = 16 * 16 * 41 * plans.VIDEO_BITS / 8 + 2e5
    assert plan.disk - videos == pytest.approx(2 * size, rel=0.05)


def test_the_bank_costs_what_the_program_holds():
    """By XLA's own account of the compiled clip, for banks of two capacities."""
    found, planned = [], []
    for capacity in (20, 120):
        bundle = tiny_bundle()
        defaults = dataclasses.replace(bundle.defaults, capacity=capacity)
        bundle = dataclasses.replace(bundle, defaults=defaults)
        session = open_session(bundle, request())
        clip = next(iter(session.clips(0)))
        use = compile_step(session.method, session.state(), clip).memory_analysis()
        found.append(use.argument_size_in_bytes + use.temp_size_in_bytes)
        planned.append(make_plan(bundle, work_of(request(), bundle)).device_bytes)
    assert planned[1] - planned[0] == pytest.approx(found[1] - found[0], rel=0.15)


def test_time_follows_the_rate(pocket):
    plan = make_plan(pocket, WORK)
    rate = measured_rate("float32")
    assert 1e8 < rate < 1e15
    assert plans.seconds(plan, rate) == pytest.approx(2 * plans.seconds(plan, 2 * rate))
    line = plans.describe(plan, rate)
    assert "\n" not in line and "estimate" in line and "matrix product timed now" in line
    assert "offload none, as asked" in line and "on the host" not in line


@pytest.mark.parametrize(
    "work", [change(WORK, batch=64), change(WORK, size=(512, 512), guided=False)]
)
def test_a_refusal_names_a_setting_that_fits(pocket, work, monkeypatch, tmp_path):
    """Given all of the work: a suggestion for unguided frames would be too small for guided."""
    needs = make_plan(pocket, work).host_bytes + plans.COMPILING
    monkeypatch.setattr(plans, "host_memory", lambda: int(needs) - 1)
    with pytest.raises(DoesNotFitError, match="fit") as e:
        plans.check_memory(make_plan(pocket, work), pocket, work)
    videos, width, height = re.search(r"(\w+) videos? .*of (\d+)x(\d+)", str(e.value)).groups()
    batch = 1 if videos == "one" else int(videos)
    fitting = change(work, batch=batch, size=(int(height), int(width)))
    plans.check_memory(make_plan(pocket, fitting), pocket, fitting)


def test_nothing_smaller_fits(pocket, monkeypatch, tmp_path):
    monkeypatch.setattr(plans, "host_memory", lambda: 10**8)
    with pytest.raises(DoesNotFitError, match="free memory"):
        plans.check_memory(make_plan(pocket, WORK), pocket, WORK)


def test_a_disk_that_is_too_small(pocket, monkeypatch, tmp_path):
    plan = make_plan(pocket, WORK)
    monkeypatch.setattr(plans.shutil, "disk_usage", lambda _: Usage(plan.disk - 1))
    with pytest.raises(StorageError, match="free space"):
        plans.check_disk(plan, tmp_path / "a.mp4")
    (tmp_path / "a.mp4.state").write_bytes(b"1")  # of a run that goes on
    plans.check_disk(plan, tmp_path / "a.mp4")
    with pytest.raises(StorageError):
        monkeypatch.undo()
        plans.check_disk(plan, tmp_path / "nowhere" / "a.mp4")


Usage = namedtuple("Usage", "free")


MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("--guidance", "1"),
        ("--size", "128x128"),
        ("--num-videos", "4", "--set", "defaults.capacity=6"),
    ],
    ids=" ".join,
)
def test_planned_memory_is_within_15_percent_of_the_peak(settings, pocket, tmp_path):
    """A real run of the pocket model on one device, its programs compiled by the run before it."""
    command = [sys.executable, "-m", "lvjax.cli.main", "generate", "--prompt", "a red circle moves"]
    command += ["--frames", "29", "--out", str(Path(tmp_path) / "a.mp4"), "--overwrite", *settings]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    planned = 1e9 * float(re.search(r"memory ([\d.]+) GB", line)[1])
    measure = [sys.executable, "-c", MEASURE, *command]
    peak = float(subprocess.run(measure, check=True, capture_output=True, text=True).stdout)
    print(f"{' '.join(settings)}: planned {planned / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert planned == pytest.approx(peak, rel=0.15)
