# SPDX-License-Identifier: Apache-2.0
"""`lvjax train`: run or continue a training recipe."""

import argparse
import sys
from pathlib import Path

from lvjax.cli import config
from lvjax.core.compat import enable_compilation_cache
from lvjax.core.errors import InputError
from lvjax.lab.pocket import Recipe, Run, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default="pocket", help="a config file or name (default: pocket)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the config"
    )
    parser.add_argument(
        "--folder",
        default="runs/pocket",
        help="where the run lives; it goes on from the newest snapshot there",
    )
    parser.add_argument("--minutes", type=float, help="stop after this long, snapshot saved")


def run(args) -> int:
    if args.minutes is not None and not args.minutes > 0:
        raise InputError(f"--minutes is {args.minutes}; give a positive number")
    enable_compilation_cache()
    recipe = config.build(Recipe, config.load(args.config, args.set))
    bundle = train(
        recipe, Run(Path(args.folder), args.minutes and 60 * args.minutes, report=_report)
    )
    print(
        f"model saved in {args.folder}/bundle"
        if bundle
        else f"stopped by the time limit; the same command goes on from {args.folder}"
    )
    return 0


def _report(stage: str, line: dict) -> None:
    values = " ".join(f"{k} {v:.4g}" for k, v in line.items())
    print(f"{stage}: {values}", file=sys.stderr, flush=True)
