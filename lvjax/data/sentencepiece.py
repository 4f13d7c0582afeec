# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece file (spiece.model) as what a tokenizer.json holds, for T5's family.

Owns: the few fields of the file's protocol buffers that are needed, read here because no other
package that lvjax installs reads them.  Does not own: what is done with the result (tokenizer.py).
Source: google/sentencepiece: src/sentencepiece_model.proto.
"""

import base64
import struct
from collections.abc import Iterator

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of pieces; 1, the default, is plain text
UNIGRAM = 1
# Fields of the messages, by number.
MODEL_PIECES, MODEL_TRAINER, MODEL_NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_KIND = 1, 2, 3
TRAINER_MODEL, NORMALIZER_MAP = 3, 2


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number has more than ten bytes")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message; IndexError or ValueError when it is damaged."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}.get(wire), at)
            if size is None or at + size > len(data):
                raise ValueError("a field ends behind its message")
            value, at = data[at : at + size], at + size
        yield number, value


def _piece(data: bytes) -> tuple[str, float, int]:
    """(text, score, kind) of a piece."""
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(PIECE_SCORE, bytes(4)))
    return fields[PIECE_TEXT].decode(), score, fields.get(PIECE_KIND, 1)


def read_sentencepiece(data: bytes) -> dict:
    """The content of a tokenizer.json with the pieces and the character map of a spiece.model.

    Words are split at white space and begin with a mark each, as everywhere in T5's family; what
    the file says of spaces is not read.  Characters that no piece holds are unknown, even where the
    file has pieces for single bytes: so do the tokenizer.json files of UMT5.
    Raises: ValueError for a file that is damaged, of another kind, or without an unknown piece.
    """
    pieces, charsmap = [], ""
    try:
        for number, value in _fields(data):
            if number == MODEL_PIECES:
                pieces.append(_piece(value))
            elif number == MODEL_TRAINER and dict(_fields(value)).get(TRAINER_MODEL, 1) != UNIGRAM:
                raise ValueError("its model is not a unigram model")
            elif number == MODEL_NORMALIZER:
                own = dict(_fields(value)).get(NORMALIZER_MAP, b"")
                charsmap = base64.b64encode(own).decode()
    except (IndexError, KeyError, TypeError, AttributeError, struct.error) as e:
        raise ValueError("it is damaged or no SentencePiece model") from e
    unknown = [i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"it has {len(unknown)} unknown pieces instead of one")
    special = (UNKNOWN, CONTROL)
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    return {
        "version": "1.0",
        "added_tokens": [
            _added(i, text, kind in special)
            for i, (text, _, kind) in enumerate(pieces)
            if kind in (*special, USER_DEFINED)
        ],
        "normalizer": normalizer if charsmap else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, space],
        },
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": unknown[0],
            "vocab": [[text, score] for text, score, _ in pieces],
            "byte_fallback": False,
        },
    }


def _added(index: int, text: str, special: bool) -> dict:
    """A piece that is found in the text before anything else."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, "special": special, **plain}
