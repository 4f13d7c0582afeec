# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from top to bottom at its smallest size and stores no outputs."""

import json
import os
import re
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"


def executed(name, folder, monkeypatch):
    """A notebook with the outputs that it has at its smallest size."""
    monkeypatch.setenv("LVJAX_TINY", "1")
    commands = Path(sys.executable).parent  # where `lvjax` is, also outside an active environment
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert not any(c.get("outputs") for c in notebook.cells), "clear the outputs before committing"
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(folder)}}
    ).execute()
    json.dumps(notebook)
    return notebook


def printed(notebook) -> str:
    """Everything that its cells show as text."""
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    shown = (o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)
    return "\n".join(shown)


@pytest.mark.filterwarnings("ignore")
def test_quickstart(tmp_path, monkeypatch):
    executed("01_quickstart", tmp_path, monkeypatch)


@pytest.mark.filterwarnings("ignore")
def test_convert_and_run_wan(tmp_path, monkeypatch):
    said = printed(executed("02_convert_and_run_wan", tmp_path, monkeypatch))
    assert said.count("arrays have their place") == 3 and "wan2.1-t2v-1.3b" in said
    assert said.count("arrays accounted for") == 3 and "rank 4 beside 1 weight" in said
    assert "(1, 5, 32, 48, 3)" in said and "lvjax: " not in said
    change = re.search(r"mean change of a pixel: (\S+)", said)
    assert change is not None and float(change[1]) > 0.1
    assert "26 steps with high noise, 14 with low, guidance (4.0, 3.0)" in said
    assert "15 steps with high noise, 25 with low" in said
    assert (tmp_path / "fox.mp4").stat().st_size > 500


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_error_free(tmp_path, monkeypatch):
    said = printed(executed("03_error_free", tmp_path, monkeypatch))
    assert float(re.search(r"mean of the estimates from the sample: (\S+)", said)[1]) < 1e-5
    apart = re.findall(r"sum and secant differ by (\S+)", said)
    assert len(apart) == 3 and max(map(float, apart)) < 1e-5
    full, low, window = (float(x) for x in re.findall(r"after 12 clips: (\S+)", said))
    assert full > 3 and max(low, window) < 1.2  # what the text says of them
    assert said.count("(25, 64, 64, 3)") == 3


def test_every_notebook_is_run():
    tested = {"01_quickstart", "02_convert_and_run_wan", "03_error_free"}
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == tested


def test_quickstart_reaches_a_video_in_under_ten_cells():
    notebook = nbformat.read(FOLDER / "01_quickstart.ipynb", as_version=4)
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    assert next(i for i, c in enumerate(code) if "Video(" in c and "embed" in c) < 9
