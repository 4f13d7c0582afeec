# SPDX-License-Identifier: Apache-2.0
"""The folder that Orbax restores: by Orbax itself, whole and over eight devices; damage that Orbax
does not see, and that we do; and what is refused.
"""

import json
import zlib

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lvjax.core.errors import CheckpointError
from lvjax.core.orbax_layout import FORMAT, OWN, open_folder, piece_file
from lvjax.core.params import flatten, unflatten
from lvjax.core.streaming import Kind, write_stream

_RNG = np.random.default_rng(0)
ARRAYS = {
    "blocks/q/kernel": _RNG.standard_normal((4, 16, 8)).astype(ml_dtypes.bfloat16),
    "blocks/norm": _RNG.standard_normal((4, 8)).astype(np.float32),
    "head/bias": _RNG.standard_normal(8).astype(np.float16),
    "table": _RNG.standard_normal((24, 3)),
    "one": np.float32(2.5).reshape(()),
    "zeros": np.zeros((8, 2), np.float32),
}
KINDS = {k: Kind(a.dtype, a.shape, 4 if "blocks" in k else 1) for k, a in ARRAYS.items()}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "part"
    write_stream(
        path,
        KINDS,
        {"n": 1},
        lambda name: lambda i: ARRAYS[name][i] if KINDS[name].pieces > 1 else ARRAYS[name],
        "orbax",
    )
    return path


def same(tree) -> bool:
    found = {k: np.asarray(a) for k, a in flatten(tree).items()}
    return found.keys() == ARRAYS.keys() and all(
        found[k].dtype == a.dtype
        and found[k].shape == a.shape
        and found[k].tobytes() == a.tobytes()
        for k, a in ARRAYS.items()
    )


def test_orbax_restores_it(folder):
    assert same(ocp.PyTreeCheckpointer().restore(folder))
    with ocp.StandardCheckpointer() as checkpointer:
        assert same(checkpointer.restore(folder))
        metadata = flatten(checkpointer.metadata(folder).item_metadata.tree)
    assert {k: (m.shape, np.dtype(m.dtype)) for k, m in metadata.items()} == {
        k: (a.shape, a.dtype) for k, a in ARRAYS.items()
    }


def sharded() -> dict:
    """What Orbax is asked for: the arrays cut over eight devices wherever an axis allows it."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def like(a):
        axes = ["fsdp" if n % 8 == 0 and n else None for n in a.shape]
        first = axes.index("fsdp") if "fsdp" in axes else -1
        spec = PartitionSpec(*(axis if i == first else None for i, axis in enumerate(axes)))
        # without 64 bits, jax has float32 for float64
        dtype = np.float32 if a.dtype == np.float64 else a.dtype
        return jax.ShapeDtypeStruct(a.shape, dtype, sharding=NamedSharding(mesh, spec))

    return {k: like(a) for k, a in ARRAYS.items()}


def test_every_device_gets_its_part(folder):
    wanted = sharded()
    with ocp.StandardCheckpointer() as checkpointer:
        found = flatten(checkpointer.restore(folder, unflatten(wanted)))
    cut = 0
    for name, array in found.items():
        assert array.sharding == wanted[name].sharding and len(array.addressable_shards) == 8
        cut += array.addressable_shards[0].data.size * 8 == array.size > 1
        np.testing.assert_array_equal(np.asarray(array), ARRAYS[name].astype(array.dtype))
    assert cut == 5
    arguments = ocp.checkpoint_utils.construct_restore_args(unflatten(wanted))
    again = ocp.PyTreeCheckpointer().restore(folder, restore_args=arguments)
    for name, array in flatten(again).items():
        assert array.sharding == wanted[name].sharding
        np.testing.assert_array_equal(np.asarray(array), np.asarray(found[name]))


def test_orbax_sees_no_damage_in_arrays(folder):
    """A bit in each array: Orbax restores all of them, other than they were; we name each."""
    for name, array in ARRAYS.items():
        file = folder / piece_file(name, 0, array.ndim)
        good = file.read_bytes()
        file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        restored = flatten(ocp.PyTreeCheckpointer().restore(folder))
        others = {k: a for k, a in ARRAYS.items() if k != name}
        assert restored[name].tobytes() != array.tobytes()
        assert all(restored[k].tobytes() == a.tobytes() for k, a in others.items())
        stored = open_folder(folder)
        with pytest.raises(CheckpointError, match=f"array '{name}' does not match its checksum"):
            dict(stored)
        with pytest.raises(CheckpointError, match=f"array '{name}' does not match its checksum"):
            stored.check()
        file.write_bytes(good)
    open_folder(folder).check()


def signed(body: dict) -> bytes:
    """`lvjax.json` with the right checksum."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return f'{{"crc32":"{zlib.crc32(text.encode()):08x}","body":{text}}}\n'.encode()


def test_damage_beside_the_arrays_is_named(folder):
    for name in (OWN, "_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt", "table/.zarray"):
        data = (folder / name).read_bytes()
        for bad in (data[:-2], data[:-1] + b"x", b"", b"{}", b"\xff" * 40, None):
            (folder / name).unlink() if bad is None else (folder / name).write_bytes(bad)
            with pytest.raises(CheckpointError, match=f"/{name}|has no {OWN}"):
                open_folder(folder)
        (folder / name).write_bytes(data)
    file = folder / piece_file("table", 0, 2)
    data = file.read_bytes()
    for bad in (data + b"\0", data[:-1], None):
        file.unlink() if bad is None else file.write_bytes(bad)
        with pytest.raises(CheckpointError, match="/table/0.0"):
            open_folder(folder)
    file.write_bytes(data)
    body = json.loads((folder / OWN).read_bytes())["body"]
    entry = body["arrays"]["table"]
    for change in (
        {"format": "lvjax-folder/9"},
        {"arrays": {"table": [*entry[:2], 0, entry[3]]}},
        {"arrays": {"table": ["F99", *entry[1:]]}},
        {"arrays": {"table": entry[:3]}},
        {"arrays": 7},
    ):
        (folder / OWN).write_bytes(signed(body | change))
        with pytest.raises(CheckpointError, match=f"/{OWN} is not a readable"):
            open_folder(folder)
    (folder / OWN).write_bytes(signed(body))
    assert body["format"] == FORMAT and same(unflatten(dict(open_folder(folder))))


def test_what_is_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="give a folder that `lvjax convert` finished"):
        open_folder(tmp_path)
