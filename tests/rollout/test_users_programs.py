# SPDX-License-Identifier: Apache-2.0
"""Of the rollout what depends on how users' programs are compiled: bits, and memory."""

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.models.vae import encode
from lvjax.rollout.method import compile_step, rollout
from tests.full import full_compiler  # noqa: F401
from tests.rollout.test_rollout import (
    SIDE,
    SIZE,
    VAE,
    inputs,
    live,
    method,
    same,
    stacked,
    start,
    weights,
)
from tests.tiny import relative


def test_scan_equals_stream_and_a_saved_state_resumes_bit_for_bit():
    """With the real autoencoder; the next clip begins with the last five frames, encoded again."""
    built, clips = method(codec="vae"), inputs()[2]
    streamed, pieces = live(start(built), clips, built)
    state, outs = rollout(built, start(built), stacked(clips))
    same(outs, jax.tree.map(lambda *a: np.stack(a), *pieces))
    same(jax.device_get(state), streamed)
    latents, frames = outs
    assert latents.shape == (3, 2, *SIZE) and frames.shape == (3, 2, 9, SIDE, SIDE, 3)
    assert np.all(np.isfinite(latents)) and np.abs(frames).max() <= 1
    assert relative(latents[1], latents[0]) > 0.05 and frames.std() > 0.05
    np.testing.assert_array_equal(latents[0][:, :1], inputs()[0][:, :1, ..., 4:])  # the given image
    saved, _ = live(start(built), clips[:1], built)
    resumed, rest = live(jax.tree.map(jnp.array, saved), clips[1:], built)
    same(resumed, streamed)
    same(rest, pieces[1:])
    code = jax.jit(lambda w, x: encode(w, x, VAE))
    for (_, video), (after, _) in zip(pieces[:-1], pieces[1:], strict=True):
        assert relative(after[:, :2], code(weights()["vae"], video[:, -5:])) <= 1e-6


def test_the_state_is_donated_whole():
    state, clip = start(), inputs()[2][0]
    held = compile_step(method(), state, clip).memory_analysis()
    size = sum(a.nbytes for a in jax.tree.leaves(state))
    assert 0.99 * size <= held.alias_size_in_bytes <= size + 64 * len(jax.tree.leaves(state))
    used = [weights()["dit"]["blocks"][name] for name in ("self_attn", "ffn")]
    # weights are arguments, not constants of the program
    assert held.argument_size_in_bytes >= size + sum(a.nbytes for a in jax.tree.leaves(used))
