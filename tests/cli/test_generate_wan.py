# SPDX-License-Identifier: Apache-2.0
"""`lvjax generate` with Wan's models: every way to start, replays, and what a model cannot use."""

import json

import numpy as np
import pytest
from PIL import Image

import lvjax
from lvjax.cli.main import main
from lvjax.core.errors import InputError
from lvjax.io.video import FragmentedWriter, read_video
from lvjax.run.card import card_path
from lvjax.run.encoders import encode_prompts, save_embeddings
from tests.wan_folder import FAMILIES, wan_folder

PROMPT = ("--prompt", "A red fox runs over the snow")
SMALL = ("--frames", "9", "--steps", "3", "--quiet")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models by family."""
    root = tmp_path_factory.mktemp("models")
    return {family: wan_folder(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A picture, another one, and a video."""
    root, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    for name in ("first", "last"):
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).save(root / f"{name}.png")
    with FragmentedWriter(root / "video.mp4", (64, 48), 16, {}) as writer:
        writer.write_clip(rng.integers(0, 256, (13, 48, 64, 3), np.uint8))
    return root


STARTS = {
    "text": ("t2v", ()),
    "experts": ("t2v-a14b", ("--guidance", "1,4")),
    "image": ("i2v", ("--image", "first.png")),
    "image-experts": ("i2v-a14b", ("--image", "first.png")),
    "two-images": ("flf2v", ("--image", "first.png", "--last-image", "last.png")),
    "text-5b": ("ti2v", ()),
    "image-5b": ("ti2v", ("--image", "first.png")),
    "video": ("t2v", ("--video", "video.mp4", "--strength", "0.7")),
    "last-of-video": ("i2v-a14b", ("--video", "video.mp4")),
}


def command(models, media, family, options, out, *more):
    given = [str(media / o) if o.endswith((".png", ".mp4")) else o for o in options]
    size = "96x64" if family == "ti2v" else "48x32"
    own = ["generate", "--model", str(models[family]), *PROMPT, *SMALL, "--size", size]
    return main([*own, *given, "--out", str(out), *more])


@pytest.mark.parametrize("start", STARTS)
def test_every_way_to_start(models, media, tmp_path, start):
    family, options = STARTS[start]
    out, again = tmp_path / "a.mp4", tmp_path / "b.mp4"
    assert command(models, media, family, options, out) == 0
    frames, fps = read_video(out)
    size = (64, 96) if family == "ti2v" else (32, 48)
    assert frames.shape == (9, *size, 3) and fps == (24 if family == "ti2v" else 16)
    card = json.loads(card_path(out).read_text())
    assert {"dit", "vae", "model"} <= card["weights"].keys()
    assert ("dit_low" in card["weights"]) == family.endswith("a14b")
    assert main(["replay", str(out), "--out", str(again), "--quiet"]) == 0
    assert out.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("i2v", (), "makes videos of a picture; give the first image"),
        ("flf2v", ("--image", "first.png"), "give the last image too"),
        ("t2v", ("--last-image", "last.png"), "takes no last image"),
        ("i2v", ("--image", "first.png", "--last-image", "last.png"), "takes no last image"),
        ("t2v", ("--strength", "0.5"), "strength is given without a video"),
        ("t2v", ("--video", "video.mp4", "--strength", "1.5"), "strength is 1.5"),
        ("t2v", ("--image", "first.png"), "takes no picture; leave it out"),
        ("t2v", ("--guidance", "1,2,3"), "give a number, or LOW,HIGH"),
        ("t2v", ("--guidance", "high"), "give a number, or LOW,HIGH"),
        ("t2v", ("--method", "error_free"), "condition channels"),
        ("i2v-a14b", ("--image", "first.png", "--method", "error_free"), "two experts"),
    ],
)
def test_what_a_model_cannot_use(models, media, tmp_path, capsys, family, options, says):
    assert command(models, media, family, options, tmp_path / "a.mp4") == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1
    assert not (tmp_path / "a.mp4").exists()


def test_prompts_read_before_need_no_text_encoder(models, media, tmp_path, capsys):
    bundle = lvjax.load(models["t2v"])
    texts = [PROMPT[1], bundle.defaults.negative]
    save_embeddings(tmp_path / "p.safetensors", encode_prompts(bundle, texts), bundle.name)
    assert command(models, media, "t2v", (), tmp_path / "a.mp4") == 0
    without = tmp_path / "without"
    for part in ("transformer", "vae"):
        (without / part).mkdir(parents=True)
        for file in (models["t2v"] / part).iterdir():
            (without / part / file.name).symlink_to(file)
    own = ["generate", "--model", str(without), *PROMPT, *SMALL, "--size", "48x32"]
    assert main([*own, "--out", str(tmp_path / "b.mp4")]) == 2
    assert "has no text encoder and no embedding" in capsys.readouterr().err
    given = ["--embeddings", str(tmp_path / "p.safetensors"), "--out", str(tmp_path / "b.mp4")]
    assert main([*own, *given]) == 0
    a, b = (read_video(tmp_path / f"{n}.mp4")[0] for n in "ab")
    np.testing.assert_array_equal(a, b)


def test_python_takes_the_same(models, media):
    bundle = lvjax.load(models["i2v-a14b"], dtype="float32")
    picture = np.asarray(Image.open(media / "first.png"))
    options = {"num_frames": 5, "height": 32, "width": 48, "num_inference_steps": 3}
    a = lvjax.generate(bundle, PROMPT[1], image=picture, guidance_scale=3.5, **options)
    b = lvjax.generate(bundle, PROMPT[1], image=picture, guidance_scale_2=3.5, **options)
    c = lvjax.generate(bundle, PROMPT[1], image=picture, guidance_scale_2=1.0, **options)
    np.testing.assert_array_equal(a.frames, b.frames)
    assert (a.frames != c.frames).any()
    with pytest.raises(InputError, match="give the first image"):
        lvjax.generate(bundle, PROMPT[1], **options)
