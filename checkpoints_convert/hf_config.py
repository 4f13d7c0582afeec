# SPDX-License-Identifier: Apache-2.0
"""The config.json that diffusers, transformers and Wan's own code ask for beside a part's weights.

Source: huggingface/diffusers, src/diffusers/models/; huggingface/transformers, src/transformers/;
Wan-Video/Wan2.1, wan/modules/model.py.
"""

from lvjax.models.config import DiTConfig, VAEConfig
from lvjax.models.image_encoder import ImageEncoderConfig
from lvjax.models.umt5 import UMT5Config


def dit_json(cfg: DiTConfig) -> dict:
    """For `WanTransformer3DModel`."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(cfg.patch),
        "num_attention_heads": cfg.num_heads,
        "attention_head_dim": cfg.head_dim,
        "in_channels": cfg.in_channels + cfg.condition_channels,
        "out_channels": cfg.out_channels,
        "text_dim": cfg.text_dim,
        "freq_dim": cfg.freq_dim,
        "ffn_dim": cfg.ffn_dim,
        "num_layers": cfg.num_layers,
        "eps": cfg.eps,
        "image_dim": cfg.image_dim,
        "added_kv_proj_dim": None if cfg.image_dim is None else cfg.dim,
        "pos_embed_seq_len": cfg.image_pos_len or None,
    }


def official_dit_json(cfg: DiTConfig) -> dict:
    """For Wan's own `WanModel`."""
    kind = "ti2v" if cfg.in_channels == 48 else "i2v" if cfg.condition_channels else "t2v"
    return {
        "_class_name": "WanModel",
        "model_type": "flf2v" if cfg.image_pos_len else kind,
        "text_len": cfg.text_len,
        "in_dim": cfg.in_channels + cfg.condition_channels,
        "dim": cfg.dim,
        "ffn_dim": cfg.ffn_dim,
        "freq_dim": cfg.freq_dim,
        "text_dim": cfg.text_dim,
        "out_dim": cfg.out_channels,
        "num_heads": cfg.num_heads,
        "num_layers": cfg.num_layers,
        "eps": cfg.eps,
    }


def vae_json(cfg: VAEConfig) -> dict:
    """For `AutoencoderKLWan`."""
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": cfg.base,
        "decoder_base_dim": cfg.decoder_base,
        "z_dim": cfg.z,
        "dim_mult": list(cfg.dim_mult),
        "num_res_blocks": cfg.res_blocks,
        "temperal_downsample": list(cfg.temporal_down),
        "latents_mean": list(cfg.mean),
        "latents_std": list(cfg.std),
        "is_residual": cfg.residual,
        "in_channels": 3 * cfg.patch**2,
        "out_channels": 3 * cfg.patch**2,
        "patch_size": None if cfg.patch == 1 else cfg.patch,
        "scale_factor_temporal": cfg.temporal_stride,
        "scale_factor_spatial": cfg.spatial_stride,
    }


def text_json(cfg: UMT5Config) -> dict:
    """For `UMT5EncoderModel`."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": cfg.vocab,
        "d_model": cfg.dim,
        "d_kv": cfg.head_dim,
        "d_ff": cfg.ffn_dim,
        "num_layers": cfg.num_layers,
        "num_heads": cfg.num_heads,
        "relative_attention_num_buckets": cfg.num_buckets,
        "relative_attention_max_distance": cfg.max_distance,
        "layer_norm_epsilon": cfg.eps,
        "feed_forward_proj": "gated-gelu",
    }


def image_json(cfg: ImageEncoderConfig) -> dict:
    """For `CLIPVisionModel`, or with a projection for `CLIPVisionModelWithProjection`."""
    projected = cfg.projection_dim is not None
    return {
        "architectures": ["CLIPVisionModelWithProjection" if projected else "CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": cfg.dim,
        "intermediate_size": cfg.mlp_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_channels": cfg.channels,
        "image_size": cfg.size,
        "patch_size": cfg.patch,
        "layer_norm_eps": cfg.eps,
        "hidden_act": "gelu",
    } | ({"projection_dim": cfg.projection_dim} if projected else {})
