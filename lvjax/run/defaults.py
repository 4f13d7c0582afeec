# SPDX-License-Identifier: Apache-2.0
"""What a model is asked for when nothing else is said: `Defaults`, checked field by field."""

import math
from dataclasses import dataclass

from lvjax.core.errors import InputError
from lvjax.flow.solvers import SOLVERS
from lvjax.memory.placement import SELECTIONS
from lvjax.methods import METHODS
from lvjax.rollout.clipwise import POSITIONS
from lvjax.rollout.condition import FILLS


def _whole(x, low: int = 1, high: float = math.inf) -> bool:
    return type(x) is int and low <= x <= high


def _real(x, low: float, high: float) -> bool:
    return type(x) in (int, float) and low <= x <= high


def _pair(x, test) -> bool:
    return isinstance(x, (tuple, list)) and len(x) == 2 and all(map(test, x))


TYPES = ("float32", "bfloat16")
ALLOWED = {
    "fps": (lambda x: _whole(x, 1, 240), "a whole number from 1 to 240"),
    "size": (lambda x: _pair(x, _whole), "(height, width) in pixels, for example (64, 64)"),
    "clip_latents": (lambda x: _whole(x, 2), "a whole number from 2"),
    "overlap": (_whole, "a whole number from 1"),
    "steps": (lambda x: _whole(x, 1, 1000), "a whole number from 1 to 1000"),
    "shift": (lambda x: _real(x, 1e-3, 1e3), "a number from 0.001 to 1000, for example 3.0"),
    "solver": (lambda x: x in tuple(SOLVERS), f"one of {', '.join(SOLVERS)}"),
    "guidance": (
        lambda x: _real(x, 0, 100) or _pair(x, lambda y: _real(y, 0, 100)),
        "a number from 0 to 100, 1 is none; or (low noise, high noise) for two experts",
    ),
    "window": (
        lambda x: _pair(x, lambda y: _real(y, 0, 1)) and x[0] < x[1],
        "(low, high) with 0 <= low < high <= 1, for example (0.3, 0.7)",
    ),
    "positions": (lambda x: x in tuple(POSITIONS), f"one of {', '.join(POSITIONS)}"),
    "fill": (lambda x: x in FILLS, f"one of {', '.join(FILLS)}"),
    "capacity": (_whole, "a whole number from 1"),
    "selection": (lambda x: x in tuple(SELECTIONS), f"one of {', '.join(SELECTIONS)}"),
    "max_selected": (_whole, "a whole number from 1"),
    "delta": (lambda x: _real(x, 1e-6, 2), "a number from 0.000001 to 2, for example 0.02"),
    "spill": (lambda x: type(x) is bool, "True or False"),
    "layers": (
        lambda x: x is None or (_pair(x, lambda y: _whole(y, 0)) and x[0] < x[1]),
        "None or (first, last) with 0 <= first < last",
    ),
    "upscale": (lambda x: _whole(x, 1, 64), "a whole number from 1 to 64"),
    "lookahead": (lambda x: type(x) is bool, "True or False"),
    "method": (lambda x: x in tuple(METHODS), f"one of {', '.join(METHODS)}"),
    "negative": (lambda x: isinstance(x, str), "text"),
    "boundary": (lambda x: x is None or _real(x, 1e-3, 0.999), "None or a number between 0 and 1"),
    "impose": (lambda x: type(x) is bool, "True or False"),
    "dtype": (lambda x: x is None or x in TYPES, f"None or one of {', '.join(TYPES)}"),
}
"""What each field of `Defaults` may be: a test, and the same in words."""


@dataclass(frozen=True)
class Defaults:
    """What `generate` uses when nothing else is said.

    size: (height, width) in pixels.  clip_latents: latent frames per clip.  overlap: latent frames
      shared by neighbours.
    steps, shift, solver, guidance, window: the sampler.  upscale: whole-number enlargement of what
      is shown.
    positions, fill, capacity: see `methods.error_free`.
    selection: which earlier clips a clip sees, at most `max_selected` of them: those with the most
      similar prompts "prompt", the "last", the first and the last "first_last", or "none".
    delta: how close the cosines of two prompts must be to count as equal, see `memory.placement`.
    spill: keep the clips that leave the bank in files, from where one that is selected comes back:
      every clip sees what it would see in a bank without an end.
    lookahead: choose what the bank keeps by the whole timeline.  A later prompt can then change
      what earlier clips remember, and so their pictures (never their prompts).
    method: a name in `methods.METHODS`.  negative: the prompt that guidance leads away from.
    boundary, impose: see `methods.wan`.  dtype: of the activations; None for the model's own.
    Raises: InputError naming the field, what was given and what is allowed.
    """

    fps: int = 8
    size: tuple[int, int] = (64, 64)
    clip_latents: int = 5
    overlap: int = 2
    steps: int = 16
    shift: float = 3.0
    solver: str = "unipc"
    guidance: float | tuple[float, float] = 2.0
    window: tuple[float, float] = (0.3, 0.7)
    positions: str = "relative"
    fill: str = "position"
    capacity: int = 6
    selection: str = "prompt"
    max_selected: int = 5
    delta: float = 0.02
    spill: bool = False
    layers: tuple[int, int] | None = None
    upscale: int = 6
    lookahead: bool = False
    method: str = "error_free"
    negative: str = ""
    boundary: float | None = None
    impose: bool = False
    dtype: str | None = None

    def __post_init__(self):
        for name, (test, words) in ALLOWED.items():
            if not test(value := getattr(self, name)):
                raise InputError(f"defaults.{name} is {value!r}; give {words}")
        if self.overlap >= self.clip_latents:
            raise InputError(
                f"defaults.overlap is {self.overlap}, clip_latents {self.clip_latents}; give an "
                f"overlap from 1 to {self.clip_latents - 1}, or longer clips"
            )
        if self.spill and (why := self._no_spill()):
            raise InputError(f"defaults.spill is True, {why}")

    def _no_spill(self) -> str | None:
        """What speaks against files for clips that leave the bank, if anything."""
        if self.selection != "prompt":
            return f"selection {self.selection!r}, which never goes back to a clip; leave spill out"
        if self.lookahead:
            return "and with it no clip is lost that lookahead could keep; leave lookahead out"
        if self.capacity <= self.max_selected:
            return (
                f"capacity {self.capacity}; a clip and the {self.max_selected} that it may see "
                f"need at least {self.max_selected + 1}"
            )
        return None
