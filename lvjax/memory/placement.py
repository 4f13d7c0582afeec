# SPDX-License-Identifier: Apache-2.0
"""Which clips are remembered, where, and which of them a new clip sees: the clip bank.

A bank is a `KVCache` whose frame slots are divided into `capacity` clip slots.  A clip is written
while it is made, so it needs a slot first; what it sees is chosen among the clips that remain.  All
of this is small NumPy on the host; the device gets an integer and `capacity` booleans per clip.

`next_slot` places clip by clip and sees only the past: a later prompt never changes what an earlier
clip remembers, and its state has constant size.  `plan_bank` places a timeline that is known: it
never evicts a clip that a later one wants while another can go.  Both select by the same rule, and
while nothing has to be evicted both give the same plan.  When something has to, a plan looks ahead:
changing a later prompt can change the slots and the memory of earlier clips.
`place_rows` and `plan_rows` do the same for a batch: every row has the bank that it has alone.
Source of the selection: "Towards Error-Free Long Video Generation", arXiv:2606.22370, section on
inter-clip causal attention (the eviction rules are ours; the paper keeps every clip on the host).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lvjax.core.errors import InputError

NEVER = np.iinfo(np.int64).max
Select = Callable[[np.ndarray, np.ndarray], list[int]]
"""select(clips int64 [n], levels int64 [n]) -> positions in `clips`, best first; clips in order of
time, levels their similarity to the new clip in units of delta."""


def by_prompt(max_selected: int = 5) -> Select:
    """The most similar prompts, near ties to the earlier clip (the paper's rule, five clips)."""
    return lambda clips, levels: np.lexsort((clips, -levels))[:max_selected].tolist()


def last(count: int) -> Select:
    """The latest `count` clips."""
    return lambda clips, levels: np.argsort(-clips, kind="stable")[:count].tolist()


def first_and_last(first: int, count: int) -> Select:
    """The first clips of the video (kept while others can go) and the latest `count`."""

    def select(clips, levels):
        early = np.flatnonzero(clips < first).tolist()
        return early + [i for i in last(count)(clips, levels) if i not in early]

    return select


def nothing() -> Select:
    """No memory of earlier clips."""
    return lambda clips, levels: []


SELECTIONS: dict[str, Callable[[int], Select]] = {
    "prompt": by_prompt,
    "last": last,
    "first_last": lambda count: first_and_last(1, count - 1),
    "none": lambda count: nothing(),
}
"""Policies by name, each for the most clips that are seen; "first_last" is the first clip and the
latest others."""


def clips_needed(selection: str, capacity: int, max_selected: int) -> int:
    """Slots that a bank of at most `capacity` has a use for: unless prompts decide, a clip that is
    not seen any more never is again."""
    most = {"prompt": capacity, "none": 1}.get(selection, max_selected + 1)
    return min(capacity, most)


class BankState(NamedTuple):
    """What the host keeps between clips; constant size.

    clip: int64 [capacity], the clip in each slot, -1 empty.  embedding: float64 [capacity, E], of
    unit length.
    used: int64 [capacity], the last clip that selected it (at first itself).  count: clips placed
    so far.
    """

    clip: np.ndarray
    embedding: np.ndarray
    used: np.ndarray
    count: int


class Placement(NamedTuple):
    """Where clip `clip` goes and what it sees: slot, visible bool [capacity] (its own slot
    included), selected clips."""

    clip: int
    slot: int
    visible: np.ndarray
    selected: list[int]


class BankPlan(NamedTuple):
    """slot int32 [K], visible bool [K, capacity] (own slot included), selected: clip numbers per
    clip, best first."""

    slot: np.ndarray
    visible: np.ndarray
    selected: list[list[int]]


def init_bank(capacity: int, width: int) -> BankState:
    """An empty bank for prompt embeddings of `width` numbers.

    Raises: InputError for a bank of no clips.
    """
    if capacity < 1:
        raise InputError(f"capacity={capacity}; a bank holds at least the clip being made")
    empty = np.full(capacity, -1, np.int64)
    return BankState(empty, np.zeros((capacity, width)), empty.copy(), 0)


def next_slot(
    bank: BankState,
    embedding,
    max_selected: int = 5,
    delta: float = 0.02,
    select: Select | None = None,
) -> tuple[BankState, Placement]:
    """Place the next clip when the future is unknown.

    embedding: [E], of the clip's prompt.  max_selected, delta: most clips seen, and how close two
    cosines must be to count as equal.  select: another policy than `by_prompt(max_selected)`.
    Eviction, only when every slot is taken, takes the first of: (1) a clip that the new one would
    not select, else the last in its selection; (2) the clip with most earlier clips of an equal
    prompt in the bank (near ties favour the earlier, so it is the least likely to be selected
    again); (3) the least recently selected; (4) the earliest.  Returns the new bank (the given one
    is not changed) and the placement.
    """
    choose = by_prompt(max_selected) if select is None else select
    e = unit(embedding, bank.embedding.shape[1])
    slot = _free_slot(bank)
    if slot is None:
        slot = _evict(bank, _ranks(bank, e, delta, choose), delta)
    return _put(bank, e, slot, delta, choose)


def plan_bank(
    embeddings,
    capacity: int,
    max_selected: int = 5,
    delta: float = 0.02,
    select: Select | None = None,
) -> BankPlan:
    """Place all clips of a known timeline.

    embeddings: [K, E], of the clips' prompts.  A clip is wanted at j when clip j would select it
    from an unbounded bank.  Eviction, only when every slot is taken: a clip that nobody wants any
    more (among several, as `next_slot` decides), else the one wanted furthest in the future (of
    several, the last in that clip's selection).
    """
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2:
        raise InputError(f"embeddings has shape {embeddings.shape}; expected [K, E]")
    choose = by_prompt(max_selected) if select is None else select
    units = (
        np.stack([unit(e, embeddings.shape[1]) for e in embeddings])
        if len(embeddings)
        else embeddings
    )
    wanted = _wanted(units, delta, choose)
    bank, placements = init_bank(capacity, embeddings.shape[1]), []
    for j, e in enumerate(units):
        slot = _free_slot(bank)
        if slot is None:
            need = [_next_use(wanted[i], j) for i in bank.clip]
            idle = np.array([when == NEVER for when, _ in need])
            if idle.any():
                slot = _evict(bank, _ranks(bank, e, delta, choose), delta, idle)
            else:
                slot = max(range(capacity), key=lambda s: need[s])
        bank, placement = _put(bank, e, slot, delta, choose)
        placements.append(placement)
    return BankPlan(
        np.array([p.slot for p in placements], np.int32),
        np.array([p.visible for p in placements], bool).reshape(len(placements), capacity),
        [p.selected for p in placements],
    )


def place_rows(
    banks: Iterable[BankState],
    embeddings: Iterable,
    delta: float = 0.02,
    select: Select | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Place the clips of a batch as they come, each row in its own bank by `next_slot`.

    banks: one per row.  embeddings: per clip [B, E], taken one at a time.  delta, select: as there.
    Yields (slot int32 [B], visible bool [B, capacity]) per clip, before it asks for the next.
    """
    banks = list(banks)
    for rows in embeddings:
        pairs = zip(banks, rows, strict=True)
        placed = [next_slot(bank, e, delta=delta, select=select) for bank, e in pairs]
        banks = [bank for bank, _ in placed]
        yield stacked([p for _, p in placed])


def stacked(rows: list[Placement]) -> tuple[np.ndarray, np.ndarray]:
    """The placements of a batch: slot int32 [B], visible bool [B, capacity]."""
    return np.array([p.slot for p in rows], np.int32), np.stack([p.visible for p in rows])


def plan_rows(
    embeddings: Iterable, capacity: int, delta: float = 0.02, select: Select | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `place_rows`, with `plan_bank`: all embeddings are taken first."""
    rows = np.stack(list(embeddings), axis=1)
    plans = [plan_bank(e, capacity, delta=delta, select=select) for e in rows]
    for i in range(len(plans[0].slot)):
        yield np.array([p.slot[i] for p in plans]), np.stack([p.visible[i] for p in plans])


def unit(embedding, width: int) -> np.ndarray:
    """An embedding [width] in float64, of unit length.

    Raises: InputError unless it is one.
    """
    e = np.asarray(embedding, np.float64)
    if e.shape != (width,) or not np.all(np.isfinite(e)):
        raise InputError(f"prompt embedding of shape {e.shape}; expected [{width}] finite numbers")
    return e / max(float(np.sqrt((e * e).sum())), 1e-12)


def nearness(embeddings: np.ndarray, e: np.ndarray, delta: float) -> np.ndarray:
    """Cosine in whole units of delta; summed row by row, so that it does not depend on how many
    rows there are."""
    return np.round(np.round((embeddings * e).sum(-1), 9) / delta).astype(np.int64)


def _in_order(bank: BankState, without: int | None = None) -> np.ndarray:
    """Occupied slots in order of their clips."""
    slots = np.argsort(bank.clip, kind="stable")
    return np.array([s for s in slots if bank.clip[s] >= 0 and s != without], np.int64)


def _select(bank: BankState, slots: np.ndarray, e, delta: float, choose: Select) -> np.ndarray:
    """The slots among `slots` that a clip of embedding e selects, best first."""
    return (
        slots[choose(bank.clip[slots], nearness(bank.embedding[slots], e, delta))]
        if len(slots)
        else slots
    )


def _free_slot(bank: BankState) -> int | None:
    free = np.flatnonzero(bank.clip < 0)
    return int(free[0]) if len(free) else None


def _ranks(bank: BankState, e, delta: float, choose: Select) -> np.ndarray:
    """int64 [capacity]: place of each clip in the new clip's selection, NEVER when it is not
    selected."""
    rank = np.full(len(bank.clip), NEVER)
    selected = _select(bank, _in_order(bank), e, delta, choose)
    rank[selected] = np.arange(len(selected))
    return rank


def _evict(
    bank: BankState, rank: np.ndarray, delta: float, allowed: np.ndarray | None = None
) -> int:
    """The slot to take, by the rule in `next_slot`, among those allowed."""
    same = nearness(np.ones((1, 1)), np.ones(1), delta)[0]
    shadow = [
        np.sum((nearness(bank.embedding, e, delta) == same) & (bank.clip < clip))
        for e, clip in zip(bank.embedding, bank.clip, strict=True)
    ]
    order = np.lexsort((bank.clip, bank.used, -np.array(shadow), -rank))
    return int(order[0] if allowed is None else next(s for s in order if allowed[s]))


def _put(
    bank: BankState, e, slot: int, delta: float, choose: Select
) -> tuple[BankState, Placement]:
    """Select among the clips outside `slot`, then write the new clip there."""
    clip = bank.count
    chosen = _select(bank, _in_order(bank, without=slot), e, delta, choose)
    selected = bank.clip[chosen].tolist()
    clips, embedding, used = bank.clip.copy(), bank.embedding.copy(), bank.used.copy()
    used[chosen] = clip
    clips[slot], embedding[slot], used[slot] = clip, e, clip
    visible = np.zeros(len(clips), bool)
    visible[chosen] = visible[slot] = True
    return BankState(clips, embedding, used, clip + 1), Placement(clip, slot, visible, selected)


def _wanted(units: np.ndarray, delta: float, choose: Select) -> list[list[tuple[int, int]]]:
    """For each clip, (later clip, rank there) wherever one would select it from an unbounded bank,
    in order of time."""
    wanted: list[list[tuple[int, int]]] = [[] for _ in units]
    for j in range(1, len(units)):
        for rank, i in enumerate(choose(np.arange(j), nearness(units[:j], units[j], delta))):
            wanted[i].append((j, rank))
    return wanted


def _next_use(uses: list[tuple[int, int]], j: int) -> tuple[int, int]:
    """The first use at clip j or later, (NEVER, 0) when there is none."""
    at = bisect_left(uses, (j, 0))
    return uses[at] if at < len(uses) else (NEVER, 0)
