# SPDX-License-Identifier: Apache-2.0
"""Wan's own samplers: one clip, every frame sees every other, no memory.

Text to video; image to video, with or without a last frame, with or without CLIP tokens; TI2V-5B,
whose first latent frame is the image's own; video to video; and A14B, with an expert for high noise
and one for low.  The differences are in the condition, the contexts and `WanSettings`.
Sources: Wan-Video/Wan2.1 and Wan2.2: wan/text2video.py, image2video.py, first_last_frame2video.py,
textimage2video.py; huggingface/diffusers, pipeline_wan_video2video.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial

from lvjax.core.errors import InputError
from lvjax.core.functional import bound
from lvjax.flow.guidance import guided, per_pass
from lvjax.flow.sampling import (
    Carry,
    advance,
    begin,
    find_solver,
    finish,
    noised,
    prepare,
    shortened,
    switch_step,
)
from lvjax.flow.schedule import Schedule, make_schedule
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import Context, dit
from lvjax.models.parts import EXPERTS as BY_NOISE
from lvjax.models.vae import decode
from lvjax.rollout.clipwise import clip_noise, row_key_data
from lvjax.rollout.condition import MASK, condition, frame_timesteps, pin, start_condition
from lvjax.rollout.method import Method

EXPERTS = tuple(BY_NOISE.values())  # high noise first
"""Names of the transformers' weights, in the order of their steps: high noise first."""


@dataclass(frozen=True)
class WanSettings:
    """How a Wan model samples; the defaults are those of Wan 2.1 T2V.

    schedule, solver: the official grid of a solver is `make_schedule(steps, shift, solver)`.
    guidance: scale of classifier-free guidance; (low noise, high noise) for two experts, in Wan's
      order; None or 1 is a single pass.
    boundary: with two experts, the first is used while timestep >= 1000 * boundary; None for one.
    impose: the model is given frames as latents with timestep 0 in the place of noise (TI2V-5B);
      they are put back before each call of the network, and at the end.
    strength: for video to video, the share of the steps that are run; None starts from noise alone.
    """

    schedule: Schedule = field(default_factory=lambda: make_schedule(50, 5.0))
    solver: str = "unipc"
    guidance: float | tuple[float, float] | None = 5.0
    boundary: float | None = None
    impose: bool = False
    strength: float | None = None

    @property
    def active(self) -> Schedule:
        """The part of the schedule that is run."""
        return self.schedule if self.strength is None else shortened(self.schedule, self.strength)

    @property
    def scales(self) -> tuple[float | None, ...]:
        """The guidance of each expert, high noise first; None is a single pass."""
        if self.boundary is None:
            high_first = (self.guidance,)
        elif isinstance(self.guidance, tuple):
            high_first = self.guidance[::-1]
        else:
            high_first = (self.guidance, self.guidance)
        return tuple(None if scale == 1 else scale for scale in high_first)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The steps (first, last + 1) of each expert, high noise first."""
        last = self.active.steps
        if self.boundary is None:
            return ((0, last),)
        switch = switch_step(self.active, self.boundary)
        return (0, switch), (switch, last)


@struct.dataclass
class WanState:
    """What one clip leaves to the next: the same condition, and another number for the noise.

    condition: float32 [B,T,h,w,4+z].  clip: int32 [].  key: uint32 [B,2], key data per row.
    """

    condition: jax.Array
    clip: jax.Array
    key: jax.Array


@struct.dataclass
class WanClip:
    """The prompts of a clip: one `Context` for each expert, high noise first, by its own weights.

    The batch of a context is B, or with guidance 2B: [prompts; negative prompts].
    """

    contexts: tuple[Context, ...]


class Stages(NamedTuple):
    """A step in parts, for a caller that does something between them, as `staged` does.  Each may
    be compiled alone; the solver's history is in the carry.

    begin: WanState -> Carry.  experts: for each, (weights, Carry, WanState, Context) -> Carry.
    finish: (weights of the autoencoder, Carry, WanState) -> (WanState, (latents, frames)).
    """

    begin: Callable
    experts: tuple[Callable, ...]
    finish: Callable


def wan(
    weights, dit_cfg: DiTConfig, vae_cfg: VAEConfig, settings: WanSettings | None = None
) -> Method:
    """The method for a Wan model as it was released.

    weights: {"dit": parameters, "vae": parameters}, and "dit_low" where there are two experts, of
    which "dit" is for high noise.
    init(condition, keys [B]): see `wan_condition`; one typed key per row.
    step: a `WanClip` in, (latents [B,T,h,w,z], frames [B,P,H,W,3]) out; the next step makes another
    clip of the same condition.
    Raises: InputError when models and settings do not fit together.
    """
    settings = WanSettings() if settings is None else settings
    check(dit_cfg, vae_cfg, settings)
    step = bound(_step, stages=stages(dit_cfg, vae_cfg, settings))
    return Method(init=_init, step=Partial(step, _used(weights, settings)))


def staged(
    weights, dit_cfg: DiTConfig, vae_cfg: VAEConfig, settings: WanSettings, ready: Callable
) -> Callable:
    """The step of `wan` as a program for each part, so that no more than the weights of one expert
    need be on the device.  It differs from the one program by rounding, where XLA simplifies
    across parts.

    weights, and the step's arguments and results: as in `wan`; a state is donated.
    ready: weights of an expert, wherever they are -> those to compute with; called before its
    steps, unless it has none, and not held after them.  The sampler's carry stays on the device.
    Raises: InputError as `wan`.
    """
    check(dit_cfg, vae_cfg, settings)
    parts = stages(dit_cfg, vae_cfg, settings)
    experts = (_alone(*own, ready) for own in zip(parts.experts, settings.spans, strict=True))
    programs = Stages(
        partial(_begin_alone, parts.begin), tuple(experts), partial(_finish_alone, parts.finish)
    )
    return partial(_step, _used(weights, settings), stages=programs)


def _alone(part: Callable, span: tuple[int, int], ready: Callable) -> Callable:
    """The part of an expert as a program, with its weights made ready where it has steps."""

    def program(params, carry: Carry, state: WanState, context: Context) -> Carry:
        if span[0] == span[1]:
            return carry
        # waiting keeps the next expert from coming before this one has gone
        return jax.block_until_ready(_expert_alone(part, ready(params), carry, state, context))

    return program


_begin_alone = jax.jit(lambda part, state: part(state), static_argnums=0)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _expert_alone(part, params, carry: Carry, state: WanState, context: Context):
    return part(params, carry, state, context)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _finish_alone(part, params, carry: Carry, state: WanState):
    return part(params, carry, state)


def _used(weights, settings: WanSettings) -> dict:
    """The weights that a run uses.

    Raises: InputError unless they are those of as many experts as the settings are for.
    """
    used = (*EXPERTS[: len(settings.spans)], "vae")
    if set(weights) & {*EXPERTS, "vae"} != set(used):
        raise InputError(
            f"weights are {sorted(weights)}; boundary={settings.boundary} needs {sorted(used)}"
        )
    return {name: weights[name] for name in used}


def check(dit_cfg: DiTConfig, vae_cfg: VAEConfig, settings: WanSettings) -> None:
    """Raises: InputError when models and settings do not fit together."""
    channels, z = dit_cfg.condition_channels, vae_cfg.z
    if {dit_cfg.in_channels, dit_cfg.out_channels} != {z} or channels not in (0, MASK + z):
        raise InputError(
            f"the transformer takes {dit_cfg.in_channels} + {channels} channels, the autoencoder "
            f"makes {z}; give models with {z} + 0 or {z} + {MASK + z}"
        )
    if vae_cfg.temporal_stride != MASK:
        raise InputError(
            f"the autoencoder makes {vae_cfg.temporal_stride} frames per latent frame; "
            f"this method needs {MASK}"
        )
    if settings.impose and (channels or dit_cfg.patch[0] != 1):
        raise InputError(
            "impose=True is for a transformer without condition channels whose tokens are of one "
            f"frame; this one has {channels} and the patch {dit_cfg.patch}"
        )
    if settings.strength is not None and channels:
        raise InputError(
            f"strength={settings.strength} is for video to video; this model starts from an image: "
            "give strength=None"
        )
    if settings.boundary is None and isinstance(settings.guidance, tuple):
        raise InputError(f"guidance={settings.guidance} is for two experts; give one number")
    if settings.boundary is not None and not 0 < settings.boundary < 1:
        raise InputError(f"boundary={settings.boundary}; give a number between 0 and 1, or None")
    prepare(settings.active, find_solver(settings.solver))


def stages(dit_cfg: DiTConfig, vae_cfg: VAEConfig, settings: WanSettings) -> Stages:
    """The parts that `wan` makes its step of."""
    return Stages(
        bound(_begin, settings=settings),
        tuple(
            bound(_expert, cfg=dit_cfg, settings=settings, number=i)
            for i in range(len(settings.spans))
        ),
        bound(_finish, cfg=vae_cfg, settings=settings),
    )


def wan_condition(
    encode: Callable,
    size: tuple[int, int, int, int, int],
    dit_cfg: DiTConfig,
    settings: WanSettings,
    *,
    first=None,
    last=None,
    video=None,
):
    """What `init` is given, float32 [B,T,h,w,4+z]: for a model with condition channels what goes
    into them, for others the frames that are imposed, or the video to start from.

    encode: frames [B,1+4m,H,W,3] -> latents [B,1+m,h,w,z].  size: (B,T,h,w,z) of the latents.
    first, last: images [B,H,W,3], and video: [B,1+4(T-1),H,W,3], in [-1,1], or None.
    Raises: InputError when the model needs a picture that is missing, or cannot use one.
    """
    image = dit_cfg.condition_channels > 0
    if (video is None) != (settings.strength is None):
        raise InputError("a video to start from and a strength belong together; give both or none")
    if image and first is None:
        raise InputError("this model makes videos of an image; give the first frame")
    if first is not None and (video is not None or not (image or settings.impose)):
        raise InputError("this model makes no videos of an image here; leave the first frame out")
    if last is not None and not image:
        raise InputError("this model takes no last frame; leave it out")
    if video is not None:
        return start_condition(encode, video, size)
    frames = None if first is None else first[:, None]
    return condition(encode, frames, size, "pixel" if image else "latent", last)


def _init(condition, keys) -> WanState:
    # buffers of its own: the state is donated
    clip = jnp.array(0, jnp.int32)
    return WanState(jnp.array(condition), clip, row_key_data(keys, condition.shape[0]))


def _step(weights, state: WanState, clip: WanClip, *, stages: Stages):
    if len(clip.contexts) != len(stages.experts):
        raise InputError(
            f"{len(clip.contexts)} contexts are given for {len(stages.experts)} experts"
        )
    carry = stages.begin(state)
    for name, expert, context in zip(EXPERTS, stages.experts, clip.contexts, strict=False):
        carry = expert(weights[name], carry, state, context)
    return stages.finish(weights["vae"], carry, state)


def _begin(state: WanState, *, settings: WanSettings) -> Carry:
    """The noise, or the video with noise."""
    start = state.condition[..., MASK:]
    x = clip_noise(state.key, state.clip, start.shape)
    if settings.strength is not None:
        x = noised(start, x, settings.active)
    return begin(prepare(settings.active, settings.solver), x)


def _expert(
    params,
    carry: Carry,
    state: WanState,
    context: Context,
    *,
    cfg: DiTConfig,
    settings: WanSettings,
    number: int,
) -> Carry:
    """The steps of one expert."""
    scale, (first, last) = settings.scales[number], settings.spans[number]
    given = per_pass(state.condition, scale)
    if context.k.shape[1] != len(given):
        raise InputError(
            f"the context of {EXPERTS[number]!r} has batch {context.k.shape[1]}; guidance {scale} "
            f"of {len(state.condition)} rows needs {len(given)}"
        )
    channels = given if cfg.condition_channels else None

    def velocity(x, sigma, timestep, aux):
        if settings.impose:
            x, timestep = pin(x, given), frame_timesteps(timestep, given)
        else:
            timestep = jnp.broadcast_to(timestep, x.shape[:1])
        return dit(params, x, timestep, context, cfg, condition=channels)[0], aux

    with jax.named_scope("sample"):
        sampler = prepare(settings.active, settings.solver)
        return advance(sampler, guided(velocity, scale), carry, first, last)


def _finish(params, carry: Carry, state: WanState, *, cfg: VAEConfig, settings: WanSettings):
    """The clip, and the state of the next."""
    latents, _ = finish(carry)
    if settings.impose:
        latents = pin(latents, state.condition)
    with jax.named_scope("decode"):
        frames = decode(params, latents, cfg)
    return state.replace(clip=state.clip + 1), (latents, frames)
