# SPDX-License-Identifier: Apache-2.0
"""What a run will need, by arithmetic and before anything is compiled: memory, disk, and whether
they are there.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax

from lvjax.core.errors import DoesNotFitError, StorageError
from lvjax.core.params import num_bytes
from lvjax.run.bundle import Bundle, specs
from lvjax.run.session import clip_count

# bytes of the process once jax is up and the pocket programs are compiled, measured on the CPU
RUNTIME = 520e6
# more bytes while a program is compiled for the first time, measured on the CPU
COMPILING = 350e6
# H.264 bits per source pixel at the writer's quality, measured on pocket videos at six-fold size
VIDEO_BITS = 20.0


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, of memory; bytes of disk for the finished video and its saved state; clips
    and frames.
    """

    memory: dict[str, int]
    disk: int
    clips: int
    frames: int

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in self.memory.items())
        return (
            f"plan: {self.frames} frames in {self.clips} clips; memory {self.total / 1e9:.2f} GB "
            f"({parts}; {COMPILING / 1e6:.0f} MB more while compiling for the first time); "
            f"disk {self.disk / 1e6:.0f} MB"
        )


def make_plan(
    bundle: Bundle,
    *,
    batch: int,
    size: tuple[int, int],
    frames: int,
    given: int = 0,
    guided: bool = True,
) -> Plan:
    """The plan of a run of `batch` videos of size (height, width), `given` frames of which begin
    the first clip.
    """
    d, dit, vae = bundle.defaults, bundle.dit, bundle.vae
    rows = batch * (2 if guided else 1)
    h, w = (n // vae.spatial_stride for n in size)
    tokens = d.clip_latents * (h // dit.patch[1]) * (w // dit.patch[2])
    layers = d.layers or (dit.num_layers // 2, dit.num_layers)
    kv = 2 * (layers[1] - layers[0]) * rows * d.capacity * tokens * dit.dim * 4
    scores = rows * dit.num_heads * tokens * min(d.capacity * tokens, 8192) * 4
    activations = rows * tokens * (dit.ffn_dim + 12 * dit.dim) * 4
    pixels = batch * size[0] * size[1]
    picture = pixels / vae.patch**2 * vae.base * 4
    new = 4 * (d.clip_latents - d.overlap)
    memory = {
        "weights": sum(num_bytes(s) for s in specs(dit, vae, bundle.text).values()),
        "memory of clips": 3
        * kv,  # keys as saved, keys rotated, values; the saved copy on the host is short-lived
        "transformer": scores + activations,
        "autoencoder": round(picture * (12 + 4 * new)),
        "runtime": round(RUNTIME),
    }
    disk = round(batch * (pixels / batch * frames * VIDEO_BITS / 8 + 2e5) + kv)
    return Plan(memory, disk, clip_count(d, frames, given), frames)


def available_memory() -> int:
    """Bytes that a new process may use: on the CPU the free memory, within the control group's
    limit; else the device's.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return int(stats.get("bytes_limit", 0)) or 1 << 62
    free = 1 << 62
    for line in (
        Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else ()
    ):
        if line.startswith("MemAvailable"):
            free = int(line.split()[1]) * 1024
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path) and (text := Path(path).read_text().strip()).isdigit():
            free = min(free, int(text))
    return free


def check_plan(plan: Plan, bundle: Bundle, *, batch: int, size, frames: int, output) -> None:
    """Raises: DoesNotFitError with settings that fit; StorageError when the disk is too small."""
    have = available_memory()
    if plan.total + COMPILING > have:
        raise DoesNotFitError(
            f"the run needs {(plan.total + COMPILING) / 1e9:.1f} GB of memory, "
            f"{have / 1e9:.1f} GB are free; "
            f"{_smaller(bundle, batch, size, frames, have)}"
        )
    place = Path(output).resolve().parent
    try:
        free = shutil.disk_usage(place).free
    except OSError as e:
        raise StorageError(
            f"cannot write to {place}: {e.strerror or e}; choose another --out"
        ) from e
    if plan.disk > free:
        raise StorageError(
            f"the run needs {plan.disk / 1e6:.0f} MB on {place}, {free / 1e6:.0f} MB are free; "
            "free space or choose another --out"
        )


def _smaller(bundle: Bundle, batch: int, size, frames: int, have: int) -> str:
    """Fewer videos at once first, then a smaller picture."""
    unit = bundle.vae.spatial_stride * bundle.dit.patch[1]
    while batch > 1 or max(size) > unit:
        if batch > 1:
            batch //= 2
        else:
            size = tuple(max(unit, n // 2 // unit * unit) for n in size)
        if make_plan(bundle, batch=batch, size=size, frames=frames).total + COMPILING <= have:
            return f"{batch} videos at once of --size {size[1]}x{size[0]} fit"
    return "no smaller setting fits: free memory"
