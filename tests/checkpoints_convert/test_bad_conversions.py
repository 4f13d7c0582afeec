# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that must not become a model: `lvjax convert` ends in one line, at once, in little
memory, and leaves nothing; `lvjax.load` takes none of them either.
"""

import pytest

import lvjax
from lvjax.cli.main import main
from lvjax.core.errors import CheckpointError
from tests.checkpoints_convert.bad_conversions import CASES, DIT, VAE, case, same
from tests.checkpoints_convert.bad_files import Case, Outcome, build, complaint, listing, outcomes

PROGRAM = """
import contextlib, io
from pathlib import Path

import lvjax.cli.convert
from lvjax.cli.main import main
from lvjax.core.errors import CheckpointError, InputError

def use(path):
    src, *options = json.loads((Path(path) / "arguments.json").read_text())
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(["convert", f"{path}/{src}", f"{path}/dst", *options])
    if code:
        kinds = {2: InputError, 3: CheckpointError}
        raise kinds.get(code, RuntimeError)(said.getvalue().removesuffix("\\n"))
"""
NAMES = [c.name for c in CASES]
# Whose folder holds no transformer, or that are converted alone: nothing for `lvjax.load`; or where
# only a conversion has a type to choose.
ALONE = {"more than float16 holds", "--part of something else", "--part that is not there"}
ALONE |= {"--part that is damaged", "layers of two types"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict[str, Outcome], dict, dict]:
    """(outcomes, files before, files after)."""
    folder, built = tmp_path_factory.mktemp("bad"), {}

    def remember(c: Case) -> Case:
        def make(place):
            path = c.make(place)
            built.update(listing(place))
            return path

        return c._replace(make=make)

    found = outcomes(map(remember, CASES), folder, PROGRAM, blocked=("torch",))
    return found, built, listing(folder)


@pytest.mark.parametrize("c", CASES, ids=NAMES)
def test_a_bad_checkpoint_is_refused(measured, c):
    assert complaint(c, measured[0][c.name]) is None


def test_nothing_is_written(measured):
    _, before, after = measured
    assert {path: facts for path, facts in after.items() if path in before} == before
    rest = {path.rsplit("/", 1)[-1] for path in after.keys() - before.keys()}
    assert rest == {"cases", "home", *map(str, range(len(CASES)))}


@pytest.mark.parametrize("c", [c for c in CASES if c.name not in ALONE], ids=lambda c: c.name)
def test_none_is_loaded_in_silence(tmp_path, c):
    build(c, tmp_path / "case")
    with pytest.raises(CheckpointError):
        lvjax.load(tmp_path / "case" / "src")


def test_the_same_folder_without_the_damage_is_converted(tmp_path):
    build(case("whole", "", {DIT: same, VAE: same}), tmp_path / "case")
    src, dst = tmp_path / "case" / "src", tmp_path / "dst"
    assert main(["convert", str(src), str(dst)]) == 0
    assert set(lvjax.load(dst).parts) == set(lvjax.load(src).parts) == {"dit", "vae"}
