# SPDX-License-Identifier: Apache-2.0
"""`lvjax info`: what is here."""

import argparse
import importlib.metadata
import platform

import jax

import lvjax.run.bundle as bundles
from lvjax.core.errors import CheckpointError
from lvjax.core.params import count
from lvjax.data.prompts import CAMERAS, COLOURS, MAX_WORDS, SCENES, SHAPES, WORDS
from lvjax.methods import METHODS

PACKAGES = ("lvjax", "jax", "jaxlib", "flax", "optax", "numpy", "av")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="pocket", help='"pocket" or a folder (default: pocket)'
    )


def run(args) -> int:
    print(
        "versions  python "
        + platform.python_version()
        + "".join(f" · {p} {_version(p)}" for p in PACKAGES)
    )
    for d in jax.devices():
        print(f"device    {d.platform}:{d.id} {d.device_kind}")
    print("methods   " + " · ".join(sorted(METHODS)))
    bundle = bundles.load(args.model)
    sizes = bundles.specs(bundle)
    print(
        f"model     {bundle.name}: "
        + " · ".join(f"{k} {count(s) / 1e6:.1f} M parameters" for k, s in sizes.items())
    )
    d = bundle.defaults
    print(
        f"          {d.size[1]}x{d.size[0]} at {d.fps} frames/s, {d.steps} steps of {d.solver}, "
        f"guidance {d.guidance}, T-RFlow {list(d.window)}"
    )
    if bundle.name == "pocket":
        print(f"language  up to {MAX_WORDS} of {len(WORDS)} words: {' '.join(WORDS)}")
        print(
            f"          camera: {', '.join(CAMERAS)} · colours: {', '.join(COLOURS)} · shapes: "
            f"{', '.join(SHAPES)} · scenes: {', '.join(SCENES)}"
        )
        print('          example: "the camera pans left over a landscape, a red circle moves up"')
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as e:
        raise CheckpointError(f"package {package} is not installed; reinstall lvjax") from e
