# SPDX-License-Identifier: Apache-2.0
"""The pocket world: endless single-shot videos with exact ground truth, a deterministic function of
(split, seed, index).

A camera moves over one scene while at most one object moves on the screen; every 3 or 4.5 seconds
a new prompt (`prompts.Action`) says what happens next.  Objects leave the screen and come back.
Owns motion and rendering; scenes are in `scenes.py`, language in `prompts.py`.  Speeds are whole
VAE cells: 2 pixels per frame are 8 per latent frame.
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from lvjax.core.errors import InputError
from lvjax.data.prompts import CAMERAS, COLOURS, DIRECTIONS, SHAPES, Action
from lvjax.data.scenes import CANVAS, draw_scene

FPS = 8
SIZE = 64
SPEED = 2.0  # pixels per frame, camera pans and objects
ZOOM = 1.03  # scale per frame
RADIUS = 10.0
MARGIN = RADIUS + 2  # an object centre this far outside is out of sight
CLIP_STRIDE = 12  # prompts change at frames 5 + 12 m, which is where a clip's own frames begin
GIVEN = 5
SCALE_RANGE = (0.45, 2.1)  # from 1, room for one zoom of 24 frames either way
SPLITS = ("train", "held_out")

MOTIONS = (*DIRECTIONS, "stay")


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether training never shows this combination; about one in seven."""
    c, s, m = list(COLOURS).index(colour), SHAPES.index(shape), MOTIONS.index(motion)
    return (c + 2 * s + 3 * m) % 7 == 1


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    """All (colour, shape, motion) of a split."""
    return [x for x in itertools.product(COLOURS, SHAPES, MOTIONS) if is_held_out(*x) == held_out]


@dataclass(frozen=True)
class Pose:
    """Camera and object at one frame: canvas position of the view's centre, screen pixels per
    canvas pixel, object centre on the screen.
    """

    x: float
    y: float
    scale: float
    object_x: float = math.nan
    object_y: float = math.nan

    @property
    def object_visible(self) -> bool:
        """Whether any part of the object can be in the picture."""
        inside = [-MARGIN < v < SIZE + MARGIN for v in (self.object_x, self.object_y)]
        return all(inside)


@dataclass(frozen=True)
class Segment:
    """Frames start..stop-1 follow `action`; `pose` is the pose at frame start-1 (at frame 0 for the
    first).
    """

    start: int
    stop: int
    action: Action
    pose: Pose


class Video:
    """One endless video.

    split: "train" or "held_out".  kind: "photo", "texture" or None (either).  first: an Action
      whose camera, colour, shape and motion replace the drawn ones in the first segment.  enters:
      whether the first object starts out of sight.
    Raises: InputError for an unknown split.
    """

    def __init__(
        self,
        index: int,
        *,
        seed: int = 0,
        split: str = "train",
        kind=None,
        first: Action | None = None,
        enters=None,
    ):
        if split not in SPLITS:
            raise InputError(f"split {split!r}; allowed: {SPLITS}")
        self.held_out = split == "held_out"
        self._key = [SPLITS.index(split), seed, index]
        rng = np.random.default_rng([*self._key, 0])
        self.scene, self.canvas = draw_scene(rng, self.held_out, kind)
        self.pillar = first.pillar if first else rng.random() < 0.08
        self._stripes = (rng.uniform(0, math.pi), rng.uniform(0, 6))
        self.segments = [self._first_segment(rng, first, enters)]

    def _first_segment(self, rng, first, enters) -> Segment:
        scale = 1.0 if rng.random() < 0.7 else rng.uniform(0.85, 1.2)
        x, y = self._textured_place(rng)
        length = CLIP_STRIDE * int(rng.integers(2, 4))
        enters = rng.random() < 0.6 if enters is None else enters
        thing = (None, None, None)
        if rng.random() < 0.85:
            options = [c for c in combinations(self.held_out) if c[2] != "stay" or not enters]
            thing = options[rng.integers(len(options))]
        action = Action(self._camera(rng, scale, length), self.scene, *thing, pillar=self.pillar)
        if first is not None:
            action = replace(first, scene=self.scene)
        pose = Pose(x, y, scale)
        if action.colour:
            pose = _place_object(pose, action.motion, rng, enters)
        return Segment(0, length + GIVEN, action, pose)

    def _textured_place(self, rng) -> tuple[float, float]:
        """A view centre around which the scene has visible structure, so that camera motion can be
        seen.
        """
        grey = self.canvas.mean(-1)
        slope = (
            np.abs(np.diff(grey, axis=0, append=grey[:1])),
            np.abs(np.diff(grey, axis=1, append=grey[:, :1])),
        )
        best, place = -1.0, (0, 0)
        for x, y in rng.integers(0, CANVAS, (8, 2)):
            rows, cols = (np.arange(v - 48, v + 48, 2) % CANVAS for v in (y, x))
            contrast = min(s[np.ix_(rows, cols)].mean() for s in slope)
            if contrast > best:
                best, place = contrast, (int(x), int(y))
            if best > 0.02:
                break
        return float(place[0]), float(place[1])

    @staticmethod
    def _camera(rng, scale: float, length: int) -> str:
        """A camera move that keeps the scale in range for `length` frames; zooms are half as
        frequent as pans.
        """
        weights = np.array([1.5, 1, 1, 1, 1, 0.6, 0.6])
        weights[5] *= scale * ZOOM**length <= SCALE_RANGE[1]
        weights[6] *= scale / ZOOM**length >= SCALE_RANGE[0]
        return CAMERAS[rng.choice(len(CAMERAS), p=weights / weights.sum())]

    def _extend(self) -> None:
        last = self.segments[-1]
        rng = np.random.default_rng([*self._key, 1 + len(self.segments)])
        pose = self.pose(last.stop - 1)
        length = CLIP_STRIDE * int(rng.integers(2, 4))
        old = last.action
        visible = old.colour is not None and pose.object_visible
        thing = (old.colour, old.shape)
        if not visible and rng.random() < 0.6:
            thing = (None, None)
            if rng.random() < 0.75:
                thing = [c[:2] for c in combinations(self.held_out)][
                    rng.integers(len(combinations(self.held_out)))
                ]
        motion = None
        if thing[0]:
            motions = [
                m
                for m in MOTIONS
                if is_held_out(*thing, m) == self.held_out and (visible or m != "stay")
            ]
            motion = (
                motions[rng.integers(len(motions))]
                if motions
                else "stay"
                if visible
                else MOTIONS[rng.integers(4)]
            )
            if not visible:
                pose = _place_object(pose, motion, rng, enters=True)
        else:
            pose = replace(pose, object_x=math.nan, object_y=math.nan)
        action = Action(
            self._camera(rng, pose.scale, length), self.scene, *thing, motion, pillar=self.pillar
        )
        self.segments.append(Segment(last.stop, last.stop + length, action, pose))

    def segment(self, frame: int) -> Segment:
        """The segment that shows `frame`."""
        while self.segments[-1].stop <= frame:
            self._extend()
        return next(s for s in reversed(self.segments) if s.start <= frame)

    def action(self, frame: int) -> Action:
        """What the prompt at `frame` says."""
        return self.segment(frame).action

    def pose(self, frame: int) -> Pose:
        """Camera and object at `frame`."""
        s = self.segment(frame)
        steps = frame - s.start + (s.start > 0)
        a, p = s.action, s.pose
        verb, _, direction = a.camera.partition(" ")
        x, y, scale = p.x, p.y, p.scale
        if verb == "pan":
            dx, dy = DIRECTIONS[direction]
            x, y = x + steps * SPEED * dx / scale, y + steps * SPEED * dy / scale
        elif verb == "zoom":
            scale *= ZOOM ** (steps if direction == "in" else -steps)
        ox, oy = p.object_x, p.object_y
        if a.motion in DIRECTIONS:
            dx, dy = DIRECTIONS[a.motion]
            ox, oy = (_torus(v + steps * SPEED * d) if d else v for v, d in ((ox, dx), (oy, dy)))
        return Pose(x, y, scale, ox, oy)

    def frames(self, start: int, stop: int) -> np.ndarray:
        """Frames start..stop-1, uint8 [stop - start, SIZE, SIZE, 3]."""
        out = np.stack([self._render(self.pose(f), self.action(f)) for f in range(start, stop)])
        return np.rint(out * 255).astype(np.uint8)

    def _render(self, pose: Pose, action: Action) -> np.ndarray:
        view = _view(self.canvas, pose)
        if action.colour:
            mask, light = _object(action.shape, pose.object_x, pose.object_y, *self._stripes)
            colour = np.array(COLOURS[action.colour], np.float32) / 255
            view = view + mask[..., None] * (light[..., None] * colour - view)
        if self.pillar:
            cover = np.clip(4.5 - np.abs(np.arange(SIZE, dtype=np.float32) - SIZE / 2), 0, 1)[
                None, :, None
            ]
            view = view + cover * (np.float32(0.22) - view)
        return np.clip(view, 0, 1)


def _torus(v: float) -> float:
    period = SIZE + 2 * MARGIN
    return (v + MARGIN) % period - MARGIN


def _place_object(pose: Pose, motion: str, rng, enters: bool) -> Pose:
    """Put the object out of sight, about to enter by its motion near the middle, or somewhere in
    view.
    """
    if not enters or motion == "stay":
        ox, oy = rng.uniform(14, SIZE - 14, 2)
        return replace(pose, object_x=ox, object_y=oy)
    dx, dy = DIRECTIONS[motion]
    side = float(rng.uniform(22, SIZE - 22))
    edge = {1: -MARGIN + 1.0, -1: SIZE + MARGIN - 1.0, 0: side}
    return replace(pose, object_x=edge[dx], object_y=edge[dy])


def _view(canvas: np.ndarray, pose: Pose) -> np.ndarray:
    """The camera's view, bilinear on the periodic canvas; float32 [SIZE, SIZE, 3]."""
    offset = (np.arange(SIZE) - SIZE / 2) / pose.scale
    cols, rows = pose.x + offset, pose.y + offset
    c0, r0 = np.floor(cols).astype(int), np.floor(rows).astype(int)
    fc, fr = (
        (cols - c0).astype(np.float32)[None, :, None],
        (rows - r0).astype(np.float32)[:, None, None],
    )
    top, bottom = canvas[r0 % CANVAS], canvas[(r0 + 1) % CANVAS]
    if pose.scale == 1.0 and not fc.any() and not fr.any():
        return top[:, c0 % CANVAS]
    rows = top * (1 - fr) + bottom * fr
    return rows[:, c0 % CANVAS] * (1 - fc) + rows[:, (c0 + 1) % CANVAS] * fc


def _object(
    shape: str, x: float, y: float, angle: float, phase: float
) -> tuple[np.ndarray, np.ndarray]:
    """Antialiased mask and striped brightness of an object, each float32 [SIZE, SIZE]."""
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    dx, dy = grid[None, :] - np.float32(x), grid[:, None] - np.float32(y)
    if shape == "circle":
        distance = np.hypot(dx, dy) - RADIUS
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * RADIUS
    elif shape == "diamond":
        distance = (np.abs(dx) + np.abs(dy) - 1.2 * RADIUS) * np.float32(math.sqrt(0.5))
    elif shape == "triangle":
        distance = np.maximum(
            np.abs(dx) * np.float32(0.894) + (-dy - 0.9 * RADIUS) * np.float32(0.447),
            dy - 0.8 * RADIUS,
        )
    else:
        raise ValueError(f"shape {shape!r}; allowed: {SHAPES}")
    stripes = np.sin((dx * math.cos(angle) + dy * math.sin(angle)) * 0.6 + phase)
    return np.clip(0.5 - distance, 0, 1).astype(np.float32), (0.88 + 0.12 * stripes).astype(
        np.float32
    )
