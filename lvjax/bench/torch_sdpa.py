# SPDX-License-Identifier: Apache-2.0
"""The rival of the attention rows: PyTorch's scaled_dot_product_attention with a named backend.

Run as a process of its own, since memory pools and threads of two libraries disturb each other:
`python -m lvjax.bench.torch_sdpa '{"platform": "gpu", "shapes": [[4680, 512, 12]], "calls": 7}'`
prints one JSON line per row.  This is the one module of lvjax that imports torch, and nothing
imports it.
"""

import json
import math
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lvjax.bench.measure import SAMPLE, WARM_UP, spread

HEAD_DIM, ROWS = 128, 128
BACKENDS = {"gpu": ("CUDNN_ATTENTION", "FLASH_ATTENTION"), "cpu": ("FLASH_ATTENTION",)}


def sample_times(run, calls: int, gpu: bool) -> list[float]:
    """As `lvjax.bench.measure.sample_times`, with CUDA events on a GPU."""

    def seconds(n: int) -> float:
        if not gpu:
            start = time.perf_counter()
            for _ in range(n):
                run()
            return (time.perf_counter() - start) / n
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(n):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / n

    guess = min(seconds(1) for _ in range(WARM_UP))
    n = max(1, min(200, math.ceil(SAMPLE / guess)))
    return [seconds(n) for _ in range(calls)]


def measure(shape, backend: str, calls: int, device: str) -> dict:
    """One row; the error is against float32 on some query rows, as in lvjax's own rows."""
    length, keys, heads = shape
    sizes = {"L": length, "S": keys, "N": heads, "D": HEAD_DIM}
    impl = f"torch SDPA {backend.removesuffix('_ATTENTION').lower()}"
    row = {"case": "attention", "shape": sizes, "dtype": "bfloat16", "impl": impl}
    kind = {"device": device, "dtype": torch.bfloat16}
    q, k, v = (torch.randn(1, heads, n, HEAD_DIM, **kind) for n in (length, keys, keys))
    gpu = device == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = scaled_dot_product_attention(q, k, v)
            times = sample_times(lambda: scaled_dot_product_attention(q, k, v), calls, gpu)
    except RuntimeError as e:
        return row | {"status": "not supported", "note": str(e).splitlines()[0][:200]}
    peak = torch.cuda.max_memory_allocated() if gpu else None
    rows = torch.linspace(0, length - 1, min(length, ROWS)).long().to(device)
    scores = q[:, :, rows].float() @ k.float().transpose(-1, -2) / math.sqrt(HEAD_DIM)
    want = scores.softmax(-1) @ v.float()
    error = ((out[:, :, rows].float() - want).norm() / want.norm()).item()
    row |= {"status": "ok", "relative_error": error, "peak_bytes": peak} | spread(times)
    flops = 4.0 * length * keys * heads * HEAD_DIM
    return row | {"flops": flops, "tflops": flops / row["median_seconds"] / 1e12}


def main(argv: list[str]) -> int:
    job = json.loads(argv[0])
    if job["platform"] == "gpu" and not torch.cuda.is_available():
        print(json.dumps({"note": f"torch {torch.__version__} sees no GPU"}))
        return 0
    device = "cuda" if job["platform"] == "gpu" else "cpu"
    torch.manual_seed(0)
    with torch.inference_mode():
        for shape in job["shapes"]:
            for backend in BACKENDS[job["platform"]]:
                print(json.dumps(measure(shape, backend, job["calls"], device)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
