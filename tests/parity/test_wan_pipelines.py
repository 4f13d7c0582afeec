# SPDX-License-Identifier: Apache-2.0
"""Wan's samplers against diffusers' pipelines: tiny models, every parameter drawn anew, float32,
eight steps of UniPC on the official grid, the same noise.

Embeddings of text and CLIP are given; pictures go through the autoencoders.  Each mutant is a
mistake that is easily made; the same comparison must notice it.
"""

import importlib
import sys
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.pipelines.wan import pipeline_wan_video2video

from checkpoints_convert.keys_dit import dit_rules
from lvjax.flow.sampling import advance, prepare, shortened, switch_step
from lvjax.flow.schedule import Schedule, make_schedule
from lvjax.methods.wan import EXPERTS, WanSettings, stages, wan, wan_condition
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import dit_spec, embed_context
from lvjax.models.vae import encode
from lvjax.rollout import condition as condition_module
from lvjax.rollout.clipwise import clip_noise
from lvjax.rollout.condition import condition, frame_mask, pin
from tests.checkpoints_convert.in_memory import convert
from tests.parity import dit_oracle
from tests.parity.vae_oracle import channels_last, parameters, reference
from tests.redrawn import arrays
from tests.tiny import relative

wan_module = importlib.import_module("lvjax.methods.wan")  # in the package it is the function
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers

TOLERANCE = 1e-5
NOTICED = 1e-3
BATCH, FRAMES, CELLS = 2, 3, 4  # latent frames, and cells of a side
PIXEL_FRAMES = 1 + 4 * (FRAMES - 1)
BASE = dict(dim=64, num_heads=2, num_layers=2, ffn_dim=96, text_dim=16, dtype="float32")
T2V = DiTConfig(**BASE)
I2V = DiTConfig(**BASE, condition_channels=20, image_dim=24)
FLF2V = DiTConfig(**BASE, condition_channels=20, image_dim=24, image_pos_len=10)
I2V_2_2 = DiTConfig(**BASE, condition_channels=20)
TI2V = DiTConfig(**BASE, in_channels=48, out_channels=48)
VAE_2_1 = VAEConfig(base=8, dim_mult=(1, 2, 2, 2), res_blocks=1)
VAE_2_2 = replace(
    VAE_2_1, z=48, patch=2, mean=(0.1, -0.2, 0.3) * 16, std=(0.5, 1.0, 1.5) * 16, residual=True
)
KEYS = jax.random.split(jax.random.key(5), BATCH)
quickly = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiled


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More threads of torch are no faster on models of this size, and wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A model, how it samples, and which pictures it is given."""

    dit: DiTConfig
    settings: WanSettings
    given: tuple[str, ...] = ()

    @property
    def vae(self):
        return VAE_2_1 if self.dit.in_channels == VAE_2_1.z else VAE_2_2

    @property
    def size(self):
        return BATCH, FRAMES, CELLS, CELLS, self.vae.z


def settings(shift=5.0, **change):
    return WanSettings(make_schedule(8, shift), **change)


CASES = {
    "t2v": Case(T2V, settings()),
    "t2v_a14b": Case(T2V, settings(12.0, guidance=(3.0, 4.0), boundary=0.875)),
    "i2v": Case(I2V, settings(3.0), ("first",)),
    "flf2v": Case(FLF2V, settings(16.0, guidance=5.5), ("first", "last")),
    "i2v_a14b": Case(I2V_2_2, settings(guidance=(3.5, 2.5), boundary=0.9), ("first",)),
    "v2v": Case(T2V, settings(strength=0.7), ("video",)),
    "ti2v_text": Case(TI2V, settings(impose=True)),
    "ti2v_image": Case(TI2V, settings(impose=True), ("first",)),
}


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@cache
def inputs(name):
    """Pictures in 0..1, channels last; embeddings of prompts, of no prompts and of pictures."""
    cfg, side = CASES[name].dit, CELLS * CASES[name].vae.spatial_stride
    video = np.random.default_rng(1).uniform(size=(BATCH, PIXEL_FRAMES, side, side, 3))
    video = video.astype(np.float32)
    return {
        "first": video[:1, 0],
        "last": video[:1, -1],
        "video": video,
        "prompts": draw(BATCH, 7, cfg.text_dim, seed=2),
        "negatives": draw(BATCH, 5, cfg.text_dim, seed=3),
        "clip": draw(2 if cfg.image_pos_len else 1, 5, cfg.image_dim or 0, seed=4),
    }


@cache
def transformer(cfg, seed):
    """diffusers' model, and its parameters as ours."""
    model = dit_oracle.transformer(cfg, seed)
    return model, convert(arrays(model), dit_rules(cfg, "diffusers"), dit_spec(cfg))


def experts(name):
    """Seeds of the transformers, high noise first."""
    return (0,) if CASES[name].settings.boundary is None else (0, 1)


class OfficialGrid(UniPCMultistepScheduler):
    """UniPC on the grid of a `Schedule`; diffusers' own lies 0.001 higher."""

    schedule = None

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.sigmas = torch.from_numpy(self.schedule.sigmas)
        self.timesteps = torch.from_numpy(self.schedule.timesteps).long()


def pipeline(case, models):
    chosen = case.settings
    scheduler = OfficialGrid(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.schedule = chosen.schedule
    parts = dict(tokenizer=None, text_encoder=None, vae=reference(case.vae), scheduler=scheduler)
    parts["transformer"] = models[0]
    if "video" in case.given:
        return WanVideoToVideoPipeline(**parts)
    if len(models) > 1:
        parts["transformer_2"] = models[1]
    kind = WanImageToVideoPipeline if case.given else WanPipeline
    return kind(**parts, boundary_ratio=chosen.boundary, expand_timesteps=chosen.impose)


def channels_first(a):
    return torch.from_numpy(np.array(a)).movedim(-1, 1)


def padded(text):
    return torch.from_numpy(np.pad(text, ((0, 0), (0, 512 - text.shape[1]), (0, 0))))


def arguments(name):
    """Of a pipeline's call, the pictures and the noise left out."""
    chosen, given = CASES[name].settings, inputs(name)
    found = dict(
        prompt_embeds=padded(given["prompts"]),
        negative_prompt_embeds=padded(given["negatives"]),
        height=given["first"].shape[1],
        width=given["first"].shape[2],
        num_inference_steps=chosen.schedule.steps,
        guidance_scale=chosen.scales[0],
        output_type="latent",
    )
    return found | ({} if chosen.boundary is None else dict(guidance_scale_2=chosen.scales[1]))


@cache
def wanted(name):
    """Latents of diffusers, and frames in 0..1, channels last."""
    case, given = CASES[name], inputs(name)
    pipe = pipeline(case, [transformer(case.dit, seed)[0] for seed in experts(name)])
    pipe.set_progress_bar_config(disable=True)
    noise = channels_first(clip_noise(jax.random.key_data(KEYS), jnp.int32(0), case.size))
    found = arguments(name)
    for key, word in (("first", "image"), ("last", "last_image")):
        if key in case.given:
            found[word] = channels_first(given[key])
    if case.dit.image_dim is not None:
        pipe.encode_image = lambda image, device: torch.from_numpy(given["clip"])
    with pytest.MonkeyPatch.context() as patch:
        if "video" in case.given:
            found |= dict(video=given["video"], strength=case.settings.strength)
            patch.setattr(pipeline_wan_video2video, "randn_tensor", lambda *a, **k: noise)
        else:
            found |= dict(latents=noise, num_frames=PIXEL_FRAMES)
        latents = pipe(**found).frames
    mean, std = (torch.tensor(a).reshape(1, -1, 1, 1, 1) for a in (case.vae.mean, case.vae.std))
    with torch.no_grad():
        video = reference(case.vae).decode(latents * std + mean, return_dict=False)[0]
    frames = pipe.video_processor.postprocess_video(video, output_type="np")
    return channels_last(latents), frames


@cache
def encoder(cfg):
    program = quickly(partial(encode, cfg=cfg))
    return lambda frames: program(parameters(cfg), frames)


def given_condition(name):
    case = CASES[name]
    pictures = {key: jnp.asarray(2 * inputs(name)[key] - 1) for key in case.given}
    rows = {key: a.repeat(BATCH // len(a), 0) for key, a in pictures.items()}
    return wan_condition(encoder(case.vae), case.size, case.dit, case.settings, **rows)


@cache
def embedder(cfg):
    return quickly(partial(embed_context, cfg=cfg))


def contexts(name):
    cfg, given = CASES[name].dit, inputs(name)
    rest = given["prompts"].shape[1] - given["negatives"].shape[1]
    negatives = np.pad(given["negatives"], ((0, 0), (0, rest), (0, 0)))
    text, image = np.concatenate([given["prompts"], negatives]), None
    if cfg.image_dim is not None:
        image = given["clip"].reshape(1, -1, cfg.image_dim).repeat(2 * BATCH, 0)
    return [embedder(cfg)(transformer(cfg, seed)[1], text, image=image) for seed in experts(name)]


def sampler(dit, vae, settings):
    """The steps of all experts as one program, traced anew."""
    parts = stages(dit, vae, settings)

    @quickly
    def run(weights, state, contexts):
        carry = parts.begin(state)
        for params, expert, context in zip(weights, parts.experts, contexts, strict=True):
            carry = expert(params, carry, state, context)
        return carry

    return run


def finisher(vae, impose):
    """The end of the method as a program, traced anew; what a case samples does not matter."""
    finish = stages(T2V, vae, WanSettings(impose=impose)).finish
    return quickly(lambda *inputs: finish(*inputs)[1])


kept_sampler, kept_finisher = cache(sampler), cache(finisher)


def ours(name, sampler=kept_sampler, finisher=kept_finisher):
    """(latents, frames in -1..1) of the method."""
    case = CASES[name]
    trees = [transformer(case.dit, seed)[1] for seed in experts(name)]
    weights = dict(zip(EXPERTS, trees, strict=False)) | {"vae": parameters(case.vae)}
    state = wan(weights, case.dit, case.vae, case.settings).init(given_condition(name), KEYS)
    carry = sampler(case.dit, case.vae, case.settings)(trees, state, contexts(name))
    return finisher(case.vae, case.settings.impose)(weights["vae"], carry, state)


@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name):
    latents, frames = ours(name)
    want, pictures = wanted(name)
    assert frames.shape == (BATCH, PIXEL_FRAMES, *pictures.shape[2:])
    assert relative(latents, want) <= TOLERANCE
    assert relative(frames / 2 + 0.5, pictures) <= TOLERANCE


def test_both_experts_have_steps():
    assert CASES["t2v_a14b"].settings.spans == ((0, 6), (6, 8))
    assert CASES["i2v_a14b"].settings.spans == ((0, 3), (3, 8))


# --- mistakes of the sampler: traced anew ---------------------------------------------------------


def forgotten_history(patch):
    """The low-noise expert begins as a run of its own."""
    whole = CASES["t2v_a14b"].settings.schedule

    def anew(sampler, velocity, carry, first, last):
        rest = prepare(Schedule(whole.sigmas[first:], whole.timesteps[first:]), sampler.solver)
        carry = carry._replace(history=sampler.solver.init(carry.x))
        return advance(rest, velocity, carry, 0, last - first)

    patch.setattr(wan_module, "advance", anew)


def guidance_of_the_other_expert(patch):
    patch.setattr(WanSettings, "scales", property(lambda settings: settings.guidance))


def switched_late(patch):
    patch.setattr(wan_module, "switch_step", lambda *a: switch_step(*a) + 1)


def image_put_back_only_at_the_end(patch):
    alone = lambda x, given: x if len(x) > BATCH else pin(x, given)  # noqa: E731
    patch.setattr(wan_module, "pin", alone)


def image_not_put_back_at_the_end(patch):
    calls = lambda x, given: pin(x, given) if len(x) > BATCH else x  # noqa: E731
    patch.setattr(wan_module, "pin", calls)


def image_with_the_timestep_of_noise(patch):
    rows = (2 * BATCH, FRAMES)
    patch.setattr(wan_module, "frame_timesteps", lambda t, given: jnp.broadcast_to(t, rows))


def one_step_more(patch):
    patch.setattr(wan_module, "shortened", lambda s, strength: shortened(s, strength + 1 / 8))


def video_not_scaled(patch):
    add = lambda x, noise, s: x + jnp.float32(s.sigmas[0]) * noise  # noqa: E731
    patch.setattr(wan_module, "noised", add)


SAMPLING = (
    ("t2v_a14b", forgotten_history),
    ("t2v_a14b", guidance_of_the_other_expert),
    ("t2v_a14b", switched_late),
    ("ti2v_image", image_put_back_only_at_the_end),
    ("ti2v_image", image_not_put_back_at_the_end),
    ("ti2v_image", image_with_the_timestep_of_noise),
    ("v2v", one_step_more),
    ("v2v", video_not_scaled),
)


@pytest.mark.parametrize("name, mutate", SAMPLING, ids=lambda a: getattr(a, "__name__", a))
def test_mistakes_of_the_sampler_are_noticed(name, mutate, monkeypatch):
    right = wanted(name)[0]
    mutate(monkeypatch)
    monkeypatch.setattr(wan_module, "decode", lambda params, latents, cfg: latents)
    latents, _ = ours(name, sampler, finisher)
    assert relative(latents, right) > NOTICED


# --- mistakes of the inputs: the same programs ----------------------------------------------------


def swapped_experts(patch):
    patch.setattr(sys.modules[__name__], "experts", lambda name: (1, 0))


def transposed_mask(patch):
    """Channels by quarter of the clip instead of by pixel frame."""

    def wrong(t, *given):
        return frame_mask(t, *given).reshape(4, t).T

    patch.setattr(condition_module, "frame_mask", wrong)


def last_frame_on_channel_0(patch):
    def wrong(*given):
        mask = frame_mask(*given)
        return np.concatenate([mask[:-1], mask[-1:, ::-1]])

    patch.setattr(condition_module, "frame_mask", wrong)


def black_instead_of_grey(patch):
    right = condition_module._among_grey

    def wrong(frames, last, total):
        return right(frames + 1, None if last is None else last + 1, total) - 1

    patch.setattr(condition_module, "_among_grey", wrong)


def image_encoded_alone(patch):
    """Zeros as latents of what is not given, instead of grey frames encoded with the image."""
    alone = lambda encode, frames, size, *rest: condition(encode, frames, size)  # noqa: E731
    patch.setattr(wan_module, "condition", alone)


def latents_before_mask(patch):
    right = condition_module.with_mask
    wrong = lambda mask, latents: jnp.roll(right(mask, latents), -4, -1)  # noqa: E731
    patch.setattr(condition_module, "with_mask", wrong)


INPUTS = (
    ("t2v_a14b", swapped_experts),
    ("i2v", transposed_mask),
    ("flf2v", last_frame_on_channel_0),
    ("i2v", black_instead_of_grey),
    ("i2v_a14b", image_encoded_alone),
    ("i2v_a14b", latents_before_mask),
)


@pytest.mark.parametrize("name, mutate", INPUTS, ids=lambda a: getattr(a, "__name__", a))
def test_mistakes_of_the_inputs_are_noticed(name, mutate, monkeypatch):
    right = wanted(name)[0]
    mutate(monkeypatch)
    assert relative(ours(name)[0], right) > NOTICED
