# SPDX-License-Identifier: Apache-2.0
"""What a model is asked for when nothing else is said: `Defaults`, checked field by field."""

from dataclasses import dataclass

from lvjax.core.errors import InputError
from lvjax.core.fields import (
    FLAG,
    Rule,
    check_fields,
    is_real,
    is_whole,
    one_of,
    optional,
    real,
    whole,
)
from lvjax.flow.solvers import SOLVERS
from lvjax.memory.placement import SELECTIONS
from lvjax.methods import METHODS
from lvjax.rollout.clipwise import POSITIONS
from lvjax.rollout.condition import FILLS


def _pair(x, test) -> bool:
    return isinstance(x, (tuple, list)) and len(x) == 2 and all(map(test, x))


TYPES = ("float32", "bfloat16")
ALLOWED = {
    "fps": whole(1, 240),
    "size": Rule(lambda x: _pair(x, is_whole), "(height, width) in pixels, for example (64, 64)"),
    "clip_latents": whole(2),
    "overlap": whole(),
    "steps": whole(1, 1000),
    "shift": real(1e-3, 1e3, "3.0"),
    "solver": one_of(SOLVERS),
    "guidance": Rule(
        lambda x: is_real(x, 0, 100) or _pair(x, lambda y: is_real(y, 0, 100)),
        "a number from 0 to 100, 1 is none; or (low noise, high noise) for two experts",
    ),
    "window": Rule(
        lambda x: _pair(x, lambda y: is_real(y, 0, 1)) and x[0] < x[1],
        "(low, high) with 0 <= low < high <= 1, for example (0.3, 0.7)",
    ),
    "positions": one_of(POSITIONS),
    "fill": one_of(FILLS),
    "capacity": whole(),
    "selection": one_of(SELECTIONS),
    "max_selected": whole(),
    "delta": real(1e-6, 2, "0.02"),
    "spill": FLAG,
    "layers": Rule(
        lambda x: x is None or (_pair(x, lambda y: is_whole(y, 0)) and x[0] < x[1]),
        "None or (first, last) with 0 <= first < last",
    ),
    "upscale": whole(1, 64),
    "lookahead": FLAG,
    "method": one_of(METHODS),
    "negative": Rule(lambda x: isinstance(x, str), "text"),
    "boundary": Rule(
        lambda x: x is None or is_real(x, 1e-3, 0.999), "None or a number between 0 and 1"
    ),
    "impose": FLAG,
    "dtype": optional(one_of(TYPES)),
}
"""What each field of `Defaults` may be."""


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
        check_fields(self, "defaults", ALLOWED)
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
