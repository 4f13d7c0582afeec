# SPDX-License-Identifier: Apache-2.0
"""Prompts to the token ids of UMT5: cleaning, the tokenizer's file, and a batch of fixed length.

Does not own: the ids' rows (models/umt5.py), the pocket model's own words (prompts.py).
Source: Wan-Video/Wan2.1: wan/modules/tokenizers.py.
"""

import html
import json
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import ftfy
import numpy as np
from tokenizers import Tokenizer

from lvjax.core.errors import CheckpointError, InputError
from lvjax.data.sentencepiece import read_sentencepiece

PAD, EOS = 0, 1
SPECIAL = {"<pad>": PAD, "</s>": EOS}
FILES = ("tokenizer.json", "spiece.model")  # in this order: the first is what Wan itself uses
FOLDERS = ("", "tokenizer", "google/umt5-xxl")  # of diffusers' repositories, of the official ones
BYTES_MAX = 2**28


class Tokens(NamedTuple):
    """A batch of texts.

    ids: int32 [B, length].  mask: bool [B, length], true for tokens, false for padding.
    cut: bool [B], true for texts that were too long and lost their end.
    """

    ids: np.ndarray
    mask: np.ndarray
    cut: np.ndarray


def clean(text: str) -> str:
    """Text as Wan's encoder is given it: mended, unescaped twice, white space collapsed.

    Case and punctuation are kept.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    for name in FILES:
        for folder in FOLDERS:
            if (found := path / folder / name).is_file():
                return found
    raise CheckpointError(
        f"no tokenizer in {path}; give the tokenizer.json of google/umt5-xxl, its spiece.model, or "
        "a folder with one of them"
    )


@contextmanager
def _guarded(what):
    """Errors of the library inside, whatever they are, as CheckpointError.

    It has no types of its own for them, and what it panics about it also prints, which is kept from
    the user's terminal.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    except BaseException as e:
        if type(e) is not Exception and type(e).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{what} is damaged ({' '.join(str(e).split())[:200]}); download it again from "
            "google/umt5-xxl"
        ) from e
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def load_tokenizer(path, vocab: int = 256384) -> Tokenizer:
    """The tokenizer of a text encoder.

    path: a tokenizer.json, a spiece.model, or a folder that holds one, itself or in tokenizer/ or
      google/umt5-xxl/.
    vocab: the rows of the encoder's table of words; the default is UMT5-XXL's.
    Raises: CheckpointError when there is none, it is damaged, or it is of another encoder.
    """
    file = _find(Path(path))
    try:
        if (size := file.stat().st_size) > BYTES_MAX:
            raise CheckpointError(f"{file} has {size} bytes, at most {BYTES_MAX} are read")
        data = file.read_bytes()
        if file.suffix == ".model":
            data = json.dumps(read_sentencepiece(data)).encode()
        with _guarded(file):
            tokenizer = Tokenizer.from_buffer(data)
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"{file} cannot be read ({' '.join(str(e).split())}); download it again from "
            "google/umt5-xxl"
        ) from e
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if wrong := [name for name, index in SPECIAL.items() if ids.get(name) != index]:
        raise CheckpointError(
            f"{file} has {wrong[0]} as id {ids.get(wrong[0])} instead of {SPECIAL[wrong[0]]}; "
            "give the tokenizer of google/umt5-xxl"
        )
    if (last := max(ids.values())) >= vocab:
        raise CheckpointError(
            f"{file} has ids up to {last}, the text encoder takes those below {vocab}; give the "
            "tokenizer that belongs to it"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], length: int = 512) -> Tokens:
    """Texts, cleaned, as ids with the end-of-text token behind each, padded to one length.

    A text of more tokens than fit keeps its beginning and the end-of-text token; an empty one is
    that token alone.
    Raises: InputError for anything but a sequence of strings; CheckpointError when the tokenizer
      is damaged.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError("the texts are not a sequence of strings; give [text] for one text")
    if length < 1:
        raise InputError(
            f"length {length} leaves no room for the end-of-text token; give 1 or more"
        )
    ids = np.full((len(texts), length), PAD, np.int32)
    mask = np.zeros(ids.shape, bool)
    cut = np.zeros(len(texts), bool)
    for i, text in enumerate(texts):
        with _guarded("the tokenizer"):
            own = tokenizer.encode(clean(text), add_special_tokens=False).ids
        cut[i] = len(own) >= length
        own = [*own[: length - 1], EOS]
        ids[i, : len(own)] = own
        mask[i, : len(own)] = True
    return Tokens(ids, mask, cut)
