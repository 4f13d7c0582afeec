# SPDX-License-Identifier: Apache-2.0
"""The run card: everything needed to make the same video again, as JSON inside the file and beside
it, in `<video>.json`: out.mp4 has out.mp4.json.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

import lvjax
from lvjax.core.checkpoint import write_atomic
from lvjax.core.errors import CheckpointError, InputError, shown

FAMILY = "lvjax-card/"
FORMAT = FAMILY + "1"


def make_card(
    options: dict[str, Any], *, weights: dict[str, str], inputs: dict[str, str]
) -> dict[str, Any]:
    """options: the run's settings, resolved.  weights, inputs: sha256 by name; "prompts" among the
    inputs is that of the rows which a text encoder made of them.
    """
    return {
        "format": FORMAT,
        "options": options,
        "weights": weights,
        "inputs": inputs,
        "versions": versions(),
    }


def identity(card: dict[str, Any]) -> str:
    """sha256 of a card: what tells the files of a run from those of others."""
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, Any]:
    """Of everything that decides how numbers are rounded: packages, Python and devices."""
    packages = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "numpy")} | {
        "lvjax": lvjax.__version__
    }
    where = {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
    }
    return packages | where


def model_place(model: str | None) -> str:
    """A model as a card names it: "pocket", or the absolute path of its folder.

    Raises: CheckpointError for what is no name.
    """
    if model in (None, "pocket"):
        return "pocket"
    if not isinstance(model, str) or not model or "\0" in model:
        raise CheckpointError(
            f"the model is {shown(model)}; give 'pocket' or a folder with --model"
        )
    return os.path.realpath(model)  # a link that leads to itself too


def card_path(output) -> Path:
    """Where the card of the run that writes `output` lies; of a batch, all videos share it."""
    return Path(f"{output}.json")


def check_place(output) -> None:
    """Raises: InputError when what lies at `card_path` is not a card, so that it is never lost."""
    path = card_path(output)
    if not os.path.lexists(path):
        return
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        kind = None
    if not (isinstance(kind, str) and kind.startswith(FAMILY)):
        raise InputError(
            f"{path} is in the place of the run card and is none; move it away or choose another "
            "--out"
        )


def write_card(output, card: dict[str, Any]) -> None:
    """Write the card beside `output`, in place of an older card.

    Raises: InputError when another file is there; StorageError.
    """
    check_place(output)
    text = json.dumps(card, indent=1, ensure_ascii=False)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a prompt with bytes that are no text: keep it, escaped
        data = json.dumps(card, indent=1).encode()
    write_atomic(card_path(output), data + b"\n")


def read_json(path) -> Any:
    """Raises: CheckpointError when the file is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not a readable run card ({type(e).__name__})") from e


def check_card(card: Any, source) -> dict[str, Any]:
    """Raises: CheckpointError when `card` is not a run card of this format, or lacks a part."""
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise CheckpointError(
            f"{source} holds no lvjax run card; give a video that `lvjax generate` wrote"
        )
    for part in ("options", "weights", "inputs", "versions"):
        if not isinstance(card.get(part), dict):
            found = "no" if part not in card else "an unreadable"
            raise CheckpointError(
                f"the run card of {source} has {found} {part!r}; give a video that `lvjax "
                "generate` wrote"
            )
    return card


def other_weights(card: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names of weights that are not as in a card, or not in both.

    Not compared is what one of the two has no hash of because it is not held in memory: an image
    encoder without checksums, and UMT5, whose rows are compared instead (`other_prompts`).
    """
    old, new = card["weights"], now["weights"]
    absent = {k for k in ("text", "image") if k not in old or k not in new}
    return [k for k in sorted((old.keys() | new.keys()) - absent) if old.get(k) != new.get(k)]


def other_prompts(card: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the rows of the prompts are not those of a card; cards from before there was their
    sha256 may have that of the file of embeddings.
    """
    old, new = card["inputs"], now["inputs"]
    name = "prompts" if "prompts" in old else "embeddings"
    return name in old and name in new and old[name] != new[name]


def differences(card: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not as it was when the card was written; a replay is bit-equal if nothing is."""
    out = [f"weights {k} differ" for k in other_weights(card, now)]
    out += ["the rows of the prompts differ"] if other_prompts(card, now) else []
    return out + [
        f"{k} was {v}, is {now['versions'].get(k)}"
        for k, v in card["versions"].items()
        if v != now["versions"].get(k)
    ]


def file_hash(path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
