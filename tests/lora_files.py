# SPDX-License-Identifier: Apache-2.0
"""LoRA files for the tests of what uses them, with official names, and a model with two experts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from checkpoints_convert.keys_dit import dit_rules
from checkpoints_convert.rules import sources_of
from lvjax.core.checkpoint import save_arrays
from lvjax.core.params import flatten
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import dit_spec
from lvjax.models.vae import vae_spec
from lvjax.run.encoders import save_embeddings
from tests.drawn import drawn
from tests.tiny import DIT

PROMPT = "a red circle moves up"
TWO = DiTConfig(
    dim=32,
    num_heads=2,
    num_layers=2,
    ffn_dim=48,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    text_len=4,
    freq_dim=16,
    dtype="float32",
)
TWO_VAE = VAEConfig(4, 4, (1, 1, 2), 1, (True, True), 2, (0.0,) * 4, (1.0,) * 4)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def linears(cfg: DiTConfig) -> dict[str, tuple[int, int]]:
    """Official names of the modules that are matrices, and their (out, in)."""
    flat, found = flatten(dit_spec(cfg)), {}
    for name, (rule, _) in sources_of(dit_rules(cfg, "official"), dit_spec(cfg)).items():
        if len(rule.targets) == 1 and rule.target.endswith("/kernel") and "patch" not in name:
            n_in, n_out = flat[rule.target].shape[-2:]
            found[name.removesuffix(".weight")] = n_out, n_in
    return found


def lora_arrays(
    cfg: DiTConfig = DIT, seed: int = 0, prefix: str = "diffusion_model.", size: float = 0.3
) -> dict[str, np.ndarray]:
    """A LoRA of every matrix, of rank 2, with alpha 1, that changes them by about `size`."""
    arrays = {}
    for i, (name, (n_out, n_in)) in enumerate(linears(cfg).items()):
        up = 2 * size * draw(seed + 1000 + i, n_out, 2) / np.float32(np.sqrt(2))
        arrays[f"{prefix}{name}.lora_down.weight"] = draw(seed + i, 2, n_in) / np.float32(
            np.sqrt(n_in)
        )
        arrays[f"{prefix}{name}.lora_up.weight"] = np.float32(up)
        arrays[f"{prefix}{name}.alpha"] = np.float32(1)
    return arrays


def deltas(prefix: str = "diffusion_model.", dim: int = DIT.dim) -> dict[str, np.ndarray]:
    """Differences of a norm and of a bias."""
    return {
        f"{prefix}blocks.1.norm3.diff": 0.1 * draw(7, dim),
        f"{prefix}blocks.0.self_attn.q.diff_b": 0.1 * draw(8, dim),
    }


def write_lora(path: Path, arrays: dict[str, np.ndarray], metadata: dict | None = None) -> str:
    """Returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, path, metadata=metadata)
    return str(path)


def write_two_experts(folder: Path) -> str:
    """A tiny random model with two experts and no text encoder, and embeddings of `PROMPT` and ""
    in prompts.safetensors; returns its folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"dit": (TWO, dit_spec), "dit_low": (TWO, dit_spec), "vae": (TWO_VAE, vae_spec)}
    for i, (part, (cfg, spec)) in enumerate(kinds.items()):
        params = flatten(drawn(spec(cfg), i))
        if part != "vae":
            params["head/linear/kernel"] = 0.1 * draw(9, *params["head/linear/kernel"].shape)
        meta = {"part": part, "config": dataclasses.asdict(cfg)}
        save_arrays(folder / f"{part}.safetensors", params, meta)
    defaults = {"size": [16, 16], "steps": 4, "guidance": [1.0, 1.0], "method": "wan"}
    defaults |= {"boundary": 0.8, "upscale": 1, "negative": ""}
    head = {"name": "two experts", "defaults": defaults}
    (folder / "model.json").write_text(json.dumps(head))
    rows = {PROMPT: draw(1, 3, TWO.text_dim), "": draw(2, 1, TWO.text_dim)}
    save_embeddings(folder / "prompts.safetensors", rows, "two experts")
    return str(folder)
