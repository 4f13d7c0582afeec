# SPDX-License-Identifier: Apache-2.0
"""A still image in: whatever people have, as 8-bit RGB, and fitted to the size of a video.

Owns: reading, orientation, colour, bit depth, transparency, cover-resize.
Does not own: video (io/video.py).
"""

import io
import struct
import warnings
import zlib
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageCms

from lvjax.core.errors import InputError

SIDE_MIN, SIDE_END, PIXELS_MAX = 16, 30_000, 100_000_000
# Only formats that hold plain pictures: Pillow would hand others (EPS, WMF) to outside programs.
FORMATS = "PNG JPEG MPO WEBP GIF BMP TIFF PPM JPEG2000 AVIF ICO".split()
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _check_size(path, width: int, height: int) -> None:
    allowed = f"{SIDE_MIN} to {SIDE_END - 1} px on a side and at most {PIXELS_MAX // 10**6} Mpx"
    if max(width, height) >= SIDE_END or width * height > PIXELS_MAX:
        raise InputError(f"{path} is {width}x{height} px; allowed are {allowed}: scale it down")
    if min(width, height) < SIDE_MIN:
        raise InputError(f"{path} is {width}x{height} px; allowed are {allowed}: use a larger one")


def _frame_notice(image: Image.Image) -> list[str]:
    """What to say of a file with several pictures (a phone's MPO holds a depth map, not frames)."""
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return []
    if image.format == "TIFF":
        return ["the image has several pages: the first is used"]
    return ["the image is animated: its first frame is used"]


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 when there is none or the EXIF block is damaged."""
    try:
        value = image.getexif().get(0x0112, 1)
    except UNREADABLE:
        return 1
    return value if value in UPRIGHT else 1


def _scale16(values: np.ndarray) -> np.ndarray:
    """uint16 -> uint8, rounded: 65535 is 255 and v * 257 is v."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _deep(path) -> Image.Image | None:
    """A 16-bit colour file decoded by FFmpeg and rounded to 8 bits, or None if it cannot be.

    Pillow has no 16-bit colour modes: it drops the low byte, and 255 of 65535 would be 0, not 1.
    """
    try:
        with open(path, "rb") as f, av.open(f, options={"protocol_whitelist": "file"}) as container:
            frame = next(container.decode(video=0), None)
            if frame is None or frame.format.components[0].bits != 16:
                return None
            alpha = len(frame.format.components) in (2, 4)
            values = frame.to_ndarray(format="rgba64le" if alpha else "rgb48le")
    except (av.error.FFmpegError, OSError, ValueError):
        return None
    return Image.fromarray(_scale16(values))


def _eight_bit(image: Image.Image, path, notices: list[str]) -> Image.Image:
    """Decode, into an 8-bit colour mode: RGB, RGBA or CMYK.

    Raises: InputError for 32-bit pixels, whose white is not known.
    """
    # known only before the pixels are loaded, and only of an image from a file
    is_deep = ";16" in str(getattr(image, "tile", ""))
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        grey = _scale16(np.asarray(image).clip(0, 65535))
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise InputError(f"{path} has 32-bit pixels, allowed are 8 and 16; save it as PNG")
    if is_deep:
        deep = _deep(path)
        if deep is not None:
            return deep
        notices.append("the image has 16 bits per channel: only the upper 8 could be read")
    if image.mode in ("RGB", "RGBA", "CMYK"):
        plain = "transparency" not in image.info
        return image if plain or image.mode != "RGB" else image.convert("RGBA")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _to_srgb(image: Image.Image, profile: bytes | None, notices: list[str]) -> Image.Image:
    """Apply an embedded colour profile; CMYK without one is converted by the plain formula."""
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    if profile:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(own):
                srgb = ImageCms.createProfile("sRGB")
                return ImageCms.profileToProfile(image, own, srgb, outputMode=mode)
        except (ImageCms.PyCMSError, OSError, ValueError):
            notices.append("the image's colour profile does not fit its pixels: it is ignored")
    return image.convert(mode)


def _flatten(image: Image.Image, notices: list[str]) -> Image.Image:
    """Put transparent pixels on white."""
    if image.mode != "RGBA":
        return image
    if image.getchannel("A").getextrema()[0] < 255:
        notices.append("the image has transparent parts: they are placed on white")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _read(path) -> tuple[np.ndarray, list[str]]:
    Image.init()
    with Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
        return _convert(image, path)


def _convert(image: Image.Image, path) -> tuple[np.ndarray, list[str]]:
    """An open image as `read_image` gives it; path: its file, or what to call it."""
    _check_size(path, *image.size)
    notices = _frame_notice(image)
    profile = image.info.get("icc_profile")
    plain = _eight_bit(image, path, notices)
    upright = UPRIGHT.get(_orientation(image))
    rgb = _flatten(_to_srgb(plain, profile, notices), notices)
    if upright is not None:
        rgb = rgb.transpose(upright)
    return np.array(rgb), notices


def is_file(path) -> bool:
    """Whether there is a file; a name that no system takes is none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def read_image(path) -> tuple[np.ndarray, list[str]]:
    """An image file as 8-bit sRGB, upright, with notices of what was changed or left out.

    EXIF orientation and colour profiles are applied, transparency goes on white, 16 bits are
    rounded to 8, an animation gives its first frame.
    Returns: (uint8 [H,W,3], notices: one line each).
    Raises: InputError when the file is missing, not an image, damaged, too small or too large (the
    size is checked from the header, before anything is decoded).
    """
    if not is_file(path):
        raise InputError(f"no such image file: {path}; give the path of a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read(path)
    except InputError:
        raise
    except Image.UnidentifiedImageError as e:
        raise InputError(f"{path} is not an image that can be read; use PNG, JPEG or WebP") from e
    except Image.DecompressionBombError as e:
        raise InputError(
            f"{path} is too large; allowed are {PIXELS_MAX // 10**6} Mpx: scale it down"
        ) from e
    except UNREADABLE as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(
            f"{path} is damaged or cut short ({reason}); restore it, or save it again as PNG"
        ) from e


def as_image(image, name: str = "image") -> tuple[np.ndarray, list[str]]:
    """A picture that is in memory, as `read_image` gives one from a file.

    image: uint8 [H,W,3]; floating point [H,W,3] in [0, 1], rounded to 8 bits; or a PIL image of any
    mode, converted as `read_image` does.  name: what the errors call it.
    Returns: (uint8 [H,W,3], notices: one line each).
    Raises: InputError for another type, shape or range, NaN, or a size that `read_image` refuses.
    """
    if isinstance(image, Image.Image):
        try:
            return _convert(image, getattr(image, "filename", "") or name)
        except InputError:
            raise
        except UNREADABLE as e:
            raise InputError(f"{name} cannot be decoded ({type(e).__name__}: {e})") from e
    kinds = "uint8 [H,W,3], floating point [H,W,3] in [0, 1], or a PIL image"
    try:
        a = np.asarray(image)
    except ValueError as e:  # rows of unequal length
        raise InputError(f"{name} is no array ({e}); give {kinds}") from e
    floating = np.issubdtype(a.dtype, np.floating) or a.dtype.name == "bfloat16"
    if a.ndim != 3 or a.shape[-1] != 3 or not (floating or a.dtype == np.uint8):
        what = f"{a.dtype}{list(a.shape)}" if a.ndim else f"of type {type(image).__name__}"
        raise InputError(f"{name} is {what}; give {kinds}")
    _check_size(name, a.shape[1], a.shape[0])
    if not floating:
        return a, []
    a = a.astype(np.float64)
    if not (a.min() >= 0 and a.max() <= 1):  # false for NaN
        span = "not finite" if not np.isfinite(a).all() else f"from {a.min():.4g} to {a.max():.4g}"
        raise InputError(
            f"{name} has floating-point values that are {span}; allowed is [0, 1]: from [-1, 1] "
            "use (x + 1) / 2, from [0, 255] x / 255"
        )
    return np.round(255 * a).astype(np.uint8), []


def fit_bits(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale to cover `size` (Lanczos), crop the centre.

    image: uint8 [H,W,3]; size: (height, width).  Returns: uint8 [height,width,3].
    """
    height, width = size
    h, w = image.shape[:2]
    scale = min(h / height, w / width)
    left, top = (w - width * scale) / 2, (h - height * scale) / 2
    box = (max(left, 0), max(top, 0), min(w - left, w), min(h - top, h))
    fitted = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(fitted)


def fit_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """As `fit_bits`; returns float32 [height,width,3] in [-1, 1]."""
    return fit_bits(image, size).astype(np.float32) / np.float32(127.5) - np.float32(1)
