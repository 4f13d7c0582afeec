# SPDX-License-Identifier: Apache-2.0
"""What `generate` and `replay` share: the plan before anything heavy, and the clips as they come.

Owns: what these commands print, and the exit code of a run that a signal ended.  Does not own: the
plan's arithmetic (run/plan.py), making and saving clips (run/job.py).
"""

import argparse
import dataclasses
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from lvjax.core.errors import CheckpointError, InputError, one_line
from lvjax.core.signals import stoppable
from lvjax.models.pocket_text import PocketTextConfig
from lvjax.run import card as cards
from lvjax.run import job
from lvjax.run import plan as plans
from lvjax.run.bundle import Bundle
from lvjax.run.encoders import encode_prompts, load_embeddings, notices, rows_hash
from lvjax.run.job import Progress
from lvjax.run.loras import filled
from lvjax.run.machine import measured_rate
from lvjax.run.request import MAX_SIDE, Request
from lvjax.run.session import texts_of


def add_offload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--offload",
        choices=plans.OFFLOADS,
        default="auto",
        help="where a transformer's weights wait: none is on the device; in the host's memory, "
        "from where layers come one by one, or an expert for its steps; auto is where they fit",
    )


def check_start(output: Path, rows: int) -> None:
    """What can be said before anything is locked: the name, and how many files may be open.

    Raises: InputError.
    """
    if output.suffix.lower() != ".mp4":
        raise InputError(f"--out is {output}; it must end in .mp4")
    files = 2 * rows + 100  # a lock and a video per row
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and files > hard:
        raise InputError(
            f"{rows} videos at once need {files} open files, {hard} are allowed; give fewer "
            f"prompts or a --num-videos that makes at most {(hard - 100) // 2}"
        )
    if soft != resource.RLIM_INFINITY and files > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def check_output(output: Path, rows: int, overwrite: bool) -> None:
    """Raises: InputError when the files of a run of `rows` videos, or of the run whose card or
    state is in their place, are there and may not be replaced; or that card is no card.
    """
    cards.check_place(output)
    state = job.state_path(output)
    files = (*job.outputs(output, rows), *job.made_before(output), state)
    there = [p for p in files if p.exists()]
    loops = [p for p in files if os.path.islink(os.path.realpath(p))]
    if other := [p for p in there if not p.is_file()] + loops:
        raise InputError(f"{other[0]} is there and is no plain file; choose another --out")
    if there and not overwrite:
        unfinished = " (unfinished: --resume goes on)" if state.exists() else ""
        raise InputError(
            f"{there[0]} already exists{unfinished}; choose another --out or add --overwrite"
        )


def announce(
    outline: Bundle, request: Request, output, quiet: bool, clip: int = 0, offload: str = "none"
) -> Bundle:
    """Print the plan of a run, unless quiet, and check that it fits; say what is left out of LoRAs.

    outline: the model without weights.  clip: the one that the run goes on with.  offload: where
      the weights wait, or "auto" for where they fit.
    Returns: the outline with that place.
    Raises: InputError for a picture that the file format cannot hold; DoesNotFitError naming
    settings that fit; StorageError.
    """
    check_picture(request.size, outline.defaults.upscale)
    work = plans.work_of(request, outline, clip)
    plan = plans.propose(outline, work, offload)
    if not quiet:
        print(plans.describe(plan, measured_rate(outline.dit.dtype)), flush=True)
    plans.check_memory(plan, outline, work, offload)
    plans.check_disk(plan, output)
    for notice in outline.notices:
        note(notice)
    return dataclasses.replace(outline, offload=plan.offload)


def check_picture(size: tuple[int, int], upscale: int) -> None:
    """Raises: InputError when pictures of (height, width) cannot be encoded."""
    if max(size) * upscale > MAX_SIDE:
        raise InputError(
            f"the picture is {size[1]}x{size[0]}, shown {upscale} times as large; H.264 holds "
            f"sides up to {MAX_SIDE}: choose a smaller --size, or --set defaults.upscale=1"
        )


def note(text: str) -> None:
    """Say something that is no error, in one line on stderr."""
    print(f"note: {one_line(text)}", file=sys.stderr)


def card_now(card: dict, options: dict, bundle: Bundle, request: Request) -> dict:
    """A card as it would be now, with these options and what was read for them."""
    inputs = card["inputs"] | read_hashes(bundle, request, options.get("embeddings"))
    weights = file_hashes(bundle, card) if job.is_older(card["options"]) else bundle.hashes
    return cards.make_card(options, weights=weights, inputs=inputs)


def file_hashes(bundle: Bundle, card: dict) -> dict[str, str]:
    """The hashes of a bundle as older cards have them: of whole files.  The one of the sizes cannot
    be made any more, but weights of other sizes would not have been read.
    """
    files = {part: cards.file_hash(bundle.parts[part].path) for part in bundle.params}
    return {k: v for k, v in card["weights"].items() if k == "model"} | files


def read_hashes(bundle: Bundle, request: Request, embeddings: str | None) -> dict[str, str]:
    """The inputs of a card that are read with the model: the prompts, and a file of embeddings."""
    prompts = rows_hash(bundle, texts_of(bundle, request))
    found = {"embeddings": None if embeddings is None else cards.file_hash(embeddings)}
    return {k: v for k, v in (found | {"prompts": prompts}).items() if v is not None}


def note_differences(card: dict, now: dict) -> None:
    """Say what is not as it was when a card was written."""
    for line in cards.differences(card, now):
        note(f"{line}; the video may differ")


def load_model(sizes: Bundle, request: Request, embeddings: str | None) -> Bundle:
    """A model with its weights, from its outline.

    Prompts pass through a large text encoder before the weights are read, so that the two are never
    in memory together.  embeddings: a file of prompts that were read before.
    Raises: CheckpointError, InputError as `load_embeddings` and `encode_prompts`.
    """
    known = {} if embeddings is None else _embeddings(sizes, embeddings)
    if not isinstance(sizes.text, PocketTextConfig):
        missing = [text for text in texts_of(sizes, request) if text not in known]
        known |= encode_prompts(sizes, missing) if missing else {}
        for notice in notices(sizes, missing):
            note(notice)
    return dataclasses.replace(filled(sizes), embeddings=known)


def _embeddings(sizes: Bundle, path: str) -> dict:
    if not Path(path).is_file():
        raise CheckpointError(f"no such file: {path}; say with --embeddings where it is now")
    return load_embeddings(path, sizes.dit.text_dim, sizes.parts.get("text"))


def finish(bundle: Bundle, output: Path, quiet: bool) -> int:
    """Make the remaining clips of the run that is begun at `output`; returns the exit code."""

    def clips(stop):
        return job.proceed(bundle, output, stop=stop)

    hint = f"`lvjax generate --resume --out {output}` goes on"
    return follow(clips, job.begun_videos(output), job.position(output)[1], hint, quiet)


def follow(
    clips: Callable[[Callable[[], bool]], Iterator[Progress]],
    videos: list[Path],
    done: int,
    hint: str,
    quiet: bool,
) -> int:
    """Show the clips of a run: a bar on a terminal, else a line each; returns the exit code.

    clips(stop): makes them, and ends early after a clip for which stop() is true.  videos: their
    files.  done: frames made before.  hint: how to go on after that.
    """
    p, last, began = None, done, time.monotonic()
    with stoppable() as stop, ExitStack() as shown:
        bar = None
        for p in clips(lambda: stop.signal is not None):
            if quiet:
                continue
            if sys.stderr.isatty():
                bar = bar or shown.enter_context(
                    tqdm(total=p.frames, initial=done, unit="frame", desc=one_line(videos[0].name))
                )
                bar.set_postfix_str(f"clip {p.clip}/{p.clips}", refresh=False)
                bar.update(p.frame - bar.n)
            else:
                _line(p, (p.frame - last) / max(time.monotonic() - began, 1e-9))
                began, last = time.monotonic(), p.frame
    if p is not None and p.clip < p.clips:
        print(f"lvjax: stopped after a finished clip; {one_line(hint)}", file=sys.stderr)
        return stop.code
    if not quiet:
        more = f" to {videos[-1].name}" if len(videos) > 1 else ""
        print(f"wrote {one_line(f'{videos[0]}{more}')}")
    return 0


def _line(p: Progress, rate: float) -> None:
    print(
        f"clip {p.clip}/{p.clips}: {p.frame}/{p.frames} frames, {rate:.1f} frames/s, "
        f"{(p.frames - p.frame) / rate:.0f} s left",
        file=sys.stderr,
        flush=True,
    )
