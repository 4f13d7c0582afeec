# SPDX-License-Identifier: Apache-2.0
"""Frequencies of the temporal axis for videos longer than those a model was trained on.

Each policy gives the frequencies, uint32 in 2**-32 turn per frame as `rope.turns`, of the three
axes; those of rows and columns stay as they are.  Queries and keys must use the same from frame 0
on.
Source: LoL, arXiv:2601.16914, section 4 and its baselines; Position Interpolation arXiv:2306.15595;
NTK-aware scaling; YaRN arXiv:2309.00071; thu-ml/RIFLEx arXiv:2502.15894.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lvjax.core.errors import InputError
from lvjax.nn.rope import TURN, axis_pairs, turns

TRAINED = 132
"""Latent frames before the first collapse of Wan 2.1 under rolling generation with a sink."""


def frequencies(head_dim: int, theta=10000.0) -> np.ndarray:
    """Of the temporal axis, float64 radians per frame [..., pairs], highest first: theta**(-i/K),
    i = 0 ... K - 1.
    """
    pairs = axis_pairs(head_dim)[0]
    return np.asarray(theta, np.float64)[..., None] ** (-np.arange(pairs) / pairs)


def _with_time(head_dim: int, theta: float, omega) -> tuple[np.ndarray, ...]:
    """Three axes, the temporal one with other frequencies, radians per frame [pairs]."""
    time = np.round(np.asarray(omega) / (2 * np.pi) * TURN).astype(np.uint64).astype(np.uint32)
    return time, *turns(head_dim, theta)[1:]


def plain(head_dim: int, theta: float, length: int, trained: int = TRAINED):
    """As trained ("PE")."""
    return turns(head_dim, theta)


def interpolated(head_dim: int, theta: float, length: int, trained: int = TRAINED):
    """Position interpolation ("PI"): all frequencies divided by s = length / trained."""
    return _with_time(head_dim, theta, frequencies(head_dim, theta) * trained / length)


def ntk(head_dim: int, theta: float, length: int, trained: int = TRAINED):
    """NTK-aware: the base multiplied by s**(d / (d - 2)), d twice the pairs of the axis."""
    d = 2 * axis_pairs(head_dim)[0]
    return _with_time(
        head_dim, theta, frequencies(head_dim, theta * (length / trained) ** (d / (d - 2)))
    )


def yarn(head_dim: int, theta: float, length: int, trained: int = TRAINED):
    """YaRN: frequencies with fewer than 1 turn in `trained` frames are divided by s, those with
    more than 32 stay, in between linearly.
    """
    omega = frequencies(head_dim, theta)
    stays = np.clip((trained * omega / (2 * np.pi) - 1) / (32 - 1), 0, 1)
    return _with_time(head_dim, theta, omega * (stays + (1 - stays) * trained / length))


def riflex(head_dim: int, theta: float, length: int, trained: int = TRAINED, share: float = 0.9):
    """RIFLEx: the frequency whose period is nearest to `trained` is lowered so that a video of
    `length` stays within `share` of one period.
    """
    omega = frequencies(head_dim, theta)
    omega[intrinsic(head_dim, theta, trained)] = share * 2 * np.pi / length
    return _with_time(head_dim, theta, omega)


def intrinsic(head_dim: int, theta: float, trained: int = TRAINED) -> int:
    """The frequency, counted from 0, whose period, rounded to frames, is nearest to `trained`."""
    period = np.round(2 * np.pi / frequencies(head_dim, theta))
    return int(np.abs(period - trained).argmin())


POLICIES = {"pe": plain, "pi": interpolated, "ntk": ntk, "yarn": yarn, "riflex": riflex}
"""(head_dim, theta, length of the video in latent frames, trained) -> frequencies of three axes."""


def jittered(key, head_dim: int, num_heads: int, theta: float = 10000.0, jitter: float = 0.8):
    """One base per head, theta (1 + jitter e), e uniform in [-1, 1], for the temporal axis: uint32
    [N, pairs] of three axes, as `rope.head_tables` takes them.

    key: typed; a stream keeps its draw, as cached keys are turned by it.
    jitter: below 1; 0 is the model's own, bit for bit.  The paper recommends 0.8.
    Raises: InputError for another jitter.
    Source: LoL, arXiv:2601.16914, algorithm 1.
    """
    if not 0 <= jitter < 1:
        raise InputError(f"jitter is {jitter}; give a number from 0 to below 1, for example 0.8")
    e = np.asarray(jax.random.uniform(key, (num_heads,), jnp.float32, -1.0, 1.0), np.float64)
    time = turns(head_dim, theta * (1 + jitter * e))[0]
    same = turns(head_dim, np.full(num_heads, theta))
    return time, *same[1:]


def coherence(head_dim: int, distance, theta=10000.0) -> np.ndarray:
    """The mean phase factor over the temporal frequencies at a distance in latent frames: complex
    [..., distances]; its real part is what a query that equals a key would score.

    theta: a number, or one per head [N].
    Source: LoL, arXiv:2601.16914, section 4; exponents from 0 as Wan has them.
    """
    omega = frequencies(head_dim, theta)
    return np.exp(1j * omega[..., None, :] * np.asarray(distance, np.float64)[:, None]).mean(-1)
