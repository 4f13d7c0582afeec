# SPDX-License-Identifier: Apache-2.0
"""Training resumes bit for bit, logs each step once, and stops on NaN."""

import gc
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import CheckpointError, InputError, NonFiniteError
from lvjax.core.mesh import make_mesh
from lvjax.core.signals import interruptible
from lvjax.models.vae import vae_spec
from lvjax.train.autoencoder import autoencoder_loss, inflate
from lvjax.train.checkpoints import KEPT, Checkpoints, disk_bytes, is_begun
from lvjax.train.loop import METRICS, Indexed, Outside, fit
from lvjax.train.state import TrainOptions, init_state, joined, make_optimizer, make_step, split
from tests.drawn import drawn
from tests.tiny import VAE

# Orbax leaves tasks behind where it reads damaged files
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OPTIONS = TrainOptions(steps=12, learning_rate=1e-2, warmup=2, log_every=3, save_every=0.0)


def loss(params, batch, key):
    noise = 0.1 * jax.random.normal(key, batch.shape)
    return jnp.mean(jnp.square(batch @ params["w"] - batch + noise)), {}


def batches(n: int):
    return np.random.default_rng([5, n]).standard_normal((8, 4)).astype(np.float32)


def start():
    optimizer = make_optimizer(OPTIONS)
    return make_step(loss, optimizer, OPTIONS), init_state({"w": jnp.zeros((4, 4))}, optimizer)


def stopping_at(cut: int):
    """The batches up to one at which training is interrupted."""

    def batch(n):
        if n == cut:
            raise KeyboardInterrupt
        return batches(n)

    return batch


def test_a_run_cut_anywhere_equals_the_uninterrupted_one(tmp_path):
    step, state = start()
    whole = fit(step, state, Indexed(batches), OPTIONS, tmp_path / "whole")
    for cut in (1, 4, 11):
        folder = tmp_path / f"cut{cut}"
        step, state = start()
        with pytest.raises(KeyboardInterrupt):
            fit(step, state, Indexed(stopping_at(cut)), OPTIONS, folder)
        step, state = start()
        again = fit(step, state, Indexed(batches), OPTIONS, folder)
        jax.tree.map(np.testing.assert_array_equal, again, whole)
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines] == [3, 6, 9, 12]
        losses = [
            json.loads(x)["loss"]
            for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
        ]
        assert [x["loss"] for x in lines] == losses


def test_what_is_fixed_stays_and_the_rest_moves():
    params = {"a": {"b": jnp.ones(3), "bc": jnp.ones(3)}, "d": jnp.ones(3)}
    o = TrainOptions(4, 1e-2, 1, weight_decay=0.1)
    optimizer = make_optimizer(o)

    def squares(p, batch, key):
        assert p.keys() == params.keys() and p["a"].keys() == params["a"].keys()
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(p)), {}

    trained, fixed = split(params, ("a/b",))
    assert trained.keys() == {"a", "d"} and trained["a"].keys() == {"bc"}
    step, state = make_step(squares, optimizer, o), init_state(trained, optimizer)
    for _ in range(2):
        state, _ = step(state, fixed, jnp.zeros(()))
    assert (joined(state.params, fixed)["a"]["b"] == 1).all()
    assert (state.params["a"]["bc"] < 1).all() and (state.params["d"] < 1).all()
    for wrong in ("a/x", "a/b/c", "b"):
        with pytest.raises(InputError, match=f"no parameters '{wrong}'"):
            split(params, (wrong,))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_the_snapshot(tmp_path, number):
    def signalled(n):
        if n == 4:
            signal.raise_signal(number)
        return batches(n)

    step, state = start()
    with interruptible():
        with pytest.raises(KeyboardInterrupt) as e:
            fit(step, state, Indexed(signalled), OPTIONS, tmp_path)
        assert e.value.args == (number,)
    with Checkpoints(tmp_path) as saved:
        assert saved.newest == 5


def test_fit_outside_the_main_thread_leaves_signals_alone(tmp_path):
    step, state = start()
    with ThreadPoolExecutor(1) as pool:
        assert (
            pool.submit(fit, step, state, Indexed(batches), OPTIONS, tmp_path).result().step == 12
        )


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_give_the_curve_of_one(tmp_path, shape):
    step, state = start()
    one = fit(step, state, Indexed(batches), OPTIONS, tmp_path / "one")
    step, state = start()
    eight = fit(step, state, Indexed(batches), OPTIONS, tmp_path / "eight", mesh=make_mesh(*shape))
    np.testing.assert_allclose(one.params["w"], eight.params["w"], atol=1e-5)


def test_nan_stops_and_the_snapshot_stays(tmp_path):
    step, state = start()
    with pytest.raises(NonFiniteError, match="nan at step 5; lower"):
        fit(
            step,
            state,
            Indexed(lambda n: batches(n) * (np.nan if n == 4 else 1)),
            OPTIONS,
            tmp_path,
        )
    with Checkpoints(tmp_path) as saved:
        kept, position = saved.restore(start()[1])
    assert position == {"batch": 4}
    assert kept.step == 4 and all(np.isfinite(a).all() for a in jax.tree.leaves(kept.params))
    step, state = start()
    assert fit(step, state, Indexed(batches), OPTIONS, tmp_path).step == OPTIONS.steps


def test_nan_that_is_noticed_late_says_so(tmp_path):
    step, state = start()
    o = replace(OPTIONS, save_every=60.0, log_every=4)
    feed = Indexed(lambda n: batches(n) * (np.nan if n == 5 else 1))
    with pytest.raises(NonFiniteError, match="loss is nan at step 8, none since 4 was looked at"):
        fit(step, state, feed, o, tmp_path)


SKIP = replace(OPTIONS, nonfinite="skip", save_every=60.0, log_every=1)


def skipping(folder, wrong, stop=None, steps=SKIP.steps):
    """Train with these batches not finite, at most until batch `stop`; the state."""

    def batch(n):
        if n == stop:
            raise KeyboardInterrupt
        return batches(n) * (np.nan if n in wrong else 1)

    o = replace(SKIP, steps=steps, save_every=60.0 if stop is None else 0.0)
    optimizer = make_optimizer(o)
    state = init_state({"w": jnp.zeros((4, 4))}, optimizer)
    return fit(make_step(loss, optimizer, o), state, Indexed(batch), o, folder)


def test_skip_leaves_steps_out_and_goes_on_as_it_was(tmp_path):
    whole = skipping(tmp_path / "whole", {2, 3, 7})
    assert int(whole.opt.total_notfinite) == 3 and np.isfinite(whole.params["w"]).all()
    lines = [json.loads(x) for x in (tmp_path / "whole" / METRICS).read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" not in x] == [3, 4, 8]
    assert [x["in_a_row"] for x in lines[2:5]] == [1, 2, 0] and lines[-1]["skipped"] == 3
    with pytest.raises(KeyboardInterrupt):  # between the two that are left out
        skipping(tmp_path / "cut", {2, 3, 7}, stop=3)
    again = skipping(tmp_path / "cut", {2, 3, 7})
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_a_step_that_is_skipped_moves_nothing():
    optimizer = make_optimizer(SKIP)
    step, state = make_step(loss, optimizer, SKIP), init_state({"w": jnp.ones((4, 4))}, optimizer)
    for n in range(3):
        state, _ = step(state, {}, batches(n))
    before = np.asarray(state.params["w"])
    state, _ = step(state, {}, batches(3) * np.nan)
    np.testing.assert_array_equal(state.params["w"], before)
    state, _ = step(state, {}, batches(4))
    assert (state.params["w"] != before).any()


def test_skip_gives_up_after_ten_in_a_row(tmp_path):
    with pytest.raises(NonFiniteError, match="nan at step 13; lower"):
        skipping(tmp_path, set(range(2, 30)), steps=30)
    assert skipping(tmp_path / "ten", set(range(2, 12)), steps=14).step == 14


def test_a_sample_sees_no_mesh_and_a_saved_state(tmp_path):
    seen, o = [], replace(OPTIONS, save_every=60.0, sample_every=4)

    def sample(state):
        assert jax.sharding.get_abstract_mesh().empty
        seen.append((int(state.step), is_begun(tmp_path) and newest()))

    def newest():
        return max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())

    step, state = start()
    fit(
        step,
        state,
        Indexed(batches),
        o,
        tmp_path,
        mesh=make_mesh(2),
        outside=Outside(sample=sample),
    )
    assert seen == [(4, 4), (8, 8), (12, 12)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_sample_at_once_and_no_step_follows(tmp_path, number):
    def sample(state):
        signal.raise_signal(number)
        raise AssertionError("not reached")

    step, state = start()
    o = replace(OPTIONS, save_every=60.0, sample_every=4)
    with interruptible(), pytest.raises(KeyboardInterrupt) as e:
        fit(step, state, Indexed(batches), o, tmp_path, outside=Outside(sample=sample))
    assert e.value.args == (number,)
    with Checkpoints(tmp_path) as saved:
        assert saved.newest == 4


def test_a_signal_before_a_sample_leaves_it_out(tmp_path):
    def report(line):
        signal.raise_signal(signal.SIGTERM)

    def sample(state):
        raise AssertionError("not reached")

    step, state = start()
    o = replace(OPTIONS, save_every=60.0, sample_every=3)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        fit(
            step,
            state,
            Indexed(batches),
            o,
            tmp_path,
            outside=Outside(report=report, sample=sample),
        )
    with Checkpoints(tmp_path) as saved:
        assert saved.newest == 3


def test_shapes_are_enough_to_go_on(tmp_path):
    step, state = start()
    o = replace(OPTIONS, save_every=60.0)
    whole = fit(step, state, Indexed(batches), o, tmp_path / "whole")
    step, state = start()
    like = jax.eval_shape(lambda: start()[1])
    with pytest.raises(KeyboardInterrupt):
        fit(step, state, Indexed(stopping_at(5)), OPTIONS, tmp_path / "cut")
    again = fit(step, like, Indexed(batches), o, tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_the_disk_that_is_planned_is_what_checkpoints_take(tmp_path):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((500, 400)), jnp.float32)}
    state = init_state(params, make_optimizer(OPTIONS))
    state = state.replace(opt=jax.tree.map(lambda a: a + a.dtype.type(1), state.opt))
    with Checkpoints(tmp_path) as saved:
        saved.save(state)
    took = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert 0.4 < took * (KEPT + 1) / disk_bytes(state) < 1.05


def test_a_foreign_checkpoint_is_refused(tmp_path):
    step, state = start()
    fit(step, state, Indexed(batches), OPTIONS, tmp_path)
    for other in ({"v": jnp.zeros((4, 4))}, {"w": jnp.zeros((4, 5))}):
        like = init_state(other, make_optimizer(OPTIONS))
        with Checkpoints(tmp_path) as saved, pytest.raises(CheckpointError, match="another model"):
            saved.restore(like)


def test_every_flipped_bit_is_noticed(tmp_path):
    step, state = start()
    state = fit(step, state, Indexed(batches), OPTIONS, tmp_path)
    folder = tmp_path / "checkpoints" / "12"
    data = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size > 500]
    rng, named = np.random.default_rng(0), 0
    for _ in range(40):
        path = data[rng.integers(len(data))]
        before = path.read_bytes()
        place, bit = int(rng.integers(len(before))), int(rng.integers(8))
        changed = bytearray(before)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        try:
            with Checkpoints(tmp_path) as saved:
                found, _ = saved.restore(start()[1])
            jax.tree.map(np.testing.assert_array_equal, found, state)  # a byte that nothing reads
        except CheckpointError as e:
            assert "checkpoints/12" in str(e) and "remove" in str(e)
            named += "is damaged" in str(e)
        path.write_bytes(before)
    gc.collect()  # of the tasks that Orbax leaves behind, in this test
    assert named > 10


def test_inflated_autoencoder_repeats_a_picture_in_time():
    params = inflate(drawn(vae_spec(VAE), 0))
    still = np.broadcast_to(
        np.random.default_rng(0).integers(0, 255, (1, 1, 16, 16, 3), np.uint8), (1, 5, 16, 16, 3)
    )
    value, metrics = autoencoder_loss(VAE, latent_noise=0.0)(params, still, jax.random.key(0))
    assert np.isfinite(value) and np.isfinite(metrics["psnr"])
    from lvjax.models.vae import decode, encode

    video = decode(
        params,
        encode(params, still.astype(np.float32) / 127.5 - 1, VAE, piece="all"),
        VAE,
        piece="all",
    )
    np.testing.assert_allclose(
        video[:, 1:], np.broadcast_to(video[:, :1], video[:, 1:].shape), atol=1e-4
    )
