# SPDX-License-Identifier: Apache-2.0
"""The plan's figures of both published autoencoders, at full size and without their weights."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from lvjax.core.params import abstract
from lvjax.models import vae
from lvjax.models.config import WAN_VAE_2_1, WAN_VAE_2_2
from lvjax.run import costs
from tests.full import full_compiler  # noqa: F401

SIZE, LATENTS = (44, 80), 3
both = pytest.mark.parametrize("cfg", [WAN_VAE_2_1, WAN_VAE_2_2], ids=["2.1", "2.2"])


@both
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_operations_are_those_of_the_program(cfg, part):
    """The plan counts all three taps in time, also where the first chunk has zeros before it."""
    stride = cfg.spatial_stride
    shape = (LATENTS, *SIZE, cfg.z)
    if part == "encoder":
        frames = 1 + (LATENTS - 1) * cfg.temporal_stride
        shape = (frames, *(n * stride for n in SIZE), 3)
    code = partial({"encoder": vae.encode, "decoder": vae.decode}[part], cfg=cfg, piece="all")
    given = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    program = jax.jit(code).lower(abstract(vae.vae_spec(cfg)), given)
    operations = program.cost_analysis()["flops"]
    assert 1 < costs.vae_flops(cfg, part, LATENTS, SIZE) / operations < 1.25
