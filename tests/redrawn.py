# SPDX-License-Identifier: Apache-2.0
"""Independent oracles with parameters that all matter: none is zero or one, as gates, norms and
biases begin.
"""

from collections.abc import Callable

import numpy as np
import torch

Special = Callable[[torch.Tensor, float], torch.Tensor]


def redrawn(
    model: torch.nn.Module, special: dict[str, Special] | None = None, seed: int = 0
) -> torch.nn.Module:
    """The model with every parameter drawn anew, in place, for inference.

    special: {part of a name: f(normal noise, scale that keeps a product's size)}, in order, before
        the rules for tables, biases, gains and weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            fan = p[0].numel() ** -0.5
            own = [f for part, f in (special or {}).items() if part in name]
            if own:
                p.copy_(own[0](noise, fan))
            elif "table" in name or "pos_embed" in name:
                p.copy_(0.5 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif p.ndim == 1 or name.endswith("gamma"):
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(fan * noise)
    return model.eval()


def arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The parameters by the names of their own library."""
    return {name: p.detach().numpy() for name, p in model.named_parameters()}
