# SPDX-License-Identifier: Apache-2.0
"""A text encoder without the rest of its model: a machine may encode prompts that another one, with
the transformer, makes videos of.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from checkpoints_convert.foreign import Foreign
from checkpoints_convert.recognise import KINDS
from checkpoints_convert.sources import find_sources
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.streaming import open_stored
from lvjax.models.parts import check_part, kind_of, stored_part
from lvjax.models.pocket_text import PocketTextConfig
from lvjax.models.umt5 import UMT5Config
from lvjax.run.bundle import MODEL, is_own, open_parts, outline
from lvjax.run.presets import PRESETS


class TextFolder(NamedTuple):
    """What `encoders.encode_prompts` needs of a model, by the names that a `Bundle` gives it.

    negatives: the prompts that the models which it belongs to lead away from by default.
    """

    name: str
    text: UMT5Config
    parts: Mapping[str, Any]
    folder: Path
    negatives: tuple[str, ...]
    embeddings: Mapping[str, Any] = MappingProxyType({})


def open_text(path: Path) -> TextFolder:
    """The text encoder in a folder, or a file, that lvjax or its publishers wrote; nothing else of
    its model need be there.

    Raises: CheckpointError when there is none, or it is damaged; InputError for the pocket model.
    """
    words = f"{path} reads its few words itself; it needs no embeddings"
    if not path.exists():
        if str(path) == "pocket":
            raise InputError(words)
        raise CheckpointError(f"no such folder: {path}; give one with a text encoder")
    folder, negatives = path, [d.negative for d in PRESETS.values()]
    if path.is_dir():
        own = open_parts(path, others=True)
    else:
        folder, own = path.parent, {"text": open_stored(path)} if is_own(path) else {}
    if "text" in own:
        stored = own["text"]
        if (folder / MODEL).is_file() and {"dit", "vae"} <= own.keys():
            model = outline(folder)
            negatives.append(model.defaults.negative)
            if isinstance(model.text, PocketTextConfig):
                raise InputError(words)
    elif own:
        raise CheckpointError(f"{path} has no text encoder; convert one into it")
    else:
        source = find_sources(path, "text")[0][0]
        stored = Foreign(source.model, "text", source.path)
    part, cfg = stored_part(stored)
    check_part(stored, cfg)
    if part != "text":
        raise CheckpointError(f"{path} is {KINDS[kind_of(part)].title}; give a text encoder")
    title = f"UMT5 of {folder.resolve().name}"
    return TextFolder(title, cfg, {"text": stored}, folder, tuple(dict.fromkeys(negatives)))
