# SPDX-License-Identifier: Apache-2.0
"""`make gpu-train`, tiny: pieces that go on where the one before stopped, within their limits."""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.checkpoint import save_arrays, tree_arrays
from lvjax.core.errors import InputError
from lvjax.core.params import Param, abstract, flatten
from lvjax.data.clips import ClipStore
from lvjax.lab import gpu_train, pieces, pocket
from lvjax.lab.recipe import Recipe
from lvjax.run.weights import load
from lvjax.train import loop
from lvjax.train.checkpoints import Checkpoints
from lvjax.train.state import init_state, make_optimizer

TINY = gpu_train.TINY


def tick(monkeypatch):
    """A clock that moves one second when lvjax reads it, so that a piece stops at a known place."""
    clock = types.SimpleNamespace(monotonic=itertools.count(0.0).__next__)
    for module in (gpu_train, pocket, loop):
        monkeypatch.setattr(module, "time", clock)


def _steps(folder):
    return pieces.read(pieces.newest(folder))[1]


@pytest.mark.long
def test_pieces_equal_one_run(tmp_path, monkeypatch, capsys):
    """Stopped inside a stage and gone on from the files alone, a run ends as one that was not."""
    one, two, whole = (tmp_path / n for n in ("one", "two", "whole"))
    with monkeypatch.context() as patch:
        tick(patch)
        seconds = gpu_train.RESERVE + 17  # one step of the second stage, then the time is up
        minutes = str(seconds / 60)
        command = ["--tiny", "--minutes", minutes, "--state", str(one), "--out", str(one)]
        assert gpu_train.main(command) == 0
    first = _steps(one)
    assert first["stages"]["vae_image"] == {"step": 2, "done": True}
    assert first["stages"]["dit_memory"] == {"step": 1, "done": False} and not first["complete"]

    arguments = ["--tiny", "--minutes", "9", "--state", str(tmp_path), "--out", str(two)]
    assert gpu_train.main([*arguments, "--bundle", str(tmp_path / "bundle")]) == 0
    assert "goes on from step 3" in capsys.readouterr().err
    last = _steps(two)
    assert last["complete"] and last["steps"] == 6
    lines = [json.loads(x)["step"] for x in last["metrics"]["dit_memory"].splitlines()]
    assert lines == [1, 2]
    names = sorted(p.name for p in two.iterdir())
    assert names == ["pocket-0000006-1of1.safetensors"]

    gpu_train.main(["--tiny", "--minutes", "9", "--state", str(whole), "--out", str(whole)])
    expected, _ = pieces.read(pieces.newest(whole))
    found, _ = pieces.read(pieces.newest(two))
    assert found.keys() == expected.keys()
    for name, a in expected.items():
        np.testing.assert_array_equal(found[name], a, err_msg=name)

    bundle = load(tmp_path / "bundle")
    assert bundle.dit == TINY.dit and bundle.vae.std != TINY.vae.std
    # a finished run stays finished, and needs no clips
    assert gpu_train.main(["--tiny", "--state", str(two), "--out", str(one)]) == 0
    assert [p.name for p in one.iterdir()] == names


def _working(folder, steps: int, done: bool):
    """A run folder whose first stage has a state of random arrays."""
    stage, spec = TINY.autoencoder[0], gpu_train.groups(TINY)[0].spec
    optimizer = make_optimizer(stage.options)
    like = jax.eval_shape(lambda p: init_state(p, optimizer), abstract(spec))
    rng = np.random.default_rng(0)

    def draw(a):
        value = rng.standard_normal(a.shape) if a.dtype == np.float32 else np.full(a.shape, steps)
        return jnp.asarray(value, a.dtype)

    state = jax.tree.map(draw, like)
    state = state.replace(key=jax.random.key_data(jax.random.key(stage.options.seed)))
    with Checkpoints(folder / stage.name) as saved:
        saved.save(state)
    if done:
        (folder / stage.name / "done").touch()


def _saved(folder, group):
    with Checkpoints(folder) as saved:
        return tree_arrays(saved.restore(pieces._like(group, group.stages[0]))[0])


@pytest.mark.parametrize("level", range(len(pieces.LEVELS)))
def test_every_level_comes_back(tmp_path, monkeypatch, level):
    _working(tmp_path / "work", 1, done=False)
    own = gpu_train.groups(TINY)
    monkeypatch.setattr(pieces, "LEVELS", pieces.LEVELS[level:])
    description = pieces.pack(tmp_path / "out", tmp_path / "work", own, {"complete": False})
    assert description["steps"] == 1 and description["stages"]["vae_image"]["step"] == 1
    arrays, stored = pieces.read(pieces.newest(tmp_path))
    pieces.unpack(tmp_path / "again", arrays, stored, own)
    found, wanted = (_saved(tmp_path / name / "vae_image", own[0]) for name in ("again", "work"))
    assert found["step"] == 1 and found.keys() == wanted.keys()
    kept = pieces.LEVELS[0]
    for name, a in wanted.items():
        tree, _, rest = name.partition("/")
        assert found[name].dtype == a.dtype
        if tree == "params" and "params" not in kept.kept:
            a = wanted[f"ema/{rest}"]
        if tree == "opt" and "opt" not in kept.kept and a.ndim:
            a = np.zeros_like(a)
        rounding = kept.moments if tree == "opt" else kept.weights
        error = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[rounding]
        np.testing.assert_allclose(found[name], a, rtol=error, atol=1e-7 if error else 0)


@pytest.mark.parametrize("done", [False, True])
def test_steps_that_were_skipped_are_no_steps(done):
    stage = TINY.autoencoder[0]
    stage = dataclasses.replace(stage, options=dataclasses.replace(stage.options, nonfinite="skip"))
    group = pieces.Group("vae", (stage,), {"w": Param((2,), (None,))})
    like = pieces._like(group, stage)
    own = {"params/w": np.ones(2), "ema/w": np.ones(2)}
    counters = {"opt/notfinite_count": 1, "opt/total_notfinite": 3}
    if not done:
        own |= {k: a for k, a in tree_arrays(like).items() if k.startswith("opt/")}
        own |= {k: np.int32(n) for k, n in counters.items()}
    found = tree_arrays(pieces._state(own, like, stage, {"step": 9, "done": done}))
    assert found["step"] == 9
    for name, count in counters.items():
        assert found[name] == (0 if done else count)
    schedule = [n for n in found if n.endswith("count") and n not in counters and "total" not in n]
    assert schedule and all(found[n] == (9 if done else 0) for n in schedule)


def test_what_does_not_fit_is_rounded_then_refused(monkeypatch):
    names = [f"dit/{tree}/{i}" for tree in ("params", "ema", "opt/mu", "opt/nu") for i in range(40)]
    arrays = {n: np.zeros(100, np.float32) for n in names} | {"dit/opt/count": np.int32(5)}
    monkeypatch.setattr(pieces, "HEADER", 0)
    for level, weight in enumerate((16, 12, 8, 6, 2)):  # bytes per parameter, of which 4000
        monkeypatch.setattr(pieces, "MAX_BYTES", 1000 * weight + 4)
        found, rounded, bins = pieces._fit(arrays)
        assert found == level and len(bins) <= pieces.MAX_FILES and "dit/opt/count" in rounded
        assert sorted(n for names in bins for n in names) == sorted(rounded)
    monkeypatch.setattr(pieces, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="allowed are 4 files"):
        pieces._fit(arrays)


def test_the_full_recipe_fits_the_limits():
    """At its largest, while the transformer is trained, weights and moments are kept."""
    recipe = Recipe()
    vae, dit, _ = gpu_train.groups(recipe)
    arrays = {f"vae/ema/{k}": np.zeros(p.shape, np.float32) for k, p in flatten(vae.spec).items()}
    for tree in ("params", "ema", "opt/mu", "opt/nu"):
        own = flatten(dit.spec).items()
        arrays |= {f"dit/{tree}/{k}": np.zeros(p.shape, np.float32) for k, p in own}
    level, _, bins = pieces._fit(arrays)
    assert pieces.LEVELS[level].kept == ("params", "ema", "opt") and len(bins) <= 4


def test_pieces_of_other_models_and_damaged_ones_are_refused(tmp_path, capsys):
    _working(tmp_path / "work", 2, done=True)
    meta = {"complete": False, "models": "others", "latents": None}
    pieces.pack(tmp_path / "a", tmp_path / "work", gpu_train.groups(TINY), meta)
    arguments = ["--tiny", "--state", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    assert gpu_train.main(arguments) == 3
    assert "is of other models; give another --state" in capsys.readouterr().err
    path = pieces.newest(tmp_path / "a")[0]
    path.write_bytes(path.read_bytes()[:-100])
    assert gpu_train.main(arguments) == 3
    save_arrays(path, {"x": np.zeros(3)}, {})
    assert gpu_train.main(arguments) == 3
    assert "is not a piece of a pocket run" in capsys.readouterr().err
    assert gpu_train.main([*arguments, "--minutes", "nan"]) == 2


def test_newest_piece_is_the_whole_one_with_most_steps(tmp_path):
    for name in ("a/pocket-0000009-1of2", "a/pocket-0000007-1of1", "b/pocket-0000008-1of1", "c/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.safetensors").touch()
    assert [p.name for p in pieces.newest(tmp_path)] == ["pocket-0000008-1of1.safetensors"]
    assert pieces.newest(tmp_path / "missing") == []


def test_an_accelerator_gets_larger_batches():
    recipe = gpu_train.scaled(Recipe(), 8)
    assert [s.batch for s in recipe.autoencoder] == [128, 32, 16]
    assert recipe.extension[0].options == Recipe().extension[0].options


def test_several_processes_render_the_same_clips(tmp_path, monkeypatch):
    one, two = (ClipStore(tmp_path / n, videos=3, clips=1) for n in ("one", "two"))
    gpu_train.fill(one, 1)
    monkeypatch.setattr(gpu_train, "FEW", 2)
    gpu_train.fill(two, 2)
    assert two.ready == 3
    np.testing.assert_array_equal(one.frames, two.frames)
    np.testing.assert_array_equal(one.ids, two.ids)
