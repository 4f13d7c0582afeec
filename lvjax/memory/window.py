# SPDX-License-Identifier: Apache-2.0
"""Where frames go in a cache of fixed size: the first ones stay (the sink), the others take turns.

The public implementations move everything behind the sink when the cache is full.  Attention does
not care in which order keys lie, and positions are not in the stored keys, so a ring without any
movement holds the same keys at every clip.
Source: guandeh17/Self-Forcing: wan/modules/causal_model.py (rolling window); NVlabs/LongLive, sink
and window; arXiv:2506.08009, arXiv:2509.22622.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from lvjax.core.errors import InputError


@dataclass(frozen=True)
class Window:
    """frames: latent frames that a clip attends to, the sink and the clip itself included.  sink:
    the first frames, which stay.  clip: frames of a clip.  first: frames of the first clip where it
    is shorter, as with an image in front; 0 where it is like the others.
    Raises: InputError when clips would lie across the ends of the sink or of the ring.
    """

    frames: int
    sink: int
    clip: int
    first: int = 0

    def __post_init__(self):
        if self.clip < 1 or not 0 <= self.first < self.clip or not 0 <= self.sink < self.frames:
            raise InputError(
                f"window of {self.frames} frames with a sink of {self.sink}, clips of {self.clip} "
                f"after {self.first}; give clip >= 1, 0 <= first < clip and 0 <= sink < frames"
            )
        ring, sink = self.frames - self.sink, max(self.sink - self.first, 0)
        if ring % self.clip or sink % self.clip or (self.sink == 0 and self.first):
            raise InputError(
                f"window={self.frames} and sink={self.sink} frames do not hold whole clips of "
                f"{self.clip} frames after {self.first}; the nearest sink is "
                f"{self.first + round(sink / self.clip) * self.clip}, and the rest a multiple of "
                f"{self.clip}"
            )

    def slot(self, frame):
        """The frame slot of a latent frame, int32 as `frame`."""
        turn = (frame - self.sink) % jnp.int32(self.frames - self.sink)
        return jnp.where(frame < self.frames, frame, self.sink + turn)

    def own(self, start, frames: int):
        """bool [frames of the cache]: the slots of a clip of so many frames that begins in slot
        `start`.
        """
        slots = jnp.arange(self.frames, dtype=jnp.int32)
        return (slots >= start) & (slots < start + frames)

    def seen(self, held, since):
        """bool [B, F]: which slots hold a frame that may be looked at: those of the sink, and the
        frames from number `since` on.  held: int32 [B, F], the frame of each slot, -1 for none.
        """
        sink = jnp.arange(self.frames, dtype=jnp.int32) < self.sink
        return (held >= 0) & (sink[None] | (held >= since))


# ---- positions in time -------------------------------------------------------------


def absolute(frames, held):
    """Frames by their own numbers."""
    return frames


def ranked(frames, held):
    """Frames by their place among those that are held: int32 as `frames` [..., F].

    Positions stay below the window's size, so a video may be endless; while nothing was evicted
    they are the frames' own numbers.
    held: int32 [B, S], the frames in memory, those of the clip being made among them, -1 for none.
    Source: NVlabs/LongLive: wan/modules/causal_model_infinity.py; Infinity-RoPE, arXiv:2511.20649.
    """
    rows = (held if frames.ndim == held.ndim else held[0])[..., None, :]
    before = (rows >= 0) & (rows < frames[..., None])
    return before.sum(-1).astype(jnp.int32)


POSITIONS = {"absolute": absolute, "relative": ranked}
"""(latent frames int32 [..., F], frames held int32 [B, S]) -> frames to rotate by."""
