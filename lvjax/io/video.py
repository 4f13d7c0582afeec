# SPDX-License-Identifier: Apache-2.0
"""Video out and in: a fragmented H.264 MP4 that grows clip by clip, and frames from any container.

Owns: encoding, syncing and resuming the output file, the run card inside it, reading `--video`.
Does not own: the boxes (io/fmp4.py), what a card says (run/card.py), resizing (io/image.py).
"""

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, islice
from numbers import Rational
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from lvjax.core.errors import CheckpointError, InputError, storing
from lvjax.io import fmp4
from lvjax.io.image import is_file

PRESET, CRF = "fast", 18
# Same frames, same bytes: one thread, one key frame, the same arithmetic on every CPU, and no
# macroblock tree.  With the tree, x264's AVX-512 code (core 165) made 1 to 3 encodes in 100 depend
# on what the heap had held before (edge blocks only); without it 7,600 of 7,600 were equal.
X264 = (
    "threads=1:lookahead-threads=1:sliced-threads=0:scenecut=0:"
    "mbtree=0:rc-lookahead=0:weightp=0:cpu-independent=1"
)
BT709, LIMITED = 1, 1  # code points of ISO/IEC 23091-2; also what FFmpeg's frames carry
# Accurate rounding with full chroma in both directions: FFmpeg's defaults darken a round trip by
# 1.4 of 255 levels (measured on gradients), and each continuation of a video would lose that again.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
TO_YUV = EXACT | Interpolation.FULL_CHR_H_INP
TO_RGB = EXACT | Interpolation.FULL_CHR_H_INT
REMEDY = "free space or choose another --out"
GAP = 60  # seconds: a longer step between two time stamps is a break in them, not a still picture


def _as_rate(fps) -> Fraction:
    # PyAV has rates as Fractions, from 19 on as rationals of its own
    if not (isinstance(fps, (Rational, float)) and math.isfinite(fps) and 0 < fps <= 1000):
        raise InputError(f"frame rate {fps!r}: allowed is a number above 0 and at most 1000")
    return Fraction(fps).limit_denominator(1001)


def _open_encoder(size: tuple[int, int], fps: Fraction):
    """A fresh libx264 encoder without B-frames: the same frames give the same bytes."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = *size, "yuv420p"
    encoder.time_base, encoder.framerate = 1 / fps, fps
    encoder.thread_count, encoder.max_b_frames, encoder.gop_size = 1, 0, 1 << 20
    encoder.color_range, encoder.colorspace = LIMITED, BT709
    encoder.color_primaries, encoder.color_trc = BT709, BT709
    encoder.flags |= Flags.global_header
    encoder.options = {
        "preset": PRESET,
        "crf": str(CRF),
        "x264-params": X264,
    }
    try:
        encoder.open()
    except av.error.FFmpegError as e:
        raise InputError(
            f"size {size[0]}x{size[1]} at {float(fps):g} frames/s cannot be encoded as H.264 ({e})"
        ) from e
    return encoder


def _encode(frames: np.ndarray, fps: Fraction) -> list[bytes]:
    """Encode uint8 [P,H,W,3] as one closed group; one Annex B packet per frame."""
    encoder = _open_encoder((frames.shape[2], frames.shape[1]), fps)
    to_yuv = VideoReformatter()
    packets = []
    for i, rgb in enumerate(frames):
        picture = to_yuv.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=TO_YUV,
            threads=1,
        )
        picture.pts, picture.time_base = i, encoder.time_base
        packets += encoder.encode(picture)
    packets += encoder.encode(None)
    return [bytes(p) for p in packets]


class FragmentedWriter:
    """A fragmented MP4 that is playable after each `write_clip` and after a crash at any moment.

    A clip becomes one fragment from a fresh encoder, so its bytes depend on its frames and its
    place alone and a resumed file equals the uninterrupted one.  A fragment is appended under the
    header of a `free` box, which players skip, synced, and only then renamed to `moof`: FFmpeg
    refuses a whole file whose last moof is cut, so a write that was cut off must never be seen.

    Attributes: `offset` (bytes finished), `frames` and `clips` (so far, resumed ones included).
    """

    def __init__(self, path, size: tuple[int, int], fps, card: dict | None, resume_at=None):
        """Open `path`, replacing what is there, or continue it at byte `resume_at`.

        size: (width, height), both even; card: JSON-able run card, or None on resume to keep the
        file's; resume_at: a saved `offset`, what follows it is dropped.
        Raises: InputError (size, rate), StorageError (place not writable), CheckpointError (the
        file to be continued is gone, shorter, or another run's).
        """
        self.path, self.size, self.fps = Path(path), tuple(int(n) for n in size), _as_rate(fps)
        width, height = self.size
        if width < 2 or height < 2 or width % 2 or height % 2:
            even = f"{max(2, width + width % 2)}x{max(2, height + height % 2)}"
            raise InputError(f"video size {width}x{height}: both must be even; use {even}")
        if resume_at is not None and not self.path.is_file():
            raise CheckpointError(
                f"{path} is gone, so it cannot be continued; start again without --resume"
            )
        card = read_card(path) if card is None else card
        text = json.dumps(card, sort_keys=True, allow_nan=False)
        header = bytes(_open_encoder(self.size, self.fps).extradata)
        init = fmp4.init_segment(self.size, self.fps, header, text)
        self.clips = self.frames = 0
        with storing(self.path, REMEDY):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "wb" if resume_at is None else "r+b", buffering=0)
            try:
                if resume_at is None:
                    self._put(0, init)
                else:
                    self._resume(init, resume_at)
                self.offset = len(init) if resume_at is None else resume_at
                os.fsync(self._file.fileno())
            except (OSError, CheckpointError):
                self._file.close()
                raise

    def _put(self, offset: int, data: bytes) -> None:
        """Write all of `data` at `offset` (a raw write may take only a part)."""
        view = memoryview(data)
        self._file.seek(offset)
        while view:
            view = view[self._file.write(view) :]

    def _resume(self, init: bytes, end: int) -> None:
        """Check that [0, end) is `init` and whole fragments, count them, drop what follows."""
        if self._file.read(len(init)) != init:
            raise CheckpointError(
                f"{self.path} was begun with another card, size, rate or version of the encoder; "
                "resume with the settings of the run, or start again in a new file"
            )
        _, ticks = fmp4.time_scale(self.fps)
        place = len(init)
        length = os.fstat(self._file.fileno()).st_size
        for kind, start, stop in fmp4.boxes(self._file, len(init), min(end, length)):
            if kind == "moof":
                self._file.seek(start)
                try:
                    number, time, frames = fmp4.fragment_info(self._file.read(stop - start))
                except ValueError:
                    break
                if (number, time) != (self.clips + 1, self.frames * ticks):
                    break
                self.clips, self.frames = number, self.frames + frames
            place = stop
        if place != end:
            raise CheckpointError(
                f"{self.path} is whole up to byte {place}, the saved state continues at {end}; "
                "use the state that belongs to the file, or start again without --resume"
            )
        self._file.truncate(end)

    def write_clip(self, frames) -> int:
        """Append one clip, synced to disk; returns `offset` after it, for the run's state.

        frames: uint8 [P,H,W,3], P >= 1.  Raises: StorageError on a full disk; the clips before stay
        whole and the call may be repeated.
        """
        frames = np.asarray(frames)
        width, height = self.size
        if frames.dtype != np.uint8 or frames.ndim != 4 or not len(frames):
            raise ValueError(f"a clip is uint8 [P,H,W,3], got {frames.dtype} {frames.shape}")
        if frames.shape[1:] != (height, width, 3):
            raise ValueError(f"the file holds [P,{height},{width},3] frames, got {frames.shape}")
        data = fmp4.fragment(_encode(frames, self.fps), self.clips + 1, self.frames, self.fps)
        with storing(self.path, REMEDY):
            try:
                self._put(self.offset, fmp4.free_header(len(data)) + data[8:])
                os.fsync(self._file.fileno())
                self._put(self.offset, data[:8])
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(self.offset)
                raise
        self.offset += len(data)
        self.clips, self.frames = self.clips + 1, self.frames + len(frames)
        return self.offset

    def close(self) -> None:
        """Close the file; what is written stays playable."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@contextmanager
def _opened(path) -> Iterator:
    """An input container; names are never taken for URLs and playlists reach local files only."""
    path = Path(path)
    if not is_file(path):
        raise InputError(f"no such video file: {path}; give the path of a file")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty; give a video that is whole and readable")
    try:
        with open(path, "rb") as f:
            with av.open(f, options={"protocol_whitelist": "file"}) as container:
                yield container
    except av.error.FFmpegError as e:
        raise InputError(
            f"{path} is not a video that can be read ({e.strerror or e}); convert it to MP4 first"
        ) from e
    except OSError as e:
        raise InputError(
            f"cannot read {path}: {e.strerror or e}; give a video that is whole and readable"
        ) from e


def read_card(path) -> dict:
    """The run card inside a video that `FragmentedWriter` wrote.

    Raises: InputError when the file is not a video, or carries no card.
    """
    with _opened(path) as container:
        text = container.metadata.get("comment", "")
    try:
        card = json.loads(text)
    except (ValueError, RecursionError):
        card = None
    if not isinstance(card, dict):
        raise InputError(f"{path} carries no run card; give a video written by lvjax, or its .json")
    return card


def _timed(container, stream) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Decoded frames with growing times in seconds; packets that do not decode are passed over."""
    step = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
    shift, last = Fraction(0), None
    packets = container.demux(stream)
    while True:
        try:
            frames = next(packets).decode()
        except StopIteration:
            return
        except av.error.InvalidDataError:
            continue
        for frame in frames:
            time = None if frame.pts is None else frame.pts * frame.time_base + shift
            if last is not None and (time is None or not 0 < time - last <= GAP):
                if time is not None:
                    shift += last + step - time
                time = last + step
            last = Fraction(0) if time is None else time
            yield last, frame


def _steady(timed: Iterable, fps: Fraction, tail: Fraction, most: int | None) -> Iterator:
    """What is on the screen at n / fps for n = 0, 1, …

    timed: (seconds, frame), growing; tail: seconds for which the last frame stands; most: how many
    repetitions of one frame anyone can want.  A tenth of a step is allowed for rounded time stamps.
    """
    start = held = last = None
    n = 0
    for time, frame in timed:
        start = time if start is None else start
        due = math.ceil((time - start) * fps - Fraction(1, 10))
        for _ in range(max(n, due - (most or due)), due):
            yield held
        n, held, last = max(n, due), frame, time
    if held is not None:
        end = math.ceil((last + tail - start) * fps - Fraction(1, 10))
        for _ in range(max(n, end - (most or end)), max(end, n + 1)):
            yield held


def _rgb(frame: av.VideoFrame, size: tuple[int, int], convert: VideoReformatter) -> np.ndarray:
    """One frame as uint8 [H,W,3], turned as its rotation metadata asks."""
    width, height = size
    turned = convert.reformat(frame, width, height, "rgb24", interpolation=TO_RGB, threads=1)
    return np.rot90(turned.to_ndarray(), round(frame.rotation / 90) % 4)


def _pictures(container, path):
    """The stream of a container that is its video; a cover picture is none."""
    videos = container.streams.video
    videos = [s for s in videos if not s.disposition & Disposition.attached_pic]
    if not videos:
        raise InputError(f"{path} has no video stream; give a file with pictures in it")
    return videos[0]


def _screen(container, path, fps, most: int | None) -> tuple[Iterator, Fraction, tuple[int, int]]:
    """What is on the screen at a constant rate, as decoded; the rate; and (width, height) that its
    pixels make where they are square.
    """
    rate = None if fps is None else _as_rate(fps)
    stream = _pictures(container, path)
    stream.thread_type = "AUTO"
    own = min(stream.average_rate or stream.guessed_rate or Fraction(25), Fraction(240))
    rate = _as_rate(own) if rate is None else rate
    frames = _steady(_timed(container, stream), rate, 1 / own, most)
    if (first := next(frames, None)) is None:
        raise InputError(f"{path} has no frames that can be decoded; give another video")
    aspect = stream.sample_aspect_ratio or Fraction(1)
    return chain([first], frames), rate, (max(1, round(first.width * aspect)), first.height)


def seconds_of(path) -> float | None:
    """How long a video is, as its container says; None where it does not, or says more than the
    file can hold (a byte for each frame), as broken time stamps do.

    Raises: InputError when the file cannot be read.
    """
    with _opened(path) as container:
        stream = _pictures(container, path)
        if stream.duration:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = (container.duration or 0) / av.time_base
        frames = seconds * float(stream.average_rate or 1)
        return seconds if 0 < frames <= Path(path).stat().st_size else None


def read_video(
    path, fps=None, max_frames: int | None = None, first: int | None = None
) -> tuple[np.ndarray, float]:
    """The frames of a video in any container that FFmpeg reads, at a constant rate.

    fps: rate to resample to (None: the video's own average); max_frames: keep only the last so many
    (None: all); first: read no more than so many.  The video is streamed; only kept frames are
    converted.
    Returns: (uint8 [P,H,W,3], frames/s), rotation and non-square pixels applied.
    Raises: InputError when the file cannot be read or has no frames.
    """
    if max_frames is not None and max_frames < 1:
        raise InputError(f"max_frames {max_frames}: allowed is 1 or more")
    with _opened(path) as container:
        shown, rate, size = _screen(container, path, fps, max_frames)
        frames = deque(islice(shown, first), max_frames)
        convert = VideoReformatter()
        return np.stack([_rgb(frame, size, convert) for frame in frames]), float(rate)


def stream_video(path, fps=None) -> Iterator[np.ndarray]:
    """The frames that `read_video` gives, uint8 [H,W,3], one at a time.

    Raises: InputError as `read_video`.
    """
    with _opened(path) as container:
        shown, _, size = _screen(container, path, fps, None)
        convert = VideoReformatter()
        for frame in shown:
            yield _rgb(frame, size, convert)
