# SPDX-License-Identifier: Apache-2.0
"""The method Error-Free for a session: its settings, its first state, and its clips with what they
remember.
"""

from collections.abc import Iterator
from functools import lru_cache, partial

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lvjax.core.errors import InputError
from lvjax.flow.schedule import make_schedule
from lvjax.flow.truncated import steps_needed
from lvjax.memory.placement import (
    SELECTIONS,
    clips_needed,
    init_bank,
    place_rows,
    plan_rows,
    stacked,
)
from lvjax.memory.spill import exchange_rows, init_spill, most_outside
from lvjax.methods import ErrorFree, error_free
from lvjax.methods.error_free import memory_layers
from lvjax.models.config import DiTConfig
from lvjax.rollout.clipwise import Clip, shard_state
from lvjax.rollout.condition import first_condition, given_frames, pixel_frames
from lvjax.run.bundle import Bundle
from lvjax.run.defaults import Defaults
from lvjax.run.encoders import Prompts
from lvjax.run.opening import ClipWork, Opening, context, encoder, start_frames
from lvjax.run.request import Request
from lvjax.run.spill import Moved, moved, moving_step
from lvjax.run.timeline import Cuts

OFFLOADS = ("none", "layers")
"""Where the transformer's weights may wait, see `Bundle.offload`; there is one expert."""


def settings(d: Defaults, request: Request) -> ErrorFree:
    """The method's settings of a resolved request.

    Raises: InputError for what the method does not have.
    """
    if isinstance(request.guidance, tuple):
        raise InputError(f"guidance is {request.guidance}; error_free takes one number")
    for name in ("last", "strength"):
        if getattr(request, name) is not None:
            raise InputError(f"{name} is given; error_free does not use it: leave it out")
    return ErrorFree(
        schedule=make_schedule(request.steps, d.shift, d.solver),
        solver=d.solver,
        guidance=None if request.guidance == 1 else request.guidance,
        window=d.window,
        capacity=capacity(d),
        layers=d.layers,
        overlap=d.overlap,
        positions=d.positions,
        fill=d.fill,
    )


def capacity(d: Defaults) -> int:
    """Clips in the bank."""
    return clips_needed(d.selection, d.capacity, d.max_selected)


def clip_work(bundle: Bundle, request: Request) -> ClipWork:
    """What a clip of a resolved request costs."""
    d, chosen = bundle.defaults, settings(bundle.defaults, request)
    passes = steps_needed(chosen.schedule.sigmas, d.window) + 1  # the last one to remember
    kept, layers = capacity(d) * d.clip_latents, d.layers or memory_layers(bundle.dit)
    outside = _outside(d, request) if d.spill else 0
    return ClipWork(d.clip_latents, passes, d.overlap, kept, layers, outside)


def _outside(d: Defaults, request: Request) -> int:
    """Clips that go into files at most, of all videos together."""
    parts = cuts(d, request)
    rows = ([parts.prompt(row, i) for i in range(parts.clips)] for row in request.timelines)
    return sum(most_outside(row, d.capacity, d.max_selected) for row in rows)


def given_of(d: Defaults, start) -> int:
    """Pixel frames of a request's start that its first clip is given."""
    shape = np.shape(start)  # [H, W, 3], [P, H, W, 3], [B, P, H, W, 3]
    available = 0 if start is None else ((1,) * (5 - len(shape)) + shape)[1]
    return given_frames(available, d.overlap)


def cuts(d: Defaults, request: Request) -> Cuts:
    """The clips of the videos of a request; the first shows the last of the frames it is given."""
    clip, shared = pixel_frames(d.clip_latents), pixel_frames(d.overlap)
    given = given_of(d, request.start)
    return Cuts(request.frames, clip - max(given - 1, 0), clip - shared, d.fps)


def span(bundle: Bundle, request: Request) -> tuple[str, int]:
    """Which frames of a video it goes on from: "first" or "last", and how many."""
    return "last", pixel_frames(bundle.defaults.overlap)


def size_for(bundle: Bundle, picture: tuple[int, int]) -> tuple[int, int]:
    """The size of a video of a picture, where none is asked for: the model's own."""
    return bundle.defaults.size


def check(bundle: Bundle, request: Request) -> None:
    """Raises: InputError for a resolved request that this method or model cannot follow."""
    if len(bundle.experts) > 1:
        raise InputError(f"{bundle.name} has two experts; error_free is for models with one")
    settings(d := bundle.defaults, request)
    if bundle.sentence is not None and d.selection != "prompt":
        raise InputError(
            f"a selection encoder is given, but defaults.selection is {d.selection!r}, which "
            "compares no prompts; leave one of them out"
        )
    start_frames(request)


def pictures(dit: DiTConfig) -> tuple[str, ...]:
    """The fields of a request without which a model makes nothing: a start is never needed."""
    return ()


def words(d: Defaults) -> str:
    """What the sampler has beside steps, solver and guidance, for people."""
    return f"T-RFlow {list(d.window)}"


def opening(bundle: Bundle, request: Request, prompts: Prompts, mesh) -> Opening:
    """What a session needs of the method; of the request, resolved."""
    d, batch = bundle.defaults, len(request.timelines)
    chosen, given = settings(d, request), given_of(d, request.start)
    method = error_free(bundle.params, bundle.dit, bundle.vae, chosen)
    source = start_frames(request)
    source = None if source is None else source[:, -given:]
    stride = bundle.vae.spatial_stride
    size = (batch, d.clip_latents, *(n // stride for n in request.size), bundle.vae.z)
    fill = "latent" if source is None and d.fill == "pixel" else d.fill

    def init(keys):
        condition = first_condition(encoder(bundle), source, size, fill=fill, overlap=d.overlap)
        return method.init(condition, keys)

    parts = cuts(d, request)
    clips = partial(_clips, bundle, request, parts, prompts, mesh, chosen.guidance is not None)
    shared, spill = (max(given - 1, 0), pixel_frames(d.overlap)), None
    if d.spill:
        spill = partial(moving_step, method, d.clip_latents)
    return Opening(method, init, shard_state, clips, *shared, spill=spill)


def _clips(
    bundle: Bundle,
    request: Request,
    parts: Cuts,
    prompts: Prompts,
    mesh,
    guided: bool,
    start: int = 0,
) -> Iterator[Clip | Moved]:
    """Clip inputs from number `start` on; guided: with the negative prompt.

    The bank of each row is placed by its own prompts, those of the clips before `start` again; a
    later prompt changes nothing here unless the defaults ask for lookahead.
    """
    d = bundle.defaults

    def texts(i: int) -> tuple[str, ...]:
        return tuple(parts.prompt(row, i) for row in request.timelines)

    @lru_cache(maxsize=1)
    def made(texts: tuple[str, ...]):
        negative = (request.negative,) * (len(texts) if guided else 0)
        return context(bundle, prompts.rows(texts + negative), mesh)

    feature = lru_cache(maxsize=1024)(prompts.feature)
    features = (np.stack([feature(p) for p in texts(i)]) for i in range(parts.clips))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    if d.spill:
        empty = init_spill(d.capacity, prompts.dim, d.max_selected)
        exchanges = exchange_rows([empty] * len(request.timelines), features, d.delta)
        for i, each in enumerate(exchanges):
            if i >= start:
                place = stacked([row.place for row in each])
                yield moved(Clip(made(texts(i)), *jax.device_put(place, rows)), each)
        return
    slots, rule = capacity(d), (d.delta, SELECTIONS[d.selection](d.max_selected))
    if d.lookahead:
        places = plan_rows(features, slots, *rule)
    else:
        banks = [init_bank(slots, prompts.dim) for _ in request.timelines]
        places = place_rows(banks, features, *rule)
    for i, place in enumerate(places):
        if i >= start:
            yield Clip(made(texts(i)), *jax.device_put(place, rows))
