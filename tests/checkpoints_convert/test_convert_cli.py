# SPDX-License-Identifier: Apache-2.0
"""`lvjax convert` on tiny random models: both namings, shards, pipelines, and everything wrong."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints_convert import read
from checkpoints_convert.keys_dit import dit_rules
from checkpoints_convert.keys_vae import vae_rules
from checkpoints_convert.rules import TRANSFORMS
from lvjax.cli.main import main
from lvjax.core.checkpoint import load_arrays
from lvjax.core.params import flatten
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import dit_spec
from lvjax.models.vae import vae_spec

BASE = DiTConfig(dim=128, num_heads=1, num_layers=2, ffn_dim=48, text_dim=24, freq_dim=32)
I2V = DiTConfig(
    128, 1, 2, 48, condition_channels=20, text_dim=24, freq_dim=32, image_dim=16, image_pos_len=4
)
VAE = VAEConfig(base=8)


def weights(cfg, layout: str) -> dict[str, np.ndarray]:
    """A random checkpoint of `cfg` in PyTorch's names and layout."""
    rng, out = np.random.default_rng(0), {}
    spec = flatten(dit_spec(cfg) if isinstance(cfg, DiTConfig) else vae_spec(cfg))
    for rule in (dit_rules if isinstance(cfg, DiTConfig) else vae_rules)(cfg, layout):
        targets = (rule.target,) if isinstance(rule.target, str) else rule.target
        if targets[0] not in spec:
            continue
        transform = TRANSFORMS.get(rule.transform, rule.transform)
        for layer in range(cfg.num_layers if "{layer}" in rule.source else 1):
            shapes = [spec[t].shape["{layer}" in rule.source :] for t in targets]
            own = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
            out[rule.source.format(layer=layer)] = np.ascontiguousarray(transform.inverse(*own))
    return out


def saved(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path)
    return path


def converted(folder, part):
    """(arrays, meta) that `convert` wrote, with its JSON checked against them."""
    arrays, meta = load_arrays(folder / f"{part}.safetensors")
    facts = json.loads((folder / f"{part}.json").read_text())
    assert facts["part"] == meta["part"] == part and len(facts["sha256"]) == 64
    assert facts["config"] == meta["config"]
    return arrays, facts


def fails(capsys, *arguments) -> str:
    """The one line of an exit with code 3."""
    assert main(["convert", *map(str, arguments)]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lvjax: ")
    return lines[0]


def test_a_sharded_diffusers_pipeline(tmp_path, capsys):
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    kind = dict(num_attention_heads=2, attention_head_dim=24, num_layers=2, ffn_dim=64)
    model = WanTransformer3DModel(**kind, text_dim=32, freq_dim=32)
    model.save_pretrained(tmp_path / "wan" / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "wan" / "transformer").glob("*.safetensors"))) > 2
    sizes = dict(base_dim=8, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
    vae = AutoencoderKLWan(z_dim=2, **sizes, latents_mean=[0.5, -1.0], latents_std=[1.0, 2.0])
    vae.save_pretrained(tmp_path / "wan" / "vae")
    capsys.readouterr()

    assert main(["convert", str(tmp_path / "wan"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "dit (diffusers naming" in said[0]
    arrays, facts = converted(tmp_path / "out", "dit")
    assert {k: facts["config"][k] for k in ("dim", "num_heads", "ffn_dim")} == {
        "dim": 48,
        "num_heads": 2,
        "ffn_dim": 64,
    }
    q = model.blocks[1].attn1.to_q.weight.detach().numpy()
    np.testing.assert_array_equal(arrays["blocks/self_attn/q/kernel"][1], q.T)
    arrays, facts = converted(tmp_path / "out", "vae")
    assert facts["config"]["mean"] == [0.5, -1.0] and facts["config"]["dim_mult"] == [1, 2]
    sizes = VAEConfig(8, 2, (1, 2), 1, (True,), mean=(0.5, -1.0), std=(1.0, 2.0))
    assert set(arrays) == set(flatten(vae_spec(sizes)))

    only = tmp_path / "only"
    assert main(["convert", str(tmp_path / "wan"), str(only), "--part", "vae"]) == 0
    assert sorted(p.name for p in only.iterdir()) == ["vae.json", "vae.safetensors"]


@pytest.mark.parametrize("cfg", [BASE, I2V, VAE], ids=["t2v", "flf2v", "vae"])
def test_both_namings_give_the_same_model(tmp_path, cfg):
    found = {}
    for layout in ("official", "diffusers"):
        path = saved(tmp_path / layout / "model.safetensors", weights(cfg, layout))
        assert main(["convert", str(path), str(tmp_path / layout)]) == 0
        found[layout], facts = converted(tmp_path / layout, "vae" if cfg is VAE else "dit")
        assert facts["naming"] == layout
        names = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["config"].items()}
        assert type(cfg)(**names) == cfg
    for name, a in found["official"].items():
        np.testing.assert_array_equal(a, found["diffusers"][name])


def test_prefixes_and_dtypes(tmp_path, capsys):
    own = {f"model.diffusion_model.{k}": v for k, v in weights(BASE, "official").items()}
    path = saved(tmp_path / "a.safetensors", own)
    for dtype in ("bfloat16", "float16"):
        assert main(["convert", str(path), str(tmp_path), "--dtype", dtype]) == 0
        arrays, facts = converted(tmp_path, "dit")
        assert {a.dtype for a in arrays.values()} == {jnp.dtype(dtype)}
        assert facts["dtypes"] == [dtype]
    key = "model.diffusion_model.head.head.weight"
    own[key] = own[key] * np.float32(1e6)
    saved(path, own)
    capsys.readouterr()
    assert "more than float16 holds" in fails(capsys, path, tmp_path, "--dtype", "float16")


def _later(key):
    return {key: np.zeros((2, 2), np.float32)}


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (_later("blocks.0.self_attn.q.lora_A.weight"), "is a LoRA: it cannot be converted yet"),
        (_later("blocks.0.norm3.diff"), "weight differences: it cannot be converted yet"),
        (_later("blocks.0.pos_embedding.embedding.weight"), "a UMT5 text encoder: it cannot"),
        (_later("encoder.down_blocks.0.resnets.0.conv1.weight"), "the Wan 2.2 autoencoder: it"),
        (_later("model.embed_tokens.weight"), "neither a Wan DiT nor a Wan autoencoder"),
        ({"blocks.0.x": np.zeros(2, np.int8)}, "holds I8 arrays: quantised weights"),
        (weights(BASE, "official") | _later("blocks.0.extra.weight"), "have no place in this"),
        ({k: v for k, v in weights(VAE, "official").items() if "middle.1" not in k}, "are missing"),
        (weights(DiTConfig(128, 1, 1, 8, 48, 48), "official"), "is a Wan 2.2 model: it cannot"),
        (weights(DiTConfig(128, 1, 1, 8, condition_channels=20), "official"), "Wan 2.2 model"),
        (weights(DiTConfig(96, 1, 1, 8), "diffusers"), "put its config.json"),
        ({k: v * np.float32(np.nan) for k, v in weights(BASE, "official").items()}, "not finite"),
    ],
)
def test_what_is_not_converted(tmp_path, capsys, arrays, says):
    path = saved(tmp_path / "x.safetensors", arrays)
    assert says in fails(capsys, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_wrong_part(tmp_path, capsys):
    path = saved(tmp_path / "x.safetensors", weights(BASE, "official"))
    assert "is a diffusion transformer" in fails(capsys, path, tmp_path, "--part", "vae")


def test_configurations_that_contradict_the_weights(tmp_path, capsys):
    path = saved(tmp_path / "x.safetensors", weights(BASE, "diffusers"))
    for config, says in (
        ({"num_attention_heads": 3}, "config.json says 3 heads"),
        ({"num_attention_heads": "many"}, "are not those of a Wan model"),
        ([1], "is damaged"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert says in fails(capsys, path, tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    assert "twice" in fails(capsys, path, tmp_path)


def test_damaged_files(tmp_path, capsys):
    path = saved(tmp_path / "x.safetensors", weights(BASE, "official"))
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = next(k for k in header if k != "__metadata__")

    def with_header(change):
        changed = json.loads(json.dumps(header))
        change(changed[name])
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    for bad, says in (
        (data[:-7], "cut short or damaged"),
        (data + b"\0", "cut short or damaged"),
        (data[:100], "cut short"),
        (b"", "cut short"),
        (b"<html>not found</html>", "not a safetensors file, or cut short"),
        (struct.pack("<Q", 2**40) + data[8:], "not a safetensors file"),
        (data[:8] + b"x" + data[9:], "is damaged"),
        (with_header(lambda e: e.update(dtype="F99")), "impossible dtype, shape or place"),
        (with_header(lambda e: e.update(shape=[-1])), "impossible dtype, shape or place"),
        (with_header(lambda e: e.update(data_offsets=[8, 4])), "impossible dtype"),
        (with_header(lambda e: e.clear()), "impossible dtype, shape or place"),
    ):
        path.write_bytes(bad)
        assert says in fails(capsys, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_indices_stay_in_their_folder(tmp_path, capsys):
    saved(tmp_path / "secret.safetensors", weights(VAE, "official"))
    folder = tmp_path / "model"
    saved(folder / "a.safetensors", weights(BASE, "official"))
    index = folder / "model.safetensors.index.json"
    for places, says in (
        ({"k": "../secret.safetensors"}, "which is not in its folder"),
        ({"k": str(tmp_path / "secret.safetensors")}, "which is not in its folder"),
        ({"k": "missing.safetensors"}, "cannot read"),
        ({"k": "a.safetensors"}, "index and shards disagree"),
        ({}, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        assert says in fails(capsys, index, tmp_path / "out")


def test_sources_that_are_not_there(tmp_path, capsys):
    assert "no such file or folder" in fails(capsys, tmp_path / "none", tmp_path)
    assert "holds no .safetensors file" in fails(capsys, tmp_path, tmp_path)
    (tmp_path / "model.pth").touch()
    assert ".pth files come with a later release" in fails(capsys, tmp_path, tmp_path)
    assert "is a PyTorch file" in fails(capsys, tmp_path / "model.pth", tmp_path)
    (tmp_path / "x.gguf").touch()
    assert "neither .safetensors nor" in fails(capsys, tmp_path / "x.gguf", tmp_path)
    for name in "ab":
        saved(tmp_path / f"{name}.safetensors", weights(VAE, "official"))
    assert "holds 2 checkpoints (a.safetensors, b" in fails(capsys, tmp_path, tmp_path)
    (tmp_path / "pipe" / "transformer_2").mkdir(parents=True)
    assert "is a Wan 2.2 pipeline" in fails(capsys, tmp_path / "pipe", tmp_path)


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    path = saved(tmp_path / "x.safetensors", weights(VAE, "diffusers"))
    assert main(["convert", str(path), str(path / "below")]) == 6
    assert "choose another place" in capsys.readouterr().err


def test_arrays_are_read_one_by_one(tmp_path):
    own = weights(VAE, "official") | {"half": np.arange(4).astype(jnp.bfloat16)}
    path = saved(tmp_path / "x.safetensors", own)
    tensors, config = read.open_checkpoint(path)
    assert config == {} and tensors.keys() == own.keys() and "none" not in tensors
    for name in ("half", "conv2.weight"):
        assert tensors[name].dtype == own[name].dtype and tensors.shape(name) == own[name].shape
        np.testing.assert_array_equal(tensors[name], own[name])
