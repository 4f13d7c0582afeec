# SPDX-License-Identifier: Apache-2.0
"""Videos with captions in a folder: what is found, what is left out, and the TFDS builder."""

import json
import os
import sys
import warnings

import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.data.captioned import find_videos, frames_of
from lvjax.data.captions import captions
from lvjax.io.image import fit_image
from lvjax.io.video import FragmentedWriter, read_video


def write(path, frames=12, fps=8, size=(48, 32), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with FragmentedWriter(path, size, fps, {}) as out:
        rows = rng.integers(0, 256, (frames, 4, 6, 3), dtype=np.uint8)
        out.write_clip(rows.repeat(size[1] // 4, axis=1).repeat(size[0] // 6, axis=2))


@pytest.mark.parametrize(
    ("lines", "timeline"),
    [
        (["a boat"], ((0.0, "a boat"),)),
        (["a boat", "on a lake"], ((0.0, "a boat on a lake"),)),
        (["3 dogs run"], ((0.0, "3 dogs run"),)),
        (["a boat", "3 men row"], ((0.0, "a boat 3 men row"),)),
        (["3 dogs run", "2 cats sit"], ((0.0, "3 dogs run 2 cats sit"),)),
        (["2 dogs run", "3 cats sit"], ((0.0, "2 dogs run 3 cats sit"),)),
        (["3: dogs", "5: cats"], ((0.0, "3: dogs 5: cats"),)),
        (["3.5 million people"], ((0.0, "3.5 million people"),)),
        (["0.5 l of milk", "in a glass"], ((0.0, "0.5 l of milk in a glass"),)),
        (["0,5 l of milk"], ((0.0, "0,5 l of milk"),)),
        (["007 runs"], ((0.0, "007 runs"),)),
        (["0 0 people"], ((0.0, "0 people"),)),
        (["0, a boat", "3s, a lake"], ((0.0, "a boat"), (3.0, "a lake"))),
        (["0 boats", "3.5 a lake", "1:00 me"], ((0.0, "boats"), (3.5, "a lake"), (60, "me"))),
    ],
)  # fmt: skip
def test_captions(lines, timeline):
    assert captions(lines, "a.txt") == timeline


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (["0 a boat", "a lake"], "not a time and a prompt"),
        (["0 a boat", "5 a lake", "4 a man"], "must start at 0 and increase"),
        (["2 a boat", "5.5 a lake"], "must start at 0 and increase"),
        (["2s a boat", "1s a lake"], "must start at 0 and increase"),
        (["0:30 a boat", "1:00 a lake"], "must start at 0 and increase"),
    ],
)
def test_timelines_that_are_none(lines, what):
    with pytest.raises(InputError, match=rf"a\.txt.*{what}"):
        captions(lines, "a.txt")


def test_captions_are_beside_videos_or_in_a_table(tmp_path):
    for name in ("b.mp4", "a/c.MOV", "a/d.webm", "a/e.mkv", "f.mp4", "g.mp4", ".h.mp4", ".i/j.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.txt").write_text("\ufeff# a comment\n0 waves\n2 clouds\n", encoding="utf-8")
    (tmp_path / "g.txt").write_text("0 waves\nclouds\n")
    rows = [{"file_name": "c.MOV", "text": "a cat"}, {"file_name": "b.mp4", "text": "not this"}]
    (tmp_path / "a/metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "metadata.csv").write_text('file_name,caption\na/d.webm,"a dog, with ""bells"""\n')
    found, skipped = find_videos(tmp_path)
    assert {s.name: s.timeline for s in found} == {
        "a/c.MOV": ((0.0, "a cat"),),
        "a/d.webm": ((0.0, 'a dog, with "bells"'),),
        "b.mp4": ((0.0, "waves"), (2.0, "clouds")),
    }
    assert [s.name for s in found] == sorted(s.name for s in found)
    assert [s.video for s in skipped] == ["a/e.mkv", "f.mp4", "g.mp4"]
    assert skipped[1].reason == "has no caption in f.txt or a table"
    assert "'clouds' is not a time" in skipped[2].reason


def test_a_row_without_a_caption_costs_its_video(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    (tmp_path / "c.txt").write_text("clouds")
    breaks = "# two\u2028lines\u2029and\x85more"
    rows = [{"text": None}, {"text": breaks}, {"text": 7}, {"words": "waves"}]
    rows = [{"file_name": f"{n}.mp4", **row} for n, row in zip("abcd", rows, strict=True)]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8-sig", newline="")
    found, skipped = find_videos(tmp_path)
    assert {s.name: s.timeline for s in found} == {
        "b.mp4": ((0.0, "# two lines and more"),),
        "c.mp4": ((0.0, "clouds"),),
    }
    assert skipped == [
        (f"{n}.mp4", f"has no 'text' in metadata.jsonl, and no {n}.txt") for n in "ad"
    ]


def test_folders_without_videos_or_captions(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_videos(tmp_path / "none")
    with pytest.raises(InputError, match="holds no video"):
        find_videos(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 1 videos .* write .*a\.txt"):
        find_videos(tmp_path)
    for name, text, what in (
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}\n{"file', "line 2 is not JSON"),
        ("metadata.jsonl", '{"file": "a.mp4", "text": "x"}\n', "row 1 names no file"),
        ("metadata.csv", "file_name,words\na.mp4,x\n", "has no 'text' in metadata.csv"),
        ("metadata.jsonl", "[1]\n", "row 1 names no file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=what):
            find_videos(tmp_path)
        (tmp_path / name).unlink()


def test_frames_are_those_that_are_read_whole(tmp_path):
    write(tmp_path / "a.mp4", 12, fps=12)
    whole, _ = read_video(tmp_path / "a.mp4", fps=8)
    wanted = np.stack([fit_image(frame, (16, 16)) for frame in whole])
    found = np.stack(list(frames_of(tmp_path / "a.mp4", 8, (16, 16))))
    assert found.dtype == np.uint8 and len(found) < 12
    np.testing.assert_array_equal(found.astype(np.float32) / np.float32(127.5) - 1, wanted)


def test_builder(tmp_path):
    folder = tmp_path / "videos"
    write(folder / "a.mp4", 20)
    write(folder / "b.mp4", 5, seed=1)
    (folder / "a.txt").write_text("0 waves\n0.5 clouds\n2 a cat\n")
    (folder / "b.txt").write_text("a dog")
    (folder / "c.mp4").write_bytes(b"no video" * 50)
    (folder / "c.txt").write_text("nothing")
    (folder / "d.mp4").write_bytes(b"")
    strange = os.fsdecode(b"e\xff\n.mp4")  # no UTF-8
    write(folder / strange, 5)
    (folder / strange).with_suffix(".txt").write_text("a fox")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lvjax.data.video_folder import VideoFolder

        given = {"folder": folder, "fps": 8, "size": (16, 24), "frames": 8}
        builder = VideoFolder(data_dir=tmp_path / "data", **given)
        builder.download_and_prepare()
        source = builder.as_data_source("train")
        found = {(e["name"].decode(), int(e["first"])): e for e in source}
        again = VideoFolder(data_dir=tmp_path / "data", **given)
        other = VideoFolder(data_dir=tmp_path / "data", **given | {"fps": 4})
    assert "tensorflow" not in sys.modules
    named = [("a.mp4", 0), ("a.mp4", 8), ("a.mp4", 16), ("b.mp4", 0), ("e\\udcff\n.mp4", 0)]
    assert sorted(found) == named
    whole = np.stack(list(frames_of(folder / "a.mp4", 8, (16, 24))))
    parts = [found["a.mp4", n]["video"] for n in (0, 8, 16)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    said = [list(zip(found["a.mp4", n]["prompts"], found["a.mp4", n]["prompt_times"], strict=True))
            for n in (0, 8, 16)]  # fmt: skip
    assert said == [[(b"waves", 0), (b"clouds", 0.5)], [(b"clouds", 0)], [(b"a cat", 0)]]
    assert [s["video"] for s in again.info.metadata["skipped"]] == ["d.mp4", "c.mp4"]
    assert again.data_path == builder.data_path != other.data_path
