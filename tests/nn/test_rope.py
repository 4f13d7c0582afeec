# SPDX-License-Identifier: Apache-2.0
"""RoPE phases against NumPy float64 at any frame, the pairing, and one table per head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvjax.nn import rope
from lvjax.nn.rope import TURN, axis_pairs, head_tables, turns

table, rotate = jax.jit(rope.table), jax.jit(rope.rotate)
grid_table = jax.jit(rope.grid_table, static_argnums=(1, 2, 3, 4))


def frequencies(pairs, theta=10000.0):
    return theta ** (-np.arange(pairs, dtype=np.float64) / pairs)


@pytest.mark.parametrize("frame", (0, 1, 1023, 65536, 1_000_000, -5))
def test_phase_against_float64(frame):
    cos, sin = table(jnp.array([frame], jnp.int32), turns(128)[0])
    angle = frame * frequencies(22)
    limit = abs(frame) * np.pi / TURN + 4e-7  # the frequency's rounding, then float32
    np.testing.assert_allclose(cos[0], np.cos(angle), rtol=0, atol=limit)
    np.testing.assert_allclose(sin[0], np.sin(angle), rtol=0, atol=limit)


def test_phase_is_an_exact_product_of_integers():
    frame = np.array([2**31 - 1, -(2**31), 123_456_789], np.int32)
    steps = turns(128)[0]
    cos, _ = table(frame, steps)
    exact = [[int(f) * int(s) % 2**32 for s in steps] for f in frame]
    np.testing.assert_allclose(cos, np.cos(np.array(exact) * 2 * np.pi / TURN), rtol=0, atol=4e-7)


def test_phase_wraps_where_the_angle_does():
    quarter = np.array([2**30], np.uint32)  # a quarter turn per step
    cos, sin = table(jnp.arange(9, dtype=jnp.int32) + 10**9, quarter)
    np.testing.assert_allclose(cos[:, 0], np.tile([1, 0, -1, 0], 3)[:9], atol=1e-6)
    np.testing.assert_allclose(cos[4:], cos[:5], atol=0)
    np.testing.assert_allclose(sin[4:], sin[:5], atol=0)


@pytest.mark.parametrize(
    "head_dim, pairs", ((128, (22, 21, 21)), (16, (4, 2, 2)), (12, (2, 2, 2)), (64, (12, 10, 10)))
)
def test_split_between_axes(head_dim, pairs):
    assert axis_pairs(head_dim) == pairs
    assert tuple(len(t) for t in turns(head_dim)) == pairs


def test_grid_is_frame_major():
    frames, h, w = np.array([7, 3], np.int32), 2, 3
    cos, sin = grid_table(frames, h, w, 128)
    assert cos.shape == sin.shape == (2 * 2 * 3, 1, 64)
    for i, (f, y, x) in enumerate((f, y, x) for f in frames for y in range(h) for x in range(w)):
        angle = np.concatenate([f * frequencies(22), y * frequencies(21), x * frequencies(21)])
        np.testing.assert_allclose(cos[i, 0], np.cos(angle), atol=1e-6)
        np.testing.assert_allclose(sin[i, 0], np.sin(angle), atol=1e-6)


def test_tables_per_head():
    theta = np.array([1e4, 9e3, 11e3])
    cos, sin = jax.jit(head_tables, static_argnums=(1, 2))(
        np.array([5, 900], np.int32), 2, 2, turns(32, theta)
    )
    assert cos.shape == (8, 3, 16)
    for n, base in enumerate(theta):
        one = grid_table(np.array([5, 900], np.int32), 2, 2, 32, float(base))
        np.testing.assert_array_equal(cos[:, n], one[0][:, 0])
        np.testing.assert_array_equal(sin[:, n], one[1][:, 0])


def test_rotation_is_of_adjacent_pairs():
    x = np.random.default_rng(0).normal(size=(2, 6, 3, 16)).astype(np.float32)
    cos, sin = grid_table(np.array([4], np.int32), 2, 3, 16)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * (np.asarray(cos) + 1j * np.asarray(sin))[None]
    wanted = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    np.testing.assert_allclose(rotate(jnp.asarray(x), (cos, sin)), wanted, atol=2e-6)
    assert rotate(jnp.asarray(x, jnp.bfloat16), (cos, sin)).dtype == jnp.bfloat16


def test_only_differences_of_position_matter():
    key = jax.random.key(0)
    q, k = (jax.random.normal(jax.random.fold_in(key, i), (1, 1, 1, 128)) for i in range(2))

    def score(a, b):
        turned = [
            rotate(x, grid_table(np.array([at], np.int32), 1, 1, 128)) for x, at in ((q, a), (k, b))
        ]
        return float((turned[0] * turned[1]).sum())

    assert abs(score(3, 10) - score(1_000_003, 1_000_010)) < 1e-4


def test_rows_with_their_own_frames():
    frames = np.array([[4, 900], [65_536, -1]], np.int32)
    many = grid_table(frames, 2, 3, 24)
    assert many[0].shape == (2, 12, 1, 12)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 3, 24)).astype(np.float32))
    turned, heads = rotate(x, many), head_tables(frames, 2, 3, turns(24, np.array([1e4, 9e3])))
    for row, own in enumerate(frames):
        one = grid_table(own, 2, 3, 24)
        np.testing.assert_array_equal(many[0][row], one[0])
        np.testing.assert_array_equal(turned[row], rotate(x[row : row + 1], one)[0])
        alone = head_tables(own, 2, 3, turns(24, np.array([1e4, 9e3])))
        np.testing.assert_array_equal(heads[1][row], alone[1])
