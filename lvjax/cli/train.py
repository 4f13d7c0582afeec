# SPDX-License-Identifier: Apache-2.0
"""`lvjax train`: run or continue a training recipe."""

import argparse
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lvjax.cli import config
from lvjax.cli.stopped import stopped
from lvjax.cli.train_extension import train_extension
from lvjax.core.compat import enable_compilation_cache
from lvjax.core.errors import InputError, StorageError, not_stored
from lvjax.data.clips import CLIP_FRAMES
from lvjax.data.world import SIZE
from lvjax.lab import pocket
from lvjax.lab.recipe import Recipe
from lvjax.lab.resume import claim
from lvjax.run import lock
from lvjax.run.bundle import outline
from lvjax.run.training import Training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default="pocket", help="a config file or name (default: pocket)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the config"
    )
    parser.add_argument(
        "--folder",
        help="where the run lives; it goes on from the newest checkpoint there (default: runs/ and "
        "the name of the config)",
    )
    parser.add_argument("--minutes", type=float, help="stop after this long, checkpoint saved")


def run(args) -> int:
    if args.minutes is not None and not args.minutes > 0:
        raise InputError(f"--minutes is {args.minutes}; give a positive number")
    enable_compilation_cache()
    values = config.load(args.config, args.set)
    if args.folder == "":
        raise InputError("--folder is empty; name a folder")
    folder = Path(args.folder or Path("runs", Path(args.config).stem))
    seconds = math.inf if args.minutes is None else 60 * args.minutes
    if "data" in values:  # somebody's own; the recipe of the pocket model renders its data
        train = partial(train_extension, config.build(Training, values), folder, seconds)
    else:
        recipe = config.build(Recipe, values)
        if recipe.start is not None:
            outline(recipe.start)
        train = partial(_train_pocket, recipe, folder, seconds)
    with lock.hold(folder / "training", "--folder"):
        try:
            return _run(train, folder)
        except OSError as e:
            remedy = "free space or choose another --folder"
            raise not_stored(f"use {e.filename or folder}", e, remedy) from e


def _run(train: Callable[[], bool], folder: Path) -> int:
    """Train; returns the exit code.  A signal ends a stage after the step in flight, with a
    checkpoint (`fit`), and preparation at once: what it had finished is found again.  A second
    Ctrl-C does not wait for the step, and the newest checkpoint is the one before.
    """
    try:
        if not train():
            print(f"stopped by the time limit; the same command goes on from {folder}")
        return 0
    except KeyboardInterrupt as e:
        return stopped(folder, *e.args)


def _train_pocket(recipe: Recipe, folder: Path, seconds: float) -> bool:
    """Train the pocket model, or go on; whether it came to its end."""
    _check_disk(recipe, folder)
    claim(recipe, folder)
    if pocket.train(recipe, pocket.Run(folder, seconds, report=_report)) is None:
        return False
    print(f"model saved in {folder}/bundle")
    return True


def _check_disk(recipe: Recipe, folder: Path) -> None:
    """Raises: StorageError when the rendered clips, and a tenth more for the rest, do not fit.

    They are written through memory maps, where a full disk would end the process without a word.
    """
    needed = 1.1 * recipe.videos * recipe.clips * CLIP_FRAMES * SIZE * SIZE * 3
    there = sum(p.stat().st_blocks * 512 for p in folder.glob("clips/*.npy"))
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise StorageError(
            f"the clips of this recipe need {(needed - there) / 1e9:.1f} GB more in {folder}, "
            f"{free / 1e9:.1f} GB are free; free space, choose another --folder or fewer videos"
        )


def _report(stage: str, line: dict) -> None:
    values = " ".join(f"{k} {v:.4g}" for k, v in line.items())
    print(f"{stage}: {values}", file=sys.stderr, flush=True)
