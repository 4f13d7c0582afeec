# SPDX-License-Identifier: Apache-2.0
"""Arrays written piece by piece: what is resumed, what is believed, what is left, and what a full
disk does.  Killed processes are in tests/checkpoints_convert/test_convert_crash.py.
"""

import builtins
import errno
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

from lvjax.core import streaming
from lvjax.core.errors import CheckpointError, StorageError
from lvjax.core.streaming import Kind, clean, open_stored, remove, total_bytes, write_stream

LAYERS = 4
FORMATS = ("safetensors", "orbax")
_RNG = np.random.default_rng(0)
ARRAYS = {
    "blocks/q/kernel": _RNG.standard_normal((LAYERS, 8, 16)).astype(ml_dtypes.bfloat16),
    "blocks/norm": _RNG.standard_normal((LAYERS, 5)).astype(np.float32),
    "half": _RNG.standard_normal(7).astype(np.float16),
    "table": _RNG.standard_normal((50, 3)),
    "one": np.float32(2.5).reshape(()),
    "none": np.zeros((0, 3), np.float32),
    "ids": np.arange(9, dtype=np.int32),
}
KINDS = {k: Kind(a.dtype, a.shape, LAYERS if "blocks" in k else 1) for k, a in ARRAYS.items()}
PIECES = sum(kind.pieces for kind in KINDS.values())


class Stopped(BaseException):
    """What a signal raises."""


class Source:
    """Gives pieces and notes which were asked for; after `most` it raises `error`."""

    def __init__(self, most: int = PIECES, error=Stopped, arrays=ARRAYS):
        self.asked, self.most, self.error, self.arrays = [], most, error, arrays

    def __call__(self, name: str):
        return lambda index: self.give(name, index)

    def give(self, name: str, index: int) -> np.ndarray:
        if len(self.asked) == self.most:
            raise self.error("enough")
        self.asked.append((name, index))
        array = self.arrays[name]
        return array[index] if KINDS[name].pieces > 1 else array


def equal(path, arrays=ARRAYS) -> bool:
    found = open_stored(path)
    return found.keys() == arrays.keys() and all(
        found[k].dtype == a.dtype
        and found[k].shape == a.shape
        and found[k].tobytes() == a.tobytes()
        for k, a in arrays.items()
    )


def left(path) -> set[str]:
    """What lies beside a target."""
    return {p.name for p in path.parent.iterdir()} - {path.name}


@pytest.fixture(params=FORMATS)
def fmt(request):
    return request.param


@pytest.fixture
def path(tmp_path):
    return tmp_path / "part"


def test_there_and_back(path, fmt):
    done, sums = [], []
    write_stream(path, KINDS, {"n": [1]}, Source(), fmt, progress=done.append, finish=sums.append)
    assert equal(path) and open_stored(path).meta == {"n": [1]} and not left(path)
    assert sum(done) == total_bytes(KINDS) == sum(a.nbytes for a in ARRAYS.values())
    assert len(done) == PIECES
    assert sums == [{k: slot.crc for k, slot in open_stored(path).slots.items()}]
    open_stored(path).check()


def test_layers_are_read_alone(path, fmt):
    write_stream(path, KINDS, {}, Source(), fmt)
    stored = open_stored(path)
    for name, array in ARRAYS.items():
        if array.ndim and len(array):
            np.testing.assert_array_equal(stored.layer(name, len(array) - 1), array[-1])


@pytest.mark.parametrize("most", (0, 1, 3, 6, PIECES - 1))
def test_a_run_that_was_stopped_goes_on(path, fmt, most):
    first, second, done = Source(most), Source(), []
    with pytest.raises(Stopped):
        write_stream(path, KINDS, {}, first, fmt)
    assert not path.exists()
    with pytest.raises(CheckpointError):
        open_stored(path.with_name(f".{path.name}.partial"))
    write_stream(path, KINDS, {}, second, fmt, progress=done.append)
    assert first.asked + second.asked == [(k, i) for k in KINDS for i in range(KINDS[k].pieces)]
    assert equal(path) and not left(path) and sum(done) == total_bytes(KINDS)


@pytest.mark.parametrize("change", ["kinds", "meta", "identity", "format"])
def test_what_other_work_has_left_is_not_used(path, fmt, change):
    with pytest.raises(Stopped):
        write_stream(path, KINDS, {}, Source(5), fmt, "a")
    kinds, meta, identity = dict(KINDS), {}, "a"
    source, other = Source(), fmt
    if change == "kinds":
        kinds["half"] = Kind(np.dtype(np.float32), (7,))
        source = Source(arrays=ARRAYS | {"half": ARRAYS["half"].astype(np.float32)})
    elif change == "meta":
        meta = {"n": 1}
    elif change == "identity":
        identity = "b"
    else:
        other = FORMATS[1 - FORMATS.index(fmt)]
    write_stream(path, kinds, meta, source, other, identity)
    assert len(source.asked) == PIECES and equal(path, source.arrays) and not left(path)


def test_what_is_left_is_read_before_it_is_believed(path, fmt):
    """A bit, the end of a file, a file, lines of the log: each is noticed and made again."""
    partial, log = path.with_name(".part.partial"), path.with_name(".part.log")

    def files():
        return sorted(p for p in ([partial] if partial.is_file() else partial.rglob("*.0*")))

    def flip():
        data = bytearray(files()[0].read_bytes())
        data[-1] ^= 1
        files()[0].write_bytes(data)

    def shorten():
        os.truncate(files()[0], files()[0].stat().st_size - 3)

    def lose():
        files()[0].unlink()

    def scribble():
        log.write_bytes(log.read_bytes().replace(b"blocks/q/kernel 1 ", b"blocks/q/kernel ? "))

    def empty():
        log.write_bytes(b"\0" * 200)

    def cut():
        log.write_bytes(log.read_bytes()[:-5])

    for damage in (flip, shorten, lose, scribble, empty, cut):
        with pytest.raises(Stopped):
            write_stream(path, KINDS, {}, Source(6), fmt)
        damage()
        source = Source()
        write_stream(path, KINDS, {}, source, fmt)
        assert len(source.asked) > PIECES - 6, damage
        assert equal(path) and not left(path)
        remove(path)


def test_a_source_that_cannot_be_used_leaves_nothing(path, fmt):
    with pytest.raises(CheckpointError, match="enough"):
        write_stream(path, KINDS, {}, Source(5, CheckpointError), fmt)
    assert not path.exists() and not left(path)


def test_an_older_target_stays_until_the_new_one_is_complete(path, fmt, monkeypatch):
    old = {k: a + a.dtype.type(1) for k, a in ARRAYS.items()}
    write_stream(path, KINDS, {}, Source(arrays=old), fmt)
    with pytest.raises(Stopped):
        write_stream(path, KINDS, {}, Source(PIECES - 1), fmt, "new")
    assert equal(path, old)

    def refuse(a, b):
        if str(a).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        rename(a, b)

    rename = os.rename
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refuse)
        patched.setattr(os, "replace", refuse)
        with pytest.raises(StorageError, match="Input/output error"):
            write_stream(path, KINDS, {}, Source(), fmt, "new")
    assert equal(path, old)
    source = Source()
    write_stream(path, KINDS, {}, source, fmt, "new")
    assert equal(path) and not left(path) and not source.asked
    # a file in the place of a folder, and the other way round
    other = FORMATS[1 - FORMATS.index(fmt)]
    write_stream(path, KINDS, {}, Source(arrays=old), other)
    assert equal(path, old) and not left(path)


class Full:
    """`open` for a disk with room for so many bytes more."""

    def __init__(self, room: int):
        self.room = room

    def __call__(self, *arguments):
        f = builtins.open(*arguments)
        return f if "r" == f.mode or "rb" == f.mode else _Limited(f, self)


class _Limited:
    def __init__(self, f, disk):
        self.f, self.disk = f, disk

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.f.close()

    def write(self, data) -> int:
        size = len(data)
        if size > self.disk.room:
            self.f.write(data[: self.disk.room])
            self.disk.room = 0
            raise OSError(errno.ENOSPC, "No space left on device")
        self.disk.room -= size
        return self.f.write(data)

    def __getattr__(self, name):
        return getattr(self.f, name)


def test_a_full_disk(path, fmt, monkeypatch):
    """Wherever it is full: one line, and the work that was done is there for the next run."""
    needed = total_bytes(KINDS)
    for share in (0.0, 0.3, 0.5, 0.9, 1.0):
        with monkeypatch.context() as patched:
            patched.setattr(streaming, "open", Full(int(share * needed)), raising=False)
            with pytest.raises(StorageError, match="No space left on device.*goes on where"):
                write_stream(path, KINDS, {}, Source(), fmt)
        assert not path.exists()
        source = Source()
        write_stream(path, KINDS, {}, source, fmt)
        assert equal(path) and not left(path)
        assert len(source.asked) == PIECES if share == 0 else len(source.asked) < PIECES
        remove(path)


def test_a_disk_that_is_too_small_is_said_first(path, fmt, monkeypatch):
    usage = shutil.disk_usage(path.parent)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
        source = Source()
        with pytest.raises(StorageError, match="needs 0.00 GB more, 0.00 GB are free"):
            write_stream(path, KINDS, {}, source, fmt)
        assert not source.asked and not path.exists()
        # what an earlier run has left counts
        patched.setattr(shutil, "disk_usage", lambda place: usage)
        with pytest.raises(Stopped):
            write_stream(path, KINDS, {}, Source(PIECES - 1), fmt)
        patched.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
        write_stream(path, KINDS, {}, Source(), fmt)
    assert equal(path)


def test_a_place_that_is_none(tmp_path, fmt):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write .*/file/part: "):
        write_stream(tmp_path / "file" / "part", KINDS, {}, Source(), fmt)


def test_leftovers_go(path):
    for end in ("partial", "log", "old"):
        path.with_name(f".part.{end}").write_bytes(b"x")
    path.write_bytes(b"mine")
    clean(path)
    assert not left(path) and path.read_bytes() == b"mine"
    path.with_name(".part.old").mkdir()
    remove(path)
    assert not left(path) and not path.exists()
    remove(path)
