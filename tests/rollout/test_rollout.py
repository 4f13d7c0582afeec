# SPDX-License-Identifier: Apache-2.0
"""Clip-by-clip rollout on a tiny random model with a damped head: live = offline, batch = rows,
memory = brute force."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import reduce
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial

from lvjax.core.errors import InputError
from lvjax.core.mesh import make_mesh
from lvjax.core.params import map_spec
from lvjax.flow.schedule import make_schedule
from lvjax.memory.cache import Past
from lvjax.memory.placement import plan_bank
from lvjax.methods import METHODS, ErrorFree
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.dit import dit, dit_spec, embed_context
from lvjax.models.vae import vae_spec
from lvjax.nn.rope import grid_table, rotate
from lvjax.rollout.clipwise import Clip, shard_state
from lvjax.rollout.condition import blank, condition, first_condition, pin
from lvjax.rollout.method import Method, _step, stream
from tests.tiny import relative

DIT = DiTConfig(
    dim=32, num_heads=2, num_layers=3, ffn_dim=48, in_channels=4, out_channels=4, patch=(1, 2, 2),
    condition_channels=8, text_dim=8, text_len=4, freq_dim=16, dtype="float32",
)  # fmt: skip
VAE = VAEConfig(
    base=4,
    z=4,
    dim_mult=(1, 1, 2),
    res_blocks=1,
    temporal_down=(True, True),
    mean=(0.0,) * 4,
    std=(1.0,) * 4,
)
T, SIDE, CAPACITY, MEMORY = 3, 16, 3, (1, 3)
SETTINGS = ErrorFree(
    schedule=make_schedule(4, 3.0),
    solver="unipc",
    guidance=2.0,
    capacity=CAPACITY,
    layers=MEMORY,
    fill="latent",
)
SIZE = (T, SIDE // 4, SIDE // 4, VAE.z)
PAIR = ("ABA", "ABA")  # scenes of the clips, per row; the bank has a slot for each
OWN = ("AABBACCADA", "ABCADBDCBA", "DCBAABCDDA")  # every row evicts, each other clips


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@cache
def weights():
    draw = np.random.default_rng(0)

    def fill(p, scale):
        return jnp.asarray(draw.standard_normal(p.shape) * scale + (p.init == "ones"), jnp.float32)

    trees = {"dit": map_spec(partial(fill, scale=0.2), dit_spec(DIT))}
    trees["dit"]["head"]["linear"] = jax.tree.map(lambda a: 0.2 * a, trees["dit"]["head"]["linear"])
    return trees | {"vae": map_spec(partial(fill, scale=0.1), vae_spec(VAE))}


def toy_decode(latents):
    """A codec without weights, cheap to compile: a latent cell becomes a block of equal pixels."""
    frames = jnp.concatenate([latents[:, :1], jnp.repeat(latents[:, 1:], 4, 1)], 1)[..., :3]
    return jnp.clip(frames.repeat(4, 2).repeat(4, 3), -1, 1)


def toy_encode(frames):
    cells = reduce(frames, "b p (h r) (w q) c -> b p h w c", "mean", r=4, q=4)
    cells = jnp.concatenate([cells, cells[..., :1] * cells[..., 1:2]], -1)
    return jnp.concatenate(
        [cells[:, :1], reduce(cells[:, 1:], "b (t f) h w c -> b t h w c", "mean", f=4)], 1
    )


@cache
def method(positions="absolute", codec="toy"):
    built = METHODS["error_free"](weights(), DIT, VAE, replace(SETTINGS, positions=positions))
    if codec == "vae":
        return built
    model = built.step.args[0]._replace(encode=Partial(toy_encode), decode=Partial(toy_decode))
    return built._replace(step=Partial(built.step.func, model))


def embed(text):
    """Context of prompts [B, M, C] above the context of no prompt."""
    return embed_context(weights()["dit"], jnp.concatenate([text, jnp.zeros_like(text)]), DIT)


@cache
def inputs(stories=PAIR):
    """(first condition, keys, the clips' inputs in order), a story per row."""
    draw, batch = np.random.default_rng(0), len(stories)
    image = jnp.asarray(draw.uniform(-1, 1, (batch, SIDE, SIDE, 3)), jnp.float32)
    first = first_condition(toy_encode, image, (batch, *SIZE))
    text = jnp.asarray(draw.standard_normal((4, batch, 4, 8)), jnp.float32)
    scenes = np.array([["ABCD".index(s) for s in story] for story in stories])
    plans = [plan_bank(np.eye(4)[row], CAPACITY, max_selected=1) for row in scenes]
    slot, visible = (
        jnp.stack([jnp.asarray(getattr(p, name)) for p in plans], 1) for name in ("slot", "visible")
    )
    given = [
        Clip(embed(text[now, np.arange(batch)]), slot[i], visible[i])
        for i, now in enumerate(scenes.T)
    ]
    return first, jax.random.split(jax.random.key(7), batch), given


def stacked(clips):
    return jax.tree.map(lambda *a: jnp.stack(a), *clips)


def start(built=None, frame=0, stories=PAIR):
    first, keys, _ = inputs(stories)
    state = (built or method()).init(first, keys)
    return state.replace(next_frame=jnp.array(frame, jnp.int32))


def live(state, clips, built=None):
    outs = []
    for after, out in stream(built or method(), state, clips):
        outs.append(jax.device_get(out))
        last = after
    return jax.device_get(last), outs


@cache
def reference(stories=PAIR):
    return live(start(stories=stories), inputs(stories)[2])


def take_rows(clip, rows):
    """The clip of a batch made of `rows` of this one; contexts have the rows without a prompt
    behind those with it."""
    both = np.concatenate([rows, len(clip.slot) + rows])
    context = jax.tree.map(partial(jnp.take, indices=both, axis=1), clip.context)
    return Clip(context, clip.slot[rows], clip.visible[rows])


def test_rows_of_a_batch_run_singly():
    """Ten clips in a bank of three: what a row evicts does not depend on the rows beside it."""
    first, keys, clips = inputs(OWN)
    assert len(np.unique([c.slot for c in clips], axis=1).T) == 3
    end, many = reference(OWN)
    for row in range(3):
        one = np.array([row])
        alone = method().init(first[one], keys[one])
        state, outs = live(alone, [take_rows(c, one) for c in clips])
        for (latents, frames), (batch, video) in zip(outs, many, strict=True):
            assert relative(latents, batch[one]) <= 1e-5 and relative(frames, video[one]) <= 1e-5
        assert relative(state.cache.k, end.cache.k[:, [row, 3 + row]]) <= 1e-5
        np.testing.assert_array_equal(state.cache.frame, end.cache.frame[[row, 3 + row]])
    assert len(np.unique(end.cache.frame[:3], axis=0)) == 3


def test_a_batch_sharded_over_devices():
    """Eight rows on eight devices give what the three rows that they repeat gave on one, after
    evictions too."""
    first, keys, clips = inputs(OWN)
    rows = np.array([0, 1, 2, 0, 2, 1, 0, 1])
    mesh, built = make_mesh(data=8), method()
    leading, spread = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), (None, "data"))
    )
    clips = [take_rows(c, rows) for c in clips[:6]]
    clips = [jax.device_put(c, Clip(spread, leading, leading)) for c in clips]
    built = built._replace(step=jax.device_put(built.step, NamedSharding(mesh, PartitionSpec())))
    state = shard_state(built.init(first[rows], keys[rows]), mesh)
    before, outs = _step._cache_size(), []
    for after, out in stream(built, state, clips):
        state, outs = after, [*outs, out]
    assert _step._cache_size() == before + 1  # the layout is kept
    assert state.cache.k.sharding.spec == spread.spec
    assert state.cache.frame.sharding.spec == leading.spec
    for (latents, frames), (three, video) in zip(outs, reference(OWN)[1], strict=False):
        assert "data" in latents.sharding.spec and "data" in frames.sharding.spec
        assert relative(latents, three[rows]) <= 1e-5 and relative(frames, video[rows]) <= 1e-5


# Latent frames 1023 to 1027, and 65,536 to 65,540: clips of three, one frame apart.
FAR = [1023, 65_536]


@pytest.mark.parametrize("frame", FAR)
def test_relative_positions_are_bit_equal_anywhere(frame):
    built = method("relative")
    low = live(start(built), inputs()[2], built)[1]
    far_state, far = live(start(built, frame), inputs()[2], built)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(far))
    same(far, low)
    held = set(range(frame, frame + 5))
    assert far_state.next_frame == frame + 3 and set(far_state.cache.frame.ravel()) == held


@pytest.mark.parametrize("frame", FAR)
def test_absolute_positions_are_finite_and_close(frame):
    far_state, far = live(start(frame=frame), inputs()[2])
    assert set(far_state.cache.frame.ravel()) == set(range(frame, frame + 5))
    for got, want in zip(far, reference()[1], strict=True):
        assert all(np.all(np.isfinite(a)) for a in got) and relative(got[0], want[0]) <= 1e-3


def test_any_number_of_clips_compiles_once():
    traces = []

    def step(state, clip):
        traces.append(1)
        return state + clip, state * clip

    toy = Method(init=lambda: jnp.float32(1.0), step=step)
    for count in (1, 5, 3):
        got = list(stream(toy, toy.init(), (jnp.float32(i) for i in range(count))))
    assert len(traces) == 1 and float(got[-1][0]) == 4.0


@jax.jit
def brute_force(params, latents, cond, context, frames, past_kv):
    """Keys and values of one clip at sigma 0 with exactly the clips in `past_kv` [(k, v, frames)]
    before it."""
    own = len(frames) * 4
    zeros = jnp.zeros((MEMORY[1] - MEMORY[0], 4, own, 2, 16))
    ks = [jax.vmap(lambda x, f=f: rotate(x, grid_table(f, 2, 2, 16)))(k) for k, _, f in past_kv]
    k, v = (jnp.concatenate([*old, zeros], 2) for old in (ks, [v for _, v, _ in past_kv]))
    past = Past(k, v, jnp.full((4,), k.shape[2] - own, jnp.int32), None, MEMORY)
    x, c = (jnp.concatenate([a, a]) for a in (latents, cond))
    rotation = grid_table(frames, 2, 2, 16)
    _, past, keys = dit(
        params, x, jnp.zeros(4), context, DIT, condition=c, rotation=rotation, past=past
    )
    return keys, past.v[:, :, -own:], frames


def test_the_bank_holds_what_a_brute_force_forward_gives():
    """Clip 2 (scene A again) sees clip 0 and itself, not clip 1; the bank's slots hold their clean
    keys and values."""
    state, outs = reference()
    assert state.cache.frame.tolist() == [[0, 1, 2, 1, 2, 3, 2, 3, 4]] * 4
    assert state.next_frame == 3
    first, _, clips = inputs()
    assert clips[2].visible.tolist() == [[True, False, True]] * 2
    conditions = [first] + [condition(toy_encode, frames[:, -5:], (2, *SIZE)) for _, frames in outs]
    memory = []
    for i, seen in enumerate([[], [0], [0]]):
        frames = jnp.arange(i, i + T, dtype=jnp.int32)
        found = brute_force(
            weights()["dit"],
            outs[i][0],
            conditions[i],
            clips[i].context,
            frames,
            [memory[j] for j in seen],
        )
        slot = slice(12 * i, 12 * (i + 1))
        assert relative(state.cache.k[:, :, slot], found[0]) <= 1e-5
        assert relative(state.cache.v[:, :, slot], found[1]) <= 1e-5
        memory.append(found)
    without = brute_force(
        weights()["dit"],
        outs[2][0],
        conditions[2],
        clips[2].context,
        jnp.arange(2, 5, dtype=jnp.int32),
        [],
    )
    assert relative(without[0], memory[2][0]) > 1e-3  # memory matters


def test_what_is_not_visible_changes_nothing():
    state, _ = live(start(), inputs()[2][:2])
    spoiled = state.replace(
        cache=state.cache.replace(k=state.cache.k.copy(), v=state.cache.v.copy())
    )
    spoiled.cache.k[:, :, 12:24], spoiled.cache.v[:, :, 12:24] = 9.0, -9.0
    _, (out,) = live(jax.tree.map(jnp.array, spoiled), inputs()[2][2:])
    same(out, reference()[1][2])


def test_conditions():

    def code(frames):
        return toy_encode(frames) + 0.25

    video = jnp.asarray(
        np.random.default_rng(1).uniform(-1, 1, (1, 12, SIDE, SIDE, 3)), jnp.float32
    )
    size = (1, *SIZE)
    none = first_condition(code, None, size)
    assert none.shape == (1, *SIZE[:3], 8) and not np.any(none)
    image = first_condition(code, video[:, 0], size)
    assert image[..., :4].sum((0, 2, 3)).tolist() == [[16.0] * 4, [0.0] * 4, [0.0] * 4]
    longer = first_condition(code, video, size)
    np.testing.assert_array_equal(longer[:, :2, ..., 4:], code(video[:, -5:]))
    assert longer[0, :, 0, 0, 0].tolist() == [1, 1, 0] and not np.any(longer[:, 2:])
    short = first_condition(code, video[:, :3], size)
    np.testing.assert_array_equal(short[:, :1, ..., 4:], code(video[:, 2:3]))
    grey = first_condition(code, video, size, fill="pixel")
    assert relative(grey[:, :2], longer[:, :2]) <= 1e-6 and np.any(grey[:, 2:, ..., 4:])
    np.testing.assert_array_equal(grey[..., :4], longer[..., :4])
    placed = first_condition(code, video, size, fill="position")
    np.testing.assert_array_equal(placed[:, :2], longer[:, :2])
    np.testing.assert_array_equal(placed[0, 2, ..., 4:], blank("position", SIZE[1:]))
    assert not np.any(placed[:, 2, ..., :4])
    partly = jnp.concatenate(
        [image[..., :4] * jnp.float32([0, 0, 0, 1]).reshape(1, 1, 1, 1, 4), image[..., 4:]], -1
    )
    latents = jnp.ones(size)
    np.testing.assert_array_equal(
        pin(latents, partly), latents
    )  # a latent of which one frame is given is not pinned
    np.testing.assert_array_equal(pin(latents, image)[:, :1], image[:, :1, ..., 4:])
    with pytest.raises(InputError, match="give fewer"):
        condition(code, jnp.zeros((1, 13, SIDE, SIDE, 3)), size)
    with pytest.raises(InputError, match="fill"):
        condition(code, None, size, fill="pixel")


@pytest.mark.parametrize(
    "change",
    [{"guidance": None}, {"window": None, "solver": "dpm++"}, {"fill": "pixel", "axis": "index"}],
)
def test_other_settings_keep_the_shapes(change):
    """Traced only: the state's types never change, whatever is set; without guidance nothing is
    doubled."""
    built = METHODS["error_free"](weights(), DIT, VAE, replace(SETTINGS, **change))
    first, keys, clips = inputs()
    state, clip = built.init(first, keys), clips[0]
    batch = 2 if change.get("guidance", 2) is None else 4
    assert state.cache.k.shape[1] == batch
    clip = clip.replace(context=jax.tree.map(lambda a: a[:, :batch], clip.context))
    after, (latents, frames) = jax.eval_shape(built.step, state, clip)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)
    assert latents.shape == (2, *SIZE) and frames.shape == (2, 9, SIDE, SIDE, 3)


def test_bad_settings_are_refused():
    first, keys, _ = inputs()
    make = METHODS["error_free"]
    with pytest.raises(InputError, match="condition channels"):
        make(weights(), replace(DIT, condition_channels=0), VAE, SETTINGS)
    with pytest.raises(InputError, match="positions"):
        make(weights(), DIT, VAE, replace(SETTINGS, positions="cyclic"))
    with pytest.raises(InputError, match="overlap=3"):
        make(weights(), DIT, VAE, replace(SETTINGS, overlap=3)).init(first, keys)
    with pytest.raises(InputError, match="one key per row"):
        method().init(first, keys[:1])
