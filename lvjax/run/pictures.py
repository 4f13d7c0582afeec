# SPDX-License-Identifier: Apache-2.0
"""Start and last frames in a run card: few as PNGs, so that the card suffices; a long video by its
name and the sha256 of its frames, so that a card stays a card.
"""

import base64
import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from lvjax.core.errors import CheckpointError

MOST = 16  # frames of a video that a card holds
BYTES_MAX = 8_000_000  # of their PNGs


def to_card(frames, video: str | None = None) -> Any:
    """Frames float32 [H, W, 3], [P, H, W, 3] or [B, P, H, W, 3] in [-1, 1] as JSON; None is None.

    video: the file that they were read from.  A card only names it where its frames are many.
    """
    if frames is None:
        return None
    frames = np.asarray(frames)
    if video is None:
        return _pngs(frames)
    if len(_flat(frames)) <= MOST:
        pngs = _pngs(frames)
        if len(str(pngs)) <= BYTES_MAX:
            return pngs
    bits = as_bits(frames)
    return {
        "video": str(Path(video).resolve()),
        "shape": list(bits.shape),
        "sha256": digest(bits),
    }


def from_card(value: Any) -> np.ndarray | None:
    """What `to_card` made as frames float32 [P, H, W, 3] or [B, P, H, W, 3]; for a video that is
    only named, zeros in their shape, which take no memory.

    Raises: KeyError, TypeError, ValueError, OSError when it is not of this version.
    """
    if not isinstance(value, dict):
        return None if value is None else _unpngs(value)
    shape = tuple(value["shape"])
    right = len(shape) in (4, 5) and all(type(n) is int and n > 0 for n in shape)
    if not (right and shape[-1] == 3 and all(type(value[k]) is str for k in ("video", "sha256"))):
        raise ValueError("start frames that are not described")
    return np.broadcast_to(np.float32(0), shape)


def identity(value: Any) -> str | None:
    """What `to_card` made in a form that compares, however it is held: the sha256 of the frames."""
    if isinstance(value, dict):
        return value["sha256"]
    return None if value is None else digest(as_bits(_unpngs(value)))


def check(bits: np.ndarray, value: dict, source) -> None:
    """Raises: CheckpointError when frames uint8 are not those of a card that only names them."""
    if digest(bits) != value["sha256"]:
        raise CheckpointError(
            f"{source} has changed: its frames are not those that the run was begun with; restore "
            "it, or start again"
        )


def as_bits(frames: np.ndarray) -> np.ndarray:
    """Frames in [-1, 1] as uint8, [P, H, W, 3] or [B, P, H, W, 3]."""
    bits = np.empty((1,) * (4 - frames.ndim) + frames.shape, np.uint8)
    for to, frame in zip(_flat(bits), _flat(frames), strict=True):  # no second video of float32
        to[:] = _bits(frame)
    return bits


def as_frames(bits: np.ndarray) -> np.ndarray:
    """uint8 as float32 in [-1, 1]."""
    frames = bits.astype(np.float32)
    frames /= 127.5
    frames -= 1
    return frames


def digest(bits: np.ndarray) -> str:
    """sha256 of the shape and the bytes of frames uint8."""
    found = hashlib.sha256(str(list(bits.shape)).encode())
    found.update(np.ascontiguousarray(bits))
    return found.hexdigest()


def _flat(frames: np.ndarray) -> np.ndarray:
    return frames.reshape(-1, *frames.shape[-3:])


def _bits(frame: np.ndarray) -> np.ndarray:
    return np.round((frame + 1) * 127.5).astype(np.uint8)


def _png(frame: np.ndarray) -> str:
    """A frame float32 [H, W, 3] in [-1, 1] as base64 PNG of its 8 bits."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(_bits(frame)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def _pngs(frames: np.ndarray) -> list:
    """[H, W, 3] or [P, H, W, 3] as a list of PNGs, [B, P, H, W, 3] as a list of lists."""
    return [_pngs(f) if f.ndim == 4 else _png(f) for f in frames[(None,) * (4 - frames.ndim)]]


def _unpngs(pngs: list) -> np.ndarray:
    return np.stack([_unpng(p) if isinstance(p, str) else _unpngs(p) for p in pngs])


def _unpng(text: str) -> np.ndarray:
    from PIL import Image

    data, too_large = io.BytesIO(base64.b64decode(text)), Image.DecompressionBombWarning
    try:
        with warnings.catch_warnings(action="error", category=too_large):
            with Image.open(data, formats=("PNG",)) as image:
                return as_frames(np.asarray(image.convert("RGB")))
    except (Image.DecompressionBombError, too_large) as e:
        raise ValueError(f"a start frame is too large: {e}") from e
