# SPDX-License-Identifier: Apache-2.0
"""Clips that leave the bank for files and come back: every clip is what it would be with a memory
without an end, whatever happens between two clips.
"""

import json
import shutil
from collections import namedtuple

import jax
import numpy as np
import pytest

import lvjax
from lvjax.core.errors import CheckpointError, InputError, StorageError
from lvjax.memory.placement import plan_bank
from lvjax.rollout.method import _step, stream
from lvjax.run import card as cards
from lvjax.run import job, spill
from lvjax.run import plan as plans
from lvjax.run.encoders import open_prompts
from lvjax.run.plan import make_plan, work_of
from lvjax.run.request import Request
from lvjax.run.spill import ClipFiles
from lvjax.run.state import state_path
from tests.run.test_selection import choosing, timeline
from tests.tiny import relative, tiny_bundle

STORY = "ABCADBCA"
T, GRID = 5, 4  # latent frames of a clip, tokens of each


@pytest.fixture(scope="module")
def bundle():
    """Three slots, two for other clips, and files."""
    return choosing(tiny_bundle(), steps=2, max_selected=2, capacity=3, spill=True)


def session(bundle, *stories):
    rows = [timeline(story)[0] for story in stories]
    return lvjax.prepare(bundle, rows, num_frames=timeline(stories[0])[1])


@pytest.fixture(scope="module")
def whole(bundle, tmp_path_factory):
    """The latents of a run [K, B, ...], the states after its clips, and its files."""
    files, latents, states = ClipFiles(tmp_path_factory.mktemp("run") / "clips", "mine"), [], []
    for clip in session(bundle, STORY).run(files=files):
        latents.append(np.asarray(clip.latents))
        states.append(jax.tree.map(np.array, clip.state))
    return np.stack(latents), states, files


def latents_of(bundle, story=STORY):
    return np.stack([np.asarray(c.latents) for c in session(bundle, story).run()])


def slot_of(slot: int):
    """Where a clip slot is among tokens, and among frames."""
    return slice(slot * T * GRID, (slot + 1) * T * GRID), slice(slot * T, (slot + 1) * T)


def unbounded(bundle, story: str) -> list[list[int]]:
    """What each clip selects of all clips before it."""
    prompts = [text for _, text in timeline(story)[0]]
    feature = open_prompts(bundle, prompts).feature
    return plan_bank(np.stack([feature(p) for p in prompts]), 8, max_selected=2).selected


def remembered(state, kept, slots):
    """A state whose memory is nothing but the clips kept[row, clip] in slots[row][clip]."""
    cache, batch = state.cache, len(slots)
    k, v = (np.zeros(a.shape, a.dtype) for a in (cache.k, cache.v))
    frame = np.full(cache.frame.shape, -1, np.int32)
    for row, seen in enumerate(slots):
        for clip, slot in seen.items():
            tokens, frames = slot_of(slot)
            passes = [row, batch + row]
            k[:, passes, tokens], v[:, passes, tokens], frame[passes, frames] = kept[row, clip]
    return state.replace(cache=cache.replace(k=k, v=v, frame=frame))


@pytest.mark.parametrize("stories", [(STORY,), (STORY, "AABBCCAB")], ids=len)
def test_every_clip_is_that_of_a_memory_without_an_end(bundle, stories, tmp_path):
    """Bit for bit: all clips are kept here, and each sees those that an unbounded bank selects, in
    the slots that it has; the other slots are empty.  Two rows are on two devices, and move other
    clips at other times.
    """
    run, files = session(bundle, *stories), ClipFiles(tmp_path / "clips")
    assert len(run.state().condition.sharding.device_set) == len(stories)
    made, ideal = run.run(files=files), [unbounded(bundle, story) for story in stories]
    state, kept, held, back = run.state(), {}, [{} for _ in stories], 0
    for i, (given, away, returned) in enumerate(run.clips(0)):
        own, visible, slots = np.asarray(given.slot).tolist(), np.asarray(given.visible), []
        for row, where in enumerate(held):
            assert all(where[slot] == clip for slot, clip in away[row])
            where |= dict(returned[row]) | {own[row]: i}
            seen = np.flatnonzero(visible[row]).tolist()
            slots.append({where[s]: s for s in seen if s != own[row]})
            assert sorted(slots[row]) == sorted(ideal[row][i])
            back += len(returned[row])
        state = run.place(remembered(state, kept, slots))
        state, (latents, _) = next(stream(run.method, state, (given,)))
        np.testing.assert_array_equal(latents, next(made).latents)
        for row, slot in enumerate(own):
            (tokens, frames), passes = slot_of(slot), [row, len(own) + row]
            k, v = (np.array(a)[:, passes, tokens] for a in (state.cache.k, state.cache.v))
            kept[row, i] = k, v, np.array(state.cache.frame)[passes, frames]
    assert next(made, None) is None and back >= 3 * len(stories)
    rows = [{p.name[7:] for p in files.folder.glob(f"{row:06d}-*")} for row in range(2)]
    assert len(rows[0]) >= 4 and rows[0] != rows[1]


def test_it_is_near_a_bank_that_never_evicts_and_a_small_bank_is_not(bundle, whole):
    """Near only: sums over another number of slots round otherwise, clip 3 by 1e-7."""
    never = latents_of(choosing(bundle, capacity=8, spill=False))
    lost = latents_of(choosing(bundle, spill=False))
    assert max(map(relative, whole[0], never)) < 2e-4
    assert relative(whole[0][3], never[3]) < 1e-6
    assert all(relative(a, b) > 3e-3 for a, b in zip(lost[4:], never[4:], strict=True))


def test_python_needs_no_folder(bundle, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(spill.tempfile, "tempdir", str(tmp_path))
    run, seen = session(bundle, STORY).run(), []
    for i, clip in enumerate(run):
        np.testing.assert_array_equal(clip.latents, whole[0][i])
        seen.append(len(list(tmp_path.glob("*/*.safetensors"))))
    assert max(seen) >= 4 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("after", [2, 5])
def test_a_run_goes_on_from_any_state_with_its_files(bundle, whole, after, tmp_path):
    """Those too that were written after the state was saved, or half."""
    latents, states, files = whole
    again = ClipFiles(tmp_path / "clips", files.run)
    shutil.copytree(files.folder, again.folder)
    (again.folder / ".000000-00000007.safetensors.tmp").write_bytes(b"half")
    run = session(bundle, STORY)
    before = _step._cache_size()
    for i, clip in enumerate(run.run(run.place(states[after]), after + 1, again), after + 1):
        np.testing.assert_array_equal(clip.latents, latents[i])
    assert _step._cache_size() <= before + 1 and i == 7
    again.clear()
    assert not again.folder.exists()


def test_the_step_is_compiled_once(bundle, whole):
    list(session(bundle, STORY).run())
    before = _step._cache_size(), spill._read._cache_size(), spill._write._cache_size()
    list(session(bundle, STORY[::-1]).run())
    assert (_step._cache_size(), spill._read._cache_size(), spill._write._cache_size()) == before


# ---- files -------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "missing": (lambda path: path.unlink(), "which is not there; restore"),
    "flipped": (flip, "does not match its checksum"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is not a readable lvjax file"),
    "another": (
        lambda path: path.write_bytes(path.with_name(path.name.replace("0.s", "1.s")).read_bytes()),
        "is not clip 0 of video 0 of this run",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named(bundle, whole, name, tmp_path):
    _, states, files = whole
    again, (make, says) = ClipFiles(tmp_path / "clips", files.run), DAMAGE[name]
    shutil.copytree(files.folder, again.folder)
    make(again.path(0, 0))
    run = session(bundle, STORY)
    with pytest.raises(CheckpointError, match=says) as e:
        list(run.run(run.place(states[6]), 7, again))
    assert str(again.path(0, 0)) in str(e.value) and "\n" not in str(e.value)


def test_files_of_another_run_are_refused(bundle, whole):
    _, states, files = whole
    run = session(bundle, STORY)
    with pytest.raises(CheckpointError, match="is not clip . of video 0 of this run"):
        list(run.run(run.place(states[6]), 7, ClipFiles(files.folder, "other")))


def test_a_folder_is_cleared_of_its_own_files_alone(tmp_path):
    files = ClipFiles(tmp_path / "clips")
    files.clear()
    for clip in (1, 12):
        files.save(0, clip, {"k": np.zeros(3, np.float32)})
    assert files.size() == sum(p.stat().st_size for p in files.folder.iterdir()) > 24
    (files.folder / "notes.txt").write_text("precious")
    files.clear()
    assert [p.name for p in files.folder.iterdir()] == ["notes.txt"]
    for place in ("file", "link"):
        path = spill.clips_path(tmp_path / place)
        path.write_text("") if place == "file" else path.symlink_to(files.folder)
        with pytest.raises(InputError, match="is no folder"):
            spill.check_place(tmp_path / place)
    with pytest.raises(StorageError, match="cannot write"):
        ClipFiles(spill.clips_path(tmp_path / "file")).save(0, 0, {})


# ---- a run with files --------------------------------------------------------------


def begun(bundle, output):
    moments, frames = timeline(STORY)
    request = Request((tuple(moments),), frames)
    options = job.options_of(request, bundle, "tiny")
    job.start(bundle, request, output, cards.make_card(options, weights={}, inputs={}))


def digest(output) -> str:
    return json.loads(cards.card_path(output).read_text())["latents"]


@pytest.fixture(scope="module")
def finished(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    begun(bundle, folder / "a.mp4")
    sizes = [spill_size(folder / "a.mp4") for _ in job.proceed(bundle, folder / "a.mp4")]
    assert sorted(p.name for p in folder.iterdir()) == ["a.mp4", "a.mp4.json"]
    return digest(folder / "a.mp4"), sizes


def spill_size(output) -> int:
    return ClipFiles(spill.clips_path(output)).size()


class Killed(BaseException):
    """Stands for a signal that ends everything."""


MOMENTS = {"before the state": (job, "save_state"), "in a file": (spill, "save_arrays")}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("at", [4, 6])
def test_a_kill_between_a_file_and_the_state(bundle, finished, moment, at, tmp_path, monkeypatch):
    """What is saved fits together: the run goes on to the same latents."""
    output, (module, name) = tmp_path / "a.mp4", MOMENTS[moment]
    begun(bundle, output)
    original = getattr(module, name)

    def killed(path, *args):
        if job.position(output)[0] == at:
            raise Killed
        original(path, *args)

    monkeypatch.setattr(module, name, killed)
    with pytest.raises(Killed):
        list(job.proceed(bundle, output))
    monkeypatch.undo()
    assert job.position(output)[0] == at and spill_size(output) > 0
    list(job.proceed(bundle, output))
    assert digest(output) == finished[0] and not spill.clips_path(output).exists()


def test_a_new_run_has_nothing_of_the_one_before(bundle, finished, tmp_path):
    output = tmp_path / "a.mp4"
    begun(bundle, output)
    list(job.proceed(bundle, output, stop=lambda: job.position(output)[0] == 6))
    there = {p.name: p.read_bytes() for p in spill.clips_path(output).iterdir()}
    assert len(there) >= 3 and state_path(output).exists()
    begun(choosing(bundle, steps=3), output)
    assert there.keys() == {p.name for p in spill.clips_path(output).iterdir()}
    next(job.proceed(bundle, output))
    assert not spill.clips_path(output).exists()


def test_the_plan_counts_the_files(bundle, finished, tmp_path, monkeypatch):
    moments, frames = timeline(STORY)
    request = Request((tuple(moments),), frames)
    plan, without = (
        make_plan(b, work_of(request, b)) for b in (bundle, choosing(bundle, spill=False))
    )
    most = max(finished[1])
    assert most <= 1.15 * plan.spilled and plan.spilled == pytest.approx(most, rel=0.15)
    assert plan.disk == without.disk + plan.spilled and plan.memory == without.memory
    assert "for clips that leave it" in plans.describe(plan, 1e9)
    few = Request(((tuple(moments)[0],),), frames)  # one prompt: two clips are ever seen again
    assert work_of(few, bundle).clip.spilled == 2
    assert work_of(Request((tuple(moments),) * 2, frames), bundle).clip.spilled == 14
    free = namedtuple("Usage", "free")
    monkeypatch.setattr(plans.shutil, "disk_usage", lambda _: free(plan.disk - 1))
    with pytest.raises(StorageError, match="leave defaults.spill out") as e:
        plans.check_disk(plan, tmp_path / "a.mp4")
    assert e.value.code == 6 and "\n" not in str(e.value)
    ClipFiles(spill.clips_path(tmp_path / "a.mp4")).save(0, 0, {})
    plans.check_disk(plan, tmp_path / "a.mp4")  # of a run that goes on
    monkeypatch.setattr(plans.shutil, "disk_usage", lambda _: free(plan.spilled - 1))
    with pytest.raises(StorageError, match="set TMPDIR"):
        session(bundle, STORY)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"capacity": 2}, "capacity 2; a clip and the 2 that it may see need at least 3"),
        ({"selection": "last"}, "selection 'last', which never goes back"),
        ({"lookahead": True}, "leave lookahead out"),
        ({"spill": 1}, "defaults.spill is 1; give True or False"),
    ],
)
def test_what_speaks_against_it(bundle, change, says):
    with pytest.raises(InputError) as e:
        choosing(bundle, **change)
    said = str(e.value)
    assert said.startswith("defaults.spill is ") and says in said and "\n" not in said
