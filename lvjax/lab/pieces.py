# SPDX-License-Identifier: Apache-2.0
"""A pocket training run as at most four files of at most 16 MB, and back.

What is kept: of a stage that is going on, its parameters, their EMA, the optimiser's moments and
counters; of every part that is not being trained, the EMA of its newest stage; of all stages, the
step and the metrics.  Rendered clips and latents are not kept: they are made again.

Exact: steps and counters always, and everything else as long as it fits in float32, so that small
runs go on bit for bit.  When it does not fit, in this order (`LEVELS`): moments are rounded to
bfloat16 (their range is float32's); weights to float16; the parameters are dropped and go on from
their EMA; the moments are dropped and start from zero.  Each applies once per piece, not per step.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.core.checkpoint import load_arrays, restore_tree, save_arrays, tree_arrays
from lvjax.core.errors import CheckpointError, InputError
from lvjax.core.params import abstract
from lvjax.train.checkpoints import Checkpoints, is_begun
from lvjax.train.loop import METRICS
from lvjax.train.state import TrainState, init_state, make_optimizer, split

MAX_FILES, MAX_BYTES = 4, 16_000_000
HEADER = 400_000  # kept free in each file for names, checksums and metrics
FORMAT = "lvjax-pocket-piece/1"
SKIPPED = ("notfinite_count", "total_notfinite")  # steps, in the state of optax.apply_if_finite
NAME = re.compile(r"pocket-(\d+)-(\d)of(\d)\.safetensors")


class Level(NamedTuple):
    """dtypes of weights and moments; which of the running stage's trees are kept."""

    weights: str
    moments: str
    kept: tuple[str, ...]


LEVELS = (
    Level("float32", "float32", ("params", "ema", "opt")),
    Level("float32", "bfloat16", ("params", "ema", "opt")),
    Level("float16", "bfloat16", ("params", "ema", "opt")),
    Level("float16", "bfloat16", ("ema", "opt")),
    Level("float16", "bfloat16", ("ema",)),
)


class Group(NamedTuple):
    """Stages that train one tree of parameters, in order, and the spec of that tree.

    Of the parameters that no stage has moved yet nothing is kept: the recipe draws them again.
    """

    name: str
    stages: tuple
    spec: dict


def _like(group: Group, stage) -> TrainState:
    """A state of a stage, of zeros."""
    trained, _ = split(abstract(group.spec), stage.frozen)
    optimizer = make_optimizer(stage.options)
    like = jax.eval_shape(lambda p: init_state(p, optimizer), trained)
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), like)


def _done(work: Path, stage) -> Path:
    return work / stage.name / "done"


def collect(work: Path, groups: Iterable[Group]) -> tuple[dict[str, np.ndarray], dict]:
    """What a run in the folder `work` needs to go on: arrays in float32, and their description.

    groups: in the order of training; a group may continue the tree of an earlier one of that name.
    """
    arrays, stages, metrics, running = {}, {}, {}, None
    for group in groups:
        for stage in group.stages:
            if not is_begun(work / stage.name):
                continue
            with Checkpoints(work / stage.name) as saved:
                found = tree_arrays(saved.restore(_like(group, stage))[0])
            done = _done(work, stage).exists()
            stages[stage.name] = {"step": int(found["step"]), "done": done}
            log = work / stage.name / METRICS
            metrics[stage.name] = log.read_text() if log.exists() else ""
            kept = found if not done else {k: v for k, v in found.items() if k.startswith("ema/")}
            arrays |= {f"{group.name}/{k}": v for k, v in kept.items()}
            running = None if done else group.name
    return arrays, {"stages": stages, "metrics": metrics, "running": running}


def _rounded(arrays: dict[str, np.ndarray], level: Level) -> dict[str, np.ndarray]:
    """The arrays as `level` keeps them; names are group/tree/path."""
    out = {}
    for name, a in arrays.items():
        tree = name.split("/")[1]
        if not np.issubdtype(a.dtype, np.floating):
            out[name] = a
        elif tree in level.kept:
            out[name] = a.astype(jnp.dtype(level.moments if tree == "opt" else level.weights))
    return out


def _bins(arrays: dict[str, np.ndarray]) -> list[list[str]] | None:
    """Names of the arrays of each file, or None when they do not fit."""
    room = [MAX_BYTES - HEADER] * MAX_FILES
    bins = [[] for _ in room]
    for name in sorted(arrays, key=lambda n: (-arrays[n].nbytes, n)):
        i = next((i for i, free in enumerate(room) if arrays[name].nbytes <= free), None)
        if i is None:
            return None
        bins[i].append(name)
        room[i] -= arrays[name].nbytes
    return [b for b in bins if b]


def _fit(arrays: dict[str, np.ndarray]):
    """The first of `LEVELS` that fits: its number, the rounded arrays, their names by file."""
    for number, level in enumerate(LEVELS):
        rounded = _rounded(arrays, level)
        bins = _bins(rounded)
        if bins is not None:
            return number, rounded, bins
    size = sum(a.nbytes for a in rounded.values()) / 1e6
    limit = f"{MAX_FILES} files of {MAX_BYTES / 1e6:.0f} MB"
    raise InputError(f"the weights take {size:.0f} MB, allowed are {limit}: use a smaller model")


def pack(out: Path, work: Path, groups: Iterable[Group], meta: dict) -> dict:
    """Leave the run of `work` in `out` as a piece and remove older pieces there.

    meta: what else to remember.  Returns the description that was stored, with "level" and "steps".
    Raises: InputError when no level fits; StorageError.
    """
    arrays, description = collect(work, groups)
    number, rounded, bins = _fit(arrays)
    if bad := [k for k, a in rounded.items() if not np.isfinite(a.astype(np.float32)).all()]:
        raise CheckpointError(f"{bad[0]} is not finite; the piece before this one stays")
    steps = sum(s["step"] for s in description["stages"].values())
    description |= {"format": FORMAT, "level": number, "steps": steps, **meta}
    out.mkdir(parents=True, exist_ok=True)
    bins = bins or [[]]
    names = [f"pocket-{steps:07d}-{i + 1}of{len(bins)}.safetensors" for i in range(len(bins))]
    for i, (name, members) in enumerate(zip(names, bins, strict=True)):
        head = description if i == 0 else {"format": FORMAT, "steps": steps}
        save_arrays(out / name, {k: rounded[k] for k in members}, head)
    for path in out.iterdir():
        if NAME.fullmatch(path.name) and path.name not in names:
            path.unlink()
    return description


def newest(folder: Path) -> list[Path]:
    """The files of the piece with the most steps anywhere under `folder`; [] when there is none."""
    pieces: dict[tuple, dict[int, Path]] = {}
    for path in sorted(folder.rglob("pocket-*.safetensors")) if folder.is_dir() else []:
        if match := NAME.fullmatch(path.name):
            steps, part, parts = map(int, match.groups())
            pieces.setdefault((steps, parts, str(path.parent)), {})[part] = path
    whole = {k: v for k, v in pieces.items() if len(v) == k[1]}
    if not whole:
        return []
    return [path for _, path in sorted(whole[max(whole)].items())]


def read(files: list[Path]) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and description of a piece.

    Raises: CheckpointError when a file is damaged or not a piece.
    """
    arrays, description = {}, None
    for path in files:
        found, meta = load_arrays(path)
        if meta.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a piece of a pocket run ({FORMAT}); remove it")
        arrays |= found
        description = description or meta
    return arrays, description


def unpack(work: Path, arrays: dict, description: dict, groups: Iterable[Group]) -> None:
    """Write a piece into `work` as the folders that training resumes from.

    Stages that a later one has overtaken get the newest EMA of their group: only the fact that
    they are done is ever read of them.
    """
    for group in groups:
        own = {k.removeprefix(f"{group.name}/"): v for k, v in arrays.items()}
        own = {k: v for k, v in own.items() if f"{group.name}/{k}" in arrays}
        for stage in group.stages:
            facts = description["stages"].get(stage.name)
            if facts is None:
                continue
            state, folder = _state(own, _like(group, stage), stage, facts), work / stage.name
            with Checkpoints(folder) as saved:
                saved.save(state, {"batch": facts["step"]})
            (folder / METRICS).write_text(description["metrics"][stage.name])
            if facts["done"]:
                _done(work, stage).touch()


def _state(own: dict, like: TrainState, stage, facts: dict) -> TrainState:
    """A whole state, its arrays in float32."""
    out = {}
    for name, a in tree_arrays(like).items():
        tree, _, rest = name.partition("/")
        if name == "step":
            out[name] = np.asarray(facts["step"], a.dtype)
        elif name == "key":
            out[name] = np.asarray(jax.random.key_data(jax.random.key(stage.options.seed)))
        elif tree == "opt" and a.ndim == 0 and (facts["done"] or name not in own):
            out[name] = np.asarray(0 if rest in SKIPPED else facts["step"], a.dtype)
        elif facts["done"] or name not in own:
            weights = own.get(f"ema/{rest}")
            out[name] = np.zeros_like(a) if tree == "opt" else weights.astype(a.dtype)
        else:
            out[name] = own[name].astype(a.dtype)
    return jax.tree.map(jnp.asarray, restore_tree(like, out))
