# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that must not become a model: `lvjax convert` ends in one line, at once, in little
memory, and leaves nothing; `lvjax.load` takes none of them either.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import lvjax
from lvjax.core.errors import CheckpointError
from lvjax.models.config import WAN_VAE_2_2_MEAN
from tests.checkpoints_convert.bad_files import MEGABYTES, SECONDS, Case, listing, outcomes
from tests.checkpoints_convert.tiny_checkpoints import draw, tensor, tiny, usual, write

PROGRAM = """
import contextlib, io, json
from pathlib import Path

import lvjax.cli.convert
from lvjax.cli.main import main
from lvjax.core.errors import InputError

def use(path):
    src, *options = json.loads(Path(path).read_text())
    folder = Path(path).parent
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(["convert", str(folder / src), str(folder / "dst"), *options])
    if code:
        kinds = {2: InputError, 3: CheckpointError}
        raise kinds.get(code, RuntimeError)(said.getvalue().removesuffix("\\n"))

use_all = None
"""
DIT, BIG, I2V = "wan2.1-t2v-1.3b.official", "wan2.1-t2v-14b.official", "wan2.1-i2v-14b.official"
VAE, VAE_2_2 = "wan2.1-vae.official", "wan2.2-vae.official"
TEXT, CLIP = "umt5-xxl-encoder.transformers", "clip-vith14-vision.transformers"
THEIRS = "wan2.1-t2v-1.3b.diffusers"
F8, I8 = ml_dtypes.float8_e4m3fn, np.int8


@cache
def _drawn(name: str, seed: int) -> dict:
    return draw(tiny(name)[0], "float32", seed)


def arrays(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint as `tiny` describes it."""
    return dict(_drawn(name, seed))


def saved(folder: Path, name: str, own: dict, config: dict | None = None, stem=None, how="file"):
    """Write a part; the weights of PyTorch go to safetensors, where every type can be written."""
    own = {key: np.ascontiguousarray(a) if np.ndim(a) else a for key, a in own.items()}
    types = {a.dtype for a in own.values()}
    if types & {np.dtype(F8), np.dtype(I8)}:
        _raw(folder, own)
    else:
        write(own, folder, stem or usual(name)[0], how)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def _raw(folder: Path, own: dict) -> None:
    from safetensors.torch import save_file

    codes = {np.dtype(F8): "float8_e4m3fn"}
    import torch

    def convert(a):
        if a.dtype in codes:
            return torch.from_numpy(a.view(np.uint8)).view(getattr(torch, codes[a.dtype]))
        return tensor(a)

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: convert(a) for key, a in own.items()}, folder / "quantised.safetensors")
