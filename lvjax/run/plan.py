# SPDX-License-Identifier: Apache-2.0
"""What a run will need, before weights are read and before anything is compiled: memory, disk and
time; whether they are there; and where the weights of the transformers should wait.

Does not own: what the parts of a model cost (costs.py), what the machine has (machine.py), and the
compiled programs, whose real figures need minutes of compilation; tests hold the plan against
measured peaks.
"""

import dataclasses
import math
import os
import shutil
import tempfile
from dataclasses import dataclass

import numpy as np

from lvjax.core.errors import DoesNotFitError, StorageError
from lvjax.rollout.condition import MASK, pixel_frames
from lvjax.run import costs
from lvjax.run.bundle import Bundle
from lvjax.run.machine import device_memory, host_memory, shares_memory
from lvjax.run.opening import ClipWork
from lvjax.run.request import Request, resolved
from lvjax.run.session import OPENINGS, check_offload, cuts, data_mesh
from lvjax.run.spill import ClipFiles, clips_path
from lvjax.run.state import state_path
from lvjax.run.weights import weight_bytes

# bytes of the process once jax is up and the pocket programs are loaded, measured on the CPU
RUNTIME = 520e6
# more bytes while a program is compiled for the first time, measured on the CPU
COMPILING = 350e6
# H.264 bits per source pixel at the writer's quality, measured on pocket videos at six-fold size
VIDEO_BITS = 20.0
# Times the bank of keys and values that a clip holds: the bank as saved once; the rest are rotated
# keys and the copies that the loops over layers and steps carry.  By XLA's memory analysis of
# pocket clips on the CPU, with banks of 8 to 118 MB.
BANKS = 2.2
# share of the rate of one matrix product that a clip reaches, measured on the CPU
EFFICIENCY = 0.8

OFFLOADS = ("auto", "none", "expert", "layers")
"""What may be asked for, see `propose` and `Bundle.offload`."""


@dataclass(frozen=True)
class Work:
    """What is to be made, as far as it costs anything.

    batch: videos at once.  size: (height, width) in pixels.  clips, frames: to be made of each
    video, in clips and in pixel frames.  guided: whether guidance doubles the batch.  clip: what
    the method does for each.
    """

    batch: int
    size: tuple[int, int]
    clips: int
    frames: int
    guided: bool
    clip: ClipWork
    method: str = "error_free"


@dataclass(frozen=True)
class Plan:
    """Needs of a run, in bytes and floating-point operations.

    memory: by purpose, on each device, when it is most.  devices: how many the batch is spread
    over.  host: of the process, outside the devices' memory.  shared: whether the devices' memory
    is the host's, as on the CPU.  disk: the finished videos, and the state twice, because a new one
    is complete before the old one goes.  flops: of the whole run, all devices together.
    offload: where the weights of the transformers wait, see `Bundle.offload`; reason: why there;
    waiting: bytes of those in the host's memory, which `host` counts too.  spilled: bytes, at most,
    of clips that leave the memory for the disk, which `disk` counts too.
    """

    memory: dict[str, int]
    devices: int
    host: int
    shared: bool
    disk: int
    flops: float
    clips: int
    frames: int
    offload: str = "none"
    reason: str = "as asked"
    waiting: int = 0
    spilled: int = 0

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
        guided=any(scale != 1 for scale in np.atleast_1d(asked.guidance)),
        clip=OPENINGS[asked.method].clip_work(bundle, asked),
        method=asked.method,
    )


def make_plan(bundle: Bundle, work: Work, offload: str = "none", reason: str = "as asked") -> Plan:
    """The plan of a run; of the bundle only the sizes and defaults are used, and where the weights
    are if it has any.
    """
    devices, shared = data_mesh(work.batch).size, shares_memory()
    batch = work.batch // devices
    rows = batch * (2 if work.guided else 1)
    loaded_there = bool(bundle.params) and bundle.offload != "none"
    waits = loaded_there or offload != "none"
    waiting = devices * sum(costs.stacks(bundle).values()) * waits
    state = devices * _state_bytes(bundle, work, batch, rows)
    # Frames come to the host in float32, and become bytes; saving copies the state to the host and
    # into a file twice over.  On the CPU that is less than the same memory held while computing.
    shown = work.batch * _frame_bytes(work)
    spilled = work.clip.spilled and work.clip.spilled * _clip_bytes(bundle, work)
    saving = 0 if shared else 3 * state + 3 * shown // 2 + costs.reading(bundle)
    return Plan(
        memory=_memory(bundle, work, batch, rows, offload),
        devices=devices,
        host=round(RUNTIME) + saving + waiting,
        shared=shared,
        disk=round(
            work.batch * (math.prod(work.size) * work.frames * VIDEO_BITS / 8 + 2e5)
            + 2 * state
            + spilled
        ),
        flops=float(work.clips) * devices * _clip_flops(bundle, work, rows, batch),
        clips=work.clips,
        frames=work.frames,
        offload=offload,
        reason=reason,
        waiting=waiting,
        spilled=spilled,
    )


def propose(bundle: Bundle, work: Work, offload: str = "auto") -> Plan:
    """The plan with the weights of the transformers where they are asked to wait; for "auto", on
    the devices if they fit there, else in the first place from which the run does, else where it
    needs least.

    Raises: InputError for a place where they cannot wait with the method.
    """
    if offload != "auto":
        check_offload(offload, work.method)
        return make_plan(bundle, work, offload)
    plans = [make_plan(bundle, work, "none", "everything fits on the device")]
    if fits(plans[0]):
        return plans[0]
    why = (
        f"because {plans[0].device_bytes / 1e9:.1f} GB of the device's {device_memory() / 1e9:.1f} "
        "GB would be needed for everything"
    )
    for place in OPENINGS[work.method].OFFLOADS[1:]:
        plans.append(make_plan(bundle, work, place, why))
        if fits(plans[-1]):
            return plans[-1]
    least = min(plans, key=lambda plan: (not plan.shared and plan.device_bytes, plan.host_bytes))
    return dataclasses.replace(least, reason="which needs least")


# ---- memory ------------------------------------------------------------------------


def _memory(bundle: Bundle, work: Work, batch: int, rows: int, offload: str) -> dict[str, int]:
    """Bytes on a device, by purpose, when they are most."""
    there = bool(bundle.params) and bundle.offload == "none"  # from where they do not go away
    away = 0 if offload == "none" or there else sum(costs.stacks(bundle).values())
    held = {
        "weights": weight_bytes(bundle) - away,
        "prompts": len(bundle.experts) * costs.context_bytes(bundle.dit, rows),
    }
    if bundle.sentence is not None:  # its texts pass through it between clips, one by one
        held["selection encoder"] = bundle.sentence.held_bytes
    held["memory of clips"] = round(BANKS * _bank_bytes(bundle, work, rows))
    phases = _phases(bundle, work, batch, rows, offload)
    most = max(phases, key=lambda phase: sum(phase.values()))
    return {name: size for name, size in (held | most).items() if size}


def _phases(
    bundle: Bundle, work: Work, batch: int, rows: int, offload: str
) -> list[dict[str, int]]:
    """Bytes beside what a run holds all the time, in each part of it: a session of method wan has a
    program for the sampler and one for the decoder; that of a method with a memory is one program,
    and its frames are there from the beginning.
    """
    dit, vae, clip, on_cpu = bundle.dit, bundle.vae, work.clip, shares_memory()
    tokens, seen = (n * math.prod(_grid(bundle, work)) for n in (clip.latents, clip.seen))
    small = tuple(n // vae.spatial_stride for n in work.size)
    latents = batch * clip.latents * math.prod(small) * (vae.z + MASK) * 4
    shown = batch * _frame_bytes(work) + latents
    transformer = costs.block_bytes(dit, rows, tokens, seen)
    sampling = {
        "transformer": transformer + latents + costs.in_flight(bundle, offload),
        "frames": shown if clip.kept else 0,
        "scratch": on_cpu * costs.block_scratch(dit, rows, tokens),
    }
    coding = {"decoder": costs.decoding(vae, clip.latents, small)}
    if clip.encoded:
        coding["encoder"] = costs.encoding(vae, clip.encoded, small)
    scratch = {part: on_cpu * batch * costs.coding_scratch(vae, part, small) for part in coding}
    return [
        sampling,
        *(
            {"autoencoder": batch * size, "frames": shown, "scratch": scratch[part]}
            for part, size in coding.items()
        ),
        *({name: size} for name, size in costs.encoders(bundle, rows).items()),
        {"reading of weights": on_cpu * costs.reading(bundle)},
    ]


def _frame_bytes(work: Work) -> int:
    """Bytes of the frames of a clip of one video, as they are decoded."""
    return math.prod(work.size) * pixel_frames(work.clip.latents) * costs.RGB


def _state_bytes(bundle: Bundle, work: Work, batch: int, rows: int) -> int:
    """Bytes of what one clip leaves to the next."""
    small = (n // bundle.vae.spatial_stride for n in work.size)
    condition = batch * work.clip.latents * math.prod(small) * (MASK + bundle.vae.z) * 4
    return condition + _bank_bytes(bundle, work, rows)


def _grid(bundle: Bundle, work: Work) -> tuple[int, int]:
    """Tokens of a latent frame, (height, width)."""
    unit = (bundle.vae.spatial_stride * p for p in bundle.dit.patch[1:])
    return tuple(n // u for n, u in zip(work.size, unit, strict=True))


def _bank_bytes(bundle: Bundle, work: Work, rows: int) -> int:
    """Keys and values of the remembered clips."""
    if not work.clip.kept:
        return 0
    grid = _grid(bundle, work)
    return costs.bank_bytes(bundle.dit, rows, work.clip.kept, grid, work.clip.layers)


def _clip_bytes(bundle: Bundle, work: Work) -> int:
    """Keys and values of one clip of one video."""
    passes, clip, grid = 2 if work.guided else 1, work.clip, _grid(bundle, work)
    return costs.bank_bytes(bundle.dit, passes, clip.latents, grid, clip.layers)


# ---- time --------------------------------------------------------------------------


def _clip_flops(bundle: Bundle, work: Work, rows: int, batch: int) -> float:
    """Floating-point operations of one clip on one device: the transformer once per step of the
    sampler that is run and, with a memory, once to remember; then decoding, and encoding.
    """
    clip, vae, frame = work.clip, bundle.vae, math.prod(_grid(bundle, work))
    tokens, (first, last) = clip.latents * frame, clip.layers
    remembered = (last - first) * (clip.seen - clip.latents) * frame
    size = tuple(n // vae.spatial_stride for n in work.size)
    pictures = costs.vae_flops(vae, "decoder", clip.latents, size)
    if clip.encoded:
        pictures += costs.vae_flops(vae, "encoder", clip.encoded, size)
    passes = rows * clip.passes
    return passes * costs.transformer_flops(bundle.dit, tokens, remembered) + batch * pictures


def seconds(plan: Plan, rate: float) -> float:
    """Estimated duration without loading and compiling; rate as `measured_rate` gives it.

    Devices that share the host's memory are taken to share its cores too.
    """
    return plan.flops / (rate * EFFICIENCY * (1 if plan.shared else plan.devices))


def describe(plan: Plan, rate: float) -> str:
    """The plan in one line for the user."""
    parts = ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in plan.memory.items())
    clips = f"{plan.clips} clip{'s' * (plan.clips > 1)}"
    each = "" if plan.devices == 1 else f" on each of {plan.devices} devices"
    out = f" ({plan.spilled / 1e6:.0f} MB for clips that leave it)" if plan.spilled else ""
    wait = f", weights that wait on the host {plan.waiting / 1e6:.0f} MB" if plan.waiting else ""
    return (
        f"plan: {plan.frames} frames in {clips}; memory {plan.host_bytes / 1e9:.2f} GB "
        f"({parts}{each}; the process itself {(plan.host - plan.waiting) / 1e6:.0f} MB{wait}, and "
        f"{COMPILING / 1e6:.0f} MB more while compiling for the first time); "
        f"offload {plan.offload}, {plan.reason}; "
        f"disk {plan.disk / 1e6:.0f} MB{out}; about {_duration(seconds(plan, rate))} (estimate: "
        f"{plan.flops / 1e12:.2g} TFLOP at {EFFICIENCY:.0%} of the {rate / 1e9:.0f} GFLOP/s of a "
        "matrix product timed now; loading and compiling come on top)"
    )


def _duration(s: float) -> str:
    return f"{s:.0f} s" if s < 120 else f"{s / 60:.0f} min" if s < 7200 else f"{s / 3600:.1f} h"


def fits(plan: Plan) -> bool:
    """Whether memory is there, for the device and for the process."""
    on_device = plan.shared or plan.device_bytes <= device_memory()
    return on_device and plan.host_bytes + COMPILING <= host_memory()


def check_memory(plan: Plan, bundle: Bundle, work: Work, offload: str = "auto") -> None:
    """offload: as the plan was asked for.  Raises: DoesNotFitError with settings that fit."""
    if not fits(plan):
        raise DoesNotFitError(f"the run needs {_short_of(plan)}; {_smaller(bundle, work, offload)}")


def _short_of(plan: Plan) -> str:
    """What a plan needs, and what is there."""
    needs = f"{(plan.host_bytes + COMPILING) / 1e9:.1f} GB of memory"
    have = f"{host_memory() / 1e9:.1f} GB are free"
    if not plan.shared:
        needs += f" and {plan.device_bytes / 1e9:.1f} GB on each device"
        have += f", {device_memory() / 1e9:.1f} GB on a device"
    return f"{needs}, {have}"


def check_disk(plan: Plan, output) -> None:
    """Raises: StorageError when the disk is too small; a state that is there is counted, and clips
    that have left it.
    """
    place = os.path.dirname(os.path.realpath(output))
    try:
        free = shutil.disk_usage(place).free
    except OSError as e:
        raise StorageError(
            f"cannot write to {place}: {e.strerror or e}; choose another --out"
        ) from e
    there = state_path(output)
    needs = plan.disk - (there.stat().st_size if there.is_file() else 0)
    needs -= ClipFiles(clips_path(output)).size()
    if needs > free:
        raise StorageError(
            f"the run needs {needs / 1e6:.0f} MB on {place}, {free / 1e6:.0f} MB are free; "
            f"free space or choose another --out{_or_no_spill(plan)}"
        )


def check_temporary(plan: Plan) -> None:
    """Raises: StorageError when the place for temporary files is too small for the clips that leave
    the memory.
    """
    place = tempfile.gettempdir()
    if plan.spilled and plan.spilled > (free := shutil.disk_usage(place).free):
        raise StorageError(
            f"clips that leave the memory need {plan.spilled / 1e6:.0f} MB on {place}, "
            f"{free / 1e6:.0f} MB are free; free space, set TMPDIR to another place"
            f"{_or_no_spill(plan)}"
        )


def _or_no_spill(plan: Plan) -> str:
    return ", or leave defaults.spill out" if plan.spilled else ""


def _smaller(bundle: Bundle, work: Work, offload: str) -> str:
    """Fewer videos at once first, then a smaller picture; all else as asked."""
    unit = bundle.vae.spatial_stride * bundle.dit.patch[1]
    while work.batch > 1 or max(work.size) > unit:
        if work.batch > 1:
            work = dataclasses.replace(work, batch=work.batch // 2)
        else:
            size = tuple(max(unit, n // 2 // unit * unit) for n in work.size)
            work = dataclasses.replace(work, size=size)
        if fits(propose(bundle, work, offload)):
            height, width = work.size
            videos = "one video" if work.batch == 1 else f"{work.batch} videos at once"
            return f"{videos} of {width}x{height} would fit"
    return "no smaller setting fits: free memory"
