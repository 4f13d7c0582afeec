# SPDX-License-Identifier: Apache-2.0
"""Parts of arrays: rows, layers, and checks that hold nothing whole."""

import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from checkpoints_convert import tensors as module
from checkpoints_convert.read import open_checkpoint
from lvjax.core.checkpoint import open_arrays, save_arrays
from lvjax.core.errors import CheckpointError


@pytest.fixture(params=["safetensors", "torch", "strided"])
def source(request, tmp_path):
    """An array [40, 3, 5] and the checkpoint that holds it."""
    a = np.random.default_rng(0).standard_normal((40, 3, 5)).astype(np.float32)
    path = tmp_path / "a"
    if request.param == "safetensors":
        save_file({"before": np.ones(7, np.float32), "x": a}, path)
    else:
        own = torch.from_numpy(a)
        own = own if request.param == "torch" else own.mT.contiguous().mT
        torch.save({"before": torch.ones(7), "x": own}, path)
    return a, open_checkpoint(path)[0]


def test_rows_are_those_of_the_array(source):
    a, found = source
    for first, last in ((0, 40), (0, 1), (39, 40), (7, 19)):
        np.testing.assert_array_equal(found.rows("x", first, last), a[first:last])


def test_a_check_finds_what_reading_finds(source, monkeypatch):
    _, found = source
    found.check("x")
    monkeypatch.setattr(module, "BLOCK", 64)
    found.check("x")
    path = found.entries["x"].path
    data = bytearray(path.read_bytes())
    at = data.index(np.float32(source[0][20, 1, 2]).tobytes())
    data[at : at + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="'x' (is not finite|does not match)"):
        open_checkpoint(path)[0].check("x")


def test_a_check_holds_no_more_than_a_block(tmp_path):
    with open(tmp_path / "a.safetensors", "wb") as f:
        head = b'{"x":{"dtype":"F32","shape":[75000000],"data_offsets":[0,300000000]}}   '
        f.write(len(head).to_bytes(8, "little") + head)
        f.truncate(8 + len(head) + 300_000_000)
    found = open_checkpoint(tmp_path / "a.safetensors")[0]
    tracemalloc.start()
    try:
        found.check("x")
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.reset_peak()
        found["x"]
        assert tracemalloc.get_traced_memory()[1] > 250e6  # so that it is seen
    finally:
        tracemalloc.stop()


def test_layers_that_are_not_there(tmp_path):
    save_arrays(tmp_path / "a", {"x": np.zeros((3, 2)), "y": np.ones(2)})
    stored = open_arrays(tmp_path / "a")
    assert stored.layer("x", 2).shape == (2,)
    for index in (-1, 3):
        with pytest.raises(IndexError, match="'x', which has 3"):
            stored.layer("x", index)
