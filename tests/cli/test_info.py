# SPDX-License-Identifier: Apache-2.0
"""`lvjax info`: every kind of file is told for what it is, from its header alone."""

import json
import os
import re
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from checkpoints_convert.tensors import Tensors
from lvjax.cli.main import main
from lvjax.core.checkpoint import Stored, load_arrays, save_arrays
from lvjax.run.encoders import save_embeddings
from lvjax.run.presets import MODELS, PRESETS
from tests.checkpoints_convert.tiny_checkpoints import NAMES, manifest, part_of
from tests.cli.commands import PROMPTS, interrupted
from tests.lora_files import lora_arrays
from tests.wan_folder import FAMILIES, save_modules, wan_modules

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers
FORMS = {"F32": 4, "BF16": 2}


@pytest.fixture
def unread(monkeypatch):
    """Nothing may read an array."""

    def refuse(*args):
        raise AssertionError("an array is read")

    for cls, name in ((Stored, "_read"), (Tensors, "__getitem__")):
        monkeypatch.setattr(cls, name, refuse)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models by family, and how many arrays and parameters each part has."""
    root, made = tmp_path_factory.mktemp("wan"), {}
    for family in FAMILIES:
        modules = wan_modules(family)
        sizes = {
            name: (len(list(m.parameters())), sum(p.numel() for p in m.parameters()))
            for name, m in modules.items()
        }
        made[family] = save_modules(modules, root / family), sizes
    return made


def told(capsys, *path) -> dict[str, str]:
    """What is printed, by word; lines with the same word are one text."""
    assert main(["info", *map(str, path)]) == 0
    printed, said = capsys.readouterr(), {}
    assert not printed.err
    for line in printed.out.splitlines():
        assert line[9] == " " and len(line) > 10
        word = line[:9].strip()
        said[word] = f"{said[word]}\n{line[10:]}" if word in said else line[10:]
    return said


def fails(capsys, path, code: int = 3) -> str:
    """The one line of an exit with an error."""
    assert main(["info", str(path)]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lvjax: ")
    return lines[0]


def sparse(path, shapes, dtype: str):
    """A safetensors file that claims arrays of these shapes and has no bytes of them."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * FORMS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    return path


def test_without_a_checkpoint(unread, capsys):
    said = told(capsys)
    assert said["versions"].startswith("python 3.") and "lvjax " in said["versions"]
    assert said["device"].startswith("cpu:0") and "wan" in said["methods"]
    assert said["model"].startswith("pocket: dit 3.8 M parameters") and "64x64" in said[""]
    assert "35 words" in said["language"] and "circle" in said["language"]
    assert said == told(capsys, "pocket")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model(folders, family, unread, capsys):
    folder, sizes = folders[family]
    said, parts = told(capsys, folder), {"transformer": "dit", "transformer_2": "dit_low"}
    parts |= {"vae": "vae", "text_encoder": "text", "image_encoder": "image"}
    for name, (arrays, parameters) in sizes.items():
        text = said[parts[name]]
        assert text.startswith(f"{parameters / 1e6:.1f} M parameters: ")
        assert f"; {arrays} float32, " in text
        assert text.endswith(f"; {arrays} of {arrays} arrays have their place")
    wanted = {parts[n] for n in sizes} | {"model", "tokenizer", "settings", "use"}
    assert set(said) == wanted | ({"preset"} if family == "i2v" else set())
    name, shared = re.match(r"(\S+): (.*) naming", said["model"]).groups()
    assert name in PRESETS and shared == "diffusers + transformers"
    assert said["tokenizer"] == "tokenizer/tokenizer.json"
    use, encode, convert = said["use"].splitlines()
    assert use.startswith(f"lvjax generate --model {folder} ")
    assert ("--image" in use) == (family in ("i2v", "flf2v", "i2v-a14b"))
    assert ("--last-image" in use) == (family == "flf2v") and "--embeddings" not in use
    assert encode.startswith(f"lvjax encode --model {folder} ")
    assert convert == f"lvjax convert {folder} FOLDER"


@pytest.mark.parametrize("name", NAMES)
def test_every_released_checkpoint(name, tmp_path, unread, capsys):
    """As a file of its full size, of which only the header is there."""
    shapes, facts = manifest(name)
    said = told(capsys, sparse(tmp_path / "x.safetensors", shapes, "F32"))
    n, part = facts["n_tensors"], part_of(name)
    assert said["part"].split(": ")[0] == part and name.split(".")[-1] in said["part"]
    assert f"{n} of {n} arrays have their place" in said["arrays"]
    model = name.rsplit(".", 1)[0]
    if part == "dit":
        alike = [other for other, cfg in MODELS.items() if cfg == MODELS[model]]
        assert all(other in said["model"] for other in alike) and "built like" not in said["model"]
    if "clip" not in name and "umt5-xxl-encoder.trans" not in name:  # more than the model has
        count = facts["n_params"]
        shown = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
        assert f"{shown} parameters: " in said["model"]


def test_a_model_of_57_gigabytes_takes_a_moment(tmp_path, unread, capsys):
    expert, _ = manifest("wan2.2-i2v-a14b.official")
    for folder in ("high_noise_model", "low_noise_model"):
        sparse(tmp_path / folder / "x.safetensors", expert, "BF16")
    sparse(tmp_path / "Wan2.1_VAE.safetensors", manifest("wan2.1-vae.official")[0], "F32")
    before = time.monotonic()
    said = told(capsys, tmp_path)
    assert time.monotonic() - before < 5
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) > 57e9
    assert said["model"] == "wan2.2-i2v-a14b: official naming, 57.66 GB"
    assert said["dit"] == said["dit_low"] and said["dit"].startswith("14.29 B parameters: ")
    assert "16 + 20 channels; 1095 bfloat16, 28.58 GB" in said["dit"]
    assert "guidance (3.5, 3.5)" in said["settings"] and "40 steps" in said["settings"]
    assert "--image" in said["use"] and "--embeddings" in said["use"]


def test_what_was_converted(folders, tmp_path, monkeypatch, capsys):
    source = str(folders["t2v-a14b"][0])
    assert main(["convert", source, str(tmp_path / "a")]) == 0
    assert main(["convert", source, str(tmp_path / "o"), "--format", "orbax"]) == 0
    assert main(["convert", source, str(tmp_path / "t"), "--part", "text"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(Stored, "_read", None)
    plain, orbax = told(capsys, tmp_path / "a"), told(capsys, tmp_path / "o")
    assert plain["model"].startswith("wan2.2-t2v-a14b: lvjax naming") and "tokenizer" in plain
    assert {k: v for k, v in plain.items() if k != "use"} == {
        k: v for k, v in orbax.items() if k != "use"
    }
    assert "lvjax convert" not in plain["use"]
    part = told(capsys, tmp_path / "o" / "dit_low")
    assert part["part"] == "dit_low: a diffusion transformer, lvjax naming"
    assert part["use"].endswith(f"lvjax info {tmp_path / 'o'}")
    assert part["arrays"] == told(capsys, tmp_path / "a" / "dit_low.safetensors")["arrays"]
    text = told(capsys, tmp_path / "t")
    assert text["missing"].startswith("dit and vae") and "lvjax encode" in text["use"]


@pytest.mark.parametrize("gone", ["dit", "dit_low"])
def test_one_expert_of_two(folders, tmp_path, gone, capsys):
    """Nothing is made with it before the other one is there."""
    source = folders["i2v-a14b"][0]
    assert main(["convert", str(source), str(tmp_path)]) == 0
    capsys.readouterr()
    assert "generate" in told(capsys, tmp_path)["use"]
    (tmp_path / f"{gone}.safetensors").unlink()
    said = told(capsys, tmp_path)
    assert said["missing"] == f"{gone}, to make videos with it" and "generate" not in said["use"]
    part = next(name for name in ("dit", "dit_low") if name != gone)
    only = tmp_path / f"{part}.safetensors"
    for path in sorted(tmp_path.iterdir()):
        if path not in (only, tmp_path / "vae.safetensors"):
            path.unlink()
    said = told(capsys, tmp_path)
    assert said["missing"].startswith(gone) and "use" not in said


def test_an_expert_by_its_name(tmp_path, unread, capsys):
    expert, _ = manifest("wan2.2-i2v-a14b.official")
    path = sparse(tmp_path / "low_noise_model" / "x.safetensors", expert, "BF16")
    for given in (path, path.parent):
        assert told(capsys, given)["part"].startswith("dit_low: ")


def test_a_pocket_like_model(model, unread, capsys):
    said = told(capsys, model)
    assert said["model"].startswith("tiny: ") and "T-RFlow" in said["settings"]
    assert {"dit", "vae", "text"} <= said.keys() and "--image" not in said["use"]


def test_a_set_of_weights_and_a_missing_tokenizer(folders, tmp_path, unread, capsys):
    folder, _ = folders["t2v"]
    state = load_torch(folder / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save({"generator": state, "generator_ema": state, "step": 3}, tmp_path / "x.pt")
    assert "the weights 'generator_ema'" in told(capsys, tmp_path / "x.pt")["part"]
    said = told(capsys, folder / "text_encoder")
    assert said["tokenizer"].startswith("none") and "lvjax encode" not in said["use"]


LORAS = {
    "official": ("diffusion_model.{}", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": ("transformer.{}", ".lora_A.weight", ".lora_B.weight"),
    "kohya": ("lora_unet_{}", ".lora_down.weight", ".lora_up.weight"),
}
MODULES = {"official": "blocks.{}.self_attn.q", "diffusers": "blocks.{}.attn1.to_q"}


@pytest.mark.parametrize("family", LORAS)
def test_a_lora(family, tmp_path, unread, capsys):
    prefix, down, up = LORAS[family]
    shapes = {}
    for layer in range(30):
        module = MODULES.get(family, MODULES["official"]).format(layer)
        name = prefix.format(module.replace(".", "_") if family == "kohya" else module)
        shapes |= {f"{name}{down}": (4 + layer % 2, 1536), f"{name}{up}": (1536, 4 + layer % 2)}
        if family == "kohya":
            shapes[f"{name}.alpha"] = ()
    said = told(capsys, sparse(tmp_path / "x.safetensors", shapes, "BF16"))
    assert said["lora"].startswith(family) and "rank 4 and 5 beside 30 weights" in said["lora"]
    assert said["model"].endswith("1536 wide, 30 layers or more; fits wan2.1-t2v-1.3b")
    assert said["arrays"].startswith(f"{len(shapes)} bfloat16, ")
    assert f"--lora {tmp_path / 'x.safetensors'}" in said["use"]
    assert "fits" in told(capsys, tmp_path)["model"]  # a folder with nothing else


def test_loras_of_other_kinds(tmp_path, unread, capsys):
    def told_of(shapes):
        return told(capsys, sparse(tmp_path / "x.safetensors", shapes, "F32"))

    diff = told_of({"diffusion_model.blocks.39.norm3.diff_b": (5120,), "a.b.lora_A.weight": (2, 2)})
    assert diff["lora"].endswith("names: 1 difference") and "unknown width" in diff["model"]
    fits = [n for n, cfg in MODELS.items() if cfg.dim == 5120]
    assert diff["model"].endswith(f"fits {', '.join(fits)}") and "1 of them" in diff["arrays"]
    low = {"transformer_2.blocks.0.attn1.to_q.lora_A.weight": (3, 48)}
    assert "low-noise" in told_of(low)["expert"] and "no released size" in told_of(low)["model"]
    both = low | {"transformer.blocks.0.attn1.to_q.lora_A.weight": (3, 48)}
    assert "both experts" in told_of(both)["expert"]
    i2v = {"blocks.0.cross_attn.k_img.lora_down.weight": (3, 5120)}
    assert told_of(i2v)["model"].endswith("fits wan2.1-i2v-14b, wan2.1-flf2v-14b")
    odd = {"blocks.0.ffn.0.lora_down.weight": (4, 1536), "blocks.0.ffn.0.lora_up.weight": (9, 4)}
    assert told_of(odd)["model"].endswith("1536 wide, 1 layer or more; of no released size")
    for shapes, says in (
        ({"single_blocks.0.q.lora_A.weight": (4, 8)}, "a LoRA of something else"),
        ({"blocks.0.self_attn.q.dora_scale": (8,)}, "DoRA"),
        ({"blocks.0.self_attn.q.lora_A.weight": ()}, "is a number"),
    ):
        assert says in fails(capsys, sparse(tmp_path / "y.safetensors", shapes, "F32"))


def test_a_lora_of_a_small_model(tmp_path, capsys):
    arrays = {name: np.asarray(a) for name, a in lora_arrays().items()}
    save_file(arrays, tmp_path / "x.safetensors")
    said = told(capsys, tmp_path / "x.safetensors")
    assert "rank 2 beside" in said["lora"] and "32 wide, 2 layers or" in said["model"]


def test_an_empty_name_is_not_the_current_folder(capsys):
    assert main(["info", ""]) == 2
    assert capsys.readouterr().err.startswith("lvjax: CHECKPOINT is empty; ")


def test_embeddings_and_other_arrays(tmp_path, unread, capsys):
    rows = {f"prompt {i}": np.zeros((3 + i, 32), np.float32) for i in range(6)}
    save_embeddings(tmp_path / "p.safetensors", rows, "wan2.2-ti2v-5b")
    said = told(capsys, tmp_path / "p.safetensors")
    assert said["prompts"] == "6, encoded by wan2.2-ti2v-5b, 32 wide"
    assert said["prompt"].splitlines()[-1] == "'prompt 3' (and 2 more)"
    assert f"--embeddings {tmp_path / 'p.safetensors'}" in said["use"]
    save_arrays(tmp_path / "a.safetensors", {"a": np.zeros(3, np.int8)}, {"mine": 1})
    assert told(capsys, tmp_path / "a.safetensors") == {"arrays": "of lvjax's: 1 int8, 0.00 MB"}


def test_a_video_its_card_and_its_state(model, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    interrupted(model, out, 1, *PROMPTS, "--seconds", "5", "--quiet")
    capsys.readouterr()
    said = told(capsys, f"{out}.state")
    assert said["state"] == "1 clip, 17 frames made"
    assert said["use"] == f"lvjax generate --resume --out {out}"
    assert main(["generate", "--resume", "--out", str(out), "--quiet"]) == 0
    capsys.readouterr()
    for path in (out, f"{out}.json"):
        said = told(capsys, path)
        assert said["video"] == "41 frames of 16x16, seed 0" and model in said["model"]
        assert said["prompt"].splitlines() == ["'the camera pans left'", "'a red circle moves up'"]
        assert said["use"] == f"lvjax replay {path}"


def cut(path):
    os.truncate(path, path.stat().st_size - 5)


def without_an_array(path):
    arrays = load_file(path)
    del arrays["blocks.1.attn2.to_v.bias"]
    save_file(arrays, path)


def text(path):
    path.write_text("this is no checkpoint")


def a_page(path):
    path.write_text("<!DOCTYPE html><html>")


def quantised(path):
    arrays = load_file(path)
    arrays["blocks.0.attn1.to_q.weight"] = arrays["blocks.0.attn1.to_q.weight"].astype(np.int8)
    save_file(arrays, path)


DAMAGE = {
    cut: "is cut short or damaged",
    without_an_array: "of 1 layers, not 2",
    text: "neither safetensors",
    a_page: "a web page",
    quantised: "holds int8 arrays",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("whole", (False, True))
def test_what_is_damaged(folders, tmp_path, damage, whole, capsys):
    shutil.copytree(folders["t2v"][0], tmp_path / "wan")
    path = tmp_path / "wan" / "transformer" / "diffusion_pytorch_model.safetensors"
    damage(path)
    said = fails(capsys, tmp_path / "wan" if whole else path)
    assert str(path) in said and DAMAGE[damage] in said


def test_a_converted_part_that_is_another(folders, tmp_path, capsys):
    assert main(["convert", str(folders["t2v"][0]), str(tmp_path)]) == 0
    path = tmp_path / "dit.safetensors"
    arrays, meta = load_arrays(path)
    arrays["head/linear/bias"] = arrays["head/linear/bias"][1:]
    save_arrays(path, arrays, meta)
    capsys.readouterr()
    assert main(["info", str(tmp_path)]) == 3
    printed = capsys.readouterr()
    assert "41 of 42 arrays have their place" in printed.out and "generate" not in printed.out
    assert (
        printed.err.count("\n") == 1 and "head/linear/bias has shape (63,), expected" in printed.err
    )
    path.write_bytes(path.read_bytes()[:-9])
    assert "not a readable lvjax file" in fails(capsys, path)


def test_what_is_nothing(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no part of a Wan model" in fails(capsys, tmp_path / "empty")
    assert "No such file" in fails(capsys, tmp_path / "none")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert "no lvjax run card" in fails(capsys, tmp_path / "a.json")
    (tmp_path / "empty.safetensors").touch()
    assert "is empty" in fails(capsys, tmp_path / "empty.safetensors")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    assert "neither safetensors" in fails(capsys, tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe" in fails(capsys, tmp_path / "pipe")


def test_one_more_argument_is_refused(model, tmp_path):
    with pytest.raises(SystemExit) as e:
        main(["info", model, str(tmp_path)])
    assert e.value.code == 2
