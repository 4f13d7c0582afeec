# SPDX-License-Identifier: Apache-2.0
"""Parameters over a mesh: the shardings of a spec by its logical axes, and what does not divide."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lvjax.core.errors import InputError
from lvjax.core.mesh import RULES, make_mesh, partition, shardings
from lvjax.core.params import abstract, init
from lvjax.models.config import DiTConfig
from lvjax.models.dit import dit_spec

SPEC = dit_spec(DiTConfig(32, 4, 2, 64, text_dim=16, freq_dim=16, dtype="float32"))


def test_a_spec_over_a_mesh():
    mesh = make_mesh(fsdp=4)
    placed = jax.device_put(init(SPEC, jax.random.key(0)), shardings(SPEC, mesh))
    q = placed["blocks"]["self_attn"]["q"]["kernel"]  # [layers, in, out]
    assert q.sharding.spec == PartitionSpec(None, None, "fsdp")
    assert {s.data.shape for s in q.addressable_shards} == {(2, 32, 8)}
    ffn = [a for a in jax.tree.leaves(placed["blocks"]["ffn"]) if a.shape == (2, 32, 64)]
    assert [s.data.shape for s in ffn[0].addressable_shards] == [(2, 32, 16)] * 4
    same = jax.tree.map(lambda a, p: a.shape == p.shape, placed, abstract(SPEC))
    assert all(jax.tree.leaves(same))


def test_rules_may_name_several_mesh_axes():
    mesh = make_mesh(data=2, fsdp=2)
    rules = RULES | {"heads": ("data", "fsdp")}
    q = shardings(SPEC, mesh, rules)["blocks"]["self_attn"]["q"]["kernel"]
    assert np.prod(q.shard_shape((2, 32, 32))) == 2 * 32 * 32 // 4
    with pytest.raises(InputError, match=r"does not divide over the 8 devices"):
        shardings(dit_spec(DiTConfig(36, 3, 1, 64, text_dim=16)), make_mesh(fsdp=8))


def test_an_axis_that_the_rules_do_not_know_is_an_error():
    with pytest.raises(KeyError, match="head"):
        partition(("head",))
