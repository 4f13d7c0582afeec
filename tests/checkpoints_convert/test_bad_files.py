# SPDX-License-Identifier: Apache-2.0
"""Every bad file is refused: one line, at once, in little memory, nothing run and nothing written.

And the other way round: the same files without the damage are read, the payloads are live where
something runs them, and a check that is taken out is missed.
"""

import io
import pickle
import random

import numpy as np
import pytest

from checkpoints_convert import files, read, read_pickle, read_safetensors, read_torch, read_zip
from checkpoints_convert import tensors as arrays
from lvjax.core.errors import CheckpointError
from tests.checkpoints_convert import bad_files, bad_pickles, bad_safetensors, bad_torch
from tests.checkpoints_convert.bad_files import CASES, Case, Outcome, build, complaint

NAMES = [case.name for case in CASES]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(outcomes, files before, files after)."""
    folder = tmp_path_factory.mktemp("bad")
    built = {}

    def remember(case: Case) -> Case:
        def make(place):
            path = case.make(place)
            built.update(bad_files.listing(place))
            return path

        return case._replace(make=make)

    found = bad_files.outcomes(map(remember, CASES), folder)
    return found, built, bad_files.listing(folder)


def test_the_corpus_is_large_and_every_case_has_a_name():
    assert len(CASES) >= 60 and len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_bad_file_is_refused(measured, case):
    assert complaint(case, measured[0][case.name]) is None


def test_nothing_is_run_and_nothing_is_written(measured):
    _, before, after = measured
    own = {path: facts for path, facts in after.items() if path in before}
    assert own == before  # also that no file is gone
    rest = {path.rsplit("/", 1)[-1] for path in after.keys() - before.keys()}
    assert rest == {"cases", "home", *map(str, range(len(CASES)))}  # the folders that were made
    assert not any("canary" in path for path in after)


def test_a_case_that_misbehaves_is_noticed():
    case = Case("x", lambda folder: folder, "is wrong")
    good = Outcome("CheckpointError", "a is wrong; b", 0.1, 3.0)
    assert complaint(case, good) is None
    for change in (
        {"kind": None},
        {"kind": "ValueError"},
        {"says": "a is right"},
        {"says": "a is wrong\nb"},
        {"says": "a is wrong" + "b" * 1000},
        {"seconds": 1.1},
        {"megabytes": 65.0},
    ):
        assert complaint(case, good._replace(**change))


LIVE = [(name, 2, make) for name, make in bad_pickles.LIVE.items()]
LIVE += [(name, 4, make) for name, make in bad_pickles.LIVE_4.items()]


@pytest.mark.parametrize(("name", "protocol", "make"), LIVE, ids=[name for name, *_ in LIVE])
def test_the_payloads_are_live(tmp_path, name, protocol, make):
    canary = tmp_path / "canary"
    pickle.load(io.BytesIO(bad_pickles.program(make(str(canary)), protocol)))
    assert canary.exists()


def test_the_same_files_without_the_damage_are_read(tmp_path):
    own = np.arange(6, dtype=np.float32)
    (tmp_path / "a.safetensors").write_bytes(bad_safetensors.GOOD)
    (tmp_path / "a.pth").write_bytes(bad_pickles.archive())
    (tmp_path / "b.pth").write_bytes(bad_torch.zip64({}))
    (tmp_path / "c.pth").write_bytes(bad_pickles.one(0, (3, 2), (1, 3)))
    tensors, _ = read.open_checkpoint(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(tensors["a"], own[:4].reshape(2, 2))
    np.testing.assert_array_equal(tensors["b"], own[4:])
    for name in ("a.pth", "b.pth"):
        tensors, _ = read.open_checkpoint(tmp_path / name)
        np.testing.assert_array_equal(tensors["w"], own.reshape(2, 3))
    tensors, _ = read.open_checkpoint(tmp_path / "c.pth")
    np.testing.assert_array_equal(tensors["w"], own.reshape(2, 3).T)
    both = bad_safetensors.both("a.safetensors")
    tensors, _ = read.open_checkpoint(bad_safetensors.index(both)(tmp_path))
    assert tensors.keys() == {"a", "b"}


class Everything:
    """A set that holds all names."""

    def __contains__(self, name) -> bool:
        return True


def _no_check(*arguments) -> None:
    pass


def _any_view(storage, dtype, offset, shape, strides):
    return read_torch.Tensor(storage, dtype, offset, shape, strides)


MUTANTS = {  # what is taken out -> the case that tells
    "the list of names": (read_torch, "TOLERATED", Everything(), "payload: os.system"),
    "the list of opcodes": (
        read_pickle,
        "STEPS",
        read_pickle.STEPS | {0x82: lambda m: m.stack.append(m.number(read_pickle.U1))},
        "payload: extension registry, one byte",
    ),
    "the cap on opcodes": (read_pickle, "STEPS_MAX", 10**8, "pickle: 200,000 dicts, kept"),
    "the bounds of views": (read_torch, "view", _any_view, "tensor: stride past the storage"),
    "the check of overlaps": (read_torch, "view", _any_view, "tensor: windows that overlap"),
    "the cap on shares": (read_torch, "SHARES_MAX", 10**9, "tensor: 40 arrays of the same bytes"),
    "the byte order": (read_torch, "LITTLE", b"big", "zip: big-endian"),
    "the names of entries": (read_zip, "_name", bytes.decode, "zip: a name in the folder above"),
    "the checksums": (
        read_zip,
        "Record",
        lambda start, size, crc: read_torch.Record(start, size, 0),
        "tensor: storage with a bit flipped",
    ),
    "encryption": (read_zip, "ENCRYPTED", 0, "zip: encrypted"),
    "the finite check": (arrays, "check_finite", _no_check, "safetensors: NaN in BF16"),
    "the places of arrays": (
        read_safetensors,
        "_check_places",
        _no_check,
        "safetensors: place overlaps",
    ),
    "the end of the file": (
        read_safetensors,
        "_check_places",
        _no_check,
        "safetensors: one byte more",
    ),
    "fields that stand there twice": (
        read_safetensors,
        "decode",
        files.json.loads,
        "safetensors: a field twice",
    ),
    "the names of shards": (read, "check_shard", _no_check, "index: shard in the folder above"),
    "the kind of a file": (files, "_regular", _no_check, "index: shard is a device"),
    "names that become one": (
        read,
        "renamed",
        lambda entries, names: {names[k]: e for k, e in entries.items()},
        "safetensors: two wrapped names are one",
    ),
    "git-lfs pointers": (read, "sign", lambda head: None, "safetensors: a git-lfs pointer"),
}


def refused(case: Case, path) -> bool:
    """Whether a case is refused as it should be."""
    try:
        tensors, _ = read.open_checkpoint(path)
        for name in tensors:
            tensors[name]
    except CheckpointError as e:
        return case.says in str(e) and "\n" not in str(e)
    return False


@pytest.mark.parametrize(("module", "name", "without", "tells"), MUTANTS.values(), ids=MUTANTS)
def test_a_check_that_is_taken_out_is_missed(tmp_path, monkeypatch, module, name, without, tells):
    case = next(case for case in CASES if case.name == tells)
    path = build(case, tmp_path / "case")
    assert refused(case, path)
    monkeypatch.setattr(module, name, without)
    assert not refused(case, path)
    assert not (tmp_path / "case" / "canary").exists()


def _same(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize(
    ("good", "wrap"),
    [
        (bad_safetensors.GOOD, _same),
        (bad_pickles.archive(), _same),
        (bad_torch.zip64({}), _same),
        (bad_pickles.GOOD, bad_pickles.archive),
    ],
    ids=["safetensors", "zip", "zip64", "pickle"],
)
def test_random_damage_ends_in_one_way_only(tmp_path, good, wrap):
    """A changed byte is refused, or what is read is no more than the file holds."""
    rng, path, read_well = random.Random(0), tmp_path / "model", 0
    for _ in range(250):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 5))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(wrap(bytes(data)))
        try:
            tensors, _ = read.open_checkpoint(path)
            assert sum(tensors[name].nbytes for name in tensors) <= path.stat().st_size
            read_well += 1
        except CheckpointError as e:
            assert "\n" not in str(e)
    assert 0 < read_well < 250
