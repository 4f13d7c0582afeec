# SPDX-License-Identifier: Apache-2.0
"""Which clips a session's clips see, by the policy that the defaults name."""

import dataclasses

import jax
import numpy as np
import pytest

import lvjax
from lvjax.core.errors import CheckpointError, InputError
from lvjax.run import open_error_free
from lvjax.run.encoders import open_prompts
from lvjax.run.plan import make_plan, work_of
from lvjax.run.request import Request
from lvjax.run.selection import with_encoder
from lvjax.run.sentence import features
from lvjax.run.session import OPENINGS
from lvjax.run.weights import save
from tests.sentence_folder import sentence_folder, their_model
from tests.tiny import relative, tiny_bundle

COLOURS = ("red", "green", "blue", "cyan")
STORY = "ABACDABCDDABCA"


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle()


def choosing(bundle, **defaults):
    return dataclasses.replace(bundle, defaults=dataclasses.replace(bundle.defaults, **defaults))


def timeline(story: str):
    """A prompt per clip, and the frames of as many clips."""
    begins = [0.0] + [(17 + 12 * i) / 8 for i in range(len(story) - 1)]
    prompts = [f"a {COLOURS['ABCD'.index(c)]} circle moves up" for c in story]
    return list(zip(begins, prompts, strict=True)), 17 + 12 * (len(story) - 1)


def seen(bundle, story: str = STORY, start: int = 0) -> list[set[int]]:
    """The earlier clips that each clip sees, by what is in the slots at that moment."""
    moments, frames = timeline(story)
    session = lvjax.prepare(bundle, moments, num_frames=frames)
    held, found = {}, []
    for i, clip in enumerate(session.clips(0)):
        (slot,), (visible,) = np.asarray(clip.slot), np.asarray(clip.visible)
        assert visible[slot]
        held[int(slot)] = i
        found.append({held[s] for s in np.flatnonzero(visible).tolist()} - {i})
    rest = list(session.clips(start))
    assert len(rest) == len(found) - start
    return found


def latest(i: int, count: int) -> set[int]:
    return set(range(max(0, i - count), i))


RULES = {
    "last": lambda i, most: latest(i, most),
    "first_last": lambda i, most: ({0} if i else set()) | latest(i, most - 1),
    "none": lambda i, most: set(),
}


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("selection", RULES)
@pytest.mark.parametrize("most", [1, 3])
def test_every_policy_is_followed(bundle, selection, most, lookahead):
    asked = choosing(bundle, selection=selection, max_selected=most, lookahead=lookahead)
    assert seen(asked) == [RULES[selection](i, most) for i in range(len(STORY))]


@pytest.mark.parametrize("lookahead", [False, True])
def test_prompts_choose_at_most_so_many(bundle, lookahead):
    two = choosing(bundle, max_selected=2, lookahead=lookahead, capacity=14)
    assert seen(two)[9] == {4, 8} and seen(two)[10] == {0, 2}
    assert seen(choosing(bundle, capacity=14, lookahead=lookahead))[10] > {0, 2, 5}


def test_delta_decides_what_is_near(bundle):
    """With all prompts near, the earliest clips are seen."""
    wide = choosing(bundle, capacity=14, max_selected=2, delta=2.0)
    assert seen(wide)[3:] == [{0, 1}] * 11 != seen(choosing(wide, delta=0.02))[3:]


def test_a_resumed_session_follows_the_same_policy(bundle):
    asked = choosing(bundle, selection="first_last", max_selected=2)
    moments, frames = timeline(STORY)
    session = lvjax.prepare(asked, moments, num_frames=frames)
    whole, rest = list(session.clips(0)), list(session.clips(6))
    for a, b in zip(whole[6:], rest, strict=True):
        np.testing.assert_array_equal(a.slot, b.slot)
        np.testing.assert_array_equal(a.visible, b.visible)


def latents(bundle, story="ABA", **options):
    moments, frames = timeline(story)
    return lvjax.generate(bundle, moments, num_frames=frames, **options).latents


def test_none_is_a_bank_of_one_clip(bundle, monkeypatch):
    none = latents(choosing(bundle, selection="none"))
    np.testing.assert_array_equal(none, latents(choosing(bundle, capacity=1)))
    remembering = latents(bundle)
    assert relative(none[2], remembering[2]) > 1e-3
    # the same with six slots, of which only the clip's own is seen
    monkeypatch.setattr(open_error_free, "capacity", lambda d: d.capacity)
    for mine, wide in zip(none, latents(choosing(bundle, selection="none")), strict=True):
        assert relative(mine, wide) < 1e-5


def test_the_plan_counts_the_slots_that_are_used(bundle):
    def planned(**defaults):
        asked = choosing(bundle, **defaults)
        plan = make_plan(asked, work_of(Request((((0.0, "left"),),), 41), asked))
        session = lvjax.prepare(asked, "left", num_frames=41)
        bank = jax.tree.leaves(session.abstract_state().cache)
        return plan.memory["memory of clips"], sum(a.size * a.dtype.itemsize for a in bank)

    (one, small), (six, large) = planned(selection="none"), planned()
    assert planned(capacity=1) == (one, small) and one / six == pytest.approx(small / large, 1e-3)
    assert planned(selection="last", max_selected=2) == planned(capacity=3)
    assert planned(selection="first_last", max_selected=9) == planned()
    assert planned(selection="none", capacity=9) == (one, small)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"selection": "best"}, "defaults.selection is 'best'; give one of prompt, last, first"),
        ({"selection": None}, "defaults.selection is None"),
        ({"max_selected": 0}, "defaults.max_selected is 0; give a whole number from 1"),
        ({"delta": 0}, "defaults.delta is 0; give a number from 0.000001 to 2"),
    ],
)
def test_a_policy_that_there_is_not(bundle, change, says):
    with pytest.raises(InputError) as e:
        choosing(bundle, **change)
    assert str(e.value).startswith(says) and "\n" not in str(e.value)


# ---- by a sentence encoder ---------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return sentence_folder(tmp_path_factory.mktemp("encoder") / "tiny-minilm")


def by_rule(vectors: np.ndarray, most: int, delta: float = 0.02) -> list[set[int]]:
    """The paper's rule over vectors of clips in order, in a bank without an end."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    near = np.round(units.astype(np.float64) @ units.T / delta)
    return [
        set(sorted(range(j), key=lambda i, j=j: (-near[i, j], i))[:most])
        for j in range(len(vectors))
    ]


def test_a_sentence_encoder_decides_what_is_similar(bundle, encoder):
    own = choosing(bundle, max_selected=2, capacity=14)
    asked = with_encoder(own, encoder)
    prompts = [text for _, text in timeline(STORY)[0]]
    vectors = features(asked.sentence, prompts)
    assert seen(asked) == by_rule(vectors, 2) != seen(own)
    assert seen(asked, start=5) == seen(asked)
    opened = open_prompts(asked, prompts)
    assert opened.dim == 32 and bundle.dit.text_dim == 16
    np.testing.assert_array_equal(opened.feature(prompts[0]), vectors[0])
    np.testing.assert_array_equal(
        opened.rows((prompts[0],)), open_prompts(own, prompts).rows((prompts[0],))
    )
    moments, frames = timeline("ABA")
    for lookahead in (False, True):
        few = choosing(asked, capacity=2, lookahead=lookahead)
        assert len(list(lvjax.prepare(few, moments, num_frames=frames).clips(0))) == 3


def test_load_takes_an_encoder_and_the_plan_counts_it(bundle, encoder, tmp_path):
    save(tmp_path, bundle)
    plain, asked = lvjax.load(tmp_path), lvjax.load(tmp_path, selection_encoder=encoder)
    assert asked.hashes == plain.hashes | {"selection encoder": asked.sentence.sha256}
    assert asked.sentence.name == "tiny-minilm" and plain.sentence is None
    work = work_of(Request((((0.0, "left"),),), 41), bundle)
    a, b = (make_plan(model, work) for model in (plain, asked))
    size = sum(a.numel() * 4 for name, a in their_model().state_dict().items() if is_used(name))
    assert b.memory == a.memory | {"selection encoder": size}
    with pytest.raises(InputError, match="wan remembers no clips"):
        OPENINGS["wan"].check(asked, Request((((0.0, "left"),),), 41))
    for wrong in (3, "", "a\0b", ["x"]):
        with pytest.raises(InputError, match="the selection encoder is") as e:
            lvjax.load(tmp_path, selection_encoder=wrong)
        assert "\n" not in str(e.value)
    with pytest.raises(CheckpointError, match="has no modules.json"):
        lvjax.load(tmp_path, selection_encoder=tmp_path)


def is_used(name: str) -> bool:
    """Whether an array of BERT's takes part in features; that of the pooler does not."""
    return not name.startswith("pooler") and not name.endswith("position_ids")
