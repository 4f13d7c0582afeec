# SPDX-License-Identifier: Apache-2.0
"""The image encoder of Wan 2.1's image-to-video models, CLIP's ViT-H/14: `image_encoder_spec`,
`encode_image`.

Owns: normalised pixels to image tokens.  Does not own: an image to pixels (io/clip_image.py).
Source: Wan-Video/Wan2.1: wan/modules/clip.py; arXiv:2103.00020.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from lvjax.core.params import Param, Spec, stack
from lvjax.core.shapes import expect
from lvjax.kernels.attention import attend
from lvjax.models.config import DTYPES, check, check_real, check_sizes
from lvjax.models.dit_block import norm_spec
from lvjax.nn.embed import patchify
from lvjax.nn.linear import linear, linear_spec
from lvjax.nn.norm import layer_norm


@dataclass(frozen=True)
class ImageEncoderConfig:
    """CLIP's vision transformer.  Defaults: ViT-H/14, of Wan 2.1's I2V and FLF2V.

    size: pixels on a side of the square picture, a multiple of patch.  num_layers: all of them,
      though the last gives no features.  projection_dim: width of the projection that a checkpoint
      may hold and Wan does not use; None where there is none.
    dtype: activations.  One picture is little work, so that float32 is the default, and a half
      precision is not needed.
    """

    dim: int = 1280
    num_heads: int = 16
    num_layers: int = 32
    mlp_dim: int = 5120
    patch: int = 14
    size: int = 224
    channels: int = 3
    projection_dim: int | None = None
    eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self):
        check_sizes(self, "dim", "num_heads", "num_layers", "mlp_dim", "patch", "size", "channels")
        if self.projection_dim is not None:
            check_sizes(self, "projection_dim")
        check_real(self, "eps", 0, 1)
        check(self, "dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        divides = self.dim % self.num_heads == 0
        check(self, "dim", divides, f"a multiple of num_heads, {self.num_heads}")
        check(self, "size", self.size % self.patch == 0, f"a multiple of patch, {self.patch}")

    @property
    def num_tokens(self) -> int:
        """The class token and one for each patch."""
        return 1 + (self.size // self.patch) ** 2


def _block_spec(cfg: ImageEncoderConfig) -> Spec:
    attn = {name: linear_spec(cfg.dim, cfg.dim, ("embed", "heads")) for name in "qkv"}
    return {
        "norm1": norm_spec(cfg.dim),
        "attn": attn | {"o": linear_spec(cfg.dim, cfg.dim, ("heads", "embed"))},
        "norm2": norm_spec(cfg.dim),
        "mlp": {
            "fc1": linear_spec(cfg.dim, cfg.mlp_dim, ("embed", "mlp")),
            "fc2": linear_spec(cfg.mlp_dim, cfg.dim, ("mlp", "embed")),
        },
    }


def image_encoder_spec(cfg: ImageEncoderConfig) -> Spec:
    """Parameters of the whole encoder, those among them that give no features (the last block,
    post_norm, projection), so that a checkpoint comes back as it was.
    """
    cell, axes = cfg.channels * cfg.patch**2, ("channels_in", "embed")
    spec = {
        "class_embedding": Param((cfg.dim,), ("embed",), cfg.dim**-0.5),
        "position": Param((cfg.num_tokens, cfg.dim), (None, "embed"), cfg.dim**-0.5),
        "patch_embedding": linear_spec(cell, cfg.dim, axes, bias=False),
        "pre_norm": norm_spec(cfg.dim),
        "blocks": stack(_block_spec(cfg), cfg.num_layers),
        "post_norm": norm_spec(cfg.dim),
    }
    if cfg.projection_dim is not None:
        out = ("embed", "channels_out")
        spec["projection"] = linear_spec(cfg.dim, cfg.projection_dim, out, bias=False)
    return spec


def _embed(params, pixels, cfg: ImageEncoderConfig):
    """pixels [B, H, W, C] -> class and patch tokens with their positions, float32 [B, N, C]."""
    cells = patchify(pixels[:, None], (1, cfg.patch, cfg.patch)).astype(cfg.dtype)
    patches = linear(params["patch_embedding"], cells, jnp.float32)
    first = params["class_embedding"].astype(jnp.float32)
    first = jnp.broadcast_to(first, (pixels.shape[0], 1, cfg.dim))
    tokens = jnp.concatenate([first, patches], axis=1)
    return layer_norm(
        tokens + params["position"].astype(jnp.float32)[None], cfg.eps, params["pre_norm"]
    )


def _block(params, x, cfg: ImageEncoderConfig):
    """One layer of the residual stream x, float32 [B, N, C]."""
    dtype = jnp.dtype(cfg.dtype)
    h = layer_norm(x, cfg.eps, params["norm1"]).astype(dtype)
    attn, split = params["attn"], "b m (n d) -> b m n d"
    q, k, v = (rearrange(linear(attn[name], h), split, n=cfg.num_heads) for name in "qkv")
    h = rearrange(attend(q, k, v), "b m n d -> b m (n d)")
    x = x + linear(attn["o"], h, jnp.float32)
    h = layer_norm(x, cfg.eps, params["norm2"]).astype(dtype)
    h = jax.nn.gelu(linear(params["mlp"]["fc1"], h, jnp.float32), approximate=False)
    return x + linear(params["mlp"]["fc2"], h.astype(dtype), jnp.float32)


def encode_image(params, pixels, cfg: ImageEncoderConfig):
    """Image tokens for the transformer's image branch.

    pixels: float32 [B, size, size, channels], normalised by CLIP's mean and deviation.
    Returns: float32 [B, num_tokens, dim], the class token first: what goes into the last block,
        without the norm behind it.
    Raises: InputError for wrong shapes.
    """
    expect(pixels, "B H W C", "pixels", H=cfg.size, W=cfg.size, C=cfg.channels)

    def layer(x, i):
        # Blocks are picked inside the loop: a slice of all but the last would be a copy.
        p = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), blocks)
        return _block(p, x, cfg), None

    blocks = params["blocks"]
    x = _embed(params, pixels.astype(jnp.float32), cfg)
    return lax.scan(layer, x, jnp.arange(cfg.num_layers - 1, dtype=jnp.int32))[0]
