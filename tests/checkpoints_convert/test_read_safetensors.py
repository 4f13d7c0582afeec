# SPDX-License-Identifier: Apache-2.0
"""Good safetensors files, indices, folders and caches of downloads; what is refused is in
test_bad_files.py.
"""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from checkpoints_convert import read_safetensors, tensors
from checkpoints_convert.read import find, open_checkpoint
from lvjax.core.dtypes import DTYPES
from lvjax.core.errors import CheckpointError
from tests.checkpoints_convert.bad_files import READ, Case, outcomes
from tests.checkpoints_convert.bad_safetensors import safetensors

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.float16([[1], [2]])
TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def bits(a) -> np.ndarray:
    """The bytes of an array of NumPy or PyTorch."""
    if isinstance(a, torch.Tensor):
        a = torch.clone(a.detach(), memory_format=torch.contiguous_format).reshape(-1)
        a = a.view(torch.uint8).numpy() if len(a) else np.zeros(0)
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


def of_every_type() -> dict[str, torch.Tensor]:
    """A tensor of each dtype, by its name in safetensors."""
    values = torch.tensor([[0.0, 1.0, 2.0], [4.0, 8.0, 1.5]])
    return {name: values.to(dtype) for name, dtype in TORCH.items()}


def saved(path, arrays=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": A, "b": B} if arrays is None else arrays, path, **options)
    return path


def test_every_type_is_read_bit_by_bit(tmp_path):
    own = of_every_type()
    assert own.keys() == DTYPES.keys()
    save_torch(own, tmp_path / "x.safetensors")
    found, config = open_checkpoint(tmp_path / "x.safetensors")
    assert config == {} and found.keys() == own.keys() and found.chosen is None
    for name, a in own.items():
        assert found[name].dtype == found.dtype(name) == DTYPES[name]
        assert found[name].shape == found.shape(name) == (2, 3)
        assert found.nbytes(name) == found[name].nbytes
        np.testing.assert_array_equal(bits(found[name]), bits(a))


def test_what_is_known_without_reading(tmp_path):
    path = saved(tmp_path / "x.safetensors")
    found, _ = open_checkpoint(str(path))
    assert found.shapes() == {"a": (2, 3), "b": (2, 1)} and len(found) == 2 and "c" not in found
    assert found.files() == ((path, path.stat().st_size),)
    assert (found.nbytes("a"), found.nbytes("b")) == (24, 4)
    shorter = found.without("a")
    assert list(shorter) == ["", "b"]
    with pytest.raises(CheckpointError, match="are the same name"):
        open_checkpoint(saved(tmp_path / "y", {"p.a": A, "a": A}))[0].without("p.")
    with pytest.raises(KeyError):
        found["c"]


def test_scalars_empty_arrays_and_names_in_any_script(tmp_path):
    own = {
        "scalar": np.array(3.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
        "重み.\u202e": A,
        'quote"\\{}[],:': B,
        "n" * 500: A,
    }
    note = {"ss_tags": '{"a": [1, 2], "\\"": "}"}', "title": "é🎈"}
    found, _ = open_checkpoint(saved(tmp_path / "x.safetensors", own, metadata=note))
    assert found.keys() == own.keys()
    for name, a in own.items():
        assert found[name].shape == a.shape
        np.testing.assert_array_equal(found[name], a)


def test_fields_in_any_order_with_any_spaces(tmp_path):
    fields = b'{ "data_offsets" :[ 0 , 24 ],\n\t"shape":[2,3 ] , "dtype":"\\u0046\\u0033\\u0032" }'
    header = b'{ "__metadata__" : { } ,\r\n "\\u0061" : ' + fields + b" }    "
    (tmp_path / "x").write_bytes(safetensors(header, A.tobytes()))
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "x")[0]["a"], A)


def test_the_content_decides_what_a_file_is(tmp_path):
    saved(tmp_path / "a.pth")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.safetensors")
    (tmp_path / "c").write_bytes((tmp_path / "a.pth").read_bytes())
    for name, keys in (("a.pth", {"a", "b"}), ("b.safetensors", {"w"}), ("c", {"a", "b"})):
        assert open_checkpoint(tmp_path / name)[0].keys() == keys
    index = {"metadata": {}, "weight_map": {"a": "a.pth", "b": "a.pth", "w": "b.safetensors"}}
    (tmp_path / "d.bin").write_text(json.dumps(index))
    found, _ = open_checkpoint(tmp_path / "d.bin")
    assert found.keys() == {"a", "b", "w"} and len(found.files()) == 2
    np.testing.assert_array_equal(found["a"], A)
    np.testing.assert_array_equal(found["w"], np.ones(2, np.float32))


def test_which_file_of_a_folder_is_read(tmp_path):
    """An index before files, safetensors before pickles; other files do not count."""
    (tmp_path / "notes.txt").touch()
    (tmp_path / "._model.safetensors").write_bytes(b"left by a file manager")
    for name in (
        "x.pt",
        "pytorch_model.bin.index.json",
        "x.safetensors",
        "x.safetensors.index.json",
    ):
        (tmp_path / name).touch()
        assert find(tmp_path) == tmp_path / name
    (tmp_path / "y.safetensors.index.json").touch()
    with pytest.raises(CheckpointError, match="holds 2 checkpoints"):
        find(tmp_path)
    assert find(tmp_path / "x.pt") == tmp_path / "x.pt"


def test_config_json_beside_the_weights(tmp_path):
    path = saved(tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text('{"dim": 1536, "name": "é"}')
    for source in (path, tmp_path):
        assert open_checkpoint(source)[1] == {"dim": 1536, "name": "é"}


def test_a_cache_of_links(tmp_path):
    """As Hugging Face's client keeps downloads: the snapshot's files are links to blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    places = {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    index = json.dumps({"weight_map": places}).encode()
    contents = {"m.safetensors.index.json": index, "config.json": b'{"dim": 3}'}
    for name, array in (("a", A), ("b", B)):
        contents[places[name]] = saved(tmp_path / "temporary", {name: array}).read_bytes()
    for number, (name, data) in enumerate(contents.items()):
        (blobs / f"{number:064x}").write_bytes(data)
        os.symlink(f"../../blobs/{number:064x}", snapshot / name)
    for source in (snapshot, snapshot / "m.safetensors.index.json"):
        found, config = open_checkpoint(source)
        assert config == {"dim": 3} and found.keys() == {"a", "b"}
        np.testing.assert_array_equal(found["b"], B)
    found, _ = open_checkpoint(snapshot / "m-1.safetensors")
    assert found.keys() == {"a"}


@pytest.mark.parametrize(
    ("names", "clean"),
    [
        (("model.a", "model.b"), ("a", "b")),
        (("module.model.a", "module.model.b"), ("a", "b")),
        (("module.a", "model.b"), ("module.a", "model.b")),
        (("_orig_mod.a", "_orig_mod.b"), ("a", "b")),
        (("model._fsdp_wrapped_module.a.x", "model.b.x"), ("a.x", "b.x")),
        (("a._fsdp_wrapped_module._checkpoint_wrapped_module.w", "b"), ("a.w", "b")),
        (("x_orig_mod.a", "my_fsdp_wrapped_module.b"),) * 2,
        (
            ("model.diffusion_model.a", "model.diffusion_model.b"),
            ("diffusion_model.a", "diffusion_model.b"),
        ),
        (("model.", "model.b"), ("model.", "model.b")),
    ],
)
def test_what_wrappers_add_to_names_is_taken_off(tmp_path, names, clean):
    path = saved(tmp_path / "x.safetensors", dict(zip(names, (A, B), strict=True)))
    found, _ = open_checkpoint(path)
    assert found.keys() == set(clean)
    np.testing.assert_array_equal(found[clean[0]], A)
    np.testing.assert_array_equal(found[clean[1]], B)


def test_finite_values_are_told_from_others_in_every_block(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", 64)
    for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.complex64):
        for place in (0, 15, 16, 63, 99):
            a = np.ones(100, dtype)
            path = saved(tmp_path / "x.safetensors", {"a": a})
            np.testing.assert_array_equal(open_checkpoint(path)[0]["a"], a)
            a[place] = np.nan if place % 2 else np.inf
            with pytest.raises(CheckpointError, match="array 'a' is not finite"):
                open_checkpoint(saved(path, {"a": a}))[0]["a"]


def test_a_file_that_changes_under_the_reader(tmp_path):
    path = saved(tmp_path / "x.safetensors")
    found, _ = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        found["b"], found["a"]
    path.unlink()
    for read in (found.__getitem__, lambda name: found.files()):
        with pytest.raises(CheckpointError, match="cannot read"):
            read("a")


def test_a_header_of_many_arrays(tmp_path, monkeypatch):
    own = {f"blocks.{i}.weight": np.full(2, i, np.int32) for i in range(3000)}
    found, _ = open_checkpoint(saved(tmp_path / "x.safetensors", own))
    assert found.keys() == own.keys()
    np.testing.assert_array_equal(found["blocks.2999.weight"], [2999, 2999])
    monkeypatch.setattr(read_safetensors, "TENSORS_MAX", 2999)
    with pytest.raises(CheckpointError, match="more than 2999 arrays"):
        open_checkpoint(tmp_path / "x.safetensors")


ALONE = READ + "\nassert not {'jax', 'torch', 'safetensors'} & set(sys.modules)"


def test_readers_hold_one_array_and_need_neither_jax_nor_torch(tmp_path):
    """Six arrays of 32 MB, also transposed ones of a PyTorch file, in 16 MB more than one."""
    side = np.zeros((2048, 4096), np.float32)
    each = {f"a{i}": side for i in range(6)}
    turned = {name: torch.from_numpy(a).clone().T for name, a in each.items()}

    def make_safetensors(folder):
        return saved(folder / "x.safetensors", each)

    def make_torch(folder):
        torch.save(turned, folder / "x.pth")
        return folder / "x.pth"

    cases = [Case("safetensors", make_safetensors, ""), Case("torch", make_torch, "")]
    for name, end in outcomes(cases, tmp_path, ALONE).items():
        assert end.kind is None, (name, end)
        assert 32 <= end.megabytes <= 32 + 16, (name, end)
