# SPDX-License-Identifier: Apache-2.0
"""Locks of several outputs at once."""

import errno
import os

import pytest

from lvjax.core.errors import InUseError, StorageError
from lvjax.run import lock


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_several_outputs_are_held_together(tmp_path):
    with lock.hold([tmp_path / "b.mp4", tmp_path / "a.mp4"]):
        assert names(tmp_path) == ["a.mp4.lock", "b.mp4.lock"]
        for name in ("a.mp4", "b.mp4"):
            with pytest.raises(InUseError, match=name), lock.hold(tmp_path / name):
                pass
    assert names(tmp_path) == []


def test_all_or_none(tmp_path):
    with lock.hold(tmp_path / "c.mp4"):
        outputs = [tmp_path / name for name in ("d.mp4", "c.mp4", "a.mp4")]
        with pytest.raises(InUseError, match="c.mp4"), lock.hold(outputs):
            pass
        assert names(tmp_path) == ["c.mp4.lock"]


def test_two_names_of_one_file_are_one_output(tmp_path):
    os.symlink(tmp_path, tmp_path / "link")
    with lock.hold([tmp_path / "a.mp4", tmp_path / "link" / "a.mp4", str(tmp_path / "a.mp4")]):
        with pytest.raises(InUseError), lock.hold(tmp_path / "link" / "a.mp4"):
            pass


def test_a_lock_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock.os, "pwrite", full)
    with pytest.raises(StorageError, match="free space"), lock.hold(tmp_path / "a.mp4"):
        pass
    assert names(tmp_path) == []


def test_no_output_needs_no_lock(tmp_path):
    with lock.hold([]):
        assert names(tmp_path) == []
