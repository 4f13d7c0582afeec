# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints with the names of the released ones: each manifest at full size, and narrow
enough for a test, with every size mapped in one way and few layers; and how people have them on
their disks.
"""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from lvjax.core.streaming import open_stored

MANIFESTS = Path(__file__).parent / "manifests"
KEYMAP = "keymap.official-to-diffusers"
NAMES = sorted(path.stem for path in MANIFESTS.glob("*.json") if path.stem != KEYMAP)
# Sizes of the released models and what they become.  Heads of the transformers stay 128 wide, those
# of CLIP 80, as without a config.json they are told by that.
_DIT = {4096: 32, 256: 32, 1280: 160, 514: 10}
SIZES = {
    "wan2.1-t2v-1.3b": _DIT | {1536: 128, 9216: 768, 8960: 40},
    "wan2.2-ti2v-5b": _DIT | {3072: 384, 18432: 2304, 14336: 56},
    "wan2.1-vae": {96: 4, 192: 8, 384: 16, 768: 32, 1152: 48},
    "wan2.2-vae": {160: 8, 320: 16, 640: 32, 1920: 96}
    | {256: 16, 512: 32, 1024: 64, 2048: 128, 3072: 192},
    "umt5-xxl-encoder": {256384: 40, 4096: 32, 10240: 48, 64: 4},
    "clip-vith14-vision": {1280: 160, 5120: 64, 1024: 24, 257: 5},
    "clip-xlmr-vith14": {1280: 160, 3840: 480, 5120: 64, 1024: 24, 257: 5}
    | {250002: 30, 514: 9, 4096: 40},
}
_14B = _DIT | {5120: 256, 30720: 1536, 13824: 48}
KEPT = {1, 2, 3, 6, 12, 14, 16, 32, 36, 48, 64, 96, 192}  # channels, patches, kernels, buckets
LAYERS = 2
# What config.json says beside the sizes.
HEADS = {"clip-vith14-vision": 2, "umt5-xxl-encoder": 4, "wan2.1-t2v-1.3b": 1, "wan2.2-ti2v-5b": 3}
_WIDE = ("time", "norm", "modulation", "scale_shift_table", "gamma", "head.", "proj_out")


def part_of(name: str) -> str:
    """The part that a manifest is of."""
    starts = {"umt5": "text", "clip": "image"}
    return starts.get(name[:4], "vae" if "-vae" in name else "dit")


def manifest(name: str, layers: int | None = None) -> tuple[dict[str, tuple[int, ...]], dict]:
    """Names and shapes of a released checkpoint, and its whole manifest.  layers: as many."""
    facts = json.loads((MANIFESTS / f"{name}.json").read_text())
    shapes = {key: tuple(shape) for key, shape in facts["tensors"].items()}
    for group in facts["repeated"]:
        for i in range(layers or group["layers"]):
            prefix = group["prefix"].replace("{i}", str(i))
            shapes |= {prefix + key: tuple(shape) for key, shape in group["per_layer"].items()}
    assert layers or len(shapes) == facts["n_tensors"]
    return shapes, facts


def tiny(name: str, layers: int = LAYERS) -> tuple[dict[str, tuple[int, ...]], dict]:
    """Names and shapes of a narrow checkpoint, and what its config.json says."""
    shapes, facts = manifest(name, layers)
    model = name.rsplit(".", 1)[0]
    sizes = SIZES.get(model, _14B)
    assert KEPT | set(sizes) >= {n for shape in shapes.values() for n in shape}
    config = {}
    for key, value in facts["config"].items():
        if key.endswith("layers"):
            value = layers
        elif key in ("num_heads", "num_attention_heads"):
            value = HEADS.get(model, 2)
        elif key == "image_size":
            value = 28
        elif key == "d_kv":
            value = 8
        elif type(value) is int:
            value = sizes.get(value, value)
        config[key] = value
    return {k: tuple(sizes.get(n, n) for n in shape) for k, shape in shapes.items()}, config


def draw(shapes: dict, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random arrays.  dtype: "float32", "bfloat16", or "mixed": bfloat16 where that is harmless."""
    rng, out = np.random.default_rng(seed), {}
    for key, shape in shapes.items():
        array = np.asarray(0.1 * rng.standard_normal(shape, np.float32), np.float32)
        wide = dtype == "float32" or (dtype == "mixed" and any(word in key for word in _WIDE))
        out[key] = array if wide else array.astype(ml_dtypes.bfloat16)
    if "encoder.embed_tokens.weight" in out:
        out["encoder.embed_tokens.weight"] = out["shared.weight"].copy()
    return out


def translated(arrays: dict, name: str) -> dict[str, np.ndarray]:
    """Arrays of an official checkpoint under the names of the other side, by a key map that shares
    nothing with ours: regular expressions, and for CLIP other shapes.
    """
    sections = {"text": "umt5", "image": "clip_visual", "dit": "dit", "vae": "vae21"}
    section = "vae22" if name.startswith("wan2.2-vae") else sections[part_of(name)]
    rules = json.loads((MANIFESTS / f"{KEYMAP}.json").read_text())[section]
    out = {}
    for key, array in arrays.items():
        hits = [re.sub(pattern, new, key) for pattern, new in rules if re.match(pattern, key)]
        if not hits:
            continue
        if "{q,k,v}" in hits[0]:
            parts = np.split(array, 3)
            out |= {hits[0].replace("{q,k,v}", n): p for n, p in zip("qkv", parts, strict=True)}
        elif key in ("visual.cls_embedding", "visual.pos_embedding"):
            out[hits[0]] = array.squeeze()
        else:
            out[hits[0]] = np.ascontiguousarray(array.T) if key == "visual.head" else array
    return out


def tensor(array: np.ndarray) -> torch.Tensor:
    """The same bits for PyTorch."""
    for own, like, theirs in (
        (ml_dtypes.bfloat16, np.int16, torch.bfloat16),
        (ml_dtypes.float8_e4m3fn, np.int8, torch.float8_e4m3fn),
    ):
        if array.dtype == own:
            return torch.from_numpy(array.view(like)).view(theirs)
    return torch.from_numpy(array)


def write(arrays: dict, folder: Path, stem: str, how: str, shards: int = 3) -> Path:
    """Save a checkpoint as "file", "shards" (with an index) or "pth"; returns what to convert."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor(array) for key, array in arrays.items()}
    if how == "pth":
        torch.save(tensors, folder / f"{stem}.pth")
        return folder / f"{stem}.pth"
    if how == "file":
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
        return folder / f"{stem}.safetensors"
    places = {}
    for i in range(shards):
        own = {key: tensors[key] for key in list(tensors)[i::shards]}
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(own, folder / file, {"format": "pt"})
        places |= dict.fromkeys(own, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def usual(name: str) -> tuple[str, str]:
    """(stem, how) of a released checkpoint."""
    file = manifest(name, 1)[1]["released_files"][0].split(" ")[0].split("/")[-1]
    if file.endswith(".pth"):
        return file.removesuffix(".pth"), "pth"
    stem = file.split("*")[0].split(".")[0].removesuffix("-")
    return stem, "shards" if "*" in file else "file"


def bits(source) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of arrays: of a dict, or of the safetensors files in a folder."""
    if isinstance(source, Path):
        source = {
            k: t for p in sorted(source.glob("*.safetensors")) for k, t in load_file(p).items()
        }
    found = {}
    for key, array in source.items():
        t = array if isinstance(array, torch.Tensor) else tensor(np.asarray(array, order="C"))
        t = t.contiguous()
        data = t.reshape(-1).view(torch.uint8).numpy().tobytes()
        found[key] = str(t.dtype).removeprefix("torch."), tuple(t.shape), data
    return found


def opened(folder: Path, part: str):
    """A part that `lvjax convert` wrote, in either format."""
    places = [folder / f"{part}.safetensors", folder / part]
    return open_stored(next(path for path in places if path.exists()))


def tokenizer() -> str:
    """A tokenizer.json that fits a text encoder of `tiny`."""
    words = [(w, 0.0) for w in ("<pad>", "</s>", "<unk>", "\u2581a", "b", "c")]
    return Tokenizer(models.Unigram(words, unk_id=2)).to_str()


def family(root: Path, model: str, naming: str, dtype: str = "mixed") -> Path:
    """The folder of a whole model as its publishers ("official") or diffusers lay it out; the same
    weights in both.  model: the name of its transformer's manifests.
    """
    official, root = naming == "official", root / f"{model}.{naming}"
    vae = "wan2.2-vae" if model == "wan2.2-ti2v-5b" else "wan2.1-vae"
    parts = {"transformer": model, "vae": vae, "text_encoder": "umt5-xxl-encoder"}
    if model.endswith("a14b"):
        parts["transformer_2"] = model
    if model in ("wan2.1-i2v-14b", "wan2.1-flf2v-14b"):
        parts["image_encoder"] = "clip-xlmr-vith14"
    experts = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
    for seed, (place, name) in enumerate(parts.items()):
        own = f"{name}.official"
        arrays = draw(tiny(own)[0], dtype, seed)
        if official:
            folder = root / (experts.get(place, "") if "transformer_2" in parts else "")
        else:
            arrays, folder = translated(arrays, own), root / place
            ends = {"text_encoder": "umt5-xxl-encoder.transformers"}
            ends["image_encoder"] = "clip-vith14-vision.transformers"
            own = ends.get(place, f"{name}.diffusers")
        write(arrays, folder, *usual(own))
        if not official or part_of(own) == "dit":
            (folder / "config.json").write_text(json.dumps(tiny(own)[1]))
    place = root / ("google/umt5-xxl" if official else "tokenizer")
    place.mkdir(parents=True)
    (place / "tokenizer.json").write_text(tokenizer())
    if not official:
        (root / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    return root
