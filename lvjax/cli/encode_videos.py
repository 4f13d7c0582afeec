# SPDX-License-Identifier: Apache-2.0
"""`lvjax encode --videos`: a folder of videos with captions to a dataset of latents for training.

The same command goes on where it stopped, and takes up videos that are new.
"""

import argparse
import sys
import time
from pathlib import Path

from lvjax.cli.bar import Bar
from lvjax.cli.drive import note
from lvjax.cli.names import check_names
from lvjax.cli.request import picture_size
from lvjax.cli.stopped import stopped
from lvjax.core.errors import InputError, one_line
from lvjax.data.captioned import Source, find_videos
from lvjax.data.latent_writer import skipped_words
from lvjax.data.latents import SKIPPED
from lvjax.methods.error_free import ErrorFree
from lvjax.run import lock
from lvjax.run.bundle import outline
from lvjax.run.dataset import CLIPS, TAILS, encode_folder, plan_layout
from lvjax.run.dataset_plan import DatasetPlan, check_disk, describe, plan_dataset
from lvjax.run.encoders import notices

OF_PROMPTS = ("prompt", "prompt_file", "negative_prompt", "overwrite")
OF_VIDEOS = ("size", "clips", "clip_frames", "overlap", "tails")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("videos, for training").add_argument
    add("--videos", metavar="DIR", help="clip.mp4 beside clip.txt, or metadata.jsonl")
    add("--size", metavar="WxH", help="default: the model's own; videos are scaled and cropped")
    add("--clips", type=int, metavar="K", help=f"of a sample, at most (default: {CLIPS})")
    add("--clip-frames", type=int, metavar="N", help="1 + 4m; default: the model's own")
    add(
        "--overlap",
        type=int,
        metavar="N",
        help="latent frames that clips share; default: the model's own, or "
        f"{ErrorFree.overlap} where it cannot go on from clips yet",
    )
    add("--tails", type=int, metavar="N", help="latent frames that may be given at the end "
        f"(default: {TAILS})")  # fmt: skip


def check_alone(args) -> None:
    """Raises: InputError for a setting of prompts beside videos, or of videos beside prompts."""
    with_videos = args.videos is not None
    wrong = OF_PROMPTS if with_videos else OF_VIDEOS
    given = [name for name in wrong if getattr(args, name) not in (None, [], False)]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        instead = "beside --videos" if with_videos else "without --videos"
        raise InputError(f"{option} is given {instead}; leave it out")


def run(args) -> int:
    check_names(**{"--model": args.model, "--videos": args.videos, "--out": args.out})
    if args.out is None:
        raise InputError("--videos needs --out FOLDER, where the dataset is to be")
    videos, skipped = find_videos(args.videos)
    bundle, output = outline(args.model), Path(args.out)
    layout = plan_layout(
        bundle,
        size=None if args.size is None else picture_size(args.size),
        frames=args.clip_frames,
        overlap=args.overlap,
        clips=CLIPS if args.clips is None else args.clips,
        tails=args.tails,
    )
    plan = plan_dataset(bundle, videos, layout, output)
    print(describe(plan), flush=True)
    check_disk(plan, output)
    for notice in notices(bundle, (text for video in videos for _, text in video.timeline)):
        note(notice)
    try:
        with (
            lock.hold(output, inside=True),
            Bar(None if plan.unknown else plan.clips, "clip") as bar,
        ):
            shown = _Shown(plan, bar)
            counts, skipped = encode_folder(bundle, videos, skipped, output, layout, shown)
    except KeyboardInterrupt as e:
        return stopped(output, *e.args)
    said = (
        f"{counts['videos']} videos, {counts['clips']} clips of {layout.frames} frames, "
        f"{layout.size[1]}x{layout.size[0]} at {layout.fps} frames/s: {output}"
    )
    if skipped:
        said += f"; {len(skipped)} left out ({skipped_words(skipped)}), see {output / SKIPPED}"
    print(one_line(said), file=sys.stderr)
    return 0


class _Shown:
    """Called after every clip: moves a bar, or prints a line per video; from the second on with the
    time that is left, where every video says how long it is.
    """

    def __init__(self, plan: DatasetPlan, bar: Bar):
        self._plan, self._bar = plan, bar
        self._source, self._seen, self._done = None, 0, 0

    def __call__(self, source: Source, clips: int) -> None:
        self._done += 1
        if self._done == 1:  # programs are compiled before, and only once
            self._began = time.monotonic()
        line = None
        if source is not self._source:
            self._source, self._seen = source, self._seen + 1
            line = f"{self._seen}/{self._plan.videos}: {source.name}{self._left()}"
        self._bar(self._done, source.name, line)

    def _left(self) -> str:
        clips = self._plan.clips - self._done
        if self._seen < 2 or self._plan.unknown or clips < 0:
            return ""
        each = (time.monotonic() - self._began) / (self._done - 1)
        return f", about {clips * each:.0f} s left"
