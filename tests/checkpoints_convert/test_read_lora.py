# SPDX-License-Identifier: Apache-2.0
"""LoRA files of every family against diffusers' model with W + alpha/r B A put into it by hand.

peft is not needed: the sums are made here, in float64, from the same halves that the files hold.
"""

import json
import re
from functools import cache

import jax
import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.numpy import save_file

from checkpoints_convert import keys_lora
from checkpoints_convert import lora as module
from checkpoints_convert.lora import METADATA, read_lora
from checkpoints_convert.read import open_checkpoint
from lvjax.core.errors import CheckpointError
from lvjax.models.dit import dit, embed_context
from lvjax.models.lora import attach, merge
from tests.parity.test_dit import VARIANTS, inputs, official_name, oracle, params
from tests.tiny import relative

torch.set_num_threads(1)  # more wait for each other
TOLERANCE = 5e-6
NOTICED = 1e-3


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@cache
def halves(name="t2v"):
    """{module: (A, B, alpha)} for every linear and the convolution, under diffusers' names."""
    made = {}
    kinds = torch.nn.Linear, torch.nn.Conv3d
    layers = [(k, m) for k, m in oracle(name)[0].named_modules() if isinstance(m, kinds)]
    for i, (key, layer) in enumerate(layers):
        out, *rest = layer.weight.shape
        rank, ones = 1 + i % 4, (1,) * (len(rest) - 1)
        a = draw(i, rank, *rest) / np.sqrt(np.prod(rest), dtype=np.float32)
        made[key] = a, 0.3 * draw(i + 500, out, rank, *ones), float(1 + i % 3)
    return made


def product(a, b, scale):
    flat = b.reshape(b.shape[0], -1).astype(np.float64) @ a.reshape(a.shape[0], -1)
    return scale * flat.reshape(b.shape[0], *a.shape[1:])


def official(key):
    return official_name(f"{key}.").removesuffix(".")


def write(prefix, rename, down, up, alpha=True, name="t2v"):
    """A file of one family; without arrays `alpha` the factor is in A, or for the caller to add."""
    arrays = {}
    for key, (a, b, value) in halves(name).items():
        at = prefix + rename(key)
        arrays |= {f"{at}{down}": a, f"{at}{up}": b}
        if alpha:
            arrays[f"{at}.alpha"] = np.float32(value)
    return arrays


def kohya(key):
    return official(key).replace(".", "_")


def plain(key):
    return key


def folded(arrays):
    """alpha / rank multiplied into A, for families that have no alpha."""
    for (key, a), (_, _, alpha) in zip(list(arrays.items())[::2], halves().values(), strict=True):
        arrays[key] = a * np.float32(alpha / a.shape[0])
    return arrays


PEFT = ".lora_A.weight", ".lora_B.weight"
DEFAULT = ".lora_A.default.weight", ".lora_B.default.weight"
KOHYA = ".lora_down.weight", ".lora_up.weight"


def settings():
    pattern = {f"^{key}": alpha for key, (_, _, alpha) in halves().items() if "blocks" not in key}
    pattern |= {key: alpha for key, (_, _, alpha) in halves().items() if "blocks" in key}
    some = next(iter(pattern))
    return {"r": 4, "lora_alpha": pattern.pop(some), "alpha_pattern": pattern}


def header():
    packed = {f"transformer.{key}": value for key, value in settings().items()}
    return {"format": "pt", METADATA: json.dumps(packed)}


FAMILIES = {  # name -> arrays, config
    "diffusers": lambda: (write("transformer.", plain, *PEFT, alpha=False), header()),
    "peft": lambda: (write("base_model.model.", plain, *DEFAULT, alpha=False), settings()),
    "second expert": lambda: (folded(write("transformer_2.", plain, *PEFT, alpha=False)), {}),
    "comfyui": lambda: (write("diffusion_model.", official, *PEFT), {}),
    "comfyui down": lambda: (write("diffusion_model.", official, *KOHYA), {}),
    "kohya": lambda: (write("lora_unet_", kohya, *KOHYA), {"ss_network_dim": "4"}),
    "fun": lambda: (write("lora_unet__", kohya, *KOHYA), {}),
    "svi": lambda: (folded(write("pipe.dit.", official, *DEFAULT, alpha=False)), {}),
    "wrapped": lambda: (
        write("model.diffusion_model.", official, "_lora.down.weight", "_lora.up.weight"),
        {},
    ),
    "unet": lambda: (write("unet.", official, ".lora.down.weight", ".lora.up.weight"), {}),
    "model": lambda: (write("model.", plain, *PEFT), {}),
    "bare": lambda: (write("", official, ".lora_A", ".lora_B"), {}),
    "named adapter": lambda: (write("", plain, ".lora_A.style.weight", ".lora_B.style.weight"), {}),
    "both alphas": lambda: (  # the arrays' own come first
        write("base_model.model.", official, *PEFT),
        {"lora_alpha": 99},
    ),
}


def expected(name, changes):
    """diffusers' velocity [B, T, H, W, C] with `changes` added to its parameters."""
    model, weights = oracle(name)
    given, cfg = inputs(name), VARIANTS[name]
    video = [given["latents"]] + ([given["condition"]] if cfg.condition_channels else [])
    text = np.zeros((2, 512, cfg.text_dim), np.float32)
    text[:, : given["text"].shape[1]] = given["text"]
    arrays = [np.concatenate(video, -1).transpose(0, 4, 1, 2, 3), given["timestep"], text]
    arrays += [] if given["image"] is None else [given["image"]]
    assert changes.keys() <= weights.keys()
    new = {
        key: torch.from_numpy((w + changes.get(key, 0.0)).astype(np.float32))
        for key, w in weights.items()
    }
    with torch.no_grad():
        arrays = tuple(map(torch.from_numpy, arrays))
        out = torch.func.functional_call(model, new, arrays, {"return_dict": False})[0]
    return out.permute(0, 2, 3, 4, 1).numpy()


@cache
def expected_of_halves(name):
    scaled = {k: (a, b, alpha / a.shape[0]) for k, (a, b, alpha) in halves(name).items()}
    return expected(name, {f"{k}.weight": product(*parts) for k, parts in scaled.items()})


@cache
def program(name):
    @jax.jit
    def run(params, latents, text, timestep, condition, image):
        context = embed_context(params, text, VARIANTS[name], image)
        return dit(params, latents, timestep, context, VARIANTS[name], condition=condition)[0]

    return run


def ours(name, lora, change=attach, strength=1.0):
    tree = change(params(name), [(lora, strength)])
    return np.asarray(program(name)(tree, **inputs(name)))


def plain_output(name):
    return np.asarray(program(name)(params(name), **inputs(name)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_diffusers(family):
    arrays, config = FAMILIES[family]()
    lora = read_lora(arrays, config, VARIANTS["t2v"])
    assert lora.unmatched == () and lora.deltas == ()
    assert len(lora.low_rank) == len(halves())
    assert relative(ours("t2v", lora), expected_of_halves("t2v")) <= TOLERANCE


def test_merged_equals_diffusers_and_it_matters():
    lora = read_lora(*FAMILIES["comfyui"](), VARIANTS["t2v"])
    wanted = expected_of_halves("t2v")
    assert relative(ours("t2v", lora, merge), wanted) <= TOLERANCE
    assert relative(plain_output("t2v"), wanted) > 0.05


@pytest.mark.parametrize("family", ("comfyui", "comfyui down", "kohya"))
def test_diffusers_reads_the_same(family):
    """Its own reader, where it has one, gives the same products under the same modules."""
    arrays, _ = FAMILIES[family]()
    read = {
        "kohya": theirs._convert_musubi_wan_lora_to_diffusers,
    }.get(family, theirs._convert_non_diffusers_wan_lora_to_diffusers)
    skipped = r"patch_embedding|embedding_|_embedding\.|head|time_projection"
    known = {k: torch.tensor(a) for k, a in arrays.items() if not re.search(skipped, k)}
    found = {k.removeprefix("transformer."): a.numpy() for k, a in read(known).items()}
    cfg = VARIANTS["t2v"]
    one, other = (read_lora(a, {}, cfg) for a in (arrays, found))
    mine = {(c.path, c.layer): c.scale * c.a @ c.b for c in one.low_rank}
    assert len(other.low_rank) == 2 * 10  # the linears of two blocks
    for c in other.low_rank:
        np.testing.assert_allclose(c.scale * c.a @ c.b, mine[c.path, c.layer], atol=1e-6)


def distilled():
    """Halves on the attention, differences of everything else, and what they add up to."""
    arrays, changes = {}, {}
    for i, (key, weight) in enumerate(oracle("t2v")[1].items()):
        own = official_name(key)
        stem, _, kind = own.rpartition(".")
        add = 0.1 * draw(i, *weight.shape) / np.sqrt(weight[0].size if weight.ndim > 2 else 1)
        add = add / np.float32(np.sqrt(weight.shape[-1]) if weight.ndim == 2 else 1)
        if kind == "modulation":
            arrays[f"diffusion_model.{stem}.diff_m"] = add
        elif kind == "bias":
            arrays[f"diffusion_model.{stem}.diff_b"] = add
        elif re.search(r"attn\d\.to_", key):
            a, b, _ = halves()[key.removesuffix(".weight")]
            arrays[f"diffusion_model.{stem}.lora_down.weight"] = a
            arrays[f"diffusion_model.{stem}.lora_up.weight"] = b
            add = product(a, b, 1.0)
        else:
            arrays[f"diffusion_model.{stem}.diff"] = add
        changes[key] = add
    return arrays, changes


def test_differences_of_everything_equal_diffusers():
    arrays, changes = distilled()
    lora = read_lora(arrays, {}, VARIANTS["t2v"])
    assert len(changes) == len(arrays) - len(lora.low_rank) == len(oracle("t2v")[1])
    assert lora.unmatched == ()
    wanted = expected("t2v", changes)
    assert relative(plain_output("t2v"), wanted) > 0.05
    assert relative(ours("t2v", lora, merge), wanted) <= TOLERANCE
    half = {key: 0.5 * add for key, add in changes.items()}
    assert relative(ours("t2v", lora, merge, 0.5), expected("t2v", half)) <= TOLERANCE


def test_other_spellings_of_differences():
    at, shape = "diffusion_model.blocks.1.", (1, 6, 256)
    arrays = {
        f"{at}modulation.diff": draw(0, *shape),
        f"{at}norm3.w_norm": draw(1, 256),
        f"{at}norm3.b_norm": draw(2, 256),
        "patch_embedding.diff": draw(3, 256, 64),  # a convolution written as a matrix
        "lora_unet_blocks_0.diff_m": draw(4, *shape),
    }
    lora = read_lora(arrays, {}, VARIANTS["t2v"])
    changes = {(c.path, c.layer): c.array for c in lora.deltas}
    assert changes.keys() == {
        ("blocks/modulation", 0),
        ("blocks/modulation", 1),
        ("blocks/norm3/scale", 1),
        ("blocks/norm3/bias", 1),
        ("patch_embedding/kernel", None),
    }
    np.testing.assert_array_equal(changes["patch_embedding/kernel", None], draw(3, 256, 64).T)
    np.testing.assert_array_equal(changes["blocks/modulation", 1], draw(0, *shape)[0])


def test_the_bias_of_a_pair_is_scaled_with_it():
    key = "blocks.1.attn2.to_out.0"
    a, b, _ = halves()[key]
    bias, scale = draw(9, b.shape[0]), 3.0 / np.sqrt(a.shape[0])
    arrays = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.lora_B.bias": bias}
    lora = read_lora(arrays, {"lora_alpha": 3, "use_rslora": True}, VARIANTS["t2v"])
    changes = {f"{key}.weight": product(a, b, scale), f"{key}.bias": scale * bias}
    wanted = expected("t2v", changes)
    assert relative(ours("t2v", lora, merge), wanted) <= TOLERANCE
    assert relative(ours("t2v", lora._replace(deltas=()), merge), wanted) > NOTICED


def test_text_to_video_lora_on_an_image_to_video_model():
    """The image branch and the condition's channels get nothing."""
    arrays, _ = FAMILIES["comfyui"]()
    extra = {"diffusion_model.patch_embedding.diff_b": draw(1, 256)}
    lora = read_lora(arrays | extra, {}, VARIANTS["i2v"])
    assert lora.unmatched == ()
    touched = {c.path for c in lora.low_rank}
    assert not any("image" in path or "_img" in path for path in touched)
    assert "patch_embedding/kernel" in touched and "condition_embedding/kernel" not in touched
    changes = {f"{k}.weight": product(a, b, x / a.shape[0]) for k, (a, b, x) in halves().items()}
    add = changes["patch_embedding.weight"]
    changes["patch_embedding.weight"] = np.pad(add, [(0, 0), (0, 20)] + [(0, 0)] * 3)
    changes["patch_embedding.bias"] = extra["diffusion_model.patch_embedding.diff_b"]
    wanted = expected("i2v", changes)
    assert relative(ours("i2v", lora, merge), wanted) <= TOLERANCE
    assert relative(plain_output("i2v"), wanted) > 0.05
    whole = {"patch_embedding.diff": draw(2, 256, 16, 1, 2, 2)}
    (only,) = read_lora(whole, {}, VARIANTS["i2v"]).deltas
    np.testing.assert_array_equal(only.array, draw(2, 256, 16, 1, 2, 2).reshape(256, -1).T)


def test_image_to_video_lora_of_all_channels():
    arrays = write("diffusion_model.", official, *PEFT, name="i2v")
    lora = read_lora(arrays, {}, VARIANTS["i2v"])
    assert lora.unmatched == ()
    assert {"patch_embedding/kernel", "condition_embedding/kernel"} < {
        c.path for c in lora.low_rank
    }
    assert relative(ours("i2v", lora), expected_of_halves("i2v")) <= TOLERANCE
    without = {k: a for k, a in arrays.items() if "patch_embedding" not in k}
    partial = read_lora(without, {}, VARIANTS["t2v"])
    assert len(partial.unmatched) == 3 * (2 * 2 + 2)
    assert all(re.search(r"_img\.|img_emb\.", key) for key in partial.unmatched)
    with pytest.raises(CheckpointError, match=r"\[256, 16, 1, 2, 2\] in a checkpoint"):
        read_lora(arrays, {}, VARIANTS["t2v"])


def test_a_file_on_disk(tmp_path):
    path = tmp_path / "lora.safetensors"
    arrays, _ = FAMILIES["kohya"]()
    save_file({k: np.asarray(a).astype(np.float16) for k, a in arrays.items()}, path)
    tensors, config = open_checkpoint(path)
    lora = read_lora(tensors, config, VARIANTS["t2v"], path.name)
    assert {c.a.dtype for c in lora.low_rank} == {np.dtype(np.float16)}
    assert relative(ours("t2v", lora), expected_of_halves("t2v")) < 1e-3  # of float16


def no_rank(monkeypatch):
    plain = module._scale
    monkeypatch.setattr(module, "_scale", lambda t, g, rank, *a: rank * plain(t, g, rank, *a))


def no_alpha(monkeypatch):
    monkeypatch.setattr(module, "_scale", lambda *a: 1.0)


def query_and_key_change_places(monkeypatch):
    plain = keys_lora.find_module

    def swapped(name, flat):
        found = plain(name, flat)
        return re.sub(r"attn\.([qk])$", lambda m: f"attn.{'kq'['qk'.index(m[1])]}", found)

    monkeypatch.setattr(keys_lora, "find_module", swapped)


def self_and_cross_change_places(monkeypatch):
    plain = keys_lora.find_module

    def swapped(name, flat):
        found = plain(name, flat)
        return re.sub(r"(self|cross)_attn\.([qo])$", lambda m: _other(m), found)

    def _other(m):
        return f"{'cross' if m[1] == 'self' else 'self'}_attn.{m[2]}"

    monkeypatch.setattr(keys_lora, "find_module", swapped)


@pytest.mark.parametrize(
    "mutate", (no_rank, no_alpha, query_and_key_change_places, self_and_cross_change_places)
)
def test_mistakes_are_noticed(mutate, monkeypatch):
    mutate(monkeypatch)
    lora = read_lora(*FAMILIES["kohya"](), VARIANTS["t2v"])
    assert relative(ours("t2v", lora), expected_of_halves("t2v")) > NOTICED
