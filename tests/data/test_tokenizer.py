# SPDX-License-Identifier: Apache-2.0
"""Prompts to ids against transformers and diffusers, with a tokenizer trained here; and files that
are missing, damaged, or of another model.
"""

import json
import random
import struct
from functools import cache

import numpy as np
import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Tokenizer
from transformers.utils import sentencepiece_model_pb2_new as pb2

from lvjax.core.errors import CheckpointError, InputError
from lvjax.data.tokenizer import clean, load_tokenizer, tokenize

VOCAB = 256
TEXTS = (
    "",
    "A red fox runs over the snow, at dawn.",
    "  two\t\twords\n\n and   \u3000spaces\u00a0here \r\n",
    "a cat &amp;amp; a dog &lt;3 &quot;quoted&quot; caf&eacute; &#x4f60;",
    "一只红色的狐狸在雪地上奔跑，电影感，高清。",
    "Ünïcödé: naïve façade — “quotes”… Ｗｉｄｅ ﬁne ½ e\u0301",
    "emoji 🦊❄️👩‍👩‍👧 and 𝔉𝔯𝔞𝔨𝔱𝔲𝔯",
    "mojibake: cafÃ© doesnâ€™t",
    "control\x00 \x1b[31m \ufeff\u200b and half \ud83e of a pair",
    "the end </s> is not here <pad> <unk>",
    " ".join(f"the fox number {i} runs" for i in range(160)),
    "雪" * 700,
)


@cache
def trained() -> str:
    """A small tokenizer.json with the special tokens of UMT5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    words, rng = (
        "一只 红色 的 狐狸 在雪地上 奔跑 over snow running slowly".split(),
        random.Random(0),
    )
    lines = [" ".join(rng.choices(words, k=6)) for _ in range(99)]
    tokenizer.train_from_iterator([*map(clean, TEXTS[1:6]), *lines], trainer)
    return tokenizer.to_str()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained(), encoding="utf-8")
    return tmp_path


def test_cleaning_is_that_of_wan():
    for text in TEXTS:
        assert clean(text) == prompt_clean(text)
    assert clean(" caf&amp;eacute;\n 🦊 ") == "café 🦊"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=40))
def test_any_text_can_be_cleaned(text):
    assert clean(text) == prompt_clean(text)
    clean(text).encode()


@pytest.mark.parametrize("length", (512, 64, 1))
def test_ids_and_mask_equal_those_of_transformers(folder, length):
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>"
    )
    from tokenizers.processors import TemplateProcessing

    theirs.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    wanted = theirs(
        [prompt_clean(text) for text in TEXTS],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="np",
    )
    got = tokenize(load_tokenizer(folder, VOCAB), TEXTS, length)
    np.testing.assert_array_equal(got.ids, wanted["input_ids"])
    np.testing.assert_array_equal(got.mask, wanted["attention_mask"])
    assert got.ids.dtype == np.int32 and got.mask.dtype == bool
    if length == 512:
        assert got.cut.nonzero()[0].tolist() == [10, 11] and got.ids[0, :2].tolist() == [1, 0]
        assert got.ids[10, -1] == 1 and got.mask[10].all() and got.ids.max() < VOCAB


def test_a_text_is_cut_when_a_token_is_lost(folder):
    tokenizer = load_tokenizer(folder, VOCAB)
    whole = tokenize(tokenizer, TEXTS[1:2]).mask.sum()  # with the end-of-text token
    assert tokenize(tokenizer, TEXTS[1:2], whole).cut.tolist() == [False]
    short = tokenize(tokenizer, TEXTS[1:2], whole - 1)
    assert short.cut.tolist() == [True] and short.ids[0, -1] == 1
    np.testing.assert_array_equal(
        short.ids[0, :-1], tokenize(tokenizer, TEXTS[1:2], whole).ids[0, : whole - 2]
    )


def test_what_the_file_says_of_length_is_not_followed(folder):
    tokenizer = Tokenizer.from_str(trained())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert tokenize(load_tokenizer(folder, VOCAB), TEXTS[1:2]).mask.sum() > 9


def test_where_it_is_found(tmp_path):
    def found(path):
        return tokenize(load_tokenizer(path, VOCAB), ["a fox"]).mask.sum()

    for place in ("wan/tokenizer", "official/google/umt5-xxl", "plain"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "tokenizer.json").write_text(trained(), encoding="utf-8")
    assert found(tmp_path / "plain" / "tokenizer.json") == found(str(tmp_path / "plain")) > 1
    assert found(tmp_path / "wan") == found(tmp_path / "official") == found(tmp_path / "plain")


def charsmap(old: str, new: str) -> bytes:
    """SentencePiece's map of one character to another: a double array whose units each say their
    byte, where the next ones begin, and whether a word ends here; then the replacements.
    """
    word, units = old.encode(), np.zeros(256 * (len(old.encode()) + 2), np.uint32)
    at = 0
    for depth, label in enumerate((*word, 0)):
        base = 256 * (depth + 1)
        end = depth == len(word)
        if end:
            units[at] |= 1 << 8
        units[at] |= (at ^ base) << 10
        at = base ^ label
        units[at] = 1 << 31 if end else label
    return struct.pack("<I", units.nbytes) + units.astype("<u4").tobytes() + new.encode() + b"\0"


def spiece(maps: bytes = b"", unknown: int = 2) -> bytes:
    """A spiece.model with the pieces of the trained tokenizer."""
    model = pb2.ModelProto()
    pieces = json.loads(trained())["model"]["vocab"]
    for i, (text, score) in enumerate(pieces):
        kind = pb2.ModelProto.SentencePiece.Type.Value("NORMAL")
        kind = {0: 3, 1: 3, 2: unknown}.get(i, kind)
        model.pieces.add(piece=text, score=score, type=kind)
    model.pieces.add(piece="[fox]", score=0.0, type=4)
    model.trainer_spec.unk_id, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.precompiled_charsmap = maps
    return model.SerializeToString()


@pytest.mark.parametrize("maps", (b"", charsmap("½", "of"), charsmap("🦊", "a fox")))
def test_a_sentencepiece_model(tmp_path, maps):
    (tmp_path / "spiece.model").write_bytes(spiece(maps))
    pieces = [tuple(p) for p in json.loads(trained())["model"]["vocab"]] + [("[fox]", 0.0)]
    theirs = T5Tokenizer(
        vocab=pieces,
        extra_ids=0,
        additional_special_tokens=["[fox]"],
        _spm_precompiled_charsmap=maps or None,
    )
    texts = [*TEXTS, "a [fox] and a[fox]b"]
    wanted = theirs(
        [prompt_clean(text) for text in texts],
        padding="max_length",
        max_length=200,
        truncation=True,
        return_tensors="np",
    )
    got = tokenize(load_tokenizer(tmp_path, VOCAB + 1), texts, 200)
    np.testing.assert_array_equal(got.ids, wanted["input_ids"])
    np.testing.assert_array_equal(got.mask, wanted["attention_mask"])
    plain = tokenize(load_tokenizer(tmp_path, VOCAB + 1), ["½", "🦊"], 9).ids
    assert (2 in plain[0]) == (maps != charsmap("½", "of"))
    assert (2 in plain[1]) == (maps != charsmap("🦊", "a fox"))


def test_the_json_is_taken_before_the_model(folder):
    (folder / "spiece.model").write_bytes(b"not this")
    load_tokenizer(folder, VOCAB)
    auto = json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0})
    (folder / "tokenizer_config.json").write_text(auto)
    assert AutoTokenizer.from_pretrained(folder)("a red fox")["input_ids"] == [
        i for i in tokenize(load_tokenizer(folder, VOCAB), ["a red fox"]).ids[0].tolist() if i
    ]


def refused(path, says, vocab=VOCAB):
    with pytest.raises(CheckpointError, match=says) as e:
        load_tokenizer(path, vocab)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_files_that_cannot_be_used(tmp_path):
    file = tmp_path / "tokenizer.json"
    refused(tmp_path, "no tokenizer in")
    refused(tmp_path / "none.json", "no tokenizer in")
    for damaged in (b"", b"{}", b"\xff\xfe\0", trained().encode()[:-9], b"[" * 100_000):
        file.write_bytes(damaged)
        refused(tmp_path, "tokenizer.json cannot be read .* download it again")
    file.write_text(trained(), encoding="utf-8")
    last = len(json.loads(trained())["model"]["vocab"]) - 1
    load_tokenizer(tmp_path, last + 1)
    refused(tmp_path, f"ids up to {last}, the text encoder takes those below {last}", last)
    file.write_text(trained().replace('"</s>"', '"</e>"'), encoding="utf-8")
    refused(tmp_path, "has </s> as id None instead of 1")
    file.unlink()
    (tmp_path / "spiece.model").write_bytes(spiece(unknown=1))
    refused(tmp_path, "it has 0 unknown pieces instead of one")
    other = pb2.ModelProto()
    other.trainer_spec.model_type = 2
    (tmp_path / "spiece.model").write_bytes(other.SerializeToString())
    refused(tmp_path, "not a unigram model")


def test_a_damaged_sentencepiece_model_is_refused(tmp_path):
    file, whole, rng = tmp_path / "spiece.model", spiece(), np.random.default_rng(0)
    refusals = 0
    for i in range(60):
        data = bytearray(whole)
        if i % 2:
            data = data[: rng.integers(len(data))]
        else:
            data[rng.integers(len(data))] = rng.integers(256)
        file.write_bytes(bytes(data))
        try:
            tokenize(load_tokenizer(tmp_path, VOCAB + 1), ["a fox"], 9)
        except CheckpointError as e:
            refusals += 1
            assert "\n" not in str(e)
    assert refusals > 10


def test_texts_that_are_none(folder):
    tokenizer = load_tokenizer(folder, VOCAB)
    for wrong in ("one text", [b"bytes"], [None]):
        with pytest.raises(InputError, match="not a sequence of strings"):
            tokenize(tokenizer, wrong)
    with pytest.raises(InputError, match="length 0"):
        tokenize(tokenizer, ["a"], 0)


DAMAGED = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},  # the library panics
    "model": {"type": "Unigram", "unk_id": None, "vocab": [["<pad>", 0.0], ["</s>", 0.0]]},
}


@pytest.mark.parametrize("part", DAMAGED)
def test_what_the_library_cannot_stand_is_one_line(folder, tmp_path, capfd, part):
    text = json.loads((folder / "tokenizer.json").read_text())
    text[part] = DAMAGED[part]
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="damaged") as e:
        tokenize(load_tokenizer(tmp_path), ["a red circle\u2460"])
    assert "\n" not in str(e.value) and "download it again" in str(e.value)
    assert capfd.readouterr().err == ""
