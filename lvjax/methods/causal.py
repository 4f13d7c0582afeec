# SPDX-License-Identifier: Apache-2.0
"""Causal streaming models: Self Forcing, CausVid, LongLive and LoL are one step with other knobs.

A recipe is a memory (`Window`), positions in time, temporal frequencies, and a sampler; any of them
goes with any other, on one set of weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from lvjax.core.errors import InputError
from lvjax.core.functional import bound
from lvjax.flow.few_step import few_step_schedule, sample_few
from lvjax.flow.sampling import sample
from lvjax.flow.schedule import Schedule
from lvjax.memory.cache import init_cache
from lvjax.memory.window import Window
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import dit
from lvjax.models.vae import decode_next, decoder_state
from lvjax.nn.rope import turn_table, turns
from lvjax.nn.rope_policies import jittered
from lvjax.rollout.causal import CausalKnobs, CausalModel, causal, once
from lvjax.rollout.condition import MASK, blank, with_mask
from lvjax.rollout.method import Method


@dataclass(frozen=True)
class Causal:
    """Settings of a causal method.

    window: the memory.  schedule: noise levels.  solver: None for fresh noise at every level
      (few-step models), or an ODE solver by name (undistilled ones).  guidance: of the latter; the
      memory is then held twice.
    positions: "absolute" or "relative", see `memory.window`.  turns: (head_dim, theta) -> temporal
      and spatial frequencies, see `nn.rope_policies`.
    fill: what stands for frames that are not given, for models with condition channels.
    """

    window: Window
    schedule: Schedule = field(default_factory=few_step_schedule)
    solver: str | None = None
    guidance: float | None = None
    positions: str = "absolute"
    turns: Callable = turns
    fill: str = "latent"


def self_forcing(window: int = 21, clip: int = 3, **changes) -> Causal:
    """Self Forcing: clips of three latent frames, a memory of the training length, four steps.

    Source: arXiv:2506.08009; guandeh17/Self-Forcing: pipeline/causal_inference.py.
    """
    return Causal(Window(window, 0, clip), **changes)


def causvid(window: int = 21, clip: int = 3, **changes) -> Causal:
    """CausVid: as Self Forcing, levels shifted by 8.

    Source: arXiv:2412.07772; tianweiy/CausVid.
    """
    return Causal(Window(window, 0, clip), few_step_schedule(shift=8.0), **changes)


def longlive(window: int = 12, sink: int = 3, clip: int = 3, **changes) -> Causal:
    """LongLive: a short window and the first clip as a sink.

    Source: arXiv:2509.22622; NVlabs/LongLive, configs/longlive_inference.yaml.
    """
    return Causal(Window(window, sink, clip), **changes)


def lol(key, num_heads: int, jitter: float = 0.8, **changes) -> Causal:
    """LoL: LongLive with one temporal RoPE base per head, so that no distance lines up all heads.

    key: typed, of the draw.  Source: arXiv:2601.16914, algorithm 1.
    """
    data = tuple(jax.random.key_data(key).tolist())
    return longlive(turns=bound(_jittered, data=data, heads=num_heads, jitter=jitter), **changes)


def _jittered(head_dim: int, theta: float, *, data, heads: int, jitter: float):
    with jax.ensure_compile_time_eval():  # numbers of the model, also where a step is traced
        key = jax.random.wrap_key_data(jnp.array(data, jnp.uint32))
        return jittered(key, head_dim, heads, theta, jitter)


def causal_method(
    weights, dit_cfg: DiTConfig, vae_cfg: VAEConfig | None, settings: Causal
) -> Method:
    """The method for weights {"dit": parameters, "vae": parameters}.

    vae_cfg: None to leave latents as they are; the step's frames are None then.
    init(latent_size (h, w, z), keys [B]): an empty memory; typed keys, one per row.
    step: a `CausalClip` whose context is `embed_context` of the prompts, of [prompts; negative
      prompts] with guidance; returns (state, (latents [B,T,h,w,z], frames [B,4T,H,W,3])).  Of the
      first clip the first three frames are of no meaning.
    Raises: InputError for a setting that is unknown.
    """
    model = causal_model(weights, dit_cfg, vae_cfg, settings)
    knobs = CausalKnobs(settings.window, settings.positions, settings.guidance)
    method = causal(model, _sampler(settings), knobs)

    def init(latent_size, keys):
        h, w, z = latent_size
        batch = len(keys) if settings.guidance is None else 2 * len(keys)
        grid = h // dit_cfg.patch[1], w // dit_cfg.patch[2]
        cache = init_cache(dit_cfg, batch, settings.window.frames, grid)
        decoder = None
        if vae_cfg is not None:
            shape = jax.ShapeDtypeStruct((len(keys), settings.window.clip, h, w, z), jnp.float32)
            decoder = decoder_state(weights["vae"], shape, vae_cfg)
        return method.init(cache, decoder, latent_size, keys)

    return Method(init, method.step)


def causal_model(weights, dit_cfg: DiTConfig, vae_cfg: VAEConfig | None, s: Causal) -> CausalModel:
    """The functions that `rollout.causal` needs."""
    decode = None
    if vae_cfg is not None:
        decode = Partial(bound(_decode, cfg=vae_cfg), weights["vae"])
    return CausalModel(
        Partial(bound(_denoise, cfg=dit_cfg, fill=s.fill), weights["dit"]),
        Partial(bound(_rotation, cfg=dit_cfg, turns=s.turns)),
        decode,
    )


def _sampler(s: Causal) -> Callable:
    if s.solver is None:
        if s.guidance is not None:
            raise InputError(
                f"guidance is {s.guidance} with few-step sampling, whose models have it built in; "
                "give guidance=None, or a solver"
            )
        return bound(sample_few, schedule=s.schedule)
    return once(bound(sample, schedule=s.schedule, solver=s.solver))


def _denoise(params, x, timestep, context, rotation, past, *, cfg: DiTConfig, fill: str):
    condition = None
    if cfg.condition_channels:  # nothing is given: earlier frames are in the memory
        latents = jnp.broadcast_to(blank(fill, x.shape[2:]), x.shape)
        condition = with_mask(jnp.zeros((x.shape[1], MASK), bool), latents)
    return dit(params, x, timestep, context, cfg, condition=condition, rotation=rotation, past=past)


def _rotation(frames, grid, *, cfg: DiTConfig, turns: Callable):
    return turn_table(frames, *grid, turns(cfg.head_dim, cfg.theta))


def _decode(params, state, latents, first, *, cfg: VAEConfig):
    return decode_next(params, state, latents, first, cfg)
