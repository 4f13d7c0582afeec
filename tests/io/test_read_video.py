# SPDX-License-Identifier: Apache-2.0
"""Videos that people have: any container, rotated, variable rate, cut short, or no video at all."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from lvjax.core.errors import InputError
from lvjax.io import fmp4
from lvjax.io.video import FragmentedWriter, read_video, seconds_of


def levels(count, size=(64, 48)):
    """Frames of one grey each, 10 levels apart (cycling): they can be told after encoding."""
    grey = (20 + 10 * (np.arange(count) % 20)).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (count, size[1], size[0], 3))


def told(frames):
    """The number of each frame of `levels`, modulo 20."""
    return np.round((frames.astype(float).mean((1, 2, 3)) - 20) / 10).astype(int).tolist()


def mux(path, frames, times, codec="libx264", rate=8, pix_fmt="yuv420p", aspect=None, ticks=1000):
    """Write frames at the given times (seconds) with any container and codec of FFmpeg."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
        stream.codec_context.time_base = Fraction(1, ticks)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for rgb, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24")
            frame.pts, frame.time_base = round(time * ticks), Fraction(1, ticks)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    "kind, codec, pix_fmt",
    [
        (".mp4", "libx264", "yuv420p"),
        (".mkv", "libx264", "yuv420p"),
        (".webm", "libvpx-vp9", "yuv420p"),
        (".avi", "mpeg4", "yuv420p"),
        (".mov", "mjpeg", "yuvj420p"),
        (".ts", "mpeg2video", "yuv420p"),
    ],
)
def test_containers_and_codecs(tmp_path, kind, codec, pix_fmt):
    plain = tmp_path / f"b{kind}"
    mux(plain, levels(12), np.arange(12) / 25, codec, 25, pix_fmt, ticks=25)
    path = plain.rename(tmp_path / f"http:name{kind}")  # a name is never taken for an address
    assert seconds_of(path) == pytest.approx(12 / 25, abs=0.05)
    frames, fps = read_video(path)
    assert frames.shape == (12, 48, 64, 3) and frames.dtype == np.uint8
    assert told(frames) == list(range(12)) and fps == pytest.approx(25, rel=0.01)


@pytest.mark.parametrize("source, fps", [(8, 16), (16, 8), (30, 10), (24, 16), (30, 8)])
def test_resampling_shows_what_is_on_the_screen(tmp_path, source, fps):
    path = mux(tmp_path / "a.mkv", levels(19), np.arange(19) / source, rate=source)
    frames, rate = read_video(path, fps)
    want = [int((n + 0.1) * source / fps) for n in range(19 * fps // source + 1)]
    want = [w for w in want if w < 19]
    assert rate == fps and told(frames)[: len(want)] == want and len(frames) - len(want) in (0, 1)


def test_variable_rate(tmp_path):
    times = [0, 0.1, 0.2, 1.0, 1.05, 2.0, 2.5]
    path = mux(tmp_path / "a.mkv", levels(7), times, rate=10)
    frames, fps = read_video(path, 10)
    want = [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3] + [4] * 9 + [5] * 5 + [6]
    assert told(frames)[:26] == want and set(told(frames)[26:]) <= {6} and fps == 10


def test_only_the_last_frames_are_kept(tmp_path):
    path = mux(tmp_path / "a.mp4", levels(19), np.arange(19) / 8)
    whole, _ = read_video(path, 8)
    last, _ = read_video(path, 8, max_frames=5)
    np.testing.assert_array_equal(last, whole[-5:])
    one, _ = read_video(path, max_frames=1)
    np.testing.assert_array_equal(one, whole[-1:])
    assert len(read_video(path, 8, max_frames=1000)[0]) == 19


@pytest.mark.parametrize(
    "matrix, turn",
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
    ids=["90 clockwise", "180", "90 counter-clockwise"],
)
def test_rotation_metadata(tmp_path, matrix, turn):
    image = np.zeros((1, 48, 64, 3), np.uint8)
    image[:, :24, :32] = 250  # upper left
    path = tmp_path / "a.mp4"
    with FragmentedWriter(path, (64, 48), 8, {}) as writer:
        writer.write_clip(image)
    data = path.read_bytes()
    a, b, c, d = (n << 16 & 0xFFFFFFFF for n in matrix)
    turned = struct.pack(">9I", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    track = data.index(b"tkhd")
    place = data.index(fmp4.MATRIX, track)
    path.write_bytes(data[:place] + turned + data[place + 36 :])
    frames, _ = read_video(path)
    want = np.rot90(image[0], turn)
    assert frames.shape[1:] == want.shape
    assert np.abs(frames[0].astype(int) - want).mean() < 4


def test_pixels_that_are_not_square(tmp_path):
    path = mux(tmp_path / "a.mkv", levels(4), np.arange(4) / 8, aspect=Fraction(4, 3))
    assert read_video(path)[0].shape == (4, 48, 85, 3)


def test_broken_time_stamps_do_not_fill_the_memory(tmp_path):
    times = [0, 0.125, 0.25, 2_000_000, 2_000_000.125, 2_000_000.25]
    path = mux(tmp_path / "a.mkv", levels(6), times)
    assert seconds_of(path) is None
    assert told(read_video(path, 8)[0])[:6] == list(range(6))
    assert len(read_video(path, 8, max_frames=3)[0]) == 3


def test_a_file_cut_short_gives_what_is_there(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (16, 48, 64, 3), np.uint8)
    path = mux(tmp_path / "a.mkv", noise, np.arange(16) / 8)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    assert 0 < len(read_video(path, 8)[0]) < 16


def sound(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def bad_files(folder):
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    (folder / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    FragmentedWriter(folder / "no_frames.mp4", (64, 48), 8, {}).close()
    whole = mux(folder / "cut.mp4", levels(8), np.arange(8) / 8)  # its index is at the end
    whole.write_bytes(whole.read_bytes()[:-600])
    sound(folder / "sound.m4a")
    return [*sorted(folder.iterdir()), folder / "missing.mp4", folder]


def test_every_bad_file_is_one_line(tmp_path, capfd):
    for path in bad_files(tmp_path):
        with pytest.raises(InputError) as e:
            read_video(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value) and e.value.code == 2
    assert capfd.readouterr() == ("", "")


def test_bad_arguments(tmp_path):
    path = mux(tmp_path / "a.mp4", levels(2), [0, 0.125])
    for options in ({"fps": 0}, {"fps": float("nan")}, {"max_frames": 0}):
        with pytest.raises(InputError):
            read_video(path, **options)
