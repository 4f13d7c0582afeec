# SPDX-License-Identifier: Apache-2.0
"""Timelines of the lab: videos of the world's held-out split, scripted so that memory can be seen.

Every cycle of eight clips shows an empty place, which the camera leaves and comes back to, and then
an object, which comes in and leaves by the way it came.  So the object is away for four clips whose
prompts do not name it, and comes back under the prompt it had before; the world renders what a
perfect model would show.  Nothing else uses these videos: training has the other split, and every
check and tuning another seed.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lvjax.data.prompts import DIRECTIONS, Action
from lvjax.data.world import (
    CLIP_STRIDE,
    FPS,
    GIVEN,
    MARGIN,
    SIZE,
    Pose,
    Segment,
    Video,
    combinations,
)
from lvjax.lab.object_metrics import Absence, absences

SEED = 22370  # of the world's videos; that of every other check is 0
FIRST = 300_000
PHASE = 2 * CLIP_STRIDE  # frames for which a prompt holds
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


class Timeline(NamedTuple):
    """video: what the world shows.  frames: how many.  moments: ((seconds, prompt), ...).  gone:
    when the object is away and comes back.
    """

    video: Video
    frames: int
    moments: tuple[tuple[float, str], ...]
    gone: tuple[Absence, ...]

    @property
    def start(self) -> np.ndarray:
        """The picture that a model is given, uint8 [SIZE, SIZE, 3]; no object is in it."""
        return self.video.frames(0, 1)[0]


def draw_timelines(count: int, frames: int) -> list[Timeline]:
    """The first `count` timelines, of `frames` frames each; a longer one begins as a shorter one.

    Scenes, and colour, shape and first motion of the objects together, were never trained on.
    """
    things = [c for c in combinations(held_out=True) if c[2] in DIRECTIONS]
    order = np.random.default_rng(SEED).permutation(len(things))
    return [_timeline(i, things[order[i % len(order)]], frames) for i in range(count)]


def _timeline(i: int, thing: tuple[str, str, str], frames: int) -> Timeline:
    colour, shape, motion = thing
    way = list(DIRECTIONS)[np.random.default_rng([SEED, i]).integers(len(DIRECTIONS))]
    actions = (
        Action(f"pan {way}", ""),
        Action(f"pan {OPPOSITE[way]}", ""),
        Action("still", "", colour, shape, motion),
        Action("still", "", colour, shape, OPPOSITE[motion]),
    )
    video = Video(
        FIRST + i, seed=SEED, split="held_out", kind=("photo", "texture")[i % 2], first=actions[0]
    )
    side = float(np.random.default_rng([SEED, i, 1]).uniform(22, SIZE - 22))
    _follow(video, [replace(a, scene=video.scene) for a in actions], side, frames)
    moments = tuple((s.start / FPS, s.action.prompt()) for s in video.segments)
    return Timeline(video, frames, moments, tuple(absences(video, frames)))


def _follow(video: Video, actions: list[Action], side: float, frames: int) -> None:
    """Give a video the script in place of its own segments, over and over up to `frames`."""
    first = video.segments[0].pose
    video.segments = [Segment(0, PHASE + GIVEN, actions[0], Pose(first.x, first.y, first.scale))]
    while (last := video.segments[-1]).stop < frames:
        action, pose = actions[len(video.segments) % len(actions)], video.pose(last.stop - 1)
        if action.colour is None:
            pose = Pose(pose.x, pose.y, pose.scale)
        elif last.action.colour is None:
            pose = _before_entry(pose, action.motion, side)
        video.segments.append(Segment(last.stop, last.stop + PHASE, action, pose))


def _before_entry(pose: Pose, motion: str, side: float) -> Pose:
    """The object out of sight, about to come in by its motion."""
    dx, dy = DIRECTIONS[motion]
    edge = {1: -MARGIN + 1.0, -1: SIZE + MARGIN - 1.0, 0: side}
    return replace(pose, object_x=edge[dx], object_y=edge[dy])
