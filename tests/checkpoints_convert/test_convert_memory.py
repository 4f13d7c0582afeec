# SPDX-License-Identifier: Apache-2.0
"""Released sizes: memory while a checkpoint of 28.6 GB is converted, and a real-sized model from
its checkpoint to the transformer's output.

The sources are sparse files, random in the beginning of each array and holes behind that, which
cost little of the disk; what is written is not sparse.  So the largest test needs 30 GB of disk
for twice 28.6.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

import lvjax
from lvjax.cli.main import main
from lvjax.core.streaming import open_stored
from lvjax.models.dit import dit, embed_context
from tests.checkpoints_convert.bad_files import ROOT
from tests.checkpoints_convert.tiny_checkpoints import draw, manifest, translated, write
from tests.tiny import relative

pytestmark = pytest.mark.long

BF16 = np.dtype(ml_dtypes.bfloat16)
NAMES = {BF16: "BF16", np.dtype(np.float32): "F32"}
RANDOM = 40_000  # numbers in the beginning of each array
SHARD = 5 * 10**9  # bytes
RUN = """
import sys
from lvjax.cli.main import main
code = main(sys.argv[1:])
with open("/proc/self/status") as f:
    print(next(line for line in f if line.startswith("VmHWM:")).split()[1])
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path):
    """A folder that is emptied in any case."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def need(folder: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        pytest.fail(f"this test needs {gigabytes:.0f} GB of disk for {folder}, {free:.1f} are free")


def beginning(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """The random numbers at the beginning of an array."""
    count = min(RANDOM, math.prod(shape))
    return (0.05 * np.random.default_rng(seed).standard_normal(count, np.float32)).astype(dtype)


def sparse(folder: Path, shapes: dict, dtype: np.dtype, seeds: Callable[[str], int] = hash) -> Path:
    """A checkpoint in shards of safetensors, with an index; returns the index."""
    folder.mkdir(parents=True)
    shards, size = [{}], 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + nbytes > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name] = (shape, size, size + nbytes)
        size += nbytes
    places = {}
    for number, arrays in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = {
            name: {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
            for name, (shape, start, stop) in arrays.items()
        }
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for name, (shape, start, _) in arrays.items():
                f.seek(8 + len(text) + start)
                f.write(beginning(shape, dtype, seeds(name)).tobytes())
            f.truncate(8 + len(text) + max(stop for _, _, stop in arrays.values()))
        places |= dict.fromkeys(arrays, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def seed_of(name: str) -> int:
    """The same for both names of UMT5's table of words."""
    return sum(name.replace("encoder.embed_tokens", "shared").encode())


def source_array(shape: tuple[int, ...], dtype: np.dtype, name: str) -> np.ndarray:
    """An array of a sparse checkpoint, made again."""
    out = np.zeros(shape, dtype)
    first = beginning(shape, dtype, seed_of(name))
    out.reshape(-1)[: first.size] = first
    return out


def measured(*arguments) -> tuple[float, float]:
    """(seconds, peak bytes) of a process that runs `lvjax convert`."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, "convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return time.monotonic() - began, 1024 * float(done.stdout.split()[-1])


def on_disk(folder: Path) -> int:
    """Bytes that a folder takes of the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def check_memory(shapes: dict, dtype: np.dtype, peak: float) -> None:
    largest = max(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    allowed = 2 * largest + 1e9
    print(f"peak memory {peak / 1e9:.2f} GB, allowed {allowed / 1e9:.2f} GB")
    assert peak <= allowed


def test_a_checkpoint_of_14b(folder):
    """All of Wan 2.1 T2V 14B in bfloat16."""
    need(folder, 30)
    shapes, facts = manifest("wan2.1-t2v-14b.official")
    src = sparse(folder / "src", shapes, BF16, seed_of)
    assert sum(math.prod(s) for s in shapes.values()) == facts["n_params"]
    seconds, peak = measured(src, folder / "dst")
    size = (folder / "dst" / "dit.safetensors").stat().st_size
    source, target = (on_disk(folder / name) / 1e9 for name in ("src", "dst"))
    print(f"14B: {seconds:.0f} s, on the disk {source:.2f} GB of source, {target:.2f} GB of target")
    assert size > 28e9
    check_memory(shapes, BF16, peak)
    report = json.loads((folder / "dst" / "dit.report.json").read_text())
    assert report["source"]["used"] == report["source"]["arrays"] == len(shapes) == 1095
    assert report["parameters"] == facts["n_params"]
    stored = open_stored(folder / "dst" / "dit.safetensors")
    for name, path, layer in (
        ("blocks.0.self_attn.q.weight", "blocks/self_attn/q/kernel", 0),
        ("blocks.39.cross_attn.o.weight", "blocks/cross_attn/o/kernel", 39),
        ("blocks.17.ffn.0.weight", "blocks/ffn/fc1/kernel", 17),
        ("blocks.9.norm3.bias", "blocks/norm3/bias", 9),
        ("time_projection.1.weight", "time_projection/kernel", None),
        ("text_embedding.0.weight", "text_embedding/fc1/kernel", None),
        ("head.head.bias", "head/linear/bias", None),
    ):
        wanted = source_array(shapes[name], BF16, name)
        found = stored[path] if layer is None else stored.layer(path, layer)
        assert np.array_equal(found, wanted.T)
    # a second run reads and checks what is there
    again, peak = measured(src, folder / "dst")
    print(f"again: {again:.0f} s")
    check_memory(shapes, BF16, peak)


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_float32_of_14b(folder, dtype):
    """Three of its forty layers: what is held does not depend on their number."""
    need(folder, 7)
    shapes, _ = manifest("wan2.1-t2v-14b.official", 3)
    wide = np.dtype(np.float32)
    src = sparse(folder / "src", shapes, wide, seed_of)
    seconds, peak = measured(src, folder / "dst", "--dtype", dtype)
    print(f"float32 to {dtype}: {seconds:.0f} s")
    check_memory(shapes, wide, peak)


def test_two_tables_of_words(folder):
    """UMT5-XXL with its table of words under both names; one of its layers."""
    need(folder, 3)
    shapes, _ = manifest("umt5-xxl-encoder.transformers", 1)
    src = sparse(folder / "src", shapes, BF16, seed_of)
    seconds, peak = measured(src, folder / "dst")
    print(f"two tables of words: {seconds:.0f} s")
    check_memory(shapes, BF16, peak)


def full(name: str, seed: int) -> dict[str, np.ndarray]:
    """A checkpoint in its released sizes, bfloat16, wide enough for the signal to stay in range."""
    rng, out = np.random.default_rng(seed), {}
    for key, shape in manifest(name)[0].items():
        scale = 0.5 if "modulation" in key else 0.1 if len(shape) == 1 else shape[-1] ** -0.5
        array = rng.standard_normal(shape, np.float32) * np.float32(scale)
        if ".norm_" in key or "norm3.weight" in key:
            array += 1
        out[key] = array.astype(BF16)
    return out


def test_the_whole_of_1_3b(folder):
    """From its checkpoint to the transformer's output, against diffusers; and --verify, in the
    memory of a few layers.
    """
    need(folder, 13)
    own, name = full("wan2.1-t2v-1.3b.official", 0), "wan2.1-t2v-1.3b.official"
    write(own, folder / "src", "diffusion_pytorch_model", "shards")
    vae = draw(manifest("wan2.1-vae.official")[0], "float32", 1)
    write(vae, folder / "src", "Wan2.1_VAE", "pth")
    theirs = write(translated(own, name), folder / "theirs", "diffusion_pytorch_model", "file")
    shapes = {key: a.shape for key, a in own.items()}
    del own, vae
    seconds, peak = measured(folder / "src", folder / "dst", "--format", "orbax")
    print(f"1.3B: {seconds:.0f} s")
    check_memory(shapes, BF16, peak)
    seconds, peak = measured(
        folder / "src", folder / "dst", "--format", "orbax", "--part", "dit", "--verify"
    )
    print(f"--verify: {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB")
    assert peak < 2e9  # the weights are 2.8 GB, in float32 5.7

    rng = np.random.default_rng(2)
    x, text = rng.standard_normal((1, 2, 8, 8, 16)), rng.standard_normal((1, 7, 4096))
    x, text = x.astype(np.float32), text.astype(np.float32)
    began = time.monotonic()
    bundle = lvjax.load(folder / "dst", dtype="float32")
    print(f"lvjax.load: {time.monotonic() - began:.0f} s")
    params, cfg, t = bundle.params["dit"], bundle.dit, jnp.asarray([500.0])
    ours = np.asarray(jax.jit(lambda p: dit(p, x, t, embed_context(p, text, cfg), cfg)[0])(params))
    del bundle, params
    module = WanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960)
    module.load_state_dict(load_file(theirs), strict=True)
    padded = np.pad(text, ((0, 0), (0, 512 - text.shape[1]), (0, 0)))
    with torch.no_grad():
        wanted = module.float().eval()(
            torch.from_numpy(x).permute(0, 4, 1, 2, 3),
            torch.tensor([500.0]),
            torch.from_numpy(padded),
        ).sample.permute(0, 2, 3, 4, 1).numpy()  # fmt: skip
    off = relative(ours, wanted)
    print(f"relative difference from diffusers: {off:.2g}, deviation {wanted.std():.2g}")
    assert off < 1e-4 and 0.01 < wanted.std() < 100
    assert main(["convert", str(folder / "dst"), str(folder / "back"), "--to", "official"]) == 0
    for file in (folder / "back").glob("diffusion_pytorch_model*.safetensors"):
        back = load_file(file)
    for key, array in full(name, 0).items():
        assert np.array_equal(back[key].view(torch.int16).numpy(), array.view(np.int16)), key
