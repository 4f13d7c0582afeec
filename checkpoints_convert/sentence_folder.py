# SPDX-License-Identifier: Apache-2.0
"""A sentence encoder as sentence-transformers keeps it: a folder with modules.json, a BERT encoder,
its tokenizer's settings, and how the tokens of a text become one vector.

Owns: which files there are and what their settings mean.  Does not own: names of arrays
(keys_bert.py), the tokenizer itself (lvjax/data/wordpiece.py).
Source: huggingface/sentence-transformers, sentence_transformers/base/modules/transformer.py and
sentence_transformers/sentence_transformer/modules/pooling.py.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints_convert.files import JSON_MAX, opened, read_json, shown, size_of, take
from checkpoints_convert.keys_bert import bert_config, bert_rules
from checkpoints_convert.read import Tensors, check_shard, open_tensors
from checkpoints_convert.rules import make_plan
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.params import unflatten
from lvjax.models.bert import POOLINGS, BertConfig, bert_spec

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
WEIGHTS += ("pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = {"float32", "float16", "bfloat16"}
ORDER = ["Transformer", "Pooling", "Normalize"]  # of modules
SHORTEST = 3  # tokens: the first, the last, and one between them
_FLAG = "pooling_mode_"  # begins the names of files from before "pooling_mode" was one name
_FLAGS = {"cls_token": "cls", "mean_tokens": "mean"}


class SentenceFolder(NamedTuple):
    """What the files of a sentence encoder say.

    place: the folder with the encoder and its tokenizer.  tokenizer: its tokenizer_config.json, {}
      without one.  max_length: tokens of the longest text that is read whole, the first and the
      last token among them.  lower: whether texts are put in lower case before everything else.
    pooling, normalise: as `lvjax.models.bert.sentence_features` takes them.
    """

    place: Path
    cfg: BertConfig
    tensors: Tensors
    tokenizer: Mapping[str, Any]
    max_length: int
    lower: bool
    pooling: str
    normalise: bool

    def params(self) -> dict:
        """The parameters, NumPy arrays of float32.

        Raises: CheckpointError for arrays that are missing, misshapen, quantised or not finite.
        """
        rules, spec = bert_rules(self.tensors), bert_spec(self.cfg)
        plan = _of(self.place, make_plan, self.tensors.shapes(), rules, spec)
        arrays = {}
        for place in plan.places:
            types = {str(self.tensors.dtype(name)) for name in place.sources}
            if len(types) > 1 or not types <= FLOATS:
                raise CheckpointError(
                    f"{self.place}: {place.path} is in {', '.join(sorted(types))}; give weights "
                    "that are all in float32, float16 or bfloat16"
                )
            arrays[place.path] = place.array(self.tensors).astype(np.float32)
        return unflatten(arrays)


def open_sentence_folder(folder: Path) -> SentenceFolder:
    """The settings of the encoder in a folder, and where its arrays are; none of them is read.

    Raises: CheckpointError saying what is missing, damaged, or of another architecture.
    """
    paths = _modules(folder)
    place = folder / paths["Transformer"]
    config = read_json(place / "config.json")
    tensors = _open_weights(place)
    cfg = _of(place, bert_config, tensors.shapes(), config)
    said = _optional(place / "sentence_bert_config.json")
    tokenizer = _optional(place / "tokenizer_config.json")
    _check_prompts(folder / "config_sentence_transformers.json")
    return SentenceFolder(
        place,
        cfg,
        tensors,
        tokenizer,
        _max_length(place, said, tokenizer, cfg),
        said.get("do_lower_case") is True,
        _pooling(folder / paths["Pooling"] / "config.json", cfg),
        "Normalize" in paths,
    )


def _of(place: Path, f: Callable, *args):
    """f(*args), the folder named in what it raises, as a CheckpointError."""
    try:
        return f(*args)
    except (CheckpointError, InputError) as e:
        raise CheckpointError(f"{place}: {e}") from e


def _optional(path: Path) -> dict:
    return read_json(path) if os.path.lexists(path) else {}


def _modules(folder: Path) -> dict[str, str]:
    """The folder of each module, "" for the encoder's own, by the module's name."""
    path = folder / "modules.json"
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{folder} has no modules.json; give the folder of a sentence-transformers encoder, as "
            "all-MiniLM-L6-v2, with all its files"
        )
    with opened(path) as f:
        text = take(f, path, 0, min(size_of(f), JSON_MAX))
    try:
        found = [(module["type"].split("."), module["path"]) for module in json.loads(text)]
        for _, place in found:
            if place != "":
                check_shard(path, place)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{path} is no list of modules; download it again") from e
    names = [kind[-1] for kind, _ in found]
    own = all(kind[0] == "sentence_transformers" for kind, _ in found)
    if not own or names not in (ORDER[:2], ORDER):
        raise CheckpointError(
            f"{path} has the modules {shown(', '.join(names))}; only {', '.join(ORDER[:2])} and, "
            f"behind them or not, {ORDER[2]} of sentence_transformers are read"
        )
    return dict(zip(names, (place for _, place in found), strict=True))


def _open_weights(place: Path) -> Tensors:
    for name in WEIGHTS:
        if os.path.lexists(place / name):
            return open_tensors(place / name)
    raise CheckpointError(f"{place} has no {WEIGHTS[0]} and no {WEIGHTS[2]}; download one of them")


def _check_prompts(path: Path) -> None:
    """Raises: CheckpointError where every text is to begin with words that are not its own."""
    if (name := _optional(path).get("default_prompt_name")) is not None:
        raise CheckpointError(
            f"{path} puts the prompt {shown(str(name))} before every text, which is not done here; "
            "give an encoder without one"
        )


def _max_length(place: Path, said: Mapping, tokenizer: Mapping, cfg: BertConfig) -> int:
    """Tokens of the longest text: as the encoder's settings say, else the tokenizer's, which may
    name any large number for "as many as there are positions".
    """
    length = said.get("max_seq_length")
    if length is None:
        length = tokenizer.get("model_max_length", cfg.positions)
        length = min(length, cfg.positions) if isinstance(length, int | float) else length
    if type(length) is not int or not SHORTEST <= length <= cfg.positions:
        raise CheckpointError(
            f"{place}: the longest text has {shown(str(length))} tokens; the encoder takes "
            f"{SHORTEST} to {cfg.positions}: download sentence_bert_config.json again"
        )
    return length


def _pooling(path: Path, cfg: BertConfig) -> str:
    """How the encoder's tokens become one vector."""
    config = read_json(path)
    modes = config.get("pooling_mode")
    if modes is None:
        flags = [k.removeprefix(_FLAG) for k, on in config.items() if k.startswith(_FLAG) and on]
        modes = [_FLAGS.get(flag, flag) for flag in flags]
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        title = ", ".join(map(str, modes)) or "nothing"
        raise CheckpointError(
            f"{path} pools by {shown(title)}; only {' or '.join(POOLINGS)} alone is read"
        )
    for name in ("word_embedding_dimension", "embedding_dimension"):
        if (width := config.get(name, cfg.dim)) != cfg.dim:
            raise CheckpointError(
                f"{path} pools rows of {shown(str(width))} numbers, the encoder gives {cfg.dim}; "
                "download both again"
            )
    return modes[0]
