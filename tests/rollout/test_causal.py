# SPDX-License-Identifier: Apache-2.0
"""The rolling memory of causal models: the same as one masked pass over the whole video, the same
as the public implementations that move their cache, and endless.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from lvjax.core.errors import InputError
from lvjax.core.functional import bound
from lvjax.flow.few_step import few_step_schedule, sample_few
from lvjax.flow.sampling import sample
from lvjax.flow.schedule import make_schedule
from lvjax.memory.cache import init_cache
from lvjax.memory.masked import causal as causal_mask
from lvjax.memory.masked import masked
from lvjax.memory.window import Window
from lvjax.models.dit import dit, dit_spec, embed_context
from lvjax.nn.rope import grid_table
from lvjax.rollout import causal as module
from lvjax.rollout.causal import CausalClip, CausalKnobs, CausalModel, causal, given, once, recached
from lvjax.rollout.method import rollout, stream
from tests.drawn import drawn
from tests.tiny import DIT, relative

CFG = replace(DIT, condition_channels=0)
FRAMES, SIDE, BATCH = 12, 2, 2
SIZE = (SIDE, SIDE, CFG.in_channels)
WINDOWS = (
    Window(12, 0, 3),
    Window(6, 0, 3),
    Window(6, 3, 3),
    Window(9, 3, 3),
    Window(4, 2, 2),
    Window(3, 1, 1),
)


@cache
def params():
    tree = drawn(dit_spec(CFG), 0)
    rng = np.random.default_rng(1)
    shape = tree["head"]["linear"]["kernel"].shape
    tree["head"]["linear"]["kernel"] = 0.1 * rng.standard_normal(shape).astype(np.float32)
    return tree


@cache
def context(seed=0, batch=BATCH):
    rows = np.random.default_rng([2, seed]).standard_normal((batch, 5, CFG.text_dim))
    with jax.ensure_compile_time_eval():
        return embed_context(params(), jnp.asarray(rows, jnp.float32), CFG)


def latents(seed=0, frames=FRAMES):
    rng = np.random.default_rng([3, seed])
    return jnp.asarray(rng.standard_normal((BATCH, frames, *SIZE)), jnp.float32)


def denoise(params, x, timestep, context, rotation, past):
    return dit(params, x, timestep, context, CFG, rotation=rotation, past=past)


def turn(frames, grid):
    return grid_table(frames, *grid, CFG.head_dim, CFG.theta)


def model():
    return CausalModel(Partial(denoise, params()), Partial(turn), None)


def clip(since=0, seed=0, batch=BATCH):
    return CausalClip(context(seed, batch), jnp.int32(since))


def first_state(knobs, batch=BATCH, sampler=None):
    method = causal(model(), sampler or few(), knobs)
    rows = batch if knobs.guidance is None else 2 * batch
    memory = init_cache(CFG, rows, knobs.window.frames, (SIDE, SIDE))
    keys = jax.random.split(jax.random.key(5), batch)
    return method, method.init(memory, None, SIZE, keys)


def few():
    return bound(sample_few, schedule=few_step_schedule())


@partial(jax.jit, static_argnames="knobs")
def seen(state, x, clip, knobs):
    """The velocity of a clip at sigma 0, and the state after it."""
    m = model()
    frames = state.cache.next_frame + jnp.arange(x.shape[1], dtype=jnp.int32)
    start = knobs.window.slot(state.cache.next_frame)
    past, rotation = module.opened(m, state.cache, frames, start, clip.since, knobs)
    v, _, _ = m.denoise(x, jnp.zeros(x.shape[:2]), clip.context, rotation, past)
    return v, given(m, state, x, clip, knobs)


def one_by_one(knobs, x, state=None):
    state = first_state(knobs)[1] if state is None else state
    out, step = [], knobs.window.clip
    for at in range(0, x.shape[1], step):
        v, state = seen(state, x[:, at : at + step], clip(), knobs)
        out.append(v)
    return jnp.concatenate(out, axis=1), state


@partial(jax.jit, static_argnums=1)
def at_once(x, mask):
    frames = np.asarray(mask)
    past = masked(frames, CFG, (SIDE, SIDE))
    zero = jnp.zeros(x.shape[:2])
    rotation = grid_table(np.arange(x.shape[1]), SIDE, SIDE, CFG.head_dim, CFG.theta)
    return dit(params(), x, zero, context(), CFG, rotation=rotation, past=past)[0]


def as_tuple(mask):
    return tuple(map(tuple, mask.tolist()))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_clip_by_clip_is_one_pass_under_a_mask(window):
    x = latents()
    mask = causal_mask(FRAMES, window.clip, window.frames, window.sink)
    made, _ = one_by_one(CausalKnobs(window), x)
    assert relative(made, at_once(x, as_tuple(mask))) < 1e-5
    other = causal_mask(FRAMES, window.clip, window.frames + window.clip, window.sink)
    if (other != mask).any():
        assert relative(made, at_once(x, as_tuple(other))) > 1e-3


def moved(window: Window, clips: int):
    """The frames that a clip attends to when the cache is moved, by clip, as
    guandeh17/Self-Forcing does it: everything behind the sink slides to the left.
    """
    held: list[int] = []
    for i in range(clips):
        own = list(range(i * window.clip, (i + 1) * window.clip))
        over = max(0, len(held) + len(own) - window.frames)
        held = held[: window.sink] + held[window.sink + over :] + own
        yield set(held[-window.frames :])


@pytest.mark.parametrize(
    "window", [*WINDOWS, Window(12, 3, 3), Window(32, 8, 8), Window(12, 6, 3)], ids=str
)
def test_a_ring_holds_what_a_moving_cache_holds(window):
    slots = np.full(window.frames, -1)
    for i, wanted in enumerate(moved(window, 60)):
        own = np.arange(i * window.clip, (i + 1) * window.clip)
        start = int(window.slot(jnp.int32(own[0])))
        assert 0 <= start <= window.frames - window.clip
        slots[start : start + window.clip] = own
        visible = window.own(start, window.clip)[None] | window.seen(jnp.asarray(slots)[None], 0)
        assert set(slots[np.asarray(visible[0])].tolist()) == wanted


def test_relative_positions_are_absolute_until_something_leaves():
    x, window = latents(), Window(6, 3, 3)
    found = {}
    for positions in ("absolute", "relative"):
        found[positions], _ = one_by_one(CausalKnobs(window, positions), x)
    a, r = found["absolute"], found["relative"]
    np.testing.assert_array_equal(a[:, :6], r[:, :6])
    assert relative(r[:, 6:], a[:, 6:]) > 1e-3


@pytest.mark.parametrize("window", WINDOWS[1:4], ids=str)
def test_relative_positions_are_the_order_of_the_held_frames(window):
    """Against a cache without turns that is moved, and turned anew from 0 on."""
    held = jnp.asarray([[0, 1, 2, 9, 10, 11], [0, 1, 2, 6, 7, 8]], jnp.int32)
    ring = held[:, jnp.array([0, 1, 2, 4, 5, 3])]
    found = module.POSITIONS["relative"](ring, ring)
    np.testing.assert_array_equal(found, [[0, 1, 2, 4, 5, 3]] * 2)
    np.testing.assert_array_equal(
        module.POSITIONS["relative"](jnp.array([9, 10, 11]), ring[:1]), [3, 4, 5]
    )
    empty = jnp.asarray([[0, 1, -1, -1]], jnp.int32)
    np.testing.assert_array_equal(module.POSITIONS["relative"](empty[:, :2], empty), [[0, 1]])


def test_what_left_is_forgotten_and_the_sink_is_not():
    window = Window(6, 3, 3)
    knobs, x = CausalKnobs(window), latents()
    changed = {0: x.at[:, 0].add(1.0), 4: x.at[:, 4].add(1.0)}
    base, _ = one_by_one(knobs, x)
    sink, _ = one_by_one(knobs, changed[0])
    assert relative(sink[:, 9:], base[:, 9:]) > 1e-3
    plain = CausalKnobs(Window(3, 0, 3))
    alone = [one_by_one(plain, y)[0] for y in (x, changed[4])]
    np.testing.assert_array_equal(alone[0][:, 6:], alone[1][:, 6:])


def test_frames_before_a_cut_are_not_seen_but_for_the_sink():
    window = Window(12, 3, 3)
    knobs, x = CausalKnobs(window), latents()
    _, state = one_by_one(knobs, x[:, :9])
    _, other = one_by_one(knobs, x[:, :9].at[:, 3:8].add(1.0))
    for since, same in ((0, False), (8, False), (9, True)):
        a, b = (seen(s, x[:, 9:], clip(since), knobs)[0] for s in (state, other))
        assert (relative(a, b) < 1e-6) == same
    fresh = one_by_one(knobs, x[:, :3])[1]
    frames = fresh.cache.replace(next_frame=jnp.int32(9))
    alone, _ = seen(fresh.replace(cache=frames), x[:, 9:], clip(), knobs)
    cut, _ = seen(state, x[:, 9:], clip(9), knobs)
    assert relative(cut, alone) < 1e-5


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_scan_is_stream_and_resumes_bit_for_bit(guidance):
    knobs = CausalKnobs(Window(6, 3, 3), "relative", guidance)
    batch = BATCH if guidance is None else 2 * BATCH
    method, state = first_state(knobs)
    clips = jax.tree.map(lambda a: jnp.stack([a] * 5), clip(batch=batch))
    end, (whole, _) = rollout(method, state, clips)
    parts, saved = [], None
    for i, (after, (z, _)) in enumerate(stream(method, state, [clip(batch=batch)] * 5)):
        parts.append(np.asarray(z))
        if i == 1:
            saved = jax.tree.map(np.asarray, after)
    assert relative(np.stack(parts), whole) < 1e-5
    again = [z for _, (z, _) in stream(method, jax.device_put(saved), [clip(batch=batch)] * 3)]
    np.testing.assert_array_equal(np.stack(again), np.stack(parts)[2:])
    assert int(end.cache.next_frame) == 15


def test_rows_do_not_see_each_other_and_steps_draw_anew():
    knobs = CausalKnobs(Window(6, 3, 3))
    method, state = first_state(knobs)
    _, (z, _) = next(stream(method, state, [clip()]))
    one = CausalClip(jax.tree.map(lambda a: a[:, :1], context()), jnp.int32(0))
    memory = init_cache(CFG, 1, 6, (SIDE, SIDE))
    alone = method.init(memory, None, SIZE, jax.random.split(jax.random.key(5), BATCH)[:1])
    _, (first, _) = next(stream(method, alone, [one]))
    assert relative(first[0], z[0]) < 1e-5 and relative(z[1], z[0]) > 0.1
    key = jax.random.key_data(jax.random.split(jax.random.key(0), 1))
    draws = [module.causal_noise(key, f, i, (1, 3, *SIZE)) for f in (0, 3) for i in (0, 1)]
    flat = np.stack(draws).reshape(4, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 0.3


def test_an_ode_solver_instead_of_few_steps():
    knobs = CausalKnobs(Window(6, 3, 3))
    ode = once(bound(sample, schedule=make_schedule(4, 5.0), solver="unipc"))
    method, state = first_state(knobs, sampler=ode)
    _, (z, _) = next(stream(method, state, [clip()]))
    m = model()
    state = first_state(knobs)[1]
    frames = jnp.arange(3, dtype=jnp.int32)
    past, rotation = module.opened(m, state.cache, frames, jnp.int32(0), 0, knobs)

    def velocity(x, sigma, timestep, past):
        t = jnp.broadcast_to(timestep, x.shape[:2])
        return m.denoise(x, t, context(), rotation, past)[:2]

    noise = module.causal_noise(state.key, 0, 0, (BATCH, 3, *SIZE))
    wanted, _ = sample(velocity, noise, make_schedule(4, 5.0), "unipc", aux=past)
    assert relative(z, wanted) < 1e-5


# ---- a new prompt ------------------------------------------------------------------


@pytest.mark.parametrize("keep_sink", [True, False])
def test_recache_writes_the_memory_under_the_new_prompt(keep_sink):
    """As one pass over what is held, in which all frames see each other."""
    window = Window(6, 3, 3)
    knobs, x = CausalKnobs(window), latents()
    _, state = one_by_one(knobs, x)
    new = clip(seed=1)
    made = jax.jit(recached, static_argnums=(3, 4))(model(), state, new, knobs, keep_sink)
    order = [0, 1, 2, 9, 10, 11]
    np.testing.assert_array_equal(made.cache.frame[0], order)
    np.testing.assert_array_equal(state.latents, x[:, jnp.array(order)])
    rotation = grid_table(np.array(order), SIDE, SIDE, CFG.head_dim, CFG.theta)
    everything = masked(np.ones((6, 6), bool), CFG, (SIDE, SIDE))
    _, _, keys = dit(
        *(params(), state.latents, jnp.zeros((BATCH, 6)), new.context, CFG),
        rotation=rotation,
        past=everything,
    )
    sink = 3 * SIDE * SIDE if keep_sink else 0
    assert relative(made.cache.k[:, :, sink:], keys[:, :, sink:]) < 1e-5
    np.testing.assert_array_equal(made.cache.k[:, :, :sink], state.cache.k[:, :, :sink])
    assert relative(made.cache.k[1, :, sink:], state.cache.k[1, :, sink:]) > 1e-3
    assert int(made.cache.next_frame) == 12


def test_recache_of_a_memory_that_is_not_full_leaves_the_rest_empty():
    knobs, x = CausalKnobs(Window(9, 3, 3)), latents()
    _, state = one_by_one(knobs, x[:, :6])
    made = recached(model(), state, clip(seed=1), knobs, keep_sink=False)
    np.testing.assert_array_equal(made.cache.frame[0], [*range(6), -1, -1, -1])
    assert int(made.cache.next_frame) == 6
    own = recached(model(), state, clip(), knobs, keep_sink=False)
    v, _ = seen(own, x[:, 6:9], clip(), knobs)
    assert np.isfinite(v).all()


@pytest.mark.parametrize(
    "wrong", [(6, 6, 3), (7, 3, 3), (9, 2, 3), (6, 0, 0), (6, -1, 3), (6, 0, 3, 1), (6, 1, 3, 3)]
)
def test_windows_that_clips_would_lie_across_are_refused(wrong):
    with pytest.raises(InputError, match="window") as e:
        Window(*wrong)
    assert "\n" not in str(e.value)


def test_a_shorter_first_clip_has_its_place():
    window = Window(7, 1, 3, first=1)
    starts = [int(window.slot(jnp.int32(f))) for f in (0, 1, 4, 7, 10, 13)]
    assert starts == [0, 1, 4, 1, 4, 1]


def test_refusals():
    with pytest.raises(InputError, match="positions='rank' is unknown"):
        causal(model(), few(), CausalKnobs(Window(6, 3, 3), "rank"))
    method = causal(model(), few(), CausalKnobs(Window(6, 3, 3)))
    with pytest.raises(InputError, match="memory of batch 1 and 6 frame slots"):
        method.init(init_cache(CFG, 1, 6, (2, 2)), None, SIZE, jax.random.split(jax.random.key(0)))
