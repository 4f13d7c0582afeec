# SPDX-License-Identifier: Apache-2.0
"""Models: a DiT block, a whole forward pass, a decode step of the autoencoder.

Sizes are Wan's at 480x832: 1560 tokens per latent frame, latents of 60x104.  `tiny=True` keeps
every program and shrinks it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from lvjax.bench.draw import exact, floats, on_cpu, random_like, random_params, retype, widen
from lvjax.bench.measure import Case, Work, relative
from lvjax.core.params import abstract, num_bytes
from lvjax.models.config import (
    WAN_T2V_1_3B,
    WAN_T2V_14B,
    WAN_VAE_2_1,
    DiTConfig,
    VAEConfig,
)
from lvjax.models.dit import Context, dit, dit_spec
from lvjax.models.dit_block import block, block_spec
from lvjax.models.vae import decode_start, decode_step, vae_spec
from lvjax.nn.rope import grid_table

TINY_DIT = DiTConfig(256, 2, 2, 256, text_dim=32, text_len=16)
TINY_VAE = VAEConfig(8, 4, (1, 2), 1, (True,), mean=(0.0,) * 4, std=(1.0,) * 4)
VAE_FLOPS = 13.55e12  # one latent frame at 480x832

# Relative errors allowed.  Measured on a CPU in bfloat16: block 3e-3, decode step 3e-3 (tiny).
GATES = {
    ("dit", "bfloat16"): {"tolerance": 2e-2},
    ("dit", "float32"): {"tolerance": 2e-5, "precision": "highest"},
    ("vae", "bfloat16"): {"tolerance": 5e-2},
    ("vae", "float32"): {"tolerance": 1e-4, "precision": "highest"},
}


def checked_dtypes() -> tuple[str, ...]:
    """What is compared with the CPU's float32: on the CPU itself, bfloat16 alone."""
    return ("bfloat16",) if jax.default_backend() == "cpu" else ("float32", "bfloat16")


def in_float32(cfg: DiTConfig) -> DiTConfig:
    return dataclasses.replace(cfg, dtype="float32")


# ---- transformer -------------------------------------------------------------------


def forward_flops(cfg: DiTConfig, tokens: int, layers: int) -> float:
    """Multiply-adds count two; keys and values of the text are not part of a pass."""
    dense = 12 * cfg.dim**2 + 4 * cfg.dim * cfg.ffn_dim
    return float(layers) * tokens * (dense + 4 * cfg.dim * (tokens + cfg.text_len))


def block_args(cfg: DiTConfig, grid, dtype: str):
    """(params, x, e0, context, rotation) of one block over a clip of grid (T, h, w) tokens."""
    tokens = math.prod(grid)
    words = floats(1, cfg.text_len, cfg.num_heads, cfg.head_dim, dtype=dtype)
    own = floats(1, tokens, cfg.dim), floats(1, 1, 6, cfg.dim)
    x, e0, context = random_like((*own, Context(words, words)))
    frames = jnp.arange(grid[0], dtype=jnp.int32)
    rotation = grid_table(frames, *grid[1:], cfg.head_dim, cfg.theta)
    return random_params(block_spec(cfg), dtype), x, e0, context, rotation


@functools.cache
def run_block(cfg: DiTConfig):
    """(params, x, e0, context, rotation) -> x."""
    return lambda *args: block(*args, None, cfg)[0]


def block_checks(tiny: bool) -> list[Case]:
    """One block on the device against the CPU in float32."""
    cfg, grid = (TINY_DIT, (2, 4, 4)) if tiny else (WAN_T2V_1_3B, (1, 15, 26))
    sizes = {"L": math.prod(grid), "C": cfg.dim}
    cases = []
    for dtype in checked_dtypes():
        build = functools.partial(_block_work, cfg, grid, dtype, on_cpu)
        gate = GATES["dit", dtype]
        name = "block against CPU"
        cases.append(Case(name, sizes, dtype, "auto", build, 20, timed=False, **gate))
    return cases


def _block_work(cfg: DiTConfig, grid, dtype: str, place=lambda tree: tree) -> Work:
    args = block_args(cfg, grid, dtype)

    def error(out):
        return relative(out, exact(run_block(in_float32(cfg)), *place(widen(args))))

    return Work(run_block(dataclasses.replace(cfg, dtype=dtype)), args, error)


def blocks(tiny: bool) -> list[Case]:
    """A block of 1.3B and of 14B width over a 3-frame chunk."""
    cases = []
    real = [("1.3B", WAN_T2V_1_3B), ("14B", WAN_T2V_14B)]
    for name, cfg in [("tiny", TINY_DIT)] if tiny else real:
        grid = (2, 4, 4) if tiny else (3, 30, 52)
        sizes = {"L": math.prod(grid), "C": cfg.dim}
        kind = {"flops": forward_flops(cfg, math.prod(grid), 1), **GATES["dit", "bfloat16"]}
        build = functools.partial(_block_work, cfg, grid, "bfloat16")
        seconds = 3 if tiny else 30
        cases.append(Case(f"block {name}", sizes, "bfloat16", "auto", build, seconds, **kind))
    return cases


def forwards(tiny: bool) -> list[Case]:
    """The whole 1.3B model: a 3-frame chunk, and 21 frames (81 pixel frames), not compared."""
    cfg, name = (TINY_DIT, "tiny") if tiny else (WAN_T2V_1_3B, "1.3B")
    cases = []
    for size in [(2, 8, 8)] if tiny else [(3, 60, 104), (21, 60, 104)]:
        tokens = math.prod(size) // math.prod(cfg.patch)
        compare = size[0] < 21
        kind = {"flops": forward_flops(cfg, tokens, cfg.num_layers)}
        kind |= GATES["dit", "bfloat16"] if compare else {}
        seconds = 5 if tiny else 60 + 60 * compare
        memory = 3 * num_bytes(dit_spec(cfg))
        build = functools.partial(_forward_work, cfg, size, compare)
        sizes = dict(zip("THW", size, strict=True)) | {"tokens": tokens}
        case = Case(f"forward {name}", sizes, "bfloat16", "auto", build, seconds, memory, **kind)
        cases.append(case)
    return cases


def _forward_work(cfg: DiTConfig, size, compare: bool) -> Work:
    params = random_params(dit_spec(cfg), "bfloat16")
    words = (cfg.num_layers, 1, cfg.text_len, cfg.num_heads, cfg.head_dim)
    words = floats(*words, dtype="bfloat16")
    latents, context = random_like((floats(1, *size, cfg.in_channels), Context(words, words)))
    timestep = jnp.full((1,), 700.0)

    def run(params, latents, timestep, context, cfg=cfg):
        return dit(params, latents, timestep, context, cfg)[0]

    def error(out):
        wide = functools.partial(run, cfg=in_float32(cfg))
        return relative(out, exact(wide, widen(params), latents, timestep, widen(context)))

    return Work(run, (params, latents, timestep, context), error if compare else None)


# ---- autoencoder -------------------------------------------------------------------


def decode_args(cfg: VAEConfig, size, dtype: str):
    """(params, state, latent) of one decode step; weights and state in `dtype`."""
    spec = {k: v for k, v in vae_spec(cfg).items() if k in ("decoder", "post_quant")}
    latent, weights = floats(1, 1, *size, cfg.z), retype(abstract(spec), dtype)
    state = jax.eval_shape(lambda p, z: decode_start(p, z, cfg)[0], weights, latent)
    return random_params(spec, dtype), *random_like((state, latent))


@functools.cache
def run_decode(cfg: VAEConfig):
    """(params, state, latent) -> (state, pixels)."""
    return lambda params, state, latent: decode_step(params, state, latent, cfg)


def decode_checks(tiny: bool) -> list[Case]:
    """One decode step on the device against the CPU in float32."""
    cfg, size = (TINY_VAE, (4, 4)) if tiny else (WAN_VAE_2_1, (8, 8))
    cases = []
    for dtype in checked_dtypes():
        build = functools.partial(_decode_work, cfg, size, dtype, on_cpu)
        gate = GATES["vae", dtype]
        sizes, name = dict(zip("hw", size, strict=True)), "decode against CPU"
        cases.append(Case(name, sizes, dtype, "auto", build, 40, timed=False, **gate))
    return cases


def decodes(tiny: bool) -> list[Case]:
    """One latent frame to its pixel frames, state included; float32 as jax multiplies it."""
    cfg, size = (TINY_VAE, (4, 4)) if tiny else (WAN_VAE_2_1, (60, 104))
    sizes = dict(zip("hw", size, strict=True)) | {"frames": cfg.temporal_stride}
    kind = {"flops": None if tiny else VAE_FLOPS, **GATES["vae", "bfloat16"]}
    cases = []
    for dtype in ("bfloat16",) if tiny else ("bfloat16", "float32"):
        build = functools.partial(_decode_work, cfg, size, dtype)
        cases.append(Case("decode", sizes, dtype, "auto", build, 3 if tiny else 60, **kind))
    return cases


def _decode_work(cfg: VAEConfig, size, dtype: str, place=lambda tree: tree) -> Work:
    args = decode_args(cfg, size, dtype)

    def error(out):
        return relative(out[1], exact(run_decode(cfg), *place(widen(args)))[1])

    return Work(run_decode(cfg), args, error)
