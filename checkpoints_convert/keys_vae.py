# SPDX-License-Identifier: Apache-2.0
"""Key maps of Wan's autoencoders, in the official and the diffusers naming, and their sizes.

Sources: Wan-Video/Wan2.1, wan/modules/vae.py; Wan-Video/Wan2.2, wan/modules/vae2_2.py;
huggingface/diffusers, scripts/convert_wan_to_diffusers.py.
"""

import math
from collections.abc import Iterable, Mapping

from checkpoints_convert.rules import Rule, column_of
from checkpoints_convert.sizes import Shapes, shape_of, stated
from lvjax.core.errors import CheckpointError, InputError
from lvjax.models.config import WAN_VAE_2_1, WAN_VAE_2_2, VAEConfig

LAYOUTS = ("diffusers", "official")
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
_POINTWISE = {"quant": ("quant_conv", "conv1"), "post_quant": ("post_quant_conv", "conv2")}
# What the latents of a published autoencoder were normalised with, by channels and topology.
_STATISTICS = {(c.z, c.residual): (c.mean, c.std) for c in (WAN_VAE_2_1, WAN_VAE_2_2)}


def _place(coder: str, residual: bool, i: int, j: int, n: int, last: bool) -> tuple[str, str]:
    """(diffusers', official) place of block j of a stage i, which is block n of its coder.

    last: whether the block changes the size of the video.  A residual autoencoder's lists of stages
    are nested; the others are flat, but for diffusers' decoder.
    """
    side = "down" if coder == "encoder" else "up"
    diffusers, official = f"{coder}.{side}_blocks", f"{coder}.{side}samples"
    if residual:
        own = f"{side}sampler" if last else f"resnets.{j}"
        return f"{diffusers}.{i}.{own}", f"{official}.{i}.{side}samples.{j}"
    if coder == "encoder":
        return f"{diffusers}.{n}", f"{official}.{n}"
    own = "upsamplers.0" if last else f"resnets.{j}"
    return f"{diffusers}.{i}.{own}", f"{official}.{n}"


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
            place = _place(coder, cfg.residual, i, j, n, j == depth)
            yield f"{coder}/stage{i}/{name}", *place, _RESAMPLE if j == depth else _RESIDUAL
            n += 1


def vae_rules(cfg: VAEConfig, layout: str) -> tuple[Rule, ...]:
    """The table of an autoencoder of any size; layout "diffusers" or "official"."""
    column = column_of(layout, LAYOUTS)
    # (our path, source, transform)
    arrays = [(path, names[column], "pixel") for path, names in _POINTWISE.items()]
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


def vae_layout(names: Iterable[str]) -> str | None:
    """The naming of an autoencoder's arrays, or None where they are not those of one of Wan's."""
    names = set(names)
    for column, layout in enumerate(LAYOUTS):
        inside = _OUTSIDE["head/norm"][column]
        if all(f"{coder}.{inside}.gamma" in names for coder in ("encoder", "decoder")):
            return layout
    return None


def _stages(shapes: Shapes, column: int, residual: bool) -> tuple[list[list[int]], list[bool]]:
    """Channels of the residual blocks of each encoder stage, and which halvings halve time."""
    inside = _RESIDUAL["conv1"], _RESAMPLE["conv"], _RESAMPLE["time"]
    conv, halving, time = (f"{names[column]}.weight" for names in inside)
    stages, temporal = [[]], []
    for n in range(len(shapes)):
        at = "encoder", residual, len(stages) - 1, len(stages[-1]), n
        block, resample = (_place(*at, last)[column] for last in (False, True))
        if f"{block}.{conv}" in shapes:
            stages[-1].append(shape_of(shapes, f"{block}.{conv}", 5)[0])
        elif f"{resample}.{halving}" in shapes:
            temporal.append(f"{resample}.{time}" in shapes)
            stages.append([])
        else:
            break
    return stages, temporal


def _multipliers(base: int, stages: list[list[int]]) -> tuple[int, ...]:
    """Channels of each stage over those of the first convolution."""
    if len({len(blocks) for blocks in stages}) != 1 or not stages[0]:
        counts = [len(blocks) for blocks in stages]
        raise CheckpointError(
            f"the encoder's stages have {counts} residual blocks; expected is the same number in "
            "each: is the checkpoint complete?"
        )
    channels = [blocks[-1] for blocks in stages]
    if base < 1 or any(n < 1 or n % base for n in channels):
        raise CheckpointError(
            f"the encoder's stages have {channels} channels; expected are multiples of the {base} "
            "of its first convolution"
        )
    return tuple(n // base for n in channels)


def _statistics(config: Mapping, z: int, residual: bool) -> tuple[tuple[float, ...], ...]:
    """Mean and standard deviation of the latents' channels."""
    given = {name: config.get(name) for name in ("latents_mean", "latents_std")}
    if all(values is None for values in given.values()):
        if (z, residual) in _STATISTICS:
            return _STATISTICS[z, residual]
        raise CheckpointError(
            f"an autoencoder with {z} latent channels is none of the published ones; put its "
            "config.json (latents_mean, latents_std) beside it"
        )
    for name, values in given.items():
        low = 0 if name == "latents_std" else -1e6
        numbers = values if isinstance(values, list) else []
        right = len(numbers) == z
        if not right or not all(type(v) in (int, float) and low < v < 1e6 for v in numbers):
            said = f"{len(values)} values" if isinstance(values, list) else repr(values)
            what = f"config.json says {name} {said}, the arrays have {z} latent channels"
            raise CheckpointError(f"{what}; give {z} numbers{' above 0' if low == 0 else ''}")
    return tuple(tuple(map(float, values)) for values in given.values())


def vae_config(shapes: Shapes, layout: str, config: Mapping) -> VAEConfig:
    """The sizes of an autoencoder, from the names and shapes of its arrays.

    config: what its config.json says, or nothing; it adds the statistics of the latents, which are
      the published ones otherwise, and must not contradict the arrays.
    Raises: CheckpointError when arrays are missing, or something does not fit together.
    """
    column = column_of(layout, LAYOUTS)
    first, last = (f"{_OUTSIDE[name][column]}.weight" for name in ("conv_in", "head/conv"))
    base, folded = shape_of(shapes, f"encoder.{first}", 5)[:2]
    top, z = shape_of(shapes, f"decoder.{first}", 5)[:2]
    unfolded = shape_of(shapes, f"decoder.{last}", 5)[0]
    nested = _place("encoder", True, 0, 0, 0, False)[column]
    residual = f"{nested}.{_RESIDUAL['conv1'][column]}.weight" in shapes
    stages, temporal = _stages(shapes, column, residual)
    mult, patch = _multipliers(base, stages), math.isqrt(folded // 3)
    if folded != unfolded or folded != 3 * patch**2 or top % mult[-1]:
        raise CheckpointError(
            f"an encoder of {folded} input channels, with stages of {mult} times {base}, and a "
            f"decoder of {top} to {unfolded} channels make none of Wan's autoencoders"
        )
    config = {name: value for name, value in config.items() if value is not None}
    found = {
        "base_dim": base,
        "decoder_base_dim": top // mult[-1],
        "z_dim": z,
        "dim_mult": list(mult),
        "num_res_blocks": len(stages[0]),
        "temperal_downsample": temporal,
        "is_residual": residual,
        "patch_size": patch,
        "in_channels": folded,
        "out_channels": unfolded,
    }
    for name, value in found.items():
        stated(config, name, value)
    mean, std = _statistics(config, z, residual)
    try:
        return VAEConfig(
            base=base,
            z=z,
            dim_mult=mult,
            res_blocks=len(stages[0]),
            temporal_down=tuple(temporal),
            patch=patch,
            mean=mean,
            std=std,
            decoder_base=None if top == base * mult[-1] else top // mult[-1],
            residual=residual,
        )
    except InputError as e:
        raise CheckpointError(f"this is none of Wan's autoencoders: {e}") from e
