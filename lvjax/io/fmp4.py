# SPDX-License-Identifier: Apache-2.0
"""The boxes of a fragmented MP4 with one H.264 track: bytes in, bytes out.

Owns: the init segment (ftyp + moov with a comment), fragments (moof + mdat), walking a file's
boxes.  Does not own: encoding, files on disk, syncing (io/video.py).  Written by hand rather than
through a muxer so that the init segment depends on nothing but size, rate, encoder header and
comment, and a fragment on nothing but its packets, its number and its time: a resumed file is then
the same file.

Source: ISO/IEC 14496-12 (boxes), 14496-15 (avc1, avcC); the comment is iTunes-style metadata,
which players read.
"""

import re
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO

MATRIX = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
SYNC, NON_SYNC = 0x02000000, 0x01010000
HIGH_PROFILES = (100, 110, 122, 144)


def box(kind: str, *parts: bytes) -> bytes:
    """An ISO BMFF box: size, four-letter kind, content."""
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind.encode("latin-1")) + body


def full_box(kind: str, version: int, flags: int, *parts: bytes) -> bytes:
    """A box with a version and flags before its content."""
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def time_scale(fps: Fraction) -> tuple[int, int]:
    """(ticks per second, ticks per frame) for a frame rate: exact, and at least 10,000 ticks/s."""
    k = -(-10_000 // fps.numerator)
    return fps.numerator * k, fps.denominator * k


def nal_units(data: bytes) -> list[bytes]:
    """The NAL units of an Annex B byte stream (start codes removed)."""
    return [n.rstrip(b"\0") for n in re.split(b"\0\0\1", data) if n.strip(b"\0")]


def length_prefixed(packet: bytes) -> bytes:
    """An Annex B packet with every start code replaced by a 4-byte length, as MP4 wants it."""
    return b"".join(struct.pack(">I", len(n)) + n for n in nal_units(packet))


def avc_config(header: bytes) -> bytes:
    """The avcC box from an encoder's Annex B header (its parameter sets; 4:2:0, 8 bit)."""
    units = nal_units(header)
    sps = next(n for n in units if n[0] & 31 == 7)
    pps = next(n for n in units if n[0] & 31 == 8)
    body = bytes([1, sps[1], sps[2], sps[3], 0xFF, 0xE1]) + struct.pack(">H", len(sps)) + sps
    body += b"\1" + struct.pack(">H", len(pps)) + pps
    if sps[1] in HIGH_PROFILES:
        body += bytes([0xFC | 1, 0xF8, 0xF8, 0])
    return box("avcC", body)


def _comment(text: str) -> bytes:
    def item(kind, value):
        return box(kind, box("data", struct.pack(">II", 1, 0), value.encode()))

    handler = full_box("hdlr", 0, 0, struct.pack(">I4s4s9x", 0, b"mdir", b"appl"))
    tags = box("ilst", item("\xa9too", "lvjax"), item("\xa9cmt", text))
    return box("udta", full_box("meta", 0, 0, handler, tags))


def _sample_table(width: int, height: int, header: bytes) -> bytes:
    entry = box(
        "avc1",
        struct.pack(">6xH16xHHIIIH32xHh", 1, width, height, 0x480000, 0x480000, 0, 1, 24, -1),
        avc_config(header),
        box("colr", b"nclx", struct.pack(">HHHB", 1, 1, 1, 0)),
        box("pasp", struct.pack(">II", 1, 1)),
    )
    empty = [full_box(kind, 0, 0, struct.pack(">I", 0)) for kind in ("stts", "stsc", "stco")]
    sizes = full_box("stsz", 0, 0, struct.pack(">II", 0, 0))
    return box("stbl", full_box("stsd", 0, 0, struct.pack(">I", 1), entry), *empty, sizes)


def init_segment(size: tuple[int, int], fps: Fraction, header: bytes, comment: str) -> bytes:
    """ftyp + moov for one H.264 track.

    size: (width, height) pixels; header: the encoder's Annex B extradata; comment: text for the
      metadata.
    """
    width, height = size
    scale, _ = time_scale(fps)
    movie = full_box(
        "mvhd",
        0,
        0,
        struct.pack(">IIIIIH10x", 0, 0, scale, 0, 0x10000, 0x100),
        MATRIX,
        struct.pack(">24xI", 2),
    )
    track = full_box(
        "tkhd",
        0,
        3,
        struct.pack(">IIIIIQHHHH", 0, 0, 1, 0, 0, 0, 0, 0, 0, 0),
        MATRIX,
        struct.pack(">II", width << 16, height << 16),
    )
    reference = full_box("dref", 0, 0, struct.pack(">I", 1), full_box("url ", 0, 1))
    media = box(
        "mdia",
        full_box("mdhd", 0, 0, struct.pack(">IIIIHH", 0, 0, scale, 0, 0x55C4, 0)),
        full_box("hdlr", 0, 0, struct.pack(">I4s12x", 0, b"vide"), b"video\0"),
        box(
            "minf",
            full_box("vmhd", 0, 1, bytes(8)),
            box("dinf", reference),
            _sample_table(width, height, header),
        ),
    )
    extends = box("mvex", full_box("trex", 0, 0, struct.pack(">IIIII", 1, 1, 0, 0, 0)))
    brands = box("ftyp", struct.pack(">4sI", b"iso5", 512), b"iso5iso6avc1mp41")
    return brands + box("moov", movie, box("trak", track, media), extends, _comment(comment))


def fragment(packets: list[bytes], number: int, first_frame: int, fps: Fraction) -> bytes:
    """moof + mdat of one clip.

    packets: Annex B, one per frame, in order, the first a key frame; number: 1, 2, …;
    first_frame: the index in the whole video of the clip's first frame.
    """
    _, ticks = time_scale(fps)
    samples = [length_prefixed(p) for p in packets]
    sizes = struct.pack(f">{len(samples)}I", *map(len, samples))

    def moof(data_offset: int) -> bytes:
        return box(
            "moof",
            full_box("mfhd", 0, 0, struct.pack(">I", number)),
            box(
                "traf",
                full_box("tfhd", 0, 0x020028, struct.pack(">III", 1, ticks, NON_SYNC)),
                full_box("tfdt", 1, 0, struct.pack(">Q", first_frame * ticks)),
                full_box(
                    "trun", 0, 0x205, struct.pack(">IiI", len(samples), data_offset, SYNC), sizes
                ),
            ),
        )

    return moof(len(moof(0)) + 8) + box("mdat", *samples)


def free_header(size: int) -> bytes:
    """The 8 bytes that make players skip the next `size` bytes, these 8 included."""
    return struct.pack(">I4s", size, b"free")


def boxes(f: BinaryIO, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """(kind, start of the body, end) of the boxes lying wholly in [start, end) of an open file."""
    while start + 8 <= end:
        f.seek(start)
        size, kind = struct.unpack(">I4s", f.read(8))
        if size < 8 or start + size > end:
            return
        yield kind.decode("latin-1"), start + 8, start + size
        start += size


def fragment_info(moof: bytes) -> tuple[int, int, int]:
    """(number, decode time in ticks, frames) of a moof body that `fragment` wrote.

    Raises: ValueError if the bytes have another layout.
    """
    try:
        kinds = struct.unpack_from(">4x4s12x4s4x4s20x4s", moof)
        number = struct.unpack_from(">I", moof, 12)[0]
        ticks = struct.unpack_from(">Q", moof, 60)[0]
        frames = struct.unpack_from(">I", moof, 80)[0]
    except struct.error as e:
        raise ValueError("a moof box that is too short") from e
    if kinds != (b"mfhd", b"traf", b"tfhd", b"tfdt") or moof[72:76] != b"trun":
        raise ValueError("a moof box of another layout")
    return number, ticks, frames
