# SPDX-License-Identifier: Apache-2.0
"""Prompts that were read before: their file, what it is compared with, and what is read again."""

import dataclasses
import os
import shutil

import numpy as np
import pytest

from lvjax.core.checkpoint import load_arrays, open_arrays, save_arrays
from lvjax.core.errors import CheckpointError, InputError
from lvjax.data import tokenizer
from lvjax.run import encoders
from lvjax.run.bundle import outline
from lvjax.run.encoders import load_embeddings, notices, rows_hash, save_embeddings
from lvjax.run.weights import stored_hash
from tests.tiny import tiny_bundle
from tests.wan_folder import wan_folder

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers
ROWS = {text: np.full((2 + i, 8), i, np.float32) for i, text in enumerate(("a fox", "a dog", "é"))}
LONG = " ".join(["snow"] * 600)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return wan_folder(tmp_path_factory.mktemp("wan") / "t2v", "t2v")


@pytest.fixture
def saved(tmp_path):
    save_embeddings(tmp_path / "p.safetensors", ROWS, "tiny")
    return tmp_path / "p.safetensors"


def test_a_file_brings_the_rows_back(saved):
    found = load_embeddings(saved, 8)
    assert found.keys() == ROWS.keys()
    for text, rows in found.items():
        np.testing.assert_array_equal(rows, ROWS[text])


@pytest.mark.parametrize(
    ("names", "change"),
    [
        (("000000", "000001", "other"), {}),
        (("000000", "000001"), {}),
        (None, {"prompts": "abc"}),
        (None, {"prompts": {"a": 1, "b": 2, "c": 3}}),
        (None, {"prompts": ["a", "b", 3]}),
        (None, {"prompts": None}),
        (None, {"prompts": 3}),
        (None, {"kind": "weights"}),
    ],
)
def test_a_file_that_holds_something_else(saved, names, change):
    arrays, meta = load_arrays(saved)
    arrays = dict(zip(names or arrays, arrays.values(), strict=False))
    save_arrays(saved, arrays, meta | change)
    with pytest.raises(CheckpointError, match="holds no prompt embeddings"):
        load_embeddings(saved, 8)


def test_rows_of_another_width_or_encoder_are_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"the model takes \[tokens, 9\]"):
        load_embeddings(saved, 9)
    stored = []
    for i in range(2):
        save_arrays(tmp_path / f"{i}", {"embedding": np.full(3, i, np.float32)}, {})
        stored.append(open_arrays(tmp_path / f"{i}"))
    assert stored_hash(stored[0]) != stored_hash(stored[1])
    load_embeddings(saved, 8, stored[0])  # nobody knows what made these
    save_embeddings(saved, ROWS, "tiny", stored[0])
    for same in (stored[0], None):
        load_embeddings(saved, 8, same)
    with pytest.raises(CheckpointError, match="another text encoder"):
        load_embeddings(saved, 8, stored[1])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (np.full((2, 8), np.nan, np.float32), "not finite"),
        (np.full((2, 8), np.inf, np.float32), "not finite"),
        (np.zeros((0, 8), np.float32), r"rows \[0, 8\]"),
        (np.zeros((2, 7), np.float32), r"rows \[2, 7\]"),
        (np.zeros((8,), np.float32), r"rows \[8\]"),
        (np.zeros((1, 2, 8), np.float32), r"rows \[1, 2, 8\]"),
        (np.zeros((2, 8), np.int32), "rows of int32, not float32,"),
        (np.zeros((2, 8), np.float64), "rows of float64, not float32,"),
        (np.zeros((2, 8), np.float16), "rows of float16, not float32,"),
        (np.zeros((2, 8), bool), "rows of bool, not float32,"),
    ],
    ids=str,
)
def test_rows_that_no_encoder_writes_are_refused(tmp_path, rows, says):
    save_embeddings(tmp_path / "p.safetensors", ROWS | {"a\ncow": rows}, "tiny")
    with pytest.raises(CheckpointError, match=f"{says} for the prompt 'a.ncow', the model") as e:
        load_embeddings(tmp_path / "p.safetensors", 8)
    assert "\n" not in str(e.value)


def test_a_name_that_cannot_be_is_one_of_our_errors():
    with pytest.raises(InputError, match="File name too long; give a shorter name"):
        load_embeddings("x" * 300, 8)


def test_the_hash_is_of_the_prompts_that_are_used_and_their_rows(wan):
    bundle = dataclasses.replace(outline(wan), embeddings=ROWS)
    two = ["a fox", "é"]
    own = rows_hash(bundle, two)
    assert own == rows_hash(dataclasses.replace(bundle, embeddings=ROWS | {"x": ROWS["é"]}), two)
    assert own not in (rows_hash(bundle, two[::-1]), rows_hash(bundle, two[:1]))
    other = dataclasses.replace(bundle, embeddings=ROWS | {"é": ROWS["é"] + np.float32(1e-6)})
    assert own != rows_hash(other, two)
    assert rows_hash(tiny_bundle(), two) is None


def test_what_is_embedded_needs_no_tokenizer(wan, tmp_path):
    bare = shutil.copytree(wan, tmp_path / "bare")
    shutil.rmtree(bare / "tokenizer")
    bundle = dataclasses.replace(outline(bare), embeddings={LONG: ROWS["é"]})
    assert notices(bundle, [LONG]) == []
    with pytest.raises(CheckpointError, match="no tokenizer"):
        notices(bundle, [LONG, "a fox"])
    assert "more than 512 tokens" in notices(outline(wan), [LONG, "a fox"])[0]


def test_the_tokenizer_is_read_once_unless_its_file_changes(wan, monkeypatch):
    read, original = [], tokenizer.load_tokenizer
    encoders._tokenizer.cache_clear()
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda *a: read.append(a) or original(*a))
    for _ in range(3):
        assert notices(outline(wan), ["a fox"]) == []
    assert len(read) == 1
    os.utime(wan / "tokenizer" / "tokenizer.json", ns=(1, 1))
    notices(outline(wan), ["a fox"])
    assert len(read) == 2
