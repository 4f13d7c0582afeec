# SPDX-License-Identifier: Apache-2.0
"""Batches from a dataset of latents: each window once in an epoch, the same however they are read,
from wherever training goes on, and with damage in them.
"""

import hashlib
import json
import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import sgd

from lvjax.core.checkpoint import open_arrays, sealed, unsealed
from lvjax.core.errors import CheckpointError, InputError
from lvjax.data.latent_feed import LatentFeed
from lvjax.data.latents import open_latents, sample_path
from lvjax.memory.placement import last
from lvjax.models.dit import dit_spec
from lvjax.models.pocket_text import encode_text, text_spec
from lvjax.train.checkpoints import Checkpoints
from lvjax.train.extension import ExtensionTask, extension_loss
from lvjax.train.state import init_state
from tests.data.latent_sets import LAYOUT, names, write_latents
from tests.drawn import drawn
from tests.tiny import DIT, TEXT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """18 clips in four videos; do not write into it."""
    return write_latents(tmp_path_factory.mktemp("latents"))


ORDER = [
    200, 100, 302, 203, 201, 3, 1, 208, 301, 0, 2, 209, 300, 204, 207, 206, 205, 202,
    300, 1, 301, 203, 209, 206, 302, 200, 2, 208, 207, 0, 202, 100, 204, 3, 201, 205,
]  # fmt: skip


def marks(batch) -> list[float]:
    """Which clips begin the rows."""
    return batch["latents"][:, 0, 0, 0, 0, 0].tolist()


def taken(feed, count):
    return [next(feed) for _ in range(count)]


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        jax.tree.map(np.testing.assert_array_equal, one, other)


def flip(data, video: int, clip: int = 1) -> str:
    """Flip a bit in a clip of a video; the name of its sample."""
    name = names(data)[video]
    path = sample_path(data.folder, name)
    slot = open_arrays(path).slots[f"latents/{clip:06d}"]
    raw = bytearray(path.read_bytes())
    raw[slot.pieces[0][1] + 5] ^= 16
    path.write_bytes(raw)
    return name


@pytest.mark.parametrize("clips", [1, 3])
def test_each_window_comes_once_in_an_epoch(data, clips):
    lengths = (4, 1, 10, 3)
    wanted = sorted(100 * v + i for v, n in enumerate(lengths) for i in range(n - clips + 1))
    feed = LatentFeed(data, 1, clips, seed=5)
    assert feed.windows == len(wanted)
    first, second = ([marks(next(feed))[0] for _ in wanted] for _ in "ab")
    assert sorted(first) == sorted(second) == wanted and first != second
    other = LatentFeed(data, 1, clips, seed=6)
    assert [marks(next(other))[0] for _ in wanted] != first


def test_the_order_is_that_of_every_version(data):
    """A run that goes on with another version of grain must see the batches that it would have."""
    found = [int(m) for batch in taken(LatentFeed(data, 6, seed=3), 6) for m in marks(batch)]
    assert found == ORDER


@pytest.mark.parametrize("damage", [False, True])
def test_any_number_of_readers_gives_the_same_batches(tmp_path, damage):
    data = write_latents(tmp_path)
    damaged = {flip(data, 2, clip=4)} if damage else set()
    feeds = [LatentFeed(data, 4, 2, seed=1, tails=2, readers=n) for n in (0, 1, 3)]
    found = [taken(feed, 12) for feed in feeds]
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    for feed in feeds:
        assert feed.damaged.keys() == damaged and feed.position() == feeds[0].position()


def test_it_goes_on_in_the_middle_of_an_epoch(data):
    feed = LatentFeed(data, 5, 2, seed=2)
    before, position = taken(feed, 4), feed.position()
    own = {"batch": 4, "windows": 14, "data": data.identity, "damaged": {}}
    assert position == own and len(data.identity) == 64
    after = taken(feed, 6)
    other = LatentFeed(data, 5, 2, seed=2, readers=0)
    other.seek(position)
    assert_same(taken(other, 6), after)
    other.seek({})
    assert_same(taken(other, 4), before)
    feed.seek(position)  # back, with batches that were read ahead
    assert_same(taken(feed, 6), after)


def test_its_position_goes_through_a_checkpoint(tmp_path):
    data, state = write_latents(tmp_path), init_state({"w": jnp.ones(2)}, sgd(0.1))
    name = flip(data, 2, clip=4)
    whole = LatentFeed(data, 3, 2, seed=1, tails=2)
    taken(whole, 5)
    assert list(whole.damaged) == [name]
    with Checkpoints(tmp_path / "run") as saved:
        saved.save(state, whole.position())
    with Checkpoints(tmp_path / "run") as saved:
        _, position = saved.restore(state)
    rest = LatentFeed(open_latents(data.folder), 3, 2, seed=1, tails=2)
    rest.seek(position)
    assert_same(taken(rest, 9), taken(whole, 9))
    assert rest.position() == whole.position() and rest.position()["batch"] == 14


def test_it_goes_on_with_its_own_data_alone(tmp_path):
    data = write_latents(tmp_path)
    position = LatentFeed(data, 2, 2).position()
    changed = json.loads(json.dumps(position)) | {"batch": 3}
    index, complete = data.folder / "videos.jsonl", data.folder / "complete.json"
    lines = index.read_bytes().splitlines(keepends=True)

    def rewritten(text: bytes):
        index.write_bytes(text)
        digest = hashlib.sha256(text).hexdigest()
        complete.write_bytes(sealed(unsealed(complete) | {"index": digest}))
        return LatentFeed(open_latents(data.folder), 2, 2)

    rewritten(b"".join(reversed(lines))).seek(changed)  # found in another order
    for old, new in ((b"waves", b"clouds"), (b'"bytes": 0', b'"bytes": 1')):
        with pytest.raises(InputError, match="has other videos, captions or settings"):
            rewritten(b"".join(lines).replace(old, new, 1)).seek(changed)
    other = write_latents(tmp_path / "other", fps=9)
    with pytest.raises(InputError, match="has other videos, captions or settings"):
        LatentFeed(other, 2, 2).seek(changed)
    del changed["data"]  # of a version that did not say
    LatentFeed(other, 2, 2).seek(changed)


def test_what_is_damaged_is_left_out_counted_and_listed(tmp_path):
    data = write_latents(tmp_path)
    plain = [m for b in taken(LatentFeed(data, 3, seed=4), 12) for m in marks(b)]
    name = flip(data, 0, clip=2)
    feed = LatentFeed(data, 3, seed=4)
    found = [m for b in taken(feed, 12) for m in marks(b)]
    assert plain.count(2) == 2 and 2 not in found and set(found) < set(plain)
    assert [x for x, was in zip(found, plain, strict=True) if was != 2] == [
        was for was in plain if was != 2
    ]
    assert list(feed.damaged) == [name]
    assert "'latents/000002' does not match its checksum" in feed.damaged[name]
    other = LatentFeed(data, 3, seed=4)
    other.seek(json.loads(json.dumps(feed.position())))
    assert other.damaged == feed.damaged and other.position() == feed.position()
    sample_path(data.folder, name).unlink()
    gone = LatentFeed(data, 3, seed=4)
    assert min(m for b in taken(gone, 12) for m in marks(b)) == 100
    assert "no such file" in gone.damaged[name]


def test_too_much_damage_ends_training(tmp_path):
    data = write_latents(tmp_path)
    for name in data.samples:
        raw = bytearray(sample_path(data.folder, name).read_bytes())
        raw[20] ^= 16  # in the header
        sample_path(data.folder, name).write_bytes(raw)
    with pytest.raises(CheckpointError, match="in a row are damaged"):
        next(LatentFeed(data, 2))


def test_rows_are_what_the_loss_takes(data):
    feed, seen = LatentFeed(data, 3, 7, seed=1, tails=2, max_selected=2), set()
    for batch in taken(feed, 4):
        assert batch["latents"].shape == (3, 7, 3, 2, 2, 16)
        assert batch["frame"].tolist() == 3 * [[-12, -10, -8, -6, -4, -2, 0]]
        for row, mark in enumerate(marks(batch)):
            number = int(mark) % 100 + np.arange(7)
            seen.add(int(mark))
            np.testing.assert_array_equal(
                batch["latents"][row, :, 0, 0, 0, 0], int(mark) // 100 * 100 + number
            )
            assert batch["given"][row].tolist() == [int(n > 0) for n in number]
            assert batch["least"][row].tolist() == [int(n > 0 and n % 3 == 0) for n in number]
            kinds = 1 + number // 3 % 3
            np.testing.assert_array_equal(
                batch["text"][row], np.arange(16)[None] % (kinds[:, None] + 1)
            )
            for j in range(7):  # the two most similar before, the earlier first
                best = sorted(range(j), key=lambda i: (kinds[i] != kinds[j], i))[:2]
                assert np.flatnonzero(batch["visible"][row, j, :j]).tolist() == sorted(best)
            for m in (1, 2):
                tails = batch["tails"][row, :, m - 1, :, 0, 0, 0]
                wanted = batch["latents"][row, :, 0, 0, 0, 0].astype(np.float32) + m
                np.testing.assert_array_equal(tails, wanted[:, None] * (np.arange(2) < m))
    assert seen == {200, 201, 202, 203} and not batch["null"].any()
    one = next(LatentFeed(data, 2))
    assert one.keys() == {"latents", "text", "null", "least"} and one["latents"].shape[1] == 1
    few = next(LatentFeed(data, 3, 7, seed=1, tails=1))["tails"]
    assert few.shape == (3, 7, 1, 1, 2, 2, 16)
    alike = next(LatentFeed(data, 2, 4, max_selected=1, feature=lambda prompt: np.ones(3)))
    np.testing.assert_array_equal(
        alike["visible"][0], [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    )
    policy = next(LatentFeed(data, 2, 4, select=last(1)))
    np.testing.assert_array_equal(policy["visible"][0], np.eye(4) + np.eye(4, k=-1) > 0)


def test_rows_of_text_are_padded_to_the_longest(tmp_path):
    data = write_latents(tmp_path, text={"kind": "rows", "dim": 16, "encoder": None})
    batch = next(LatentFeed(data, 18))
    assert batch["text"].shape == (18, 1, 4, 16) and batch["text"].dtype == np.float16
    real = (batch["text"] != 0).any(-1).sum(-1)
    assert set(real.ravel().tolist()) == {2, 3, 4}
    assert (batch["null"] != 0).any(-1).sum(-1).tolist() == 18 * [1]


@pytest.mark.parametrize("clips", [1, 2])
def test_batches_go_through_the_loss(data, clips):
    params = {"dit": drawn(dit_spec(DIT), 0), "text": drawn(text_spec(TEXT), 1)}
    task = ExtensionTask(given=(0.2, 0.4, 0.4), last=0.3, both=0.3,
                         memory_layers=(1, 2) if clips > 1 else None)  # fmt: skip
    loss = jax.jit(extension_loss(DIT, lambda p, ids: encode_text(p["text"], ids, TEXT), task))
    feed = LatentFeed(data, 4, clips, tails=2)
    values = [float(loss(params, next(feed), jax.random.key(i))[0]) for i in range(2)]
    assert np.isfinite(values).all() and values[0] != values[1]
    assert loss._cache_size() == 1


def test_memory_does_not_grow(tmp_path):
    data = write_latents(tmp_path, (60, 60), latent=(3, 16, 16, 16))
    feed = LatentFeed(data, 2, readers=0)
    batch = next(feed)
    tracemalloc.start()
    taken(feed, 5)
    base = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for _ in range(60):
        next(feed)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held - base < 100_000 and peak - base < 8 * batch["latents"].nbytes


def test_settings_that_cannot_be(data, tmp_path):
    for given, what in (
        ({"clips": 11}, "at most 10 in a row"),
        ({"batch": 0}, "batch is 0"),
        ({"clips": 0}, "clips is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"readers": -1}, "readers is -1"),
    ):
        with pytest.raises(InputError, match=what):
            LatentFeed(data, **{"batch": 2} | given)
    bare = write_latents(tmp_path, tails=0)
    assert "tails" not in next(LatentFeed(bare, 2))
    with pytest.raises(InputError, match="has 0 encoded alone; encode the videos with --tails 1"):
        LatentFeed(bare, 2, tails=1)
    with pytest.raises(InputError, match="18 windows of 1 clips, it had 17"):
        LatentFeed(data, 2).seek({"batch": 3, "windows": 17})


def test_datasets_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match="is no dataset of latents"):
        open_latents(tmp_path)
    data = write_latents(tmp_path)
    folder = data.folder
    assert replace(data.head.layout) == LAYOUT
    index, complete, head = (folder / n for n in ("videos.jsonl", "complete.json", "dataset.json"))
    whole = {path: path.read_bytes() for path in (index, complete, head)}
    for path, content, what in (
        (index, whole[index][:-5], "not as it was written"),
        (index, whole[index].replace(b"[[0.0", b"[[0.1"), "not as it was written"),
        (complete, whole[complete].replace(b"4,", b"5,"), "checksum"),
        (complete, b"{", "is damaged"),
        (head, whole[head].replace(b"tiny", b"tinz"), "checksum"),
        (head, sealed(unsealed(head) | {"format": "x/2"}), "is of the format 'x/2'"),
        (head, sealed({"format": "lvjax-latents/1"}), "is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=what):
            open_latents(folder)
        path.write_bytes(whole[path])
    complete.unlink()
    with pytest.raises(CheckpointError, match="is not finished"):
        open_latents(folder)
