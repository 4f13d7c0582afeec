# SPDX-License-Identifier: Apache-2.0
"""A whole model, random and tiny, for tests of everything above the models; and how far two arrays
are apart.
"""

import dataclasses

import jax
import numpy as np

from lvjax.data.prompts import VOCABULARY
from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.pocket_text import PocketTextConfig
from lvjax.run.bundle import Bundle, specs
from lvjax.run.defaults import Defaults
from tests.drawn import drawn

DIT = DiTConfig(
    32,
    2,
    2,
    48,
    condition_channels=20,
    patch=(1, 1, 1),
    text_dim=16,
    text_len=16,
    freq_dim=32,
    dtype="float32",
)
VAE = VAEConfig(8, 16, (1, 1, 2), 1, (True, True), 2, (0.0,) * 16, (1.0,) * 16)
SMALL_DIT = DiTConfig(
    48,
    2,
    2,
    64,
    in_channels=4,
    out_channels=4,
    condition_channels=3,
    text_dim=8,
    text_len=6,
    freq_dim=16,
    dtype="float32",
)
"""For tests of the transformer alone: Wan's patches, and no two sizes alike."""
TEXT = PocketTextConfig(len(VOCABULARY) + 1, dim=16)
DEFAULTS = Defaults(size=(16, 16), steps=4, upscale=2)


def tiny_bundle() -> Bundle:
    """Random weights; the head is damped, so that rounding does not grow along a rollout."""
    outline = Bundle("tiny", DIT, VAE, TEXT, DEFAULTS, {})
    parts = specs(outline)
    params = {k: drawn(s, i) for i, (k, s) in enumerate(parts.items())}
    head = params["dit"]["head"]["linear"]
    head["kernel"] = 0.05 * jax.random.normal(jax.random.key(9), head["kernel"].shape)
    hashes = {k: "0" * 64 for k in parts}
    return dataclasses.replace(outline, params=params, hashes=hashes)


def relative(a, b) -> float:
    """|a - b| / |b| in float64."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
