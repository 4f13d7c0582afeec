# SPDX-License-Identifier: Apache-2.0
"""The sentence encoder that clip selection compares prompts by, where one is given: put beside a
model, named in a run card, found again.

Does not own: the encoder (sentence.py), what it is asked (encoders.py), the choice of clips
(lvjax/memory/placement.py).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvjax.core.errors import CheckpointError, InputError, shown
from lvjax.run.bundle import Bundle
from lvjax.run.sentence import SentenceEncoder, open_sentence_encoder

AGAIN = "or start again with --overwrite"


def with_encoder(outline: Bundle, folder) -> Bundle:
    """An outline whose clips are selected by what the sentence encoder in a folder says of prompts;
    None for the model's own text encoder.

    Raises: InputError; CheckpointError as `open_sentence_encoder`.
    """
    if folder is None:
        return outline
    if not isinstance(folder, (str, Path)) or not str(folder) or "\0" in str(folder):
        raise InputError(
            f"the selection encoder is {shown(folder)}; give the folder of a sentence-transformers "
            "encoder"
        )
    return replace(outline, sentence=open_sentence_encoder(folder))


def for_card(encoder: SentenceEncoder | None) -> dict[str, Any]:
    """The encoder of a run as an option of its card."""
    own = None if encoder is None else {"path": str(encoder.folder), "sha256": encoder.sha256}
    return {"selection_encoder": own}


def of_card(options: Mapping[str, Any]) -> tuple[Path, str] | None:
    """The folder and sha256 of the encoder that the options of a card ask for; older cards ask for
    none.

    Raises: CheckpointError when they are not of this version.
    """
    entry = options.get("selection_encoder")
    if entry is None:
        return None
    found = [entry.get(k) for k in ("path", "sha256")] if isinstance(entry, dict) else [None]
    if not all(isinstance(text, str) and text and "\0" not in text for text in found):
        raise CheckpointError(
            f"the selection encoder in the run card cannot be read ({shown(entry)}); start again "
            "with the settings written out"
        )
    return Path(found[0]), found[1]


def of_run(options: Mapping[str, Any], place=None) -> SentenceEncoder | None:
    """The encoder that the options of a run card ask for, None where they ask for none.

    place: the folder where it is now, instead of the one in the card.
    Raises: CheckpointError when it is missing, damaged or has changed; InputError for a place that
      holds another one, or is given for a run without one.
    """
    wanted = of_card(options)
    if wanted is None:
        if place is not None:
            raise InputError(
                "the run was begun with no selection encoder; leave --selection-encoder out, "
                f"{AGAIN}"
            )
        return None
    path, sha256 = wanted
    try:
        found = open_sentence_encoder(path if place is None else place)
    except CheckpointError as e:
        if place is not None:
            raise
        why = "the selection encoder of the run (moved? name it with --selection-encoder)"
        raise CheckpointError(f"{why}: {e}") from e
    if found.sha256 == sha256:
        return found
    if place is not None:
        raise InputError(
            f"{place} is not the selection encoder that the run was begun with; give that one, "
            f"wherever it is now, {AGAIN}"
        )
    raise CheckpointError(
        f"{path} is not the selection encoder that the run was begun with; restore it, or say with "
        "--selection-encoder where that one is now"
    )


def check_given(options: Mapping[str, Any], place) -> None:
    """Raises: InputError when no encoder stands beside all other settings of a run that has one."""
    wanted = of_card(options)
    if wanted is not None and place is None:
        raise InputError(
            f"the run was begun with --selection-encoder {wanted[0]}; give the same, or --resume "
            f"and --out alone, {AGAIN}"
        )
