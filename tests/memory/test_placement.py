# SPDX-License-Identifier: Apache-2.0
"""The clip bank: selection, planned and incremental placement."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvjax.core.errors import InputError
from lvjax.memory.placement import (
    SELECTIONS,
    BankState,
    by_prompt,
    clips_needed,
    first_and_last,
    init_bank,
    last,
    next_slot,
    nothing,
    place_rows,
    plan_bank,
    plan_rows,
)


def timeline(labels, width=8):
    """One unit vector per label."""
    return np.eye(width)[np.asarray(labels, int)]


def run(embeddings, capacity, **knobs):
    """The incremental form over a whole timeline; returns placements and the banks in between."""
    bank, placements, banks = init_bank(capacity, embeddings.shape[1]), [], []
    for e in embeddings:
        bank, placement = next_slot(bank, e, **knobs)
        placements.append(placement)
        banks.append(bank)
    return placements, banks


def unbounded(embeddings, **knobs):
    return plan_bank(embeddings, len(embeddings), **knobs).selected


stories = st.tuples(
    st.lists(st.integers(0, 4), min_size=1, max_size=24),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 99),
)


def drawn(story):
    labels, capacity, most, seed = story
    noise = 0.3 * np.random.default_rng(seed).standard_normal((len(labels), 8)) * (seed % 2)
    return timeline(labels) + noise, capacity, most


@settings(max_examples=60, deadline=None)
@given(stories)
def test_a_plan_is_consistent(story):
    """Every clip owns one slot below capacity, sees it, and sees exactly the selected clips where
    they really are."""
    embeddings, capacity, most = drawn(story)
    plan = plan_bank(embeddings, capacity, max_selected=most)
    placements, banks = run(embeddings, capacity, max_selected=most)
    planned = list(zip(plan.slot, plan.visible, plan.selected, strict=True))
    for steps in (planned, [(p.slot, p.visible, p.selected) for p in placements]):
        held = {}
        for j, (slot, visible, selected) in enumerate(steps):
            held[int(slot)] = j
            assert 0 <= slot < capacity and len(held) <= capacity
            assert (
                len(selected) <= most
                and len(set(selected)) == len(selected)
                and all(i < j for i in selected)
            )
            assert {held[s] for s in np.flatnonzero(visible)} == {j, *selected}
    assert all(b.clip.shape == (capacity,) and b.embedding.shape == (capacity, 8) for b in banks)


@settings(max_examples=60, deadline=None)
@given(stories)
def test_selection_is_the_papers_rule_among_the_clips_that_remain(story):
    embeddings, capacity, most = drawn(story)
    plan = plan_bank(embeddings, capacity, max_selected=most)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    held = {}
    for j in range(len(unit)):
        held[int(plan.slot[j])] = j
        past = sorted(i for i in held.values() if i != j)
        assert (
            plan.selected[j]
            == sorted(past, key=lambda i: (-round(float(unit[i] @ unit[j]) / 0.02), i))[:most]
        )


@settings(max_examples=60, deadline=None)
@given(stories)
def test_no_clip_is_lost_that_a_later_selection_could_keep(story):
    embeddings, capacity, most = drawn(story)
    plan = plan_bank(embeddings, capacity, max_selected=most)
    ideal = unbounded(embeddings, max_selected=most)

    def next_use(i, j):
        return next((t for t in range(j, len(ideal)) if i in ideal[t]), None)

    held, needed = {}, []
    for j, slot in enumerate(plan.slot):
        gone = held.get(int(slot))
        if gone is not None and len(held) < capacity:
            raise AssertionError("evicted although a slot was free")
        if gone is not None and next_use(gone, j) is not None:
            uses = [next_use(i, j) for i in held.values()]
            assert None not in uses and next_use(gone, j) == max(uses)
        held[int(slot)] = j
        needed.append(sum(next_use(i, j) is not None for i in range(j)))
    if max(needed) < capacity:
        assert plan.selected == ideal


@settings(max_examples=40, deadline=None)
@given(stories)
def test_incremental_equals_planned_while_nothing_is_evicted(story):
    embeddings, capacity, most = drawn(story)
    embeddings = embeddings[:capacity]
    plan = plan_bank(embeddings, capacity, max_selected=most)
    placements, _ = run(embeddings, capacity, max_selected=most)
    assert plan.slot.tolist() == [p.slot for p in placements] == list(range(len(embeddings)))
    np.testing.assert_array_equal(plan.visible, [p.visible for p in placements])
    assert plan.selected == [p.selected for p in placements]


@settings(max_examples=40, deadline=None)
@given(stories)
def test_the_incremental_form_does_not_look_ahead(story):
    embeddings, capacity, most = drawn(story)
    half = len(embeddings) // 2
    changed = embeddings.copy()
    changed[half:] = changed[half:][::-1] + 0.5
    one, two = (run(e, capacity, max_selected=most)[0][:half] for e in (embeddings, changed))
    assert [(p.slot, p.selected) for p in one] == [(p.slot, p.selected) for p in two]


def test_near_ties_favour_the_earlier_clip():
    angle = np.array([0.05, 0.6, 0.0, 0.0])  # cosines with the last clip: .9988, .825, 1
    e = np.stack([np.cos(angle), np.sin(angle)], -1)
    assert plan_bank(e, 8).selected[3] == [0, 2, 1]
    assert plan_bank(e, 8, delta=1e-6).selected[3] == [2, 0, 1]
    assert plan_bank(e, 8, max_selected=1).selected[3] == [0]


def test_at_most_five_and_the_earliest_of_equals():
    plan = plan_bank(timeline([0] * 9), 16)
    assert plan.selected[8] == [0, 1, 2, 3, 4] and plan.visible[8].sum() == 6


def test_a_scene_that_returns_finds_its_clips():
    """Scene A, a long scene B, A again: a known timeline keeps A's clips, an unknown one keeps the
    first of each."""
    labels = [0] * 3 + [1] * 30 + [0] * 3
    assert plan_bank(timeline(labels), 9).selected == unbounded(
        timeline(labels)
    )  # 3 of A, 5 of B, the clip itself
    assert plan_bank(timeline(labels), 8).selected[33][:2] == [0, 1]
    placements, _ = run(timeline([0] * 10 + [1] * 30 + [0]), 8)
    back = placements[40].selected
    assert back[:2] == [0, 1]
    steady = placements[35:40]
    assert all(p.selected == steady[0].selected for p in steady)


def test_an_endless_stream_needs_constant_memory():
    rng = np.random.default_rng(0)
    bank = init_bank(6, 8)
    for _ in range(2000):
        bank, placement = next_slot(bank, timeline([rng.integers(5)])[0])
    assert isinstance(bank, BankState) and bank.count == 2000 and placement.clip == 1999
    assert sum(np.asarray(a).nbytes for a in bank) == 6 * 8 * 8 + 2 * 6 * 8 + 8
    assert len(placement.selected) == 5


def test_other_policies():
    e = timeline([0] * 10)
    assert plan_bank(e, 4, select=last(2)).selected[9] == [8, 7]
    assert plan_bank(e, 4, select=first_and_last(1, 2)).selected[9] == [0, 8, 7]
    assert run(e, 4, select=first_and_last(1, 2))[0][9].selected == [0, 8, 7]
    assert run(e, 4, select=last(2))[0][9].selected == [8, 7]
    assert plan_bank(e, 4, select=nothing()).visible.sum() == 10
    assert by_prompt(2)(np.array([4, 7, 9]), np.array([1, 3, 3])) == [1, 2]


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_bank_needs_no_more_slots_than_are_said(name, most):
    """In the fewest slots, a policy selects what it selects from all clips; prompts may not."""
    e, select = timeline([0, 1, 2] * 4), SELECTIONS[name](most)
    slots = clips_needed(name, 12, most)
    assert slots == {"prompt": 12, "none": 1}.get(name, most + 1)
    assert [p.selected for p in run(e, slots, select=select)[0]] == unbounded(e, select=select)
    assert plan_bank(e, slots, select=select).selected == unbounded(e, select=select)
    assert max(map(len, unbounded(e, select=select))) == (most if name != "none" else 0)
    assert clips_needed(name, 1, most) == 1


STORIES = np.random.default_rng(3).integers(0, 8, (3, 24))


def placed(stories, capacity=3):
    """Slots [K, B] and visible [K, B, capacity] of a batch of stories [B, K]."""
    embeddings = np.stack([timeline(s) for s in stories], axis=1)
    banks = [init_bank(capacity, embeddings.shape[2])] * len(stories)
    return tuple(map(np.stack, zip(*place_rows(banks, embeddings), strict=True)))


def changed_before(place, clip):
    """Whether another prompt at `clip` changes the places of the clips before it."""
    other = STORIES.copy()
    other[:, clip] = (other[:, clip] + 1) % 8
    return any(
        (a[:clip] != b[:clip]).any() for a, b in zip(place(STORIES), place(other), strict=True)
    )


def test_a_later_prompt_changes_nothing_before_it():
    def planned(stories):
        embeddings = np.stack([timeline(s) for s in stories], axis=1)
        return tuple(map(np.stack, zip(*plan_rows(embeddings, 3), strict=True)))

    assert not any(changed_before(placed, clip) for clip in range(1, 24))
    assert any(changed_before(planned, clip) for clip in range(1, 24))  # a plan looks ahead


@pytest.mark.parametrize("row", range(3))
def test_a_row_of_a_batch_has_the_places_that_it_has_alone(row):
    for whole, alone in zip(placed(STORIES), placed(STORIES[row : row + 1]), strict=True):
        np.testing.assert_array_equal(whole[:, row], alone[:, 0])
    assert (placed(STORIES)[0][:, 0] != placed(STORIES)[0][:, 1]).any()


def test_a_clip_is_placed_before_the_next_is_asked_for():
    asked = []

    def endless():
        while True:
            asked.append(len(asked))
            yield timeline([len(asked) % 8])

    places = place_rows([init_bank(2, 8)], endless())
    slot, visible = next(places)
    assert asked == [0] and slot.tolist() == [0] and visible.tolist() == [[True, False]]
    assert slot.dtype == np.int32 and visible.dtype == bool


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="capacity=0"):
        init_bank(0, 4)
    with pytest.raises(InputError, match="finite"):
        next_slot(init_bank(2, 4), [1.0, np.nan, 0.0, 0.0])
    with pytest.raises(InputError, match="K, E"):
        plan_bank(np.zeros(3), 2)
    assert plan_bank(np.zeros((0, 4)), 2).visible.shape == (0, 2)
