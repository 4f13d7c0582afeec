# SPDX-License-Identifier: Apache-2.0
"""diffusers' transformer with parameters that all matter, for the tests that compare with it."""

import torch
from diffusers import WanTransformer3DModel

from lvjax.models.config import DiTConfig
from tests.redrawn import redrawn


class Sinusoid(torch.nn.Module):
    """The timestep features in float64, as the official model computes them; diffusers' are
    float32.
    """

    def __init__(self, dim: int = 256):
        super().__init__()
        self.half = dim // 2

    def forward(self, t):
        exponent = torch.arange(self.half, dtype=torch.float64) / self.half
        angle = t.double()[:, None] * 10000.0**-exponent
        return torch.cat([angle.cos(), angle.sin()], -1).float()


def transformer(cfg: DiTConfig, seed: int = 0) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=cfg.num_heads,
        attention_head_dim=cfg.head_dim,
        in_channels=cfg.in_channels + cfg.condition_channels,
        out_channels=cfg.out_channels,
        text_dim=cfg.text_dim,
        ffn_dim=cfg.ffn_dim,
        num_layers=cfg.num_layers,
        image_dim=cfg.image_dim,
        added_kv_proj_dim=None if cfg.image_dim is None else cfg.dim,
        pos_embed_seq_len=cfg.image_pos_len or None,
    )
    redrawn(model, seed=seed).condition_embedder.timesteps_proj = Sinusoid()
    return model
