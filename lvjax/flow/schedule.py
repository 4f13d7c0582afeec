# SPDX-License-Identifier: Apache-2.0
"""Noise levels and what the network is told at each of them.

Owns: the grids of the official samplers, shifting, and checks.  Everything here is NumPy float64 on
the host; solvers turn it into coefficients once, when a sampler is built.  Does not own: any step
rule.
"""

from dataclasses import dataclass

import numpy as np

from lvjax.core.errors import InputError

KINDS = ("unipc", "dpm++", "euler")
_UNIPC_TOP = float(np.float32(0.999))  # the official class keeps its largest sigma in float32


@dataclass(frozen=True, eq=False)
class Schedule:
    """sigmas: float64 [n+1], strictly falling, 1 = noise, 0 = data.  timesteps: float32 [n], the
    network's input.

    A host value: close over it, do not pass it through `jit`.  Compares and hashes by value.
    """

    sigmas: np.ndarray
    timesteps: np.ndarray

    def _key(self) -> tuple[bytes, bytes]:
        return self.sigmas.tobytes(), self.timesteps.tobytes()

    def __eq__(self, other):
        return isinstance(other, Schedule) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        return len(self.timesteps)


def shifted(sigma, shift: float):
    """shift * s / (1 + (shift - 1) s): moves steps towards the noisy end (float64)."""
    sigma = np.asarray(sigma, np.float64)
    return shift * sigma / (1 + (shift - 1) * sigma)


def from_sigmas(sigmas, timesteps=None, integer_timesteps: bool = True) -> Schedule:
    """A schedule of explicit noise levels, the last of them included (few-step models: 1, .9375,
    .8333, .625, 0).

    timesteps: what the network is told; by default 1000 sigma, truncated to an integer unless
    `integer_timesteps` is False.
    Raises: InputError unless the levels fall strictly within [0, 1] and the lengths agree.
    """
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise InputError(f"sigmas has shape {sigmas.shape}; give at least two noise levels")
    if not (np.all(np.diff(sigmas) < 0) and sigmas[0] <= 1 and sigmas[-1] >= 0):
        raise InputError(
            f"sigmas {sigmas.tolist()} must fall strictly from at most 1 to at least 0"
        )
    if timesteps is None:
        timesteps = 1000 * sigmas[:-1]
        timesteps = np.trunc(timesteps) if integer_timesteps else timesteps
    timesteps = np.asarray(timesteps, np.float32)
    if timesteps.shape != (len(sigmas) - 1,):
        raise InputError(
            f"timesteps has shape {timesteps.shape}; {len(sigmas)} sigmas need {len(sigmas) - 1}"
        )
    return Schedule(sigmas, timesteps)


def make_schedule(
    steps: int, shift: float, kind: str = "unipc", integer_timesteps: bool = True
) -> Schedule:
    """The official grid of `steps` noise levels for a sampler, 0 appended.

    kind: "unipc" (starts just below 1), "dpm++" or "euler" (start at 1).  shift: 3 or 5 in Wan 2.1,
    up to 12 in Wan 2.2.  integer_timesteps: truncate 1000 sigma to an integer, as Wan does;
    few-step models do not.
    Raises: InputError on an unknown kind or a non-positive size.
    Source: Wan-Video/Wan2.1, wan/utils/fm_solvers_unipc.py and fm_solvers.py.
    """
    if kind not in KINDS:
        raise InputError(f"kind={kind!r} is not a known grid; choose one of {list(KINDS)}")
    if steps < 1 or shift <= 0:
        raise InputError(f"steps={steps}, shift={shift}; both must be positive")
    top = _UNIPC_TOP if kind == "unipc" else 1.0
    base = np.linspace(top, 0.0, steps + 1)[:-1]
    sigmas = np.append(shifted(base, shift), 0.0)
    return from_sigmas(sigmas, integer_timesteps=integer_timesteps)
