# SPDX-License-Identifier: Apache-2.0
"""`lvjax replay`: make a video again from its run card.

The card inside a video asks for that video; the card beside a batch, NAME.mp4.json, for all of it.
A video of a batch is made again by the program of its whole batch, and only that video is written.
Run alone the row would differ in the last bits: a program for one row rounds otherwise than one for
four, and the difference grows along a video.  So it costs the time and memory of the batch, which
the plan says before anything starts.
Of a long video that it was made of, a card has the name and the sha256; it is read again.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from lvjax.cli import drive
from lvjax.cli.names import check_names
from lvjax.cli.request import video_frames
from lvjax.core.compat import enable_compilation_cache
from lvjax.core.errors import CheckpointError, InputError, LvjaxError
from lvjax.io.video import FragmentedWriter, read_card
from lvjax.run import card as cards
from lvjax.run import job, lock, loras, selection
from lvjax.run import plan as plans
from lvjax.run.adapters import for_card
from lvjax.run.bundle import Bundle, outline
from lvjax.run.pictures import as_bits
from lvjax.run.request import Request
from lvjax.run.session import check_settings, open_session
from lvjax.run.spill import check_place
from lvjax.run.state import chain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("video", help="a video that `lvjax generate` wrote, or its card, VIDEO.json")
    add("--out", help="default: NAME-replay.mp4 beside it")
    add("--model", help='"pocket" or a folder, where the weights are now (default: as in the card)')
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE",
        help="where a LoRA of the run is now; found by its content (default: as in the card)",
    )
    add(
        "--embeddings",
        metavar="FILE",
        help="where the prompts that `lvjax encode` read are now (default: as in the card)",
    )
    add(
        "--selection-encoder",
        metavar="FOLDER",
        help="where the sentence encoder of the run is now (default: as in the card)",
    )
    drive.add_offload(parser)
    add("--overwrite", action="store_true", help="replace a video that is already there")
    add("--quiet", action="store_true", help="no plan and no progress")


def run(args) -> int:
    enable_compilation_cache()
    check_names(**{"VIDEO": args.video, "--out": args.out, "--model": args.model})
    check_names(**{"--lora": args.lora, "--embeddings": args.embeddings})
    check_names(**{"--selection-encoder": args.selection_encoder})
    source = Path(args.video)
    card = cards.read_json(source) if source.suffix == ".json" else read_card(source)
    row = cards.check_card(card, source).get("row")
    model = cards.model_place(card["options"].get("model") if args.model is None else args.model)
    sizes, request = _resolve(card, row, model, source)
    sizes = loras.with_card(sizes, card["options"], args.lora)
    encoder = selection.of_run(card["options"], args.selection_encoder)
    sizes = dataclasses.replace(sizes, sentence=encoder)
    request = _with_video(sizes, request, card["options"])
    video = source.with_suffix("") if source.suffix == ".json" else source
    output = Path(args.out) if args.out is not None else video.with_name(f"{video.stem}-replay.mp4")
    batch = len(request.timelines)
    alone = batch > 1 and row is not None
    rows = 1 if alone else batch
    drive.check_start(output, rows)
    with lock.hold({output, *job.outputs(output, rows)}):
        drive.check_output(output, rows, args.overwrite)
        sizes = drive.announce(sizes, request, output, args.quiet, offload=args.offload)
        options = card["options"] | {"model": model} | for_card(sizes.loras, sizes.merged)
        options |= selection.for_card(encoder)
        if args.embeddings is not None:
            options["embeddings"] = str(Path(args.embeddings).resolve())
        bundle = drive.load_model(sizes, request, job.embeddings_of(options))
        now = drive.card_now(card, options, bundle, request)
        drive.note_differences(card, now)
        if alone:
            return _one_of_batch(bundle, request, row, output, now, args.quiet)
        for notice in job.start(bundle, request, output, now):
            drive.note(notice)
        return drive.finish(bundle, output, args.quiet)


def _resolve(card: dict, row, model: str, source) -> tuple[Bundle, Request]:
    """The model without weights and the request that a card asks for.

    Raises: CheckpointError when a setting of the card is missing or impossible.
    """
    sizes = outline(model)
    try:
        sizes = job.with_defaults(sizes, card)
        request = job.request_of(card["options"])
        check_settings(sizes, request)
        plans.make_plan(sizes, plans.work_of(request, sizes))
        if row is not None and row not in range(len(request.timelines)):
            raise ValueError(f"row {row!r} of {len(request.timelines)} videos")
    except (LvjaxError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
        why = f"it has no {e}" if isinstance(e, KeyError) else e
        raise CheckpointError(f"the run card of {source} cannot be followed: {why}") from e
    return sizes, request


def _with_video(sizes: Bundle, request: Request, options: dict) -> Request:
    """The request with the frames of the video that its card only names, if it does.

    Raises: CheckpointError when that is gone, or has changed.
    """
    path = job.named_video(options)
    if path is None:
        return request
    plain = dataclasses.replace(request, start=None)
    try:
        frames = video_frames(sizes, plain, path, request.size)
    except InputError as e:
        raise CheckpointError(f"the video that this one was made of cannot be read: {e}") from e
    return job.with_start(request, options, as_bits(frames), path)


def _one_of_batch(
    bundle: Bundle, request: Request, row: int, output: Path, card: dict, quiet: bool
) -> int:
    """Make a whole batch and write one video of it; returns the exit code.

    Nothing is saved between clips: an interrupted replay of a batch begins again.
    """
    d = bundle.defaults
    height, width = request.size
    size = (width * d.upscale, height * d.upscale)
    if d.spill:
        check_place(output)

    def clips(stop) -> Iterator[job.Progress]:
        session, digest, frames = open_session(bundle, request), "", 0
        files = job.clip_files(output, card)
        files.clear()  # of an interrupted one
        for old in (cards.card_path(output), job.state_path(output)):
            old.unlink(missing_ok=True)  # of the video that this one replaces
        with FragmentedWriter(output, size, d.fps, card | {"row": row}) as writer:
            for result in session.run(files=files):
                writer.write_clip(job.enlarge(result.frames[row], d.upscale))
                digest = chain(digest, result.latents)
                frames += result.frames.shape[1]
                yield job.Progress(
                    result.clip + 1, session.num_clips, frames, session.frames, digest
                )
                if stop() and result.clip + 1 < session.num_clips:
                    return
        cards.write_card(output, card | {"row": row, "latents": digest})

    try:
        return drive.follow(clips, [output], 0, "replay again with --overwrite", quiet)
    finally:
        job.clip_files(output, card).clear()
