# SPDX-License-Identifier: Apache-2.0
"""Key maps of Wan's autoencoders, in the official and the diffusers naming.

Sources: Wan-Video/Wan2.1, wan/modules/vae.py; huggingface/diffusers,
scripts/convert_wan_to_diffusers.py.
"""

from checkpoints_convert.rules import Rule
from lvjax.models.config import VAEConfig

# Names inside a block: ours -> (diffusers, official, transform).
_RESIDUAL = {
    "norm1": ("norm1", "residual.0", "gamma3d"),
    "conv1": ("conv1", "residual.2", "conv3d"),
    "norm2": ("norm2", "residual.3", "gamma3d"),
    "conv2": ("conv2", "residual.6", "conv3d"),
    "shortcut": ("conv_shortcut", "shortcut", "pixel"),
}
_ATTENTION = {
    "norm": ("norm", "norm", "gamma2d"),
    "qkv": ("to_qkv", "to_qkv", "conv2d"),
    "out": ("proj", "proj", "conv2d"),
}
_RESAMPLE = {
    "conv": ("resample.1", "resample.1", "conv2d"),
    "time": ("time_conv", "time_conv", "conv3d"),
}
_OUTSIDE = {
    "conv_in": ("conv_in", "conv1", "conv3d"),
    "head/norm": ("norm_out", "head.0", "gamma3d"),
    "head/conv": ("conv_out", "head.2", "conv3d"),
}


def _vae_blocks(cfg: VAEConfig, coder: str):
    """(our block, diffusers' block, official block, names inside it) of one coder."""
    yield coder, coder, coder, _OUTSIDE
    for name, diffusers, official, inside in (
        ("res0", "resnets.0", "0", _RESIDUAL),
        ("attn", "attentions.0", "1", _ATTENTION),
        ("res1", "resnets.1", "2", _RESIDUAL),
    ):
        place = f"{coder}.mid_block.{diffusers}", f"{coder}.middle.{official}"
        yield f"{coder}/mid/{name}", *place, inside
    depth, last, n = cfg.res_blocks + (coder == "decoder"), len(cfg.dim_mult) - 1, 0
    for i in range(last + 1):
        blocks = [f"res{j}" for j in range(depth)]
        if i < last:
            blocks.append("down" if coder == "encoder" else "up")
        for j, name in enumerate(blocks):
            if coder == "encoder":
                diffusers, official = f"encoder.down_blocks.{n}", f"encoder.downsamples.{n}"
            else:
                own = "upsamplers.0" if name == "up" else f"resnets.{j}"
                diffusers, official = f"decoder.up_blocks.{i}.{own}", f"decoder.upsamples.{n}"
            names = _RESIDUAL if name.startswith("res") else _RESAMPLE
            yield f"{coder}/stage{i}/{name}", diffusers, official, names
            n += 1


def vae_rules(cfg: VAEConfig, layout: str) -> tuple[Rule, ...]:
    """The table of an autoencoder of any size; layout "diffusers" or "official"."""
    if layout not in ("diffusers", "official"):
        raise ValueError(f"layout={layout!r}; use 'diffusers' or 'official'")
    column = 0 if layout == "diffusers" else 1
    arrays = [  # (our path, source, transform)
        ("quant", ("quant_conv", "conv1")[column], "pixel"),
        ("post_quant", ("post_quant_conv", "conv2")[column], "pixel"),
    ]
    for coder in ("encoder", "decoder"):
        for path, *sources, names in _vae_blocks(cfg, coder):
            for name, inside in names.items():
                arrays.append((f"{path}/{name}", f"{sources[column]}.{inside[column]}", inside[2]))
    rules = []
    for path, source, transform in arrays:
        if transform.startswith("gamma"):
            rules.append(Rule(f"{source}.gamma", path, transform))
        else:
            rules.append(Rule(f"{source}.weight", f"{path}/kernel", transform))
            rules.append(Rule(f"{source}.bias", f"{path}/bias"))
    return tuple(rules)
