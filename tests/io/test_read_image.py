# SPDX-License-Identifier: Apache-2.0
"""Images that people have: every kind gives the right pixels, or one line that says why not."""

import io
import struct
import time
import zlib

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from lvjax.core.errors import InputError
from lvjax.io.image import fit_image, read_image

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)


def png(path, pixels, bits=8, colour=2, size=None):
    """A PNG by hand: colour 0 grey, 2 RGB, 4 grey + alpha, 6 RGBA; `size` overrides the header."""
    h, w = pixels.shape[:2]
    rows = pixels.astype(">u2" if bits == 16 else np.uint8).reshape(h, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    w, h = size or (w, h)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    return path


def saved(path, image, **options):
    image.save(path, **options)
    return path


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 300 and error.value.code == 2
    return text


def test_plain_rgb_is_exact(tmp_path):
    for name in ("a.png", "a.bmp", "a.tiff", "a.ppm"):
        pixels, notices = read_image(saved(tmp_path / name, Image.fromarray(PICTURE)))
        assert pixels.dtype == np.uint8 and notices == []
        np.testing.assert_array_equal(pixels, PICTURE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = {
        1: PICTURE,
        2: PICTURE[:, ::-1],
        3: PICTURE[::-1, ::-1],
        4: PICTURE[::-1],
        5: PICTURE.transpose(1, 0, 2),
        6: np.rot90(PICTURE, -1),
        7: np.rot90(PICTURE, 2).transpose(1, 0, 2),
        8: np.rot90(PICTURE, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(PICTURE), exif=exif)
    pixels, _ = read_image(path)
    np.testing.assert_array_equal(pixels, upright)


def test_damaged_exif_is_no_obstacle(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(PICTURE), exif=b"Exif\0\0MM\0*\xff\xff\xff")
    assert read_image(path)[0].shape == PICTURE.shape


@pytest.mark.parametrize("colour, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_is_rounded_exactly(tmp_path, colour, channels):
    deep = RNG.integers(0, 65536, (24, 40, channels))
    deep[0, :4, 0] = [65535, 255, 128, 129]
    if channels in (2, 4):
        deep[..., -1] = 65535
    pixels, notices = read_image(png(tmp_path / "a.png", deep, 16, colour))
    want = np.round(deep / 257).astype(np.uint8)[..., : 3 if channels > 2 else 1]
    assert want[0, :4, 0].tolist() == [255, 1, 0, 1] and notices == []
    np.testing.assert_array_equal(pixels, np.broadcast_to(want, (24, 40, 3)))


def test_sixteen_bit_with_alpha_goes_on_white(tmp_path):
    deep = np.zeros((20, 20, 4), np.int64)
    deep[:, 10:, 3] = 65535
    pixels, notices = read_image(png(tmp_path / "a.png", deep, 16, 6))
    assert (pixels[:, :10] == 255).all() and (pixels[:, 10:] == 0).all() and "white" in notices[0]


def test_sixteen_bit_grey_pgm(tmp_path):
    values = RNG.integers(0, 65536, (20, 20)).astype(">u2")
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 20 20 65535\n" + values.tobytes())
    np.testing.assert_array_equal(read_image(path)[0][..., 0], np.round(values / 257))


def test_sixteen_bit_tiff(tmp_path):
    deep = RNG.integers(0, 65536, (24, 40, 3)).astype(np.uint16)
    encoder = av.CodecContext.create("tiff", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 40, 24, "rgb48le", 1
    frame = av.VideoFrame.from_ndarray(deep, format="rgb48le")
    (tmp_path / "a.tiff").write_bytes(b"".join(map(bytes, encoder.encode(frame))))
    pixels, notices = read_image(tmp_path / "a.tiff")
    np.testing.assert_array_equal(pixels, np.round(deep / 257))
    assert notices == []


def test_transparency_goes_on_white(tmp_path):
    alpha = np.zeros((24, 40, 1), np.uint8)
    alpha[:, 20:] = 255
    path = saved(tmp_path / "a.png", Image.fromarray(np.concatenate([PICTURE, alpha], -1)))
    pixels, notices = read_image(path)
    assert (pixels[:, :20] == 255).all() and "white" in notices[0]
    np.testing.assert_array_equal(pixels[:, 20:], PICTURE[:, 20:])
    opaque = np.concatenate([PICTURE, np.full_like(alpha, 255)], -1)
    pixels, notices = read_image(saved(tmp_path / "b.png", Image.fromarray(opaque)))
    np.testing.assert_array_equal(pixels, PICTURE)
    assert notices == []


def test_grey_palette_and_bilevel(tmp_path):
    grey = Image.fromarray(PICTURE[..., 0])
    for image in (
        grey,
        grey.convert("1"),
        grey.convert("LA"),
        Image.fromarray(PICTURE).quantize(7),
    ):
        pixels, _ = read_image(saved(tmp_path / f"{image.mode}.png", image))
        np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_palette_and_rgb_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(0, (0, 0, 10, 20))
    pixels, notices = read_image(saved(tmp_path / "a.png", image, transparency=0))
    assert (pixels[:, :10] == 255).all() and (pixels[:, 10:] == (200, 0, 0)).all() and notices
    image = image.convert("RGB")
    pixels, notices = read_image(saved(tmp_path / "b.png", image, transparency=(10, 20, 30)))
    assert (pixels[:, :10] == 255).all() and (pixels[:, 10:] == (200, 0, 0)).all() and notices


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (20, 20), (0, 255, 255, 0))
    pixels, _ = read_image(saved(tmp_path / "a.jpg", image, quality=100))
    assert (np.abs(pixels.astype(int) - (255, 0, 0)) <= 3).all()


def test_colour_profiles(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp ").replace(b"gXYZ", b"rXYZ").replace(b"tmp ", b"gXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    red = Image.new("RGB", (20, 20), (255, 0, 0))
    pixels, notices = read_image(saved(tmp_path / "d.png", red, icc_profile=swapped))
    assert (np.abs(pixels.astype(int) - (0, 255, 0)) <= 2).all() and notices == []
    pixels, notices = read_image(
        saved(tmp_path / "a.png", Image.fromarray(PICTURE), icc_profile=srgb)
    )
    np.testing.assert_array_equal(pixels, PICTURE)
    pixels, notices = read_image(
        saved(tmp_path / "b.png", Image.fromarray(PICTURE), icc_profile=b"no profile" * 20)
    )
    np.testing.assert_array_equal(pixels, PICTURE)
    assert "profile" in notices[0]
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # does not fit RGB
    pixels, notices = read_image(
        saved(tmp_path / "c.png", Image.fromarray(PICTURE), icc_profile=lab)
    )
    np.testing.assert_array_equal(pixels, PICTURE)
    assert "profile" in notices[0]


@pytest.mark.parametrize(
    "kind, word", [("gif", "animated"), ("webp", "animated"), ("tiff", "page")]
)
def test_first_frame_of_several(tmp_path, kind, word):
    first, second = Image.new("RGB", (20, 20), (255, 0, 0)), Image.new("RGB", (20, 20), (0, 0, 255))
    options = {"lossless": True} if kind == "webp" else {}
    path = saved(tmp_path / f"a.{kind}", first, save_all=True, append_images=[second], **options)
    pixels, notices = read_image(path)
    assert (pixels == (255, 0, 0)).all() and word in notices[0]


@pytest.mark.parametrize("size", [(30_000, 16), (16, 30_000), (12_000, 12_000), (2**31 - 1,) * 2])
def test_header_bombs_are_refused_quickly(tmp_path, size):
    path = png(tmp_path / "a.png", PICTURE, size=size)
    start = time.monotonic()
    with pytest.raises(InputError) as e:
        read_image(path)
    assert time.monotonic() - start < 0.5 and "Mpx" in one_line(e)


@pytest.mark.parametrize("size", [(1, 1), (15, 200), (200, 15)])
def test_too_small(tmp_path, size):
    with pytest.raises(InputError) as e:
        read_image(saved(tmp_path / "a.png", Image.new("RGB", size)))
    assert "16" in one_line(e)


def test_every_truncation_is_one_line(tmp_path):
    big = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp"):
        buffer = io.BytesIO()
        big.save(buffer, kind)
        data = buffer.getvalue()
        for part in (0, 3, 12, 40, len(data) // 2, len(data) - 30):
            path = tmp_path / f"{part}.{kind}"
            path.write_bytes(data[:part])
            with pytest.raises(InputError) as e:
                read_image(path)
            one_line(e)


def test_flipped_bytes_never_escape(tmp_path):
    for kind in ("png", "jpeg", "gif", "webp", "tiff"):
        buffer = io.BytesIO()
        Image.fromarray(PICTURE).save(buffer, kind)
        data = np.frombuffer(buffer.getvalue(), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[RNG.integers(0, len(data), 4)] = RNG.integers(0, 256, 4)
            path = tmp_path / f"a.{kind}"
            path.write_bytes(damaged.tobytes())
            try:
                pixels, _ = read_image(path)
            except InputError as e:
                assert "\n" not in str(e)
            else:
                assert pixels.ndim == 3 and pixels.dtype == np.uint8


def test_not_an_image(tmp_path):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n")
    for path in (tmp_path / "a.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(InputError) as e:
            read_image(path)
        assert str(path) in one_line(e)


def test_32_bit_pixels_are_refused(tmp_path):
    for dtype in (np.int32, np.float32):
        path = saved(tmp_path / "a.tiff", Image.fromarray(np.ones((20, 20), dtype)))
        with pytest.raises(InputError) as e:
            read_image(path)
        assert "32-bit" in one_line(e)


@pytest.mark.parametrize("shape", [(40, 120), (120, 40), (64, 64), (33, 57)])
def test_fit_covers_and_keeps_the_centre(shape):
    h, w = shape
    y, x = np.mgrid[:h, :w]
    image = np.stack([x * 255 // w, y * 255 // h, 0 * x], -1).astype(np.uint8)
    fitted = fit_image(image, (48, 64))
    assert fitted.shape == (48, 64, 3) and fitted.dtype == np.float32
    assert np.abs(fitted).max() <= 1
    ramp = fitted[..., :2].mean((0, 1)) * 127.5 + 127.5
    np.testing.assert_allclose(ramp, image[..., :2].mean((0, 1)), atol=2.5)
    scale = min(h / 48, w / 64)  # source pixels per pixel, the same along both axes: no stretching
    slope = np.diff(fitted[24, 8:-8, 0].astype(np.float64)).mean() * 127.5
    np.testing.assert_allclose(slope, 255 / w * scale, rtol=0.05)


def test_fit_keeps_an_image_of_the_right_size_exactly():
    want = PICTURE.astype(np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(fit_image(PICTURE, (24, 40)), want)
