# SPDX-License-Identifier: Apache-2.0
"""BERT's encoder and Sentence-BERT's features against transformers' on random weights, every
parameter drawn anew, float32.

Each mutant is a mistake that is easily made; the same comparison must notice it.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BertConfig as TheirConfig
from transformers import BertForPreTraining, BertModel

from checkpoints_convert.keys_bert import bert_config, bert_rules
from checkpoints_convert.rules import make_plan
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.params import abstract, count
from lvjax.models import bert
from lvjax.models.bert import BertConfig, bert_spec, encode_bert, sentence_features
from tests.checkpoints_convert.in_memory import convert
from tests.drawn import edited, swapped
from tests.redrawn import arrays, redrawn
from tests.tiny import relative

TOLERANCE = 5e-6
NOTICED = 1e-4
CFG = BertConfig(61, 48, 3, 4, 80, positions=40, types=3)
LENGTHS = (33, 2, 20)  # tokens of each text
IDS = np.random.default_rng(0).integers(0, CFG.vocab, (3, LENGTHS[0]), np.int32)
MASK = np.arange(LENGTHS[0])[None, :] < np.array(LENGTHS)[:, None]


def their_config(**changes):
    return TheirConfig(
        vocab_size=CFG.vocab,
        hidden_size=CFG.dim,
        num_hidden_layers=CFG.num_layers,
        num_attention_heads=CFG.num_heads,
        intermediate_size=CFG.ffn_dim,
        max_position_embeddings=CFG.positions,
        type_vocab_size=CFG.types,
        **changes,
    )


@cache
def oracle():
    """transformers' model with random parameters that all matter, and its arrays by name."""
    special = {
        "embeddings.LayerNorm.weight": lambda noise, _: 1 + 0.3 * noise,
        "embeddings.LayerNorm.bias": lambda noise, _: 0.3 * noise,
        "embeddings.": lambda noise, _: 0.005 * noise,  # so small that the norm's epsilon shows
        "attention.output.dense.weight": lambda noise, fan: fan * noise,
        "output.dense.weight": lambda noise, fan: 4 * fan * noise,  # so that GELU's form shows
    }
    model = redrawn(BertModel(their_config()), special)
    return model, arrays(model)


@cache
def wanted():
    """Token rows of the oracle."""
    ids, mask = torch.from_numpy(IDS).long(), torch.from_numpy(MASK).long()
    with torch.no_grad():
        return oracle()[0](ids, mask).last_hidden_state


@cache
def wanted_features(pooling, normalise):
    """As sentence-transformers has them."""
    mask = torch.from_numpy(MASK)[:, :, None].float()
    rows = wanted()
    made = rows[:, 0] if pooling == "cls" else (rows * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    made = torch.nn.functional.normalize(made, p=2, dim=1) if normalise else made
    return made.numpy()


@cache
def params():
    return convert(oracle()[1], bert_rules(oracle()[1]), bert_spec(CFG))


ENCODE = jax.jit(encode_bert, static_argnums=3)
FEATURES = jax.jit(sentence_features, static_argnums=(3, 4, 5))


def rows(params, cfg=CFG, ids=IDS, mask=MASK, run=ENCODE):
    return np.asarray(run(params, ids, mask, cfg))


def features(pooling="mean", normalise=True, mask=MASK, run=FEATURES):
    return np.asarray(run(params(), IDS, mask, CFG, pooling, normalise))


def test_tokens_equal_those_of_transformers():
    got = rows(params())
    assert got.shape == (3, 33, 48) and got.dtype == np.float32
    assert relative(got[MASK], wanted().numpy()[MASK]) <= TOLERANCE


@pytest.mark.parametrize("pooling", bert.POOLINGS)
@pytest.mark.parametrize("normalise", (True, False))
def test_features_equal_those_of_transformers(pooling, normalise):
    got = features(pooling, normalise)
    assert got.shape == (3, 48) and got.dtype == np.float32
    assert relative(got, wanted_features(pooling, normalise)) <= TOLERANCE
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6) == normalise


def test_what_padding_holds_is_not_read():
    other = np.where(MASK, IDS, 5)
    np.testing.assert_array_equal(rows(params(), ids=other)[MASK], rows(params())[MASK])
    alone = rows(params(), ids=IDS[2:, :20], mask=MASK[2:, :20])
    assert relative(alone[0], wanted().numpy()[2, :20]) <= TOLERANCE
    np.testing.assert_array_equal(rows(params(), mask=MASK.astype(np.int32)), rows(params()))
    assert not features("mean", mask=np.zeros_like(MASK)).any()


def patched(monkeypatch, where, name, value):
    with monkeypatch.context() as patch:
        patch.setattr(where, name, value)
        return rows(params(), run=jax.jit(lambda *a: encode_bert(*a), static_argnums=3))


def tanh_gelu(monkeypatch):
    plain = jax.nn.gelu
    return patched(monkeypatch, jax.nn, "gelu", lambda x, approximate: plain(x, approximate=True))


def norm_before(monkeypatch):
    """As in most later transformers: each norm before its layer, the stream itself not normed."""

    def block(p, x, mask, cfg):
        h = bert.layer_norm(x, cfg.eps, p["norm1"])
        x = x + bert._attention(p["attn"], h, mask, cfg)
        return x + bert._feed_forward(p["mlp"], bert.layer_norm(x, cfg.eps, p["norm2"]))

    return patched(monkeypatch, bert, "_block", block)


def unscaled_scores(monkeypatch):
    plain = bert.attend
    return patched(
        monkeypatch, bert, "attend", lambda q, k, v, mask: plain(q * q.shape[-1] ** 0.5, k, v)
    )


def type_by_token(monkeypatch):
    """The second row of types, which belongs to the second text of a pair."""
    return rows(edited(params(), "type", lambda a: a[::-1]))


MUTANTS = {
    "the GELU of tanh": tanh_gelu,
    "eps of 1e-5": lambda _: rows(params(), replace(CFG, eps=1e-5)),
    "padding not masked": lambda _: rows(params(), mask=np.ones_like(MASK)),
    "token types missing": lambda _: rows(edited(params(), "type", np.zeros_like)),
    "another token type": type_by_token,
    "positions missing": lambda _: rows(edited(params(), "position", np.zeros_like)),
    "positions from 2, as RoBERTa": lambda _: rows(
        edited(params(), "position", lambda a: np.roll(a, -2, 0))
    ),
    "norms before the layers": norm_before,
    "q and k swapped": lambda _: rows(swapped(params(), "blocks/attn", "q", "k")),
    "k and v swapped": lambda _: rows(swapped(params(), "blocks/attn", "k", "v")),
    "norms swapped": lambda _: rows(swapped(params(), "blocks", "norm1", "norm2")),
    "scores not scaled": unscaled_scores,
    "other heads": lambda _: rows(params(), replace(CFG, num_heads=8)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name, monkeypatch):
    assert relative(MUTANTS[name](monkeypatch)[MASK], wanted().numpy()[MASK]) > NOTICED


def pooled(monkeypatch, change, normalise=True):
    """The features with another mean."""
    plain = bert.pool
    with monkeypatch.context() as patch:
        patch.setattr(bert, "pool", lambda x, mask, pooling: change(plain, x, mask))
        return features(normalise=normalise, run=lambda *a: sentence_features(*a))


def mean_of_everything(plain, x, mask):
    return plain(x, jnp.ones_like(mask))


def by_root_of_count(plain, x, mask):
    return plain(x, mask) * jnp.sqrt(mask.sum(1, keepdims=True).astype(jnp.float32))


POOLED = {  # and whether the features are normed
    "mean over padding": (lambda m: pooled(m, mean_of_everything), True),
    "divided by the root of the count": (lambda m: pooled(m, by_root_of_count, False), False),
    "the first token": (lambda _: features("cls"), True),
    "not normed": (lambda _: features(normalise=False), True),
    "padding not masked": (lambda _: features(mask=np.ones_like(MASK)), True),
}


@pytest.mark.parametrize("name", POOLED)
def test_mistakes_in_pooling_are_noticed(name, monkeypatch):
    run, normalise = POOLED[name]
    assert relative(run(monkeypatch), wanted_features("mean", normalise)) > NOTICED


def test_a_checkpoint_with_heads_gives_the_same_tree():
    """With the prefix and the heads of pre-training, as older files have them."""
    whole = BertForPreTraining(their_config()).state_dict()
    arrays = {f"bert.{key}": a for key, a in oracle()[1].items()}
    arrays |= {key: a.numpy() for key, a in whole.items() if not key.startswith("bert.")}
    arrays["bert.embeddings.position_ids"] = np.arange(CFG.positions)[None]
    got = convert(arrays, bert_rules(arrays), bert_spec(CFG))
    jax.tree.map(np.testing.assert_array_equal, got, params())
    plan = make_plan({k: a.shape for k, a in arrays.items()}, bert_rules(arrays), bert_spec(CFG))
    heads = {key for key in arrays if "pooler" in key or not key.startswith("bert.")}
    assert set(plan.unused) == heads | {"bert.embeddings.position_ids"} and len(heads) > 8
    shapes = jax.tree.map(lambda a: a.shape, abstract(bert_spec(CFG)))
    assert jax.tree.map(lambda a: a.shape, got) == shapes


def shapes():
    return {key: a.shape for key, a in oracle()[1].items()}


def test_sizes():
    said = their_config().to_dict()
    assert bert_config(shapes(), said) == CFG
    assert bert_config({f"bert.{k}": s for k, s in shapes().items()}, said) == CFG
    assert count(bert_spec(BertConfig())) == 22_713_216 - (384 * 384 + 384)  # but the pooler
    for wrong in (dict(num_heads=5), dict(hidden_act="relu"), dict(types=0), dict(eps=1)):
        field = "dim" if "num_heads" in wrong else next(iter(wrong))
        with pytest.raises(InputError, match=f"BertConfig.{field} is"):
            replace(CFG, **wrong)
    with pytest.raises(InputError, match="41 tokens, the encoder takes 40"):
        encode_bert({}, np.zeros((1, 41)), np.zeros((1, 41)), CFG)
    with pytest.raises(InputError, match="mask has shape"):
        encode_bert({}, np.zeros((1, 15)), np.zeros((1, 16)), CFG)
    with pytest.raises(InputError, match="pooling is 'max'; give one of mean, cls"):
        bert.pool(np.zeros((1, 2, 3)), MASK[:1, :2], "max")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "roberta"}, "model_type 'roberta', and only 'bert' is read"),
        ({"model_type": "mpnet"}, "model_type 'mpnet', and only 'bert' is read"),
        ({"model_type": "distilbert"}, "model_type 'distilbert', and only 'bert' is read"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new', and only 'gelu' is read"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder True"),
        ({"hidden_size": 64}, "hidden_size 64, the arrays say 48"),
        ({"num_hidden_layers": 4}, "num_hidden_layers 4, the arrays say 3"),
        ({"max_position_embeddings": 512}, "max_position_embeddings 512, the arrays say 40"),
        ({"vocab_size": 30522}, "vocab_size 30522, the arrays say 61"),
        ({"type_vocab_size": 2}, "type_vocab_size 2, the arrays say 3"),
        ({"intermediate_size": 192}, "intermediate_size 192, the arrays say 80"),
    ],
)
def test_another_encoder_is_refused(change, says):
    with pytest.raises(CheckpointError, match=says):
        bert_config(shapes(), their_config().to_dict() | change)


def test_without_the_heads_nothing_is_guessed():
    said = their_config().to_dict()
    del said["num_attention_heads"]
    with pytest.raises(CheckpointError, match="does not say num_attention_heads"):
        bert_config(shapes(), said)
    with pytest.raises(CheckpointError, match=r"has no encoder\.layer\.0\.intermediate"):
        few = {k: s for k, s in shapes().items() if "encoder" not in k}
        bert_config(few, their_config().to_dict())
