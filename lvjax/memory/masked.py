# SPDX-License-Identifier: Apache-2.0
"""Which frames of one long sequence see which, for training without a cache.

A `Masked` stands where a memory stands (memory/cache.py), so that a model needs to know nothing.
Source: guandeh17/Self-Forcing: wan/modules/causal_model.py (block-causal and teacher-forcing
masks); tianweiy/CausVid; NVlabs/LongLive (sinks).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lvjax.core.errors import InputError


@struct.dataclass
class Masked:
    """Attention of a sequence to itself under a mask; the interface of `Past`.

    mask: bool [B|1, 1, L, L], True where a query (row) sees a key.
    layers: (first, last), the half-open range of DiT layers that it holds in.
    """

    mask: jax.Array
    layers: tuple[int, int] = struct.field(pytree_node=False)

    @property
    def written(self):
        """Nothing."""
        return ()

    def with_written(self, written) -> "Masked":
        """The same mask."""
        return self

    def check(self, tokens: int) -> None:
        """Raises: InputError for a sequence of another length."""
        if self.mask.shape[-1] != tokens:
            raise InputError(f"a mask of {self.mask.shape[-1]} tokens for {tokens}")

    def extend(self, layer, k, v):
        """As `Past.extend`; there is nothing beside the sequence's own k and v."""
        return self, k, v, self.mask


def masked(frames, cfg, grid: tuple[int, int]) -> Masked:
    """A mask over frames, bool [T, T], for the tokens of frames of a grid (h, w), in all layers."""
    tokens = grid[0] * grid[1]
    mask = np.repeat(np.repeat(np.asarray(frames), tokens, 0), tokens, 1)
    return Masked(jnp.asarray(mask[None, None]), (0, cfg.num_layers))


def clips_of(frames: int, clip: int, first: int = 0) -> np.ndarray:
    """int [frames]: the clip that each frame belongs to; `first` frames before the first whole
    clip, if any, are a clip of their own.
    """
    place = np.arange(frames) - first
    return np.where(place < 0, 0, place // clip + (first > 0))


def causal(
    frames: int, clip: int, window: int | None = None, sink: int = 0, first: int = 0
) -> np.ndarray:
    """bool [T, T]: a frame sees its own clip and earlier ones.

    window: of which only the last frames up to so many, its clip and the sink included, and the
      first `sink` frames; None for all.
    """
    own = clips_of(frames, clip, first)
    end = np.array([np.flatnonzero(own == i)[-1] + 1 for i in own])
    key = np.arange(frames)
    seen = key[None] < end[:, None]
    if window is not None:
        seen &= (key[None] >= end[:, None] - (window - sink)) | (key[None] < sink)
    return seen


def teacher_forcing(frames: int, clip: int, first: int = 0) -> np.ndarray:
    """bool [2T, 2T] of a sequence of clean frames, then noisy ones: clean frames are causal; a
    noisy clip sees itself and the clean clips before it.
    """
    own = clips_of(frames, clip, first)
    clean, before, same = (
        op(own[:, None], own[None]) for op in (np.greater_equal, np.greater, np.equal)
    )
    return np.block([[clean, np.zeros_like(clean)], [before, same]])
