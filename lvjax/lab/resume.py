# SPDX-License-Identifier: Apache-2.0
"""What a work folder was begun with: training goes on in it only by the recipe that it holds.

`recipe.json` in the folder is the recipe of the newest start; as long as nothing was
made by it, any other may take its place.  Free to change are the bundle's
defaults, stages that have not begun, and of a stage the number of steps upwards, how often it logs
and saves, and its learning rate (for a run that has diverged).  A folder without the file takes the
first recipe that comes.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvjax.core.checkpoint import write_atomic
from lvjax.core.errors import CheckpointError, InputError
from lvjax.lab.recipe import KINDS, Recipe
from lvjax.run.begun import differences
from lvjax.train.checkpoints import CHECKPOINTS, is_begun
from lvjax.train.state import FREE


def claim(recipe: Recipe, folder) -> None:
    """Check that `recipe` may go on in `folder`, and keep it there.

    A stage that is done and has more steps now is opened again, unless what it gave is in use.
    Raises: InputError naming what differs; CheckpointError when the file there is damaged.
    """
    folder, now = Path(folder), json.loads(json.dumps(dataclasses.asdict(recipe)))
    path = folder / "recipe.json"
    if path.exists() and _anything(folder):
        before = _read(path)
        wrong = [*differences(_fixed(before), _fixed(now)), *_stages(before, now, folder)]
        if wrong:
            raise InputError(
                f"{folder} was begun with another recipe: {wrong[0]}; go on with the one in "
                f"{path}, or choose another folder"
            )
        for name in _longer(before, now, folder):
            (folder / name / "done").unlink()
    write_atomic(path, (json.dumps(now, indent=1) + "\n").encode())


def _anything(folder: Path) -> bool:
    """Whether anything was made in a folder: clips, or a checkpoint."""
    begun = (is_begun(path.parent) for path in folder.glob(f"*/{CHECKPOINTS}"))
    return (folder / "clips" / "ready").exists() or any(begun)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        for stage in (stage for kind in KINDS for stage in found[kind]):
            _ = Path(stage["name"]), int(stage["options"]["steps"])
        return found
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointError(
            f"{path} is not a readable recipe ({type(e).__name__}); remove it to go on with the "
            "recipe given"
        ) from e


def _fixed(recipe: dict) -> dict:
    return {k: v for k, v in recipe.items() if k not in (*KINDS, "defaults")}


def _begun(recipe: dict, kind: str, folder: Path) -> list[dict]:
    return [s for s in recipe[kind] if is_begun(folder / s["name"])]


def _stages(before: dict, now: dict, folder: Path) -> Iterator[str]:
    """What differs in the stages that have begun: they come first, in their order."""
    for kind in KINDS:
        for i, was in enumerate(_begun(before, kind, folder)):
            name, new = was["name"], now[kind][i] if i < len(now[kind]) else {"name": "nothing"}
            if new["name"] != name:
                yield f"stage {i + 1} of {kind} was {name}, is {new['name']}"
                continue
            old_steps, steps = was["options"]["steps"], new["options"]["steps"]
            if steps < old_steps:
                yield f"{name}.steps was {old_steps}, is {steps} (it may only grow)"
            yield from differences(_without_free(was), _without_free(new), name)
    for name in _longer(before, now, folder):
        if _in_use(before, name, folder):
            yield f"{name} has more steps, but is done and what it gave is in use"


def _without_free(stage: dict) -> dict:
    options = {k: v for k, v in stage["options"].items() if k not in FREE}
    return {k: v for k, v in stage.items() if k not in ("name", "options")} | options


def _longer(before: dict, now: dict, folder: Path) -> list[str]:
    """Names of the stages that are done and have more steps now."""
    steps = {s["name"]: s["options"]["steps"] for kind in KINDS for s in before[kind]}
    new = {s["name"]: s["options"]["steps"] for kind in KINDS for s in now[kind]}
    return [k for k in steps if new.get(k, 0) > steps[k] and (folder / k / "done").exists()]


def _in_use(recipe: dict, name: str, folder: Path) -> bool:
    """Whether another stage, or the latents, were made from what stage `name` gave."""
    kind = next(kind for kind in KINDS if name in [s["name"] for s in recipe[kind]])
    begun = [s["name"] for s in _begun(recipe, kind, folder)]
    return begun[-1:] != [name] or (kind == "autoencoder" and (folder / "latents.json").exists())
