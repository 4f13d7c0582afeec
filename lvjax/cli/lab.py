# SPDX-License-Identifier: Apache-2.0
"""`lvjax lab`: experiments of papers on the pocket world, each with a report.

`lab error-free` runs the ablations of "Towards Error-Free Long Video Generation" and goes on where
it stopped.  It trains nothing: the pocket model of the package was trained with memory and has
every part that the cells need; `--model` takes another that `lvjax train` made.  `lab
export-vbench` copies the videos of such a folder into VBench's layout.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from lvjax.cli.names import check_names
from lvjax.core.compat import enable_compilation_cache
from lvjax.core.errors import one_line
from lvjax.core.signals import stoppable
from lvjax.lab import error_free, vbench
from lvjax.lab.report import write_report
from lvjax.run import lock
from lvjax.run.bundle import outline
from lvjax.run.weights import load

EVERY = 15  # seconds between lines of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="experiment", required=True)
    for name, text, arguments in (
        ("error-free", "memory and T-RFlow, with and without: Tables 2 to 4", _error_free),
        ("export-vbench", "the videos of a folder of error-free in VBench's layout", _export),
    ):
        sub = kinds.add_parser(name, help=text, description=text)
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
        )
        arguments(sub)


def _error_free(parser: argparse.ArgumentParser) -> None:
    add, full, quick = parser.add_argument, error_free.Settings(), error_free.QUICK

    def default(name: str) -> str:
        return f"(default: {getattr(full, name)}, quick: {getattr(quick, name)})"

    add("--quick", action="store_true", help="short videos and few of them; the report says so")
    add("--folder", default="runs/error-free", help="what is done there is not made again")
    model = '"pocket" (default), which comes trained, or a folder, as `lvjax train` saves one'
    add("--model", default="pocket", help=model)
    add("--seconds", type=float, help=f"length of every video {default('seconds')}")
    add("--seeds", type=int, help=f"sampling seeds per timeline {default('seeds')}")
    add("--timelines", type=int, help=f"held-out timelines {default('timelines')}")
    add("--steps", type=int, help="sampler steps (default: the model's own)")
    cells = ", ".join(error_free.CELLS)
    add("--cell", action="append", metavar="NAME", help=f"one of {cells} (repeat; default: all)")
    add("--quiet", action="store_true", help="no progress")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="DIR", help="a new folder for the videos and prompts")
    parser.add_argument(
        "--from",
        dest="source",
        default="runs/error-free",
        metavar="FOLDER",
        help="a folder of `lvjax lab error-free` (default: runs/error-free)",
    )


def run(args) -> int:
    return {"error-free": run_error_free, "export-vbench": run_export}[args.experiment](args)


def run_error_free(args) -> int:
    check_names(**{"--folder": args.folder})
    enable_compilation_cache()
    settings, folder = settings_of(args), Path(args.folder)
    error_free.check(outline(args.model), settings)
    with lock.hold(folder / "lab", "--folder"), stoppable() as stop:
        bundle = load(args.model)
        about = error_free.claim(bundle, settings, folder)
        report = _quiet if args.quiet else Lines()
        done = error_free.run_cells(
            bundle, settings, folder, report, stop=lambda: stop.signal is not None
        )
        if not done:
            print(
                f"lvjax: stopped; {one_line(folder)} keeps the runs that are done, the one in "
                "hand begins again with the same command",
                file=sys.stderr,
            )
            return stop.code
        files = write_report(folder, settings, about)
    print(f"wrote {one_line(files[0])} and {len(files) - 1} files beside it")
    return 0


def run_export(args) -> int:
    check_names(**{"DIR": args.out, "--from": args.source})
    folders = vbench.export(Path(args.source), Path(args.out))
    print(
        f"wrote {len(folders)} folders of videos to {one_line(args.out)}; of videos of one's own "
        f"VBench measures, each by --dimension: {', '.join(vbench.DIMENSIONS)}"
    )
    return 0


def settings_of(args) -> error_free.Settings:
    """The full or the quick settings, with what is asked for in place of theirs."""
    base = error_free.QUICK if args.quick else error_free.Settings()
    given = {k: getattr(args, k) for k in ("seconds", "seeds", "timelines", "steps")}
    given["cells"] = tuple(dict.fromkeys(args.cell)) if args.cell else None
    return dataclasses.replace(base, **{k: v for k, v in given.items() if v is not None})


class Lines:
    """Progress as lines on stderr, one in a while."""

    def __init__(self):
        self.last = -EVERY

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if now - self.last >= EVERY:
            print(text, file=sys.stderr, flush=True)
            self.last = now


def _quiet(text: str) -> None:
    pass
