# SPDX-License-Identifier: Apache-2.0
"""A small sentence encoder as sentence-transformers keeps it, written by transformers itself, with
the words of a few lines.
"""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, BertTokenizerFast

from tests.redrawn import redrawn

WORDS = 120
LONGEST = 24  # tokens, of max_seq_length
POSITIONS = 40
LINES = (
    "A red fox runs over the snow at dawn.",
    "the fox sleeps; two dogs bark (loudly) in the night!",
    "Ünïcödé naïve façade café, El Niño — Ångström",
    "一只红色的狐狸在雪地上奔跑",
    "running runner runs ran unrunnable over the snowy snow",
)
NAME = "sentence_transformers.models."
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": f"{NAME}Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{NAME}Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{NAME}Normalize"},
]
POOLING = {
    "word_embedding_dimension": 32,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
}
CONFIG = BertConfig(
    vocab_size=WORDS,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=POSITIONS,
)


@cache
def vocabulary(lower: bool) -> tuple[str, ...]:
    """The pieces of `LINES`, by id: all characters, at the start and further on, then the
    beginnings and the ends of words.  (A tokenizer's own training differs from process to process.)
    """
    normalize = normalizers.BertNormalizer(lowercase=lower).normalize_str
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    words = [word for line in LINES for word, _ in split(normalize(line))]
    starts = sorted({word[0] for word in words})
    further = sorted({"##" + char for word in words for char in word[1:]})
    longer = [
        piece
        for word in words
        for n in range(3, len(word) + 1)
        for piece in (word[:n], "##" + word[-n + 1 :])
    ]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return tuple(dict.fromkeys([*special, *starts, *further, *longer]))[:WORDS]


def write_json(path: Path, value) -> None:
    """Write a JSON file, and its folder where there is none."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def edit(path: Path, **changes) -> None:
    """Change a JSON object in a file; None removes a name."""
    value = json.loads(path.read_text()) | changes
    write_json(path, {k: v for k, v in value.items() if v is not None})


def their_tokenizer(lower: bool = True, **settings) -> BertTokenizerFast:
    """transformers' own tokenizer of these words."""
    vocab = {piece: i for i, piece in enumerate(vocabulary(lower))}
    return BertTokenizerFast(vocab=vocab, do_lower_case=lower, model_max_length=99, **settings)


def their_model() -> BertModel:
    """transformers' model, every parameter drawn at random."""
    special = {
        "LayerNorm.weight": lambda noise, _: 1 + 0.3 * noise,
        "": lambda noise, _: 0.3 * noise,
    }
    return redrawn(BertModel(CONFIG), special, seed=1)


def sentence_folder(folder: Path, words: str = "tokenizer.json", weights: str = "safetensors"):
    """Write the folder of an encoder; returns it.

    words: "tokenizer.json" or "vocab.txt".  weights: "safetensors" or "bin".
    """
    their_model().save_pretrained(folder)
    if weights == "bin":
        arrays = load_file(folder / "model.safetensors")
        arrays["embeddings.position_ids"] = torch.arange(POSITIONS)[None]
        torch.save(arrays, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    their_tokenizer().save_pretrained(folder)
    if words == "vocab.txt":
        (folder / "tokenizer.json").unlink()
        (folder / words).write_text("\n".join(vocabulary(True)) + "\n", encoding="utf-8")
    write_json(folder / "modules.json", MODULES)
    write_json(folder / "1_Pooling" / "config.json", POOLING)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": LONGEST, "do_lower_case": False}
    )
    return folder
