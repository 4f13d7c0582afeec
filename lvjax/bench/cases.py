# SPDX-License-Identifier: Apache-2.0
"""What `lvjax.bench.gpu` measures: attention, matrix products, DiT block and forward, autoencoder decode.

Sizes are those of Wan at 480x832 (1560 tokens per latent frame); `tiny=True` keeps every program and shrinks it, for the
CPU.  Weights and inputs are random, never zeros: zeros make a GPU faster than it is.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.bench.measure import Case, Work, relative
from lvjax.core.params import abstract, init, map_spec, num_bytes
from lvjax.kernels.attention import IMPLEMENTATIONS, attend
from lvjax.models.config import WAN_T2V_1_3B, WAN_T2V_14B, WAN_VAE_2_1, DiTConfig, VAEConfig
from lvjax.models.dit import Context, dit, dit_spec
from lvjax.models.dit_block import block, block_spec
from lvjax.models.vae import decode_start, decode_step, vae_spec
from lvjax.nn.rope import grid_table

HEAD_DIM = 128
SHEET = ((4680, 18720, 12), (4680, 32760, 12), (4680, 512, 12), (4680, 18720, 40), (8640, 11040, 40), (32760, 32760, 12))
"""(queries, keys, heads): a 3-frame chunk against windows of 12 and 21 frames, against text, 14B, Helios, a whole clip."""

SHEET_TINY = ((70, 200, 2), (33, 16, 1))
ROWS = 128  # queries per head that are compared with the float32 truth at the sheet's shapes

TINY_DIT = DiTConfig(dim=256, num_heads=2, num_layers=2, ffn_dim=256, text_dim=32, text_len=16)
TINY_VAE = VAEConfig(base=8, z=4, dim_mult=(1, 2), res_blocks=1, temporal_down=(True,), mean=(0.0,) * 4, std=(1.0,) * 4)

# Relative errors (L2).  bfloat16 attention: the sheet's gate.  bfloat16 block: measured 3e-3 on a CPU.
TOLERANCE = {
    ("attention", "bfloat16"): 1e-2,
    ("attention", "float32"): 1e-5,
    ("gemm", "bfloat16"): 1e-2,
    ("block", "bfloat16"): 2e-2,
    ("block", "float32"): 2e-5,
    ("vae", "bfloat16"): 5e-2,
    ("vae", "float32"): 1e-4,
}


def all_cases(tiny: bool) -> list[Case]:
    """Every case, the most important first: when time is short the last ones are left out."""
    checks = [*attention_checks(), *block_checks(tiny), *decode_checks(tiny)]
    return [*checks, *gemms(tiny), *attention_sheet(tiny), *blocks(tiny), *decodes(tiny), *forwards(tiny)]


# ---- shared ------------------------------------------------------------------------


def supported(impl: str, shape, dtype, masked: bool = False) -> bool:
    """Whether `impl` takes q, k, v of (queries, keys, heads) here."""
    length, keys, heads = shape
    q, k = (jax.ShapeDtypeStruct((1, n, heads, HEAD_DIM), jnp.dtype(dtype)) for n in (length, keys))
    return IMPLEMENTATIONS[impl][1](q, k, k, True if masked else None)


def random_params(spec, dtype: str, seed: int = 0):
    """Parameters drawn as for training, but nothing stays zero; on the device, in `dtype`."""
    spec = map_spec(lambda p: dataclasses.replace(p, init=0.02) if p.init == "zeros" else p, spec)
    draw = jax.jit(lambda key: jax.tree.map(lambda a: a.astype(dtype), init(spec, key)))
    return draw(jax.random.key(seed))


def random_like(tree, seed: int = 1):
    """Standard normal arrays of the shapes and dtypes of a tree."""

    def draw(key):
        leaves, structure = jax.tree.flatten(tree)
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten([jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)])

    return jax.jit(draw)(jax.random.key(seed))


def floats(*shape: int, dtype: str = "float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def widen(tree):
    """The same arrays in float32."""
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def exact(f, *args):
    """f(*args) with float32 products that are not rounded, on the device that holds args."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(f)(*args)


def on_cpu(tree):
    """The arrays on the CPU; where jax has no CPU device here, as they are."""
    try:
        return jax.device_put(tree, jax.devices("cpu")[0])
    except RuntimeError:
        return tree


# ---- attention ---------------------------------------------------------------------


def numpy_attention(q, k, v, mask=None) -> np.ndarray:
    """softmax(q k^T / sqrt(D)) v in float64, by its definition."""
    q, k, v = (np.asarray(a).astype(np.float64) for a in (q, k, v))
    scores = np.einsum("blnd,bsnd->bnls", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnls,bsnd->blnd", weights / weights.sum(-1, keepdims=True), v)


def attention_checks() -> list[Case]:
    """Small odd shapes against float64: tails, one query, batch 2, masks per key and per query."""
    cases = []
    for (length, keys, heads), mask, dtype in (
        ((65, 97, 2), None, "float32"),
        ((65, 97, 2), "query", "float32"),
        ((1, 130, 1), None, "bfloat16"),
        ((200, 40, 3), None, "bfloat16"),
        ((200, 40, 3), "key", "bfloat16"),
    ):
        for impl in IMPLEMENTATIONS:
            if not supported(impl, (length, keys, heads), dtype, mask is not None):
                continue
            build = functools.partial(_attention_check, impl, (length, keys, heads), mask, dtype)
            shape = {"B": 2, "L": length, "S": keys, "N": heads, "D": HEAD_DIM}
            name = f"attention check, {mask} mask" if mask else "attention check"
            tolerance, precision = TOLERANCE["attention", dtype], "highest" if dtype == "float32" else None
            cases.append(Case(name, shape, dtype, impl, build, 5, 0, tolerance, False, True, None, precision))
    return cases


def _attention_check(impl, shape, mask, dtype) -> Work:
    length, keys, heads = shape
    sizes = [floats(2, n, heads, HEAD_DIM, dtype=dtype) for n in (length, keys, keys)]
    q, k, v = random_like(sizes)
    if mask is not None:
        seen = np.random.default_rng(0).random((2, 1, length if mask == "query" else 1, keys)) < 0.5
        seen[..., 0] = True
        mask = jnp.asarray(seen)
    run = lambda q, k, v: attend(q, k, v, mask=mask, impl=impl)
    return Work(run, (q, k, v), lambda out: relative(out, numpy_attention(q, k, v, mask)))


def attention_sheet(tiny: bool) -> list[Case]:
    """Every implementation at the sheet's shapes in bfloat16, timed and compared."""
    cases = []
    for shape in SHEET_TINY if tiny else SHEET:
        length, keys, heads = shape
        for impl in IMPLEMENTATIONS:
            if not supported(impl, shape, "bfloat16"):
                continue
            scores = length * keys * heads
            cases.append(
                Case(
                    "attention",
                    {"L": length, "S": keys, "N": heads, "D": HEAD_DIM},
                    "bfloat16",
                    impl,
                    functools.partial(_attention_work, shape, impl),
                    seconds=2 if tiny else 12,
                    memory=10 * scores if impl == "reference" else 0,  # float32 twice and bfloat16
                    tolerance=TOLERANCE["attention", "bfloat16"],
                    stable=True,
                    flops=4.0 * scores * HEAD_DIM,
                )
            )
    return cases


def _attention_work(shape, impl) -> Work:
    length, keys, heads = shape
    q, k, v = random_like([floats(1, n, heads, HEAD_DIM, dtype="bfloat16") for n in (length, keys, keys)])
    rows = np.linspace(0, length - 1, min(length, ROWS)).astype(int)

    def error(out):
        want = exact(functools.partial(attend, impl="reference"), *widen((q[:, rows], k, v)))
        return relative(out[:, rows], want)

    return Work(functools.partial(attend, impl=impl), (q, k, v), error)


# ---- matrix products ---------------------------------------------------------------


def gemms(tiny: bool) -> list[Case]:
    """The first one is the rate that other rows are compared with."""
    shapes = [(64, 64, 64)] if tiny else [(8192, 8192, 8192), (4680, 1536, 8960), (4680, 5120, 13824)]
    cases = []
    for m, k, n in shapes:
        build = functools.partial(_gemm_work, m, k, n)
        shape, tolerance = {"M": m, "K": k, "N": n}, TOLERANCE["gemm", "bfloat16"]
        cases.append(Case("gemm", shape, "bfloat16", "xla", build, 2 if tiny else 8, tolerance=tolerance, flops=2.0 * m * k * n))
    return cases


def _gemm_work(m, k, n) -> Work:
    a, b = random_like([floats(m, k, dtype="bfloat16"), floats(k, n, dtype="bfloat16")])
    run = lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32).astype(jnp.bfloat16)
    return Work(run, (a, b), lambda out: relative(out[:ROWS], exact(jnp.dot, *widen((a[:ROWS], b)))))


# ---- transformer -------------------------------------------------------------------


def block_args(cfg: DiTConfig, grid, dtype: str):
    """(params, x, e0, context, rotation) of one block over a clip of grid (T, h, w) tokens."""
    tokens = math.prod(grid)
    words = floats(1, cfg.text_len, cfg.num_heads, cfg.head_dim, dtype=dtype)
    x, e0, context = random_like((floats(1, tokens, cfg.dim), floats(1, 1, 6, cfg.dim), Context(words, words)))
    rotation = grid_table(jnp.arange(grid[0], dtype=jnp.int32), *grid[1:], cfg.head_dim, cfg.theta)
    return random_params(block_spec(cfg), dtype), x, e0, context, rotation


def run_block(cfg: DiTConfig):
    return lambda params, x, e0, context, rotation: block(params, x, e0, context, rotation, None, cfg)[0]


def forward_flops(cfg: DiTConfig, tokens: int, layers: int) -> float:
    """Multiply-adds count two; keys and values of the text are not part of a pass."""
    dense = 12 * cfg.dim**2 + 4 * cfg.dim * cfg.ffn_dim
    return float(layers) * tokens * (dense + 4 * cfg.dim * (tokens + cfg.text_len))


def block_checks(tiny: bool) -> list[Case]:
    """One block on the device, in float32 and bfloat16, against the CPU in float32."""
    cfg, grid = (TINY_DIT, (2, 4, 4)) if tiny else (WAN_T2V_1_3B, (1, 15, 26))
    shape = {"L": math.prod(grid), "C": cfg.dim}
    cases = []
    for dtype in ("float32", "bfloat16"):
        build = functools.partial(_block_check, dataclasses.replace(cfg, dtype=dtype), grid, dtype)
        tolerance, precision = TOLERANCE["block", dtype], "highest" if dtype == "float32" else None
        cases.append(Case("block against CPU", shape, dtype, "dit_block", build, 20, 0, tolerance, False, precision=precision))
    return cases


def _block_check(cfg, grid, dtype) -> Work:
    args = block_args(cfg, grid, dtype)
    run = run_block(dataclasses.replace(cfg, dtype="float32"))
    return Work(run_block(cfg), args, lambda out: relative(out, exact(run, *on_cpu(widen(args)))))


def blocks(tiny: bool) -> list[Case]:
    """A block of 1.3B and of 14B width over a 3-frame chunk."""
    cases = []
    for name, cfg in [("tiny", TINY_DIT)] if tiny else [("1.3B", WAN_T2V_1_3B), ("14B", WAN_T2V_14B)]:
        grid = (2, 4, 4) if tiny else (3, 30, 52)
        tokens = math.prod(grid)
        build = functools.partial(_block_work, cfg, grid)
        shape = {"L": tokens, "C": cfg.dim}
        flops, tolerance = forward_flops(cfg, tokens, 1), TOLERANCE["block", "bfloat16"]
        cases.append(Case(f"block {name}", shape, "bfloat16", "auto", build, 3 if tiny else 30, tolerance=tolerance, flops=flops))
    return cases


def _block_work(cfg, grid) -> Work:
    args = block_args(cfg, grid, "bfloat16")
    run = run_block(dataclasses.replace(cfg, dtype="float32"))
    return Work(run_block(cfg), args, lambda out: relative(out, exact(run, *widen(args))))


def forwards(tiny: bool) -> list[Case]:
    """The whole 1.3B model: a 3-frame chunk (compared with float32) and 21 frames, 81 pixel frames."""
    cfg, name = (TINY_DIT, "tiny") if tiny else (WAN_T2V_1_3B, "1.3B")
    weights = num_bytes(dit_spec(cfg))
    cases = []
    for frames, h, w in [(2, 8, 8)] if tiny else [(3, 60, 104), (21, 60, 104)]:
        compare = tiny or frames == 3
        tokens = frames * (h // 2) * (w // 2)
        build = functools.partial(_forward_work, cfg, (frames, h, w), compare)
        shape = {"T": frames, "H": h, "W": w, "tokens": tokens}
        case = Case(f"forward {name}", shape, "bfloat16", "auto", build, 5 if tiny else 60 + 60 * compare)
        tolerance = TOLERANCE["block", "bfloat16"] if compare else None
        flops = forward_flops(cfg, tokens, cfg.num_layers)
        cases.append(dataclasses.replace(case, memory=3 * weights, tolerance=tolerance, flops=flops))
    return cases


def _forward_work(cfg, size, compare: bool) -> Work:
    params = random_params(dit_spec(cfg), "bfloat16")
    words = floats(cfg.num_layers, 1, cfg.text_len, cfg.num_heads, cfg.head_dim, dtype="bfloat16")
    latents, context = random_like((floats(1, *size, cfg.in_channels), Context(words, words)))
    timestep = jnp.full((1,), 700.0)

    def run(params, latents, timestep, context, cfg=cfg):
        return dit(params, latents, timestep, context, cfg)[0]

    def error(out):
        wide = functools.partial(run, cfg=dataclasses.replace(cfg, dtype="float32"))
        return relative(out, exact(wide, widen(params), latents, timestep, widen(context)))

    return Work(run, (params, latents, timestep, context), error if compare else None)


# ---- autoencoder -------------------------------------------------------------------


def decode_args(cfg: VAEConfig, size, dtype: str):
    """(params, state, latent) of one decode step: weights and state in `dtype`, the latent float32."""
    spec = {k: v for k, v in vae_spec(cfg).items() if k in ("decoder", "post_quant")}
    latent = floats(1, 1, *size, cfg.z)
    kinds = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype)), abstract(spec))
    state = jax.eval_shape(lambda p, z: decode_start(p, z, cfg)[0], kinds, latent)
    state, latent = random_like((state, latent))
    return random_params(spec, dtype), state, latent


def run_decode(cfg: VAEConfig):
    """Pixels alone, for comparing."""
    return lambda params, state, latent: decode_step(params, state, latent, cfg)[1]


def decode_checks(tiny: bool) -> list[Case]:
    """One decode step on the device, in float32 and bfloat16, against the CPU in float32."""
    cfg, size = (TINY_VAE, (4, 4)) if tiny else (WAN_VAE_2_1, (8, 8))
    cases = []
    for dtype in ("float32", "bfloat16"):
        build = functools.partial(_decode_check, cfg, size, dtype)
        tolerance, precision = TOLERANCE["vae", dtype], "highest" if dtype == "float32" else None
        shape = {"h": size[0], "w": size[1]}
        cases.append(Case("decode against CPU", shape, dtype, "decode_step", build, 40, 0, tolerance, False, precision=precision))
    return cases


def _decode_check(cfg, size, dtype) -> Work:
    args = decode_args(cfg, size, dtype)
    return Work(run_decode(cfg), args, lambda out: relative(out, exact(run_decode(cfg), *on_cpu(widen(args)))))


def decodes(tiny: bool) -> list[Case]:
    """One latent frame to four pixel frames, state included; float32 as jax multiplies it by default."""
    cfg, size = (TINY_VAE, (4, 4)) if tiny else (WAN_VAE_2_1, (60, 104))
    flops = None if tiny else 13.55e12
    cases = []
    for dtype in ("bfloat16", "float32"):
        build = functools.partial(_decode_work, cfg, size, dtype)
        shape = {"h": size[0], "w": size[1], "frames": cfg.temporal_stride}
        case = Case("decode", shape, dtype, "decode_step", build, 3 if tiny else 60)
        cases.append(dataclasses.replace(case, tolerance=TOLERANCE["vae", "bfloat16"], flops=flops))
    return cases


def _decode_work(cfg, size, dtype) -> Work:
    args = decode_args(cfg, size, dtype)
    run = lambda params, state, latent: decode_step(params, state, latent, cfg)
    return Work(run, args, lambda out: relative(out[1], exact(run_decode(cfg), *widen(args))))
