# SPDX-License-Identifier: Apache-2.0
"""From a request to clips: prompts over time, frame counts, the method, its first state, and the
clips in order.

This is what `lvjax.generate`, `lvjax.stream` and the command line share.  It computes; files are
elsewhere.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lvjax.core.errors import InputError, NonFiniteError
from lvjax.core.mesh import make_mesh
from lvjax.data.prompts import VOCABULARY, encode
from lvjax.flow.schedule import make_schedule
from lvjax.memory.placement import plan_bank
from lvjax.methods import METHODS, ErrorFree
from lvjax.models.dit import embed_context
from lvjax.models.pocket_text import encode_text
from lvjax.models.vae import encode as encode_video
from lvjax.rollout.clipwise import Clip, first_condition, pixel_frames, shard_state
from lvjax.rollout.method import Method, stream
from lvjax.run.bundle import Bundle

MAX_FRAMES = 10_000_000


@dataclass(frozen=True)
class Request:
    """One run.  Fields left None take the bundle's defaults.

    timelines: per row of the batch, ((seconds, prompt), ...) in order, the first at 0.  negative:
      one prompt for all rows.
    start: None, an image float32 [H, W, 3] or the last frames of a video [P, H, W, 3], in [-1, 1],
      of the run's size; with
    [B, P, H, W, 3] each row has its own.
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
    """A run ready to go.  clips: `Clip` inputs in order, made when asked for; first: pixel frames
    of clip 0 that are not shown.
    """

    method: Method
    state: Any
    num_clips: int
    frames: int
    skip_first: int
    overlap_frames: int
    clip: Any
    notices: tuple[str, ...] = ()

    def run(self, state=None, start: int = 0) -> Iterator[ClipResult]:
        """Yield clips from number `start` on, continuing from `state`; states are donated to the
        next clip.

        Raises: NonFiniteError naming the clip and the tensor.
        """
        state = self.state if state is None else state
        inputs = (self.clip(i) for i in range(start, self.num_clips))
        shown = self.frames_before(start)
        for i, (new, (latents, frames)) in enumerate(stream(self.method, state, inputs), start):
            _check_finite(latents, frames, i)
            frames = frames[:, self.skip_first if i == 0 else self.overlap_frames :][
                :, : self.frames - shown
            ]
            shown += frames.shape[1]
            yield ClipResult(i, latents, np.asarray(to_uint8(frames)), new)

    def with_key(self, key) -> "Session":
        """The same run with the noise of a typed key instead of the request's seed."""
        data = jax.random.key_data(row_keys(key, self.state.condition.shape[0]))
        return dataclasses.replace(
            self, state=self.state.replace(key=jax.device_put(data, self.state.key.sharding))
        )

    def frames_before(self, clip: int) -> int:
        """Pixel frames shown before clip number `clip`."""
        whole = self.overlap_frames + self._new_per_clip - self.skip_first
        return 0 if clip == 0 else min(self.frames, whole + (clip - 1) * self._new_per_clip)

    @property
    def _new_per_clip(self) -> int:
        return pixel_frames(self.state.condition.shape[1]) - self.overlap_frames


def row_keys(key, batch: int):
    """One typed key per row of a batch [B]; row b does not depend on the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


@jax.jit
def to_uint8(frames):
    """Frames in [-1, 1] to uint8."""
    return jnp.round((jnp.clip(frames, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def _check_finite(latents, frames, clip: int) -> None:
    for name, x in (("latents", latents), ("frames", frames)):
        bad = ~np.isfinite(np.asarray(x)).reshape(len(x), -1).all(1)
        if bad.any():
            raise NonFiniteError(
                f"{name} of clip {clip} are not finite (row {int(bad.argmax())}); the clips "
                "before it are kept; try another seed, fewer steps or less guidance"
            )


def frame_count(seconds: float, fps: int) -> int:
    """1 + 4·round(seconds·fps / 4): the frames that F latent frames give.

    Raises: InputError unless seconds is a positive finite number.
    """
    if not 0 < seconds <= MAX_FRAMES / fps:  # false for NaN
        raise InputError(
            f"seconds is {seconds}; give a positive number up to {MAX_FRAMES / fps:g}"
        )
    return check_frames(1 + 4 * round(seconds * fps / 4))


def check_frames(frames: int) -> int:
    """Raises: InputError naming the two nearest counts of the form 1 + 4m."""
    if frames < 1 or frames > MAX_FRAMES or (frames - 1) % 4:
        near = min(frames, MAX_FRAMES - 4)
        below = max(1, near - (near - 1) % 4)
        raise InputError(
            f"frames is {frames}; it must be 1 + 4m, at most {MAX_FRAMES}: the nearest are "
            f"{below} and {below + 4}"
        )
    return frames


def clip_count(defaults, frames: int, given: int) -> int:
    """Clips of a video of `frames` whose first clip is given `given` frames and shows the last of
    them.
    """
    whole = pixel_frames(defaults.clip_latents) - max(given - 1, 0)
    new = pixel_frames(defaults.clip_latents) - pixel_frames(defaults.overlap)
    return 1 + max(0, math.ceil((frames - whole) / new))


def check_size(size: tuple[int, int], bundle: Bundle) -> tuple[int, int]:
    """Raises: InputError naming the two nearest sides that the model can make."""
    unit = bundle.vae.spatial_stride * bundle.dit.patch[1]
    for name, n in zip(("height", "width"), size, strict=True):
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
    """Check the request against the model and prepare everything up to the first clip.

    Raises: InputError with the nearest legal values.
    """
    d = bundle.defaults
    for timeline in request.timelines:
        check_timeline(timeline)
    check_frames(request.frames)
    height, width = check_size(request.size or d.size, bundle)
    if request.method not in METHODS:
        raise InputError(f"method {request.method!r} is unknown; choose one of {sorted(METHODS)}")
    steps = d.steps if request.steps is None else request.steps
    guidance = d.guidance if request.guidance is None else request.guidance
    if not 1 <= steps <= 1000 or not (math.isfinite(guidance) and 0 <= guidance <= 100):
        raise InputError(
            f"steps is {steps}, guidance {guidance}; allowed are 1 to 1000 steps and a guidance "
            "from 0 to 100"
        )
    settings = ErrorFree(
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
    batch = len(request.timelines)
    stride = bundle.vae.spatial_stride
    size = (batch, d.clip_latents, height // stride, width // stride, bundle.vae.z)
    mesh = data_mesh(batch)
    bundle = dataclasses.replace(
        bundle, params=jax.device_put(bundle.params, NamedSharding(mesh, PartitionSpec()))
    )
    method = METHODS[request.method](bundle.params, bundle.dit, bundle.vae, settings)
    given, source = _start(bundle, request, (height, width), batch)
    keys = row_keys(jax.random.key(request.seed), batch)
    condition = first_condition(
        _encoder(bundle),
        source,
        size,
        fill=d.fill if source is not None else "latent",
        overlap=d.overlap,
    )
    state = shard_state(method.init(condition, keys), mesh)
    skip, shared = max(given - 1, 0), pixel_frames(d.overlap)
    new = pixel_frames(d.clip_latents) - shared
    whole = pixel_frames(d.clip_latents) - skip
    num_clips = clip_count(d, request.frames, given)
    prompts, notices = _clip_prompts(bundle, request, num_clips, whole, new)
    contexts = _Contexts(bundle, request.negative, settings.guidance is not None)
    plan = plan_bank(np.stack([contexts.embedding(p) for p in prompts]), d.capacity)

    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "data"), ()))

    def clip(i: int) -> Clip:
        place = jax.device_put((plan.slot[i], plan.visible[i]), everywhere)
        return Clip(jax.device_put(contexts(prompts[i]), rows), *place)

    return Session(method, state, num_clips, request.frames, skip, shared, clip, notices)


def data_mesh(batch: int):
    """A mesh over as many devices as divide the batch: the rows are spread over `data`, the rest is
    on every device.
    """
    return make_mesh(data=max(n for n in range(1, jax.device_count() + 1) if batch % n == 0))


def _encoder(bundle: Bundle):
    return jax.jit(lambda video: encode_video(bundle.params["vae"], video, bundle.vae))


def _start(bundle, request, size, batch):
    """Frames that the first clip is given (a count of the form 1 + 4m, or 0) and their array [B, P,
    H, W, 3].
    """
    if request.start is None:
        return 0, None
    start = jnp.asarray(request.start, jnp.float32)
    start = start.reshape((1,) * (5 - start.ndim) + start.shape)
    if start.shape[2:4] != size:
        raise InputError(
            f"the start picture is {start.shape[3]}x{start.shape[2]}, the video "
            f"{size[1]}x{size[0]}; fit it first"
        )
    given = min(start.shape[1], pixel_frames(bundle.defaults.overlap))
    given -= (given - 1) % 4
    return given, jnp.broadcast_to(start[:, -given:], (batch, given, *start.shape[2:]))


def _clip_prompts(bundle, request, num_clips: int, whole: int, new: int):
    """Per clip, the prompts of all rows at its first new frame; and one notice on words that the
    model does not know.
    """
    fps = bundle.defaults.fps
    starts = [0.0] + [(whole + i * new) / fps for i in range(num_clips - 1)]
    prompts = []
    for s in starts:
        prompts.append(
            tuple([p for t, p in row if t <= s + 0.5 / fps][-1] for row in request.timelines)
        )
    unknown = {}
    for text in {p for row in prompts for p in row} | {request.negative}:
        unknown |= dict(encode(text)[1])
    if not unknown:
        return prompts, ()
    words = ", ".join(f"{w!r} (nearest: {near!r})" for w, near in sorted(unknown.items()))
    return prompts, (
        f"the model does not know {words}; `lvjax info` lists its {len(VOCABULARY)} words",
    )


class _Contexts:
    """Text context per distinct set of prompts; only the last one made is kept, so memory does not
    grow.
    """

    def __init__(self, bundle: Bundle, negative: str, guided: bool):
        text_cfg, dit_cfg = bundle.text, bundle.dit
        self._negative, self._guided, self._last = encode(negative)[0], guided, (None, None)
        self._embed = jax.jit(
            lambda ids: embed_context(
                bundle.params["dit"], encode_text(bundle.params["text"], ids, text_cfg), dit_cfg
            )
        )
        self._pool = jax.jit(lambda ids: encode_text(bundle.params["text"], ids, text_cfg).sum(1))
        self._embeddings: dict[tuple, np.ndarray] = {}

    def __call__(self, prompts: tuple[str, ...]):
        if self._last[0] != prompts:
            rows = [encode(p)[0] for p in prompts]
            rows += [self._negative] * len(prompts) if self._guided else []
            self._last = (prompts, self._embed(np.stack(rows)))
        return self._last[1]

    def embedding(self, prompts: tuple[str, ...]) -> np.ndarray:
        """Mean-pooled text features of all rows, side by side: what clip selection compares."""
        if prompts not in self._embeddings:
            self._embeddings[prompts] = np.asarray(
                self._pool(np.stack([encode(p)[0] for p in prompts]))
            ).reshape(-1)
        return self._embeddings[prompts]
