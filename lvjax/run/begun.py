# SPDX-License-Identifier: Apache-2.0
"""What the folder of a run was begun with: a run goes on there only as it was begun."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from lvjax.core.checkpoint import write_atomic
from lvjax.core.errors import CheckpointError, InputError
from lvjax.run.training import Training
from lvjax.train import state
from lvjax.train.checkpoints import is_begun

FILE = "training.json"
FREE = ("mesh", "samples", "sample_seconds", "tensorboard")
"""What may change beside `state.FREE` of the options: what does not touch the steps."""


def differences(was, now, name: str = "") -> Iterator[str]:
    """ "dit.dim was 256, is 128" for every value that differs; a field that one of the two does
    not know is of another version, and passes.
    """
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [k for k in was if k in now]:
            yield from differences(was[key], now[key], f"{name}.{key}" if name else key)
    elif was != now:
        yield f"{name} was {was}, is {now}"


def claim(training: Training, folder: Path) -> None:
    """Check that a training may go on in `folder`, and keep there what it is.

    Raises: InputError naming what differs; CheckpointError when the file there is damaged.
    """
    path, now = folder / FILE, json.loads(json.dumps(dataclasses.asdict(training)))
    if path.exists() and is_begun(folder):
        try:
            before = json.loads(path.read_text())
            wrong = list(differences(_bound(before), _bound(now)))
        except (ValueError, LookupError, AttributeError, RecursionError) as e:
            raise CheckpointError(
                f"{path} is damaged ({type(e).__name__}); remove it to go on with the config given"
            ) from e
        if wrong:
            raise InputError(
                f"{folder} was begun with another config: {wrong[0]}; go on with the one in "
                f"{path}, or choose another folder"
            )
    write_atomic(path, (json.dumps(now, indent=1) + "\n").encode())


def _bound(training: dict) -> dict:
    """What may not change."""
    kept = {k: v for k, v in training.items() if k not in FREE}
    options = {k: v for k, v in kept["options"].items() if k not in state.FREE}
    return kept | {"options": options}
