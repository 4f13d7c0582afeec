# SPDX-License-Identifier: Apache-2.0
"""A clip bank that forgets nothing: what leaves its slots goes elsewhere, and comes back when a
clip selects it.

The selection is that of a bank without an end, by the rule of placement.py; only the slots are few.
Of clips with the same prompt none is selected but the first `max_selected`, because near ties
favour the earlier, so that no others are ever kept: what the host holds grows with the prompts of a
video, not with its clips.
Owns: what goes where, on the host.  Does not own: the moving itself (cache.py), and the place
outside (run/spill.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lvjax.core.errors import InputError
from lvjax.memory.placement import Placement, by_prompt, nearness, unit


class SpillState(NamedTuple):
    """What the host keeps between clips.

    clip: int64 [capacity], the clip in each slot, -1 empty.  used: int64 [capacity], the last clip
      that selected it (at first itself).
    prompts: float64 [P, E], of unit length, no two the same.  clips: for each prompt the first
      `max_selected` clips that follow it.
    outside: the clips that have been put away.  count: clips placed so far.
    max_selected: most clips that one sees.
    """

    clip: np.ndarray
    used: np.ndarray
    prompts: np.ndarray
    clips: tuple[tuple[int, ...], ...]
    outside: frozenset[int]
    count: int
    max_selected: int


class Move(NamedTuple):
    """A clip between a slot and the place outside."""

    slot: int
    clip: int


class Exchange(NamedTuple):
    """A placement; the clips to be put away first, and those to be brought back then."""

    place: Placement
    away: list[Move]
    back: list[Move]


def init_spill(capacity: int, width: int, max_selected: int = 5) -> SpillState:
    """An empty bank for prompt embeddings of `width` numbers.

    Raises: InputError when a clip and all that it may see do not have their slots.
    """
    if capacity <= max_selected:
        raise InputError(
            f"capacity={capacity}; a clip and the {max_selected} that it sees need at least "
            f"{max_selected + 1}"
        )
    empty = np.full(capacity, -1, np.int64)
    return SpillState(empty, empty.copy(), np.zeros((0, width)), (), frozenset(), 0, max_selected)


def next_exchange(state: SpillState, embedding, delta: float = 0.02) -> tuple[SpillState, Exchange]:
    """Place the next clip; it sees the clips that it would see in a bank without an end.

    embedding: [E], of the clip's prompt.  delta: as `placement.next_slot` has it.
    Slots are taken that are empty; then of clips that are never selected again, then of the least
    recently selected, then of the earliest; never of one that this clip sees.  A clip that is
    outside already is not put away again.
    """
    e, clip = unit(embedding, state.prompts.shape[1]), state.count
    known = np.array([c for clips in state.clips for c in clips], np.int64)
    times = np.array([len(clips) for clips in state.clips], np.int64)
    near = np.repeat(nearness(state.prompts, e, delta), times)
    selected = known[by_prompt(state.max_selected)(known, near)].tolist()
    gone = [c for c in selected if c not in state.clip]
    again = np.isin(state.clip, known)
    order = np.lexsort((state.clip, state.used, again, state.clip >= 0))
    own, *free = [int(s) for s in order if state.clip[s] not in selected][: 1 + len(gone)]
    away = [
        Move(s, int(state.clip[s]))
        for s in (own, *free)
        if again[s] and int(state.clip[s]) not in state.outside
    ]
    back = [Move(*move) for move in zip(free, gone, strict=True)]
    slots, used = state.clip.copy(), state.used.copy()
    for slot, c in (Move(own, clip), *back):
        slots[slot] = c
    seen = np.isin(slots, selected)
    used[seen], used[own] = clip, clip
    visible = seen.copy()
    visible[own] = True
    prompts, clips = _listed(state, e)
    outside = state.outside | {move.clip for move in away}
    new = SpillState(slots, used, prompts, clips, outside, clip + 1, state.max_selected)
    return new, Exchange(Placement(clip, own, visible, selected), away, back)


def _listed(state: SpillState, e: np.ndarray):
    """Prompts and clips with the next clip among those that may be selected, if it is one."""
    same = np.flatnonzero((state.prompts == e).all(1))
    if not len(same):
        return np.concatenate([state.prompts, e[None]]), (*state.clips, (state.count,))
    clips, at = list(state.clips), int(same[0])
    if len(clips[at]) < state.max_selected:
        clips[at] = (*clips[at], state.count)
    return state.prompts, tuple(clips)


def exchange_rows(
    states: Iterable[SpillState], embeddings: Iterable, delta: float = 0.02
) -> Iterator[list[Exchange]]:
    """Place the clips of a batch as they come, each row in its own bank.

    embeddings: per clip [B, E], taken one at a time.  Yields an exchange per row for each clip,
    before it asks for the next.
    """
    states = list(states)
    for rows in embeddings:
        pairs = zip(states, rows, strict=True)
        made = [next_exchange(state, e, delta) for state, e in pairs]
        states = [state for state, _ in made]
        yield [exchange for _, exchange in made]


def most_outside(prompts: Sequence, capacity: int, max_selected: int = 5) -> int:
    """Clips that are put away at most, of a video whose clips follow these prompts."""
    if len(prompts) <= capacity:
        return 0
    _, times = np.unique(np.asarray(prompts), return_counts=True)
    return min(int(np.minimum(times, max_selected).sum()), len(prompts) - 1)
