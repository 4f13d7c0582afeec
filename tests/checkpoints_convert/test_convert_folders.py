# SPDX-License-Identifier: Apache-2.0
"""Whole models, as their publishers and as diffusers lay them out: converted, loaded, and back to
where diffusers and transformers load them.
"""

import json
from functools import partial

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection, UMT5EncoderModel

import lvjax
from checkpoints_convert.sources import find_sources
from lvjax.cli.main import main
from lvjax.core.errors import CheckpointError
from lvjax.core.mesh import make_mesh, shardings
from lvjax.core.params import flatten, unflatten
from lvjax.models.dit import dit, dit_spec, embed_context
from lvjax.models.parts import stored_part
from lvjax.run.encoders import encode_prompts
from tests.checkpoints_convert.tiny_checkpoints import (
    bits,
    draw,
    family,
    opened,
    tiny,
    tokenizer,
    usual,
    write,
)
from tests.tiny import relative

MODELS = {  # name: the parts that its folders hold
    "wan2.1-t2v-14b": ("dit", "vae", "text"),
    "wan2.1-i2v-14b": ("dit", "vae", "text", "image"),
    "wan2.2-i2v-a14b": ("dit", "dit_low", "vae", "text"),
    "wan2.2-ti2v-5b": ("dit", "vae", "text"),
}
PRESETS = {"wan2.1-t2v-14b": "wan2.1-t2v-1.3b"}  # a narrow one is taken for the smaller
PLACES = {
    "dit": "transformer",
    "dit_low": "transformer_2",
    "vae": "vae",
    "text": "text_encoder",
    "image": "image_encoder",
}


@pytest.fixture(scope="module", params=MODELS)
def folders(request, tmp_path_factory):
    """(model, {naming: its folder}, {naming: what it is converted to})."""
    root, model = tmp_path_factory.mktemp("models"), request.param
    given = {naming: family(root, model, naming) for naming in ("official", "diffusers")}
    made = {naming: root / f"{naming}.lvjax" for naming in given}
    for naming, fmt in (("official", "safetensors"), ("diffusers", "orbax")):
        own = ["convert", str(given[naming]), str(made[naming]), "--format", fmt, "--keep-unused"]
        assert main(own) == 0
    return model, given, made


def test_a_folder_becomes_a_model(folders, capsys):
    model, given, made = folders
    parts = MODELS[model]
    for naming, suffix in (("official", ".safetensors"), ("diffusers", "")):
        wanted = {"model.json", "tokenizer.json"}
        wanted |= {f"{part}{suffix}" for part in parts} | {f"{p}.report.json" for p in parts}
        if naming == "official" and "image" in parts:
            wanted.add("image.unused.safetensors")
        assert {path.name for path in made[naming].iterdir()} == wanted
        assert (made[naming] / "tokenizer.json").read_text() == tokenizer()
        for part in parts:
            facts = json.loads((made[naming] / f"{part}.report.json").read_text())
            n = facts["source"]
            accounted = n["used"] + len(n["unused"]) + len(n["copies"])
            assert facts["part"] == part and accounted == n["arrays"] > 0
    # the same weights under both names, in both formats, are the same parts
    for part in parts:
        one, other = (opened(made[naming], part) for naming in made)
        assert one.meta == other.meta
        assert {k: s._replace(pieces=()) for k, s in one.slots.items()} == {
            k: s._replace(pieces=()) for k, s in other.slots.items()
        }
    # and a second run changes nothing
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in made["diffusers"].rglob("*")}
    own = ["convert", str(given["diffusers"]), str(made["diffusers"]), "--format", "orbax"]
    assert main(own) == 0
    after = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in made["diffusers"].rglob("*")}
    assert before == after


def test_what_is_loaded_is_the_same(folders):
    model, given, made = folders
    found = [lvjax.load(path) for path in (*given.values(), *made.values())]
    name = PRESETS.get(model, model)
    held = {"dit", "dit_low", "vae", "model"} & {*MODELS[model], "model"}
    for bundle in found:
        assert bundle.name == name and set(bundle.parts) == set(MODELS[model])
        assert bundle.defaults == found[0].defaults and bundle.dit == found[0].dit
        assert (bundle.vae, bundle.text, bundle.image) == (
            found[0].vae, found[0].text, found[0].image
        )  # fmt: skip
        assert {k: bundle.hashes[k] for k in held} == {k: found[0].hashes[k] for k in held}
        same = jax.tree.map(np.array_equal, bundle.params, found[0].params)
        assert all(jax.tree.leaves(same))
    one, other = found[2:]
    assert one.hashes == other.hashes and one.hashes.keys() >= held
    if model == "wan2.1-t2v-14b":
        rows = [encode_prompts(bundle, ["a b c b"])["a b c b"] for bundle in found]
        assert all(np.array_equal(row, rows[0]) for row in rows) and rows[0].std() > 0


def test_one_part_of_a_folder(folders, tmp_path, capsys):
    model, given, _ = folders
    for part in MODELS[model]:
        for naming, folder in given.items():
            dst = tmp_path / naming / part
            assert main(["convert", str(folder), str(dst), "--part", part]) == 0
            assert {path.name for path in dst.iterdir()} - {"model.json", "tokenizer.json"} == {
                f"{part}.safetensors",
                f"{part}.report.json",
            }
    assert main(["convert", str(given["official"]), str(tmp_path / "no"), "--part", "dit_low"]) == (
        0 if "dit_low" in MODELS[model] else 3
    )


def test_exported_folders_load_in_diffusers_and_transformers(folders, tmp_path):
    model, given, made = folders
    assert main(["convert", str(made["official"]), str(tmp_path), "--to", "diffusers"]) == 0
    wanted = {PLACES[part] for part in MODELS[model]}
    wanted |= {"model_index.json", "scheduler", "tokenizer"}
    wanted |= {"image_processor"} if "image" in MODELS[model] else set()
    assert {path.name for path in tmp_path.iterdir()} == wanted
    for part in MODELS[model]:
        place = PLACES[part]
        folder, theirs = tmp_path / place, given["diffusers"] / place
        assert bits(folder) == bits(theirs)
        config = json.loads((folder / "config.json").read_text())
        if part in ("text", "image"):
            kind = UMT5EncoderModel if part == "text" else CLIPVisionModelWithProjection
            module, said = kind.from_pretrained(folder, output_loading_info=True)
            assert not any(said.values()), said
            continue
        kind = AutoencoderKLWan if part == "vae" else WanTransformer3DModel
        module = kind.from_config(config)
        weights = {
            k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()
        }
        module.load_state_dict(weights, strict=True)
        # what the publisher's config.json says, ours says too
        own = json.loads((theirs / "config.json").read_text())
        for key in own.keys() & config.keys():
            assert config[key] == own[key], key


def test_an_exported_transformer_computes_the_same(tmp_path):
    """In diffusers' own class, with heads that only the config.json tells."""
    source = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, text_dim=32, freq_dim=32, ffn_dim=48,
        num_layers=2, eps=1e-5,
    )  # fmt: skip
    with torch.no_grad():
        for i, p in enumerate(source.parameters()):
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    write({k: t.numpy() for k, t in source.state_dict().items()}, tmp_path / "src", "w", "file")
    (tmp_path / "src" / "config.json").write_text(json.dumps(dict(source.config)))
    vae = "wan2.1-vae.official"
    write(draw(tiny(vae)[0]), tmp_path / "src", *usual(vae))
    assert main(["convert", str(tmp_path / "src"), str(tmp_path / "dst")]) == 0
    rng = np.random.default_rng(0)
    x, text = rng.standard_normal((1, 2, 4, 4, 16)), rng.standard_normal((1, 5, 32))
    x, text = x.astype(np.float32), text.astype(np.float32)
    t = np.asarray([700.0], np.float32)
    with torch.no_grad():
        wanted = source.eval()(
            torch.from_numpy(x).permute(0, 4, 1, 2, 3),
            torch.from_numpy(t),
            torch.from_numpy(np.pad(text, ((0, 0), (0, 507), (0, 0)))),
        ).sample.permute(0, 2, 3, 4, 1)

    @partial(jax.jit, static_argnums=4)
    def run(params, x, t, text, cfg):
        return dit(params, x, t, embed_context(params, text, cfg), cfg)[0]

    for to in ("diffusers", "official"):
        back = tmp_path / to
        assert main(["convert", str(tmp_path / "dst"), str(back), "--to", to]) == 0
        (back / "vae" / "config.json").unlink(missing_ok=True)
        bundle = lvjax.load(back, dtype="float32")
        assert bundle.dit.num_heads == 4 and bundle.dit.eps == 1e-5
        params = bundle.params["dit"]
        ours = run(params, x, t, text, bundle.dit)
        assert relative(ours, wanted) < 1e-5


def test_orbax_puts_a_converted_part_on_a_mesh(tmp_path):
    """Orbax alone, with the shardings that lvjax gives the parameters, over eight devices."""
    own = draw(tiny("wan2.1-t2v-1.3b.official")[0], "mixed")
    src = write(own, tmp_path, "x", "file")
    assert main(["convert", str(src), str(tmp_path / "dst"), "--format", "orbax"]) == 0
    stored = opened(tmp_path / "dst", "dit")
    spec = dit_spec(stored_part(stored)[1])
    places = flatten(shardings(spec, make_mesh(fsdp=8)))
    like = {
        name: jax.ShapeDtypeStruct(slot.shape, slot.dtype, sharding=places[name])
        for name, slot in stored.slots.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        found = flatten(checkpointer.restore(tmp_path / "dst" / "dit", unflatten(like)))
    assert found.keys() == stored.keys()
    for name, array in found.items():
        assert array.sharding == places[name] and len(array.addressable_shards) == 8
        np.testing.assert_array_equal(np.asarray(array), stored[name])
    q = found["blocks/self_attn/q/kernel"]
    assert q.addressable_shards[0].data.shape == (2, 128, 16)


# ---- folders that are not whole ---------------------------------------------------------


def fails(capsys, *arguments) -> str:
    """The last line of a conversion that ends with code 3."""
    assert main(["convert", *map(str, arguments)]) == 3
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def pair(tmp_path):
    return family(tmp_path, "wan2.2-i2v-a14b", "official")


def test_an_expert_alone(pair, tmp_path, capsys):
    for gone, other, part in (
        ("low_noise_model", "high_noise_model", "dit"),
        ("high_noise_model", "low_noise_model", "dit_low"),
    ):
        (pair / gone).rename(tmp_path / "away")
        says = fails(capsys, pair, tmp_path / "dst")
        assert "holds one expert of two" in says and not (tmp_path / "dst").exists()
        with pytest.raises(CheckpointError, match="holds one expert of two"):
            lvjax.load(pair)
        assert main(["convert", str(pair), str(tmp_path / part), "--part", part]) == 0
        own = ["convert", str(pair / other), str(tmp_path / f"{part}-own"), "--part", part]
        assert main(own) == 0
        assert opened(tmp_path / part, part).slots.keys() == (
            opened(tmp_path / f"{part}-own", part).slots.keys()
        )
        (tmp_path / "away").rename(pair / gone)


def test_two_experts_in_one_folder(tmp_path):
    """As single files are passed on; the name tells them apart, and nothing else can."""
    for seed, word in enumerate(("high", "low")):
        arrays = draw(tiny("wan2.2-t2v-a14b.official")[0], "bfloat16", seed)
        write(arrays, tmp_path, f"wan2.2_t2v_{word}_noise_14B_bf16", "file")
    sources, left = find_sources(tmp_path)
    assert not left and [(s.part, "low_noise" in s.path.name) for s in sources] == [
        ("dit", False),
        ("dit_low", True),
    ]


@pytest.mark.parametrize("how", ["file", "index", "folder", "official folder", "link"])
@pytest.mark.parametrize(("word", "part"), [("low", "dit_low"), ("high", "dit")])
def test_an_expert_by_itself_is_the_one_that_its_name_says(tmp_path, capsys, how, word, part):
    arrays = draw(tiny("wan2.2-t2v-a14b.official")[0], "bfloat16")
    expert = tmp_path / f"{word}_noise_model"
    if how == "file":
        src = write(arrays, tmp_path / "x", f"wan2.2_t2v_{word}_noise_14B", "file")
    elif how == "index":
        src = write(arrays, expert, "diffusion_pytorch_model", "shards")
    elif how == "link":  # as caches of downloads have them
        (tmp_path / f"a_{word}_noise_14B.safetensors").symlink_to(
            write(arrays, tmp_path, "b", "file")
        )
        src = tmp_path / f"a_{word}_noise_14B.safetensors"
    else:
        stem = "x" if how == "folder" else f"wan_{word}_noise"
        src = write(arrays, expert, stem, "shards").parent
    assert main(["convert", str(src), str(tmp_path / "dst")]) == 0
    said = capsys.readouterr().err
    assert f"{part} (the {word}-noise expert by its name, official naming" in said
    assert opened(tmp_path / "dst", part).meta["part"] == part
    # who says which it is, is right
    for other in ("dit", "dit_low") if how in ("file", "index") else ():
        dst = tmp_path / f"as-{other}"
        assert main(["convert", str(src), str(dst), "--part", other]) == 0
        assert "by its name" not in capsys.readouterr().err
        assert opened(dst, other).meta["part"] == other
    # and both make a model of two
    if how == "folder" and word == "low":
        high = write(arrays, tmp_path / "high_noise_model", "x", "shards").parent
        assert main(["convert", str(high), str(tmp_path / "dst")]) == 0
        model = json.loads((tmp_path / "dst" / "model.json").read_text())
        assert model["name"] == "wan2.2-t2v-a14b"


def test_the_name_of_a_whole_model_is_not_of_an_expert(tmp_path):
    src = tmp_path / "low_noise_tests"
    write(draw(tiny("wan2.1-t2v-1.3b.official")[0]), src, "dit", "file")
    write(draw(tiny("wan2.1-vae.official")[0]), src, "vae", "pth")
    assert [(s.part, s.expert) for s in find_sources(src)[0]] == [("dit", None), ("vae", None)]


def test_layers_of_two_types_are_loaded_in_the_wider(tmp_path):
    """Nothing is written, so that there is no type to choose; conversion asks for one."""
    own = draw(tiny("wan2.1-t2v-1.3b.official")[0])
    for key in ("blocks.0.ffn.0.weight", "blocks.1.norm3.weight", "blocks.1.modulation"):
        own[key] = own[key].astype(ml_dtypes.bfloat16)
    half = "blocks.0.ffn.2.weight", "blocks.1.ffn.2.weight"
    own[half[0]] = own[half[0]].astype(np.float16)
    own[half[1]] = own[half[1]].astype(ml_dtypes.bfloat16)
    write(own, tmp_path, "dit", "file")
    write(draw(tiny("wan2.1-vae.official")[0]), tmp_path, "vae", "pth")
    bundle = lvjax.load(tmp_path, dtype="float32")
    blocks, stored = bundle.params["dit"]["blocks"], bundle.parts["dit"]
    for layer in range(2):
        for path, key in (("fc1", "ffn.0"), ("fc2", "ffn.2")):
            wanted = own[f"blocks.{layer}.{key}.weight"].astype(np.float32).T
            np.testing.assert_array_equal(blocks["ffn"][path]["kernel"][layer], wanted)
            one = stored.layer(f"blocks/ffn/{path}/kernel", layer)
            assert one.dtype == stored[f"blocks/ffn/{path}/kernel"].dtype == np.float32
            np.testing.assert_array_equal(one, wanted)
        wanted = own[f"blocks.{layer}.norm3.weight"].astype(np.float32)
        np.testing.assert_array_equal(blocks["norm3"]["scale"][layer], wanted)


def test_what_is_left_out_is_told(tmp_path):
    write(draw(tiny("wan2.1-t2v-1.3b.official")[0]), tmp_path, "dit", "file")
    write(draw(tiny("wan2.1-vae.official")[0]), tmp_path, "vae", "pth")
    write({"a.weight": np.zeros((2, 2), np.float32)}, tmp_path, "of_something_else", "file")
    (said,) = lvjax.load(tmp_path).notices
    assert said.startswith("left out: ") and "of_something_else" in said


def test_damage_is_not_left_out(pair, tmp_path, capsys):
    """A model without one of its parts is another model, and nobody asked for that."""
    file = pair / "models_t5_umt5-xxl-enc-bf16.pth"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert "models_t5" in fails(capsys, pair, tmp_path / "dst")
    with pytest.raises(CheckpointError, match="models_t5"):
        lvjax.load(pair)
    assert not (tmp_path / "dst").exists()
    # what is asked for by name is there
    assert main(["convert", str(pair), str(tmp_path / "dst"), "--part", "vae"]) == 0
    assert "left out: " in capsys.readouterr().err
    assert "models_t5" in fails(capsys, pair, tmp_path / "dst", "--part", "text")


def test_what_is_of_another_kind_is_left_out(pair, tmp_path, capsys):
    lora = {"blocks.0.self_attn.q.lora_A.weight": np.zeros((4, 256), np.float32)}
    write(lora, pair, "a_lora", "file")
    write({"model.0.weight": np.zeros((4, 4), np.float32)}, pair, "safety", "file")
    assert main(["convert", str(pair), str(tmp_path / "dst"), "--part", "vae"]) == 0
    err = capsys.readouterr().err
    assert "lvjax: left out: " in err and "is a LoRA" in err and "is neither" in err
    assert set(lvjax.load(pair).parts) == {"dit", "dit_low", "vae", "text"}


def test_parts_of_two_models(tmp_path, capsys):
    """The autoencoder of Wan 2.2 beside a transformer of Wan 2.1, and two experts of two models."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    write(draw(tiny("wan2.1-t2v-1.3b.official")[0]), src, "a", "file")
    write(draw(tiny("wan2.2-vae.official")[0]), src, "b", "pth")
    says = "gives 48 latent channels, the transformer takes 16"
    assert says in fails(capsys, src, dst) and not dst.exists()
    with pytest.raises(CheckpointError, match=says):
        lvjax.load(src)
    # nor one after the other
    assert main(["convert", str(src / "a.safetensors"), str(dst)]) == 0
    before = sorted(dst.rglob("*"))
    assert says in fails(capsys, src / "b.pth", dst) and sorted(dst.rglob("*")) == before
    # nor two experts of two models
    for word, name in (("high", "wan2.1-t2v-14b"), ("low", "wan2.2-i2v-a14b")):
        write(draw(tiny(f"{name}.official")[0]), tmp_path / "two", f"{word}_noise", "file")
    assert "not two experts of one model" in fails(capsys, tmp_path / "two", tmp_path / "no")


def test_a_bad_part_after_a_good_one(tmp_path, capsys):
    """What is whole stays, for the next run; it is no model yet."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    write(draw(tiny("wan2.1-t2v-1.3b.official")[0]), src, "dit", "file")
    vae = draw(tiny("wan2.1-vae.official")[0])
    good = vae["conv2.bias"].copy()
    vae["conv2.bias"][3] = np.nan
    write(vae, src, "vae", "pth")
    says = fails(capsys, src, dst)
    assert "vae.pth: array 'conv2.bias' is not finite" in says
    assert {p.name for p in dst.iterdir()} == {"dit.safetensors", "dit.report.json"}
    for folder in (src, dst):
        with pytest.raises(CheckpointError):
            lvjax.load(folder)
    before = (dst / "dit.safetensors").stat().st_mtime_ns
    write(vae | {"conv2.bias": good}, src, "vae", "pth")
    assert main(["convert", str(src), str(dst)]) == 0 and set(lvjax.load(dst).parts) == {
        "dit",
        "vae",
    }
    assert (dst / "dit.safetensors").stat().st_mtime_ns == before


def test_the_same_part_twice(tmp_path, capsys):
    for name in "ab":
        write(draw(tiny("wan2.1-vae.official")[0]), tmp_path / "src", name, "file")
    says = fails(capsys, tmp_path / "src", tmp_path / "dst")
    assert "holds an autoencoder twice (a.safetensors, b.safetensors); name one" in says
