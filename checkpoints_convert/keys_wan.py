# SPDX-License-Identifier: Apache-2.0
"""How published Wan checkpoints name their arrays: rule tables and the function that applies them.

Owns: `Rule`, `convert`, and the tables of the VAE and the DiT in the official and the diffusers
naming.  Does not own: reading files (read.py).
Sources: Wan-Video/Wan2.1, wan/modules/{vae,model}.py; huggingface/diffusers,
scripts/convert_wan_to_diffusers.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from lvjax.core.errors import CheckpointError
from lvjax.core.params import flatten, unflatten
from lvjax.models.config import WAN_VAE_2_1, DiTConfig, VAEConfig


class Transform(NamedTuple):
    """A change of layout and its inverse; for several targets `forward` gives an array each."""

    forward: Callable[..., Any]
    inverse: Callable[..., Any]


TRANSFORMS: dict[str, Transform] = {
    "same": Transform(lambda a: a, lambda a: a),
    "linear": Transform(lambda a: a.T, lambda a: a.T),  # [out,in] <-> [in,out]
    "conv2d": Transform(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    "conv3d": Transform(lambda a: a.transpose(2, 3, 4, 1, 0), lambda a: a.transpose(4, 3, 0, 1, 2)),
    "pixel": Transform(  # [o,i,1,1,1] <-> [1,1,i,o]
        lambda a: a[..., 0, 0, 0].T[None, None],
        lambda a: a[0, 0].T[:, :, None, None, None],
    ),
    "gamma3d": Transform(lambda a: a.reshape(-1), lambda a: a.reshape(-1, 1, 1, 1)),  # [C,1,1,1]
    "gamma2d": Transform(lambda a: a.reshape(-1), lambda a: a.reshape(-1, 1, 1)),  # [C,1,1]
    "squeeze": Transform(lambda a: a[0], lambda a: a[None]),  # [1,n,d] <-> [n,d]
}


class Rule(NamedTuple):
    """One line of a table: where an array with the name `source` goes.

    source: the checkpoint's name; `{layer}` stands for a number whose arrays are stacked on a new
      leading axis, any other `{name}` for a word (letters, digits, _) that `target` may repeat.
    target: "a/b/c" path in the parameter tree, or a tuple of paths when the transform splits.
    transform: a name in `TRANSFORMS`, or a `Transform`.
    """

    source: str
    target: str | tuple[str, ...]
    transform: str | Transform = "same"


def linear_rules(source: str, target: str) -> tuple[Rule, Rule]:
    """The two rules of a PyTorch Linear with bias."""
    kernel = Rule(f"{source}.weight", f"{target}/kernel", "linear")
    return kernel, Rule(f"{source}.bias", f"{target}/bias")


@lru_cache(maxsize=4096)
def _pattern(source: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", source)
    for i in range(1, len(parts), 2):
        parts[i] = rf"(?P<{parts[i]}>\d+)" if parts[i] == "layer" else rf"(?P<{parts[i]}>\w+)"
    for i in range(0, len(parts), 2):
        parts[i] = re.escape(parts[i])
    return re.compile("".join(parts))


def _match(key: str, exact: Mapping[str, Rule], templates: Iterable[Rule]):
    """The rule for `key` and its captured words, or None."""
    if key in exact:
        return exact[key], {}
    fits = ((rule, _pattern(rule.source).fullmatch(key)) for rule in templates)
    hits = [(rule, m.groupdict()) for rule, m in fits if m]
    if len(hits) > 1:
        raise ValueError(f"{key!r} fits {len(hits)} rules: {[rule.source for rule, _ in hits]}")
    return hits[0] if hits else None


def _first(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def convert(
    state_dict: Mapping[str, np.ndarray], rules: Iterable[Rule], spec: dict | None = None
) -> dict:
    """The nested parameter tree of `state_dict`, each source array used exactly once.

    state_dict: name -> numpy array, any float dtype (kept); only keys() and [] are used, each key
      once, so it may read lazily.
    rules: a table of this file.  spec: when given, the tree of `Param` that must be filled exactly.
    Raises: CheckpointError for names without a rule, two arrays for one place, gaps in the layers,
      and, with `spec`, for missing or extra arrays and for shapes that differ.
    """
    rules = tuple(rules)
    exact = {r.source: r for r in rules if "{" not in r.source}
    templates = [r for r in rules if "{" in r.source]
    found = {key: _match(key, exact, templates) for key in state_dict.keys()}
    unknown = [key for key, hit in found.items() if hit is None]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} arrays have no place in this model: {_first(unknown)}; "
            "is the checkpoint of another variant?"
        )
    places: dict[str, dict[int | None, np.ndarray]] = {}
    for key, (rule, words) in found.items():
        layer = int(words.pop("layer")) if "layer" in words else None
        for target, array in _targets(rule, state_dict[key]):
            place = places.setdefault(target.format(**words), {})
            if layer in place:
                raise CheckpointError(f"{key!r} and another array both go to {target!r}; keep one")
            place[layer] = array
    flat = {path: _joined(path, place) for path, place in places.items()}
    if spec is not None:
        check(flat, spec)
    return unflatten(flat)


def _targets(rule: Rule, array):
    """(target, array in our layout) for each target of a rule."""
    named = isinstance(rule.transform, str)
    transform = TRANSFORMS[rule.transform] if named else rule.transform
    arrays = transform.forward(array)
    if isinstance(rule.target, str):
        return [(rule.target, arrays)]
    return list(zip(rule.target, arrays, strict=True))


def _joined(path: str, place: dict[int | None, np.ndarray]) -> np.ndarray:
    """The one array of `place`, or its layers stacked."""
    if None not in place:
        if sorted(place) != list(range(len(place))):
            raise CheckpointError(f"{path!r} has layers {sorted(place)}; some are missing")
        return np.stack([place[i] for i in range(len(place))])
    if len(place) > 1:
        raise CheckpointError(f"{path!r} is given both whole and by layers; keep one")
    return np.ascontiguousarray(place[None])


def check(flat: Mapping[str, np.ndarray], spec: dict) -> None:
    """Raise CheckpointError unless the paths and shapes of `flat` are those of `spec`."""
    wanted = flatten(spec)
    missing, extra = wanted.keys() - flat.keys(), flat.keys() - wanted.keys()
    for title, names in (("are missing", missing), ("are not in the model", extra)):
        if names:
            raise CheckpointError(
                f"{len(names)} arrays {title}: {_first(names)}; "
                "does the configuration fit the checkpoint?"
            )
    wrong = [
        f"{path} {tuple(flat[path].shape)} (model: {p.shape})"
        for path, p in wanted.items()
        if tuple(flat[path].shape) != p.shape
    ]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} arrays have other shapes: {_first(wrong)}; "
            "does the configuration fit the checkpoint?"
        )


# ---- VAE ---------------------------------------------------------------------------

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


VAE_FROM_DIFFUSERS = vae_rules(WAN_VAE_2_1, "diffusers")
VAE_FROM_OFFICIAL = vae_rules(WAN_VAE_2_1, "official")


# ---- DiT ---------------------------------------------------------------------------

# Linears: ours -> (diffusers, official).
_DIT_LINEARS = {
    **{
        f"text_embedding/fc{i + 1}": (
            f"condition_embedder.text_embedder.linear_{i + 1}",
            f"text_embedding.{2 * i}",
        )
        for i in range(2)
    },
    **{
        f"time_embedding/fc{i + 1}": (
            f"condition_embedder.time_embedder.linear_{i + 1}",
            f"time_embedding.{2 * i}",
        )
        for i in range(2)
    },
    "time_projection": ("condition_embedder.time_proj", "time_projection.1"),
    "image_embedding/fc1": ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    "image_embedding/fc2": ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    **{
        f"blocks/{ours}/{name}": (
            f"blocks.{{layer}}.{theirs}.{'to_out.0' if name == 'o' else 'to_' + name}",
            f"blocks.{{layer}}.{ours}.{name}",
        )
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name in "qkvo"
    },
    **{
        f"blocks/cross_attn/{name}_img": (
            f"blocks.{{layer}}.attn2.add_{name}_proj",
            f"blocks.{{layer}}.cross_attn.{name}_img",
        )
        for name in "kv"
    },
    "blocks/ffn/fc1": ("blocks.{layer}.ffn.net.0.proj", "blocks.{layer}.ffn.0"),
    "blocks/ffn/fc2": ("blocks.{layer}.ffn.net.2", "blocks.{layer}.ffn.2"),
    "head/linear": ("proj_out", "head.head"),
}
# LayerNorms with weight and bias.  Before cross-attention: norm3 officially, norm2 in diffusers.
_DIT_NORMS = {
    "blocks/norm3": ("blocks.{layer}.norm2", "blocks.{layer}.norm3"),
    "image_embedding/norm1": ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    "image_embedding/norm2": ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
}
# Single arrays: ours -> (diffusers, official, transform).
_DIT_ARRAYS = {
    "patch_embedding/bias": ("patch_embedding.bias", "patch_embedding.bias", "same"),
    "blocks/modulation": (
        "blocks.{layer}.scale_shift_table",
        "blocks.{layer}.modulation",
        "squeeze",
    ),
    "head/modulation": ("scale_shift_table", "head.modulation", "squeeze"),
    "image_embedding/pos": (
        "condition_embedder.image_embedder.pos_embed",
        "img_emb.emb_pos",
        "squeeze",
    ),
    **{
        f"blocks/{ours}/norm_{name}": (
            f"blocks.{{layer}}.{theirs}.norm_{'added_k' if name == 'k_img' else name}.weight",
            f"blocks.{{layer}}.{ours}.norm_{name}.weight",
            "same",
        )
        for ours, theirs, names in (
            ("self_attn", "attn1", ("q", "k")),
            ("cross_attn", "attn2", ("q", "k", "k_img")),
        )
        for name in names
    },
}


def split(channels: tuple[int, ...], patch: tuple[int, int, int]) -> Transform:
    """A convolution whose stride is its kernel, as one matrix for each group of input channels.

    [d, sum(channels), *patch] <-> matrices [c * pt * ph * pw, d] with c slowest; the convolution is
    the sum of their products.  One group gives one matrix, several give a tuple.
    """
    edges = [sum(channels[: i + 1]) for i in range(len(channels) - 1)]

    def forward(a):
        parts = [p.reshape(p.shape[0], -1).T for p in np.split(a, edges, axis=1)]
        return parts[0] if len(parts) == 1 else tuple(parts)

    def inverse(*parts):
        return np.concatenate([p.T.reshape(p.shape[1], -1, *patch) for p in parts], axis=1)

    return Transform(forward, inverse)


def _dit_table(layout: str) -> tuple[Rule, ...]:
    """Every DiT array but patch_embedding.weight, whose split depends on the model."""
    if layout not in ("diffusers", "official"):
        raise ValueError(f"layout={layout!r}; use 'diffusers' or 'official'")
    column = 0 if layout == "diffusers" else 1
    rules = []
    for path, names in _DIT_LINEARS.items():
        rules += linear_rules(names[column], path)
    for path, names in _DIT_NORMS.items():
        rules.append(Rule(f"{names[column]}.weight", f"{path}/scale"))
        rules.append(Rule(f"{names[column]}.bias", f"{path}/bias"))
    rules += [Rule(names[column], path, names[2]) for path, names in _DIT_ARRAYS.items()]
    return tuple(rules)


def dit_rules(cfg: DiTConfig, layout: str) -> tuple[Rule, ...]:
    """The table of a DiT; layout "diffusers" or "official".

    Rules for an image branch are always among them: with the spec, `convert` sees what is missing.
    """
    channels, target = (cfg.in_channels,), "patch_embedding/kernel"
    if cfg.condition_channels:
        channels += (cfg.condition_channels,)
        target = (target, "condition_embedding/kernel")
    patch = Rule("patch_embedding.weight", target, split(channels, cfg.patch))
    return (*_dit_table(layout), patch)
