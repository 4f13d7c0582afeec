# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that changes while it is read is refused, whoever reads it."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints_convert.read import open_checkpoint
from lvjax.core.errors import CheckpointError

A = np.arange(12, dtype=np.float32).reshape(3, 4)


def exchanged(path):
    save_file({"a": A + 1, "b": A}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def written(path):
    with open(path, "r+b") as f:
        f.seek(-4, 2)
        f.write(b"\0\0\0\0")
    os.utime(path, ns=(1, 1))  # clocks of file systems are coarse


@pytest.mark.parametrize("change", [exchanged, written])
def test_no_array_comes_from_another_file(tmp_path, change):
    path = tmp_path / "x.safetensors"
    save_file({"a": A, "b": A}, path)
    found, _ = open_checkpoint(path)
    np.testing.assert_array_equal(found["a"], A)
    change(path)
    for read in (found.__getitem__, found.check, lambda name: found.rows(name, 0, 1),
                 found.without("x.").__getitem__):  # fmt: skip
        with pytest.raises(CheckpointError, match="has changed since it was opened"):
            read("a")
    np.testing.assert_array_equal(open_checkpoint(path)[0]["a"], A + (change is exchanged))
