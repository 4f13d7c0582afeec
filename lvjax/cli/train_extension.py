# SPDX-License-Identifier: Apache-2.0
"""`lvjax train` of a video-extension model: the plan, the run, what is shown on the way, and what is
left at the end.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from lvjax.api import generate
from lvjax.core.errors import DoesNotFitError, InputError
from lvjax.core.params import unflatten
from lvjax.data.latents import open_latents
from lvjax.run.begun import claim
from lvjax.run.bundle import Bundle
from lvjax.run.machine import device_memory, host_memory, shares_memory
from lvjax.run.plan import COMPILING, RUNTIME
from lvjax.run.trained import LORA, save_trained, trained_bundle
from lvjax.run.training import Open, Training, TrainingPlan, begin, compiled_step, open_training
from lvjax.train.loop import Outside, fit
from lvjax.train.state import TrainState

SAMPLES = "samples"  # in the folder of a run


def train_extension(training: Training, folder: Path, seconds: float) -> bool:
    """Train, or go on; whether it came to its end.

    Raises: InputError, CheckpointError, DoesNotFitError, NonFiniteError, StorageError.
    """
    opened, data = open_training(training), open_latents(training.data)
    feed = data.feed(training.batch, training.clips, training.options.seed)
    data.check(opened.bundle)
    if unknown := [text for text in training.samples if text not in data.prompts]:
        raise InputError(f"samples: the data have no prompt {unknown[0]!r}; give some that they have")
    claim(training, folder)
    first = next(feed)
    feed.seek({})
    step, plan = compiled_step(opened, first)
    print(describe(plan), file=sys.stderr)
    check(plan)
    state, fixed = begin(opened)
    with _Bar(training.options.steps) as bar:
        outside = Outside(
            seconds,
            bar.report,
            partial(_sample, opened, fixed, data, folder),
            training.tensorboard,
        )
        state = fit(
            step,
            state,
            feed,
            training.options,
            folder,
            fixed=fixed,
            mesh=opened.mesh,
            outside=outside,
        )
    if skipped := feed.position().get("skipped"):
        print(f"note: {skipped} records of the data were left out", file=sys.stderr)
    if int(state.step) < training.options.steps:
        return False
    place = save_trained(opened, state, fixed, data.facts, folder)
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


def host_bytes(plan: TrainingPlan) -> float:
    """Peak of a process whose devices share its memory, one device, the program compiled there."""
    return RUNTIME + COMPILING + plan.device_bytes


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


def _sample(opened: Open, fixed, data, folder: Path, state: TrainState) -> None:
    """A video of each prompt of `samples`, by the average as it is now."""
    training, step = opened.training, int(state.step)
    if not training.samples:
        return
    bundle = trained_bundle(opened, state, fixed, data.facts)
    bundle = dataclasses.replace(
        bundle, params=bundle.params | {"vae": _held(bundle, "vae")}, embeddings=data.rows
    )
    (folder / SAMPLES).mkdir(exist_ok=True)
    key = jax.random.key(training.options.seed)
    for i, prompt in enumerate(training.samples):
        video = generate(bundle, prompt, seconds=training.sample_seconds, key=key)
        video.save(folder / SAMPLES / f"{step:07d}-{i}.mp4", upscale=bundle.defaults.upscale)


def _held(bundle: Bundle, part: str) -> dict:
    """The weights of a part, for as long as they are needed."""
    stored = bundle.parts[part]
    return unflatten({name: jax.numpy.asarray(stored[name], np.float32) for name in stored})
