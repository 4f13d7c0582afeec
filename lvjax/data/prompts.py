# SPDX-License-Identifier: Apache-2.0
"""The pocket world's language: its closed vocabulary, what it can say, and prompts to token ids.

A prompt says what the camera does over which scene, and what one object does:
"the camera pans left over a landscape, a red circle moves up".
"""

import difflib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

COLOURS = {
    "red": (232, 36, 36),
    "green": (36, 205, 60),
    "blue": (40, 70, 238),
    "yellow": (242, 222, 36),
    "cyan": (36, 216, 224),
    "purple": (178, 44, 216),
}
SHAPES = ("circle", "square", "triangle", "diamond")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CAMERAS = ("still", "pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out")
SCENES = (
    "landscape",
    "plants",
    "room",
    "animal",
    "person",
    "building",
    "clouds",
    "marble",
    "cells",
    "waves",
)

ARTICLES = {"landscape": "a ", "room": "a ", "animal": "an ", "person": "a ", "building": "a "}

WORDS = (
    *("camera", "still", "pans", "zooms", "in", "out", "left", "right", "up", "down", "over"),
    *SCENES, *COLOURS, *SHAPES, *("moves", "stays", "behind", "pillar"),
)  # fmt: skip
VOCABULARY = {
    word: i + 1 for i, word in enumerate(WORDS)
}  # id 0 is padding, and alone the null prompt
MAX_WORDS = 16
ALIASES = {
    "pan": "pans", "panning": "pans", "slides": "pans", "zoom": "zooms", "zooming": "zooms",
    "move": "moves", "moving": "moves", "goes": "moves", "flies": "moves", "stay": "stays",
    "rests": "stays", "upwards": "up", "downwards": "down", "leftwards": "left",
    "rightwards": "right", "ball": "circle", "disc": "circle", "box": "square",
    "violet": "purple", "static": "still", "mountains": "landscape", "meadow": "landscape",
    "forest": "plants", "flowers": "plants", "leaves": "plants", "indoors": "room",
    "house": "building", "portrait": "person", "cat": "animal", "dog": "animal", "bird": "animal",
    "sky": "clouds", "post": "pillar",
}  # fmt: skip
FILLERS = frozenset(
    "a an the is are of at on and then with to it its from across this that by while".split()
)


@dataclass(frozen=True)
class Action:
    """What one segment shows.  camera: one of CAMERAS; colour, shape, motion: the object, or None;
    motion "stay" or a direction.
    """

    camera: str
    scene: str
    colour: str | None = None
    shape: str | None = None
    motion: str | None = None
    pillar: bool = False

    def prompt(self, scene: bool = True) -> str:
        """The sentence for this action; `scene=False` leaves the scene unnamed."""
        verb, _, direction = self.camera.partition(" ")
        text = "the camera is still" if verb == "still" else f"the camera {verb}s {direction}"
        if scene:
            text += f" over {ARTICLES.get(self.scene, '')}{self.scene}"
        if self.colour:
            does = "stays" if self.motion == "stay" else f"moves {self.motion}"
            text += f", a {self.colour} {self.shape} {does}"
            if self.pillar:
                text += " behind a pillar"
        return text


class Encoded(NamedTuple):
    """A prompt for the model.

    ids: int32 [MAX_WORDS], 0 = padding.  unknown: the words that are not in the vocabulary, each
    with the nearest that is.  cut: the words of the vocabulary behind the first MAX_WORDS.
    """

    ids: np.ndarray
    unknown: list[tuple[str, str | None]]
    cut: list[str]


@lru_cache(maxsize=4096)
def _nearest(word: str) -> str | None:
    if len(word) > 40:  # no word of ours is near
        return None
    near = difflib.get_close_matches(word, [*WORDS, *ALIASES], n=1, cutoff=0.0)
    return near[0] if near else None


def encode(prompt: str) -> Encoded:
    """Token ids of a prompt, and what the model does not get to read of it."""
    known, unknown = [], []
    for word in re.findall(r"[^\W_]+", prompt.lower()):
        own = ALIASES.get(word, word)
        if own in VOCABULARY:
            known.append((word, VOCABULARY[own]))
        elif own not in FILLERS:
            unknown.append((own, _nearest(own)))
    ids = np.zeros(MAX_WORDS, np.int32)
    ids[: len(known[:MAX_WORDS])] = [i for _, i in known[:MAX_WORDS]]
    return Encoded(ids, unknown, [word for word, _ in known[MAX_WORDS:]])
