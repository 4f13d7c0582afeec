# SPDX-License-Identifier: Apache-2.0
"""The output file: playable from the first clip and after any crash, resumed byte for byte."""

import io
import json
import random
import resource
import signal
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest

from lvjax.core.errors import CheckpointError, InputError, StorageError
from lvjax.io import fmp4, video
from lvjax.io.video import FragmentedWriter, read_card, read_video

SIZE, FPS, FRAMES, CLIPS = (96, 64), 8, 9, 4
CARD = {"format": "lvjax-card/1", "prompts": [{"time": 0.0, "text": "a red ball, 赤い球 🎈"}]}


def clip(k, frames=FRAMES, size=SIZE):
    """A moving pattern, uint8 [P,H,W,3]."""
    y, x = np.mgrid[: size[1], : size[0]]
    t = k * frames + np.arange(frames)[:, None, None]
    waves = [np.sin((x + 3 * t) / 17), np.cos((y - 2 * t) / 11), np.sin((x + y + 5 * t) / 40)]
    return (128 + 100 * np.stack(waves, -1)).astype(np.uint8)


def write(path, clips=CLIPS, **options):
    """Write clips; returns the offsets before the first and after each."""
    with FragmentedWriter(path, SIZE, FPS, CARD, **options) as writer:
        return [writer.offset] + [writer.write_clip(clip(k)) for k in range(clips)]


def played(data: bytes, path):
    """(times of all frames, duration, average rate, frames) as a player would see them."""
    path.write_bytes(data)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        times = [f.pts * stream.time_base for f in frames]
        pictures = [f.to_ndarray(format="rgb24") for f in frames]
        return times, Fraction(container.duration, 1_000_000), stream.average_rate, pictures


def steady(frames):
    return [Fraction(i, FPS) for i in range(frames)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.mp4"
    return write(path), path.read_bytes()


def test_playable_after_each_clip_while_it_is_open(tmp_path):
    with FragmentedWriter(tmp_path / "a.mp4", SIZE, FPS, CARD) as writer:
        assert read_card(writer.path) == CARD
        for k in range(3):
            offset = writer.write_clip(clip(k))
            data = writer.path.read_bytes()
            assert offset == writer.offset == len(data)
            assert (writer.clips, writer.frames) == (k + 1, (k + 1) * FRAMES)
            times, duration, rate, _ = played(data, tmp_path / "b.mp4")
            assert times == steady(writer.frames) and rate == FPS
            assert duration == Fraction(writer.frames, FPS)


def test_what_is_played_is_what_was_written(whole, tmp_path):
    offsets, data = whole
    pictures = np.stack(played(data, tmp_path / "b.mp4")[3]).astype(np.float64)
    want = np.concatenate([clip(k) for k in range(CLIPS)])
    assert 10 * np.log10(255**2 / np.mean((pictures - want) ** 2)) > 34


def test_two_runs_and_every_resume_give_the_same_bytes(whole, tmp_path):
    offsets, data = whole
    path = tmp_path / "a.mp4"
    write(path)
    assert path.read_bytes() == data
    for k in range(CLIPS):
        path.write_bytes(data[: offsets[k]] + data[offsets[k] : offsets[k] + 777])
        card = CARD if k % 2 else None  # None: the card that the file has
        with FragmentedWriter(path, SIZE, FPS, card, resume_at=offsets[k]) as writer:
            assert (writer.clips, writer.frames) == (k, k * FRAMES)
            assert path.stat().st_size == offsets[k]
            for later in range(k, CLIPS):
                writer.write_clip(clip(later))
        assert path.read_bytes() == data


def test_the_same_frames_give_the_same_bytes_whatever_the_memory_held():
    """x264's macroblock tree failed this about once in a hundred encodes on CPUs with AVX-512."""
    draw = np.random.default_rng(0)
    frames, seen = clip(3), set()
    for _ in range(250):
        used = [np.frombuffer(draw.bytes(n), np.uint8).copy() for n in (30000, 9000, 3000, 6144)]
        del used
        seen.add(b"".join(video._encode(frames, Fraction(FPS))))
    assert len(seen) == 1


def test_the_init_segment_does_not_know_the_number_of_clips(whole, tmp_path):
    offsets, data = whole
    write(tmp_path / "a.mp4", clips=1)
    assert (tmp_path / "a.mp4").read_bytes() == data[: offsets[1]]


def in_flight(data, start, end, written):
    """The file's bytes when the write of [start, end) was cut off after `written` bytes."""
    pending = fmp4.free_header(end - start) + data[start + 8 : end]
    return data[:start] + pending[:written]


def test_playable_after_a_crash_at_any_byte_of_the_write(whole, tmp_path):
    offsets, data = whole
    draw = random.Random(0)
    for _ in range(20):
        k = draw.randrange(1, CLIPS)
        length = offsets[k + 1] - offsets[k]
        cut = draw.choice([draw.randrange(length + 1), draw.randrange(160)])
        torn = in_flight(data, offsets[k], offsets[k + 1], cut)
        times, duration, rate, _ = played(torn, tmp_path / "b.mp4")
        assert times == steady(k * FRAMES), (k, cut)
        assert duration == Fraction(k * FRAMES, FPS) and rate == FPS
        with FragmentedWriter(tmp_path / "b.mp4", SIZE, FPS, CARD, offsets[k]) as writer:
            for later in range(k, CLIPS):
                writer.write_clip(clip(later))
        assert (tmp_path / "b.mp4").read_bytes() == data


def test_a_copy_cut_at_20_random_bytes_keeps_its_whole_clips(whole, tmp_path):
    """A finished file cut by others, inside pictures: all clips before the cut are read."""
    offsets, data = whole
    want = played(data, tmp_path / "b.mp4")[3]
    draw = random.Random(1)
    for _ in range(20):
        k = draw.randrange(1, CLIPS)
        moof = int.from_bytes(data[offsets[k] : offsets[k] + 4], "big")
        cut = draw.randrange(offsets[k] + moof, offsets[k + 1])
        (tmp_path / "b.mp4").write_bytes(data[:cut])
        frames, rate = read_video(tmp_path / "b.mp4")
        assert k * FRAMES <= len(frames) < (k + 1) * FRAMES and rate == FPS
        done = k * FRAMES
        assert np.abs(frames[:done].astype(int) - np.stack(want[:done])).max() < 40


CHILD = """
import sys
from tests_clip import clip
from lvjax.io.video import FragmentedWriter
w = FragmentedWriter(sys.argv[1], (96, 64), 8, {})
for k in range(100000):
    print(w.write_clip(clip(k % 4)), flush=True)
"""


def test_kill_9_of_a_writing_process(tmp_path):
    (tmp_path / "tests_clip.py").write_text(
        f"import importlib.util as u\ns = u.spec_from_file_location('m', {__file__!r})\n"
        "m = u.module_from_spec(s)\ns.loader.exec_module(m)\nclip = m.clip\n"
    )
    (tmp_path / "child.py").write_text(CHILD)
    draw = random.Random(2)
    for _ in range(3):
        path = tmp_path / "a.mp4"
        command = [sys.executable, tmp_path / "child.py", path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            saved = int(child.stdout.readline())
            time.sleep(draw.uniform(0, 0.3))
            child.send_signal(signal.SIGKILL)
            offsets = [saved] + [int(line) for line in child.stdout.read().split()]
        times, duration, *_ = played(path.read_bytes(), tmp_path / "b.mp4")
        # the last clip may be on disk before its offset was told
        assert len(times) in (len(offsets) * FRAMES, (len(offsets) + 1) * FRAMES)
        assert times == steady(len(times)) and duration == Fraction(len(times), FPS)
        with FragmentedWriter(path, SIZE, FPS, {}, resume_at=offsets[-1]) as writer:
            assert writer.frames == len(offsets) * FRAMES


def test_clips_of_any_length_and_fractional_rates(tmp_path):
    path = tmp_path / "a.mp4"
    with FragmentedWriter(path, SIZE, Fraction(24000, 1001), {}) as writer:
        for length in (1, 4, 33, 2):
            writer.write_clip(clip(0, length))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [f.pts * stream.time_base for f in container.decode(stream)]
    assert times == [Fraction(1001 * i, 24000) for i in range(40)]


def test_far_into_a_long_video_times_are_exact():
    hours = 1000 * 3600 * 16
    data = fmp4.fragment([b"\0\0\1\x65abc"], 7, hours, Fraction(16))
    body = data[8 : int.from_bytes(data[:4], "big")]
    assert fmp4.fragment_info(body) == (7, hours * fmp4.time_scale(Fraction(16))[1], 1)


def test_colours_survive_five_generations(tmp_path):
    """Written and read five times over, flat colours stay within 2 levels: no drift."""
    colours = np.array([[200, 30, 90], [16, 16, 16], [250, 240, 60], [20, 90, 250]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (4, 64, 96, 3))
    for _ in range(5):
        with FragmentedWriter(tmp_path / "a.mp4", SIZE, FPS, {}) as writer:
            writer.write_clip(frames)
        frames, _ = read_video(tmp_path / "a.mp4")
    assert np.abs(frames.astype(int).mean((1, 2)) - colours).max() <= 2


def test_cards_of_any_text_and_size(tmp_path):
    odd = ("", "日本語 \U0001f388 é e\u0301 \u202e", "\0\x07\n\"'", "\udc80 lone", "x" * 300_000)
    for text in odd:
        card = {"prompts": [{"time": 0.5, "text": text}], "seed": 2**63}
        FragmentedWriter(tmp_path / "a.mp4", SIZE, FPS, card).close()
        assert read_card(tmp_path / "a.mp4") == card


def test_a_video_without_a_card(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
        out.mux(stream.encode(None))
    with pytest.raises(InputError, match="no run card"):
        read_card(path)


@pytest.mark.parametrize("size, use", [((97, 64), "98x64"), ((96, 65), "96x66"), ((0, 2), "2x2")])
def test_odd_sizes_name_an_even_one(tmp_path, size, use):
    with pytest.raises(InputError, match=use):
        FragmentedWriter(tmp_path / "a.mp4", size, FPS, {})
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e9, "8"])
def test_bad_rates(tmp_path, fps):
    with pytest.raises(InputError, match="frame rate"):
        FragmentedWriter(tmp_path / "a.mp4", SIZE, fps, {})


def test_wrong_clips_are_refused_and_cost_nothing(whole, tmp_path):
    with FragmentedWriter(tmp_path / "a.mp4", SIZE, FPS, CARD) as writer:
        for bad in (clip(0).astype(np.float32), clip(0)[0], clip(0)[:0], clip(0, size=(64, 64))):
            with pytest.raises(ValueError):
                writer.write_clip(bad)
        writer.write_clip(clip(0))
    assert (tmp_path / "a.mp4").read_bytes() == whole[1][: whole[0][1]]


def test_resuming_what_does_not_belong(whole, tmp_path):
    offsets, data = whole
    path = tmp_path / "a.mp4"

    def resume(content, at, size=SIZE, fps=FPS, card=CARD):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as e:
            FragmentedWriter(path, size, fps, card, resume_at=at)
        assert "\n" not in str(e.value) and path.read_bytes() == content

    resume(data, offsets[2] + 1)  # not a boundary
    resume(data[: offsets[2]], offsets[3])  # shorter than the state says
    resume(data[: offsets[1]] + data[offsets[2] :], len(data) - offsets[2] + offsets[1])  # a gap
    resume(data, offsets[2], card={"other": 1})
    resume(data, offsets[2], size=(64, 64))
    resume(data, offsets[2], fps=16)
    resume(b"", offsets[1])
    path.unlink()
    with pytest.raises(CheckpointError, match="gone"):
        FragmentedWriter(path, SIZE, FPS, None, resume_at=offsets[1])


def test_no_permission_and_no_such_place(tmp_path):
    """As root a mode bit stops nobody: a file in place of a folder does."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.mp4", tmp_path, "/proc/no/a.mp4"):
        with pytest.raises(StorageError) as e:
            FragmentedWriter(path, SIZE, FPS, CARD)
        assert str(path) in str(e.value) and e.value.code == 6 and "\n" not in str(e.value)
    (tmp_path / "new" / "folder").mkdir(parents=True)
    FragmentedWriter(tmp_path / "new" / "folder" / "deep" / "a.mp4", SIZE, FPS, CARD).close()


def test_a_full_disk_keeps_the_clips_before_and_can_go_on(whole, tmp_path):
    """A file-size limit makes the system cut the write short, as a full disk does."""
    offsets, data = whole
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FragmentedWriter(tmp_path / "a.mp4", SIZE, FPS, CARD) as writer:
        writer.write_clip(clip(0))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (offsets[1] + 500, old[1]))
            with pytest.raises(StorageError) as e:
                writer.write_clip(clip(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert e.value.code == 6 and "a.mp4" in str(e.value)
        assert writer.path.read_bytes() == data[: offsets[1]]
        for k in range(1, CLIPS):
            writer.write_clip(clip(k))
    assert writer.path.read_bytes() == data


def test_a_device_that_is_always_full():
    with pytest.raises(StorageError, match="No space left"):
        FragmentedWriter("/dev/full", SIZE, FPS, CARD)


def test_boxes_are_well_formed(whole):
    offsets, data = whole
    kinds = [(kind, end) for kind, _, end in fmp4.boxes(io.BytesIO(data), 0, len(data))]
    assert [k for k, _ in kinds] == ["ftyp", "moov"] + ["moof", "mdat"] * CLIPS
    assert [end for _, end in kinds][1::2] == offsets
    assert json.dumps(CARD, sort_keys=True).encode() in data[: offsets[0]]
