# SPDX-License-Identifier: Apache-2.0
"""Measuring one program on the device at hand: compile time, device time, memory, error.

Owns: `Case` (what to measure), `run_case` (how), the facts of the machine.  Does not own: which
cases there are (cases_attention.py, cases_models.py).
"""

import gc
import importlib.metadata
import math
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import lvjax

WARM_UP = 3
SAMPLE = 0.01
"""Seconds that a timed sample lasts at least; its calls are queued, which hides dispatch."""


class Work(NamedTuple):
    """A case made ready: run(*args) is what is jitted; error(out), its relative error, or None."""

    run: Callable
    args: tuple
    error: Callable[[Any], float] | None = None


@dataclass(frozen=True)
class Case:
    """One row of the report.

    shape: names and sizes.  seconds: about what the whole case takes.  memory: bytes needed beside
    the inputs.  tolerance: relative error above which the case fails, None without a comparison.
    timed: False for a correctness case.  stable: two calls must agree to the bit.  flops: of one
    call.  precision: of float32 products ("highest": a GPU does not round their inputs), None for
    jax's default.
    """

    name: str
    shape: dict[str, int]
    dtype: str
    impl: str
    build: Callable[[], Work] = field(repr=False)
    seconds: float = 10.0
    memory: int = 0
    tolerance: float | None = None
    timed: bool = True
    stable: bool = False
    flops: float | None = None
    precision: str | None = None


def relative(a, b) -> float:
    """||a - b|| / ||b|| of two arrays, in float64 on the host."""
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def machine() -> dict:
    """Device, versions and, where the source tree has its history, the commit."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version(), "lvjax": lvjax.__version__}
    for name in ("jax", "jaxlib", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts = {"platform": device.platform, "device_kind": device.device_kind}
    return facts | {"devices": jax.device_count(), "versions": versions, "commit": commit()}


def commit() -> str | None:
    """The commit of the source tree that holds this file; None without one or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def device_memory() -> int | None:
    """Bytes that jax may use on the device, None where it does not say (the CPU)."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


def program_bytes(compiled) -> int | None:
    """Peak memory of one call as the compiler plans it: inputs, outputs and workspace."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return held + plan.temp_size_in_bytes


def sample_times(run: Callable, args: tuple, calls: int) -> list[float]:
    """Seconds per call of `calls` samples after warm-up; a sample is calls waited for together."""

    def seconds(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            out = run(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / n

    guess = min(seconds(1) for _ in range(WARM_UP))
    n = max(1, min(200, math.ceil(SAMPLE / guess)))
    return [seconds(n) for _ in range(calls)]


def spread(times: list[float]) -> dict:
    """Median and interquartile range."""
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
    return {
        "median_seconds": float(median),
        "iqr_seconds": float(high - low),
        "samples": len(times),
    }


def run_case(case: Case, calls: int = 7) -> dict:
    """Measure a case; a row with `status` "ok", "failed" or "does not fit".

    Errors of one program (a compiler's refusal, memory) become a row, so that the others still run.
    """
    row = {"case": case.name, "shape": case.shape, "dtype": case.dtype, "impl": case.impl}
    limit = device_memory()
    if limit is not None and case.memory > 0.9 * limit:
        note = f"needs about {case.memory / 2**30:.0f} GiB, the device has {limit / 2**30:.0f}"
        return row | {"status": "does not fit", "note": note}
    try:
        return row | _measured(case, calls)
    except (RuntimeError, ValueError, TypeError, MemoryError) as e:
        text = str(e).splitlines()[0][:300] if str(e) else ""
        if "RESOURCE_EXHAUSTED" in str(e) and case.timed:
            return row | {"status": "does not fit", "note": text}
        return row | {"status": "failed", "note": f"{type(e).__name__}: {text}"}
    finally:
        gc.collect()


def _measured(case: Case, calls: int) -> dict:
    work = case.build()
    jax.block_until_ready(work.args)
    high = jax.default_matmul_precision(case.precision) if case.precision else nullcontext()
    start = time.perf_counter()
    with high:
        compiled = jax.jit(work.run).lower(*work.args).compile()
    row = {"status": "ok", "compile_seconds": time.perf_counter() - start}
    row |= {"precision": case.precision, "peak_bytes": program_bytes(compiled)}
    if case.flops:
        row["flops"] = case.flops
    out = jax.block_until_ready(compiled(*work.args))
    notes = []
    if work.error is not None:
        row["relative_error"] = error = work.error(out)
        row["tolerance"] = case.tolerance
        if case.tolerance is not None and not error <= case.tolerance:
            notes.append(f"relative error {error:.1e} is above {case.tolerance:.0e}")
    if case.stable:
        again = jax.block_until_ready(compiled(*work.args))
        if not np.array_equal(np.asarray(out), np.asarray(again)):
            notes.append("two calls differ")
        del again
    del out
    if case.timed:
        row |= spread(sample_times(compiled, work.args, calls))
        if case.flops:
            row["tflops"] = case.flops / row["median_seconds"] / 1e12
    return row | ({"status": "failed", "note": "; ".join(notes)} if notes else {})
