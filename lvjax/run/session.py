# SPDX-License-Identifier: Apache-2.0
"""From a request to clips: the method, its first state, and the clips in order.

This is what `lvjax.generate`, `lvjax.stream` and the command line share.  It computes; files are
elsewhere.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.core.errors import InputError, NonFiniteError
from lvjax.core.mesh import make_mesh
from lvjax.core.offload import DEVICE, HOST, as_bits, place
from lvjax.rollout.method import Method, stream
from lvjax.run import encoders, open_error_free, open_wan
from lvjax.run.bundle import Bundle
from lvjax.run.presets import size_notices
from lvjax.run.request import Request, resolved, whole_frames
from lvjax.run.spill import ClipFiles, temporary_files
from lvjax.run.timeline import Cuts, missed_notices

OPENINGS: dict[str, ModuleType] = {"error_free": open_error_free, "wan": open_wan}
"""For each method the module with its `cuts`, `span`, `size_for`, `check`, `pictures`, `clip_work`,
`opening`, `words` and `OFFLOADS`.
"""


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
    layout(state, mesh): the state spread over them.
    clips(start): the inputs of the clips from number `start` on, in order, each made when it is
      asked for.  What the clips before remember is replayed on the host, about 0.2 ms per clip and
      row.
    cuts: which frames each clip shows.  skip_first, overlap_frames: pixel frames that clip 0, and
      every later clip, was given and does not show.
    step, spill: see `Opening`.  adapted: whether the model has LoRAs.
    """

    method: Method
    init: Callable[[jax.Array], Any]
    keys: jax.Array
    mesh: jax.sharding.Mesh
    layout: Callable[[Any, Any], Any]
    clips: Callable[[int], Iterator[Any]]
    cuts: Cuts
    skip_first: int
    overlap_frames: int
    notices: tuple[str, ...] = ()
    step: Callable[[Any, Any], tuple[Any, Any]] | None = None
    adapted: bool = False
    spill: Callable[[ClipFiles], Callable] | None = None

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
        return self.layout(state, self.mesh)

    def run(
        self, state=None, start: int = 0, files: ClipFiles | None = None
    ) -> Iterator[ClipResult]:
        """Yield clips from number `start` on.

        state: what the clip before `start` left, laid out by `place`, or None for a new first
        state.  A state is donated to the next clip.
        files: of the clips that leave the bank, where the defaults ask for `spill`; those of the
        run that is gone on with, or None for temporary ones.
        Raises: NonFiniteError naming the clip and the tensor.
        """
        first = self.state() if state is None else state
        clips = self.clips(start)
        with self._stepping(files) as step:
            made = stream(self.method, first, clips) if step is None else _steps(step, first, clips)
            del first, state  # nothing here outlives its clip
            shown = self.cuts.begin(start)
            for i, (new, (latents, frames)) in enumerate(made, start):
                _check_finite(latents, frames, i, self.adapted)
                frames = frames[:, self.skip_first if i == 0 else self.overlap_frames :]
                frames = frames[:, : self.frames - shown]
                shown += frames.shape[1]
                yield ClipResult(i, latents, np.asarray(to_uint8(frames)), new)

    @contextmanager
    def _stepping(self, files: ClipFiles | None) -> Iterator[Callable | None]:
        """The step of a run, None for that of the method alone."""
        with ExitStack() as held:
            if self.spill is None:
                yield self.step
            else:
                yield self.spill(files or held.enter_context(temporary_files()))

    def with_key(self, key) -> "Session":
        """The same run with the noise of a typed key instead of the request's seed."""
        return dataclasses.replace(self, keys=row_keys(key, len(self.keys)))


def _steps(step: Callable, state, clips) -> Iterator[tuple[Any, Any]]:
    """As `stream`, for a step that is not to be one program."""
    for clip in clips:
        state, out = step(state, clip)
        yield state, out


def row_keys(key, batch: int):
    """One typed key per row of a batch [B]; row b does not depend on the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


@jax.jit
def to_uint8(frames):
    """Frames in [-1, 1] to uint8."""
    return jnp.round((jnp.clip(frames, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def _check_finite(latents, frames, clip: int, adapted: bool = False) -> None:
    remedy = "another seed, fewer steps or less guidance"
    remedy = f"LoRAs of less strength, {remedy}" if adapted else remedy
    for name, after, x in (("latents", "sampling", latents), ("frames", "decoding", frames)):
        bad = ~np.isfinite(np.asarray(x)).reshape(len(x), -1).all(1)
        if bad.any():
            raise NonFiniteError(
                f"{name} of clip {clip} are not finite after {after} (row {int(bad.argmax())}); "
                f"the clips before it are kept; try {remedy}"
            )


def cuts(bundle: Bundle, request: Request) -> Cuts:
    """The clips of the videos of a request."""
    request = resolved(bundle, request)
    return OPENINGS[request.method].cuts(bundle.defaults, request)


def span(bundle: Bundle, request: Request) -> tuple[str, int]:
    """Which frames of a video a run starts from: "first" or "last", and how many."""
    return OPENINGS[resolved(bundle, request).method].span(bundle, request)


def frames_for(bundle: Bundle, request: Request, available: int) -> int:
    """The frames of a video that is asked for without a number, from how many the video has that
    is given: where another one is made of that, as many, up to those of the request.
    """
    end, most = span(bundle, request)
    return whole_frames(min(most, available)) if end == "first" else request.frames


def size_for(bundle: Bundle, request: Request, picture: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of a video that is asked for without one, from that of the picture or
    video that is given.
    """
    return OPENINGS[resolved(bundle, request).method].size_for(bundle, picture)


def texts_of(bundle: Bundle, request: Request) -> list[str]:
    """Every prompt that a request needs; the negative one among them where guidance is on."""
    request = resolved(bundle, request)
    own = [prompt for row in request.timelines for _, prompt in row]
    guided = any(scale != 1 for scale in np.atleast_1d(request.guidance))
    return list(dict.fromkeys([*own, request.negative] if guided else own))


def check_settings(outline: Bundle, request: Request) -> None:
    """The checks of `open_session` that need no weights.

    Raises: InputError with the nearest legal values.
    """
    request = resolved(outline, request)
    OPENINGS[request.method].check(outline, request)


def notices(outline: Bundle, request: Request) -> tuple[str, ...]:
    """What the user should know about prompts that are not followed as they are written, and about
    a size that the model was not made for.
    """
    parts = cuts(outline, request)
    said = encoders.notices(outline, texts_of(outline, request))
    size = size_notices(
        outline.name, outline.dit, outline.defaults, resolved(outline, request).size
    )
    return (*said, *size, *missed_notices(request.timelines, parts))


def open_session(bundle: Bundle, request: Request) -> Session:
    """Check the request against the model and prepare everything up to the first clip; the weights
    go to the devices, or wait where `Bundle.offload` says, everything else is made when the session
    runs.

    Raises: InputError with the nearest legal values.
    """
    check_offload(bundle.offload, resolved(bundle, request).method)
    mesh = data_mesh(len(request.timelines))
    placed = dataclasses.replace(bundle, params=_placed(bundle, mesh))
    return _session(placed, request, mesh)


def check_offload(offload: str, method: str) -> None:
    """Raises: InputError for a place where weights cannot wait with a method."""
    if offload not in (allowed := OPENINGS[method].OFFLOADS):
        raise InputError(f"offload is {offload!r}; the method {method} allows {', '.join(allowed)}")


def _placed(bundle: Bundle, mesh) -> dict[str, Any]:
    """The weights on the devices of a mesh; the transformers' blocks where they are to wait."""
    kind = DEVICE if bundle.offload == "none" else HOST

    def transformer(tree):
        rest = place({name: a for name, a in tree.items() if name != "blocks"}, mesh)
        return {**rest, "blocks": place(as_bits(tree["blocks"]), mesh, kind)}

    return {
        part: transformer(tree) if part in bundle.experts else place(tree, mesh)
        for part, tree in bundle.params.items()
    }


def check_request(bundle: Bundle, request: Request) -> tuple[str, ...]:
    """The checks of `open_session`, alone; returns its notices.

    Raises: InputError with the nearest legal values.
    """
    return _session(bundle, request, data_mesh(len(request.timelines))).notices


def _session(bundle: Bundle, request: Request, mesh) -> Session:
    """A session for weights where they are."""
    check_settings(bundle, request)
    asked = resolved(bundle, request)
    prompts = encoders.open_prompts(bundle, texts_of(bundle, request))
    opened = OPENINGS[asked.method].opening(bundle, asked, prompts, mesh)
    session = Session(
        opened.method,
        opened.init,
        row_keys(jax.random.key(request.seed), len(request.timelines)),
        mesh,
        opened.place,
        opened.clips,
        cuts(bundle, request),
        opened.skip_first,
        opened.overlap_frames,
        notices(bundle, request),
        opened.step,
        bool(bundle.loras),
        opened.spill,
    )
    session.abstract_state()  # what does not fit together says so here
    return session


def data_mesh(batch: int):
    """A mesh over as many devices as divide the batch: the rows are spread over `data`, the rest is
    on every device.
    """
    return make_mesh(data=max(n for n in range(1, jax.device_count() + 1) if batch % n == 0))
