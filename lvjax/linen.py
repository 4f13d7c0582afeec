# SPDX-License-Identifier: Apache-2.0
"""A Flax Linen face over the functional transformer: same parameter tree, same numbers.

For code built on `nn.Module`, `TrainState` or `tabulate`.  Nothing is computed here.
"""

import flax.linen as nn

from lvjax.core.params import init
from lvjax.models.config import DiTConfig
from lvjax.models.dit import Context, dit, dit_spec, embed_context


class WanDiT(nn.Module):
    """Wan's diffusion transformer; `init(key, ...)["params"]` has the tree of `dit_spec(cfg)`."""

    cfg: DiTConfig

    def setup(self):
        for name, spec in dit_spec(self.cfg).items():
            setattr(self, name, self.param(name, lambda key, spec=spec: init({"": spec}, key)[""]))

    def _params(self):
        return {name: getattr(self, name) for name in dit_spec(self.cfg)}

    def embed_context(self, text, image=None) -> Context:
        """Cross-attention keys and values of a prompt, for `apply(..., method="embed_context")`."""
        return embed_context(self._params(), text, self.cfg, image)

    def __call__(self, latents, timestep, text, image=None, **options):
        """Arguments and result (velocity, past, keys) of `lvjax.models.dit.dit`.

        text: [B, M, text_dim], or a `Context` computed before.  image: CLIP tokens, for models with
        an image branch.
        options: condition, rotation, past, remat.
        """
        context = text if isinstance(text, Context) else self.embed_context(text, image)
        return dit(self._params(), latents, timestep, context, self.cfg, **options)
