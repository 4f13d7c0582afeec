# SPDX-License-Identifier: Apache-2.0
"""Files that PyTorch itself saves, read without it; what is refused is in test_bad_files.py."""

import argparse
import dataclasses
import io
import json
import struct
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch

from checkpoints_convert import read_torch, tensors
from checkpoints_convert.read import open_checkpoint
from lvjax.core.dtypes import DTYPES
from lvjax.core.errors import CheckpointError
from tests.checkpoints_convert import bad_pickles
from tests.checkpoints_convert.test_read_safetensors import bits, of_every_type


def opened(path, state, weights=None, **options):
    """What is read of a state that `torch.save` saved."""
    torch.save(state, path, **options)
    return open_checkpoint(path, weights)[0]


def equal(found, state) -> None:
    assert found.keys() == state.keys()
    for name, a in state.items():
        assert found.shape(name) == found[name].shape == tuple(a.shape), name
        assert found[name].flags.c_contiguous
        np.testing.assert_array_equal(bits(found[name]), bits(a), err_msg=name)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_type_is_read_bit_by_bit(tmp_path, protocol):
    own = of_every_type()
    found = opened(tmp_path / "x.pth", own, pickle_protocol=protocol)
    equal(found, own)
    assert {name: found.dtype(name) for name in found} == DTYPES
    assert found.chosen is None


def test_state_dicts_parameters_buffers_and_ordered_dicts(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    equal(opened(tmp_path / "x.pth", model.state_dict()), model.state_dict())
    own = OrderedDict(model.named_parameters())
    own["buffer"] = torch.nn.Buffer(torch.arange(3.0))
    own["scalar"], own["none"] = torch.tensor(2.5), torch.zeros(0, 3)
    own["gradient"] = torch.ones(2, requires_grad=True)
    equal(opened(tmp_path / "x.pth", own), own)


def views() -> dict[str, torch.Tensor]:
    """Views of one storage that are no plain arrays."""
    a = torch.arange(360.0).reshape(3, 4, 5, 6)
    return {
        "whole": a,
        "flat": a.reshape(-1),
        "transposed": a.reshape(12, 30).T,
        "permuted": a.permute(2, 0, 3, 1),
        "part": a[1:, 2],
        "last": a[2, 3, 4, 5],
        "column": a.reshape(12, 30)[:, 7:8],
        "steps": a[:, ::2, 1:4, ::3],
        "steps and permuted": a[::2, :, ::4].permute(3, 1, 0, 2),
        "diagonal": a.reshape(12, 30).diagonal(),
        "one": a[1:2, :, :1].permute(2, 0, 3, 1),
        "empty": a[:0].permute(1, 0, 2, 3),
    }


@pytest.mark.parametrize("block", [16, 64, 600, 1 << 22])
def test_views_of_one_storage(tmp_path, monkeypatch, block):
    """Strides and offsets, also where an array is put together from many reads."""
    monkeypatch.setattr(tensors, "BLOCK", block)
    own = views()
    assert len({a.untyped_storage().data_ptr() for a in own.values()}) == 1
    equal(opened(tmp_path / "x.pth", own), own)


ENTRY = read_torch.Tensor.entry
MISTAKES = {
    "C order": lambda t, path: ENTRY(t, path)._replace(strides=None),
    "from the start": lambda t, path: ENTRY(t, path)._replace(start=t.storage.record.start),
    "strides doubled": lambda t, path: ENTRY(
        dataclasses.replace(t, strides=tuple(2 * s for s in t.strides)), path
    ),
    "strides reversed": lambda t, path: ENTRY(
        dataclasses.replace(t, strides=t.strides[::-1]), path
    ),
    "checksum of a part": lambda t, path: ENTRY(t, path)._replace(crc=t.storage.record.crc),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_with_views_are_noticed(tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(read_torch.Tensor, "entry", mistake)
    with pytest.raises((AssertionError, CheckpointError)):
        equal(opened(tmp_path / "x.pth", views()), views())


def test_random_views(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", 128)
    rng, own = np.random.default_rng(0), {}
    for i in range(200):
        a = torch.from_numpy(rng.standard_normal(rng.integers(1, 7, rng.integers(1, 6))))
        for axis, n in enumerate(a.shape):
            start, step = int(rng.integers(n)), int(rng.integers(1, 4))
            a = a[(slice(None),) * axis + (slice(start, None, step),)]
        own[f"a{i}"] = a.permute(*rng.permutation(a.ndim).tolist())
    equal(opened(tmp_path / "x.pth", own), own)


def test_a_stride_of_an_axis_of_length_one_means_nothing(tmp_path):
    own = {"a": torch.arange(6.0).as_strided((1, 6), (2**40, 1))}
    equal(opened(tmp_path / "x.pth", own), own)


A, B, C = ({"w": torch.full((2, 2), float(i)), "b": torch.ones(i)} for i in (1, 2, 3))


@pytest.mark.parametrize(
    ("state", "weights", "chosen"),
    [
        ({"generator": A, "generator_ema": B, "critic": C}, None, "generator_ema"),
        ({"generator": A, "generator_ema": B, "critic": C}, "critic", "critic"),
        ({"critic": C, "generator": A, "step": 7}, None, "generator"),
        ({"generator": A, "generator_ema": {}}, None, "generator"),
        ({"generator": A, "generator_ema": B}, "generator", "generator"),
        ({"state_dict": {"generator_ema": A, "critic": B}}, None, "state_dict.generator_ema"),
        ({"model": {"module": A}, "epoch": 3}, None, "model.module"),
        ({"state_dict": A, "optimizer": {"state": {0: B}}}, None, "state_dict"),
        ({"state_dict": A, "optim_g": {"momentum": B}}, None, "state_dict"),
        ({"ema": {"decay": 0.99, "shadow": B}}, None, "ema.shadow"),
        ({"model": A, "rng": torch.zeros(3, dtype=torch.uint8)}, None, "model"),
        ({"model": A, "ema": B}, "ema", "ema"),
        (OrderedDict(generator=OrderedDict(A)), None, "generator"),
        (A, None, None),
    ],
)
def test_which_set_of_weights_is_taken(tmp_path, state, weights, chosen):
    found = opened(tmp_path / "x.pt", state, weights)
    wanted = state
    for key in (chosen or "").split("."):
        wanted = wanted[key] if key else wanted
    assert found.chosen == chosen == found.without("").chosen
    equal(found, wanted)


@pytest.mark.parametrize(
    ("state", "weights", "says"),
    [
        ({"model": A, "ema": B}, None, "several sets of weights: 'ema', 'model'; name one"),
        ({"generator": A, "critic": B}, "generator_ema", "holds 'critic', 'generator'"),
        (A, "generator", "it is one set of weights; name none"),
        (A, "", "it is one set of weights; name none"),
        ({"model": A, "ema": {"decay": 0.9, **B}}, "ema", "'decay' in 'ema' is no tensor"),
        ({"ema": {"decay": 0.9, **B}}, None, "'decay' in 'ema' is no tensor"),
        ({"optimizer": {"state": {0: A}}}, None, "holds no dict of tensors"),
        ({"a": torch.eye(2).to_sparse()}, None, "names 'torch._utils._rebuild_sparse_tensor'"),
        (torch.nn.Linear(2, 2), None, "names 'torch.nn.modules.linear.Linear'"),
        ({"a": torch.zeros(1).expand(4)}, None, "overlaps itself"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, None, "names 'torch.ComplexDoubleStorage'"),
    ],
)
def test_what_is_refused(tmp_path, state, weights, says):
    with pytest.raises(CheckpointError) as e:
        opened(tmp_path / "x.pt", state, weights)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_weights_of_a_file_that_is_one_set(tmp_path):
    torch.save(A, tmp_path / "x.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(A, "x.bin")}))
    with pytest.raises(CheckpointError, match="is one set of weights, without 'generator'"):
        open_checkpoint(index, "generator")


def test_what_training_scripts_keep_beside_weights(tmp_path):
    state = {
        "state_dict": A,
        "args": argparse.Namespace(lr=1e-4, out=PurePosixPath("x")),
        "metrics": defaultdict(list, loss=[0.5]),
        "best": np.float64(0.25),
        "random": np.random.RandomState(0).get_state(),
        "device": torch.device("cuda:0"),
        "dtype": torch.bfloat16,
        "shape": torch.Size((2, 3)),
        "seen": {1, 2},
        "seed": 2**100,
        "note": "é" * 1000,
        "nested": [({"a": (None, True, -1.5, b"raw")},)],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    for protocol in (2, 3):
        found = opened(tmp_path / "x.ckpt", state, pickle_protocol=protocol)
        assert found.chosen == "state_dict"
        equal(found, A)


def test_the_format_before_1_6(tmp_path):
    with pytest.raises(CheckpointError, match=r"a bare pickle \(PyTorch before 1.6\)"):
        opened(tmp_path / "x.pth", A, _use_new_zipfile_serialization=False)


def test_files_without_a_byte_order_or_checksums(tmp_path):
    """PyTorch before 2.1 wrote no byte order; checksums can be switched off."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(A, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "x.pth") as z:
        assert not any(info.CRC for info in z.infolist())
    equal(open_checkpoint(tmp_path / "x.pth")[0], A)
    old = bad_pickles.archive().replace(b"byteorder", b"byt_order")
    (tmp_path / "x.pth").write_bytes(old)
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "x.pth")[0]["w"].reshape(-1), range(6))


def test_a_flipped_bit_is_noticed_where_an_array_is_the_whole_storage(tmp_path):
    torch.save({"a": torch.full((64,), 0.5)}, tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    at = data.index(struct.pack("<f", 0.5) * 64)
    for bit in (0, 1000, 2047):
        bad = bytearray(data)
        bad[at + bit // 8] ^= 1 << bit % 8
        (tmp_path / "x.pth").write_bytes(bad)
        with pytest.raises(CheckpointError, match="does not match its checksum|is not finite"):
            open_checkpoint(tmp_path / "x.pth")[0]["a"]


def test_shards_with_an_index(tmp_path):
    parts = {"p-1.bin": {"a": torch.ones(2), "b": torch.eye(2)}, "p-2.bin": {"c": torch.zeros(3)}}
    places = {name: file for file, state in parts.items() for name in state}
    for file, state in parts.items():
        torch.save(state, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    found, _ = open_checkpoint(tmp_path)
    equal(found, parts["p-1.bin"] | parts["p-2.bin"])
    assert [path.name for path, _ in found.files()] == ["p-1.bin", "p-2.bin"]
    torch.save({"model": parts["p-2.bin"]}, tmp_path / "p-2.bin")
    with pytest.raises(CheckpointError, match="holds a dict 'model'; it must be flat"):
        open_checkpoint(tmp_path)


def test_files_beyond_four_gigabytes(tmp_path):
    """A file with a hole: its second storage lies behind the first of 5 GB, as ZIP64 says it."""
    size, path = 5 * 2**30, tmp_path / "x.pth"
    last = bad_pickles.tensor(size // 4 - 3, (3,), (1,), where=bad_pickles.storage("0", size // 4))
    own = bad_pickles.tensor(where=bad_pickles.storage("1"))
    pickle = bad_pickles.program(bad_pickles.pairs(("last", last), ("w", own)))
    names = {"data.pkl": pickle, "data/0": size, "data/1": bad_pickles.DATA}
    directory = io.BytesIO()
    with path.open("wb") as f:
        for name, data in names.items():
            raw, header = f"x/{name}".encode(), f.tell()
            f.write(struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, 0, 0, len(raw), 0) + raw)
            if data is size:
                f.seek(size - 12, 1)
                f.write(np.float32([7, 8, 9]).tobytes())
            else:
                f.write(data)
            length = data if data is size else len(data)
            extra = struct.pack("<HHH", 9, 2, 0) + struct.pack(
                "<2H3Q", 1, 24, length, length, header
            )
            numbers = (45, 45, 0, 0, 0, 0, 0, *(0xFFFFFFFF,) * 2, len(raw), len(extra), *(0,) * 4)
            entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", *numbers, 0xFFFFFFFF)
            directory.write(entry + raw + extra)
        start, wide = f.tell(), directory.getvalue()
        f.write(wide)
        end = f.tell()
        f.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(wide), start))
        f.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        f.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, *(0xFFFFFFFF,) * 2, 0))
    assert zipfile.is_zipfile(path) and path.stat().st_size > size
    found, _ = open_checkpoint(path)
    np.testing.assert_array_equal(found["last"], [7, 8, 9])
    np.testing.assert_array_equal(found["w"].reshape(-1), range(6))
