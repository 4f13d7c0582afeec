# SPDX-License-Identifier: Apache-2.0
"""The ablations of "Towards Error-Free Long Video Generation" on the pocket world: cells, and how
they are run and kept.

A cell is the method with parts of it taken away.  Every cell makes the same timelines with the same
noise.  Each (cell, seed) that is done lies in the folder as its videos and the figures measured on
them; what is missing is made when the same settings come again.  Does not own: what is measured
(rows.py), what follows from it (report.py).
Source: arXiv:2606.22370, Tables 2 to 4.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lvjax.core.checkpoint import load_arrays, save_arrays, sealed, unsealed, write_atomic
from lvjax.core.errors import CheckpointError, InputError, NonFiniteError
from lvjax.data.clips import CLIP_FRAMES
from lvjax.data.world import CLIP_STRIDE, FPS, GIVEN, SIZE
from lvjax.io.fmp4 import boxes, fragment_info
from lvjax.io.video import FragmentedWriter
from lvjax.lab.object_metrics import Outlines, shape_outlines
from lvjax.lab.rows import WINDOWS, Part, measure_row, six_parts
from lvjax.lab.timelines import Timeline, draw_timelines
from lvjax.models.vae import decode, encode
from lvjax.rollout.condition import pixel_frames
from lvjax.run import card as cards
from lvjax.run.bundle import Bundle
from lvjax.run.defaults import ALLOWED
from lvjax.run.job import enlarge
from lvjax.run.request import Request, frame_count, resolved
from lvjax.run.session import open_session, to_uint8

FORMAT = "lvjax-lab/1"
SETTINGS, WORLD, REFERENCE = "settings.json", "world.safetensors", "reference"
SEED = 100  # the first sampling seed; thresholds and obedience used 0 and 1
UPSCALE = 2  # of the videos in the folder: H.264 halves the resolution of colour
MOST = 1000  # seeds, or timelines
BATCH = 12  # clips at a time through the autoencoder
NOT_MODELS = ("size", "window", "spill", "lookahead", "method", "upscale", "boundary", "impose")
"""Defaults of a model that decide no figure here: cells, or `sample`, set the first five; the sixth
is for showing videos, and the last two are of another method."""


@dataclass(frozen=True)
class Cell:
    """memory: whether earlier clips are remembered, or the clip before is all that there is.
    window: T-RFlow's; [0, 1] is the plain sampler.
    """

    memory: bool
    window: tuple[float, float]

    @property
    def words(self) -> str:
        """For people."""
        return f"{'memory' if self.memory else 'no memory'}, window {list(self.window)}"


CELLS = {
    "full": Cell(True, (0.3, 0.7)),
    "no_memory": Cell(False, (0.3, 0.7)),
    "no_trflow": Cell(True, (0.0, 1.0)),
    "baseline": Cell(False, (0.0, 1.0)),
    "low_window": Cell(True, (0.0, 0.7)),
}


@dataclass(frozen=True)
class Settings:
    """seconds: of every video.  seeds: how often each timeline is sampled.  timelines: how many.
    cells: names in `CELLS`.  steps: of the sampler, None for the model's own.  quick: whether it is
    the small version, which the report says.
    """

    seconds: float = 180
    seeds: int = 3
    timelines: int = 8
    cells: tuple[str, ...] = tuple(CELLS)
    steps: int | None = None
    quick: bool = False

    @property
    def frames(self) -> int:
        """Of every video."""
        return frame_count(self.seconds, FPS)


QUICK = Settings(seconds=36, seeds=1, timelines=4, quick=True)


class Run(NamedTuple):
    """One (cell, seed) of a folder."""

    cell: str
    seed: int

    def figures(self, folder: Path) -> Path:
        """Where what was measured lies; it is written last."""
        return folder / self.cell / f"seed-{self.seed}.json"

    def video(self, folder: Path, row: int) -> Path:
        """Where the video of a timeline lies."""
        return folder / self.cell / f"seed-{self.seed}-timeline-{row:02d}.mp4"


def runs(settings: Settings) -> list[Run]:
    """What there is to make, seed by seed, so that whatever is done can be compared."""
    seeds = range(SEED, SEED + settings.seeds)
    return [Run(cell, seed) for seed in seeds for cell in settings.cells]


def check(bundle: Bundle, settings: Settings) -> None:
    """Raises: InputError for settings that cannot be, or a model that does not fit the world."""
    unknown = [cell for cell in settings.cells if cell not in CELLS]
    if unknown or not settings.cells:
        raise InputError(f"the cell is {unknown[:1]}; give one or more of {', '.join(CELLS)}")
    for name in ("seeds", "timelines"):
        if not 1 <= getattr(settings, name) <= MOST:
            raise InputError(f"{name} is {getattr(settings, name)}; give a number from 1 to {MOST}")
    test, words = ALLOWED["steps"]
    if settings.steps is not None and not test(settings.steps):
        raise InputError(f"steps is {settings.steps}; give {words}")
    if settings.frames < 4 * WINDOWS:
        raise InputError(f"seconds is {settings.seconds:g}; give {4 * WINDOWS / FPS:g} or more")
    d = bundle.defaults
    found = pixel_frames(d.clip_latents), pixel_frames(d.overlap), d.fps
    if found != (CLIP_FRAMES, GIVEN, FPS):
        raise InputError(
            f"{bundle.name} makes clips of {found[0]} frames that share {found[1]}, at {found[2]} "
            f"frames/s; the pocket world has {CLIP_FRAMES}, {GIVEN} and {FPS}: give the pocket "
            "model, or one trained like it"
        )


def about(bundle: Bundle, settings: Settings) -> dict[str, Any]:
    """Everything that decides the figures of a folder, JSON-able: of the model's defaults all but
    `NOT_MODELS`.
    """
    d = dataclasses.asdict(bundle.defaults)
    own = {k: v for k, v in d.items() if k not in NOT_MODELS}
    return json.loads(
        json.dumps(
            {
                "format": FORMAT,
                **dataclasses.asdict(settings),
                "sampler": own | {"steps": settings.steps or d["steps"]},
                "model": bundle.name,
                "weights": bundle.hashes,
                "versions": cards.versions(),
            }
        )
    )


def claim(bundle: Bundle, settings: Settings, folder: Path) -> dict[str, Any]:
    """Keep the settings in the folder, or check that it was begun with them; returns `about`.

    More seeds may be asked for than before: the runs that there are stay as they are.
    Raises: InputError naming what differs; CheckpointError for a damaged file, or runs without one.
    """
    now, path = about(bundle, settings), folder / SETTINGS
    if not path.exists():
        if any((folder / name).exists() for name in (WORLD, REFERENCE, *CELLS)):
            raise CheckpointError(
                f"{folder} holds runs, but no {SETTINGS} that says of what; give another --folder"
            )
    else:
        before = _read(path)
        if before.get("seeds", 0) > now["seeds"]:
            raise InputError(_other(folder, "seeds", before["seeds"], now["seeds"]))
        for name in now:
            if name != "seeds" and before.get(name) != now[name]:
                raise InputError(_other(folder, name, before.get(name), now[name]))
    write_atomic(path, sealed(now))
    return now


def _other(folder: Path, name: str, old, new) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        name, old, new = next(
            (f"{name}.{k}", old.get(k), new.get(k))
            for k in sorted(old.keys() | new.keys())
            if old.get(k) != new.get(k)
        )
    return (
        f"{folder} holds runs with other settings: {name} was {old}, is {new}; give those that it "
        "was begun with, or another --folder"
    )


def _read(path: Path) -> dict[str, Any]:
    """Raises: CheckpointError for a file that is no JSON object, or does not match its checksum."""
    try:
        return unsealed(path)
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{path} cannot be read ({type(e).__name__}); "
            + ("give another --folder" if path.name == SETTINGS else "remove it to make it again")
        ) from e


def settings_of(about: dict[str, Any]) -> Settings:
    """The settings that `about` was made of.

    Raises: KeyError, TypeError for what is no such thing.
    """
    chosen = {f.name: about[f.name] for f in dataclasses.fields(Settings)}
    numbers = type(chosen["seeds"]), type(chosen["timelines"]), type(chosen["seconds"])
    if numbers not in ((int, int, int), (int, int, float)) or not set(chosen["cells"]) <= set(
        CELLS
    ):
        raise TypeError("other types than `Settings` has")
    return Settings(**chosen | {"cells": tuple(chosen["cells"])})


def settings_in(folder: Path) -> Settings:
    """The settings that a folder was begun with.

    Raises: CheckpointError for a file that is damaged, or of another version.
    """
    path = folder / SETTINGS
    try:
        return settings_of(_read(path))
    except (KeyError, TypeError) as e:
        raise CheckpointError(f"{path} is of another version of lvjax; start another folder") from e


def is_done(folder: Path, run: Run, settings: Settings) -> bool:
    """Whether a run is there as a whole: its figures, and videos that are not cut off."""
    videos = [run.video(folder, i) for i in range(settings.timelines)]
    return run.figures(folder).is_file() and all(_frames(p) == settings.frames for p in videos)


def _frames(path: Path) -> int:
    """How many frames a video has that `_keep` wrote; 0 without it, or when it is cut off."""
    if not path.is_file():
        return 0
    with open(path, "rb") as f:
        parts = list(boxes(f, 0, path.stat().st_size))
        if [kind for kind, _, _ in parts[-2:]] != ["moof", "mdat"]:
            return 0
        f.seek(parts[-2][1])
        return fragment_info(f.read(parts[-2][2] - parts[-2][1]))[2]


def rows_of(folder: Path, run: Run, settings: Settings) -> list[dict]:
    """What was measured on each timeline; see `measure_row`.

    Raises: CheckpointError when the file is damaged, or of other timelines.
    """
    path = run.figures(folder)
    found = _read(path).get("rows")
    if not isinstance(found, list) or len(found) != settings.timelines:
        raise CheckpointError(f"{path} is not of {settings.timelines} timelines; remove it")
    if not all(isinstance(row, dict) and _is_row(**row) for row in found):
        raise CheckpointError(f"{path} lacks figures; remove it to make it again")
    return found


def _is_row(whole=None, windows=None, **others) -> bool:
    """Whether this has the form of what `measure_row` gives."""
    parts = [whole, *windows] if isinstance(windows, list) else []
    return len(parts) == 1 + WINDOWS and all(isinstance(part, dict) for part in parts)


def run_cells(
    bundle: Bundle,
    settings: Settings,
    folder: Path,
    report: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Make every run that is not there; whether all are.

    stop: asked after each clip; the run in hand is given up then.
    Raises: NonFiniteError naming the run; CheckpointError; StorageError.
    """
    missing = [r for r in runs(settings) if not is_done(folder, r, settings)]
    reference = Run(REFERENCE, 0)
    if not missing and is_done(folder, reference, settings):
        return True
    timelines = draw_timelines(settings.timelines, settings.frames)
    through = autoencoder(bundle)
    report("the world's own videos through the autoencoder")
    world = world_videos(folder, timelines, through)
    truth, outlines = [six_parts(video) for video in world], shape_outlines(through)
    if not is_done(folder, reference, settings):
        _keep(folder, reference, timelines, world, _rows(truth, truth, timelines, outlines))
    for number, run in enumerate(missing):
        if stop():
            return False
        began, parts = time.monotonic(), []
        clips = sample(bundle, CELLS[run.cell], run.seed, timelines, settings.steps)
        for frames in _finite(run, clips):
            parts.append(frames)
            done, all_frames = sum(p.shape[1] for p in parts), timelines[0].frames
            rate = len(timelines) * done / (time.monotonic() - began)
            report(
                f"{run.cell}, seed {run.seed} ({number + 1}/{len(missing)}): "
                f"{done}/{all_frames} frames of {len(timelines)} videos, {rate:.1f} frames/s"
            )
            if stop():
                return False
        videos = np.concatenate(parts, axis=1)
        rows = _rows([six_parts(video) for video in videos], truth, timelines, outlines)
        _keep(folder, run, timelines, videos, rows)
    return True


def _finite(run: Run, clips: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    try:
        yield from clips
    except NonFiniteError as e:
        raise NonFiniteError(
            f"the model's videos of {run.cell}, seed {run.seed}, are not finite; the runs that are "
            "done are kept; give another --model, and another --folder"
        ) from e


def sample(
    bundle: Bundle, cell: Cell, seed: int, timelines: list[Timeline], steps: int | None = None
) -> Iterator[np.ndarray]:
    """The videos of a cell clip by clip, one row per timeline: uint8 [B, P, SIZE, SIZE, 3].

    Memory is placed by the whole timeline: the paper keeps every clip, the bank those that a later
    one will want.  Without memory the bank holds the clip being made alone.
    """
    d = bundle.defaults
    capacity = d.capacity if cell.memory else 1
    chosen = dataclasses.replace(
        d, window=cell.window, capacity=capacity, lookahead=True, spill=False
    )
    request = Request(
        tuple(t.moments for t in timelines),
        timelines[0].frames,
        start=np.stack([t.start[None] for t in timelines]).astype(np.float32) / 127.5 - 1,
        size=(SIZE, SIZE),
        steps=steps,
        seed=seed,
        method="error_free",
    )
    bundle = dataclasses.replace(bundle, defaults=chosen)
    for clip in open_session(bundle, resolved(bundle, request)).run():
        yield clip.frames


def autoencoder(bundle: Bundle) -> Callable[[np.ndarray], np.ndarray]:
    """A function that passes clips uint8 [n, P, H, W, 3] through the model's autoencoder."""

    @jax.jit
    def both(params, frames):
        return to_uint8(decode(params, encode(params, frames, bundle.vae), bundle.vae))

    def through(clips: np.ndarray) -> np.ndarray:
        out = []
        for i in range(0, len(clips), BATCH):
            part = clips[i : i + BATCH].astype(np.float32) / 127.5 - 1
            full = np.resize(part, (BATCH, *part.shape[1:]))  # one program for every number
            out.append(np.asarray(both(bundle.params["vae"], full))[: len(part)])
        return np.concatenate(out)

    return through


def world_videos(
    folder: Path, timelines: list[Timeline], through: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """What the world shows, clip by clip through the autoencoder as a model's clips come out of
    it: uint8 [B, P, SIZE, SIZE, 3].  Kept in the folder.

    Raises: CheckpointError when what is kept there is damaged; StorageError.
    """
    path, frames = folder / WORLD, timelines[0].frames
    if path.exists():
        try:
            return load_arrays(path)[0]["frames"]
        except (CheckpointError, KeyError) as e:
            raise CheckpointError(f"{path} is damaged; remove it to make it again") from e
    made = []
    for timeline in timelines:
        clips = 1 + max(0, -(-(frames - CLIP_FRAMES) // CLIP_STRIDE))
        whole = timeline.video.frames(0, CLIP_STRIDE * clips + GIVEN)
        starts = CLIP_STRIDE * np.arange(clips)
        parts = through(np.stack([whole[s : s + CLIP_FRAMES] for s in starts]))
        new = parts[1:, GIVEN:].reshape(-1, *parts.shape[2:])
        made.append(np.concatenate([parts[0], new])[:frames])
    save_arrays(path, {"frames": np.stack(made)})
    return np.stack(made)


def _rows(
    videos: list[list[Part]], truth: list[list[Part]], timelines: list[Timeline], outlines: Outlines
) -> list[dict]:
    both = zip(videos, truth, timelines, strict=True)
    return [measure_row(parts, own, t.gone, outlines) for parts, own, t in both]


def _keep(
    folder: Path, run: Run, timelines: list[Timeline], videos: np.ndarray, rows: list[dict]
) -> None:
    """Write the videos of a run, and then the figures."""
    run.figures(folder).parent.mkdir(parents=True, exist_ok=True)
    for i, (video, t) in enumerate(zip(videos, timelines, strict=True)):
        card = {"format": FORMAT, "cell": run.cell, "seed": run.seed, "timeline": t.moments}
        size = (SIZE * UPSCALE, SIZE * UPSCALE)
        with FragmentedWriter(run.video(folder, i), size, FPS, card) as writer:
            writer.write_clip(enlarge(video, UPSCALE))
    write_atomic(run.figures(folder), sealed({"format": FORMAT, "rows": rows}))
