# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from top to bottom at its smallest size and stores no outputs."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("LVJAX_TINY", "1")
    notebook = nbformat.read(path, as_version=4)
    assert not any(c.get("outputs") for c in notebook.cells), "clear the outputs before committing"
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    json.dumps(notebook)


def test_quickstart_reaches_a_video_in_under_ten_cells():
    notebook = nbformat.read(FOLDER / "01_quickstart.ipynb", as_version=4)
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    assert next(i for i, c in enumerate(code) if "Video(" in c and "embed" in c) < 9
