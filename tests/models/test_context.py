# SPDX-License-Identifier: Apache-2.0
"""What a context is made of: of layers that wait, only what makes keys and values comes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lvjax.core.params import abstract
from lvjax.models import dit as module
from lvjax.models.dit import dit_spec, embed_context
from tests.tiny import SMALL_DIT


@pytest.mark.parametrize("image_dim", (None, 12))
def test_queries_and_the_output_do_not_come(monkeypatch, image_dim):
    cfg, came = replace(SMALL_DIT, image_dim=image_dim), []

    def fetch(tree):
        came.append(set(tree))
        return tree

    monkeypatch.setattr(module, "fetch", fetch)
    text, image = (jax.ShapeDtypeStruct((2, 5, n), jnp.float32) for n in (cfg.text_dim, 12))
    pictures = (image,) if image_dim else ()
    jax.eval_shape(
        lambda p, text, *image: embed_context(p, text, cfg, *image),
        abstract(dit_spec(cfg)),
        text,
        *pictures,
    )
    assert came == [{"k", "norm_k", "v"}, {"k_img", "norm_k_img", "v_img"}][: 1 + bool(image_dim)]
