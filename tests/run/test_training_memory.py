# SPDX-License-Identifier: Apache-2.0
"""A step of inter-clip training at released size: it runs, in the memory that was planned."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lvjax.core.checkpoint import sealed
from lvjax.core.params import flatten
from lvjax.core.streaming import Kind, write_stream
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.parts import part_spec
from lvjax.run.bundle import MODEL
from lvjax.run.presets import PRESETS

pytestmark = pytest.mark.long

T2V_1_3B = DiTConfig(1536, 12, 30, 8960, condition_channels=20)
VAE = VAEConfig(base=8, dim_mult=(1, 2, 2, 2), res_blocks=1)
STEP = """
import json, sys, time
import jax, numpy as np
from lvjax.core.mesh import shard_batch
from lvjax.run.training import Adapters, Training, begin, compiled_step, open_training
from lvjax.train.extension import ExtensionTask
from lvjax.train.state import TrainOptions

def memory(name):
    with open("/proc/self/status") as f:
        return 1024 * int(next(line for line in f if line.startswith(name)).split()[1])

rng, clips = np.random.default_rng(0), 2
batch = {
    "latents": rng.standard_normal((1, clips, 5, 16, 16, 16)).astype(np.float16),
    "text": rng.standard_normal((1, clips, 64, 4096)).astype(np.float32),
    "null": rng.standard_normal((1, 64, 4096)).astype(np.float32),
    "least": np.zeros((1, clips), np.int32),
    "frame": np.array([[0, 3]], np.int32),
    "given": np.array([[0, 2]], np.int32),
    "visible": np.tri(clips, k=-1, dtype=bool)[None],
}
task = ExtensionTask(remat=True)
training = Training(
    sys.argv[1], "data", TrainOptions(2, 1e-4, 1), task, 1, clips, Adapters(), sys.argv[2]
)
opened = open_training(training)
step, plan = compiled_step(opened, batch)
state, fixed = begin(opened)
began = time.monotonic()
with jax.set_mesh(opened.mesh):
    for _ in range(2):  # the rate of the first is 0
        state, found = step(state, fixed, shard_batch(batch, opened.mesh))
    loss = float(found["loss"])
moved = float(abs(state.params["dit"]["blocks"]["self_attn"]["k"]["lora"]["b"]).max())
print(json.dumps({
    "loss": loss, "moved": moved, "seconds": time.monotonic() - began, "peak": memory("VmHWM:"),
    "planned": plan.host_bytes, "memory": plan.memory,
}))
"""


def write_model(folder: Path, cfg: DiTConfig) -> None:
    """A folder with a transformer of random numbers in bfloat16; its autoencoder is tiny."""
    rng = np.random.default_rng(0)
    for part, sizes, dtype in (("dit", cfg, ml_dtypes.bfloat16), ("vae", VAE, np.float32)):
        spec = flatten(part_spec(sizes))
        pieces = {k: p.shape[0] if k.startswith("blocks/") else 1 for k, p in spec.items()}
        kinds = {k: Kind(np.dtype(dtype), p.shape, pieces[k]) for k, p in spec.items()}

        def drawn(name, spec=spec, pieces=pieces, dtype=dtype):
            shape = spec[name].shape[pieces[name] > 1 :]
            scale = 1.0 if len(shape) < 2 else shape[-2] ** -0.5
            return lambda index: (
                scale * rng.standard_normal(math.prod(shape), np.float32).reshape(shape)
            ).astype(dtype)

        meta = {"part": part, "config": dataclasses.asdict(sizes)}
        write_stream(folder / f"{part}.safetensors", kinds, meta, drawn, "safetensors", "test")
    head = {"name": "random", "defaults": dataclasses.asdict(PRESETS["wan2.1-t2v-1.3b"])}
    (folder / MODEL).write_bytes(sealed(head))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_two_clips_at_1_3b(tmp_path, dtype):
    write_model(tmp_path, T2V_1_3B)
    words = [sys.executable, "-c", STEP, str(tmp_path), dtype]
    done = subprocess.run(words, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(found)
    assert math.isfinite(found["loss"]) and found["moved"] > 0
    assert 0.85 <= found["peak"] / found["planned"] <= 1.15
