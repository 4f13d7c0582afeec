# SPDX-License-Identifier: Apache-2.0
"""Plans: templates, stacking, splitting, copies, the way back, and refusals."""

import numpy as np
import pytest

from checkpoints_convert.rules import (
    Rule,
    Transform,
    linear_rules,
    make_plan,
    source_array,
    sources_of,
)
from lvjax.core.errors import CheckpointError
from lvjax.core.params import Param, flatten
from tests.checkpoints_convert.in_memory import convert

SPLIT = Transform(
    lambda a: (a[:, :2].T, a[:, 2:].T), lambda *parts: np.concatenate([p.T for p in parts], axis=1)
)
RULES = [
    *linear_rules("blocks.{layer}.attn.to_q", "blocks/attn/q"),
    Rule("embed.weight", ("noise/kernel", "image/kernel"), SPLIT),
    Rule("position_ids", None),
    Rule("twin.weight", None, copy_of="embed.weight"),
]


def param(*shape):
    return {"kernel": Param(shape, (None,) * len(shape))}


SPEC = {"blocks": {"attn": {"q": param(12, 2, 3)}}, "noise": param(2, 4), "image": param(3, 4)}


def arrays(layers=12):
    own = {f"blocks.{i}.attn.to_q.weight": np.full((3, 2), i, np.float16) for i in range(layers)}
    return own | {"embed.weight": np.arange(20.0).reshape(4, 5)}


def test_layers_are_stacked_in_numerical_order():
    q = convert(arrays(), RULES, SPEC)["blocks"]["attn"]["q"]["kernel"]
    assert q.shape == (12, 2, 3) and q.dtype == np.float16
    np.testing.assert_array_equal(q[:, 0, 0], np.arange(12))


def test_one_array_may_fill_two_leaves():
    tree, a = convert(arrays(), RULES, SPEC), arrays()["embed.weight"]
    np.testing.assert_array_equal(tree["noise"]["kernel"], a[:, :2].T)
    np.testing.assert_array_equal(tree["image"]["kernel"], a[:, 2:].T)
    assert tree["image"]["kernel"].flags.c_contiguous


def test_the_way_back_is_exact():
    flat = flatten(convert(arrays(), RULES, SPEC))
    names = sources_of(RULES, SPEC)
    assert names.keys() == arrays().keys()
    for name, (rule, layer) in names.items():
        back = source_array(rule, layer, lambda p, i: flat[p] if i is None else flat[p][i])
        np.testing.assert_array_equal(back, arrays()[name])


def test_what_the_model_does_not_use_is_named():
    given = arrays() | {"position_ids": np.zeros(9), "twin.weight": arrays()["embed.weight"]}
    plan = make_plan({k: a.shape for k, a in given.items()}, RULES, SPEC)
    assert plan.unused == ("position_ids",) and plan.copies == (("twin.weight", "embed.weight"),)


def test_refusals():
    def refused(given, says, rules=RULES, spec=SPEC):
        with pytest.raises(CheckpointError, match=says):
            convert(given, rules, spec)

    extra = arrays() | {"blocks.x.y": np.zeros(1)}
    refused(extra, "1 arrays have no place in this model: blocks.x.y")
    gap = {k: v for k, v in arrays(4).items() if ".2." not in k}
    refused(gap, r"layers \[0, 1, 3\]; some are missing")
    refused(
        {"a": np.zeros(1), "b": np.zeros(1)}, "both go to 'x'", [Rule("a", "x"), Rule("b", "x")]
    )
    refused(arrays(11), "blocks/attn/q/kernel of 11 layers, not 12")
    less = {k: a for k, a in arrays().items() if k != "embed.weight"}
    refused(less, "2 arrays are missing: image/kernel, noise/kernel")
    bias = arrays() | {f"blocks.{i}.attn.to_q.bias": np.zeros(3) for i in range(12)}
    refused(bias, "1 arrays are not in the model: blocks/attn/q/bias")
    turned = arrays() | {"blocks.3.attn.to_q.weight": np.zeros((2, 3))}
    refused(turned, r"blocks.3.attn.to_q.weight \[2, 3\], which gives \(3, 2\) instead of \(2, 3\)")
    flat = arrays() | {"embed.weight": np.zeros(20)}
    refused(flat, "which gives None instead of")
    twice = [*RULES, Rule("blocks.0.attn.{layer}.weight", "q"), Rule("blocks.0.{layer}.3", "q")]
    with pytest.raises(ValueError, match="fits 2 rules"):
        convert(arrays() | {"blocks.0.attn.3.weight": np.zeros(1)}, [*twice, twice[-2]], SPEC)


def test_a_huge_shape_costs_nothing():
    shapes = {k: a.shape for k, a in arrays().items()} | {"embed.weight": (2**30, 2**30)}
    with pytest.raises(CheckpointError, match="other shapes"):
        make_plan(shapes, RULES, SPEC)
