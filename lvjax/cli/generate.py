# SPDX-License-Identifier: Apache-2.0
"""`lvjax generate`: prompts, a photo or a video in; a video out, clip by clip."""

import argparse
import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lvjax.cli import config as configs
from lvjax.cli import drive
from lvjax.cli.names import check_names
from lvjax.cli.request import ALTERNATIVES, SECONDS, make_request
from lvjax.core.compat import enable_compilation_cache
from lvjax.core.errors import CheckpointError, InputError, one_line
from lvjax.methods import METHODS
from lvjax.run import card as cards
from lvjax.run import job, lock, loras, selection
from lvjax.run.adapters import of_card, parse
from lvjax.run.bundle import Bundle, outline, typed
from lvjax.run.presets import SIZES
from lvjax.run.request import Request
from lvjax.run.session import check_settings

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
    "selection_encoder": TEXT,
}
"""Settings of a video, on the command line and in a config: type, and the same in words."""

LISTS = ("prompt", "lora")
"""Settings of which there may be several."""

INPUTS = ("image", "last_image", "video")
"""Settings that are files, whose hashes the card holds."""

FILES = (*INPUTS, "timeline", "prompt_file", "embeddings", "model", "lora", "selection_encoder")
"""Settings that name files or folders."""

PLACES = ("model", "lora", "embeddings", "selection_encoder")
"""Settings that say where files are; they may have moved when a run is resumed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_content(parser.add_argument)
    _add_model(parser.add_argument)
    drive.add_offload(parser)
    add = parser.add_argument
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


def _add_content(add) -> None:
    """What is to be seen."""
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
        help=f"length; gives 1 + 4·round(s·fps/4) frames (default: {SECONDS:g}, less where another "
        "video is made of a shorter one)",
    )
    add("--frames", "--num-frames", type=int, help="length in frames, 1 + 4m")
    add("--size", metavar="WxH", help=f"picture size, for example 64x64, or {', '.join(SIZES)}")
    add("--steps", type=int, help="sampler steps")
    add("--guidance", metavar="G", help="guidance scale, 1 is none; LOW,HIGH for two experts")
    add("--seed", type=int, help="default: 0")
    add("--method", choices=sorted(METHODS), help="default: the model's own")


def _add_model(add) -> None:
    """What makes it."""
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
        "--selection-encoder",
        metavar="FOLDER",
        help="a sentence encoder, as all-MiniLM-L6-v2, by which clips with similar prompts are "
        "selected (default: the model's own text encoder)",
    )


def run(args) -> int:
    enable_compilation_cache()
    check_names(**{"--out": args.out, "--config": args.config})
    output, options = Path(args.out), _options(args)
    if args.resume and (code := _resume(args, options, output)) is not None:
        return code
    return _start(args, options, output)


def _start(args, options: dict, output: Path) -> int:
    """Read the inputs, plan, and make a new video or batch of videos."""
    model = cards.model_place(options["model"])
    sizes = selection.with_encoder(_outline(model, options), options["selection_encoder"])
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
        card["inputs"] |= drive.read_hashes(bundle, request, options["embeddings"])
        for notice in job.start(bundle, request, output, card):
            drive.note(notice)
        return drive.finish(bundle, output, args.quiet)


def _resume(args, options: dict, output: Path) -> int | None:
    """Go on with the unfinished run of `output`; None when nothing was begun there.

    Settings beside --resume must be those of the run, all of them; `PLACES` alone say where its
    files are now.
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
        given, place = _given(args), options["selection_encoder"]
        if not given:  # --lora says where files are now, not how they are used
            options = options | {"merge_lora": of_card(card["options"])[1]}
        changed = _outline(model, options) if given or options["lora"] else None
        if given:
            _check_same(card, changed, model, options)
            selection.check_given(card["options"], place)
        if changed is not None:
            loras.check_same(changed, card["options"])
        if not complete or place is not None:
            encoder = selection.of_run(card["options"], place)
        if complete:
            print(f"{one_line(job.videos(output)[0])} is already complete")
            return 0
        sizes = changed or loras.with_card(outline(model), card["options"])
        sizes = dataclasses.replace(job.with_defaults(sizes, card), sentence=encoder)
        _check_saved(sizes, request, output)
        cards.check_place(output)
        at = job.position(output)[0]
        sizes = drive.announce(sizes, request, output, args.quiet, at, args.offload)
        embeddings = options["embeddings"] or job.embeddings_of(card["options"])
        bundle = drive.load_model(sizes, request, embeddings)
        now = card["options"] | {"embeddings": embeddings}
        _check_read(card, drive.card_now(card, now, bundle, request), model)
        return drive.finish(bundle, output, args.quiet)


def _check_read(card: dict, now: dict, model: str) -> None:
    """Say what is not as it was when a run was begun.

    Raises: InputError when its weights or the rows of its prompts are others.
    """
    if cards.other_weights(card, now):
        raise InputError(
            f"the run was begun with other weights than those of {model}; give the folder that has "
            "them with --model, or start again with --overwrite"
        )
    from_files = "embeddings" in card["inputs"] and now["options"]["embeddings"] is not None
    if cards.other_prompts(card, now) and (from_files or card["versions"] == now["versions"]):
        raise InputError(
            "the run was begun with other rows of its prompts; give its --embeddings, or the model "
            "with its text encoder, or start again with --overwrite"
        )
    drive.note_differences(card, now)


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
    return typed(dataclasses.replace(found, defaults=options["defaults"](found.defaults)), None)


def _given(args) -> bool:
    """Whether any setting of the video is on the command line; `PLACES` are none."""
    settings = (getattr(args, k) for k in (*OPTIONS, "config") if k not in PLACES)
    return bool(args.set) or any(v is not None for v in settings)


def _card(request: Request, bundle: Bundle, model: str, options: dict) -> dict:
    """The card of a run with these settings; without weights for an outline."""
    inputs = {k: cards.file_hash(options[k]) for k in INPUTS if options[k] is not None}
    settings = job.options_of(request, bundle, model, options["video"], options["embeddings"])
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
    check_names(**{f"--{name.replace('_', '-')}": options[name] for name in FILES})
    if other := [c for c in args.set if not args.config and not c.startswith("defaults.")]:
        raise InputError(f"--set {other[0]}: without --config only defaults.KEY=VALUE can be set")
    changes = [c.removeprefix("defaults.") for c in args.set if c.startswith("defaults.")]
    options["defaults"] = lambda d: configs.changed(d, dict(loaded.get("defaults") or {}), changes)
    return options
