# SPDX-License-Identifier: Apache-2.0
"""Metrics of videos that need no network: how the picture moves, and what becomes of it.

Each takes uint8 frames [P, H, W, 3] and gives numbers; none sees a prompt.  Where a metric drifts
with the scene itself, compare it with the same metric of a reference: the first clip, or the
world's own video.  The names of VBench's axes are used for orientation only: its figures come from
networks, and ours are not comparable with them.
Does not own: the object (lab/object_metrics.py).
"""

from typing import NamedTuple

import numpy as np

from lvjax.core.errors import InputError
from lvjax.data.judge import object_masks

LUMA = np.array([0.299, 0.587, 0.114])
BLOCK = 8  # pixels per side of the blocks that move as one
REACH = 4  # pixels per frame up to which a motion is looked for
GAP = 2  # frames between the compared pictures of `dynamic_degree`: half a pixel per frame is seen
CLEAR = 0.7  # a block has moved when a shift leaves less than this share of the difference
BINS = 8  # per axis of the histograms
PART = 64  # frames whose objects are looked for at a time


class Exposure(NamedTuple):
    """clipped: share of pixels with a channel at 0 or 255.  luminance: mean, 0 to 1.  shift: the
    luminance less that of the reference.
    """

    clipped: float
    luminance: float
    shift: float


def check_frames(frames: np.ndarray, least: int = 1) -> np.ndarray:
    """The frames as they are.

    Raises: InputError unless they are uint8 [P, H, W, 3] with at least `least` of them.
    """
    shape = np.shape(frames)
    if len(shape) != 4 or shape[-1] != 3 or frames.dtype != np.uint8 or shape[0] < least:
        raise InputError(
            f"frames are {getattr(frames, 'dtype', type(frames).__name__)} {list(shape)}; give "
            f"uint8 [P, H, W, 3] with at least {least} frames"
        )
    return frames


def grey(frames: np.ndarray) -> np.ndarray:
    """Luminance float32 [...] in [0, 1] of uint8 [..., 3]."""
    return (frames.astype(np.float32) / 255) @ LUMA.astype(np.float32)


def chroma(frames: np.ndarray) -> np.ndarray:
    """(blue - luminance, red - luminance), float32 [..., 2] in about [-.5, .5], of uint8 [..., 3];
    grey is (0, 0), and an equal change of all channels changes nothing.
    """
    y = grey(frames)
    blue, red = (frames[..., c].astype(np.float32) / 255 - y for c in (2, 0))
    return np.stack([0.564 * blue, 0.713 * red], -1)


def windows(frames, count: int = 6) -> list:
    """A long video in `count` equal parts, in order; lengths differ by one frame at most.

    Raises: InputError for fewer frames than parts.
    """
    if len(frames) < count or count < 1:
        raise InputError(f"{len(frames)} frames are given for {count} parts; give as many or more")
    edges = [round(i * len(frames) / count) for i in range(count + 1)]
    return [frames[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def six_windows(frames) -> list:
    """The six equal parts of a long video (the paper's Table 4)."""
    return windows(frames, 6)


# Motion


def _shifts(reach: int) -> list[tuple[int, int]]:
    """All (rows, columns) up to `reach`, the shortest first, so that it wins a tie."""
    both = range(-reach, reach + 1)
    return sorted(((y, x) for y in both for x in both), key=lambda s: (np.hypot(*s), s))


def _seen(x: np.ndarray, shift: tuple[int, int], reach: int) -> np.ndarray:
    """The interior of x [N, H, W], `reach` pixels off the border, looked at `shift` further."""
    (dy, dx), (h, w) = shift, x.shape[1:]
    return x[:, reach + dy : h - reach + dy, reach + dx : w - reach + dx]


def _blocks(x: np.ndarray) -> np.ndarray:
    """Means over blocks: [N, H, W] -> [N, H // BLOCK, W // BLOCK], the rest left out.

    Columns are added two by two, as `numpy.mean` does within a row, in a third of its time.
    """
    n, h, w = (x.shape[0], *(s // BLOCK for s in x.shape[1:]))
    x = x[:, : h * BLOCK, : w * BLOCK].reshape(n, h, BLOCK, w, BLOCK)
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0].sum(2) / np.float32(BLOCK**2)


def _check_size(frames: np.ndarray, reach: int, least: int) -> None:
    need = 2 * reach + BLOCK
    if min(check_frames(frames, least).shape[1:3]) < need:
        raise InputError(
            f"frames are {frames.shape[2]}x{frames.shape[1]}; motion needs {need}x{need} or more"
        )


def motion_smoothness(frames: np.ndarray) -> float:
    """How well a frame lies between its neighbours: 1 less the mean absolute error, in [0, 1].

    Each block of the frame before is moved towards the frame after along the straight line on which
    the two agree best; their mean is compared with the frame between, which has no part in that
    choice.
    A perfect or a still video gives .997 or more (measured), frames in disorder .86 to .98.
    VBench's "motion smoothness" has the same formula with a network that interpolates; ours knows
    straight motions of up to 4 pixels per frame only, and like it, counts noise as unsteady.
    Raises: InputError for fewer than 3 frames, or frames smaller than 16x16.
    """
    _check_size(frames, REACH, 3)
    x = grey(frames)
    before, between, after = x[:-2], _seen(x[1:-1], (0, 0), REACH), x[2:]
    best, error = np.inf, 0.0
    for dy, dx in _shifts(REACH):
        a, b = _seen(before, (-dy, -dx), REACH), _seen(after, (dy, dx), REACH)
        cost = _blocks(np.abs(a - b))
        better = cost < best
        best = np.where(better, cost, best)
        error = np.where(better, _blocks(np.abs((a + b) / 2 - between)), error)
    return float(1 - error.mean())


def dynamic_degree(frames: np.ndarray) -> float:
    """How much the picture moves: mean over its blocks of the best shift's length, pixels/frame.

    A block has moved when the shift explains most of its change, so that neither noise, flicker nor
    flat areas count; of those, motion is not seen.  0 for a still video; 2 where everything of a
    textured scene moves by 2 pixels per frame; 3 is the most that is found along an axis.
    VBench's "dynamic degree" is the share of videos whose largest optical flow passes a threshold;
    ours is the mean motion, of camera and object alike.
    Raises: InputError for fewer than 3 frames, or frames smaller than 20x20.
    """
    reach = 3 * GAP
    _check_size(frames, reach, GAP + 1)
    x = grey(frames)
    before, after = _seen(x[:-GAP], (0, 0), reach), x[GAP:]
    still = best = _blocks(np.abs(_seen(after, (0, 0), reach) - before))
    length = np.zeros_like(best)
    for shift in _shifts(reach)[1:]:
        cost = _blocks(np.abs(_seen(after, shift, reach) - before))
        better = cost < best
        best = np.where(better, cost, best)
        length = np.where(better, np.float32(np.hypot(*shift)), length)
    return float(np.where(best < CLEAR * still, length, 0).mean() / GAP)


# The picture


def masks(frames: np.ndarray) -> np.ndarray:
    """`judge.object_masks`, bool [P, H, W, colours], in parts: it needs 40 times their memory."""
    parts = range(0, len(frames), PART)
    return np.concatenate([object_masks(frames[i : i + PART]) for i in parts])


def background(found: np.ndarray, border: int = 2) -> np.ndarray:
    """Pixels that belong to no object, `border` pixels around it left out: bool [P, H, W].

    found: `masks` of the frames.  All of a frame that shows nothing else.
    """
    busy = found.any(-1)
    _, h, w = busy.shape
    wide = np.pad(busy, ((0, 0), (border, border), (border, border)))
    around = range(2 * border + 1)
    wide = np.logical_or.reduce([wide[:, y : y + h] for y in around])
    busy = np.logical_or.reduce([wide[..., x : x + w] for x in around])
    return ~busy | busy.all((1, 2), keepdims=True)


def _histogram(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Soft histogram [BINS]: each value is shared between the two nearest bins; L2 norm 1."""
    place = np.clip((values - low) / (high - low), 0, 1) * (BINS - 1)
    left = np.minimum(place.astype(int), BINS - 2)
    share = place - left
    out = np.bincount(left, 1 - share, BINS) + np.bincount(left + 1, share, BINS)
    return out / max(np.linalg.norm(out), 1e-12)


def describe_background(frames: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """What the background looks like, wherever in it the camera is: float64 [P, 4 * BINS], norm 1.

    Histograms of luminance, of both chroma axes, and of the slope of luminance on a scale of
    powers of two, over the pixels of no object.  mask: those of `background`, here and below, where
    they are known.
    """
    y, c, mask = grey(frames), chroma(frames), _mask(frames, mask)
    slope = np.hypot(*np.gradient(y, axis=(1, 2)))
    slope = np.log2(np.maximum(slope, 2.0**-10))
    rows = []
    for f, own in enumerate(mask):
        parts = ((y[f][own], 0, 1), (c[f, ..., 0][own], -0.3, 0.3), (c[f, ..., 1][own], -0.3, 0.3))
        rows.append(np.concatenate([_histogram(*p) for p in (*parts, (slope[f][own], -9, -1))]))
    return np.array(rows) / 2  # four parts of norm 1


def _mask(frames: np.ndarray, known: np.ndarray | None) -> np.ndarray:
    return background(masks(frames)) if known is None else known


def background_consistency(frames: np.ndarray, reference: np.ndarray | None = None) -> float:
    """Whether the place stays the same: in [0, 1], 1 for a still picture.

    Mean over the frames of the cosine between descriptors (`describe_background`) to the frame
    before and to the reference, half and half.  reference: frames, of which the mean descriptor is
    taken, by default the first one.  The object's pixels are left out, and where the camera is in
    an even scene does not matter; in an uneven scene a pan lowers it, also in the world's own video
    (.996 +- .006 over 17 frames, .945 where the scene changes in the middle), so compare.
    VBench's "background consistency" has the same form with CLIP features of whole frames.
    Raises: InputError for fewer than 2 frames.
    """
    found = describe_background(check_frames(frames, 2))
    other = None if reference is None else describe_background(check_frames(reference))
    return consistency(found, other)


def consistency(found: np.ndarray, reference: np.ndarray | None = None) -> float:
    """`background_consistency` of descriptors [P, D] as `describe_background` gives them."""
    first = found[0] if reference is None else reference.mean(0)
    to_first = found @ (first / np.linalg.norm(first))
    to_last = (found[1:] * found[:-1]).sum(-1)
    to_first = to_first[1:] if reference is None else to_first
    return float((to_first.mean() + to_last.mean()) / 2)


def colour_cast(frames: np.ndarray, reference: np.ndarray) -> float:
    """How far the mean chroma of the background has moved from the reference's: Euclidean, 0 to
    about .5; 0 for the same mean colour.  Brightness has no part in it, nor the object.
    VBench has no such axis; its "imaging quality" (a network's opinion) falls with casts.
    """
    a, b = (tone(check_frames(f)) for f in (frames, reference))
    return float(np.linalg.norm(a - b))


def tone(frames: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The mean chroma of the background, float32 [2]."""
    return chroma(frames)[_mask(frames, mask)].mean(0)


def saturation(frames: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Mean length of the background's chroma, 0 (grey) to about .5; as a ratio to the reference's
    it says whether colours fade or burn.  VBench has no such axis; see `colour_cast`.
    """
    own = chroma(check_frames(frames))[_mask(frames, mask)]
    return float(np.linalg.norm(own, axis=-1).mean())


def exposure(frames: np.ndarray, reference: np.ndarray) -> Exposure:
    """Clipped pixels, mean luminance, and its shift from the reference's; see `Exposure`.

    VBench's "imaging quality" counts over- and under-exposure among other things, by a network.
    """
    frames, reference = check_frames(frames), check_frames(reference)
    clipped = ((frames == 0) | (frames == 255)).any(-1).mean()
    mean = float(grey(frames).mean())
    return Exposure(float(clipped), mean, mean - float(grey(reference).mean()))


def sharpness(frames: np.ndarray) -> float:
    """Mean absolute Laplacian (four neighbours) of luminance over the interior, in [0, 4].

    As a ratio to the reference's: below 1 blurred, above 1 over-sharpened or noisy.  It depends on
    what is shown, so that only ratios mean anything.
    VBench's "imaging quality" falls with blur and noise both; this one tells them apart.
    Raises: InputError for frames without an interior.
    """
    x = grey(check_frames(frames))
    if min(x.shape[1:]) < 3:
        raise InputError(f"frames are {x.shape[2]}x{x.shape[1]}; give 3x3 or more")
    inner = x[:, 1:-1, 1:-1]
    around = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    return float(np.abs(around - 4 * inner).mean())


def average_frequency(frames: np.ndarray, normalised: bool = True, keep_dc: bool = True) -> float:
    """AF: the radial frequency of a picture, weighted by the magnitude of its spectrum, averaged
    over frames; cycles per pixel, 0 to .707.

    AF = sum M f / sum M with M = |FFT2 of the grey frame| and f = hypot(u, v), u and v as
    `numpy.fft.fftfreq` has them; higher is finer.  In float64.
    frames: [P, H, W, 3], or grey [P, H, W], of any real type.  normalised: False for the other
    reading of the paper, sum M f / (H W), which grows with contrast.  keep_dc: whether the mean of
    a picture, which has f = 0, counts in the denominator.
    A constant picture gives 0, white noise without its mean (sqrt(2) + asinh(1)) / 6 = .383.
    Raises: InputError for another shape.
    Source: arXiv:2606.22370, equation 6; its normaliser is our reading.
    """
    x = np.asarray(frames, np.float64)
    if x.ndim == 4 and x.shape[-1] == 3:
        x = x @ LUMA
    if x.ndim != 3 or not x.size:
        raise InputError(f"frames are {list(np.shape(frames))}; give [P, H, W, 3] or [P, H, W]")
    f = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, x.shape[1:]), indexing="ij"))
    values = []
    for picture in x:
        m = np.abs(np.fft.fft2(picture))
        whole = m.sum()
        if not keep_dc:
            m[0, 0] = 0
        total = m.sum() if normalised else x[0].size
        empty = m.sum() <= 1e-9 * whole  # nothing but rounding beside the mean
        values.append(0.0 if empty else (m * f).sum() / total)
    return float(np.mean(values))
