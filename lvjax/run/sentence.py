# SPDX-License-Identifier: Apache-2.0
"""Sentence-BERT: one vector per prompt, for clip selection to compare prompts by.

The encoder is one that sentence-transformers wrote, as all-MiniLM-L6-v2, read from its folder and
held in memory: it has some 20 to 100 million parameters.
Source: arXiv:1908.10084.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.sentence_folder import open_sentence_folder
from lvjax.core.params import flatten
from lvjax.models.bert import BertConfig, sentence_features

SHORT = 16  # tokens; texts are padded to this length, or twice, four times, ... as many


class SentenceEncoder(NamedTuple):
    """An encoder with its weights.

    folder: where it is, absolute.
    tokenizer: puts the first and the last token around a text and cuts it at `max_length` tokens.
    pooling, normalise: as `sentence_features` takes them.
    sha256: of the weights and of everything else that the features depend on.
    """

    folder: Path
    cfg: BertConfig
    params: dict
    tokenizer: Any
    max_length: int
    pooling: str
    normalise: bool
    sha256: str

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.folder.name

    @property
    def held_bytes(self) -> int:
        """Bytes of its weights."""
        return sum(a.nbytes for a in jax.tree.leaves(self.params))


def open_sentence_encoder(folder) -> SentenceEncoder:
    """The encoder in a folder of sentence-transformers' layout.

    Raises: CheckpointError saying what is missing, damaged, or of another architecture.
    """
    from lvjax.data.wordpiece import load_wordpiece

    folder = Path(folder)
    found = open_sentence_folder(folder)
    words = load_wordpiece(
        found.place, found.tokenizer, found.cfg.vocab, found.max_length, found.lower
    )
    settings = (found.max_length, found.pooling, found.normalise)
    params = found.params()
    return SentenceEncoder(
        folder.resolve(),
        found.cfg,
        jax.tree.map(jnp.asarray, params),
        words.tokenizer,
        *settings,
        _hash(params, (found.cfg, *settings, found.lower, words.sha256)),
    )


def _hash(params: dict, settings: tuple) -> str:
    """sha256 of arrays, their names and shapes, and settings."""
    found = hashlib.sha256(repr(settings).encode())
    for name, array in flatten(params).items():
        found.update(repr((name, array.shape)).encode())
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()


_features = jax.jit(sentence_features, static_argnums=(3, 4, 5))


def _padded(length: int, most: int) -> int:
    """The length that a text of `length` tokens is padded to: few are compiled."""
    return min(max(SHORT, 1 << (length - 1).bit_length()), most)


def features(encoder: SentenceEncoder, prompts: Sequence[str]) -> np.ndarray:
    """One vector per prompt, float32 [n, D].

    Prompts pass through one by one, each padded by its own length: a vector does not depend on what
    else is asked for, and memory does not grow with the number of prompts.
    Raises: InputError for anything but a sequence of strings.
    """
    from lvjax.data.wordpiece import tokenize_pieces

    tokens = tokenize_pieces(encoder.tokenizer, prompts)
    rows = np.zeros((len(prompts), encoder.cfg.dim), np.float32)
    for i, count in enumerate(tokens.mask.sum(1).tolist()):
        length = _padded(count, encoder.max_length)
        ids, mask = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
        ids[0, :count], mask[0, :count] = tokens.ids[i, :count], True
        settings = encoder.cfg, encoder.pooling, encoder.normalise
        rows[i] = _features(encoder.params, ids, mask, *settings)[0]
    return rows
