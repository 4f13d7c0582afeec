# SPDX-License-Identifier: Apache-2.0
"""What a session needs of a method, and what the methods' openings share."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lvjax.core.errors import InputError
from lvjax.core.offload import as_bits
from lvjax.models.dit import embed_context
from lvjax.models.vae import encode
from lvjax.rollout.method import Method
from lvjax.run.bundle import Bundle
from lvjax.run.request import Request
from lvjax.run.spill import ClipFiles


class Opening(NamedTuple):
    """A method, ready for a request.

    init: keys -> the first state.  place(state, mesh): the state laid out over the devices.
    clips(start): the clip inputs from number `start` on.
    skip_first, overlap_frames: pixel frames that clip 0, and every later clip, does not show.
    step: the method's step as more than one program, or None for one; a state is donated.
    spill: files -> the step, where clips leave the state for files.
    """

    method: Method
    init: Callable[[jax.Array], Any]
    place: Callable[[Any, Any], Any]
    clips: Callable[[int], Iterator[Any]]
    skip_first: int
    overlap_frames: int
    step: Callable[[Any, Any], tuple[Any, Any]] | None = None
    spill: Callable[[ClipFiles], Callable[[Any, Any], tuple[Any, Any]]] | None = None


class ClipWork(NamedTuple):
    """What one clip costs the transformer and the autoencoder.

    latents: its frames.  passes: of the transformer.  encoded: latent frames that the autoencoder
    makes of pictures.  kept: latent frames whose keys and values are held, its own among them, in
    the half-open range `layers`; 0 for a method without a memory.  spilled: clips of all videos,
    each with its keys and values, that are put into files at most.
    """

    latents: int
    passes: int
    encoded: int
    kept: int = 0
    layers: tuple[int, int] = (0, 0)
    spilled: int = 0

    @property
    def seen(self) -> int:
        """Latent frames that its tokens attend to where there is a memory."""
        return max(self.latents, self.kept)


_encode = jax.jit(encode, static_argnums=2)
_context = jax.jit(embed_context, static_argnums=2)


def encoder(bundle: Bundle) -> Callable:
    """frames [B, P, H, W, 3] -> latents, by the model's autoencoder."""
    return lambda video: _encode(bundle.params["vae"], video, bundle.vae)


def context(bundle: Bundle, rows, mesh, image=None, expert: str = "dit"):
    """What cross-attention needs of text rows [B, M, D] and image tokens, laid out over a mesh."""
    made = as_bits(_context(bundle.params[expert], rows, bundle.dit, image))
    return jax.device_put(made, NamedSharding(mesh, PartitionSpec(None, "data")))


def start_frames(request: Request):
    """The start of a resolved request, float32 [B, P, H, W, 3] on the host, or None.

    Raises: InputError when it is not of the video's size, or not for as many videos.
    """
    return _pictures(request.start, request, "start")


def last_frame(request: Request):
    """The last picture of a resolved request, float32 [B, 1, H, W, 3] on the host, or None.

    Raises: InputError as `start_frames`.
    """
    return _pictures(request.last, request, "last")


def _pictures(given, request: Request, which: str):
    if given is None:
        return None
    size, batch = request.size, len(request.timelines)
    frames = np.asarray(given, np.float32)
    frames = frames.reshape((1,) * (5 - frames.ndim) + frames.shape)
    if frames.shape[2:4] != size:
        raise InputError(
            f"the {which} picture is {frames.shape[3]}x{frames.shape[2]}, the video "
            f"{size[1]}x{size[0]}; fit it first"
        )
    if frames.shape[0] not in (1, batch):
        raise InputError(
            f"{frames.shape[0]} {which} pictures are given for {batch} videos; give one or all"
        )
    return np.broadcast_to(frames, (batch, *frames.shape[1:]))
