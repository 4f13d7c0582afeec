# SPDX-License-Identifier: Apache-2.0
"""The method `wan` on tiny random models: its step and the parts of it, guidance by expert, and
what is refused.  That it samples as Wan does is in tests/parity/test_wan_pipelines.py."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.core.params import map_spec
from lvjax.flow.schedule import make_schedule
from lvjax.methods.wan import WanClip, WanSettings, stages, wan, wan_condition
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import dit_spec, embed_context
from lvjax.models.vae import vae_spec
from lvjax.rollout.method import _step, rollout
from tests.full import full_compiler  # noqa: F401
from tests.tiny import relative

DIT = DiTConfig(
    dim=32, num_heads=2, num_layers=2, ffn_dim=48, in_channels=4, out_channels=4, text_dim=8,
    text_len=4, freq_dim=16, dtype="float32",
)  # fmt: skip
IMAGE_DIT = replace(DIT, condition_channels=8)
VAE = VAEConfig(
    base=4, z=4, dim_mult=(1, 1, 2), res_blocks=1, temporal_down=(True, True), mean=(0.0,) * 4,
    std=(1.0,) * 4,
)  # fmt: skip
BATCH, SIZE = 2, (2, 3, 4, 4, 4)
SCHEDULE = make_schedule(6, 5.0)
ONE = WanSettings(SCHEDULE)
TWO = WanSettings(SCHEDULE, guidance=(3.0, 2.0), boundary=0.9)
KEYS = jax.random.split(jax.random.key(3), BATCH)
NOTHING = jnp.zeros((*SIZE[:4], 8))
QUICKLY = {"xla_backend_optimization_level": 0}
quickly = partial(jax.jit, compiler_options=QUICKLY)  # compiled
embed = quickly(partial(embed_context, cfg=DIT))


@cache
def weights():
    draw = np.random.default_rng(0)

    def fill(p):
        return jnp.asarray(draw.standard_normal(p.shape) * 0.2 + (p.init == "ones"), jnp.float32)

    specs = {"dit": dit_spec(DIT), "dit_low": dit_spec(DIT), "vae": vae_spec(VAE)}
    return {name: map_spec(fill, spec) for name, spec in specs.items()}


def weights_of(settings):
    unused = () if settings.boundary else ("dit_low",)
    return {name: tree for name, tree in weights().items() if name not in unused}


def clip_of(settings):
    """Contexts with the negative prompt where there is guidance."""
    text = jnp.asarray(np.random.default_rng(1).standard_normal((2 * BATCH, 4, 8)), jnp.float32)
    rows = [BATCH if scale is None else 2 * BATCH for scale in settings.scales]
    names = ("dit", "dit_low")[: len(rows)]
    return WanClip(
        tuple(embed(weights()[name], text[:n]) for name, n in zip(names, rows, strict=True))
    )


def method(settings):
    return wan(weights_of(settings), DIT, VAE, settings)


def run(settings):
    """Latents of the first clip, the steps alone compiled."""
    parts, state = stages(DIT, VAE, settings), method(settings).init(NOTHING, KEYS)

    @quickly
    def sample(weights, state, contexts):
        carry = parts.begin(state)
        names = ("dit", "dit_low")
        for name, expert, context in zip(names, parts.experts, contexts, strict=False):
            carry = expert(weights[name], carry, state, context)
        return carry.x

    return sample(weights(), state, clip_of(settings).contexts)


def test_a_step_and_the_parts_of_it():
    """One program with both experts, which copies neither the state nor the weights; and a program
    for each part, with the carry on the host between them.  Each clip has noise of its own."""
    built, clip = method(TWO), clip_of(TWO)
    state = built.init(NOTHING, KEYS)
    program = _step.lower(built.step, state, clip).compile(QUICKLY)
    held, size = program.memory_analysis(), sum(a.nbytes for a in jax.tree.leaves(state))
    assert 0.99 * size <= held.alias_size_in_bytes <= size + 64 * 3
    used = [weights()[name]["blocks"]["ffn"] for name in ("dit", "dit_low")]
    assert held.argument_size_in_bytes >= size + sum(a.nbytes for a in jax.tree.leaves(used))
    outs = []
    for _ in range(2):
        state, out = program(built.step, state, clip)
        outs.append(jax.device_get(out))
    parts, state = stages(DIT, VAE, TWO), built.init(NOTHING, KEYS)
    assert [last - first for first, last in TWO.spans] == [3, 3]
    carry = parts.begin(state)
    names = ("dit", "dit_low")
    for name, expert, context in zip(names, parts.experts, clip.contexts, strict=True):
        carry = jax.device_get(quickly(expert)(weights()[name], carry, state, context))
    after, (latents, frames) = quickly(parts.finish)(weights()["vae"], carry, state)
    assert relative(latents, outs[0][0]) <= 1e-5 and relative(frames, outs[0][1]) <= 1e-5
    assert latents.shape == SIZE and frames.shape == (BATCH, 9, 16, 16, 3)
    assert after.clip == 1 and relative(outs[1][0], outs[0][0]) > 0.5
    np.testing.assert_array_equal(after.key, state.key)
    np.testing.assert_array_equal(after.condition, state.condition)


def test_rows_do_not_depend_on_the_batch():
    whole = run(ONE)
    one = jax.tree.map(lambda a: a[:, 1::2], clip_of(ONE))
    parts = stages(DIT, VAE, ONE)
    state = method(ONE).init(NOTHING[1:], KEYS[1:])
    alone = quickly(parts.experts[0])(weights()["dit"], parts.begin(state), state, one.contexts[0])
    assert relative(alone.x, whole[1:]) <= 1e-5


def test_guidance_by_expert():
    """(low noise, high noise); 1 and None are single passes, and the number 1 says the same."""
    assert TWO.scales == (2.0, 3.0) and replace(TWO, guidance=2.5).scales == (2.5, 2.5)
    assert replace(TWO, guidance=(1, 4.0)).scales == (4.0, None)
    assert replace(ONE, guidance=1).scales == replace(ONE, guidance=None).scales == (None,)
    single = run(replace(TWO, guidance=None))
    assert relative(run(replace(TWO, guidance=(1.0, 1.0 + 1e-7))), single) <= 1e-5
    assert relative(run(replace(TWO, guidance=(1.0, 2.0))), single) > 1e-3


def test_an_expert_without_steps_is_not_run():
    """A start below the boundary leaves the low-noise expert alone."""
    low = replace(TWO, guidance=3.0, strength=0.5)
    assert low.spans == ((0, 0), (0, 3))
    alone = replace(ONE, guidance=3.0, strength=0.5)
    parts = stages(DIT, VAE, alone)
    state = method(alone).init(NOTHING, KEYS)
    context = clip_of(TWO).contexts[1]
    want = quickly(parts.experts[0])(weights()["dit_low"], parts.begin(state), state, context)
    assert relative(run(low), want.x) <= 1e-6


@pytest.mark.parametrize(
    "dit, vae, settings, words",
    [
        (replace(DIT, in_channels=5), VAE, ONE, r"takes 5 \+ 0 channels, the autoencoder makes 4"),
        (replace(DIT, condition_channels=4), VAE, ONE, "takes 4 \\+ 4 channels"),
        (DIT, replace(VAE, temporal_down=(False, True)), ONE, "makes 2 frames per latent frame"),
        (DIT, VAE, replace(ONE, guidance=(3.0, 4.0)), "for two experts"),
        (DIT, VAE, replace(TWO, boundary=900), "boundary=900"),
        (DIT, VAE, replace(ONE, strength=1.5), "strength=1.5"),
        (DIT, VAE, replace(ONE, strength=0.1), "1/6 or more"),
        (DIT, VAE, replace(ONE, solver="heun"), "solver='heun'"),
        (IMAGE_DIT, VAE, replace(ONE, impose=True), "impose=True"),
        (replace(DIT, patch=(2, 2, 2)), VAE, replace(ONE, impose=True), "impose=True"),
        (IMAGE_DIT, VAE, replace(ONE, strength=0.5), "video to video"),
        (DIT, VAE, TWO, "weights are .* boundary=0.9 needs"),
    ],
)
def test_what_does_not_fit_together_is_refused(dit, vae, settings, words):
    with pytest.raises(InputError, match=words):
        wan(weights_of(ONE), dit, vae, settings)


def test_two_experts_need_a_boundary():
    with pytest.raises(InputError, match="boundary=None needs"):
        wan(weights(), DIT, VAE, ONE)


def test_contexts_that_do_not_fit_are_refused():
    built = method(TWO)
    state = built.init(NOTHING, KEYS)
    with pytest.raises(InputError, match="1 contexts are given for 2 experts"):
        rollout(built, state, WanClip(clip_of(TWO).contexts[:1]))
    short = jax.tree.map(lambda a: a[None, :, :BATCH], clip_of(TWO))
    with pytest.raises(InputError, match="'dit' has batch 2; guidance 2.0 of 2 rows needs 4"):
        rollout(built, state, short)
    with pytest.raises(InputError, match="one key per row"):
        built.init(NOTHING, KEYS[:1])


def code(frames):
    return jnp.ones((BATCH, 1 + frames.shape[1] // 4, 4, 4, 4))


IMAGE, VIDEO = jnp.zeros((BATCH, 16, 16, 3)), jnp.zeros((BATCH, 9, 16, 16, 3))


def given(dit, settings, **pictures):
    return wan_condition(code, SIZE, dit, settings, **pictures)


def test_conditions_by_model():
    """Sums of the mask and of the latents, by latent frame of a cell."""

    def sums(a):
        return a[0, :, 0, 0, :4].sum(1).tolist(), a[0, :, 0, 0, 4:].sum(1).tolist()

    imposed, v2v = replace(ONE, impose=True), replace(ONE, strength=0.5)
    assert sums(given(DIT, ONE)) == ([0, 0, 0], [0, 0, 0])
    assert sums(given(IMAGE_DIT, ONE, first=IMAGE)) == ([4, 0, 0], [4, 4, 4])
    assert sums(given(IMAGE_DIT, ONE, first=IMAGE, last=IMAGE)) == ([4, 0, 1], [4, 4, 4])
    assert sums(given(DIT, imposed)) == ([0, 0, 0], [0, 0, 0])
    assert sums(given(DIT, imposed, first=IMAGE)) == ([4, 0, 0], [4, 0, 0])
    assert sums(given(DIT, v2v, video=VIDEO)) == ([0, 0, 0], [4, 4, 4])


@pytest.mark.parametrize(
    "dit, settings, pictures, words",
    [
        (DIT, ONE, {"first": IMAGE}, "leave the first frame out"),
        (IMAGE_DIT, ONE, {}, "give the first frame"),
        (DIT, replace(ONE, impose=True), {"first": IMAGE, "last": IMAGE}, "takes no last frame"),
        (DIT, ONE, {"last": IMAGE}, "takes no last frame"),
        (DIT, ONE, {"video": VIDEO}, "belong together"),
        (DIT, replace(ONE, strength=0.5), {}, "belong together"),
        (DIT, replace(ONE, strength=0.5), {"first": IMAGE, "video": VIDEO}, "leave the first"),
    ],
)
def test_pictures_that_a_model_cannot_use_are_refused(dit, settings, pictures, words):
    with pytest.raises(InputError, match=words):
        given(dit, settings, **pictures)
