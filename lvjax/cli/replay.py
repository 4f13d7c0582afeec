# SPDX-License-Identifier: Apache-2.0
"""`lvjax replay`: make a video again from its run card."""

import argparse
import sys
from pathlib import Path

from lvjax.cli.generate import _proceed
from lvjax.core.compat import enable_compilation_cache
from lvjax.core.errors import InputError
from lvjax.io.video import read_card
from lvjax.run import card as cards
from lvjax.run import job, lock
from lvjax.run.bundle import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", help="a video that `lvjax generate` wrote")
    parser.add_argument("--out", help="default: NAME-replay.mp4 beside it")
    parser.add_argument("--quiet", action="store_true")


def run(args) -> int:
    enable_compilation_cache()
    source = Path(args.video)
    card = cards.check_card(read_card(source), source)
    output = Path(args.out) if args.out else source.with_name(f"{source.stem}-replay.mp4")
    card = {k: v for k, v in card.items() if k != "row"}
    bundle = load(card["options"]["model"])
    now = cards.make_card(card["options"], weights=bundle.hashes, inputs=card["inputs"])
    for line in cards.differences(card, now):
        print(f"note: {line}; the video may differ", file=sys.stderr)
    with lock.hold(output):
        if output.exists():
            raise InputError(f"{output} already exists; choose another --out")
        job.start(job.with_defaults(bundle, card), job.request_of(card["options"]), output, now)
        return _proceed(bundle, output, args.quiet)
