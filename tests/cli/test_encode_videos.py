# SPDX-License-Identifier: Apache-2.0
"""`lvjax encode --videos`: clips encoded as a rollout makes them, what is left out, and what a
kill, a signal or a full disk leaves.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lvjax.cli.main import main
from lvjax.core.checkpoint import open_arrays
from lvjax.core.errors import CheckpointError, NonFiniteError
from lvjax.data import prompts as pocket
from lvjax.data.captioned import Source, find_videos, frames_of
from lvjax.data.latent_feed import LatentFeed
from lvjax.data.latent_writer import LatentWriter
from lvjax.data.latents import Head, open_latents
from lvjax.io.video import FragmentedWriter
from lvjax.methods.error_free import ErrorFree
from lvjax.models.vae import encode
from lvjax.run import dataset, dataset_plan
from lvjax.run.bundle import outline
from lvjax.run.dataset import open_dataset, plan_layout
from lvjax.run.dataset_plan import plan_dataset
from lvjax.run.encoders import open_prompts
from lvjax.run.weights import load, save
from tests.tiny import tiny_bundle

SMALL = ("--clip-frames", "5", "--overlap", "1", "--tails", "2", "--clips", "4")
LEFT, UP = "the camera pans left", "a red circle moves up"


def write_video(path, frames, seed=0) -> None:
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (frames, 4, 6, 3), dtype=np.uint8)
    with FragmentedWriter(path, (24, 16), 8, {}) as out:
        out.write_clip(cells.repeat(4, axis=1).repeat(4, axis=2))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos, of 6 and 3 clips; do not write into it."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", 27)
    write_video(folder / "b.mp4", 13, seed=1)
    (folder / "a.txt").write_text(f"0 {LEFT}\n1.5 {UP}\n")
    (folder / "b.txt").write_text(UP)
    return folder


@pytest.fixture
def own(videos, tmp_path):
    """A copy of the videos."""
    return shutil.copytree(videos, tmp_path / "videos")


@pytest.fixture(scope="module")
def made(model, videos, tmp_path_factory):
    """The dataset of the two videos; do not write into it."""
    out = tmp_path_factory.mktemp("made") / "set"
    assert run(model, videos, out) == 0
    return out


def run(model, videos, out, *args) -> int:
    words = ["--model", str(model), "--videos", str(videos), "--out", str(out)]
    return main(["encode", *words, *SMALL, *args])


def fails(capsys, code, *args) -> str:
    capsys.readouterr()
    assert run(*args) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lvjax: ")
    return lines[0]


def files(folder) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def sample(data, video, first=0):
    """A sample of a video, with its tails."""
    lines = map(json.loads, (data.folder / "videos.jsonl").read_text().splitlines())
    (line,) = (line for line in lines if line["video"] == video)
    name, clips = line["samples"][first // data.head.layout.clips]
    return data.read(name, range(clips), True)


def test_clips_are_encoded_alone_as_a_rollout_makes_them(model, videos, made):
    data, bundle = open_dataset(outline(model), made), load(model)
    assert data.head.layout.latent == (2, 2, 2, 16) and sorted(data.clips) == [2, 3, 4]
    to_latents = jax.jit(encode, static_argnums=2)
    frames = np.stack(list(frames_of(videos / "a.mp4", 8, (16, 16)))) / np.float32(127.5) - 1
    assert len(frames) == 27
    first, second = sample(data, "a.mp4"), sample(data, "a.mp4", 4)
    assert (first.first, second.first) == (0, 4)
    for i, (latents, tails) in enumerate(zip(first.latents + second.latents,
                                             first.tails + second.tails, strict=True)):  # fmt: skip
        clip = frames[None, 4 * i : 4 * i + 5]
        whole = to_latents(bundle.params["vae"], clip, bundle.vae)[0]
        last = to_latents(bundle.params["vae"], clip[:, -1:], bundle.vae)[0]
        np.testing.assert_array_equal(latents, whole.astype(np.float16))
        np.testing.assert_array_equal(tails[:1], last.astype(np.float16))
        np.testing.assert_array_equal(tails[1:], whole.astype(np.float16))
    for tails, after in zip(first.tails, first.latents[1:], strict=False):
        np.testing.assert_array_equal(tails[:1], after[:1])  # the frames that clips share
    # a clip's own first frame is number 5, 9, 13, ...; the other prompt begins with frame 12
    assert first.prompts + second.prompts == [LEFT] * 3 + [UP] * 3
    assert first.least + second.least == [0, 0, 0, 1, 0, 0]
    assert sample(data, "b.mp4").prompts == [UP] * 3 and sample(data, "b.mp4").least == [0] * 3


def test_texts_are_those_of_the_model(model, made):
    data, bundle = open_latents(made), load(model)
    assert data.texts.keys() == {"", LEFT, UP} and data.head.text["kind"] == "ids"
    wanted = open_prompts(bundle, [LEFT])
    for text in data.texts:
        np.testing.assert_array_equal(data.text(text).rows, pocket.encode(text).ids)
        np.testing.assert_array_equal(data.text(text).feature, wanted.feature(text))
    assert not data.text("").rows.any()


def test_what_cannot_be_used_is_left_out_counted_and_listed(model, own, tmp_path, capsys):
    broken = bytearray((own / "a.mp4").read_bytes())
    (own / "c.mp4").write_bytes(broken[: len(broken) // 30])
    write_video(own / "d.mp4", 4)
    write_video(own / "e.mp4", 9)
    (own / "f.mov").write_bytes(b"no video" * 99)
    strange = os.fsdecode(b"g\xff\n.mp4")  # no UTF-8
    shutil.copy(own / "b.mp4", own / strange)
    (own / strange).with_suffix(".txt").write_bytes(b"\xef\xbb\xbf# cats\r\n\r\n" + UP.encode())
    (own / "h.mp4").symlink_to("h.mp4")
    (own / "around").symlink_to(".")
    for name, caption in (("i", "caf\xe9".encode("latin-1")), ("j", UP.encode())):
        (own / f"{name}.mp4").write_bytes(b"")
        (own / f"{name}.txt").write_bytes(caption)
    for name in "cdf":
        (own / f"{name}.txt").write_text(LEFT)
    capsys.readouterr()
    assert run(model, own, tmp_path / "set") == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("3 videos, 12 clips of 5 frames, 16x16 at 8 frames/s: ")
    assert "; 7 left out (c.mp4: " in last and "; and 4 more), see " in last
    assert "d.mp4: is shorter than a clip of 5 frames, which are 0.625 s; e.mp4: " in last
    lines = map(json.loads, (tmp_path / "set/skipped.jsonl").read_text().splitlines())
    found = {line["video"]: line["reason"] for line in lines}
    wanted = ["c.mp4", "d.mp4", "e.mp4", "f.mov", "h.mp4", "i.mp4", "j.mp4"]
    assert "cannot read i.txt (not UTF-8" in found["i.mp4"] and "is empty" in found["j.mp4"]
    assert sample(open_latents(tmp_path / "set"), strange).prompts == [UP] * 3
    assert list(found) == wanted and "no caption" in found["e.mp4"]
    assert str(own) not in "".join(found.values())
    (tmp_path / "bad").mkdir()
    for name in ("d.mp4", "d.txt", "f.mov", "f.txt"):
        shutil.copy(own / name, tmp_path / "bad" / name)
    said = fails(capsys, 3, model, tmp_path / "bad", tmp_path / "none")
    assert "no video can be used: d.mp4: is shorter" in said
    with pytest.raises(CheckpointError, match="is not finished"):
        open_latents(tmp_path / "none")


def test_the_same_command_goes_on(model, own, made, tmp_path, monkeypatch):
    out = shutil.copytree(made, tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_encoded", None)  # nothing is encoded again
        assert run(model, own, out) == 0
        assert files(out) == files(made)
        (own / "a.mp4").unlink()  # what is encoded stays
        assert run(model, own, out) == 0
        assert files(out) == files(made)
    write_video(own / "0.mp4", 9, seed=3)
    (own / "0.txt").write_text(LEFT)
    assert run(model, own, out) == 0
    data = open_latents(out)
    assert sorted(data.clips) == [2, 2, 3, 4]
    (own / "b.txt").write_text("waves")
    write_video(own / "0.mp4", 3)  # too short by now
    assert run(model, own, out) == 0
    data = open_latents(out)
    assert sorted(data.clips) == [2, 3, 4] and sample(data, "b.mp4").prompts == ["waves"] * 3
    assert len(list((out / "samples").iterdir())) == 3


def test_a_video_that_lost_its_caption_leaves_the_dataset(model, own, made, tmp_path, capsys):
    out = shutil.copytree(made, tmp_path / "set")
    (out / "samples/.0-000000.safetensors.tmp").write_bytes(b"what a kill left")
    shutil.copy(next((out / "samples").iterdir()), out / "samples/0-000000.safetensors")
    (own / "b.txt").unlink()
    assert run(model, own, out) == 0
    assert "; 1 left out (b.mp4: has no caption" in capsys.readouterr().err.splitlines()[-1]
    data = open_latents(out)
    assert sorted(data.clips) == [2, 4] and json.loads((out / "complete.json").read_text())
    assert json.loads((out / "complete.json").read_text())["videos"] == 1
    there = {path.name for path in (out / "samples").iterdir()}
    assert there == {f"{name}.safetensors" for name in data.samples}
    shutil.copy(own / "a.txt", own / "b.txt")
    assert run(model, own, out) == 0 and sorted(open_latents(out).clips) == [2, 3, 4]


def test_the_plan_is_what_is_written(model, own, tmp_path, capsys, monkeypatch):
    for name, frames in (("c", 5), ("d", 8), ("e", 9), ("g", 4)):
        write_video(own / f"{name}.mp4", frames)
        (own / f"{name}.txt").write_text("1s a fox\n2s a dog" if name == "g" else LEFT)
    (own / "f.mp4").write_bytes(b"")
    (own / "f.txt").write_text(UP)
    out = tmp_path / "set"
    assert run(model, own, out) == 0
    said = capsys.readouterr()
    size = sum(len(text) for text in files(out).values())
    plan = re.fullmatch(
        "plan: 6 videos to encode, about 13 clips, (.*) MB on disk; unreadable: 1\n", said.out
    )
    assert len(said.err.splitlines()) == 6 and "5 videos, 13 clips of 5" in said.err
    assert re.fullmatch(r"2/6: b\.mp4, about \d+ s left", said.err.splitlines()[1])
    assert size < 1e6 * float(plan[1]) + 5e4 and 1e6 * float(plan[1]) < 1.5 * size + 5e4
    layout, (videos, _) = (
        plan_layout(outline(model), frames=5, overlap=1, tails=2),
        find_videos(own),
    )
    plan = plan_dataset(outline(model), videos, layout, tmp_path / "other")
    assert 0.9 * size < plan.disk < 1.4 * size
    (own / "a.txt").write_text(LEFT)  # of what is there only this one changed
    assert run(model, own, out) == 0
    assert "plan: 2 videos to encode (4 are done), about 6 clips," in capsys.readouterr().out
    monkeypatch.setattr(dataset_plan, "seconds_of", lambda path: None)
    assert run(model, own, tmp_path / "new") == 0
    said = capsys.readouterr()
    assert "about 0 clips, " in said.out and "; of unknown length: 6" in said.out
    assert "2/6: b.mp4\n" in said.err


def test_a_disk_that_is_too_small_is_said_before_anything(model, videos, tmp_path, capsys,
                                                          monkeypatch):  # fmt: skip
    monkeypatch.setattr(dataset, "read_part", None)
    free = shutil.disk_usage(tmp_path)._replace(free=4000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: free)
    said = fails(capsys, 6, model, videos, tmp_path / "some" / "where")
    assert f" on {tmp_path}, 0.0 MB are free; free space, choose another --out, or " in said
    assert not list(tmp_path.iterdir())


def test_models_of_other_methods_get_the_overlap_that_they_are_trained_for(model):
    bundle = outline(model)
    own = dataclasses.replace(bundle.defaults, clip_latents=5, overlap=3)
    wan = dataclasses.replace(own, method="wan", overlap=1)

    def overlap(defaults, **given):
        return plan_layout(dataclasses.replace(bundle, defaults=defaults), **given).overlap

    assert overlap(own) == 3 and overlap(wan) == ErrorFree().overlap == 2
    assert overlap(wan, frames=5) == 1 and overlap(wan, overlap=4) == 4


def test_a_kill_costs_the_video_in_flight(model, own, made, tmp_path):
    write_video(own / "z.mp4", 241, seed=4)
    (own / "z.txt").write_text(LEFT)
    whole, cut = shutil.copytree(made, tmp_path / "whole"), tmp_path / "cut"
    words = ["--model", model, "--videos", str(own), "--out", str(cut), *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "lvjax.cli.main", "encode", *words], stderr=subprocess.DEVNULL
    )
    while len(list(cut.glob("samples/*.safetensors"))) < 6 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9
    index = (cut / "videos.jsonl").read_text()
    assert index == (made / "videos.jsonl").read_text()  # a and b are done, z is not
    (cut / "videos.jsonl").write_text(index + '{"video": "z.m')  # cut short in a line
    done = [cut / "samples" / path.name for path in (made / "samples").iterdir()]
    before = [path.stat().st_mtime_ns for path in done]
    assert run(model, own, cut) == run(model, own, whole) == 0
    assert [path.stat().st_mtime_ns for path in done] == before
    assert files(cut) == files(whole) and open_latents(cut).clips.sum() == 9 + 60


def test_a_signal_ends_in_order(model, videos, made, tmp_path, capsys, monkeypatch):
    original = dataset._encoded

    def interrupted(model, bits, layout, what):
        if what == "b.mp4, clip 1":
            raise KeyboardInterrupt(15)
        return original(model, bits, layout, what)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_encoded", interrupted)
        assert run(model, videos, tmp_path / "set") == 143
    assert "the same command goes on" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "set/.lock").exists()
    assert run(model, videos, tmp_path / "set") == 0
    assert files(tmp_path / "set") == files(made)


def test_a_long_video_is_never_held(monkeypatch, model):
    pulled = []

    def endless(path, fps, size):
        for n in range(10**9):
            pulled.append(n)
            yield np.full((2, 2, 3), n % 256, np.uint8)

    monkeypatch.setattr(dataset, "frames_of", endless)
    layout = plan_layout(outline(model), frames=9, overlap=1)
    clips = dataset._clips(Source("a", Path("a"), ((0.0, "a"),)), layout)
    for i in range(20):
        assert next(clips)[:, 0, 0, 0].tolist() == [n % 256 for n in range(8 * i, 8 * i + 9)]
        assert len(pulled) == 8 * i + 9


def test_settings_and_places_that_cannot_be(model, videos, made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "set"
    for args, code, what in (
        ((model, tmp_path / "none", out), 2, "no such folder"),
        ((model, made, out), 2, "holds no video"),
        ((model, videos, ""), 2, "--out is empty"),
        ((model, videos, out, "--size", "20x16"), 2, "the nearest are 16 and 24"),
        ((model, videos, out, "--size", "big"), 2, "write WIDTHxHEIGHT"),
        ((model, videos, out, "--clip-frames", "7"), 2, "the nearest are 5 and 9"),
        ((model, videos, out, "--clip-frames", "1"), 2, "give 5 or more"),
        ((model, videos, out, "--overlap", "2"), 2, "give 1 to 1"),
        ((model, videos, out, "--tails", "3"), 2, "give 0 to 2"),
        ((model, videos, out, "--clips", "0"), 2, "give 1 to 10000"),
        ((model, videos, out, "--prompt", "x"), 2, "--prompt is given beside --videos"),
        ((tmp_path / "none", videos, out), 3, "no model"),
        ((model, videos, made, "--size", "24x16"), 2, "begun with size (16, 16), now it is (16, "),
        ((model, videos, videos), 2, "holds 'a.mp4' and is no dataset"),
        ((model, videos, videos / "a.mp4" / "set"), 6, "cannot write"),
    ):
        assert what in fails(capsys, code, *args)
    assert not out.exists() and open_latents(made)
    assert main(["encode", "--model", model, "--size", "16x16", "--prompt", "x"]) == 2
    assert "--size is given without --videos" in capsys.readouterr().err
    assert main(["encode", "--model", model, "--videos", str(videos)]) == 2
    assert "--videos needs --out" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # a disk that is full
        patch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space")))
        assert "No space" in fails(capsys, 6, model, videos, out)


def test_a_dataset_of_another_model_is_refused(model, made, tmp_path):
    bundle = tiny_bundle()
    params = dict(bundle.params)
    params["vae"] = jax.tree.map(lambda a: a * 1.5, params["vae"])
    save(tmp_path / "other", dataclasses.replace(bundle, params=params))
    with pytest.raises(CheckpointError, match="was made by another autoencoder"):
        open_dataset(outline(tmp_path / "other"), made)
    text = dataclasses.replace(bundle.text, vocabulary=99)
    with pytest.raises(CheckpointError, match="text for another text encoder"):
        open_dataset(dataclasses.replace(outline(model), text=text), made)
    assert next(LatentFeed(open_dataset(outline(model), made), 2, 2, tails=2))


def test_rows_of_a_large_encoder(tmp_path, monkeypatch):
    rng, texts = np.random.default_rng(0), ["", "A red fox runs", "clouds"]
    wanted = {t: rng.standard_normal((n + 1, 16), np.float32) for n, t in enumerate(texts)}
    bundle = dataclasses.replace(tiny_bundle(), text=None, embeddings=wanted)
    kind = dataset.text_kind(bundle)
    assert kind == {"kind": "rows", "dim": 16, "encoder": None}
    head = Head("tiny", "0", kind, plan_layout(bundle))
    monkeypatch.setattr(dataset, "TEXTS_EACH", 2)
    dataset._put_texts(bundle, LatentWriter(tmp_path / "set", head), [*texts, texts[1]])
    found = []
    for path in sorted((tmp_path / "set/texts").iterdir()):
        stored = open_arrays(path)
        assert 1 <= len(stored.meta["prompts"]) <= 2
        found += stored.meta["prompts"]
        for i, text in enumerate(stored.meta["prompts"]):
            rows, feature = stored[f"rows/{i:06d}"], stored[f"feature/{i:06d}"]
            np.testing.assert_array_equal(rows, wanted[text].astype(np.float16))
            np.testing.assert_array_equal(feature, wanted[text].sum(0))
    assert found == texts
    before = files(tmp_path / "set")
    dataset._put_texts(bundle, LatentWriter(tmp_path / "set", head), texts)
    assert files(tmp_path / "set") == before
    wide = dataclasses.replace(bundle, embeddings={"big": np.full((1, 16), 1e6, np.float32)})
    with pytest.raises(NonFiniteError, match="'?big'? is not finite"):
        dataset._put_texts(wide, LatentWriter(tmp_path / "set", head), ["big"])
