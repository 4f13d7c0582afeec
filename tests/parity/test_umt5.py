# SPDX-License-Identifier: Apache-2.0
"""The text encoder against transformers' on random weights, every parameter drawn anew, float32.

Each mutant is a mistake that is easily made; the same comparison must notice it.
"""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import UMT5Config as TheirConfig
from transformers import UMT5EncoderModel

from checkpoints_convert.keys_umt5 import umt5_config, umt5_layout, umt5_rules
from lvjax.core.errors import InputError
from lvjax.core.params import abstract, count
from lvjax.models import umt5
from lvjax.models.umt5 import UMT5Config, bucket, encode_text, umt5_spec
from tests.checkpoints_convert.in_memory import convert
from tests.drawn import edited, swapped
from tests.redrawn import arrays, redrawn
from tests.tiny import relative

TOLERANCE = 5e-6
NOTICED = 1e-4
CFG = UMT5Config(97, 48, 16, 4, 80, 3, dtype="float32")  # 4 heads of 16 are wider than 48
LENGTHS = (150, 1, 60)  # tokens of each text
IDS = np.random.default_rng(0).integers(0, CFG.vocab, (3, LENGTHS[0]), np.int32)
MASK = np.arange(LENGTHS[0])[None, :] < np.array(LENGTHS)[:, None]


@cache
def oracle():
    """transformers' model with random parameters that all matter, and its arrays by name."""
    config = TheirConfig(
        vocab_size=CFG.vocab,
        d_model=CFG.dim,
        d_kv=CFG.head_dim,
        num_heads=CFG.num_heads,
        d_ff=CFG.ffn_dim,
        num_layers=CFG.num_layers,
        feed_forward_proj="gated-gelu",
    )
    special = {
        "shared.weight": lambda noise, _: 0.005 * noise,  # so small that the norm's epsilon shows
        "relative_attention_bias": lambda noise, _: noise,
        # nothing scales the scores: the weights must
        ".q.": lambda noise, _: noise / (CFG.dim * CFG.head_dim) ** 0.5,
    }
    model = redrawn(UMT5EncoderModel(config), special)
    return model, arrays(model)


@cache
def wanted(length):
    """Rows of the oracle, those behind each text as zeros."""
    ids, mask = (torch.from_numpy(a[:, :length]).long() for a in (IDS, MASK))
    with torch.no_grad():
        rows = oracle()[0](ids, mask).last_hidden_state
    return (rows * mask[:, :, None]).numpy()


@cache
def params():
    return convert(oracle()[1], umt5_rules((), "transformers"), umt5_spec(CFG))


def ours(params, cfg=CFG, length=LENGTHS[0], mask=MASK):
    run = jax.jit(lambda p: encode_text(p, IDS[:, :length], mask[:, :length], cfg))
    return np.asarray(run(params))


@pytest.mark.parametrize("length", (150, 61, 1))
def test_equals_transformers(length):
    assert relative(ours(params(), length=length), wanted(length)) <= TOLERANCE


def test_padding_rows_are_zeros_and_what_they_hold_is_not_read():
    got = ours(params())
    assert not got[~MASK].any() and got[MASK].all()
    ids = np.where(MASK, IDS, 5)
    again = encode_text(params(), ids, MASK.astype(np.int32), CFG)
    np.testing.assert_allclose(again, got, rtol=0, atol=1e-5)
    assert not np.asarray(encode_text(params(), ids, np.zeros_like(MASK), CFG)).any()


def test_the_layers_one_by_one():
    """As a caller does who holds one layer of the weights at a time."""
    x = umt5.embed(params()["embedding"], IDS)
    step = jax.jit(lambda p, x: umt5.block(p, x, jnp.asarray(MASK), CFG))
    for i in range(CFG.num_layers):
        x = step(jax.tree.map(lambda a, i=i: a[i], params()["blocks"]), x)
    rows = umt5.final_norm(params()["norm"], x, jnp.asarray(MASK), CFG)
    assert relative(rows, wanted(LENGTHS[0])) <= TOLERANCE


def test_half_precision_is_no_worse_than_theirs():
    """bfloat16 weights and activations, against the same weights in float32."""
    narrow = UMT5EncoderModel(oracle()[0].config).eval()
    narrow.load_state_dict(oracle()[0].state_dict())
    narrow.bfloat16()
    ids, mask = torch.from_numpy(IDS).long(), torch.from_numpy(MASK).long()
    with torch.no_grad():
        theirs = narrow(ids, mask).last_hidden_state.float().numpy()
        truth = narrow.float()(ids, mask).last_hidden_state.numpy()
    halved = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params())
    got = ours(halved, replace(CFG, dtype="bfloat16"))
    assert got.dtype == jnp.bfloat16 and not got[~MASK].any()
    got = relative(got.astype(np.float32)[MASK], truth[MASK])
    assert 1e-4 < got < relative(theirs[MASK], truth[MASK])


def test_buckets():
    """Against transformers' own, and the table that the sheet of facts gives."""
    distance = np.arange(-600, 601)
    attention = oracle()[0].encoder.block[0].layer[0].SelfAttention
    theirs = attention._relative_position_bucket(torch.from_numpy(distance)).numpy()
    np.testing.assert_array_equal(bucket(distance, CFG), theirs)
    first = [*range(9), 12, 16, 23, 32, 46, 64, 91]
    rows = bucket(-np.arange(600), CFG)
    assert [int(np.argmax(rows == i)) for i in range(16)] == first
    np.testing.assert_array_equal(bucket(np.arange(1, 600), CFG), rows[1:] + 16)
    attention.relative_attention_num_buckets, attention.relative_attention_max_distance = 20, 40
    theirs = attention._relative_position_bucket(torch.from_numpy(distance)).numpy()
    attention.relative_attention_num_buckets, attention.relative_attention_max_distance = 32, 128
    np.testing.assert_array_equal(
        bucket(distance, replace(CFG, num_buckets=20, max_distance=40)), theirs
    )


def shared_bias():
    return ours(
        edited(params(), "blocks/attn/relative_bias", lambda a: np.repeat(a[:1], CFG.num_layers, 0))
    )


def scaled_scores():
    return ours(edited(params(), "blocks/attn/q/kernel", lambda a: a * CFG.head_dim**-0.5))


def no_bias():
    return ours(edited(params(), "blocks/attn/relative_bias", np.zeros_like))


def patched(monkeypatch, where, name, value):
    with monkeypatch.context() as patch:
        patch.setattr(where, name, value)
        return ours(params())


def exact_gelu(monkeypatch):
    plain = jax.nn.gelu
    return patched(monkeypatch, jax.nn, "gelu", lambda x, approximate: plain(x, approximate=False))


def turned_distance(monkeypatch):
    return patched(monkeypatch, umt5, "bucket", lambda distance, cfg: bucket(-distance, cfg))


def mean_removed(monkeypatch):
    def norm(weight, x, eps):
        return plain(weight, x - x.mean(-1, keepdims=True), eps)

    plain = umt5.rms_norm
    return patched(monkeypatch, umt5, "rms_norm", norm)


def no_final_norm(monkeypatch):
    return patched(monkeypatch, umt5, "final_norm", lambda weight, x, mask, cfg: x)


def near_buckets(monkeypatch):
    """The boundary at 16, where a rounded logarithm may fall on the wrong side."""

    def moved(distance, cfg):
        row = bucket(distance, cfg)
        return np.where(np.abs(distance) == 16, row - 1, row)

    return patched(monkeypatch, umt5, "bucket", moved)


MUTANTS = {
    "the bias of layer 0 for all": lambda _: shared_bias(),
    "no bias": lambda _: no_bias(),
    "1/sqrt(d)": lambda _: scaled_scores(),
    "padding not masked": lambda _: ours(params(), mask=np.ones_like(MASK)),
    "eps of 1e-5": lambda _: ours(params(), replace(CFG, eps=1e-5)),
    "gate and linear swapped": lambda _: ours(swapped(params(), "blocks/ffn", "gate", "fc1")),
    "q and k swapped": lambda _: ours(swapped(params(), "blocks/attn", "q", "k")),
    "k and v swapped": lambda _: ours(swapped(params(), "blocks/attn", "k", "v")),
    "exact GELU": exact_gelu,
    "query minus key": turned_distance,
    "mean removed": mean_removed,
    "no final norm": no_final_norm,
    "bucket of 16": near_buckets,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name, monkeypatch):
    assert relative(MUTANTS[name](monkeypatch)[MASK], wanted(LENGTHS[0])[MASK]) > NOTICED


OFFICIAL = (  # transformers -> official, in this order
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.", "blocks."),
    (r"layer\.0\.layer_norm", "norm1"),
    (r"layer\.1\.layer_norm", "norm2"),
    (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
    (r"layer\.0\.SelfAttention\.", "attn."),
    (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
    (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"),
    (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2"),
)


def official_name(key):
    for pattern, name in OFFICIAL:
        key = re.sub(pattern, name, key)
    return key


def test_official_names_give_the_same_tree():
    renamed = {official_name(key): a for key, a in oracle()[1].items()}
    assert umt5_layout(renamed) == "official"
    got = convert(renamed, umt5_rules((), "official"), umt5_spec(CFG))
    jax.tree.map(np.testing.assert_array_equal, got, params())
    shapes = jax.tree.map(lambda a: a.shape, abstract(umt5_spec(CFG)))
    assert jax.tree.map(lambda a: a.shape, got) == shapes
    found = umt5_config({k: a.shape for k, a in renamed.items()}, {"num_heads": 40})
    assert found == replace(CFG, dtype="bfloat16")


def test_sizes():
    assert count(umt5_spec(UMT5Config())) == 5_680_910_336
    for wrong in (dict(num_buckets=30), dict(max_distance=8), dict(dtype="float16"), dict(vocab=0)):
        with pytest.raises(InputError, match=f"UMT5Config.{next(iter(wrong))} is"):
            UMT5Config(**wrong)
    with pytest.raises(InputError, match="151 tokens, the encoder takes 150"):
        encode_text({}, np.zeros((1, 151)), np.zeros((1, 151)), replace(CFG, length=150))
    with pytest.raises(InputError, match="mask has shape"):
        encode_text({}, np.zeros((1, 15)), np.zeros((1, 16)), CFG)
