# SPDX-License-Identifier: Apache-2.0
"""The official settings of each released Wan, the configs that name them, and sizes of pictures."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lvjax
from lvjax.cli import config, drive
from lvjax.cli.generate import OPTIONS
from lvjax.cli.main import main
from lvjax.cli.request import make_request
from lvjax.core.errors import InputError
from lvjax.core.params import count
from lvjax.models.config import WAN_VAE_2_1, WAN_VAE_2_2
from lvjax.models.dit import dit_spec
from lvjax.rollout.condition import pixel_frames
from lvjax.run import job
from lvjax.run.bundle import Bundle
from lvjax.run.defaults import Defaults
from lvjax.run.presets import (
    MODELS,
    NEGATIVE,
    OFFICIAL_SIZES,
    PRESETS,
    SIZES,
    preset_of,
    presets_of,
    size_notices,
)
from lvjax.run.request import Request
from lvjax.run.session import check_settings, size_for
from tests.wan_folder import wan_folder

CONFIGS = Path(__file__).parents[2] / "configs"

# Written down from Wan-Video/Wan2.1 and Wan2.2: generate.py, wan/configs, and not from presets.py:
# steps, shift, guidance, frames/s, frames, boundary, (width, height)
TABLE = {
    "wan2.1-t2v-1.3b": (50, 5.0, 5.0, 16, 81, None, (832, 480)),
    "wan2.1-t2v-14b": (50, 5.0, 5.0, 16, 81, None, (1280, 720)),
    "wan2.1-i2v-14b": (40, 5.0, 5.0, 16, 81, None, (1280, 720)),
    "wan2.1-i2v-14b-480p": (40, 3.0, 5.0, 16, 81, None, (832, 480)),
    "wan2.1-flf2v-14b": (50, 16.0, 5.0, 16, 81, None, (1280, 720)),
    "wan2.2-t2v-a14b": (40, 12.0, (3.0, 4.0), 16, 81, 0.875, (1280, 720)),
    "wan2.2-i2v-a14b": (40, 5.0, (3.5, 3.5), 16, 81, 0.9, (1280, 720)),
    "wan2.2-ti2v-5b": (50, 5.0, 5.0, 24, 121, None, (1280, 704)),
}
FOUR = {(1280, 720), (720, 1280), (832, 480), (480, 832)}
TAKEN = dict.fromkeys((*MODELS, "wan2.1-i2v-14b-480p"), FOUR) | {
    "wan2.1-t2v-1.3b": {(832, 480), (480, 832)},
    "wan2.2-ti2v-5b": {(1280, 704), (704, 1280)},
}
PARAMETERS = {
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "wan2.1-i2v-14b": 16_394_878_784,
    "wan2.1-flf2v-14b": 16_395_536_704,
    "wan2.2-t2v-a14b": 14_288_491_584,
    "wan2.2-i2v-a14b": 14_288_901_184,
    "wan2.2-ti2v-5b": 4_999_787_712,
}
FILES = {
    "wan2_1_t2v_1_3b": "wan2.1-t2v-1.3b",
    "wan2_1_t2v_14b": "wan2.1-t2v-14b",
    "wan2_1_i2v_14b_480p": "wan2.1-i2v-14b-480p",
    "wan2_1_i2v_14b_720p": "wan2.1-i2v-14b",
    "wan2_1_flf2v_14b": "wan2.1-flf2v-14b",
    "wan2_2_t2v_a14b": "wan2.2-t2v-a14b",
    "wan2_2_i2v_a14b": "wan2.2-i2v-a14b",
    "wan2_2_ti2v_5b": "wan2.2-ti2v-5b",
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_is_official(name):
    d = PRESETS[name]
    frames = pixel_frames(d.clip_latents)
    own = d.steps, d.shift, d.guidance, d.fps, frames, d.boundary, d.size[::-1]
    assert own == TABLE[name]
    assert (d.solver, d.method, d.upscale) == ("unipc", "wan", 1)
    assert d.impose == (name == "wan2.2-ti2v-5b")
    before = {"wan2.1-i2v": "camera shake, ", "wan2.1-flf": "scene cut, camera shake, "}
    assert d.negative == before.get(name[:10], "") + NEGATIVE


def test_there_is_a_preset_for_every_model():
    assert PRESETS.keys() == TABLE.keys() and MODELS.keys() < PRESETS.keys()
    assert {k: {s[::-1] for s in v} for k, v in OFFICIAL_SIZES.items()} == TAKEN
    assert {name: count(dit_spec(cfg)) for name, cfg in MODELS.items()} == PARAMETERS
    assert {SIZES[f"{p}p"][::-1] for p in (480, 720)} < FOUR and SIZES["704p"] == (704, 1280)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_known_by_its_structure(name):
    two = name.endswith("a14b")
    assert preset_of(MODELS[name], 1 + two) == name
    small = dataclasses.replace(MODELS[name], dim=256, num_heads=2, num_layers=1)
    alone = {"wan2.2-t2v-a14b": "wan2.1-t2v-14b"}.get(name, name)  # an expert has its shapes
    assert preset_of(MODELS[name], 1) == alone
    if "t2v" not in name:
        assert preset_of(small, 1 + two) == name


@pytest.mark.parametrize("file", FILES)
def test_a_config_says_what_its_preset_says(file):
    loaded = config.load(file, ["model=somewhere", "seed=3", "image=a.jpg"])
    assert (loaded.model, loaded.seed, loaded.image) == ("somewhere", 3, "a.jpg")
    preset = PRESETS[FILES[file]]
    assert config.build(Defaults, loaded.defaults) == preset
    assert set(loaded) <= {*OPTIONS, "defaults"} and loaded.frames == TABLE[FILES[file]][4]
    image = "i2v" in file or "flf2v" in file
    assert loaded.size is None if image else SIZES[loaded.size] == preset.size
    doc = (CONFIGS / f"{file}.py").read_text().split('"""')[1]
    assert f"lvjax generate --config {file} --model FOLDER" in doc
    assert ("--image" in doc.split("Expects")[0]) == (image and "ti2v" not in file)
    assert ("--last-image" in doc) == ("flf2v" in file)
    width, height = TABLE[FILES[file]][-1]
    says = re.findall(r"(\d+) frames(?: of (\d+)x(\d+))? at (\d+) frames/s", " ".join(doc.split()))
    assert [(int(n), int(fps)) for n, *_, fps in says] == [(loaded.frames, preset.fps)]
    assert f"{width}x{height}" in doc


def test_a_config_needs_a_model(tmp_path, capsys):
    asked = ["generate", "--config", "wan2_2_t2v_a14b", "--prompt", "a", "--out"]
    assert main([*asked, str(tmp_path / "a.mp4")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "give the folder of its weights with --model" in said
    assert main([*asked, str(tmp_path / "a.mp4"), "--set", f"model={tmp_path / 'none'}"]) == 3
    assert "no model" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # of diffusers
def test_generate_with_a_config(tmp_path, capsys, monkeypatch):
    """Up to the first clip, with the settings of the config in the run card."""
    folder, out = wan_folder(tmp_path / "wan", "t2v-a14b"), tmp_path / "a.mp4"
    capsys.readouterr()
    monkeypatch.setattr(drive, "finish", lambda *given: 0)
    own = ["--config", "wan2_2_t2v_a14b", "--set", f"model={folder}", "--prompt", "A red fox"]
    small = ["--size", "48x32", "--frames", "1", "--set", "defaults.steps=4", "--quiet"]
    assert main(["generate", *own, *small, "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "wan2.2-t2v-a14b was made for 1280x720 or 720x1280 or" in said
    options = job.saved_card(out)["options"]
    d = job.defaults_of(options)
    assert d == dataclasses.replace(PRESETS["wan2.2-t2v-a14b"], steps=4)
    assert (options["frames"], options["size"], options["seed"]) == (1, [32, 48], 0)


def outline(name, preset=None) -> Bundle:
    vae = WAN_VAE_2_2 if name == "wan2.2-ti2v-5b" else WAN_VAE_2_1
    parts = dict.fromkeys(("dit", "dit_low") if name.endswith("a14b") else ("dit",))
    return Bundle(name, MODELS[name], vae, None, PRESETS[preset or name], {}, parts=parts)


def notices(name, size, preset=None):
    return size_notices(name, MODELS[name], PRESETS[preset or name], size)


def test_sizes_that_a_model_was_not_made_for():
    for name, sizes in ((name, TAKEN[name]) for name in MODELS):
        for width, height in sizes:
            shift = name == "wan2.1-i2v-14b" and 480 in (width, height)
            said = notices(name, (height, width))
            assert len(said) == shift and "".join(said).count("shift 3") == shift
    assert "made for 832x480 or 480x832; 1280x720 may" in notices("wan2.1-t2v-1.3b", (720, 1280))[0]
    assert notices("wan2.1-t2v-14b", (704, 1280)) and notices("wan2.2-ti2v-5b", (480, 832))
    assert not notices("wan2.1-i2v-14b", (480, 832), "wan2.1-i2v-14b-480p")
    assert not notices("wan2.2-i2v-a14b", (960, 960)) and notices("wan2.2-i2v-a14b", (512, 512))
    assert not size_notices("mine", MODELS["wan2.1-t2v-14b"], PRESETS["wan2.1-t2v-14b"], (16, 16))


# (height, width) of the picture -> of the video: the official formulas, worked by hand
SHAPES = [
    ("wan2.1-i2v-14b", None, (720, 1280), (720, 1280)),
    ("wan2.1-i2v-14b", "wan2.1-i2v-14b-480p", (480, 832), (480, 832)),
    ("wan2.1-i2v-14b", "wan2.1-i2v-14b-480p", (1000, 1000), (624, 624)),  # sqrt(399360) = 631.9
    ("wan2.2-i2v-a14b", None, (1600, 900), (1280, 720)),
    ("wan2.1-flf2v-14b", None, (300, 900), (544, 1648)),  # sqrt(921600 / 3) = 554.3, * 3 = 1662.8
    ("wan2.2-ti2v-5b", None, (704, 1280), (704, 1280)),
    ("wan2.2-ti2v-5b", None, (1000, 1000), (928, 960)),  # sqrt(901120) = 949.3: 928 and 971 -> 960
]


@pytest.mark.parametrize(("name", "preset", "picture", "size"), SHAPES)
def test_a_video_has_the_shape_of_its_picture(name, preset, picture, size, tmp_path):
    bundle, prompt = outline(name, preset), (((0.0, "a"),),)
    assert size_for(bundle, Request(prompt, 81), picture) == size
    image = np.random.default_rng(0).integers(0, 256, (*picture, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    options = dict.fromkeys(OPTIONS) | {"prompt": ["a"], "image": str(tmp_path / "a.png")}
    if name == "wan2.1-flf2v-14b":
        options["last_image"] = options["image"]
    request, _ = make_request(bundle, options)
    assert request.size == size and request.start.shape == (1, *size, 3)
    if "flf2v" in name:
        assert request.last.shape == (*size, 3)
    assert not size_notices(name, bundle.dit, bundle.defaults, size)
    request, _ = make_request(bundle, options | {"size": "480p-portrait"})
    assert request.size == (832, 480)
    check_settings(bundle, request)


def test_no_shape_that_a_model_cannot_make():
    bundle = outline("wan2.1-i2v-14b", "wan2.1-i2v-14b-480p")
    with pytest.raises(InputError, match="picture of 29999x16 pixels would be"):
        size_for(bundle, Request((((0.0, "a"),),), 81), (16, 29999))


@pytest.mark.filterwarnings("ignore")  # of diffusers
def test_the_python_face_does_the_same(tmp_path):
    bundle = lvjax.load(wan_folder(tmp_path, "i2v-a14b"))
    d = dataclasses.replace(bundle.defaults, size=(64, 64), steps=1)
    bundle = dataclasses.replace(bundle, defaults=d)
    image = np.zeros((40, 90, 3), np.uint8)

    def size(**more):
        session = lvjax.prepare(bundle, "a", image=image, num_frames=1, **more)
        return session.abstract_state().condition.shape[2:4]

    assert size() == (32 // 8, 96 // 8)  # 42.7 x 96 at 64 x 64 pixels
    assert size(width=64) == (64 // 8, 64 // 8) and size(height=32, width=48) == (4, 6)


@pytest.mark.filterwarnings("ignore")  # of diffusers
def test_a_preset_is_named_when_a_model_is_converted(tmp_path, capsys):
    src, dst = wan_folder(tmp_path / "src", "i2v"), tmp_path / "dst"
    own, other = "wan2.1-i2v-14b", "wan2.1-i2v-14b-480p"

    def convert(*options):
        capsys.readouterr()
        return main(["convert", str(src), str(dst), *options])

    def told():
        assert main(["info", str(dst)]) == 0
        return capsys.readouterr().out

    assert convert("--preset", "wan2.1-flf2v-14b") == 2
    assert f"is of another structure; give {own} or {other}" in capsys.readouterr().err
    assert list(dst.iterdir() if dst.exists() else ()) == []
    assert convert("--preset", own, "--part", "vae") == 2
    assert "--preset is for a model with its transformer" in capsys.readouterr().err
    for options, name in (((), own), (("--preset", other), other), ((), other),
                          (("--preset", own), own)):  # fmt: skip
        assert convert(*options) == 0
        bundle = lvjax.load(dst)
        assert bundle.name == name and bundle.defaults == PRESETS[name]
        said = told()
        assert f"{name}; of this structure is also {other if name == own else own}" in said
    # what somebody has changed by hand stays
    model = json.loads((dst / "model.json").read_text())
    del model["crc32"]
    model["defaults"]["steps"] = 7
    (dst / "model.json").write_text(json.dumps(model))
    assert convert() == 0 and lvjax.load(dst).defaults.steps == 7
    assert presets_of(MODELS["wan2.1-t2v-14b"], 1) == ("wan2.1-t2v-14b",)
