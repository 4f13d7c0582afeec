# SPDX-License-Identifier: Apache-2.0
"""`lvjax generate`: prompts, a photo or a video in; a video out, clip by clip."""

import argparse
import dataclasses
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from lvjax.cli import config as configs
from lvjax.cli import drive
from lvjax.core.compat import enable_compilation_cache
from lvjax.core.errors import CheckpointError, InputError
from lvjax.io.image import fit_image, read_image
from lvjax.io.video import read_video
from lvjax.methods import METHODS
from lvjax.run import card as cards
from lvjax.run import job, lock, loras
from lvjax.run import plan as plans
from lvjax.run.adapters import parse
from lvjax.run.bundle import Bundle, outline
from lvjax.run.defaults import Defaults
from lvjax.run.presets import SIZES
from lvjax.run.request import Request, check_frames, check_size, frame_count, spread
from lvjax.run.session import check_settings, size_for, span

TEXT, WHOLE, NUMBER = (str, "text"), (int, "a whole number"), (int | float, "a number")
OPTIONS: dict[str, tuple[Any, str]] = {
    "prompt": (str | list | tuple, "text, or a list of texts"),
    "timeline": TEXT,
    "prompt_file": TEXT,
    "num_videos": WHOLE,
    "negative_prompt": TEXT,
    "image": TEXT,
    "last_image": TEXT,
    "video": TEXT,
    "strength": NUMBER,
    "embeddings": TEXT,
    "seconds": NUMBER,
    "frames": WHOLE,
    "size": TEXT,
    "steps": WHOLE,
    "guidance": (str | int | float | list | tuple, "a number, or two: low noise, high noise"),
    "seed": WHOLE,
    "method": TEXT,
    "model": TEXT,
    "lora": (str | list | tuple, "text, or a list of texts"),
    "merge_lora": (bool, "True or False"),
}
"""Settings of a video, on the command line and in a config: type, and the same in words."""

LISTS = ("prompt", "lora")
"""Settings of which there may be several."""

INPUTS = ("image", "last_image", "video", "embeddings")
"""Settings that are files, whose hashes the card holds."""

ALTERNATIVES = (("prompt", "timeline", "prompt_file"), ("seconds", "frames"), ("image", "video"))
SECONDS = 5.0
MAX_VIDEOS = 100_000  # of one run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what happens; repeat it for a sequence, spread evenly over the video",
    )
    add(
        "--timeline",
        metavar="FILE",
        help='a prompt per time: lines such as "3.5 the camera pans left"',
    )
    add("--prompt-file", metavar="FILE", help="a batch: one prompt per line, one video each")
    add("--num-videos", type=int, help="videos per prompt, with different noise (default: 1)")
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    add("--image", metavar="FILE", help="the first frame")
    add("--last-image", metavar="FILE", help="the last frame, for models that go to one")
    add("--video", metavar="FILE", help="a video to continue, or to make another one of")
    add("--strength", type=float, help="how much of --video is changed, above 0 to 1")
    add(
        "--embeddings",
        metavar="FILE",
        help="prompts that `lvjax encode` has read before; no text encoder is needed then",
    )
    add(
        "--seconds",
        type=float,
        help=f"length; gives 1 + 4·round(s·fps/4) frames (default: {SECONDS:g})",
    )
    add("--frames", type=int, help="length in frames, 1 + 4m")
    add("--size", metavar="WxH", help=f"picture size, for example 64x64, or {', '.join(SIZES)}")
    add("--steps", type=int, help="sampler steps")
    add("--guidance", metavar="G", help="guidance scale, 1 is none; LOW,HIGH for two experts")
    add("--seed", type=int, help="default: 0")
    add("--method", choices=sorted(METHODS), help="default: the model's own")
    add("--model", help='"pocket" (default) or a folder')
    add(
        "--lora",
        action="append",
        metavar="[high:|low:]FILE[=STRENGTH]",
        help="a LoRA to put beside the weights, at a strength (default: 1); repeat it for several; "
        "of a model with two experts both get it, unless it says which",
    )
    merge = "add the LoRAs to the weights instead, which takes no time per step"
    add("--merge-lora", action="store_const", const=True, help=merge)
    add(
        "--offload",
        choices=plans.OFFLOADS,
        default="auto",
        help="where a transformer's weights wait: none is on the device; in the host's memory, "
        "from where layers come one by one, or an expert for its steps; auto is where they fit",
    )
    add("--config", help="a config file or name with any of these settings")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the config, for example --set defaults.shift=5.0",
    )
    add("--out", default="out.mp4", metavar="FILE", help="default: out.mp4")
    add("--overwrite", action="store_true", help="replace a video that is already there")
    add("--resume", action="store_true", help="continue the interrupted run that wrote --out")
    add("--quiet", action="store_true", help="no plan and no progress")


def run(args) -> int:
    enable_compilation_cache()
    output, options = Path(args.out), _options(args)
    if args.resume and (code := _resume(args, options, output)) is not None:
        return code
    return _start(args, options, output)


def _start(args, options: dict, output: Path) -> int:
    """Read the inputs, plan, and make a new video or batch of videos."""
    model = cards.model_place(options["model"])
    sizes = _outline(model, options)
    request, notices = make_request(sizes, options)
    rows = len(request.timelines)
    drive.check_start(output, rows)
    with lock.hold({output, *job.outputs(output, rows)}):
        drive.check_output(output, rows, args.overwrite)
        sizes = drive.announce(sizes, request, output, args.quiet, offload=args.offload)
        for notice in notices:
            drive.note(notice)
        bundle = drive.load_model(sizes, request, options["embeddings"])
        card = _card(request, bundle, model, options)
        for notice in job.start(bundle, request, output, card):
            drive.note(notice)
        return drive.finish(bundle, output, args.quiet)


def _resume(args, options: dict, output: Path) -> int | None:
    """Go on with the unfinished run of `output`; None when nothing was begun there.

    Settings beside --resume must be those of the run, all of them; --model alone says where its
    weights are now.
    Raises: InputError when settings differ or, unless the run is complete, weights.
    """
    with ExitStack() as held:
        held.enter_context(lock.hold(output))
        card = job.saved_card(output)
        if complete := card is None and job.is_complete(output):
            card = cards.read_json(cards.card_path(output))
        if card is None and not _given(args):
            raise InputError(
                f"there is no unfinished run at {output}; give its prompts to start one"
            )
        if card is None:
            return None
        request = job.request_of(card["options"])
        drive.check_start(output, len(request.timelines))
        rows = set(job.outputs(output, len(request.timelines)))
        held.enter_context(lock.hold(rows - {output}))
        model = cards.model_place(options["model"] or card["options"].get("model"))
        changed = _outline(model, options) if _given(args) or options["lora"] else None
        if _given(args):
            _check_same(card, changed, model, options)
        if changed is not None:
            loras.check_same(changed, card["options"])
        if complete:
            print(f"{job.videos(output)[0]} is already complete")
            return 0
        sizes = changed or loras.with_card(outline(model), card["options"])
        sizes = job.with_defaults(sizes, card)
        _check_saved(sizes, request, output)
        cards.check_place(output)
        at = job.position(output)[0]
        sizes = drive.announce(sizes, request, output, args.quiet, at, args.offload)
        bundle = drive.load_model(sizes, request, options["embeddings"])
        if card["weights"] != bundle.hashes:
            raise InputError(
                f"the run was begun with other weights than those of {model}; give the folder that "
                "has them with --model, or start again with --overwrite"
            )
        drive.note_differences(card, card["options"], bundle)
        return drive.finish(bundle, output, args.quiet)


def _check_saved(sizes: Bundle, request: Request, output: Path) -> None:
    """Raises: CheckpointError when the request in a state is none that this model can follow."""
    try:
        check_settings(sizes, request)
    except InputError as e:
        raise CheckpointError(f"the state of {output} cannot be followed: {e}") from e


def _check_same(card: dict, sizes: Bundle, model: str, options: dict) -> None:
    """Raises: InputError when the settings beside --resume are not those of the card."""
    if all(options.get(k) is None for k in ALTERNATIVES[0]):
        raise InputError(
            "settings beside --resume must be all those of the run, its prompts too; or give "
            "--resume and --out alone"
        )
    request, _ = make_request(sizes, options)
    job.check_same(card, _card(request, sizes, model, options))


def _outline(model: str, options: dict) -> Bundle:
    """A model without weights, with the LoRAs and defaults that the settings ask for."""
    asked = [parse(text) for text in options["lora"] or ()]
    found = loras.with_lora(outline(model), asked, options["merge_lora"] or False)
    return dataclasses.replace(found, defaults=options["defaults"](found.defaults))


def _given(args) -> bool:
    """Whether any setting of the video is on the command line; model and LoRAs alone say where the
    files are now.
    """
    places = ("model", "lora", "merge_lora")
    settings = (getattr(args, k) for k in (*OPTIONS, "config") if k not in places)
    return bool(args.set) or any(v is not None for v in settings)


def _card(request: Request, bundle: Bundle, model: str, options: dict) -> dict:
    """The card of a run with these settings; without weights for an outline."""
    inputs = {k: cards.file_hash(options[k]) for k in INPUTS if options[k] is not None}
    settings = job.options_of(request, bundle, model)
    return cards.make_card(settings, weights=bundle.hashes, inputs=inputs)


def _options(args) -> dict:
    """Settings from the config, then the command line; "defaults" is a function Defaults ->
    Defaults.
    """
    loaded = (
        configs.load(args.config, [c for c in args.set if not c.startswith("defaults.")])
        if args.config is not None
        else {}
    )
    if unknown := sorted(set(loaded) - set(OPTIONS) - {"defaults"}):
        raise InputError(
            f"{args.config}: {unknown[0]!r} is no setting of generate; allowed are "
            f"{', '.join(OPTIONS)} and defaults"
        )
    given = {k: v for k in OPTIONS if (v := getattr(args, k)) is not None}
    replaced = {k for group in ALTERNATIVES if given.keys() & set(group) for k in group}
    options = {k: None if k in replaced else loaded.get(k) for k in OPTIONS} | given
    for name in LISTS:
        if isinstance(options[name], str):
            options[name] = [options[name]]
    if "model" in loaded and options["model"] is None and not args.resume:
        raise InputError(
            f"{args.config} leaves the model open; give the folder of its weights with --model"
        )
    if not hasattr(loaded.get("defaults", {}), "keys"):
        raise InputError(
            f"{args.config}: defaults is {loaded['defaults']!r}; give names and values"
        )
    for name, (kind, words) in OPTIONS.items():
        value = options[name]
        as_bool = isinstance(value, bool) and kind is not bool
        if value is not None and (as_bool or not isinstance(value, kind)):
            raise InputError(f"{args.config}: {name} is {value!r}; give {words}")
    for name in LISTS:
        if wrong := [p for p in options[name] or () if not isinstance(p, str)]:
            raise InputError(f"{args.config}: a {name} is {wrong[0]!r}; give text")
    if other := [c for c in args.set if not args.config and not c.startswith("defaults.")]:
        raise InputError(f"--set {other[0]}: without --config only defaults.KEY=VALUE can be set")
    changes = [c.removeprefix("defaults.") for c in args.set if c.startswith("defaults.")]
    options["defaults"] = lambda d: configs.changed(d, dict(loaded.get("defaults") or {}), changes)
    return options


def make_request(bundle: Bundle, options: dict) -> tuple[Request, list[str]]:
    """A checked request from the settings; and notices about the inputs."""
    d: Defaults = bundle.defaults
    if options.get("seconds") is not None and options.get("frames") is not None:
        raise InputError("both --seconds and --frames are given; give one of them")
    if options.get("image") is not None and options.get("video") is not None:
        raise InputError("both --image and --video are given; give one of them")
    frames = (
        options["frames"]
        if options.get("frames") is not None
        else frame_count(SECONDS if options.get("seconds") is None else options["seconds"], d.fps)
    )
    size = None if options.get("size") is None else check_size(_size(options["size"]), bundle)
    count = 1 if options.get("num_videos") is None else options["num_videos"]
    if count < 1:
        raise InputError(f"--num-videos is {count}; give 1 or more")
    timelines = _timelines(options, check_frames(frames), d.fps)
    if count * len(timelines) > MAX_VIDEOS:
        raise InputError(
            f"{len(timelines)} prompts with --num-videos {count} are more than {MAX_VIDEOS} "
            "videos; make them in several runs"
        )
    rows = [t for t in timelines for _ in range(count)]
    request = Request(
        tuple(rows),
        frames,
        negative=options.get("negative_prompt"),
        size=size,
        steps=options.get("steps"),
        guidance=_guidance(options.get("guidance")),
        seed=options.get("seed") or 0,
        method=options.get("method"),
        strength=options.get("strength"),
    )
    image, notices = None, []
    if options.get("image") is not None:
        image, notices = read_image(options["image"])
    if size is None:
        size = d.size if image is None else size_for(bundle, request, image.shape[:2])
    start = None if image is None else fit_image(image, size)[None]
    if options.get("video") is not None:
        start = _video_frames(options["video"], size, d.fps, *span(bundle, request))
    last = None
    if options.get("last_image") is not None:
        image, more = read_image(options["last_image"])
        last, notices = fit_image(image, size), list(dict.fromkeys([*notices, *more]))
    request = dataclasses.replace(request, size=size, start=start, last=last)
    check_settings(bundle, request)
    return request, notices


def _size(text: str) -> tuple[int, int]:
    """ "WxH", or a name, -> (height, width)."""
    if text in SIZES:
        return SIZES[text]
    found = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", str(text).strip())
    if not found:
        raise InputError(
            f"--size is {text!r}; write WIDTHxHEIGHT, for example 64x64, or one of "
            f"{', '.join(SIZES)}"
        )
    return int(found[2]), int(found[1])


def _guidance(given):
    """A number, or two for (low noise, high noise)."""
    parts = str(given).split(",") if not isinstance(given, (list, tuple)) else given
    if given is None:
        return None
    try:
        scales = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        scales = ()
    if len(scales) not in (1, 2):
        raise InputError(f"--guidance is {given!r}; give a number, or LOW,HIGH for two experts")
    return scales[0] if len(scales) == 1 else scales


def _video_frames(path, size: tuple[int, int], fps: int, end: str, most: int) -> np.ndarray:
    """The "first" or "last" so many frames of a video, in [-1, 1] and of 8 bits, as the card holds
    them.
    """
    which = {"last": "max_frames", "first": "first"}[end]
    video, _ = read_video(path, fps=fps, **{which: most})
    return np.stack([fit_image(frame, size) for frame in video])


def _timelines(options: dict, frames: int, fps: int) -> list:
    """One timeline per prompt of a batch, or the one of --prompt / --timeline."""
    given = [k for k in ALTERNATIVES[0] if options.get(k) is not None]
    if len(given) != 1:
        names = " and ".join(f"--{k.replace('_', '-')}" for k in given) or "no prompt"
        raise InputError(f"{names} given; give one of --prompt, --timeline, --prompt-file")
    if given == ["prompt"]:
        return [spread(list(options["prompt"]), frames, fps)]
    lines = read_lines(options[given[0]])
    if given == ["prompt_file"]:
        return [spread([x], frames, fps) for x in lines]
    return [tuple(_moment(x, options["timeline"]) for x in lines)]


def _moment(line: str, source) -> tuple[float, str]:
    found = re.fullmatch(r"(?:(\d{1,6}):)?(\d{1,9}(?:\.\d{1,9})?)s?(?::(?!\d)|[,\s])\s*(.+)", line)
    if not found or (found[1] and float(found[2]) >= 60):
        raise InputError(
            f"{source}: {line!r} is not a time and a prompt; write for example: 3.5 the camera "
            "pans left, or 1:30 the camera pans left"
        )
    return 60 * int(found[1] or 0) + float(found[2]), found[3]


def read_lines(path) -> list[str]:
    """The lines of a file of prompts; empty ones and comments (# ...) are left out.

    Raises: InputError when it cannot be read or holds none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(
            f"cannot read {path} ({e.strerror if isinstance(e, OSError) else 'not UTF-8 text'})"
        ) from e
    lines = [line.strip() for line in text.splitlines()]
    if not (lines := [line for line in lines if line and not line.startswith("#")]):
        raise InputError(f"{path} holds no prompt; write one per line")
    return lines
