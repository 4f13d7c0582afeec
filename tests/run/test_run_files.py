# SPDX-License-Identifier: Apache-2.0
"""What lies beside an output: lock, state, card; and the signals that end a run."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.checkpoint import load_meta
from lvjax.core.errors import CheckpointError, InUseError, StorageError
from lvjax.io.video import FragmentedWriter, read_card
from lvjax.run import card as cards
from lvjax.run import lock
from lvjax.run.state import chain, load_state, save_state

PROMPTS = (
    "赤い球が左へ動く",
    "un café 🎈 e\u0301",
    "\u202eright to left",
    'quotes " and \\ and\nlines',
)


def python(code: str, *args, **options):
    """Start a child process that has printed its first line, with SIGINT not ignored."""
    code = "import signal; signal.signal(2, signal.default_int_handler)\n" + textwrap.dedent(code)
    command = [sys.executable, "-c", code, *map(str, args)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    child.first = child.stdout.readline().strip()
    return child


HOLD = """
import sys, time
from lvjax.run import lock
with lock.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_run_is_told_of_the_first_and_a_dead_ones_lock_is_taken(tmp_path):
    output = tmp_path / "a.mp4"
    with python(HOLD, output) as first:
        assert first.first == "held"
        with pytest.raises(InUseError) as e, lock.hold(output):
            pass
        assert f"process {first.pid} on" in str(e.value)
        assert "\n" not in str(e.value) and e.value.code == 7
        with lock.hold(tmp_path / "b.mp4"):
            pass  # another output is free
        first.send_signal(signal.SIGKILL)
        first.wait()
        with lock.hold(output):
            assert (tmp_path / "a.mp4.lock").exists()
        assert not (tmp_path / "a.mp4.lock").exists()


def test_a_damaged_lock_file_is_no_obstacle(tmp_path):
    place = tmp_path / "a.mp4.lock"
    for damage in (b"\xff{ no json", b"[1]", b""):
        place.write_bytes(damage)
        with lock.hold(tmp_path / "a.mp4"):
            place.write_bytes(damage)
            with pytest.raises(InUseError, match="another process"), lock.hold(tmp_path / "a.mp4"):
                pass


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as e, lock.hold(tmp_path / "file" / "a.mp4"):
        pass
    assert e.value.code == 6 and "\n" not in str(e.value)
    with pytest.raises(StorageError):
        save_state(tmp_path / "file" / "a.state", {"x": np.zeros(2)}, {})


def tree():
    draw = np.random.default_rng(0)
    return {
        "latents": jnp.asarray(draw.normal(size=(1, 2, 3, 4, 5)).astype(np.float32)),
        "bank": {
            "k": jnp.asarray(draw.normal(size=(2, 3)).astype(np.float16)),
            "frame": jnp.arange(4, dtype=jnp.int32),
            "next": jnp.int32(7),
        },
        "key": jax.random.key_data(jax.random.key(3)),
        "list": [jnp.zeros((0, 3)), jnp.array(True)],
    }


META = {"clip": 3, "frame": 33, "digest": "ab", "offsets": [10**12], "prompt": PROMPTS[0]}


def test_state_round_trip_is_exact(tmp_path):
    state = tree()
    save_state(tmp_path / "a.state", state, META)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    loaded, meta = load_state(tmp_path / "a.state", like)
    assert meta == META == load_meta(tmp_path / "a.state")
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_narrow_types_come_back(tmp_path, dtype):
    state = {"k": jnp.arange(6, dtype=jnp.float32).astype(dtype)}
    save_state(tmp_path / "a.state", state, {})
    loaded, _ = load_state(tmp_path / "a.state", state)
    assert loaded["k"].dtype == dtype and (np.asarray(loaded["k"]) == np.asarray(state["k"])).all()


def test_a_flipped_bit_names_its_array(tmp_path):
    path = tmp_path / "a.state"
    save_state(path, tree(), META)
    data = bytearray(path.read_bytes())
    latents = np.asarray(tree()["latents"]).tobytes()
    data[data.index(latents) + 17] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="latents") as e:
        load_state(path, tree())
    assert e.value.code == 3 and "\n" not in str(e.value)


def test_no_damage_goes_unseen(tmp_path):
    path = tmp_path / "a.state"
    save_state(path, tree(), META)
    good, draw = path.read_bytes(), np.random.default_rng(1)
    for place in draw.integers(0, len(good), 300):
        data = bytearray(good)
        data[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as e:
            load_state(path, tree())
        assert "\n" not in str(e.value)
    for part in (0, 7, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:part])
        with pytest.raises(CheckpointError):
            load_state(path, tree())


def test_a_damaged_checksum_of_the_header(tmp_path):
    path = tmp_path / "a.state"
    save_state(path, tree(), META)
    good = path.read_bytes()
    start = good.index(b'"header_crc32":"') + 16
    path.write_bytes(good[:start] + b":" + good[start + 1 :])
    with pytest.raises(CheckpointError):
        load_state(path, tree())


def test_a_state_of_other_shapes_is_named(tmp_path):
    path = tmp_path / "a.state"
    save_state(path, tree(), META)
    other = tree()
    other["bank"]["k"] = jnp.zeros((2, 4), jnp.float16)
    with pytest.raises(CheckpointError, match="bank/k"):
        load_state(path, other)
    with pytest.raises(CheckpointError, match="latents"):
        load_state(path, {k: v for k, v in tree().items() if k != "latents"})
    with pytest.raises(CheckpointError, match="more"):
        load_state(path, tree() | {"more": jnp.zeros(1)})


def test_a_failed_save_keeps_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "a.state"
    save_state(path, tree(), META)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        save_state(path, {"x": np.ones(9)}, {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.state"]


def test_the_digest_tells_clips_and_their_order_apart():
    a, b = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
    assert chain(chain("", a), b) == chain(chain("", a.copy()), jnp.asarray(b))
    digests = {chain("", a), chain("", b), chain(chain("", a), b), chain(chain("", b), a)}
    assert len(digests) == 4


@pytest.mark.parametrize("text", PROMPTS)
def test_the_card_comes_back_from_video_and_json(tmp_path, text):
    card = cards.make_card({"timelines": [[[0.0, text]]], "seed": 2**62}, weights={}, inputs={})
    output = tmp_path / "a.mp4"
    cards.write_card(output, card)
    FragmentedWriter(output, (64, 48), 8, card).close()
    assert read_card(output) == card == json.loads(cards.card_path(output).read_text())
    assert cards.check_card(read_card(output), output)["options"] == card["options"]
    assert cards.differences(card, card) == []


def test_the_card_does_not_depend_on_when_it_was_made():
    first, second = (cards.make_card({"seed": 1}, weights={"dit": "x"}, inputs={}) for _ in "ab")
    assert first == second


STOP = """
import time
from lvjax.core.signals import stoppable
with stoppable() as stop:
    print("ready", flush=True)
    for _ in range(600):
        if stop.signal is not None and not __import__("sys").argv[1:]:
            print("saved", flush=True)
            raise SystemExit(stop.code)
        if stop.signal is not None:
            print("noted", flush=True)
        time.sleep(0.05)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_clip(number, code):
    with python(STOP) as child:
        child.send_signal(number)
        assert child.stdout.read().strip() == "saved"
    assert child.returncode == code


def test_a_second_interrupt_leaves_at_once():
    with python(STOP, "go on", stderr=subprocess.DEVNULL) as child:
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline().strip() == "noted"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=5) != 0
