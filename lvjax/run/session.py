# SPDX-License-Identifier: Apache-2.0
"""From a request to clips: prompts over time, frame counts, the method, its first state, and the
clips in order.

This is what `lvjax.generate`, `lvjax.stream` and the command line share.  It computes; files are
elsewhere.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lvjax.core.errors import InputError, NonFiniteError
from lvjax.core.mesh import make_mesh
from lvjax.data.prompts import encode
from lvjax.flow.schedule import make_schedule
from lvjax.memory.placement import init_bank, place_rows, plan_rows
from lvjax.methods import METHODS, ErrorFree
from lvjax.models.dit import embed_context
from lvjax.models.pocket_text import encode_text
from lvjax.models.vae import encode as encode_video
from lvjax.rollout.clipwise import (
    MASK,
    Clip,
    first_condition,
    given_frames,
    pixel_frames,
    shard_state,
)
from lvjax.rollout.method import Method, stream
from lvjax.run.bundle import Bundle, Defaults
from lvjax.run.timeline import Cuts, notices

MAX_FRAMES = 10_000_000
MAX_SIDE = 16384  # of an encoded picture

_encode_video = jax.jit(encode_video, static_argnums=2)


@dataclass(frozen=True)
class Request:
    """One run.  Fields left None take the bundle's defaults.

    timelines: per row of the batch, ((seconds, prompt), ...) in order, the first at 0; see
      `run.timeline`.  negative: one prompt for all rows.
    start: None, an image float32 [H, W, 3] or the last frames of a video [P, H, W, 3], in [-1, 1],
      of the run's size; with [B, P, H, W, 3] each row has its own.
    frames: pixel frames of the result, 1 + 4m.  seed: row b of clip i draws from
      fold_in(fold_in(key(seed), b), i).
    """

    timelines: tuple[tuple[tuple[float, str], ...], ...]
    frames: int
    negative: str = ""
    start: Any = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    method: str = "error_free"


class ClipResult(NamedTuple):
    """clip: its number.  latents float32 [B, T, h, w, z].  frames uint8 [B, n, H, W, 3], only those
    that are new.  state: after the clip.
    """

    clip: int
    latents: jax.Array
    frames: np.ndarray
    state: Any


@dataclass(frozen=True)
class Session:
    """A run ready to go; it holds no state, so that it can be run any number of times.

    init: keys -> the first state.  keys: typed, [B].  mesh: the devices of a state.
    clips(start): the `Clip` inputs from number `start` on, in order, each made when it is asked
      for.  The bank of the clips before is replayed on the host, about 0.2 ms per clip and row.
    cuts: which frames each clip shows.  skip_first, overlap_frames: pixel frames that clip 0, and
      every later clip, was given and does not show.
    """

    method: Method
    init: Callable[[jax.Array], Any]
    keys: jax.Array
    mesh: jax.sharding.Mesh
    clips: Callable[[int], Iterator[Clip]]
    cuts: Cuts
    skip_first: int
    overlap_frames: int
    notices: tuple[str, ...] = ()

    @property
    def num_clips(self) -> int:
        """Clips in all."""
        return self.cuts.clips

    @property
    def frames(self) -> int:
        """Pixel frames in all."""
        return self.cuts.frames

    def state(self):
        """A new first state; a run takes it for its own (it is donated)."""
        return self.place(self.init(self.keys))

    def abstract_state(self):
        """The shapes and types of a state, without making one."""
        return jax.eval_shape(self.init, self.keys)

    def place(self, state):
        """A state, from the host for instance, laid out over the devices."""
        return shard_state(state, self.mesh)

    def run(self, state=None, start: int = 0) -> Iterator[ClipResult]:
        """Yield clips from number `start` on.

        state: what the clip before `start` left, laid out by `place`, or None for a new first
        state.  A state is donated to the next clip.
        Raises: NonFiniteError naming the clip and the tensor.
        """
        first = self.state() if state is None else state
        made = stream(self.method, first, self.clips(start))
        del first, state  # nothing here outlives its clip
        shown = self.cuts.begin(start)
        for i, (new, (latents, frames)) in enumerate(made, start):
            _check_finite(latents, frames, i)
            frames = frames[:, self.skip_first if i == 0 else self.overlap_frames :]
            frames = frames[:, : self.frames - shown]
            shown += frames.shape[1]
            yield ClipResult(i, latents, np.asarray(to_uint8(frames)), new)

    def with_key(self, key) -> "Session":
        """The same run with the noise of a typed key instead of the request's seed."""
        return dataclasses.replace(self, keys=row_keys(key, len(self.keys)))


def row_keys(key, batch: int):
    """One typed key per row of a batch [B]; row b does not depend on the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


@jax.jit
def to_uint8(frames):
    """Frames in [-1, 1] to uint8."""
    return jnp.round((jnp.clip(frames, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def _check_finite(latents, frames, clip: int) -> None:
    for name, after, x in (("latents", "sampling", latents), ("frames", "decoding", frames)):
        bad = ~np.isfinite(np.asarray(x)).reshape(len(x), -1).all(1)
        if bad.any():
            raise NonFiniteError(
                f"{name} of clip {clip} are not finite after {after} (row {int(bad.argmax())}); "
                "the clips before it are kept; try another seed, fewer steps or less guidance"
            )


def frame_count(seconds: float, fps: int) -> int:
    """1 + 4·round(seconds·fps / 4): the frames that F latent frames give.

    Raises: InputError unless seconds is a positive finite number.
    """
    if not 0 < seconds <= MAX_FRAMES / fps:  # false for NaN
        raise InputError(f"seconds is {seconds}; give a positive number up to {MAX_FRAMES / fps:g}")
    return check_frames(1 + MASK * round(seconds * fps / MASK))


def check_frames(frames: int) -> int:
    """Raises: InputError naming the two nearest counts of the form 1 + 4m."""
    if frames < 1 or frames > MAX_FRAMES or (frames - 1) % MASK:
        near = min(frames, MAX_FRAMES - MASK)
        below = max(1, near - (near - 1) % MASK)
        raise InputError(
            f"frames is {frames}; it must be 1 + 4m, at most {MAX_FRAMES}: the nearest are "
            f"{below} and {below + MASK}"
        )
    return frames


def given_of(defaults: Defaults, start) -> int:
    """Pixel frames of a request's start that its first clip is given."""
    shape = np.shape(start)  # [H, W, 3], [P, H, W, 3], [B, P, H, W, 3]
    available = 0 if start is None else ((1,) * (5 - len(shape)) + shape)[1]
    return given_frames(available, defaults.overlap)


def cuts(defaults: Defaults, request: Request) -> Cuts:
    """The clips of the videos of a request; the first shows the last of the frames it is given."""
    clip, shared = pixel_frames(defaults.clip_latents), pixel_frames(defaults.overlap)
    given = given_of(defaults, request.start)
    return Cuts(request.frames, clip - max(given - 1, 0), clip - shared, defaults.fps)


def check_size(size: tuple[int, int], bundle: Bundle) -> tuple[int, int]:
    """Raises: InputError naming the two nearest sides that the model can make."""
    unit = bundle.vae.spatial_stride * bundle.dit.patch[1]
    for name, n in zip(("height", "width"), size, strict=True):
        if n > MAX_SIDE:
            raise InputError(f"{name} is {n}; a picture of a video has at most {MAX_SIDE}")
        if n < unit or n % unit:
            below = max(unit, n - n % unit)
            raise InputError(
                f"{name} is {n}; it must be a multiple of {unit}: the nearest are {below} and "
                f"{below + unit}"
            )
    return size


def spread(prompts: list[str], frames: int, fps: int) -> tuple[tuple[float, str], ...]:
    """Prompts at equal distances over the video."""
    duration = (frames - 1) / fps
    return tuple((duration * i / len(prompts), p) for i, p in enumerate(prompts))


def check_timeline(timeline) -> None:
    """Raises: InputError for an empty timeline or prompt, a first time other than 0, or times that
    do not increase.
    """
    if not timeline:
        raise InputError(
            "no prompt is given; give at least one, for example --prompt 'the camera pans left'"
        )
    times = [t for t, _ in timeline]
    if not all(isinstance(p, str) and p.strip() for _, p in timeline):
        raise InputError("a prompt is empty; say what happens, for example 'a red circle moves up'")
    if (
        times[0] != 0
        or not all(math.isfinite(t) for t in times)
        or any(a >= b for a, b in zip(times, times[1:], strict=False))
    ):
        raise InputError(f"prompt times are {times}; they must start at 0 and increase")


def open_session(bundle: Bundle, request: Request) -> Session:
    """Check the request against the model and prepare everything up to the first clip; the weights
    go to the devices, everything else is made when the session runs.

    Raises: InputError with the nearest legal values.
    """
    mesh = data_mesh(len(request.timelines))
    params = jax.device_put(bundle.params, NamedSharding(mesh, PartitionSpec()))
    return _session(dataclasses.replace(bundle, params=params), request, mesh)


def check_request(bundle: Bundle, request: Request) -> tuple[str, ...]:
    """The checks of `open_session`, alone; returns its notices.

    Raises: InputError with the nearest legal values.
    """
    return _session(bundle, request, data_mesh(len(request.timelines))).notices


def check_settings(outline: Bundle, request: Request) -> None:
    """The checks of `open_session` that need no weights.

    Raises: InputError with the nearest legal values.
    """
    for timeline in request.timelines or ((),):
        check_timeline(timeline)
    check_frames(request.frames)
    size = check_size(request.size or outline.defaults.size, outline)
    if type(request.seed) is not int or not 0 <= request.seed < 2**32:
        raise InputError(f"seed is {request.seed!r}; give a number from 0 to {2**32 - 1}")
    _settings(outline.defaults, request)
    _start(outline.defaults, request, size, len(request.timelines))


def _session(bundle: Bundle, request: Request, mesh) -> Session:
    """A session for weights where they are."""
    check_settings(bundle, request)
    d, batch = bundle.defaults, len(request.timelines)
    size = tuple(request.size or d.size)
    settings = _settings(d, request)
    method = METHODS[request.method](bundle.params, bundle.dit, bundle.vae, settings)
    given, source = given_of(d, request.start), _start(d, request, size, batch)
    stride = bundle.vae.spatial_stride
    latents = (batch, d.clip_latents, size[0] // stride, size[1] // stride, bundle.vae.z)

    def init(keys):
        condition = first_condition(
            lambda video: _encode_video(bundle.params["vae"], video, bundle.vae),
            source,
            latents,
            fill="latent" if source is None and d.fill == "pixel" else d.fill,
            overlap=d.overlap,
        )
        return method.init(condition, keys)

    parts = cuts(d, request)
    session = Session(
        method,
        init,
        row_keys(jax.random.key(request.seed), batch),
        mesh,
        partial(_clips, bundle, request, parts, mesh, settings.guidance is not None),
        parts,
        max(given - 1, 0),
        pixel_frames(d.overlap),
        notices(request.timelines, request.negative, parts),
    )
    session.abstract_state()  # what does not fit together says so here
    return session


def _settings(d: Defaults, request: Request) -> ErrorFree:
    """The method's settings.  Raises: InputError for a method, steps or guidance that cannot be."""
    if request.method not in METHODS:
        raise InputError(f"method {request.method!r} is unknown; choose one of {sorted(METHODS)}")
    steps = d.steps if request.steps is None else request.steps
    guidance = d.guidance if request.guidance is None else request.guidance
    if not 1 <= steps <= 1000 or not (math.isfinite(guidance) and 0 <= guidance <= 100):
        raise InputError(
            f"steps is {steps}, guidance {guidance}; allowed are 1 to 1000 steps and a guidance "
            "from 0 to 100"
        )
    return ErrorFree(
        schedule=make_schedule(steps, d.shift, d.solver),
        solver=d.solver,
        guidance=None if guidance == 1 else guidance,
        window=d.window,
        capacity=d.capacity,
        layers=d.layers,
        overlap=d.overlap,
        positions=d.positions,
        fill=d.fill,
    )


def data_mesh(batch: int):
    """A mesh over as many devices as divide the batch: the rows are spread over `data`, the rest is
    on every device.
    """
    return make_mesh(data=max(n for n in range(1, jax.device_count() + 1) if batch % n == 0))


def _start(d: Defaults, request: Request, size: tuple[int, int], batch: int):
    """The frames that the first clip is given, float32 [B, P, H, W, 3] on the host, or None."""
    if request.start is None:
        return None
    start = np.asarray(request.start, np.float32)
    start = start.reshape((1,) * (5 - start.ndim) + start.shape)
    if start.shape[2:4] != size:
        raise InputError(
            f"the start picture is {start.shape[3]}x{start.shape[2]}, the video "
            f"{size[1]}x{size[0]}; fit it first"
        )
    if start.shape[0] not in (1, batch):
        raise InputError(f"{start.shape[0]} starts are given for {batch} videos; give one or all")
    given = given_of(d, start)
    return np.broadcast_to(start[:, -given:], (batch, given, *start.shape[2:]))


def _clips(
    bundle: Bundle, request: Request, parts: Cuts, mesh, guided: bool, start: int = 0
) -> Iterator[Clip]:
    """Clip inputs from number `start` on; guided: with the negative prompt.

    The bank of each row is placed by its own prompts, those of the clips before `start` again; a
    later prompt changes nothing here unless the defaults ask for lookahead.
    """
    d, text = bundle.defaults, bundle.text
    negative = encode(request.negative).ids

    def prompts(i: int) -> tuple[str, ...]:
        return tuple(parts.prompt(row, i) for row in request.timelines)

    @lru_cache(maxsize=1)
    def context(texts: tuple[str, ...]):
        ids = [encode(p).ids for p in texts] + [negative] * (len(texts) if guided else 0)
        made = _context(bundle.params, np.stack(ids), text, bundle.dit)
        return jax.device_put(made, NamedSharding(mesh, PartitionSpec(None, "data")))

    @lru_cache(maxsize=1024)
    def embedding(prompt: str) -> np.ndarray:  # one at a time: it must not depend on the batch
        return np.asarray(_pooled(bundle.params, encode(prompt).ids[None], text))[0]

    features = (np.stack([embedding(p) for p in prompts(i)]) for i in range(parts.clips))
    banks = [init_bank(d.capacity, text.dim) for _ in request.timelines]
    places = plan_rows(features, d.capacity) if d.lookahead else place_rows(banks, features)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    for i, place in enumerate(places):
        if i >= start:
            yield Clip(context(prompts(i)), *jax.device_put(place, rows))


@partial(jax.jit, static_argnums=(2, 3))
def _context(params, ids, text_cfg, dit_cfg):
    """ids int32 [B, M] -> what cross-attention needs of these prompts."""
    return embed_context(params["dit"], encode_text(params["text"], ids, text_cfg), dit_cfg)


@partial(jax.jit, static_argnums=2)
def _pooled(params, ids, text_cfg):
    """ids int32 [B, M] -> the sum of the text features over the words, float32 [B, E]: what clip
    selection compares.  A prompt without words has the sum over all rows.
    """
    words = (ids > 0) | ~(ids > 0).any(-1, keepdims=True)
    return jnp.where(words[..., None], encode_text(params["text"], ids, text_cfg), 0).sum(1)
