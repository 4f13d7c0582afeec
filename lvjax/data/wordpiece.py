# SPDX-License-Identifier: Apache-2.0
"""Texts to the token ids of BERT: the tokenizer's files, and a batch of fixed length.

Does not own: the ids' rows (models/bert.py), the tokenizer of UMT5 (tokenizer.py).
Source: arXiv:1810.04805; huggingface/transformers, models/bert/tokenization_bert.py.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from lvjax.core.errors import CheckpointError, InputError
from lvjax.data.tokenizer import BYTES_MAX, Tokens

FILES = ("tokenizer.json", "vocab.txt")  # in this order
FIRST, LAST, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"
SPECIAL = ("[PAD]", UNKNOWN, FIRST, LAST, "[MASK]")
SETTINGS = {  # in tokenizer_config.json: the normaliser's name for it, and what holds without it
    "do_lower_case": ("lowercase", True),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
    "strip_accents": ("strip_accents", None),  # as do_lower_case
}


class WordPiece(NamedTuple):
    """tokenizer: puts the first and the last token around a text and cuts it at the longest length.
    sha256: of the file that it was made of and, where they are used, the settings.
    """

    tokenizer: Tokenizer
    sha256: str


def load_wordpiece(
    folder: Path, settings: Mapping[str, Any], vocab: int, length: int, lower: bool = False
) -> WordPiece:
    """The tokenizer in a folder: its tokenizer.json, else its vocab.txt.

    settings: of tokenizer_config.json, {} without one; vocab.txt needs them.  vocab: rows of the
      encoder's table of words.  length: tokens of the longest text, the two around it counted.
    lower: put texts in lower case before everything else, whatever the files say.
    Raises: CheckpointError when there is none, it is damaged, or it is of another encoder.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"no tokenizer in {folder}; download its tokenizer.json or vocab.txt")
    try:
        if (size := path.stat().st_size) > BYTES_MAX:
            raise CheckpointError(f"{path} has {size} bytes, at most {BYTES_MAX} are read")
        data = path.read_bytes()
        whole = path.name == FILES[0]
        tokenizer = Tokenizer.from_buffer(data) if whole else _from_vocab(path, data, settings)
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise CheckpointError(f"{path} cannot be read ({reason}); download it again") from e
    if whole:
        _check_settings(path, tokenizer, settings)
    used = b"" if whole else repr([settings.get(k, v) for k, (_, v) in SETTINGS.items()]).encode()
    if lower:
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    _check_ids(path, tokenizer, vocab)
    return WordPiece(tokenizer, hashlib.sha256(data + used).hexdigest())


def _from_vocab(path: Path, data: bytes, settings: Mapping[str, Any]) -> Tokenizer:
    """BERT's tokenizer of a list of words, one a line."""
    if "do_lower_case" not in settings:
        raise CheckpointError(
            f"{path} does not tell upper from lower case; download tokenizer_config.json, which "
            "says do_lower_case, or tokenizer.json"
        )
    lines = io.StringIO(data.decode(), newline=None)
    ids = {line.rstrip("\n"): i for i, line in enumerate(lines)}
    if missing := [token for token in (UNKNOWN, FIRST, LAST) if token not in ids]:
        raise CheckpointError(f"{path} has no {missing[0]}; give the vocab.txt of a BERT encoder")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN))
    options = {name: settings.get(k, usual) for k, (name, usual) in SETTINGS.items()}
    for key, (name, usual) in SETTINGS.items():
        if not (isinstance(options[name], bool) or options[name] is usual):
            raise CheckpointError(f"{path.parent}: {key} is {options[name]!r}; give true or false")
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing((LAST, ids[LAST]), (FIRST, ids[FIRST]))
    tokenizer.add_special_tokens([token for token in SPECIAL if token in ids])
    return tokenizer


def _check_settings(path: Path, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Raises: CheckpointError when tokenizer.json and tokenizer_config.json say different things;
    which of them counts depends on who reads them.
    """
    normaliser = tokenizer.normalizer
    if not isinstance(normaliser, normalizers.BertNormalizer):
        return
    for key, (name, _) in SETTINGS.items():
        said, own = settings.get(key), getattr(normaliser, name)
        if said is not None and said != own:
            raise CheckpointError(
                f"{path} says {name} {own!r}, tokenizer_config.json beside it says {key} {said!r}; "
                "download both again"
            )


def _check_ids(path: Path, tokenizer: Tokenizer, vocab: int) -> None:
    """Raises: CheckpointError when the tokenizer cannot be that of an encoder of `vocab` words."""
    if (last := max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)) >= vocab:
        raise CheckpointError(
            f"{path} has ids up to {last}, the encoder takes those below {vocab}; give the "
            "tokenizer that belongs to it"
        )
    model = tokenizer.model
    if isinstance(model, models.WordPiece) and tokenizer.token_to_id(model.unk_token) is None:
        raise CheckpointError(f"{path} has no {model.unk_token}; download it again")
    if (around := len(tokenizer.encode("").ids)) != 2:
        raise CheckpointError(
            f"{path} puts {around} tokens around a text, not {FIRST} and {LAST}; give the "
            "tokenizer of a BERT encoder"
        )


def tokenize_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokens:
    """Texts as ids with the first and the last token around each, padded to the longest of them.

    tokenizer: of `load_wordpiece`.  A text of more tokens than fit keeps its beginning and the last
    token.  Half a surrogate pair, which is no text, is read as a question mark.
    Raises: InputError for anything but a sequence of strings.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError("the texts are not a sequence of strings; give [text] for one text")
    found = [tokenizer.encode(text.encode("utf-8", "replace").decode()) for text in texts]
    ids = np.zeros((len(texts), max((len(one.ids) for one in found), default=0)), np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, one in enumerate(found):
        ids[i, : len(one.ids)] = one.ids
        mask[i, : len(one.ids)] = True
    return Tokens(ids, mask, np.array([bool(one.overflowing) for one in found], bool))
