# SPDX-License-Identifier: Apache-2.0
"""What this machine has: free memory of the host and of a device, and how fast it multiplies."""

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp


def host_memory() -> int:
    """Free bytes of the machine, within the control group's limit."""
    free = 1 << 62
    for line in (
        Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else ()
    ):
        if line.startswith("MemAvailable"):
            free = int(line.split()[1]) * 1024
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path) and (text := Path(path).read_text().strip()).isdigit():
            free = min(free, int(text) - _group_uses(Path(path).parent))
    return free


def _group_uses(folder: Path) -> int:
    """Bytes that a control group holds and cannot drop: file pages that lie idle do not count."""
    used = [p for n in ("memory.current", "memory.usage_in_bytes") if (p := folder / n).exists()]
    stat = (folder / "memory.stat").read_text() if (folder / "memory.stat").exists() else ""
    lines = dict(line.split() for line in stat.splitlines())
    idle = int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))
    return max(0, int(used[0].read_text()) - idle) if used else 0


def device_memory() -> int:
    """Bytes that jax may use on a device; without bound where the device does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 0)) or 1 << 62


def shares_memory() -> bool:
    """Whether the devices' memory is the host's, as on the CPU."""
    return jax.default_backend() == "cpu"


def measured_rate(dtype: str) -> float:
    """Floating-point operations per second of this device in one large matrix product, now."""
    n = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2.0 * n**3 / sorted(times)[2]
