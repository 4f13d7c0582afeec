# SPDX-License-Identifier: Apache-2.0
"""A folder of sentence-transformers' layout, written by transformers, gives the features that
transformers gives; whatever is missing, damaged or of another architecture is refused.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lvjax.core.errors import CheckpointError, InputError
from lvjax.models.bert import BertConfig
from lvjax.run import sentence
from lvjax.run.sentence import features, open_sentence_encoder
from tests.sentence_folder import (
    LINES,
    LONGEST,
    MODULES,
    POOLING,
    edit,
    sentence_folder,
    their_model,
    their_tokenizer,
    write_json,
)
from tests.tiny import relative

TOLERANCE = 5e-6
PROMPTS = ["", *LINES, "FOX", "the fox runs " * 9]
FLAGS = {"pooling_mode_mean_tokens": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return sentence_folder(tmp_path_factory.mktemp("encoder") / "tiny-minilm")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.fixture(scope="module")
def wanted():
    """Features of `PROMPTS` as sentence-transformers makes them."""
    tokens = their_tokenizer()(
        PROMPTS, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
    )
    with torch.no_grad():
        rows = their_model()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None].float()
    return {"mean": ((rows * mask).sum(1) / mask.sum(1)).numpy(), "cls": rows[:, 0].numpy()}


def normed(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("weights", ("safetensors", "bin"))
@pytest.mark.parametrize("words", ("tokenizer.json", "vocab.txt"))
def test_a_folder_of_transformers_gives_its_features(tmp_path, wanted, words, weights):
    encoder = open_sentence_encoder(sentence_folder(tmp_path / "own", words, weights))
    got = features(encoder, PROMPTS)
    assert got.shape == (len(PROMPTS), 32) and got.dtype == np.float32
    assert relative(got, normed(wanted["mean"])) <= TOLERANCE
    assert encoder.cfg == BertConfig(120, 32, 2, 4, 48, 40)
    assert (encoder.name, encoder.pooling, encoder.normalise) == ("own", "mean", True)
    assert encoder.max_length == LONGEST and len(encoder.sha256) == 64


def test_a_vector_does_not_depend_on_the_others(whole):
    encoder = open_sentence_encoder(str(whole))
    together = features(encoder, PROMPTS)
    for prompt, row in zip(PROMPTS[::3], together[::3], strict=True):
        np.testing.assert_array_equal(features(encoder, (prompt,))[0], row)
    assert features(encoder, []).shape == (0, 32)
    with pytest.raises(InputError, match="not a sequence of strings"):
        features(encoder, "a fox")


def test_few_lengths_are_compiled(whole):
    encoder = open_sentence_encoder(whole)
    sentence._features.clear_cache()
    features(encoder, ["fox " * n for n in range(40)])
    assert sentence._features._cache_size() == 2
    assert [sentence._padded(n, 24) for n in (2, 16, 17, 24)] == [16, 16, 24, 24]
    assert [sentence._padded(n, 512) for n in (17, 32, 33, 257)] == [32, 32, 64, 512]
    assert sentence._padded(2, 8) == 8


def test_pooling_and_normalisation_are_read(folder, wanted):
    write_json(folder / "modules.json", MODULES[:2])
    encoder = open_sentence_encoder(folder)
    assert not encoder.normalise
    assert relative(features(encoder, PROMPTS), wanted["mean"]) <= TOLERANCE
    write_json(
        folder / "1_Pooling" / "config.json", POOLING | FLAGS | {"pooling_mode_cls_token": 1}
    )
    assert relative(features(open_sentence_encoder(folder), PROMPTS), wanted["cls"]) <= TOLERANCE
    for named in ("cls", ["cls"]):  # as the library writes it since 5.4
        config = {"embedding_dimension": 32, "pooling_mode": named, "include_prompt": True}
        write_json(folder / "1_Pooling" / "config.json", config)
        assert open_sentence_encoder(folder).pooling == "cls"


def test_an_encoder_in_a_folder_below(folder, wanted):
    below = folder / "0_Transformer"
    below.mkdir()
    for path in [p for p in folder.iterdir() if p.is_file() and p.name != "modules.json"]:
        path.rename(below / path.name)
    write_json(folder / "modules.json", [MODULES[0] | {"path": "0_Transformer"}, *MODULES[1:]])
    got = features(open_sentence_encoder(folder), PROMPTS)
    assert relative(got, normed(wanted["mean"])) <= TOLERANCE


def test_the_longest_text(folder):
    path = folder / "sentence_bert_config.json"

    def longest():
        return open_sentence_encoder(folder).max_length

    assert longest() == LONGEST
    edit(path, max_seq_length=None)  # as where it is null: the tokenizer's, the positions at most
    assert longest() == 40
    path.unlink()
    edit(folder / "tokenizer_config.json", model_max_length=17)
    assert longest() == 17
    edit(folder / "tokenizer_config.json", model_max_length=1e30)
    assert longest() == 40


def test_half_precision_is_widened(folder, wanted):
    path = folder / "model.safetensors"
    save_file({k: a.half() for k, a in load_file(path).items()}, path)
    encoder = open_sentence_encoder(folder)
    assert encoder.params["embedding"].dtype == np.float32
    assert 1e-6 < relative(features(encoder, PROMPTS), normed(wanted["mean"])) < 1e-2


def test_the_hash_is_of_everything_that_matters(whole, folder):
    first = open_sentence_encoder(whole).sha256
    (folder / "README.md").write_text("as the other")
    assert open_sentence_encoder(folder).sha256 == first
    found = {first}
    edit(folder / "sentence_bert_config.json", max_seq_length=LONGEST - 1)
    found.add(open_sentence_encoder(folder).sha256)
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    found.add(open_sentence_encoder(folder).sha256)
    write_json(folder / "modules.json", MODULES[:2])
    found.add(open_sentence_encoder(folder).sha256)
    edit(folder / "config.json", layer_norm_eps=1e-6)
    found.add(open_sentence_encoder(folder).sha256)
    arrays = load_file(folder / "model.safetensors")
    arrays["embeddings.LayerNorm.bias"][3] += 1e-3
    save_file(arrays, folder / "model.safetensors")
    found.add(open_sentence_encoder(folder).sha256)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace('"!"', '"&"'), encoding="utf-8")
    found.add(open_sentence_encoder(folder).sha256)
    assert len(found) == 7


# ---- bad folders -------------------------------------------------------------------


def gone(name):
    return lambda folder: (folder / name).unlink()


def text(name, value):
    return lambda folder: (folder / name).write_text(value)


def modules(value):
    return lambda folder: write_json(folder / "modules.json", value)


def pooling(**changes):
    return lambda folder: edit(folder / "1_Pooling" / "config.json", **changes)


def said(name, **changes):
    return lambda folder: edit(folder / name, **changes)


def arrays(change):
    def make(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return make


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def architecture(name):
    return said("config.json", model_type=name), f"model_type '{name}', and only 'bert' is read"


DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
OWN = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "mine.Pooling"}
QUERY = "encoder.layer.1.attention.self.query.weight"
SETTINGS = "sentence_bert_config.json"
BAD = {
    "nothing": (lambda folder: shutil.rmtree(folder), "has no modules.json"),
    "no modules.json": (gone("modules.json"), "has no modules.json"),
    "modules.json cut": (text("modules.json", '[{"idx": 0'), "is no list of modules"),
    "modules.json of numbers": (modules([1, 2]), "is no list of modules"),
    "modules.json an object": (modules({"type": "x", "path": ""}), "is no list of modules"),
    "a module without a path": (modules([{"type": "x"}]), "is no list of modules"),
    "a path that is a number": (modules([MODULES[0] | {"path": 3}]), "is no list of modules"),
    "a path that leads out": (
        modules([MODULES[0] | {"path": "../other"}]),
        "which is not in its folder",
    ),
    "no pooling": (modules(MODULES[:1]), "has the modules 'Transformer'"),
    "a dense layer": (modules([*MODULES[:2], DENSE]), "'Transformer, Pooling, Dense'; only"),
    "a module of its own": (modules([MODULES[0], OWN]), "of sentence_transformers are read"),
    "no config.json": (gone("config.json"), "cannot read"),
    "config.json cut": (text("config.json", '{"model_type": "bert"'), "is damaged"),
    "roberta": architecture("roberta"),
    "mpnet": architecture("mpnet"),
    "distilbert": architecture("distilbert"),
    "xlm-roberta": architecture("xlm-roberta"),
    "no architecture": (said("config.json", model_type=None), "model_type None"),
    "another GELU": (said("config.json", hidden_act="gelu_new"), "hidden_act 'gelu_new'"),
    "other heads": (said("config.json", num_attention_heads=5), "a multiple of num_heads, 5"),
    "heads as a word": (said("config.json", num_attention_heads="4"), "num_heads is '4'"),
    "no epsilon": (said("config.json", layer_norm_eps="small"), "eps is 'small'"),
    "more layers said": (said("config.json", num_hidden_layers=3), "num_hidden_layers 3"),
    "no weights": (gone("model.safetensors"), "no model.safetensors and no pytorch_model.bin"),
    "weights cut": (cut, "model.safetensors"),
    "a bare pickle": (pickled, "bare pickle"),
    "an array missing": (arrays(lambda a: a.pop(QUERY)), "num_hidden_layers 2, the arrays say 1"),
    "a bias missing": (
        arrays(lambda a: a.pop(QUERY.replace("weight", "bias"))),
        r"blocks/attn/q/bias of 1 layers, not 2",
    ),
    "an array too many": (
        arrays(lambda a: a.update({"lm_head.weight": torch.zeros(2)})),
        "1 arrays have no place in this model: lm_head.weight",
    ),
    "another shape": (
        arrays(lambda a: a.update({QUERY: torch.zeros(32, 31)})),
        "1 arrays have other shapes",
    ),
    "not finite": (
        arrays(lambda a: a.update({QUERY: torch.full((32, 32), torch.nan)})),
        "is not finite",
    ),
    "quantised": (
        arrays(lambda a: a.update({QUERY: torch.zeros(32, 32, dtype=torch.int8)})),
        "blocks/attn/q/kernel is in float32, int8",
    ),
    "mixed": (
        arrays(lambda a: a.update({QUERY: a[QUERY].half()})),
        "blocks/attn/q/kernel is in float16, float32",
    ),
    "no tokenizer": (gone("tokenizer.json"), "no tokenizer in"),
    "no pooling config": (gone("1_Pooling/config.json"), "cannot read"),
    "max pooling": (pooling(**FLAGS, pooling_mode_max_tokens=True), "pools by 'max_tokens'"),
    "two poolings": (pooling(pooling_mode_cls_token=True), "pools by 'cls, mean'"),
    "pooling nothing": (pooling(**FLAGS), "pools by 'nothing'"),
    "a new pooling": (pooling(pooling_mode="lasttoken"), "pools by 'lasttoken'"),
    "two new poolings": (pooling(pooling_mode=["cls", "mean"]), "pools by 'cls, mean'"),
    "pooling of numbers": (pooling(pooling_mode=[[]]), r"pools by '\[\]'"),
    "another width": (pooling(word_embedding_dimension=384), "rows of '384' numbers"),
    "longer than positions": (said(SETTINGS, max_seq_length=41), "has '41' tokens"),
    "too short": (said(SETTINGS, max_seq_length=2), "has '2' tokens; the encoder takes 3 to 40"),
    "a length in words": (said(SETTINGS, max_seq_length="long"), "has 'long' tokens"),
    "true as a length": (said(SETTINGS, max_seq_length=True), "has 'True' tokens"),
    "settings cut": (text(SETTINGS, "{"), "is damaged"),
    "a prompt before every text": (
        text("config_sentence_transformers.json", '{"default_prompt_name": "query"}'),
        "puts the prompt 'query' before every text",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_one_line(folder, name):
    make, says = BAD[name]
    make(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_sentence_encoder(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and len(message) < 500


def test_no_default_prompt_is_no_reason_to_refuse(folder):
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"query": ""}, "default_prompt_name": None}))
    open_sentence_encoder(folder)
