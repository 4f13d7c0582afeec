# SPDX-License-Identifier: Apache-2.0
"""A run with files: videos that grow clip by clip, a state saved after each clip, a card, and a
lock.

After clip i every video ends with it and the state says so; whatever a crash leaves behind that is
cut off and made again, bit for bit.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvjax.core.checkpoint import load_meta
from lvjax.core.errors import CheckpointError, InputError
from lvjax.io.video import FragmentedWriter
from lvjax.run import card as cards
from lvjax.run import pictures, selection
from lvjax.run.adapters import for_card
from lvjax.run.bundle import Bundle, typed
from lvjax.run.defaults import Defaults
from lvjax.run.request import Request
from lvjax.run.session import ClipResult, Session, check_request, open_session
from lvjax.run.spill import ClipFiles, check_place, clips_path
from lvjax.run.state import chain, load_start, load_state, save_state, state_path

PLAIN = {
    "frames": int,
    "negative": str | None,
    "steps": int | None,
    "guidance": int | float | tuple | None,
    "seed": int,
    "method": str | None,
    "strength": int | float | None,
}
"""Fields of a request that a card holds as they are, and their types."""

PICTURES = ("start", "last")
"""Fields of a request that a card holds as PNGs, or names."""

LATER = ("last", "strength")
"""Fields that older cards do not have, None there."""

META = {"card": dict, "clip": int, "frame": int, "digest": str, "offsets": list}
"""What the state of a run holds beside its arrays, and the types."""


@dataclass(frozen=True)
class Progress:
    """After a clip: clips and frames done and in all, and the digest of all latents so far."""

    clip: int
    clips: int
    frame: int
    frames: int
    digest: str


def outputs(output, rows: int) -> list[Path]:
    """The file of each row of the batch: the output itself, or name-000.mp4, name-001.mp4, …"""
    output = Path(output)
    return (
        [output]
        if rows == 1
        else [output.with_name(f"{output.stem}-{i:03d}{output.suffix}") for i in range(rows)]
    )


def videos(output) -> list[Path]:
    """The files of the run whose card is beside `output`.

    Raises: CheckpointError when there is no such card.
    """
    path = cards.card_path(output)
    card = cards.check_card(cards.read_json(path), path)
    return outputs(output, len(request_of(card["options"]).timelines))


def begun_videos(output) -> list[Path]:
    """The files of the unfinished run whose state is beside `output`.

    Raises: CheckpointError when it is not the state of such a run.
    """
    return outputs(output, len(request_of(_meta(output)["card"]["options"]).timelines))


def made_before(output) -> list[Path]:
    """The files of the run whose card is beside `output`, none where there is no readable card."""
    try:
        return videos(output)
    except CheckpointError:
        return []


def options_of(
    request: Request,
    bundle: Bundle,
    model: str,
    video: str | None = None,
    embeddings: str | None = None,
) -> dict[str, Any]:
    """A request as the JSON-able options of a card.

    model, video, embeddings: where the files of the run are.  Start frames become PNGs; those of a
    long video are only named, and the state holds them.
    """
    options = {k: getattr(request, k) for k in PLAIN}
    options["timelines"] = [[list(moment) for moment in row] for row in request.timelines]
    options["size"] = list(request.size or bundle.defaults.size)
    options["start"] = pictures.to_card(request.start, video)
    options["last"] = pictures.to_card(request.last)
    own = {"model": model, "defaults": dataclasses.asdict(bundle.defaults)}
    own["embeddings"] = None if embeddings is None else str(Path(embeddings).resolve())
    adapted = for_card(bundle.loras, bundle.merged) | selection.for_card(bundle.sentence)
    return options | own | adapted


def request_of(options: dict[str, Any]) -> Request:
    """The request that `options_of` wrote; with start frames that are only named it has their shape
    alone, until `with_start`.

    Raises: CheckpointError when the options are not of this version.
    """
    options = dict.fromkeys(LATER) | options
    try:
        rows = tuple(tuple((float(t), str(p)) for t, p in row) for row in options["timelines"])
        frames = {k: pictures.from_card(options[k]) for k in PICTURES}
        plain = {k: options[k] for k in PLAIN}
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
        if wrong := [k for k in PLAIN if not isinstance(plain[k], PLAIN[k])]:
            raise TypeError(f"{wrong[0]} is {plain[wrong[0]]!r}")
        height, width = map(int, options["size"])
        return Request(rows, size=(height, width), **frames, **plain)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, OSError) as e:
        raise _of_another_version(e) from e


def embeddings_of(options: dict[str, Any]) -> str | None:
    """The file of embeddings that a run was begun with; older cards name none.

    Raises: CheckpointError when it is not of this version.
    """
    path = options.get("embeddings")
    if not isinstance(path, str | None):
        raise _of_another_version(TypeError(f"embeddings is {path!r}"))
    return path


def is_older(options: dict[str, Any]) -> bool:
    """Whether a card is from before it could ask for Wan's models and for LoRAs."""
    return not options.keys() >= set(LATER)


def named_video(options: dict[str, Any]) -> str | None:
    """The video whose frames a card only names, None where the card has them or there are none."""
    start = options.get("start")
    return start["video"] if isinstance(start, dict) else None


def with_start(request: Request, options: dict[str, Any], bits: np.ndarray, source) -> Request:
    """The request of a card with the start frames that the card only names, uint8 from `source`.

    Raises: CheckpointError when they are not those.
    """
    pictures.check(bits, options["start"], source)
    return dataclasses.replace(request, start=pictures.as_frames(bits))


def defaults_of(options: dict[str, Any]) -> Defaults:
    """The defaults that `options_of` wrote; fields added since then have their default.

    Raises: CheckpointError when there are none, or not of this version.
    """
    names = {f.name for f in dataclasses.fields(Defaults)}
    try:
        given = {k: v for k, v in options["defaults"].items() if k in names}
        return Defaults(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except (KeyError, TypeError, AttributeError, InputError) as e:
        raise _of_another_version(e) from e


def _of_another_version(e: Exception) -> CheckpointError:
    what = f"no {e}" if isinstance(e, KeyError) else f"{type(e).__name__}: {e}"
    return CheckpointError(
        f"the run card is of another version of lvjax ({what}); start again with the settings "
        "written out"
    )


def with_defaults(bundle: Bundle, card: dict[str, Any]) -> Bundle:
    """The bundle, or its outline, with the defaults that a card was made with.

    Raises: CheckpointError when the card has none.
    """
    return typed(dataclasses.replace(bundle, defaults=defaults_of(_options(card))), None)


def _options(card: dict[str, Any]) -> dict[str, Any]:
    """The options of a card, whatever was given as one."""
    return cards.check_card(card, "the card")["options"]


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a run resumed with the settings of card `now` is the run of card `saved`.

    Compared is what will be used: a setting left out counts as the default that it stands for.
    Raises: InputError naming what differs and what to do; CheckpointError for a card that lacks
    settings.
    """
    old, new = (_settings(_options(card)) for card in (saved, now))
    changed = [_change(k, old[k], new[k]) for k in old if old[k] != new[k]]
    if changed:
        raise InputError(
            f"the unfinished run has other settings: {'; '.join(changed)}; resume with the same "
            "settings or with --out alone, or start again with --overwrite or another --out"
        )


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """Everything that makes the video, by the name to show, in a form that compares."""
    request = request_of(options)
    defaults = dataclasses.asdict(defaults_of(options))
    sampler = {k: defaults.pop(k) for k in ("steps", "guidance", "method", "negative")}
    del defaults["size"]  # a card has the size used
    settings = {"prompts": request.timelines}
    settings |= {f"{name} frames": pictures.identity(options.get(name)) for name in PICTURES}
    settings |= {k: getattr(request, k) for k in ("size", *PLAIN)}
    settings |= {k: sampler[k] for k in sampler if settings[k] is None}
    return settings | {f"defaults.{k}": v for k, v in defaults.items()}


def _change(name: str, old, new) -> str:
    was, now = (v if len(v := repr(x)) <= 60 else f"{v[:57]}..." for x in (old, new))
    if name.endswith(" frames") or was == now:  # too long to show
        return f"{name} differ"
    return f"{name} was {was}, is {now}"


def start(bundle: Bundle, request: Request, output, card: dict[str, Any]) -> tuple[str, ...]:
    """Save the state of a run that has made nothing yet; `proceed` makes the card and the videos.

    From here on the run can be resumed: its first state follows from the card, so none is saved.
    Returns what the user should know about the request.
    Raises: InputError with the nearest legal values; StorageError.
    """
    if bundle.defaults.spill:
        check_place(output)
    notices = check_request(bundle, request)
    offsets = [None] * len(request.timelines)
    meta = {"card": card, "clip": 0, "frame": 0, "digest": "", "offsets": offsets}
    named = named_video(card["options"]) is not None
    save_state(state_path(output), {}, meta, pictures.as_bits(request.start) if named else None)
    return notices


def position(output) -> tuple[int, int]:
    """Clips and frames that an unfinished run has made.

    Raises: CheckpointError when the state beside `output` is not that of such a run.
    """
    meta = _meta(output)
    return meta["clip"], meta["frame"]


def is_complete(output) -> bool:
    """Whether a run to `output` was finished: its card has the digest, and all its videos exist.

    Raises: CheckpointError when the card cannot be read.
    """
    path = cards.card_path(output)
    if state_path(output).exists() or not path.is_file():
        return False
    return "latents" in cards.read_json(path) and all(p.exists() for p in videos(output))


def _writer(path, bundle: Bundle, request: Request, card, at) -> FragmentedWriter:
    height, width = request.size or bundle.defaults.size
    scale = bundle.defaults.upscale
    return FragmentedWriter(
        path, (width * scale, height * scale), bundle.defaults.fps, card, resume_at=at
    )


def saved_card(output) -> dict[str, Any] | None:
    """The card in the saved state of an unfinished run, or None when there is no state."""
    return _meta(output)["card"] if state_path(output).exists() else None


def _meta(output) -> dict[str, Any]:
    """The meta of a saved state.

    Raises: CheckpointError when the file is damaged, or is not of a generate run.
    """
    path = state_path(output)
    meta = load_meta(path)
    right = meta.keys() >= META.keys() and all(isinstance(meta[k], t) for k, t in META.items())
    if not right:
        raise CheckpointError(
            f"{path} is not the state of a generate run; remove it to start again"
        )
    cards.check_card(meta["card"], path)
    return meta


def proceed(bundle: Bundle, output, stop: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
    """Make the remaining clips of the run whose state is beside `output`; one `Progress` per clip.

    stop: asked after each clip; the state is saved by then.
    The state file goes when the last clip is written.
    Raises: InputError when no state is there; CheckpointError, StorageError, NonFiniteError; the
    clips before stay.
    """
    if not state_path(output).exists():
        raise InputError(f"there is no unfinished run beside {output}; start one without --resume")
    meta = _meta(output)
    card = meta["card"]
    bundle = with_defaults(bundle, card)
    request, begun = request_of(card["options"]), None
    if named_video(card["options"]) is not None:
        begun = load_start(state_path(output))
        request = with_start(request, card["options"], begun, state_path(output))
    session = open_session(bundle, request)
    _check_position(meta, session, state_path(output))
    cards.write_card(output, card)  # it may be gone, or of the run that was here before
    outside = clip_files(output, card)
    if meta["clip"] == 0:
        outside.clear()  # those of a run that was here before
    clips = _remaining(session, output, meta["clip"], outside)
    paths = outputs(output, len(request.timelines))
    with ExitStack() as files:
        writers = [
            files.enter_context(_writer(p, bundle, request, card | {"row": i}, at))
            for i, (p, at) in enumerate(zip(paths, meta["offsets"], strict=True))
        ]
        for result in clips:
            meta["offsets"] = [
                w.write_clip(enlarge(result.frames[i], bundle.defaults.upscale))
                for i, w in enumerate(writers)
            ]
            meta |= {
                "clip": result.clip + 1,
                "frame": meta["frame"] + result.frames.shape[1],
                "digest": chain(meta["digest"], result.latents),
            }
            save_state(state_path(output), result.state, meta, begun)
            yield Progress(
                meta["clip"], session.num_clips, meta["frame"], session.frames, meta["digest"]
            )
            if stop() and meta["clip"] < session.num_clips:
                return
    cards.write_card(output, card | {"latents": meta["digest"]})
    outside.clear()
    state_path(output).unlink()


def clip_files(output, card: dict[str, Any]) -> ClipFiles:
    """Where clips go that leave the memory of the run with this card."""
    return ClipFiles(clips_path(output), cards.identity(card))


def _check_position(meta: dict[str, Any], session: Session, path) -> None:
    """Raises: CheckpointError when a state's position is not one of this run."""
    clip, offsets = meta["clip"], meta["offsets"]
    kind = int if clip else type(None)
    if not (
        0 <= clip <= session.num_clips
        and meta["frame"] == session.cuts.begin(clip)
        and len(offsets) == len(session.keys)
        and all(isinstance(at, kind) for at in offsets)
    ):
        raise CheckpointError(
            f"{path} is at clip {clip}, frame {meta['frame']}, where this run is never; remove it "
            "to start again"
        )


def _remaining(session: Session, output, clip: int, files: ClipFiles) -> Iterator[ClipResult]:
    """The clips from number `clip` on, from the saved state; there is none before clip 0."""
    if clip == 0:
        return session.run(files=files)
    state, _ = load_state(state_path(output), session.abstract_state(), session.place)
    return session.run(state, clip, files)


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel of [..., H, W, 3] factor x factor times."""
    return frames if factor == 1 else frames.repeat(factor, -3).repeat(factor, -2)
