# SPDX-License-Identifier: Apache-2.0
"""A run with files: videos that grow clip by clip, a state saved after each clip, a card, and a
lock.

After clip i every video ends with it and the state says so; whatever a crash leaves behind that is
cut off and made again,
bit for bit.
"""

import base64
import dataclasses
import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvjax.core.errors import CheckpointError, InputError
from lvjax.io.video import FragmentedWriter
from lvjax.run import card as cards
from lvjax.run.bundle import Bundle, Defaults
from lvjax.run.session import Request, open_session
from lvjax.run.state import chain, load_meta, load_state, save_state, state_path


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


def options_of(request: Request, bundle: Bundle, model: str) -> dict[str, Any]:
    """A request as the JSON-able options of a card; the start frames become PNGs."""
    options = {
        k: getattr(request, k)
        for k in ("frames", "negative", "steps", "guidance", "seed", "method")
    }
    options["timelines"] = [[list(moment) for moment in row] for row in request.timelines]
    options["size"] = list(request.size or bundle.defaults.size)
    options["start"] = (
        None
        if request.start is None
        else [_png(f) for f in np.atleast_1d(request.start).reshape(-1, *options["size"], 3)]
    )
    return options | {"model": model, "defaults": dataclasses.asdict(bundle.defaults)}


def request_of(options: dict[str, Any]) -> Request:
    """The request that `options_of` wrote.

    Raises: CheckpointError when the options are not of this version.
    """
    try:
        rows = tuple(tuple((float(t), str(p)) for t, p in row) for row in options["timelines"])
        start = (
            None if options["start"] is None else np.stack([_unpng(x) for x in options["start"]])
        )
        plain = {
            k: options[k] for k in ("frames", "negative", "steps", "guidance", "seed", "method")
        }
        return Request(rows, size=tuple(options["size"]), start=start, **plain)
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"the run card is of another version of lvjax ({type(e).__name__}: {e})"
        ) from e


def defaults_of(options: dict[str, Any]) -> Defaults:
    names = {f.name for f in dataclasses.fields(Defaults)}
    return Defaults(
        **{
            k: tuple(v) if isinstance(v, list) else v
            for k, v in options["defaults"].items()
            if k in names
        }
    )


def with_defaults(bundle: Bundle, card: dict[str, Any]) -> Bundle:
    """The bundle with the defaults that a card was made with."""
    return dataclasses.replace(bundle, defaults=defaults_of(card["options"]))


def _png(frame: np.ndarray) -> str:
    """A start frame float32 [H, W, 3] in [-1, 1] as base64 PNG of its 8 bits."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.round((frame + 1) * 127.5).astype(np.uint8)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def _unpng(text: str) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(np.float32) / 127.5 - 1


def start(bundle: Bundle, request: Request, output, card: dict[str, Any]) -> tuple[str, ...]:
    """Create the state of a run that has made nothing yet; `proceed` makes the videos.

    From here on the run can be resumed.  Returns what the user should know about the request.
    """
    session = open_session(bundle, request)
    offsets = [None] * len(request.timelines)
    meta = {"card": card, "clip": 0, "frame": 0, "digest": "", "offsets": offsets}
    save_state(state_path(output), session.state, meta)
    cards.write_card(output, card)
    return session.notices


def frames_done(output) -> int:
    """Frames that an unfinished run has made."""
    return load_meta(state_path(output))["frame"]


def is_complete(output) -> bool:
    """Whether a run to `output` was finished: its card has the digest, and all its videos exist."""
    path = cards.card_path(output)
    if state_path(output).exists() or not path.is_file():
        return False
    card = cards.check_card(cards.read_json(path), path)
    videos = outputs(output, len(card["options"].get("timelines", [None])))
    return "latents" in card and all(p.exists() for p in videos)


def _writer(path, bundle: Bundle, request: Request, card, at) -> FragmentedWriter:
    height, width = request.size or bundle.defaults.size
    scale = bundle.defaults.upscale
    return FragmentedWriter(
        path, (width * scale, height * scale), bundle.defaults.fps, card, resume_at=at
    )


def saved_card(output) -> dict[str, Any] | None:
    """The card in the saved state of an unfinished run, or None when there is no state."""
    path = state_path(output)
    if not path.exists():
        return None
    meta = load_meta(path)
    if "card" not in meta:
        raise CheckpointError(
            f"{path} is not the state of a generate run; remove it to start again"
        )
    return cards.check_card(meta["card"], path)


def proceed(
    bundle: Bundle,
    output,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Progress]:
    """Make the remaining clips of the run whose state is beside `output`; one `Progress` per clip.

    stop: asked after each clip; the state is saved by then.
    The state file goes when the last clip is written.
    Raises: CheckpointError, StorageError, NonFiniteError; the clips before stay.
    """
    card = saved_card(output)
    if card is None:
        raise InputError(f"there is no unfinished run beside {output}; start one without --resume")
    bundle = with_defaults(bundle, card)
    request = request_of(card["options"])
    session = open_session(bundle, request)
    state, meta = load_state(state_path(output), session.state)
    paths = outputs(output, len(request.timelines))
    with ExitStack() as files:
        writers = [
            files.enter_context(_writer(p, bundle, request, card | {"row": i}, at))
            for i, (p, at) in enumerate(zip(paths, meta["offsets"], strict=True))
        ]
        for result in session.run(state, meta["clip"]):
            meta["offsets"] = [
                w.write_clip(enlarge(result.frames[i], bundle.defaults.upscale))
                for i, w in enumerate(writers)
            ]
            meta |= {
                "clip": result.clip + 1,
                "frame": meta["frame"] + result.frames.shape[1],
                "digest": chain(meta["digest"], result.latents),
            }
            save_state(state_path(output), result.state, meta)
            yield Progress(
                meta["clip"], session.num_clips, meta["frame"], session.frames, meta["digest"]
            )
            if stop() and meta["clip"] < session.num_clips:
                return
    cards.write_card(output, card | {"latents": meta["digest"]})
    state_path(output).unlink()


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel of [..., H, W, 3] factor x factor times."""
    return frames if factor == 1 else frames.repeat(factor, -3).repeat(factor, -2)
