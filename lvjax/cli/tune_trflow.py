# SPDX-License-Identifier: Apache-2.0
"""`lvjax tune-trflow`: the lower threshold of T-RFlow for a model.

The upper one stays as it is given.  The lower one is where the first clip's video of [low, high]
has the average frequency (AF) of that of [0, 1], in the mean over prompts and seeds; one sampling
run for each of them shows every window.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from contextlib import ExitStack
from pathlib import Path

from lvjax.cli import drive
from lvjax.cli.request import make_request
from lvjax.core.checkpoint import write_atomic
from lvjax.core.compat import enable_compilation_cache
from lvjax.core.errors import InputError
from lvjax.data.captions import read_lines
from lvjax.lab import tune_trflow as tuning
from lvjax.rollout.condition import pixel_frames
from lvjax.run import card as cards
from lvjax.run import lock
from lvjax.run.bundle import outline, typed
from lvjax.run.request import MAX_SEED
from lvjax.run.session import notices

SEEDS = (0, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help='"pocket" (default) or a folder')
    add("--prompt", action="append", default=[], metavar="TEXT", help="repeat it for several")
    add("--prompt-file", metavar="FILE", help="prompts, one per line")
    add("--seed", type=int, action="append", help="repeat it for several (default: 0 and 1)")
    add("--high", type=float, default=0.7, help="the upper threshold (default: 0.7)")
    add("--grid", type=int, default=14, help="lower thresholds that are compared (default: 14)")
    dc = "AF without the pictures' mean, so that light does not count; the paper leaves it open"
    add("--no-dc", action="store_true", help=dc)
    add("--size", metavar="WxH", help="picture size (default: the model's own)")
    add("--steps", type=int, help="sampler steps (default: the model's own)")
    add("--guidance", type=float, help="guidance scale (default: the model's own)")
    add("--embeddings", metavar="FILE", help="prompts that `lvjax encode` has read before")
    drive.add_offload(parser)
    add("--out", default="tune_trflow.json", metavar="FILE", help="default: tune_trflow.json")
    add("--plot", metavar="FILE", help="the curve as a PNG picture; needs matplotlib")
    add("--overwrite", action="store_true", help="replace files that are already there")
    add("--quiet", action="store_true", help="no plan and no progress")


def run(args) -> int:
    enable_compilation_cache()
    tuning.check(args.high, args.grid)
    seeds = list(dict.fromkeys(SEEDS if args.seed is None else args.seed))
    if wrong := [s for s in seeds if not 0 <= s < MAX_SEED]:
        raise InputError(f"--seed is {wrong[0]}; give a number from 0 to {MAX_SEED - 1}")
    out = Path(args.out)
    picture = None if args.plot is None else Path(args.plot)
    _check_output(out, ".json", "--out", args.overwrite)
    if picture is not None:
        _check_plot(picture, args.overwrite)
    with ExitStack() as held:
        held.enter_context(lock.hold(out))
        if picture is not None:
            held.enter_context(lock.hold(picture, "--plot"))
        curve, about = _tune(args, seeds, out)
        print(tuning.table(curve))
        figures = curve.as_dict() | about
        write_atomic(out, json.dumps(figures, indent=1, ensure_ascii=False).encode() + b"\n")
        if picture is not None:
            tuning.plot(curve, picture)
    print(f"wrote {out}" + (f" and {picture}" if picture else ""))
    return 0


def _tune(args, seeds: list[int], out: Path) -> tuple[tuning.Curve, dict]:
    """The curve, and what it was made with."""
    prompts = args.prompt + ([] if args.prompt_file is None else read_lines(args.prompt_file))
    if not prompts:
        raise InputError(
            "no prompt is given; give --prompt TEXT, or --prompt-file FILE with one per line"
        )
    sizes = typed(outline(cards.model_place(args.model)), None)
    requests = _requests(sizes, args, list(dict.fromkeys(prompts)))
    sizes = drive.announce(sizes, requests[0], out, args.quiet, offload=args.offload)
    together = dataclasses.replace(requests[0], timelines=tuple(r.timelines[0] for r in requests))
    bundle = drive.load_model(sizes, together, args.embeddings)
    for notice in notices(bundle, together):
        drive.note(notice)
    made = []
    for sampled in tuning.runs(bundle, requests, seeds, not args.no_dc):
        made.append(sampled)
        if not args.quiet:
            count = f"{len(made)}/{len(requests) * len(seeds)}"
            _say(f"run {count}: AF of [0, 1] {sampled.target:.5f}, {sampled.prompt}")
    curve = tuning.tune(bundle, made, args.high, args.grid, report=_quiet if args.quiet else _say)
    d = bundle.defaults
    about = {
        "keep_dc": not args.no_dc,
        "runs": [{"prompt": r.prompt, "seed": r.seed} for r in made],
        "sampler": {
            "solver": d.solver,
            "shift": d.shift,
            "steps": made[0].schedule.steps,
            "guidance": d.guidance if args.guidance is None else args.guidance,
            "size": list(requests[0].size),
        },
        "model": bundle.name,
        "weights": bundle.hashes,
        "versions": cards.versions(),
    }
    return curve, about


def _requests(sizes, args, prompts: list[str]) -> list:
    """A request of one clip per prompt."""
    options = {k: getattr(args, k) for k in ("size", "steps", "guidance")}
    options |= {"frames": pixel_frames(sizes.defaults.clip_latents), "method": "error_free"}
    return [make_request(sizes, options | {"prompt": [text]})[0] for text in prompts]


def _check_output(path: Path, suffix: str, option: str, overwrite: bool) -> None:
    """Raises: InputError when a file cannot be written there, or may not be replaced."""
    if path.suffix.lower() != suffix:
        raise InputError(f"{option} is {path}; it must end in {suffix}")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder; make it, or choose another {option}")
    if path.exists() and not (overwrite and path.is_file()):
        remedy = " or add --overwrite" if path.is_file() else ""
        raise InputError(f"{path} already exists; choose another {option}{remedy}")


def _check_plot(path: Path, overwrite: bool) -> None:
    """Raises: InputError as `_check_output`, or without matplotlib."""
    _check_output(path, ".png", "--plot", overwrite)
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "--plot needs matplotlib, which is not installed; leave --plot out, or "
            "pip install 'lvjax[plot]'"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _quiet(text: str) -> None:
    pass
