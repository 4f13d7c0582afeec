# SPDX-License-Identifier: Apache-2.0
"""Training resumes bit for bit, logs each step once, and stops on NaN; the losses see what they
should.
"""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.checkpoint import load_arrays
from lvjax.core.errors import CheckpointError, NonFiniteError
from lvjax.core.signals import interruptible
from lvjax.lab.batches import latent_batches
from lvjax.lab.recipe import Stage
from lvjax.models.dit import dit_spec
from lvjax.models.pocket_text import text_spec
from lvjax.models.vae import vae_spec
from lvjax.train.autoencoder import autoencoder_loss, inflate
from lvjax.train.extension import ExtensionTask, condition_of, extension_loss
from lvjax.train.loop import TrainOptions, fit, init_state, load_snapshot, make_optimizer, make_step
from tests.drawn import drawn
from tests.tiny import DIT, TEXT, VAE

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
    whole = fit(step, state, batches, OPTIONS, tmp_path / "whole")
    for cut in (1, 4, 11):
        folder = tmp_path / f"cut{cut}"

        def stopping(n, cut=cut):
            if n == cut:
                raise KeyboardInterrupt
            return batches(n)

        step, state = start()
        with pytest.raises(KeyboardInterrupt):
            fit(step, state, stopping, OPTIONS, folder)
        step, state = start()
        again = fit(step, state, batches, OPTIONS, folder)
        jax.tree.map(np.testing.assert_array_equal, again, whole)
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines] == [3, 6, 9, 12]
        losses = [
            json.loads(x)["loss"]
            for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
        ]
        assert [x["loss"] for x in lines] == losses


def test_frozen_subtrees_stay_and_the_rest_moves():
    params = {"a": {"b": jnp.ones(3), "bc": jnp.ones(3)}, "d": jnp.ones(3)}
    o = TrainOptions(4, 1e-2, 1, weight_decay=0.1)
    optimizer = make_optimizer(o)

    def squares(p, batch, key):
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(p)), {}

    step, state = make_step(squares, optimizer, o, ("a/b",)), init_state(params, optimizer)
    for _ in range(2):
        state, _ = step(state, jnp.zeros(()))
    assert (state.params["a"]["b"] == 1).all() and (state.ema["a"]["b"] == 1).all()
    assert (state.params["a"]["bc"] < 1).all() and (state.params["d"] < 1).all()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_the_snapshot(tmp_path, number):
    def signalled(n):
        if n == 4:
            signal.raise_signal(number)
        return batches(n)

    step, state = start()
    with interruptible():
        with pytest.raises(KeyboardInterrupt) as e:
            fit(step, state, signalled, OPTIONS, tmp_path)
        assert e.value.args == (number,)
    assert load_arrays(tmp_path / "snapshot.safetensors")[1]["step"] == 5


def test_fit_outside_the_main_thread_leaves_signals_alone(tmp_path):
    step, state = start()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fit, step, state, batches, OPTIONS, tmp_path).result().step == 12


def test_eight_devices_give_the_curve_of_one(tmp_path):
    step, state = start()
    one = fit(step, state, batches, OPTIONS, tmp_path / "one")
    step, state = start()
    eight = fit(step, state, batches, OPTIONS, tmp_path / "eight", devices=8)
    np.testing.assert_allclose(one.params["w"], eight.params["w"], atol=1e-5)


def test_nan_stops_and_the_snapshot_stays(tmp_path):
    step, state = start()
    with pytest.raises(NonFiniteError, match="step 5"):
        fit(step, state, lambda n: batches(n) * (np.nan if n == 4 else 1), OPTIONS, tmp_path)
    kept = load_snapshot(tmp_path / "snapshot.safetensors", start()[1])
    assert kept.step == 4 and all(np.isfinite(a).all() for a in jax.tree.leaves(kept.params))
    step, state = start()
    assert fit(step, state, batches, OPTIONS, tmp_path).step == OPTIONS.steps


def test_a_damaged_or_foreign_snapshot_is_refused(tmp_path):
    step, state = start()
    fit(step, state, batches, OPTIONS, tmp_path)
    path = tmp_path / "snapshot.safetensors"
    other = init_state({"v": jnp.zeros((4, 4))}, make_optimizer(OPTIONS))
    with pytest.raises(CheckpointError):
        load_snapshot(path, other)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    _, fresh = start()
    with pytest.raises(CheckpointError, match="checksum"):
        load_snapshot(path, fresh)


def tiny_params():
    params = drawn({"dit": dit_spec(DIT), "text": text_spec(TEXT)}, 0)
    head = params["dit"]["head"]["linear"]
    head["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), head["kernel"].shape)
    return params


def memory_batch(rng):
    latents = rng.standard_normal((3, 4, 5, 4, 4, 16)).astype(np.float16)
    ids = rng.integers(1, 20, (3, 4, 16)).astype(np.int32)
    stage = Stage("m", 2, 5, TrainOptions(1, 1.0), memory=1)
    store = SimpleNamespace(ids=ids, objects=np.full((3, 4, 17, 2), np.nan, np.float32))
    return latent_batches(stage, latents, store, stride=3)(0)


def test_memory_batches_hold_earlier_clips():
    rng = np.random.default_rng(0)
    batch = memory_batch(rng)
    assert batch["history"].shape == (2, 1, 5, 4, 4, 16) and batch["history_ids"].shape == (
        2,
        1,
        16,
    )
    assert (batch["history_gap"] >= 3).all()


def test_gradients_do_not_reach_history_and_memory_matters():
    batch = memory_batch(np.random.default_rng(0))
    batch = {
        k: jnp.asarray(v, jnp.float32) if v.dtype == np.float16 else jnp.asarray(v)
        for k, v in batch.items()
    }
    task = ExtensionTask(memory_layers=(1, 2), drop_text=0.0)
    f = jax.jit(
        jax.value_and_grad(
            lambda h, key: extension_loss(DIT, TEXT, task)(
                tiny_params(), batch | {"history": h}, key
            )[0]
        )
    )
    values = [f(batch["history"] * s, jax.random.key(i)) for i in range(4) for s in (1.0, -1.0)]
    assert any(a != b for (a, _), (b, _) in zip(values[::2], values[1::2], strict=True))
    assert not any(np.any(g) for _, g in values)


def test_extension_loss_ignores_given_frames_and_learns():
    rng = np.random.default_rng(1)
    batch = {
        "latents": rng.standard_normal((4, 5, 4, 4, 16)).astype(np.float32),
        "ids": rng.integers(1, 20, (4, 16)).astype(np.int32),
        "least": np.zeros(4, np.int32),
        "covered": np.zeros((4, 5, 4, 4), np.float32),
    }
    f = jax.jit(
        jax.value_and_grad(lambda p, k: extension_loss(DIT, TEXT, ExtensionTask())(p, batch, k)[0])
    )
    value, grads = f(tiny_params(), jax.random.key(0))
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.any(grads["text"]["word"]) and np.any(grads["dit"]["condition_embedding"]["kernel"])
    condition = condition_of(
        jnp.asarray(batch["latents"]), jnp.array([0, 1, 2, 5], jnp.int32), "latent"
    )
    assert condition.shape[-1] == 20 and not np.any(condition[0])
    np.testing.assert_array_equal(condition[2, :2, ..., 4:], batch["latents"][2, :2])
    assert not np.any(condition[2, 2:])


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
