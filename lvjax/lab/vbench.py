# SPDX-License-Identifier: Apache-2.0
"""Videos of the lab in the layout that VBench reads for videos of one's own.

VBench's "custom input", for short videos and for long ones, takes a folder of videos of any names;
prompts can stand in a JSON file {name of the video: prompt}.  VBench runs in an environment of its
own: its pinned packages do not go with JAX's.
Source: the public repository Vchitect/VBench, README.md, evaluate.py, and vbench2_beta_long.
"""

import json
import shutil
from pathlib import Path

from lvjax.core.checkpoint import write_atomic
from lvjax.core.errors import InputError, storing
from lvjax.lab.error_free import REFERENCE, SETTINGS, Run, is_done, runs, settings_in
from lvjax.lab.timelines import draw_timelines

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""What VBench measures of videos of one's own."""


def export(folder: Path, out: Path) -> list[Path]:
    """Copy the finished videos of a folder of the lab; returns one folder per cell.

    Per cell `out/<cell>/` holds videos alone (VBench-Long writes its pieces beside them), and
    `out/<cell>.json` their prompts by name.  The prompts of a video change over time; here they
    stand in order, joined by "; then ".
    Raises: InputError for a folder without runs, or an `out` that is not empty; CheckpointError;
      StorageError.
    """
    if not (folder / SETTINGS).is_file():
        raise InputError(
            f"{folder} has no runs of `lvjax lab error-free`; name its folder with --from"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there and is not empty; give a new folder")
    settings = settings_in(folder)
    every = [Run(REFERENCE, 0), *runs(settings)]
    done = [run for run in every if is_done(folder, run, settings)]
    if not done:
        raise InputError(f"{folder} has no finished run yet; run `lvjax lab error-free` again")
    timelines = draw_timelines(settings.timelines, settings.frames)
    prompts: dict[str, dict[str, str]] = {}
    for run in done:
        for row, timeline in enumerate(timelines):
            source = run.video(folder, row)
            copy = out / run.cell / source.name
            _copy(source, copy)
            text = "; then ".join(prompt for _, prompt in timeline.moments)
            prompts.setdefault(run.cell, {})[source.name] = text
    for cell, texts in prompts.items():
        write_atomic(out / f"{cell}.json", json.dumps(texts, indent=1).encode() + b"\n")
    return [out / cell for cell in prompts]


def _copy(source: Path, copy: Path) -> None:
    with storing(copy, "free space or choose another folder"):
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
