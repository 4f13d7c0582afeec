# SPDX-License-Identifier: Apache-2.0
"""Error-Free: clip-by-clip extension with a bank of remembered clips and truncated rectified flow.

Source: "Towards Error-Free Long Video Generation", arXiv:2606.22370.  No code is public; where the
paper is silent the defaults are our reading of it.
"""

from dataclasses import dataclass, field

from jax.tree_util import Partial

from lvjax.core.errors import InputError
from lvjax.core.functional import bound
from lvjax.flow.sampling import find_solver, sample
from lvjax.flow.schedule import Schedule, make_schedule
from lvjax.flow.truncated import flow_window
from lvjax.memory.cache import init_cache
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import dit
from lvjax.models.vae import decode, encode
from lvjax.nn.rope import grid_table
from lvjax.rollout.clipwise import POSITIONS, ClipModel, Knobs, clipwise
from lvjax.rollout.condition import MASK
from lvjax.rollout.method import Method


@dataclass(frozen=True)
class ErrorFree:
    """Settings of the method; a star marks what the paper leaves open.

    schedule, solver, guidance: the sampler*; guidance None is a single pass.  window: T-RFlow's
    [low, high], None for the plain sampler.  axis: the window is in flow time "flow"* or in steps
    "index".
    capacity: clips in the bank, the one being made included (the paper shows five).  layers: DiT
    layers (first, last) with memory, None for the latter half.  overlap: latent frames shared with
    the clip before*.
    positions: "absolute" or "relative"*.  fill: frames not given are "pixel"* (grey), "latent"
      (zeros) or "position" (their cells' places).
    """

    schedule: Schedule = field(default_factory=lambda: make_schedule(50, 5.0))
    solver: str = "unipc"
    guidance: float | None = 5.0
    window: tuple[float, float] | None = (0.3, 0.7)
    axis: str = "flow"
    capacity: int = 6
    layers: tuple[int, int] | None = None
    overlap: int = 2
    positions: str = "absolute"
    fill: str = "pixel"


def error_free(
    weights, dit_cfg: DiTConfig, vae_cfg: VAEConfig, settings: ErrorFree | None = None
) -> Method:
    """The method for an extension model: a DiT with 4 + z condition channels, and its VAE.

    weights: {"dit": parameters, "vae": parameters}.
    init(condition [B,T,h,w,4+z], keys [B]): see `first_condition`; one typed key per row.
    step: a `Clip` whose context is `embed_context` of [prompts; negative prompts], slot [B] and
    visible [B, capacity] from `memory.placement`; returns (state, (latents [B,T,h,w,z], frames
    [B,P,H,W,3])).
    Raises: InputError when the model takes no such condition, or a setting is unknown.
    """
    settings = ErrorFree() if settings is None else settings
    if dit_cfg.condition_channels != 4 + vae_cfg.z:
        raise InputError(
            f"the model has {dit_cfg.condition_channels} condition channels; "
            f"this method needs {4 + vae_cfg.z}"
        )
    if settings.positions not in POSITIONS:
        raise InputError(
            f"positions={settings.positions!r} is unknown; choose one of {list(POSITIONS)}"
        )
    if vae_cfg.temporal_stride != MASK:
        raise InputError(
            f"the autoencoder makes {vae_cfg.temporal_stride} frames per latent frame; "
            f"this method needs {MASK}"
        )
    find_solver(settings.solver)
    if settings.window is not None:
        flow_window(settings.schedule.sigmas, settings.window, settings.axis)
    model = ClipModel(
        denoise=Partial(bound(_denoise, cfg=dit_cfg), weights["dit"]),
        rotation=Partial(bound(_rotation, cfg=dit_cfg)),
        encode=Partial(bound(encode, cfg=vae_cfg), weights["vae"]),
        decode=Partial(bound(decode, cfg=vae_cfg), weights["vae"]),
    )
    sampler = bound(
        sample,
        schedule=settings.schedule,
        solver=settings.solver,
        window=settings.window,
        axis=settings.axis,
    )
    knobs = Knobs(settings.overlap, settings.guidance, POSITIONS[settings.positions], settings.fill)
    method = clipwise(model, sampler, knobs)

    def init(condition, keys):
        b, t, h, w, _ = condition.shape
        grid = h // dit_cfg.patch[1], w // dit_cfg.patch[2]
        layers = settings.layers or memory_layers(dit_cfg)
        batch = b if settings.guidance is None else 2 * b
        return method.init(
            init_cache(dit_cfg, batch, settings.capacity * t, grid, layers), condition, keys
        )

    return Method(init, method.step)


def memory_layers(cfg: DiTConfig) -> tuple[int, int]:
    """The half-open range of layers with memory, where nothing else is said: the latter half."""
    return cfg.num_layers // 2, cfg.num_layers


def _denoise(params, x, timestep, context, condition, rotation, past, *, cfg: DiTConfig):
    return dit(params, x, timestep, context, cfg, condition=condition, rotation=rotation, past=past)


def _rotation(frames, grid, *, cfg: DiTConfig):
    return grid_table(frames, *grid, cfg.head_dim, cfg.theta)
