# SPDX-License-Identifier: Apache-2.0
"""Training resumes bit for bit, logs each step once, and stops on NaN."""

import gc
import json
import signal
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import CheckpointError, InputError, NonFiniteError
from lvjax.core.mesh import make_mesh
from lvjax.core.signals import interruptible
from lvjax.models.vae import vae_spec
from lvjax.train.autoencoder import autoencoder_loss, inflate
from lvjax.train.checkpoints import Checkpoints
from lvjax.train.loop import Indexed, fit
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


def test_a_run_cut_anywhere_equals_the_uninterrupted_one(tmp_path):
    step, state = start()
    whole = fit(step, state, Indexed(batches), OPTIONS, tmp_path / "whole")
    for cut in (1, 4, 11):
        folder = tmp_path / f"cut{cut}"

        def stopping(n, cut=cut):
            if n == cut:
                raise KeyboardInterrupt
            return batches(n)

        step, state = start()
        with pytest.raises(KeyboardInterrupt):
            fit(step, state, Indexed(stopping), OPTIONS, folder)
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
    with pytest.raises(NonFiniteError, match="step 5"):
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
