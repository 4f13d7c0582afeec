# SPDX-License-Identifier: Apache-2.0
"""Attention and matrix products: every implementation of `attend` that the device supports.

Small odd shapes are compared with float64 on the host; the timed shapes with float32 on the
device, on some rows (a softmax row depends on its own query alone).
"""

import functools
import math

import jax.numpy as jnp
import numpy as np

from lvjax.bench.draw import exact, floats, random_like, widen
from lvjax.bench.measure import Case, Work, relative
from lvjax.kernels.attention import IMPLEMENTATIONS, attend
from lvjax.kernels.attention_reference import attend_reference

HEAD_DIM = 128
SHEET = (
    (4680, 18720, 12),  # queries, keys, heads: a 3-frame chunk of 1.3B against 12 frames
    (4680, 32760, 12),  # against 21 frames
    (4680, 512, 12),  # against text
    (4680, 18720, 40),  # 14B
    (8640, 11040, 40),  # Helios
    (32760, 32760, 12),  # a whole clip against itself
)
SHEET_TINY = ((70, 200, 2), (33, 16, 1))
CHECKS = (
    ((65, 97, 2), None, "float32"),
    ((65, 97, 2), "query", "float32"),
    ((1, 130, 1), None, "bfloat16"),
    ((200, 40, 3), None, "bfloat16"),
    ((200, 40, 3), "key", "bfloat16"),
)
ROWS = 128  # rows that are compared at the timed shapes
BFLOAT16, FLOAT32 = 1e-2, 1e-5  # relative errors allowed; the first is the gate for any new kernel


def supported(impl: str, shape, dtype, masked: bool = False) -> bool:
    """Whether `impl` takes q, k, v of (queries, keys, heads) here."""
    length, keys, heads = shape
    q, k = (floats(1, n, heads, HEAD_DIM, dtype=dtype) for n in (length, keys))
    return IMPLEMENTATIONS[impl][1](q, k, k, True if masked else None)


def numpy_attention(q, k, v, mask=None) -> np.ndarray:
    """softmax(q k^T / sqrt(D)) v in float64, by its definition."""
    q, k, v = (np.asarray(a).astype(np.float64) for a in (q, k, v))
    scores = np.einsum("blnd,bsnd->bnls", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnls,bsnd->blnd", weights / weights.sum(-1, keepdims=True), v)


def checks() -> list[Case]:
    """Tails, one query, batch 2, masks per key and per query; two calls agree to the bit."""
    cases = []
    for shape, mask, dtype in CHECKS:
        gate = {"tolerance": BFLOAT16, "precision": None}
        if dtype == "float32":
            gate = {"tolerance": FLOAT32, "precision": "highest"}
        name = f"attention check, {mask} mask" if mask else "attention check"
        sizes = dict(zip("BLSND", (2, *shape, HEAD_DIM), strict=True))
        for impl in IMPLEMENTATIONS:
            if supported(impl, shape, dtype, mask is not None):
                build = functools.partial(check_work, impl, shape, mask, dtype)
                case = Case(name, sizes, dtype, impl, build, 5, timed=False, stable=True, **gate)
                cases.append(case)
    return cases


def check_work(impl: str, shape, mask: str | None, dtype: str) -> Work:
    length, keys, heads = shape
    q, k, v = random_like(
        [floats(2, n, heads, HEAD_DIM, dtype=dtype) for n in (length, keys, keys)]
    )
    if mask is not None:
        seen = np.random.default_rng(0).random((2, 1, length if mask == "query" else 1, keys)) < 0.5
        seen[..., 0] = True  # every query needs a key
        mask = jnp.asarray(seen)

    def run(q, k, v):
        return attend(q, k, v, mask=mask, impl=impl)

    return Work(run, (q, k, v), lambda out: relative(out, numpy_attention(q, k, v, mask)))


def sheet(tiny: bool) -> list[Case]:
    """Every implementation at the sheet's shapes in bfloat16, timed and compared."""
    cases = []
    for shape in SHEET_TINY if tiny else SHEET:
        sizes = dict(zip("LSND", (*shape, HEAD_DIM), strict=True))
        scores = math.prod(shape)
        kind = {"tolerance": BFLOAT16, "stable": True, "flops": 4.0 * scores * HEAD_DIM}
        for impl in IMPLEMENTATIONS:
            if supported(impl, shape, "bfloat16"):
                # the plain form holds its scores: float32 twice and once in bfloat16
                memory = 10 * scores if impl == "reference" else 0
                build = functools.partial(_sheet_work, shape, impl)
                seconds = 2 if tiny else 12
                case = Case("attention", sizes, "bfloat16", impl, build, seconds, memory, **kind)
                cases.append(case)
    return cases


def _sheet_work(shape, impl: str) -> Work:
    length, keys, heads = shape
    arrays = [floats(1, n, heads, HEAD_DIM, dtype="bfloat16") for n in (length, keys, keys)]
    q, k, v = random_like(arrays)
    rows = np.linspace(0, length - 1, min(length, ROWS)).astype(int)

    def error(out):
        return relative(out[:, rows], exact(attend_reference, *widen((q[:, rows], k, v))))

    return Work(functools.partial(attend, impl=impl), (q, k, v), error)


def gemms(tiny: bool) -> list[Case]:
    """bfloat16 matrix products; the first one is the rate that other rows are compared with."""
    shapes = [(8192, 8192, 8192), (4680, 1536, 8960), (4680, 5120, 13824)]
    cases = []
    for shape in [(64, 64, 64)] if tiny else shapes:
        sizes = dict(zip("MKN", shape, strict=True))
        kind = {"tolerance": BFLOAT16, "flops": 2.0 * math.prod(shape)}
        build = functools.partial(_gemm_work, *shape)
        cases.append(Case("gemm", sizes, "bfloat16", "xla", build, 2 if tiny else 8, **kind))
    return cases


def _gemm_work(m: int, k: int, n: int) -> Work:
    a, b = random_like([floats(m, k, dtype="bfloat16"), floats(k, n, dtype="bfloat16")])

    def run(a, b):
        return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(jnp.bfloat16)

    def error(out):
        return relative(out[:ROWS], exact(jnp.dot, *widen((a[:ROWS], b))))

    return Work(run, (a, b), error)
