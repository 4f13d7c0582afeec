# SPDX-License-Identifier: Apache-2.0
"""`lvjax train` of a video-extension model: the plan, the run, what is shown on the way, and what
is left at the end.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from lvjax.api import generate
from lvjax.core.errors import DoesNotFitError, InputError, some_of
from lvjax.data.latent_feed import LatentFeed
from lvjax.data.latents import NULL, Latents
from lvjax.run.begun import claim
from lvjax.run.dataset import open_dataset
from lvjax.run.machine import device_memory, host_memory, shares_memory
from lvjax.run.trained import LORA, save_trained, trained_bundle
from lvjax.run.training import Open, Training, TrainingPlan, begin, compiled_step, open_training
from lvjax.run.weights import read_part
from lvjax.train.loop import Outside, fit
from lvjax.train.state import TrainState

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
    if unknown := [text for text in training.samples if text not in data.texts]:
        raise InputError(f"samples: the data have no prompt {unknown[0]!r}; give some of theirs")
    claim(training, folder)
    first = next(feed)
    feed.seek({})
    step, plan = compiled_step(opened, first)
    print(describe(plan), file=sys.stderr)
    check(plan)
    state, fixed = begin(opened)
    with _Bar(o.steps) as bar:
        sample = partial(_sample, opened, fixed, data, folder)
        outside = Outside(seconds, bar.report, sample, training.tensorboard)
        state = fit(step, state, feed, o, folder, fixed=fixed, mesh=opened.mesh, outside=outside)
    if feed.damaged:
        what = f"{len(feed.damaged)} damaged samples of {data.folder} were left out"
        print(f"note: {what} ({some_of(feed.damaged)})", file=sys.stderr)
    if int(state.step) < o.steps:
        return False
    place = save_trained(opened, state, fixed, data.head.layout, folder)
    lora = "" if training.adapters is None else f" --lora {folder / LORA}"
    print(f'saved; lvjax generate --model {place}{lora} --prompt "..."')
    return True


# ---- what it needs -----------------------------------------------------------------


def describe(plan: TrainingPlan) -> str:
    """The plan in one line for the user."""
    parts = ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in plan.memory.items())
    return f"plan: memory {plan.device_bytes / 1e9:.2f} GB on each device ({parts})"


def check(plan: TrainingPlan) -> None:
    """Raises: DoesNotFitError with what makes it smaller."""
    needs, free = plan.device_bytes, device_memory()
    if shares_memory():
        needs, free = plan.device_bytes * jax.device_count(), host_memory()
    if needs > free:
        raise DoesNotFitError(
            f"training needs {needs / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; give a smaller "
            "batch with options.accumulate, task.remat=True, adapters, or more devices in mesh"
        )


# ---- on the way --------------------------------------------------------------------


class _Bar:
    """A bar on a terminal, else a line for every report."""

    def __init__(self, steps: int):
        self.bar = tqdm(total=steps, unit="step", disable=not sys.stderr.isatty())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def report(self, line: dict) -> None:
        """Show a logged line."""
        values = " ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "step")
        if self.bar.disable:
            print(f"step {line['step']}/{self.bar.total}: {values}", file=sys.stderr, flush=True)
            return
        self.bar.set_postfix_str(values, refresh=False)
        self.bar.update(line["step"] - self.bar.n)


def _sample(opened: Open, fixed, data: Latents, folder: Path, state: TrainState) -> None:
    """A video of each prompt of `samples`, by the average as it is now."""
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
        video.save(folder / SAMPLES / f"{step:07d}-{i}.mp4", upscale=bundle.defaults.upscale)
