# SPDX-License-Identifier: Apache-2.0
"""Progress: a bar on a terminal, with the time that is left, and lines elsewhere."""

import io

import pytest

from lvjax.cli.bar import Bar


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_or_lines(monkeypatch, terminal):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stderr", out)
    with Bar(8, "clip") as bar:
        bar(3, "a\n.mp4", "1/2: a\n.mp4")
        bar(4, "b.mp4", None)
        bar(8, "b.mp4", "2/2: b.mp4")
    said = out.getvalue()
    if not terminal:
        assert said == "1/2: a\\n.mp4\n2/2: b.mp4\n"
        return
    assert "0/8" in said and "8/8" in said.splitlines()[-1] and "b.mp4]" in said
    assert "1/2" not in said and "a\n" not in said
