# SPDX-License-Identifier: Apache-2.0
"""A bank that forgets nothing selects what a bank without an end selects, in few slots; and the
slots of a cache go out and come back as they were.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvjax.core.errors import InputError
from lvjax.memory.cache import init_cache, read_clip, write_clip
from lvjax.memory.placement import plan_bank
from lvjax.memory.spill import exchange_rows, init_spill, most_outside, next_exchange
from tests.tiny import SMALL_DIT

stories = st.tuples(
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 9),
)


def drawn(story):
    """Embeddings; with noise, no two are the same but many are near."""
    labels, most, more, seed = story
    noise = 0.15 * np.random.default_rng(seed).standard_normal((len(labels), 6)) * (seed % 2)
    return np.eye(6)[labels] + noise, most, most + more


@settings(max_examples=80, deadline=None)
@given(stories)
def test_it_selects_what_a_bank_without_an_end_selects(story):
    """Every clip sees exactly those clips where they are, and only what was put away comes back."""
    embeddings, most, capacity = drawn(story)
    ideal = plan_bank(embeddings, len(embeddings), max_selected=most).selected
    state, held, outside = init_spill(capacity, 6, most), {}, set()
    for i, e in enumerate(embeddings):
        state, (place, away, back) = next_exchange(state, e)
        for slot, clip in away:
            assert held[slot] == clip and clip not in outside
            outside.add(clip)
        for slot, clip in back:
            assert clip in outside and clip not in held.values() and slot != place.slot
        held |= dict(back) | {place.slot: i}
        assert place.selected == ideal[i] and place.clip == i
        assert {held[s] for s in np.flatnonzero(place.visible)} == {i, *ideal[i]}
        assert len(held) <= capacity == len(place.visible)
        assert [held.get(s, -1) for s in range(capacity)] == state.clip.tolist()
    assert outside == state.outside
    assert len(outside) <= most_outside([bytes(e) for e in embeddings], capacity, most)


def test_what_is_kept_grows_with_the_prompts_alone():
    rng, state = np.random.default_rng(0), init_spill(4, 5, 3)
    for _ in range(2000):
        state, _ = next_exchange(state, np.eye(5)[rng.integers(5)])
    assert state.count == 2000 and state.prompts.shape == (5, 5)
    assert [len(clips) for clips in state.clips] == [3] * 5 and len(state.outside) <= 15


def test_a_clip_is_put_away_once_and_never_without_need():
    e = np.eye(4)
    moves = list(exchange_rows([init_spill(2, 4, 1)], (e[[c]] for c in [0, 1, 2, 0, 1, 2, 0, 3])))
    assert [len(row.place.selected) for (row,) in moves][:1] == [0]
    put = [move.clip for (row,) in moves for move in row.away]
    assert len(put) == len(set(put))
    few = list(exchange_rows([init_spill(8, 4, 1)], (e[[c % 4]] for c in range(8))))
    assert not any(row.away or row.back for (row,) in few)


def test_how_many_clips_go_out_at_most():
    assert most_outside("ABABAB", 6, 5) == 0
    assert most_outside(list("ABABAB"), 3, 2) == 4 and most_outside(list("A" * 9), 3, 2) == 2
    assert most_outside(list("ABCDEFG"), 3, 2) == 6


def test_too_few_slots_are_refused():
    with pytest.raises(InputError, match="need at least 6"):
        init_spill(5, 4)


FRAMES, ROWS = 2, 3


@pytest.fixture(scope="module")
def cache():
    empty = init_cache(SMALL_DIT, ROWS, 4 * FRAMES, (2, 3))
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal(a.shape), a.dtype) for a in (empty.k, empty.v))
    frame = jnp.asarray(rng.integers(0, 99, empty.frame.shape), jnp.int32)
    return empty.replace(k=k, v=v, frame=frame)


def test_a_clip_is_read_and_written_row_by_row(cache):
    slot = jnp.array([2, 0, 3], jnp.int32)
    clip = jax.jit(read_clip, static_argnums=2)(cache, slot, FRAMES)
    k, frame = np.asarray(cache.k), np.asarray(cache.frame)
    for row, at in enumerate(slot.tolist()):
        tokens = slice(at * FRAMES * 6, (at + 1) * FRAMES * 6)
        np.testing.assert_array_equal(clip["k"][:, row], k[:, row, tokens])
        np.testing.assert_array_equal(clip["v"][:, row], np.asarray(cache.v)[:, row, tokens])
        np.testing.assert_array_equal(clip["frame"][row], frame[row, at * FRAMES :][:FRAMES])
    new = jax.tree.map(lambda a: a + 1, clip)
    there = jnp.array([1, 3, 0], jnp.int32)
    out = jax.jit(write_clip)(cache, there, new, jnp.array([True, False, True]))
    for row, at in enumerate(there.tolist()):
        tokens = slice(at * FRAMES * 6, (at + 1) * FRAMES * 6)
        wanted = k[:, row].copy()
        if row != 1:
            wanted[:, tokens] = new["k"][:, row]
        np.testing.assert_array_equal(out.k[:, row], wanted)
    assert (out.frame != cache.frame).sum() == 2 * FRAMES and (out.v != cache.v).any()
    assert int(out.next_frame) == int(cache.next_frame)
