# SPDX-License-Identifier: Apache-2.0
"""Texts to BERT's ids against transformers, with a few words; and files that are missing, damaged,
or of another model.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from lvjax.core.errors import CheckpointError, InputError
from lvjax.data.wordpiece import load_wordpiece, tokenize_pieces
from tests.sentence_folder import LINES, LONGEST, WORDS, their_tokenizer, vocabulary

TEXTS = (
    "",
    "   \t\n\u3000\u00a0",
    *LINES,
    "THE RED FOX Runs; ÜNÏCÖDÉ NAÏVE e\u0301 İstanbul ẞ",
    "一只fox在雪地上 over雪 \u3400\U00020000 한국어 かな",
    "x" * 101,
    "snow" * 26 + " fox",
    "unknowable-words, 12:34 … “quotes” ﬁne ½ Ｗｉｄｅ",
    "emoji 🦊❄️👩‍👩‍👧 and 𝔉𝔯𝔞𝔨𝔱𝔲𝔯",
    "control\x00 \x1b[31m \ufeff\u200b\ufffd end",
    "a [MASK] and [SEP][CLS] [mask] [PAD] [UNK] in the text",
    " ".join(["the fox runs"] * 20),
    "!" * (LONGEST - 2),
)
FORMS = ("tokenizer.json", "vocab.txt")


def written(folder, form, lower=True, **options):
    """A folder with transformers' tokenizer, that tokenizer, and its settings."""
    theirs = their_tokenizer(lower, **options)
    theirs.save_pretrained(folder)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    if form == "vocab.txt":
        (folder / "tokenizer.json").unlink()
        (folder / form).write_text("\n".join(vocabulary(lower)) + "\n", encoding="utf-8")
    return theirs, said


def compare(theirs, words, texts, length=LONGEST):
    wanted = theirs(list(texts), padding=True, truncation=True, max_length=length)
    got = tokenize_pieces(words.tokenizer, texts)
    np.testing.assert_array_equal(got.ids, wanted["input_ids"])
    np.testing.assert_array_equal(got.mask, np.array(wanted["attention_mask"], bool))
    whole = [len(ids) > length for ids in theirs(list(texts))["input_ids"]]
    assert got.cut.tolist() == whole
    return got


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("lower", "options"),
    [
        (True, {}),
        (False, {}),
        (True, {"strip_accents": False}),
        (False, {"strip_accents": True}),
        (True, {"tokenize_chinese_chars": False}),
    ],
)
def test_ids_and_mask_equal_those_of_transformers(tmp_path, form, lower, options):
    theirs, said = written(tmp_path, form, lower, **options)
    got = compare(theirs, load_wordpiece(tmp_path, said, WORDS, LONGEST), TEXTS)
    assert got.ids.dtype == np.int32 and got.mask.dtype == bool
    first, last = theirs.cls_token_id, theirs.sep_token_id
    assert (got.ids[:, 0] == first).all() and got.ids[0, :3].tolist() == [first, last, 0]
    assert got.cut.nonzero()[0].tolist() and (got.ids[got.cut, -1] == last).all()
    assert not got.cut[-1] and got.mask[-1].all()  # exactly as many as fit
    unknown = TEXTS.index("x" * 101)
    assert got.ids[unknown, :3].tolist() == [first, theirs.unk_token_id, last]


@pytest.mark.parametrize("form", FORMS)
def test_any_text_has_the_ids_of_transformers(tmp_path, form):
    theirs, said = written(tmp_path, form)
    words = load_wordpiece(tmp_path, said, WORDS, LONGEST)

    @settings(max_examples=100, deadline=None)
    @given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
    def check(text):
        compare(theirs, words, [text])

    check()


def test_the_options_matter(tmp_path):
    """Each of them changes ids, so that the comparison above would notice one that is not read."""
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary(True)), encoding="utf-8")

    def ids(**said):
        words = load_wordpiece(tmp_path, {"do_lower_case": True} | said, WORDS, 99)
        return tokenize_pieces(words.tokenizer, TEXTS[:-1]).ids.tolist(), words.sha256

    plain, changes = ids(), ({"do_lower_case": False}, {"strip_accents": False})
    for change in (*changes, {"tokenize_chinese_chars": False}):
        other = ids(**change)
        assert other[0] != plain[0] and other[1] != plain[1]
    assert ids(strip_accents=None, never_split=["fox"]) == plain


def test_lower_case_before_everything(tmp_path):
    _, said = written(tmp_path, "tokenizer.json", lower=False)
    plain = load_wordpiece(tmp_path, said, WORDS, LONGEST)
    lower = load_wordpiece(tmp_path, said, WORDS, LONGEST, lower=True)
    upper, small = (tokenize_pieces(lower.tokenizer, [t]).ids for t in ("THE Fox", "the fox"))
    np.testing.assert_array_equal(upper, small)
    assert tokenize_pieces(plain.tokenizer, ["THE Fox"]).ids.tolist() != small.tolist()


def test_what_the_file_says_of_length_is_not_followed(tmp_path):
    _, said = written(tmp_path, "tokenizer.json")
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(3, stride=1, direction="left")
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    got = tokenize_pieces(load_wordpiece(tmp_path, said, WORDS, LONGEST).tokenizer, ["the fox"])
    assert got.ids.tolist() == [their_tokenizer()("the fox")["input_ids"]]


def test_lines_end_as_on_any_system(tmp_path):
    said = {"do_lower_case": True}
    ids = []
    for end in ("\n", "\r\n"):
        (tmp_path / "vocab.txt").write_bytes(end.join(vocabulary(True)).encode())
        words = load_wordpiece(tmp_path, said, WORDS, LONGEST)
        ids.append(tokenize_pieces(words.tokenizer, TEXTS).ids.tolist())
    assert ids[0] == ids[1]


def test_what_is_no_text(tmp_path):
    _, said = written(tmp_path, "tokenizer.json")
    tokenizer = load_wordpiece(tmp_path, said, WORDS, LONGEST).tokenizer
    half, mark = (tokenize_pieces(tokenizer, [t]).ids.tolist() for t in ("a \ud83e fox", "a ? fox"))
    assert half == mark
    assert tokenize_pieces(tokenizer, []).ids.shape == (0, 0)
    for wrong in ("a fox", [b"a fox"], [None]):
        with pytest.raises(InputError, match="not a sequence of strings"):
            tokenize_pieces(tokenizer, wrong)


def in_json(change):
    def make(folder, said):
        path = folder / "tokenizer.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return make


def lines(*pieces, **said):
    def make(folder, settings):
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
        settings.clear()
        settings.update(said)

    return make


def no_frame(folder, said):
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", 3)]
    )
    tokenizer.save(path)


SMALL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "fox")
BAD = {
    "none": (lambda folder, said: (folder / "tokenizer.json").unlink(), "no tokenizer in"),
    "cut": (lambda f, _: (f / "tokenizer.json").write_text('{"model": '), "cannot be read"),
    "an object": (lambda f, _: (f / "tokenizer.json").write_text("{}"), "cannot be read"),
    "empty": (lambda f, _: (f / "tokenizer.json").write_text(""), "cannot be read"),
    "no frame": (no_frame, "puts 1 tokens around a text"),
    "no post-processor": (
        in_json(lambda v: v.update(post_processor=None)),
        "puts 0 tokens around a text",
    ),
    "no unknown": (
        in_json(lambda v: v["model"].update(unk_token="[NONE]")),
        r"has no \[NONE\]",
    ),
    "an id too many": (
        in_json(lambda v: v["model"]["vocab"].update(more=WORDS)),
        f"ids up to {WORDS}, the encoder takes those below {WORDS}",
    ),
    "two opinions": (lambda f, said: said.update(do_lower_case=False), "says lowercase True"),
    "vocab.txt alone": (lines(*SMALL), "does not tell upper from lower case"),
    "vocab.txt without [SEP]": (lines(*SMALL[:3], do_lower_case=True), r"has no \[SEP\]"),
    "empty vocab.txt": (lines(do_lower_case=True), r"has no \[UNK\]"),
    "case as a word": (lines(*SMALL, do_lower_case="yes"), "do_lower_case is 'yes'"),
    "accents as a number": (
        lines(*SMALL, do_lower_case=True, strip_accents=1),
        "strip_accents is 1; give true or false",
    ),
    "no text": (
        lambda f, said: (
            (lines(*SMALL, do_lower_case=True)(f, said))
            or (f / "vocab.txt").write_bytes(b"\xff\xfe\n")
        ),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, name):
    _, said = written(tmp_path, "tokenizer.json")
    make, says = BAD[name]
    make(tmp_path, said)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_wordpiece(tmp_path, said, WORDS, LONGEST)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
