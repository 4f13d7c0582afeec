# SPDX-License-Identifier: Apache-2.0
"""`convert`: templates, stacking, splitting, and refusals."""

import numpy as np
import pytest

from checkpoints_convert.keys_wan import Rule, Transform, convert, linear_rules
from lvjax.core.errors import CheckpointError

SPLIT = Transform(
    lambda a: (a[:, :2].T, a[:, 2:].T), lambda parts: np.concatenate([p.T for p in parts], axis=1)
)
RULES = [
    *linear_rules("blocks.{layer}.attn.to_{x}", "blocks/attn/{x}"),
    Rule("embed.weight", ("noise/kernel", "image/kernel"), SPLIT),
]


def arrays(layers=12):
    return {f"blocks.{i}.attn.to_q.weight": np.full((3, 2), i, np.float16) for i in range(layers)}


def test_layers_are_stacked_in_numerical_order():
    tree = convert(arrays(), RULES)
    q = tree["blocks"]["attn"]["q"]["kernel"]
    assert q.shape == (12, 2, 3) and q.dtype == np.float16
    np.testing.assert_array_equal(q[:, 0, 0], np.arange(12))


def test_one_array_may_fill_two_leaves():
    a = np.arange(20.0).reshape(4, 5)
    tree = convert({"embed.weight": a}, RULES)
    np.testing.assert_array_equal(tree["noise"]["kernel"], a[:, :2].T)
    np.testing.assert_array_equal(tree["image"]["kernel"], a[:, 2:].T)
    assert tree["image"]["kernel"].flags.c_contiguous


def test_each_array_is_read_once():
    class Lazy(dict):
        reads = 0

        def __getitem__(self, key):
            self.reads += 1
            return super().__getitem__(key)

    lazy = Lazy(arrays())
    convert(lazy, RULES)
    assert lazy.reads == 12


def test_refusals():
    with pytest.raises(CheckpointError, match="1 arrays have no place in this model: blocks.x.y"):
        convert({"blocks.x.y": np.zeros(1)}, RULES)
    gap = {k: v for k, v in arrays(4).items() if ".2." not in k}
    with pytest.raises(CheckpointError, match=r"layers \[0, 1, 3\]; some are missing"):
        convert(gap, RULES)
    two = [Rule("a", "x"), Rule("b", "x")]
    with pytest.raises(CheckpointError, match="'b' and another array both go to 'x'"):
        convert({"a": np.zeros(1), "b": np.zeros(1)}, two)
    with pytest.raises(ValueError, match="fits 2 rules"):
        convert(arrays(1), [*RULES, Rule("{any}.0.attn.to_q.weight", "q")])
