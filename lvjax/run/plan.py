# SPDX-License-Identifier: Apache-2.0
"""What a run will need, by arithmetic, before weights are read and before anything is compiled:
memory, disk and time; and whether memory and disk are there.

Does not own: the compiled programs, whose real figures need minutes of compilation; tests hold the
plan against measured peaks.
"""

import dataclasses
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lvjax.core.errors import DoesNotFitError, StorageError
from lvjax.core.params import flatten
from lvjax.flow.schedule import make_schedule
from lvjax.flow.truncated import steps_needed
from lvjax.kernels.attention import score_bytes
from lvjax.memory.cache import init_cache
from lvjax.methods.error_free import memory_layers
from lvjax.models.config import VAEConfig
from lvjax.models.vae import vae_spec
from lvjax.rollout.condition import MASK
from lvjax.run.bundle import Bundle, weight_bytes
from lvjax.run.request import Request, resolved
from lvjax.run.session import cuts, data_mesh
from lvjax.run.state import state_path

# bytes of the process once jax is up and the pocket programs are loaded, measured on the CPU
RUNTIME = 520e6
# more bytes while a program is compiled for the first time, measured on the CPU
COMPILING = 350e6
# H.264 bits per source pixel at the writer's quality, measured on pocket videos at six-fold size
VIDEO_BITS = 20.0
# Times the bank of keys and values that a clip holds: the bank as saved once; the rest are rotated
# keys and the copies that the loops over layers and steps carry.  XLA's memory analysis on the CPU:
# arguments and workspace grow by 3.24 bytes per byte of bank.
BANKS = 3.25
# share of the rate of one matrix product that a clip reaches, measured on the CPU
EFFICIENCY = 0.8


@dataclass(frozen=True)
class Work:
    """What is to be made, as far as it costs anything.

    batch: videos at once.  size: (height, width) in pixels.  clips, frames: to be made of each
    video, in clips and in pixel frames.  steps: of the sampler.  guided: whether guidance doubles
    the batch.
    """

    batch: int
    size: tuple[int, int]
    clips: int
    frames: int
    steps: int
    guided: bool
    method: str = "error_free"


class Shape(NamedTuple):
    """What one clip is to the transformer and the autoencoder.

    latents: frames of the clip.  bank: clips whose keys are seen, the clip itself among them.
    kept: whether they are held in a bank.  passes: of the transformer.  encoded: latent frames that
    the autoencoder makes of pictures.
    """

    latents: int
    bank: int
    kept: bool
    passes: int
    encoded: int


@dataclass(frozen=True)
class Plan:
    """Needs of a run, in bytes and floating-point operations.

    memory: by purpose, on each device.  devices: how many the batch is spread over.  host: of the
    process, outside the devices' memory.  shared: whether the devices' memory is the host's, as on
    the CPU.  disk: the finished videos, and the state twice, because a new one is complete before
    the old one goes.  flops: of the whole run, all devices together.
    """

    memory: dict[str, int]
    devices: int
    host: int
    shared: bool
    disk: int
    flops: float
    clips: int
    frames: int

    @property
    def device_bytes(self) -> int:
        """Peak on one device."""
        return sum(self.memory.values())

    @property
    def host_bytes(self) -> int:
        """Peak of the process, with programs compiled before."""
        return self.host + self.shared * self.devices * self.device_bytes


def work_of(request: Request, bundle: Bundle, clip: int = 0) -> Work:
    """What a request asks of a model, from clip number `clip` on."""
    parts, asked = cuts(bundle, request), resolved(bundle, request)
    return Work(
        batch=len(asked.timelines),
        size=asked.size,
        clips=parts.clips - clip,
        frames=asked.frames - parts.begin(clip),
        steps=asked.steps,
        guided=asked.guidance != 1,
        method=asked.method,
    )


def _shape(bundle: Bundle, work: Work) -> Shape:
    """What a clip of this method is."""
    d = bundle.defaults
    steps = min(work.steps, 1000)  # a session refuses more
    if work.method == "wan":
        latents = 1 + (work.frames - 1) // MASK
        return Shape(latents, 1, False, steps, latents * (bundle.dit.condition_channels > 0))
    sigmas = make_schedule(steps, d.shift, d.solver).sigmas
    passes = steps_needed(sigmas, d.window) + 1  # the last one to remember
    return Shape(d.clip_latents, d.capacity, True, passes, d.overlap)


def make_plan(bundle: Bundle, work: Work) -> Plan:
    """The plan of a run; of the bundle only the sizes and defaults are used."""
    shape, dit, vae = _shape(bundle, work), bundle.dit, bundle.vae
    devices = data_mesh(work.batch).size
    shared = jax.default_backend() == "cpu"
    batch = work.batch // devices
    rows = batch * (2 if work.guided else 1)
    grid, tokens = _tokens(bundle, work)
    bank = _bank_bytes(bundle, rows, grid) if shape.kept else 0
    scores = score_bytes(rows, dit.num_heads, tokens, shape.bank * tokens)
    activations = rows * tokens * (dit.ffn_dim + 12 * dit.dim) * 4
    picture = batch * math.prod(work.size) / vae.patch**2 * _full_size_channels(vae) * 4
    new = shape.latents - (shape.encoded if shape.kept else 0)
    decoding = round(picture * (12 + 4 * MASK * new))
    memory = {
        "weights": weight_bytes(bundle),
        "memory of clips": round(BANKS * bank),
        "transformer": scores + activations,
        "autoencoder": decoding,
    }
    condition = batch * tokens * math.prod(dit.patch) * (MASK + vae.z) * 4
    state = devices * (bank + condition)
    # Saving copies the state to the host and into a file twice over.  On the CPU that is less than
    # the same memory held while computing.
    saving = 0 if shared else 3 * state
    return Plan(
        memory=memory,
        devices=devices,
        host=round(RUNTIME) + saving,
        shared=shared,
        disk=round(
            work.batch * (math.prod(work.size) * work.frames * VIDEO_BITS / 8 + 2e5) + 2 * state
        ),
        flops=float(work.clips) * devices * _clip_flops(bundle, work, rows, batch),
        clips=work.clips,
        frames=work.frames,
    )


def _tokens(bundle: Bundle, work: Work) -> tuple[tuple[int, int], int]:
    """Tokens per latent frame as (height, width), and per clip."""
    unit = (bundle.vae.spatial_stride * p for p in bundle.dit.patch[1:])
    grid = tuple(n // u for n, u in zip(work.size, unit, strict=True))
    return grid, _shape(bundle, work).latents // bundle.dit.patch[0] * math.prod(grid)


def _layers(bundle: Bundle) -> tuple[int, int]:
    """The half-open range of layers that have memory."""
    return bundle.defaults.layers or memory_layers(bundle.dit)


def _bank_bytes(bundle: Bundle, rows: int, grid: tuple[int, int]) -> int:
    """Keys and values of the remembered clips, as the cache itself lays them out."""
    frames = bundle.defaults.capacity * bundle.defaults.clip_latents
    bank = jax.eval_shape(lambda: init_cache(bundle.dit, rows, frames, grid, _layers(bundle)))
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(bank))


def _clip_flops(bundle: Bundle, work: Work, rows: int, batch: int) -> float:
    """Floating-point operations of one clip on one device: the transformer once per step of the
    sampler that T-RFlow runs and once to remember, then decoding, and encoding the overlap.
    """
    shape, dit, vae = _shape(bundle, work), bundle.dit, bundle.vae
    _, tokens = _tokens(bundle, work)
    first, last = _layers(bundle)
    seen = dit.num_layers * (tokens + dit.text_len) + (last - first) * (shape.bank - 1) * tokens
    products = dit.num_layers * (6 * dit.dim + 2 * dit.ffn_dim)
    transformer = tokens * dit.dim * (2 * products + 4 * seen)
    size = tuple(n // vae.spatial_stride for n in work.size)
    pictures = _vae_flops(vae, "decoder", shape.latents, size)
    if shape.encoded:
        pictures += _vae_flops(vae, "encoder", shape.encoded, size)
    return rows * shape.passes * transformer + batch * pictures


def _full_size_channels(vae: VAEConfig) -> float:
    """Channels where the decoder has reached the size of the picture, on average over the first
    layer there: those of Wan 2.2 halve only after it.
    """
    last = vae_spec(vae)["decoder"][f"stage{len(vae.dim_mult) - 1}"]
    return sum(last["res0"]["conv1"]["kernel"].shape[-2:]) / 2


def _vae_flops(vae: VAEConfig, part: str, latents: int, size: tuple[int, int]) -> float:
    """Floating-point operations of the convolutions of one video through "encoder" or "decoder".

    latents: frames of the latent video; size: (h, w) of it.
    """
    last, decoder = len(vae.dim_mult) - 1, part == "decoder"
    stages = {f"stage{i}": i for i in range(last + 1)}
    stages |= {"conv_in": 0, "mid": 0 if decoder else last, "head": last}
    total = 0.0
    for name, weight in flatten(vae_spec(vae)[part]).items():
        if len(weight.shape) >= 4:  # a kernel
            i = stages[name.split("/")[0]]
            slowed = vae.temporal_down[::-1][:i] if decoder else vae.temporal_down[i:]
            frames = 1 + (latents - 1) * 2 ** sum(slowed)
            pixels = math.prod(size) * 4 ** (i if decoder else last - i)
            total += 2.0 * math.prod(weight.shape) * frames * pixels
    return total


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


def seconds(plan: Plan, rate: float) -> float:
    """Estimated duration without loading and compiling; rate as `measured_rate` gives it.

    Devices that share the host's memory are taken to share its cores too.
    """
    return plan.flops / (rate * EFFICIENCY * (1 if plan.shared else plan.devices))


def describe(plan: Plan, rate: float) -> str:
    """The plan in one line for the user."""
    parts = ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in plan.memory.items())
    each = "" if plan.devices == 1 else f" on each of {plan.devices} devices"
    return (
        f"plan: {plan.frames} frames in {plan.clips} clips; memory {plan.host_bytes / 1e9:.2f} GB "
        f"({parts}{each}; the process itself {plan.host / 1e6:.0f} MB, and "
        f"{COMPILING / 1e6:.0f} MB more while compiling for the first time); "
        f"disk {plan.disk / 1e6:.0f} MB; about {_duration(seconds(plan, rate))} (estimate: "
        f"{plan.flops / 1e12:.2g} TFLOP at {EFFICIENCY:.0%} of the {rate / 1e9:.0f} GFLOP/s of a "
        "matrix product timed now; loading and compiling come on top)"
    )


def _duration(s: float) -> str:
    return f"{s:.0f} s" if s < 120 else f"{s / 60:.0f} min" if s < 7200 else f"{s / 3600:.1f} h"


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


def fits(plan: Plan) -> bool:
    """Whether memory is there, for the device and for the process."""
    on_device = plan.shared or plan.device_bytes <= device_memory()
    return on_device and plan.host_bytes + COMPILING <= host_memory()


def check_memory(plan: Plan, bundle: Bundle, work: Work) -> None:
    """Raises: DoesNotFitError with settings that fit."""
    if not fits(plan):
        needs = f"{(plan.host_bytes + COMPILING) / 1e9:.1f} GB of memory"
        have = f"{host_memory() / 1e9:.1f} GB are free"
        if not plan.shared:
            needs += f" and {plan.device_bytes / 1e9:.1f} GB on each device"
            have += f", {device_memory() / 1e9:.1f} GB on a device"
        raise DoesNotFitError(f"the run needs {needs}, {have}; {_smaller(bundle, work)}")


def check_disk(plan: Plan, output) -> None:
    """Raises: StorageError when the disk is too small; a state that is there is counted."""
    place = os.path.dirname(os.path.realpath(output))
    try:
        free = shutil.disk_usage(place).free
    except OSError as e:
        raise StorageError(
            f"cannot write to {place}: {e.strerror or e}; choose another --out"
        ) from e
    there = state_path(output)
    needs = plan.disk - (there.stat().st_size if there.is_file() else 0)
    if needs > free:
        raise StorageError(
            f"the run needs {needs / 1e6:.0f} MB on {place}, {free / 1e6:.0f} MB are free; "
            "free space or choose another --out"
        )


def _smaller(bundle: Bundle, work: Work) -> str:
    """Fewer videos at once first, then a smaller picture; all else as asked."""
    unit = bundle.vae.spatial_stride * bundle.dit.patch[1]
    while work.batch > 1 or max(work.size) > unit:
        if work.batch > 1:
            work = dataclasses.replace(work, batch=work.batch // 2)
        else:
            size = tuple(max(unit, n // 2 // unit * unit) for n in work.size)
            work = dataclasses.replace(work, size=size)
        if fits(make_plan(bundle, work)):
            height, width = work.size
            videos = "one video" if work.batch == 1 else f"{work.batch} videos at once"
            return f"{videos} of --size {width}x{height} would fit"
    return "no smaller setting fits: free memory"
