# SPDX-License-Identifier: Apache-2.0
"""`lvjax train` of a video-extension model: the plan, the run, what is shown on the way, and what
is left at the end.
"""

import dataclasses
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np

from lvjax.api import generate
from lvjax.cli.bar import Bar
from lvjax.cli.drive import note
from lvjax.core.checkpoint import write_atomic
from lvjax.core.errors import (
    DoesNotFitError,
    InputError,
    LvjaxError,
    StorageError,
    some_of,
)
from lvjax.data.latent_feed import LatentFeed
from lvjax.data.latents import NULL, Latents
from lvjax.run.begun import claim
from lvjax.run.dataset import open_dataset
from lvjax.run.machine import device_memory, host_memory, shares_memory
from lvjax.run.request import Request, frame_count
from lvjax.run.session import check_settings
from lvjax.run.trained import LORA, defaults_of, save_trained, trained_bundle
from lvjax.run.training import (
    Open,
    Training,
    TrainingPlan,
    begin,
    begin_fixed,
    compiled_step,
    open_training,
    shapes,
)
from lvjax.run.weights import read_part
from lvjax.train.checkpoints import CHECKPOINTS, KEPT, disk_bytes, is_begun
from lvjax.train.loop import Outside, fit
from lvjax.train.state import TrainState

DAMAGED = "damaged.jsonl"  # in the folder of a run
SAMPLES = "samples"  # in the folder of a run


def train_extension(training: Training, folder: Path, seconds: float) -> bool:
    """Train, or go on; whether it came to its end.

    Raises: InputError, CheckpointError, DoesNotFitError, NonFiniteError, StorageError.
    """
    opened = open_training(training)
    data = open_dataset(opened.bundle, training.data)
    task, o = training.task, training.options
    tails = len(task.given) - 1 if task.last or task.both else 0
    feed = LatentFeed(data, training.batch, training.clips, seed=o.seed, tails=tails)
    check_samples(opened, data)
    claim(training, folder)
    first = next(feed)
    feed.seek({})
    step, plan = compiled_step(opened, first)
    like, _ = shapes(opened)
    print(describe(plan, disk_bytes(like)), file=sys.stderr)
    check(plan)
    check_disk(disk_bytes(like), folder)
    # of a run that goes on the state is in its checkpoint, and would be in memory twice
    state, fixed = (like, begin_fixed(opened)) if is_begun(folder) else begin(opened)
    try:
        with Bar(o.steps, "step") as bar:
            sample = partial(_sample, opened, fixed, data, folder)
            report = partial(_report, bar, o.steps)
            outside = Outside(seconds, report, sample, training.tensorboard)
            state = fit(
                step, state, feed, o, folder, fixed=fixed, mesh=opened.mesh, outside=outside
            )
    finally:
        _tell_damaged(feed, folder)
    if int(state.step) < o.steps:
        return False
    place = save_trained(opened, state, fixed, data.head.layout, folder)
    lora = "" if training.adapters is None else f" --lora {folder / LORA}"
    print(f'saved; lvjax generate --model {place}{lora} --prompt "..."')
    return True


def _tell_damaged(feed: LatentFeed, folder: Path) -> None:
    """Say which samples were left out, however training ended; all of them are in a file."""
    if feed.damaged:
        lines = [json.dumps({"sample": k, "why": v}) for k, v in sorted(feed.damaged.items())]
        write_atomic(folder / DAMAGED, "".join(f"{line}\n" for line in lines).encode())
        what = f"{len(feed.damaged)} damaged samples of {feed.data.folder} were left out"
        note(f"{what} ({some_of(feed.damaged)}), see {folder / DAMAGED}")


# ---- what it needs -----------------------------------------------------------------


def describe(plan: TrainingPlan, disk: int) -> str:
    """The plan in one line for the user.  disk: of `disk_bytes`."""
    parts = ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in plan.memory.items())
    host = f", {plan.host_bytes / 1e9:.2f} GB in all with JAX" if shares_memory() else ""
    return (
        f"plan: memory {plan.device_bytes / 1e9:.2f} GB on each device ({parts}){host}, disk "
        f"{disk / 1e9:.2f} GB ({KEPT} checkpoints and the one being written)"
    )


def check(plan: TrainingPlan) -> None:
    """Raises: DoesNotFitError with what makes it smaller."""
    needs, free = plan.device_bytes, device_memory()
    if shares_memory():
        needs, free = plan.host_bytes, host_memory()
    if needs > free:
        raise DoesNotFitError(
            f"training needs {needs / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; give a smaller "
            "batch with options.accumulate, task.remat=True, adapters, or more devices in mesh"
        )


def check_disk(needs: int, folder: Path) -> None:
    """Raises: StorageError when the checkpoints do not fit; those that are there are counted.

    What is left at the end is smaller than the checkpoint that is not being written then.
    """
    there = sum(p.stat().st_size for p in (folder / CHECKPOINTS).rglob("*") if p.is_file())
    free = shutil.disk_usage(folder).free
    if needs - there > free:
        raise StorageError(
            f"the checkpoints need {(needs - there) / 1e9:.2f} GB more in {folder}, "
            f"{free / 1e9:.2f} GB are free; free space or choose another --folder"
        )


def check_samples(opened: Open, data: Latents) -> None:
    """Raises: InputError for samples that the trained model could not make."""
    training, d = opened.training, defaults_of(opened, data.head.layout)
    if unknown := [text for text in training.samples if text not in data.texts]:
        raise InputError(f"samples: the data have no prompt {unknown[0]!r}; give some of theirs")
    bundle = dataclasses.replace(opened.bundle, defaults=d)
    try:
        for prompt in training.samples:
            frames = frame_count(training.sample_seconds, d.fps)
            check_settings(bundle, Request((((0.0, prompt),),), frames, NULL))
    except InputError as e:
        raise InputError(f"no samples can be made: {e}") from e


# ---- on the way --------------------------------------------------------------------


def _report(bar: Bar, steps: int, line: dict) -> None:
    values = " ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "step")
    bar(line["step"], values, f"step {line['step']}/{steps}: {values}")


def _sample(opened: Open, fixed, data: Latents, folder: Path, state: TrainState) -> None:
    """A video of each prompt of `samples`, by the average as it is now; where that cannot be, a
    line that says why, and training goes on.
    """
    try:
        _make_samples(opened, fixed, data, folder, state)
    except (LvjaxError, OSError, MemoryError) as e:
        why = str(e) or type(e).__name__
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        why = "the device ran out of memory"
    else:
        return
    note(f"no sample of step {int(state.step)}: {why}")


def _make_samples(opened: Open, fixed, data: Latents, folder: Path, state: TrainState) -> None:
    """Raises: LvjaxError of any kind, OSError; jax's own where the device has too little memory."""
    training, step = opened.training, int(state.step)
    if not training.samples:
        return
    bundle = trained_bundle(opened, state, fixed, data.head.layout)
    vae, _ = read_part(bundle, "vae")
    rows = {text: np.float32(data.text(text).rows) for text in (*training.samples, NULL)}
    bundle = dataclasses.replace(bundle, params=bundle.params | {"vae": vae}, embeddings=rows)
    (folder / SAMPLES).mkdir(exist_ok=True)
    key = jax.random.key(training.options.seed)
    for i, prompt in enumerate(training.samples):
        video = generate(
            bundle, prompt, negative_prompt=NULL, seconds=training.sample_seconds, key=key
        )
        path = folder / SAMPLES / f"{step:07d}-{i}.mp4"
        beside = path.with_name(f".{path.name}")  # a signal ends this at any moment
        video.save(beside, upscale=bundle.defaults.upscale)
        beside.replace(path)
