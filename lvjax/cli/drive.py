# SPDX-License-Identifier: Apache-2.0
"""What `generate` and `replay` share: the plan before anything heavy, and the clips as they come.

Owns: what these commands print, and the exit code of a run that a signal ended.  Does not own: the
plan's arithmetic (run/plan.py), making and saving clips (run/job.py).
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from lvjax.core.errors import InputError
from lvjax.core.signals import stoppable
from lvjax.run import card as cards
from lvjax.run import job
from lvjax.run import plan as plans
from lvjax.run.bundle import Bundle
from lvjax.run.job import Progress
from lvjax.run.session import Request


def check_output(output: Path, rows: int, overwrite: bool) -> None:
    """Raises: InputError when the files of a run of `rows` videos are there and may not be
    replaced, or a file that is none of ours is in the place of the card.
    """
    if output.suffix.lower() != ".mp4":
        raise InputError(f"--out is {output}; it must end in .mp4")
    if not overwrite and any(p.exists() for p in job.outputs(output, rows)):
        unfinished = " (unfinished: --resume goes on)" if job.state_path(output).exists() else ""
        raise InputError(
            f"{output} already exists{unfinished}; choose another --out or add --overwrite"
        )
    cards.check_place(output)


def announce(outline: Bundle, request: Request, output, quiet: bool) -> None:
    """Print the plan of a run, unless quiet, and check that it fits.

    outline: the model without weights.
    Raises: DoesNotFitError naming settings that fit; StorageError.
    """
    work = plans.work_of(request, outline)
    plan = plans.make_plan(outline, work)
    if not quiet:
        print(plans.describe(plan, plans.measured_rate(outline.dit.dtype)), flush=True)
    plans.check_plan(plan, outline, work, output)


def finish(bundle: Bundle, output: Path, quiet: bool) -> int:
    """Make the remaining clips of the run that is begun at `output`; returns the exit code."""

    def clips(stop):
        return job.proceed(bundle, output, stop=stop)

    hint = f"`lvjax generate --resume --out {output}` goes on"
    return follow(clips, output, job.frames_done(output), hint, quiet)


def follow(
    clips: Callable[[Callable[[], bool]], Iterator[Progress]],
    output: Path,
    done: int,
    hint: str,
    quiet: bool,
) -> int:
    """Show the clips of a run: a bar on a terminal, else a line each; returns the exit code.

    clips(stop): makes them, and ends early after a clip for which stop() is true.  done: frames
    made before.  hint: how to go on after that.
    """
    p, last, began = None, done, time.monotonic()
    bar = None
    with stoppable() as stop:
        for p in clips(lambda: stop.signal is not None):
            if quiet:
                continue
            if sys.stderr.isatty():
                bar = bar or tqdm(total=p.frames, initial=done, unit="frame", desc=output.name)
                bar.set_postfix_str(f"clip {p.clip}/{p.clips}", refresh=False)
                bar.update(p.frame - bar.n)
            else:
                _line(p, (p.frame - last) / max(time.monotonic() - began, 1e-9))
                began, last = time.monotonic(), p.frame
        if bar:
            bar.close()
    if p is not None and p.clip < p.clips:
        print(f"lvjax: stopped after a finished clip; {hint}", file=sys.stderr)
        return stop.code
    if not quiet:
        print(f"wrote {output}")
    return 0


def _line(p: Progress, rate: float) -> None:
    print(
        f"clip {p.clip}/{p.clips}: {p.frame}/{p.frames} frames, {rate:.1f} frames/s, "
        f"{(p.frames - p.frame) / rate:.0f} s left",
        file=sys.stderr,
        flush=True,
    )
