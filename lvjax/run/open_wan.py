# SPDX-License-Identifier: Apache-2.0
"""Wan's own samplers for a session: a video is one clip, made of text, pictures, or a video."""

import math
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding

from lvjax.core.errors import InputError
from lvjax.core.mesh import partition
from lvjax.core.offload import place
from lvjax.flow.schedule import make_schedule
from lvjax.methods.wan import WanClip, WanSettings, WanState, staged, wan, wan_condition
from lvjax.methods.wan import check as check_models
from lvjax.models.config import DiTConfig
from lvjax.rollout.condition import MASK, best_output_size, output_size
from lvjax.run.bundle import Bundle
from lvjax.run.defaults import Defaults
from lvjax.run.encoders import Prompts, encode_pictures
from lvjax.run.opening import ClipWork, Opening, context, encoder, last_frame, start_frames
from lvjax.run.request import Request
from lvjax.run.timeline import Cuts

STRENGTH = 0.8  # of video to video, as in diffusers
OFFLOADS = ("none", "expert", "layers")
"""Where the transformers' weights may wait, see `Bundle.offload`."""


def settings(bundle: Bundle, request: Request) -> WanSettings:
    """The method's settings of a resolved request."""
    d, guidance = bundle.defaults, request.guidance
    return WanSettings(
        schedule=make_schedule(request.steps, d.shift, d.solver),
        solver=d.solver,
        guidance=guidance[0] if isinstance(guidance, tuple) and d.boundary is None else guidance,
        boundary=d.boundary,
        impose=d.impose and request.start is not None,
        strength=_strength(bundle, request),
    )


def _strength(bundle: Bundle, request: Request) -> float | None:
    """How much of a video is changed; None where none is given to be changed."""
    if request.start is None or span(bundle, request)[0] == "last":
        return None
    return STRENGTH if request.strength is None else request.strength


def clip_work(bundle: Bundle, request: Request) -> ClipWork:
    """What the clip of a resolved request costs."""
    chosen, latents = settings(bundle, request), 1 + (request.frames - 1) // MASK
    whole = bundle.dit.condition_channels > 0 or chosen.strength is not None
    return ClipWork(latents, chosen.active.steps, latents if whole else int(chosen.impose))


def cuts(d: Defaults, request: Request) -> Cuts:
    """One clip that shows everything."""
    return Cuts(request.frames, request.frames, request.frames, d.fps)


def span(bundle: Bundle, request: Request) -> tuple[str, int]:
    """Which frames of a video are used: the first ones, to make another video of them, or the last,
    where a picture is what the model goes on from.
    """
    takes_image = bundle.dit.condition_channels > 0 or bundle.defaults.impose
    picture = takes_image and request.strength is None
    return ("last", 1) if picture else ("first", request.frames)


def size_for(bundle: Bundle, picture: tuple[int, int]) -> tuple[int, int]:
    """The size of a video of a picture or another video, where none is asked for: the shape of
    that, in the area of the model's own size.
    """
    d = bundle.defaults
    unit = bundle.vae.spatial_stride * bundle.dit.patch[1]
    fit = best_output_size if d.impose else output_size
    return fit(picture, math.prod(d.size), unit)


def check(bundle: Bundle, request: Request) -> None:
    """Raises: InputError for a resolved request that this method or model cannot follow."""
    _check_experts(bundle, request)
    if bundle.sentence is not None:
        raise InputError("a selection encoder is given; wan remembers no clips: leave it out")
    chosen = settings(bundle, request)
    check_models(bundle.dit, bundle.vae, chosen)
    start, last, tokens = start_frames(request), last_frame(request), bundle.dit.image_dim
    if start is None and request.strength is not None:
        raise InputError("a strength is given without a video; give a video, or leave it out")
    needed = pictures(bundle.dit)
    if "start" in needed and start is None:
        raise InputError(f"{bundle.name} makes videos of a picture; give the first image")
    if "last" in needed and last is None:
        raise InputError(f"{bundle.name} goes from a picture to another; give the last image too")
    if last is not None and (not bundle.dit.condition_channels or (tokens and not _two(bundle))):
        raise InputError(f"{bundle.name} takes no last image; leave it out")
    if chosen.strength is not None and start.shape[1] == 1 < request.frames:
        raise InputError(
            f"{bundle.name} takes no picture; leave it out, or give a video to make another one of"
        )
    if chosen.strength is not None and start.shape[1] != request.frames:
        raise InputError(
            f"the video has {start.shape[1]} frames, {request.frames} are asked for; ask for as "
            "many as it has, or fewer"
        )
    if tokens and len(request.timelines) > 1 and np.ndim(request.start) == 5:
        raise InputError(f"{bundle.name} takes one picture for all videos of a run; give one")


def _check_experts(bundle: Bundle, request: Request) -> None:
    """Raises: InputError unless there are as many transformers as the settings are for."""
    d, experts = bundle.defaults, len(bundle.experts)
    if d.boundary is not None and experts == 1:
        raise InputError(
            f"{bundle.name} has two experts, of which only one is here; convert the other into the "
            "same folder, or set defaults.boundary to None for all steps with this one"
        )
    if d.boundary is None and experts == 2:
        raise InputError(
            f"{bundle.name} has two experts and defaults.boundary is None; give the share of the "
            "noise from which on the first one is used, for example 0.9"
        )
    pair = isinstance(request.guidance, tuple)
    if pair and experts == 1 and list(request.guidance) != list(np.atleast_1d(d.guidance)):
        raise InputError(f"guidance is {request.guidance}; {bundle.name} has one expert: give one")


def _two(bundle: Bundle) -> bool:
    """Whether image tokens of two pictures are wanted."""
    return bundle.dit.image_pos_len > 0


def pictures(dit: DiTConfig) -> tuple[str, ...]:
    """The fields of a request without which a model makes nothing."""
    return ("start",) * (dit.condition_channels > 0) + ("last",) * (dit.image_pos_len > 0)


def words(d: Defaults) -> str:
    """What the sampler has beside steps, solver and guidance, for people."""
    return f"shift {d.shift:g}"


def opening(bundle: Bundle, request: Request, prompts: Prompts, mesh) -> Opening:
    """What a session needs of the method; of the request, resolved."""
    chosen, batch = settings(bundle, request), len(request.timelines)
    method = wan(bundle.params, bundle.dit, bundle.vae, chosen)
    stride, latents = bundle.vae.spatial_stride, 1 + (request.frames - 1) // MASK
    size = (batch, latents, *(n // stride for n in request.size), bundle.vae.z)
    start, last = start_frames(request), last_frame(request)
    whole = chosen.strength is not None
    given = {
        "video": start if whole else None,
        "first": start[:, -1] if start is not None and not whole else None,
        "last": None if last is None else last[:, -1],
    }

    def init(keys):
        return method.init(wan_condition(encoder(bundle), size, bundle.dit, chosen, **given), keys)

    clips = partial(_clips, bundle, request, chosen, prompts, mesh, start, last)
    ready = partial(place, mesh=mesh) if bundle.offload == "expert" else _as_it_is
    # in parts wherever the weights wait: one program would round otherwise in the last bits
    step = staged(bundle.params, bundle.dit, bundle.vae, chosen, ready)
    return Opening(method, init, _place, clips, 0, 0, step)


def _as_it_is(params):
    return params


def _place(state: WanState, mesh) -> WanState:
    """The rows of a state spread over the devices."""
    rows, whole = (NamedSharding(mesh, partition(axes)) for axes in (("batch",), ()))
    put = jax.device_put
    return WanState(put(state.condition, rows), put(state.clip, whole), put(state.key, rows))


def _clips(
    bundle: Bundle, request: Request, chosen: WanSettings, prompts: Prompts, mesh, start, last,
    begin: int = 0,
) -> Iterator[WanClip]:  # fmt: skip
    """The one clip."""
    if begin > 0:
        return
    texts = tuple(row[0][1] for row in request.timelines)
    tokens = None
    if bundle.dit.image_dim is not None:
        pictures = [start[0, -1]] + ([last[0, -1]] if _two(bundle) else [])
        tokens = encode_pictures(bundle, pictures)
    contexts = []
    for expert, scale in zip(bundle.experts, chosen.scales, strict=True):
        given = texts + (request.negative,) * (len(texts) if scale is not None else 0)
        own = None if tokens is None else np.broadcast_to(tokens, (len(given), *tokens.shape[1:]))
        contexts.append(context(bundle, prompts.rows(given), mesh, own, expert))
    yield WanClip(tuple(contexts))
