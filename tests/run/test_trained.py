# SPDX-License-Identifier: Apache-2.0
"""Files that a trained model shares with the one that it was made of: whole or not at all, and
those of the model at hand.
"""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from lvjax.core.errors import StorageError
from lvjax.run import trained

NEW = b"of this model" * 100


@pytest.fixture
def source(tmp_path):
    """A part's file, and where it goes."""
    (tmp_path / "model").mkdir()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "model" / "vae.safetensors").write_bytes(NEW)
    return tmp_path / "model" / "vae.safetensors"


@pytest.fixture
def no_links(monkeypatch):
    """Another file system."""

    def link(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)


def linked(source, name="vae.safetensors"):
    to = source.parent.parent / "bundle" / name
    trained._link(SimpleNamespace(path=source), to)
    return to


def test_a_part_is_another_name_of_its_file(source):
    to = linked(source)
    assert to.samefile(source) and linked(source).samefile(source)


@pytest.mark.parametrize("there", [None, NEW[:50], b"of another" * 130], ids=("no", "cut", "other"))
def test_a_copy_takes_the_place_of_what_is_there(source, no_links, there):
    to = source.parent.parent / "bundle" / source.name
    if there is not None:
        to.write_bytes(there)
    linked(source)
    assert to.read_bytes() == NEW and [p.name for p in to.parent.iterdir()] == [to.name]
    before = to.stat().st_ino
    assert linked(source).stat().st_ino == before  # the same bytes are not written again


def test_a_link_takes_the_place_of_another_models_file(source):
    to = source.parent.parent / "bundle" / source.name
    to.write_bytes(b"of another")
    assert linked(source).samefile(source)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_a_copy_that_is_cut_off_leaves_what_was_there(source, no_links, monkeypatch, error):
    def copy(source, to, length):
        to.write(source.read(50))
        raise error

    to = source.parent.parent / "bundle" / source.name
    to.write_bytes(b"of another")
    with monkeypatch.context() as patch, pytest.raises((StorageError, KeyboardInterrupt)) as e:
        patch.setattr(shutil, "copyfileobj", copy)
        linked(source)
    assert to.read_bytes() == b"of another"
    assert e.type is KeyboardInterrupt or "free space" in str(e.value)
    assert linked(source).read_bytes() == NEW and len(list(to.parent.iterdir())) == 1


def test_a_folder_of_arrays_takes_the_place_of_another(source, no_links):
    folder, bundle = source.parent / "text", source.parent.parent / "bundle"
    (folder / "d").mkdir(parents=True)
    (folder / "d" / "0").write_bytes(NEW)
    (bundle / "text" / "d").mkdir(parents=True)
    (bundle / "text" / "d" / "0").write_bytes(NEW[:50])
    (bundle / "text" / "d" / "1").write_bytes(NEW)  # of another model
    (bundle / "text.safetensors").write_bytes(NEW)  # its part in the other format
    linked(folder, "text")
    assert [p.name for p in bundle.iterdir()] == ["text"]
    files = [p for p in (bundle / "text").rglob("*") if p.is_file()]
    assert [(p.name, p.read_bytes()) for p in files] == [("0", NEW)]
