# SPDX-License-Identifier: Apache-2.0
"""Which array of a checkpoint goes where: rules, the plan they make, and the way back.

Owns: `Rule`, `Plan`, and the way back of one array (`source_array`).  A plan is
made from names and shapes alone, so everything that does not fit is found before an array is read.
Does not own: the tables of rules (keys_*.py), files (read*.py).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from lvjax.core.errors import CheckpointError, some_of
from lvjax.core.params import Param, flatten

LAYER = "{layer}"


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
      leading axis.
    target: "a/b/c" path in the parameter tree; a tuple of paths when the transform splits; None for
      an array that is known and that the model does not use.
    transform: a name in `TRANSFORMS`, or a `Transform`.
    copy_of: the name of an array of the checkpoint that this one repeats; it must be equal to it.
    """

    source: str
    target: str | tuple[str, ...] | None
    transform: str | Transform = "same"
    copy_of: str | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The paths that the rule fills."""
        return self.target if isinstance(self.target, tuple) else (self.target,)

    @property
    def layout(self) -> Transform:
        """The transform itself."""
        named = isinstance(self.transform, str)
        return TRANSFORMS[self.transform] if named else self.transform

    def arrays(self, array) -> tuple:
        """An array of the checkpoint in our layout: one for each target."""
        made = self.layout.forward(array)
        return made if isinstance(self.target, tuple) else (made,)


def column_of(layout: str, layouts: tuple[str, ...]) -> int:
    """Where a naming stands in the tables of a part, whose namings are `layouts`."""
    if layout not in layouts:
        raise ValueError(f"layout={layout!r}; use one of {layouts}")
    return layouts.index(layout)


def linear_rules(source: str, target: str, bias: bool = True) -> tuple[Rule, ...]:
    """The rules of a PyTorch Linear."""
    kernel = Rule(f"{source}.weight", f"{target}/kernel", "linear")
    return (kernel, Rule(f"{source}.bias", f"{target}/bias")) if bias else (kernel,)


def norm_rules(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a PyTorch LayerNorm."""
    return Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")


class Place(NamedTuple):
    """One array of our tree and the arrays of the checkpoint that it is made of.

    sources: their names, by layer where the rule has layers, else one.  part: which output of the
      rule's transform.
    """

    path: str
    param: Param
    rule: Rule
    part: int
    sources: tuple[str, ...]

    def pieces(self, tensors: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
        """The array in our layout, layer by layer; read when asked for."""
        for name in self.sources:
            yield self.rule.arrays(tensors[name])[self.part]

    def array(self, tensors: Mapping[str, np.ndarray], dtype=None) -> np.ndarray:
        """The whole array in memory; dtype: None for that of its first layer."""
        pieces = self.pieces(tensors)
        if LAYER not in self.rule.source:
            return np.ascontiguousarray(next(pieces), dtype)
        first = next(pieces)
        out = np.empty((len(self.sources), *first.shape), first.dtype if dtype is None else dtype)
        out[0] = first
        for index, piece in enumerate(pieces, 1):
            out[index] = piece
        return out


class Plan(NamedTuple):
    """places: every array of the model, by path.  unused: names that the model does not use.
    copies: names of arrays and of those that they must equal.
    """

    places: tuple[Place, ...]
    unused: tuple[str, ...]
    copies: tuple[tuple[str, str], ...]


@lru_cache(maxsize=4096)
def _pattern(source: str) -> re.Pattern:
    before, after = map(re.escape, source.split(LAYER))
    return re.compile(rf"{before}(0|[1-9]\d{{0,5}}){after}")


def find_rules(names: Iterable[str], rules: Iterable[Rule]) -> dict[str, tuple[Rule, int]]:
    """For each name its rule and layer (0 where the rule has none).

    Raises: CheckpointError for names without a rule.
    """
    rules = tuple(rules)
    exact = {r.source: r for r in rules if LAYER not in r.source}
    templates = [r for r in rules if LAYER in r.source]
    found, unknown = {}, []
    for name in names:
        if name in exact:
            found[name] = exact[name], 0
            continue
        hits = [(r, m) for r in templates if (m := _pattern(r.source).fullmatch(name))]
        if len(hits) > 1:
            raise ValueError(f"{name!r} fits {len(hits)} rules: {[r.source for r, _ in hits]}")
        if hits:
            found[name] = hits[0][0], int(hits[0][1][1])
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} arrays have no place in this model: {some_of(unknown)}; "
            "is the checkpoint of another variant?"
        )
    return found


def make_plan(shapes: Mapping[str, tuple[int, ...]], rules: Iterable[Rule], spec: dict) -> Plan:
    """What goes where: every array of the checkpoint used once, every parameter filled once.

    shapes: of the checkpoint's arrays, by name.  rules: a table.  spec: the tree of `Param`.
    Raises: CheckpointError for names without a rule, two arrays for one place, gaps in the layers,
      missing or extra arrays, and shapes that differ.
    """
    wanted, unused, copies = flatten(spec), [], []
    sources: dict[tuple[str, int], dict[int, str]] = {}
    kinds: dict[str, tuple[Rule, int]] = {}
    for name, (rule, layer) in find_rules(shapes, rules).items():
        if rule.copy_of is not None:
            copies.append((name, rule.copy_of))
        elif rule.target is None:
            unused.append(name)
        else:
            for part, path in enumerate(rule.targets):
                if layer in (filled := sources.setdefault(path, {})):
                    what = f"{name!r} and {filled[layer]!r} both go to {path!r}"
                    raise CheckpointError(f"{what}; keep one of them")
                filled[layer], kinds[path] = name, (rule, part)
    _check_names(sources.keys(), wanted.keys())
    places = []
    for path, param in wanted.items():
        (rule, part), by_layer = kinds[path], sources[path]
        if sorted(by_layer) != list(range(len(by_layer))):
            raise CheckpointError(f"{path!r} has layers {sorted(by_layer)}; some are missing")
        names = tuple(by_layer[i] for i in range(len(by_layer)))
        places.append(Place(path, param, rule, part, names))
    _check_shapes(places, shapes)
    return Plan(tuple(places), tuple(sorted(unused)), tuple(sorted(copies)))


def _check_names(found, wanted) -> None:
    for title, names in (("are missing", wanted - found), ("are not in the model", found - wanted)):
        if names:
            raise CheckpointError(
                f"{len(names)} arrays {title}: {some_of(names)}; "
                "does the configuration fit the checkpoint?"
            )


def _check_shapes(places: list[Place], shapes: Mapping[str, tuple[int, ...]]) -> None:
    wrong = []
    for place in places:
        stacked = LAYER in place.rule.source
        own = place.param.shape[1:] if stacked else place.param.shape
        if stacked and len(place.sources) != place.param.shape[0]:
            wrong.append(f"{place.path} of {len(place.sources)} layers, not {place.param.shape[0]}")
        for name in place.sources:
            if (shape := _shape(place, tuple(shapes[name]))) != own:
                wrong.append(f"{name} {list(shapes[name])}, which gives {shape} instead of {own}")
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} arrays have other shapes: {some_of(wrong)}; "
            "does the configuration fit the checkpoint?"
        )


def _shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """What an array of the checkpoint becomes, or None where the layout cannot be changed."""
    try:  # one byte, however large the array claims to be
        return place.rule.arrays(np.broadcast_to(np.uint8(0), shape))[place.part].shape
    except (ValueError, IndexError):
        return None


def sources_of(rules: Iterable[Rule], spec: dict) -> dict[str, tuple[Rule, int]]:
    """The names that a model of this spec has in the naming of `rules`: its rule and layer."""
    wanted, names = flatten(spec), {}
    for rule in rules:
        if rule.target is None or rule.targets[0] not in wanted:
            continue
        if LAYER in rule.source:
            for layer in range(wanted[rule.targets[0]].shape[0]):
                names[rule.source.replace(LAYER, str(layer))] = rule, layer
        else:
            names[rule.source] = rule, 0
    return names


def source_array(rule: Rule, layer: int, read: Callable[[str, int | None], np.ndarray]):
    """One array in the checkpoint's layout.

    read(path, layer): our array, or one layer of it; None for what has no layers.
    """
    at = layer if LAYER in rule.source else None
    return rule.layout.inverse(*(read(path, at) for path in rule.targets))
