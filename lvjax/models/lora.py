# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters beside a parameter tree, or merged into it.

Owns: what a LoRA is once it is read (`Lora`), the three things done with it (`attach`, `detach` and
`merge`), and new ones, to be trained (`lora_spec`, `within`, `adapters`, `as_lora`).
Base parameters are never changed: what is not touched is the same array in the new tree, what is
touched is a copy, and taking a LoRA off means using the base tree again.  All stays in the memory
where it is: what is added to weights that wait in the host's (core/offload.py) waits there too.
Does not own: files and their names (checkpoints_convert/lora.py), the product (nn/linear.py).
Source: arXiv:2106.09685, section 4.1.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lvjax.core.errors import InputError
from lvjax.core.offload import fetch, is_ready, wait
from lvjax.core.params import Param, Spec, flatten, unflatten


class LowRank(NamedTuple):
    """scale * a b, to be added to a kernel.

    path: of the kernel, "blocks/self_attn/q/kernel".  layer: of a stacked kernel, else None.
    a: [in, r].  b: [r, out].  scale: alpha / r.
    """

    path: str
    layer: int | None
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it is added to."""
        return self.a.shape[0], self.b.shape[1]


class Delta(NamedTuple):
    """scale * array, to be added to a leaf, or to one layer of it, of any kind."""

    path: str
    layer: int | None
    array: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it is added to."""
        return self.array.shape


class Lora(NamedTuple):
    """A LoRA file, read for one model.

    low_rank: what can be kept beside the weights.  deltas: what can only be added to them (weights,
    biases, norms, modulation).  unmatched: names in the file that this model has no place for; the
    caller says so.  Arrays keep the file's dtype.
    """

    low_rank: tuple[LowRank, ...]
    deltas: tuple[Delta, ...]
    unmatched: tuple[str, ...]


Loras = Sequence[tuple[Lora, float]]  # each with its strength; 0 is off, 1 as trained
Changes = dict[int | None, list[tuple[LowRank | Delta, float]]]  # by layer, each with its strength


def attach(params: dict, loras: Loras) -> dict:
    """The parameters with LoRAs beside them: what `linear` reads under "lora".

    A stacked kernel [layers, in, out] gets a [layers, in, R], b [layers, R, out] in the kernel's
    dtype and scale [layers, R] float32; layers that no adapter touches have zeros.  R is the
    largest rank of a layer, all LoRAs together; it does not depend on the strengths, so changing
    those recompiles nothing.  Deltas cannot be kept beside: they are added to copies of their
    leaves as `merge` does it, and `detach` does not take them off again.
    Raises: InputError for LoRAs read for another model, parameters that carry adapters already, and
      strengths that are no finite numbers.
    """
    flat = flatten(params)
    if any(map(_is_beside, flat)):
        raise InputError("these parameters carry adapters; attach all of them at once, to the base")
    beside = _by_leaf(flat, loras, lambda lora: lora.low_rank)
    added = _by_leaf(flat, loras, lambda lora: lora.deltas)
    new = flat | {path: _add(flat[path], changes) for path, changes in added.items()}
    for path, changes in beside.items():
        at = path.removesuffix("kernel") + "lora"
        new |= {f"{at}/{k}": a for k, a in _stacked(flat[path], changes).items()}
    return unflatten(new)


def merge(params: dict, loras: Loras) -> dict:
    """The parameters with strength * scale * a b and all deltas added to copies of their leaves.

    Added up in float32 with the weight itself, then rounded once to the leaf's dtype.  Beside a
    leaf and its copy only one layer is in float32 at a time.
    Raises: InputError as `attach`; adapters that the parameters carry already stay as they are.
    """
    flat = flatten(params)
    changes = _by_leaf(flat, loras, lambda lora: lora.low_rank + lora.deltas)
    return unflatten(flat | {path: _add(flat[path], c) for path, c in changes.items()})


def detach(params: dict) -> dict:
    """The parameters (or a spec) without the adapters beside them; other leaves are the same."""
    return unflatten({k: a for k, a in flatten(params).items() if not _is_beside(k)})


def adapters(params: dict) -> dict:
    """What `detach` leaves out of parameters, or of a spec; a and b are for training, scale is a
    constant.  {} where there are none.
    """
    return unflatten({k: a for k, a in flatten(params).items() if _is_beside(k)})


def _is_beside(path: str) -> bool:
    return "lora" in path.split("/")


# ---- new ones ----------------------------------------------------------------------


def lora_spec(spec: Spec, targets: Iterable[str], rank: int) -> Spec:
    """A spec with new adapters beside some of its linears, as `attach` lays them out.

    targets: paths of linears, "blocks/self_attn/q".
    All are float32: a [layers, in, rank] normal with variance 1 / in, b zeros, so that untrained
    they change nothing, and scale ones.
    Raises: InputError for a target that is no linear of this spec, or has an adapter; for a rank
      that is no whole number from 1 to the smaller side of every kernel.
    """
    flat, new = flatten(spec), {}
    for target in targets:
        kernel, at = flat.get(f"{target}/kernel"), f"{target}/lora"
        if kernel is None or f"{at}/a" in flat:
            free = [k.removesuffix("/kernel") for k in flat if k.endswith("/kernel")]
            free = [k for k in free if f"{k}/lora/a" not in flat]
            raise InputError(f"{target!r} takes no adapter; give some of {', '.join(free)}")
        *lead, n_in, n_out = kernel.shape
        if type(rank) is not int or not 1 <= rank <= min(n_in, n_out):
            most = f"a whole number from 1 to {min(n_in, n_out)} for {target}"
            raise InputError(f"the rank of adapters is {rank!r}; give {most}")
        *outer, left, right = kernel.axes
        new[f"{at}/a"] = Param((*lead, n_in, rank), (*outer, left, None), "fan_in")
        new[f"{at}/b"] = Param((*lead, rank, n_out), (*outer, None, right), "zeros")
        new[f"{at}/scale"] = Param((*lead, rank), (*outer, None), "ones")
    return unflatten(flat | new)


def within(params: dict, layers: range) -> dict:
    """The parameters with the adapters of stacked kernels in these layers only: in all others their
    scale is 0, so that they change nothing and get no gradient.

    Raises: InputError for layers that are not there.
    """
    new = {}
    for path, scale in flatten(adapters(params)).items():
        if path.endswith("/scale") and scale.ndim == 2:
            count = scale.shape[0]
            if not layers or not set(layers) <= set(range(count)):
                raise InputError(f"the layers are {layers}; give some of {range(count)}")
            inside = np.isin(np.arange(count), layers)[:, None]
            new[path] = scale * inside.astype(scale.dtype)
    return unflatten(flatten(params) | new)


def as_lora(params: dict) -> Lora:
    """The adapters beside parameters as one LoRA, to be written or attached to others.

    Of every layer one product, without those columns whose scale is 0; where columns have several
    scales these are multiplied into b, in float32.
    Raises: InputError where there are none that change anything.
    """
    flat, found = flatten(adapters(params)), []
    for path in (k.removesuffix("/a") for k in flat if k.endswith("/a")):
        kernel = f"{path.removesuffix('/lora')}/kernel"
        a, b, scale = (np.asarray(flat[f"{path}/{name}"]) for name in ("a", "b", "scale"))
        if a.ndim == 2:
            found += _as_product(kernel, None, a, b, scale)
        else:
            for layer, parts in enumerate(zip(a, b, scale, strict=True)):
                found += _as_product(kernel, layer, *parts)
    if not found:
        raise InputError("these parameters carry no adapter that changes anything; attach one")
    return Lora(tuple(found), (), ())


def _as_product(path: str, layer: int | None, a, b, scale) -> list[LowRank]:
    """The adapter of one layer; none where it is off."""
    if not (used := scale != 0).any():
        return []
    a, b, scale = a[:, used], b[used], scale[used]
    if (scale == scale[0]).all():
        return [LowRank(path, layer, a, b, float(scale[0]))]
    return [LowRank(path, layer, a, scale[:, None] * b.astype(np.float32), 1.0)]


# ---- sums --------------------------------------------------------------------------


def _by_leaf(flat: dict, loras: Loras, choose: Callable) -> dict[str, Changes]:
    """What `choose` takes of each LoRA, by path and layer.

    Raises: InputError for strengths that are no finite numbers, and what does not fit its leaf.
    """
    found = defaultdict(lambda: defaultdict(list))
    for lora, strength in loras:
        if type(strength) not in (int, float) or not math.isfinite(strength):
            raise InputError(f"strength {strength!r} of a LoRA is no finite number; give one, as 1")
        for change in choose(lora):
            leaf, stacked = flat.get(change.path), change.layer is not None
            fits = leaf is not None and leaf.shape[stacked:] == change.shape
            if not fits or (stacked and not 0 <= change.layer < leaf.shape[0]):
                there = "is not there" if leaf is None else f"is {leaf.shape}"
                what = f"{change.path!r} {there}, the LoRA has {change.shape} for it"
                raise InputError(f"{what}; read it for the model that has these parameters")
            found[change.path][change.layer].append((change, strength))
    return found


def _packed(changes: list[tuple[LowRank, float]], rank: int, kernel, dtype) -> dict:
    """One layer's adapters side by side, filled up with zeros to `rank`."""
    n_in, n_out = kernel.shape[-2:]
    a, b = np.zeros((n_in, rank), dtype), np.zeros((rank, n_out), dtype)
    scale, at = np.zeros(rank, np.float32), 0
    for change, strength in changes:
        part = slice(at, at := at + change.a.shape[1])
        a[:, part], b[part] = change.a, change.b
        with np.errstate(over="ignore"):  # what infinity makes of a video is found there
            scale[part] = strength * change.scale
    return {"a": a, "b": b, "scale": scale}


def _rank(changes: Changes) -> int:
    """Of the layer where it is largest."""
    return max(sum(c.a.shape[1] for c, _ in layer) for layer in changes.values())


def _stacked(kernel, changes: Changes) -> dict:
    """{"a", "b", "scale"} of a kernel, with a leading axis where the kernel has one, in the memory
    where the kernel is.
    """
    rank = _rank(changes)
    if None in changes:
        packed = _packed(changes[None], rank, kernel, kernel.dtype)
    else:
        layers = range(kernel.shape[0])
        each = [_packed(changes.get(i, []), rank, kernel, kernel.dtype) for i in layers]
        packed = jax.tree.map(lambda *arrays: np.stack(arrays), *each)
    packed = jax.tree.map(jnp.asarray, packed)
    return packed if is_ready(kernel) else jax.tree.map(wait, packed)


@partial(jax.jit, donate_argnums=0)
def _added(leaf, layer, delta, adapters):
    """The leaf, its layer (or all of it) with `delta` and the product of adapters added in place.

    float32; the product is not left to the device's default precision (TF32).
    """
    old = leaf if layer is None else lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    new = old.astype(jnp.float32)
    if delta is not None:
        new = new + delta
    if adapters is not None:
        a = adapters["a"] * adapters["scale"][None]
        new = new + jnp.dot(a, adapters["b"], precision=lax.Precision.HIGHEST)
    new = new.astype(leaf.dtype)
    return new if layer is None else lax.dynamic_update_index_in_dim(leaf, new, layer, 0)


def _add(leaf, changes: Changes):
    """A copy of the leaf with all changes in it, layer by layer, in the memory where the leaf is;
    added up on the device.
    """
    low_rank = {i: [c for c in cs if isinstance(c[0], LowRank)] for i, cs in changes.items()}
    rank, waits = _rank(low_rank), not is_ready(leaf)
    leaf = fetch(leaf) if waits else jnp.array(leaf, copy=True)
    for layer, parts in changes.items():
        delta = adapters = None
        for change, strength in parts:
            if isinstance(change, Delta):
                more = strength * change.scale * change.array.astype(np.float32)
                delta = more if delta is None else delta + more
        if rank:
            adapters = _packed(low_rank[layer], rank, leaf, np.float32)
        leaf = _added(leaf, layer, delta, adapters)
    return wait(leaf) if waits else leaf
