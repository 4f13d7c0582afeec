# SPDX-License-Identifier: Apache-2.0
"""From a prompt, and a photograph, to frames: the public face on a folder of weights against
diffusers' pipelines on the same models, eight steps, the same noise and the same grid, float32.

Tokenizer, text encoder, image encoder, both autoencoders and both experts take part.
"""

from functools import cache

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

import lvjax
from lvjax.cli.main import main
from lvjax.flow.schedule import make_schedule
from lvjax.io.clip_image import clip_pixels
from lvjax.rollout.clipwise import clip_noise
from lvjax.run.presets import PRESETS
from tests.parity.dit_oracle import Sinusoid
from tests.parity.test_wan_pipelines import OfficialGrid, one_thread  # noqa: F401  a fixture
from tests.tiny import relative
from tests.wan_folder import save_modules, wan_modules, wan_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers
PROMPT = "A  red fox runs over the snow &amp;amp; a small dog; the camera pans left."
NEGATIVE = "blurred details, low quality"
NAMES = {
    "t2v": "wan2.1-t2v-1.3b",
    "i2v": "wan2.1-i2v-14b",
    "flf2v": "wan2.1-flf2v-14b",
    "t2v-a14b": "wan2.2-t2v-a14b",
    "i2v-a14b": "wan2.2-i2v-a14b",
    "ti2v": "wan2.2-ti2v-5b",
}
CASES = [("t2v", False), ("t2v-a14b", False), ("ti2v", False)]
CASES += [(family, True) for family in ("i2v", "flf2v", "i2v-a14b", "ti2v")]
STEPS, FRAMES, SEED, TOLERANCE = 8, 9, 3, 1e-5  # measured: 7e-7
ROUNDING = 0.01  # of 255, for frames before they become bytes
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function family -> (models, their folder)."""
    root = tmp_path_factory.mktemp("wan")

    @cache
    def made(family):
        modules = wan_modules(family)
        return modules, save_modules(modules, root / family)

    return made


def session_of(bundle, family, pictured):
    options = {"num_frames": FRAMES, "height": 64, "width": 96, "num_inference_steps": STEPS}
    if pictured:
        options["image"] = PICTURES[0]
    if family == "flf2v":
        options["last_image"] = PICTURES[1]
    return lvjax.prepare(bundle, PROMPT, negative_prompt=NEGATIVE, seed=SEED, **options)


def made_by_lvjax(bundle, family, pictured):
    """Noise, latents and frames as bytes, channels last, by what a user's session runs."""
    session = session_of(bundle, family, pictured)
    state = session.state()
    noise = np.asarray(clip_noise(state.key, state.clip, state.condition[..., 4:].shape))
    (clip,) = session.run(state)
    return noise, np.asarray(clip.latents), clip.frames


def made_by_diffusers(modules, family, pictured, noise):
    """Latents and frames, channels last."""
    from PIL import Image

    preset = PRESETS[NAMES[family]]
    scheduler = OfficialGrid(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.schedule = make_schedule(STEPS, preset.shift)
    low, high = preset.guidance if isinstance(preset.guidance, tuple) else (None, preset.guidance)
    parts = {k: m for k, m in modules.items() if k != "image_encoder"}
    for name in parts.keys() & {"transformer", "transformer_2"}:
        parts[name].condition_embedder.timesteps_proj = Sinusoid(parts[name].config.freq_dim)
    kind = WanImageToVideoPipeline if pictured else WanPipeline
    pipeline = kind(
        **parts,
        tokenizer=wan_tokenizer(),
        scheduler=scheduler,
        boundary_ratio=preset.boundary,
        expand_timesteps=preset.impose,
    )
    given = {"num_frames": FRAMES, "height": 64, "width": 96, "num_inference_steps": STEPS}
    pictures = PICTURES[: 1 + (family == "flf2v")]
    if pictured:
        given["image"] = Image.fromarray(pictures[0])
    if family == "flf2v":
        given["last_image"] = Image.fromarray(pictures[1])
    if "image_encoder" in modules:  # diffusers crops where Wan squeezes the picture
        pixels = np.stack([clip_pixels(np.float32(p / 127.5 - 1)) for p in pictures])
        with torch.no_grad():
            tokens = modules["image_encoder"](
                torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True
            )
        pipeline.encode_image = lambda *_: tokens.hidden_states[-2]
    latents = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=high,
        guidance_scale_2=low,
        latents=torch.from_numpy(noise).permute(0, 4, 1, 2, 3),
        output_type="latent",
        **given,
    ).frames
    vae = modules["vae"]
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        frames = vae.decode(latents * std + mean).sample
    return np.asarray(latents.permute(0, 2, 3, 4, 1)), np.asarray(frames.permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize(("family", "pictured"), CASES)
def test_prompt_to_frames(folder, family, pictured):
    modules, path = folder(family)
    bundle = lvjax.load(path, dtype="float32")
    assert bundle.name == NAMES[family]
    noise, latents, frames = made_by_lvjax(bundle, family, pictured)
    wanted, pictures = made_by_diffusers(modules, family, pictured, noise)
    assert latents.shape == wanted.shape
    assert relative(latents, wanted) <= TOLERANCE
    assert frames.shape == pictures.shape and frames.dtype == np.uint8
    assert np.abs(frames - (pictures.clip(-1, 1) + 1) * 127.5).max() <= 0.5 + ROUNDING


def test_a_converted_folder_gives_the_same(folder, tmp_path):
    _, path = folder("t2v-a14b")
    assert main(["convert", str(path), str(tmp_path / "out"), "--format", "orbax"]) == 0
    ours = [
        made_by_lvjax(lvjax.load(place, dtype="float32"), "t2v-a14b", False)
        for place in (path, tmp_path / "out")
    ]
    for a, b in zip(*ours, strict=True):
        np.testing.assert_array_equal(a, b)
