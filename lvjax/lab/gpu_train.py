# SPDX-License-Identifier: Apache-2.0
"""`make gpu-train`: pocket training in pieces on a machine that keeps nothing.

    python -m lvjax.lab.gpu_train --minutes 9 --state DIR --out DIR [--bundle DIR] [--tiny]

Goes on from the newest piece under --state (from nothing when there is none), renders the clips
again in a work folder, trains until the time is up, and leaves in --out at most four files of at
most 16 MB, which are the next --state (pieces.py says what is exact in them and what is rounded).
On an accelerator batches are `GPU_BATCH` times larger and spread over all devices.  A step of one
batch size can be followed by one of another; the curve is then no longer that of a single machine.
Needs jax, flax, optax, einops, numpy, safetensors, and Pillow for the photographs.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import jax

from lvjax.core.checkpoint import write_atomic
from lvjax.core.compat import enable_compilation_cache
from lvjax.core.errors import CheckpointError, InputError, LvjaxError
from lvjax.data.clips import CLIP_FRAMES, ClipStore, render
from lvjax.data.prompts import VOCABULARY
from lvjax.lab import pieces
from lvjax.lab.pocket import Run, assemble, train
from lvjax.lab.recipe import KINDS, Recipe, Stage
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import dit_spec
from lvjax.models.pocket_text import PocketTextConfig, text_spec
from lvjax.models.vae import vae_spec
from lvjax.run.defaults import Defaults
from lvjax.run.weights import save
from lvjax.train.state import TrainOptions

GPU_BATCH = 8
RESERVE = 15.0  # seconds kept for writing the piece
FEW = 100  # videos that one process renders sooner than several have started
LATENTS = "latents.json"  # statistics of the latents, which a bundle needs

_QUICK = TrainOptions(2, 1e-3, 1, 0.5, log_every=1)
TINY = Recipe(
    dit=DiTConfig(
        32, 1, 2, 32, 4, 4, 8, (1, 1, 1), text_dim=16, text_len=16, freq_dim=32, dtype="float32"
    ),
    vae=VAEConfig(4, 4, (1, 1), 1, (True,), 8, (0.0,) * 4, (1.0,) * 4),
    text=PocketTextConfig(len(VOCABULARY) + 1, dim=16, num_heads=1),
    defaults=Defaults(steps=2),
    videos=2,
    clips=2,
    autoencoder=(Stage("vae_image", 2, 1, _QUICK),),
    decoder=(Stage("vae_decoder", 2, 1, _QUICK, ("encoder", "quant")),),
    extension=(Stage("dit_memory", 2, 5, _QUICK, memory=1),),
)
"""A stage of every kind, two steps each, at sizes that a CPU compiles and does in seconds."""


def scaled(recipe: Recipe, factor: int) -> Recipe:
    """The recipe with batches `factor` times larger."""
    larger = {
        kind: tuple(
            dataclasses.replace(stage, batch=stage.batch * factor)
            for stage in getattr(recipe, kind)
        )
        for kind in KINDS
    }
    return dataclasses.replace(recipe, **larger)


def groups(recipe: Recipe) -> tuple[pieces.Group, ...]:
    """The stages in the order of training, by the parameters that they train."""
    vae, both = vae_spec(recipe.vae), {"dit": dit_spec(recipe.dit), "text": text_spec(recipe.text)}
    return (
        pieces.Group("vae", recipe.autoencoder, vae),
        pieces.Group("dit", recipe.extension, both),
        pieces.Group("vae", recipe.decoder, vae),
    )


def models(recipe: Recipe) -> dict:
    """What a piece must agree on with the recipe that goes on from it."""
    return json.loads(json.dumps([dataclasses.asdict(c) for c in (recipe.dit, recipe.vae)]))


def fill(store: ClipStore, workers: int, left: Callable[[], float] = lambda: math.inf) -> bool:
    """`ClipStore.fill`, by several processes when much is missing."""
    missing = range(store.ready, store.videos)
    if workers < 2 or len(missing) < FEW:
        return store.fill(left)
    job = (str(store.folder), store.videos, store.clips, store.kwargs)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for v in pool.imap(_render, [(job, v) for v in missing], chunksize=8):
            write_atomic(store.folder / "ready", str(v + 1).encode())
            if left() <= 0:
                break
    return store.ready == store.videos


def _render(task) -> int:
    (folder, videos, clips, kwargs), v = task
    store = ClipStore(folder, videos, clips, **kwargs)
    store.put(v, render(v, clips, **kwargs))
    return v


def piece(recipe: Recipe, state: Path, out: Path, work: Path, end: float) -> dict:
    """Train from the newest piece under `state` until time.monotonic() is `end`; what was left.

    Raises: CheckpointError when the piece is damaged or of another recipe, and what `train` raises.
    """
    own, files = groups(recipe), pieces.newest(state)
    before = restore(recipe, files, work) if files else {"complete": False, "steps": 0}
    say(f"goes on from step {before['steps']} ({files[0].parent})" if files else "starts anew")
    complete = before["complete"]
    stats = before.get("latents")
    if not complete:
        batches = [s.batch for g in own for s in g.stages]
        devices = math.gcd(jax.device_count(), *batches)
        store = ClipStore(work / "clips", recipe.videos, recipe.clips, seed=recipe.seed)
        run = Run(work, max(0.0, end - RESERVE - time.monotonic()), devices, report)
        if not fill(store, min(16, os.cpu_count() or 1), run.left):
            raise InputError(
                f"--minutes are too few to render {store.videos} videos, {store.ready} are there; "
                "give more, or keep them with --work"
            )
        say(f"{store.videos * store.clips} clips of {CLIP_FRAMES} frames are there")
        complete = train(recipe, run) is not None
        stats = json.loads((work / LATENTS).read_text()) if (work / LATENTS).exists() else stats
    meta = {"complete": complete, "latents": stats, "models": models(recipe)}
    return pieces.pack(out, work, own, meta)


def restore(recipe: Recipe, files: list[Path], work: Path) -> dict:
    """Unpack a piece into `work`; returns its description."""
    arrays, description = pieces.read(files)
    if description["models"] != models(recipe):
        where = files[0].parent
        raise CheckpointError(f"the piece in {where} is of other models; give another --state")
    pieces.unpack(work, arrays, description, groups(recipe))
    return description


def write_bundle(recipe: Recipe, state: Path, folder: Path) -> None:
    """The model of the newest piece under `state`, finished or not, as a folder that loads.

    Raises: CheckpointError when a part has not been trained yet.
    """
    with tempfile.TemporaryDirectory(prefix="lvjax-") as work:
        description = restore(recipe, pieces.newest(state), Path(work))
        if description["latents"] is None:
            raise CheckpointError(f"the run in {state} has no latents yet; train more of it first")
        write_atomic(Path(work) / LATENTS, json.dumps(description["latents"]).encode())
        save(folder, assemble(recipe, work))


def report(stage: str, line: dict) -> None:
    say(f"{stage}: " + " ".join(f"{k} {v:.4g}" for k, v in line.items()))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(argv: list[str] | None):
    parser = argparse.ArgumentParser(
        prog="lvjax.lab.gpu_train", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="length of this piece (default: 9)")
    add("--state", type=Path, required=True, help="folder with earlier pieces, at any depth")
    add("--out", type=Path, required=True, help="folder for the new piece; may be --state")
    add(
        "--work",
        type=Path,
        help="keep clips and checkpoints here (default: a folder removed after)",
    )
    add("--bundle", type=Path, help="write the model so far as a folder for lvjax.load")
    add("--tiny", action="store_true", help="two steps of each kind of stage, small")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """One piece; returns the exit code."""
    start, args = time.monotonic(), parse(argv)
    try:
        return _main(args, start + 60 * args.minutes)
    except LvjaxError as e:
        say(f"lvjax.lab.gpu_train: {e}")
        return e.code


def _main(args, end: float) -> int:
    if not 0 < args.minutes < math.inf:
        raise InputError(f"--minutes is {args.minutes}; give a positive number, for example 9")
    if importlib.util.find_spec("PIL") is None:
        raise InputError("photographs need Pillow, which is not installed; pip install pillow")
    enable_compilation_cache()
    recipe = TINY if args.tiny else Recipe()
    if jax.default_backend() != "cpu":
        recipe = scaled(recipe, GPU_BATCH)
    own = tempfile.TemporaryDirectory(prefix="lvjax-") if args.work is None else nullcontext()
    with own as made:
        left = piece(recipe, args.state, args.out, args.work or Path(made), end)
    level = pieces.LEVELS[left["level"]]
    kept = f"{' '.join(level.kept)} (weights {level.weights}, moments {level.moments})"
    state = "complete" if left["complete"] else "to be continued"
    say(f"{left['steps']} steps done, {state}; {args.out} holds {kept}")
    if args.bundle is not None:
        write_bundle(recipe, args.out, args.bundle)
        say(f"the model is in {args.bundle}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
