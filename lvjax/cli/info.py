# SPDX-License-Identifier: Apache-2.0
"""`lvjax info`: what is here, or what a file or folder is.

Without CHECKPOINT: versions, devices, methods and the pocket model.  With one: which part or model
it is, for which model, its types and sizes, whether all of its arrays have their place, and the
command that takes it; only headers are read.
"""

import argparse
import importlib.metadata
import platform
from pathlib import Path

import jax

from lvjax.cli.names import check_names
from lvjax.core.errors import CheckpointError, one_line
from lvjax.data.prompts import CAMERAS, COLOURS, MAX_WORDS, SCENES, SHAPES, WORDS
from lvjax.methods import METHODS
from lvjax.run.about import about, parameters, settings
from lvjax.run.bundle import outline

PACKAGES = ("lvjax", "jax", "jaxlib", "flax", "optax", "numpy", "av")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default="pocket",
        metavar="CHECKPOINT",
        help="weights of any kind, a LoRA, embeddings, a video or its state: a file or a folder",
    )


def run(args) -> int:
    check_names(CHECKPOINT=args.checkpoint)
    if args.checkpoint == "pocket":
        _here()
        return 0
    lines, wrong = about(Path(args.checkpoint))
    for word, text in lines:
        _say(word, one_line(text))
    if wrong:
        raise CheckpointError(wrong[0])
    return 0


def _say(word: str, text: str) -> None:
    print(f"{word:<9} {text}")


def _here() -> None:
    """This installation, and the model that comes with it."""
    versions = (f" · {p} {_version(p)}" for p in PACKAGES)
    _say("versions", f"python {platform.python_version()}{''.join(versions)}")
    for d in jax.devices():
        _say("device", f"{d.platform}:{d.id} {d.device_kind}")
    _say("methods", " · ".join(sorted(METHODS)))
    pocket = outline()
    parts = (f"{part} {parameters(pocket.config(part))}" for part in ("dit", "vae", "text"))
    _say("model", f"{pocket.name}: {' · '.join(parts)}")
    _say("", settings(pocket.defaults))
    _say("language", f"up to {MAX_WORDS} of {len(WORDS)} words: {' '.join(WORDS)}")
    scenes = f"shapes: {', '.join(SHAPES)} · scenes: {', '.join(SCENES)}"
    _say("", f"camera: {', '.join(CAMERAS)} · colours: {', '.join(COLOURS)} · {scenes}")
    _say("", 'example: "the camera pans left over a landscape, a red circle moves up"')


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as e:
        raise CheckpointError(f"package {package} is not installed; reinstall lvjax") from e
