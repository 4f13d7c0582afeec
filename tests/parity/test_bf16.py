# SPDX-License-Identifier: Apache-2.0
"""What bfloat16 costs on the CPU: our run with Wan's own precision map beside diffusers' run, each
against float32 with the same weights.

`python -m tests.parity.test_bf16` prints the figures as JSON (benchmarks/bf16_cpu.json).
"""

import copy
import dataclasses
import json
import platform
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from checkpoints_convert.recognise import KINDS
from lvjax.core.params import flatten, unflatten
from lvjax.models.dit import dit, embed_context
from tests.parity.test_dit import VARIANTS as WIDE
from tests.parity.test_dit import inputs, oracle, params, wanted
from tests.tiny import relative

NAMES = ("t2v", "i2v", "flf2v", "i2v_2_2", "ti2v")


def narrowed(tree):
    """Weights in bfloat16, but for what `lvjax convert --dtype bfloat16` leaves wide."""
    words = KINDS["dit"].precise
    return unflatten(
        {
            name: jnp.asarray(a, jnp.float32 if any(w in name for w in words) else jnp.bfloat16)
            for name, a in flatten(tree).items()
        }
    )


@cache
def ours(name):
    """Velocity of our bfloat16 run, float32."""
    cfg, given = dataclasses.replace(WIDE[name], dtype="bfloat16"), inputs(name)

    def run(params, latents, text, timestep, condition, image):
        context = embed_context(params, text, cfg, image)
        return dit(params, latents, timestep, context, cfg, condition=condition)[0]

    return np.asarray(jax.jit(run)(narrowed(params(name)), **given))


@cache
def theirs(name):
    """Velocity of diffusers' bfloat16 run, with the modules in float32 that it keeps so."""
    model = copy.deepcopy(oracle(name)[0]).to(torch.bfloat16)
    for key, p in model.named_parameters():
        if any(word in key.split(".") for word in model._keep_in_fp32_modules):
            p.data = oracle(name)[0].get_parameter(key).data.clone()
    return _forward(model, name)


def _forward(model, name):
    cfg, given = WIDE[name], inputs(name)
    video = [given["latents"]] + ([given["condition"]] if cfg.condition_channels else [])
    video = torch.from_numpy(np.concatenate(video, -1)).permute(0, 4, 1, 2, 3)
    text = np.zeros((2, 512, cfg.text_dim), np.float32)
    text[:, : given["text"].shape[1]] = given["text"]
    image = given["image"]
    if cfg.image_pos_len:
        image = image.reshape(2 * image.shape[0], -1, image.shape[-1])
    narrow = torch.bfloat16
    with torch.no_grad():
        out = model(
            video.to(narrow),
            torch.from_numpy(given["timestep"]),
            torch.from_numpy(text).to(narrow),
            None if image is None else torch.from_numpy(image).to(narrow),
            return_dict=False,
        )[0]
    return out.float().permute(0, 2, 3, 4, 1).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_no_further_from_float32_than_diffusers(name):
    error = relative(ours(name), wanted(name))
    assert 1e-4 < error < relative(theirs(name), wanted(name))


def figures() -> dict:
    """Relative differences to float32, by variant."""
    found = {
        name: {
            "lvjax": round(relative(ours(name), wanted(name)), 5),
            "diffusers": round(relative(theirs(name), wanted(name)), 5),
        }
        for name in NAMES
    }
    packages = {m.__name__: m.__version__ for m in (jax, torch, np)}
    return {
        "what": "one forward of a random Wan transformer (width 256, 2 layers), bfloat16 against "
        "float32, |a - b| / |b|",
        "relative_difference": found,
        "device": platform.machine() + " CPU",
        "versions": packages | {"python": platform.python_version()},
    }


if __name__ == "__main__":
    print(json.dumps(figures(), indent=1))
