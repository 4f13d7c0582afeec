# SPDX-License-Identifier: Apache-2.0
"""A clip against its cached past equals one pass over all clips with a mask, and the cache is
updated in place.
"""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lvjax.core.errors import InputError
from lvjax.core.mesh import make_mesh
from lvjax.core.params import init
from lvjax.memory.cache import Past, commit, init_cache, open_past
from lvjax.models.dit import dit, dit_spec, embed_context
from lvjax.nn.rope import axis_pairs, grid_table, rotate
from tests.tiny import SMALL_DIT

CFG = replace(SMALL_DIT, dim=24, num_layers=4, condition_channels=0, text_len=4)
GRID, CLIP, MEMORY = (2, 3), 2, (2, 4)  # tokens per frame, frames per clip, layers with memory
TOKENS = CLIP * GRID[0] * GRID[1]
TIMES = (0.0, 130.5, 700.0)


def random_params(cfg=CFG):
    leaves, tree = jax.tree.flatten(jax.jit(lambda k: init(dit_spec(cfg), k))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [np.asarray(a + 0.2 * rng.normal(size=a.shape), np.float32) for a in leaves]
    )


# ---- The whole model over several clips at once, NumPy float64, nothing shared with the library
# -----------------


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def rms(weight, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def turn(x, angle):
    """x [L, N, D], angle [L, D/2]."""
    z = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def heads(x):
    return x.reshape(len(x), CFG.num_heads, CFG.head_dim)


def attention(q, k, v, mask):
    scores = np.einsum("lnd,snd->nls", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(mask[None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nls,snd->lnd", weights / weights.sum(-1, keepdims=True), v)


def angles(frames):
    h, w = GRID
    place = [(f, y, x) for f in frames for y in range(h) for x in range(w)]
    axes = [10000.0 ** (-np.arange(n) / n) for n in axis_pairs(CFG.head_dim)]
    return np.array(
        [np.concatenate([p * a for p, a in zip(at, axes, strict=True)]) for at in place]
    )


def full_pass(params, video, times, text, sees):
    """video [F, H, W, C] of all clips, times per frame, sees [clips, clips] bool -> velocity [F, H,
    W, C].

    Clip i attends to clip j where sees[i, j] in the layers with memory, and to itself elsewhere.
    """
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    frames, (h, w), tokens = len(video), GRID, GRID[0] * GRID[1]
    cells = video.reshape(frames, h, 2, w, 2, -1).transpose(0, 1, 3, 5, 2, 4)
    x = dense(params["patch_embedding"], cells.reshape(frames * tokens, -1))
    half = CFG.freq_dim // 2
    phase = np.repeat(times, tokens)[:, None] * 10000.0 ** (-np.arange(half) / half)
    time = params["time_embedding"]
    e = dense(
        time["fc2"], silu(dense(time["fc1"], np.concatenate([np.cos(phase), np.sin(phase)], -1)))
    )
    e0 = dense(params["time_projection"], silu(e)).reshape(len(x), 6, -1)
    text = np.concatenate([text, np.zeros((CFG.text_len - len(text), CFG.text_dim))])
    text = dense(
        params["text_embedding"]["fc2"], gelu(dense(params["text_embedding"]["fc1"], text))
    )
    clip = np.arange(frames * tokens) // TOKENS
    own, remembered = clip[:, None] == clip[None], sees[clip][:, clip]
    angle = angles(range(frames))
    for i in range(CFG.num_layers):
        p = jax.tree.map(lambda a, i=i: a[i], params["blocks"])
        m = (p["modulation"][None] + e0).transpose(1, 0, 2)
        s, c = p["self_attn"], p["cross_attn"]
        y = layer_norm(x) * (1 + m[1]) + m[0]
        q, k = (turn(heads(rms(s["norm_" + n], dense(s[n], y))), angle) for n in "qk")
        mask = remembered if MEMORY[0] <= i < MEMORY[1] else own
        y = attention(q, k, heads(dense(s["v"], y)), mask)
        x = x + m[2] * dense(s["o"], y.reshape(len(x), -1))
        y = layer_norm(x) * p["norm3"]["scale"] + p["norm3"]["bias"]
        q, k = (
            heads(rms(c["norm_q"], dense(c["q"], y))),
            heads(rms(c["norm_k"], dense(c["k"], text))),
        )
        y = attention(q, k, heads(dense(c["v"], text)), np.ones((len(x), len(text)), bool))
        x = x + dense(c["o"], y.reshape(len(x), -1))
        y = layer_norm(x) * (1 + m[4]) + m[3]
        x = x + m[5] * dense(p["ffn"]["fc2"], gelu(dense(p["ffn"]["fc1"], y)))
    shift, scale = (params["head"]["modulation"][j] + e for j in range(2))
    y = dense(params["head"]["linear"], layer_norm(x) * (1 + scale) + shift)
    return y.reshape(frames, h, w, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(video.shape)


# ---- Tests ---------------------------------------------------------------------------------------
# ------------


def rotation(frames):
    return grid_table(frames, *GRID, CFG.head_dim, CFG.theta)


@jax.jit
def one_clip(params, cache, latents, timestep, context, slot, frames, visible):
    """Two passes over a clip, of which the second is kept."""
    past = open_past(cache, rotation, slot, visible)
    run = partial(dit, params, context=context, cfg=CFG, rotation=rotation(frames))
    _, past, _ = run(latents - 1.0, timestep + 100.0, past=past)
    velocity, past, keys = run(latents, timestep, past=past)
    return velocity, commit(cache, past, keys, slot, frames)


# Frame slots of the clips in a cache of 6 slots, what each clip sees, and the frames held at last.
# The rows of one batch: the ring overwrites clip 0.
CASES = {
    "all": ((0, 2, 4), [[1, 0, 0], [1, 1, 0], [1, 1, 1]], [0, 1, 2, 3, 4, 5]),
    "selected": ((4, 0, 2), [[1, 0, 0], [0, 1, 0], [1, 0, 1]], [2, 3, 4, 5, 0, 1]),
    "ring": ((0, 2, 0), [[1, 0, 0], [1, 1, 0], [0, 1, 1]], [4, 5, 2, 3, -1, -1]),
}


def test_cached_clips_equal_one_masked_pass():
    starts, sees, last = (np.array(column) for column in zip(*CASES.values(), strict=True))
    params, rng, rows = random_params(), np.random.default_rng(1), len(CASES)
    video = rng.normal(size=(rows, 3 * CLIP, 4, 6, 4)).astype(np.float32)
    text = rng.normal(size=(rows, 3, 8)).astype(np.float32)
    wanted = [
        full_pass(params, v.astype(np.float64), np.repeat(TIMES, CLIP), t, s.astype(bool))
        for v, t, s in zip(video, text, sees, strict=True)
    ]
    context = jax.jit(lambda p, t: embed_context(p, t, CFG))(params, text)
    cache = init_cache(CFG, rows, 6, GRID, MEMORY)
    held = np.full((rows, 6), -1)  # the clip in each frame slot
    for i, start in enumerate(starts.T.astype(np.int32)):
        held[np.arange(rows)[:, None], start[:, None] + np.arange(CLIP)] = i
        seen = np.take_along_axis(sees[:, i], held, axis=1)
        frames = np.arange(i * CLIP, (i + 1) * CLIP, dtype=np.int32)
        time = np.full(rows, TIMES[i], np.float32)
        visible = (held >= 0) & (seen == 1)
        got, cache = one_clip(
            params, cache, video[:, frames], time, context, start, frames, visible
        )
        for name, row, want in zip(CASES, got, wanted, strict=True):
            error = np.linalg.norm(row - want[frames]) / np.linalg.norm(want[frames])
            assert error < 1e-5, (name, i, error)
    assert int(cache.next_frame) == 3 * CLIP
    np.testing.assert_array_equal(cache.frame, last)


def test_commit_then_open_gives_back_the_same_memory():
    cache = init_cache(CFG, 2, 4, GRID, MEMORY)
    assert cache.frame.tolist() == [[-1] * 4] * 2 and cache.k.shape == (2, 2, 24, 2, 12)
    rng = np.random.default_rng(0)
    keys, values = (
        jnp.asarray(rng.normal(size=(2, 2, TOKENS, 2, 12)).astype(np.float32)) for _ in range(2)
    )
    frames, slot = np.array([70_000, 70_001], np.int32), jnp.array([2, 0], jnp.int32)
    seen = jnp.array([[False, False, True, True], [True, True, False, False]])

    @jax.jit
    def cycle(cache):
        past = open_past(cache, rotation, slot)
        past = past.extend(0, keys[0], values[0])[0].extend(1, keys[1], values[1])[0]
        cache = commit(cache, past, keys, slot, frames)
        return cache, open_past(cache, rotation, 0, seen)

    cache, past = cycle(cache)
    own, other = (slice(TOKENS, None), slice(TOKENS)), (slice(TOKENS), slice(TOKENS, None))
    wanted = jax.jit(lambda k: rotate(k, rotation(frames)))(keys[1])
    for row in range(2):
        np.testing.assert_array_equal(cache.k[:, row, own[row]], keys[:, row])
        np.testing.assert_array_equal(cache.v[:, row, own[row]], values[:, row])
        assert not np.asarray(cache.k[:, row, other[row]]).any()
        np.testing.assert_allclose(past.k[1, row, own[row]], wanted[row], atol=1e-6)
        assert past.visible[row, own[row]].all() and not past.visible[row, other[row]].any()
    assert cache.frame.tolist() == [[-1, -1, 70_000, 70_001], [70_000, 70_001, -1, -1]]
    assert int(cache.next_frame) == 70_002
    assert past.start.tolist() == [0, 0] and past.layers == MEMORY


@pytest.mark.parametrize("layers", ((0, 8), (4, 8)), ids=("all_layers", "latter_half"))
def test_a_pass_updates_the_donated_memory_in_place(layers):
    cfg = replace(CFG, num_layers=8)
    size, rows, slots = layers[1] - layers[0], 2, 256 * 6
    params = jax.eval_shape(lambda k: init(dit_spec(cfg), k), jax.random.key(0))
    array = jax.ShapeDtypeStruct
    memory = array((size, rows, slots, cfg.num_heads, cfg.head_dim), jnp.float32)
    place = array((rows,), jnp.int32), array((rows, slots), jnp.bool_)
    past = Past(memory, memory, *place, layers)
    text = array((8, rows, 4, cfg.num_heads, cfg.head_dim), jnp.float32)
    context = jax.eval_shape(
        lambda p, t: embed_context(p, t, cfg), params, array((rows, 4, 8), jnp.float32)
    )
    assert context.k.shape == text.shape

    def run(past, params, latents, timestep, context):
        velocity, past, _ = dit(params, latents, timestep, context, cfg, past=past)
        return velocity, past

    latents, timestep = array((rows, CLIP, 4, 6, 4), jnp.float32), array((rows,), jnp.float32)
    lowered = jax.jit(run, donate_argnums=0).lower(past, params, latents, timestep, context)
    compiled = lowered.compile()
    used = compiled.memory_analysis()
    whole = ",".join(str(n) for n in memory.shape)
    assert f"f32[{whole}]" in compiled.as_text()
    assert not re.search(rf"f32\[{whole}\]\S* (copy|transpose)\(", compiled.as_text())
    memory_bytes = 2 * memory.size * 4
    assert used.alias_size_in_bytes >= 0.99 * memory_bytes
    # One layer is read at a time (keys and values, once more transposed for the products): no copy
    # of the whole.
    assert used.temp_size_in_bytes <= 4.5 * memory_bytes / size + 200_000


def test_donated_buffers_are_reused():
    cache = init_cache(CFG, 1, 4, GRID, MEMORY)
    keys = jnp.ones((2, 1, TOKENS, 2, 12))

    @partial(jax.jit, donate_argnums=0)
    def cycle(cache):
        past = open_past(cache, rotation, 0).extend(0, keys[0], keys[0])[0]
        return commit(cache, past, keys, 0, np.arange(2))

    before = cache.k.unsafe_buffer_pointer(), cache.v.unsafe_buffer_pointer()
    after = cycle(cache)
    assert (after.k.unsafe_buffer_pointer(), after.v.unsafe_buffer_pointer()) == before


def test_rows_on_different_devices_exchange_nothing():
    mesh = make_mesh(data=8)
    rows, deep = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), (None, "data")))
    cache = init_cache(CFG, 8, 4, GRID, MEMORY)
    everywhere = jax.device_put(cache.next_frame, NamedSharding(mesh, PartitionSpec()))
    k, v = jax.device_put((cache.k, cache.v), deep)
    cache = cache.replace(k=k, v=v, frame=jax.device_put(cache.frame, rows), next_frame=everywhere)
    place = jnp.arange(8, dtype=jnp.int32) % 3, jnp.ones((8, 4), bool)

    def cycle(cache, slot, visible, keys):
        past, *seen = open_past(cache, rotation, slot, visible).extend(0, keys[0], keys[0])
        return commit(cache, past, keys, slot, np.arange(2)), seen

    given = *jax.device_put(place, rows), jax.device_put(jnp.ones((2, 8, TOKENS, 2, 12)), deep)
    text = jax.jit(cycle, donate_argnums=0).lower(cache, *given).compile().as_text()
    assert "scatter" in text
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)


def test_wrong_sizes_are_refused():
    with pytest.raises(InputError, match="inside 0..4"):
        init_cache(CFG, 1, 4, GRID, (2, 5))
    cache = init_cache(CFG, 1, 4, GRID, MEMORY)
    with pytest.raises(InputError, match="axis F must be 4"):
        open_past(cache, rotation, 0, jnp.ones((1, 24), bool))
    with pytest.raises(InputError, match="axis B must be 1"):
        open_past(cache, rotation, 0, jnp.ones((2, 4), bool))
    with pytest.raises(InputError, match="2 frames"):
        commit(cache, open_past(cache, rotation, 0), jnp.ones((2, 1, 6, 2, 12)), 0, np.arange(2))
