# SPDX-License-Identifier: Apache-2.0
"""LoRAs of a bundle: put beside its weights or merged into them, changed in strength, taken off.

Owns: `with_lora`, `with_strength`, `without_lora`, the weights of an outline that has LoRAs, and
the LoRAs that a run card asks for.  Bundles are values: each function returns another one, which
shares with its base every array that no LoRA changes.
Does not own: what a LoRA is (adapters.py), the arithmetic (lvjax/models/lora.py).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvjax.core.errors import CheckpointError, InputError, shown, system_told
from lvjax.core.params import flatten, unflatten
from lvjax.models.lora import Lora, Loras, attach, merge
from lvjax.run.adapters import (
    Adapter,
    as_asked,
    as_strength,
    by_part,
    content,
    hashes,
    of_card,
    open_adapter,
)
from lvjax.run.bundle import Bundle
from lvjax.run.request import check_bundle
from lvjax.run.weights import read_weights


@system_told()
def with_lora(bundle: Bundle, lora, merge: bool | None = None) -> Bundle:
    """The model with LoRAs, in addition to those that it has.

    lora: the path of a file or of a folder with one; (path, strength), 1 being as trained and 0
      off; (path, strength, "high" or "low") for one expert of a model with two, which without it
      are both changed; or a list of these.
    merge: whether all its LoRAs are added up with the weights, in float32 and rounded once, instead
      of kept beside them; None for as those that it has, beside where there are none.  Beside them
      their strengths can be changed at no cost; merged they cost no time, and memory for a second
      copy of the weights that they change.
    Keys that the model has no place for are told in `Bundle.notices`.
    Raises: InputError; CheckpointError when a LoRA is missing, damaged, of another model, or of a
      kind that cannot be used.
    """
    check_bundle(bundle)
    if not isinstance(merge, bool | None):
        raise InputError(f"merge is {shown(merge)}; give True, False or None")
    new = tuple(open_adapter(a, bundle.dit, bundle.experts) for a in as_asked(lora))
    adapters = (*bundle.loras, *new)
    if merge and not adapters:
        raise InputError("no LoRA is given to be merged; give one, or leave the merging out")
    return _with(without_lora(bundle), adapters, bundle.merged if merge is None else merge)


@system_told()
def with_strength(bundle: Bundle, strength) -> Bundle:
    """The model with its LoRAs at other strengths; where they are beside the weights nothing is
    compiled again.

    strength: one number for all, or a list with one for each, in their order.
    Raises: InputError.
    """
    check_bundle(bundle)
    if shape := getattr(strength, "shape", ()):
        raise InputError(
            f"the strength is an array of shape {list(shape)}; give one number for all LoRAs, or a "
            "list with one for each"
        )
    count = len(bundle.loras)
    given = list(strength) if isinstance(strength, (list, tuple)) else [strength] * count
    if not count or len(given) != count:
        raise InputError(f"{len(given)} strengths are given for {count} LoRAs; give one for each")
    new = (replace(a, strength=as_strength(s)) for a, s in zip(bundle.loras, given, strict=True))
    return _with(without_lora(bundle), tuple(new), bundle.merged)


@system_told()
def without_lora(bundle: Bundle) -> Bundle:
    """The model without its LoRAs, with the very weights that it had before; where only merged
    weights are in memory, the files are read again.

    Raises: InputError; CheckpointError when they are not what they were.
    """
    check_bundle(bundle)
    if not bundle.loras:
        return bundle
    own = {name: h for name, h in bundle.hashes.items() if not name.startswith("lora ")}
    plain = replace(bundle, loras=(), merged=False, base={}, hashes=own)
    if bundle.base or not bundle.params:
        return replace(plain, params={**bundle.params, **bundle.base})
    plain = read_weights(plain)
    if plain.hashes != own:
        raise CheckpointError(f"the weights in {bundle.folder} have changed; load the model again")
    return plain


def _with(bundle: Bundle, adapters: tuple[Adapter, ...], merged: bool) -> Bundle:
    """A model without LoRAs, or its outline, with these."""
    if not adapters:
        return bundle
    changed, base = {}, {}
    if bundle.params:
        change = merge if merged else attach
        for part, loras in by_part(adapters).items():
            base[part] = bundle.params[part]
            changed[part] = change(base[part], loras)
    return replace(
        bundle,
        params=bundle.params | changed,
        hashes=bundle.hashes | hashes(adapters, merged),
        loras=adapters,
        merged=merged,
        base=base,
    )


def filled(outline: Bundle) -> Bundle:
    """An outline with its weights and its LoRAs.

    Merged ones go into each array as it is read, so that at no time more than one is held twice.
    Raises: CheckpointError as `lvjax.run.weights.load`.
    """
    if not outline.merged:
        bare = read_weights(without_lora(outline))
        return _with(bare, outline.loras, False)
    changes = {part: _by_path(loras) for part, loras in by_part(outline.loras).items()}

    def change(part: str, path: str, leaf):
        if path not in changes.get(part, ()):
            return leaf
        return flatten(merge(unflatten({path: leaf}), changes[part][path]))[path]

    full = read_weights(outline, change)
    return replace(full, hashes=full.hashes | hashes(outline.loras, True))


def _by_path(loras: Loras) -> dict[str, Loras]:
    """For each leaf, the LoRAs cut down to what changes it."""
    found = defaultdict(list)
    for lora, strength in loras:
        for path in {c.path for c in (*lora.low_rank, *lora.deltas)}:
            low, deltas = (
                tuple(c for c in changes if c.path == path)
                for changes in (lora.low_rank, lora.deltas)
            )
            found[path].append((Lora(low, deltas, ()), strength))
    return found


def with_card(outline: Bundle, options: Mapping[str, Any], places: Iterable = ()) -> Bundle:
    """The outline with the LoRAs that the options of a run card ask for.

    places: files to use for those with the same content, instead of the paths in the card.
    Raises: CheckpointError when a LoRA is missing or is not the one of the card; InputError for a
      place that holds none of the card's.
    """
    wanted, merged = of_card(options)
    here = {content(place): Path(place) for place in places}
    if other := here.keys() - {sha256 for _, sha256 in wanted}:
        what = f"{here[min(other)]} is none of the run's {len(wanted)} LoRAs"
        raise InputError(f"{what}; give their files, wherever they are")
    opened = []
    for asked, sha256 in wanted:
        asked = asked._replace(path=here.get(sha256, asked.path))
        try:
            adapter = open_adapter(asked, outline.dit, outline.experts)
        except CheckpointError as e:
            raise CheckpointError(f"a LoRA of the run (moved? name it with --lora): {e}") from e
        if adapter.sha256 != sha256:
            raise CheckpointError(
                f"{asked.path} is not the LoRA that the run was begun with; restore it, or say "
                "with --lora where that one is now"
            )
        opened.append(adapter)
    return _with(outline, tuple(opened), merged)


def check_same(bundle: Bundle, options: Mapping[str, Any]) -> None:
    """Raises: InputError when a bundle has other LoRAs than a card asks for, wherever they are."""
    wanted, merged = of_card(options)
    own = [[sha256, asked.strength, asked.expert] for asked, sha256 in wanted]
    if own != [adapter.identity for adapter in bundle.loras] or merged != bundle.merged:
        written = ", ".join(
            f"{asked.expert + ':' if asked.expert else ''}{asked.path}={asked.strength:g}"
            for asked, _ in wanted
        )
        how = " and --merge-lora" if merged else ""
        raise InputError(
            f"the run was begun with {f'--lora {written}{how}' if written else 'no LoRA'}; give "
            "the same, or --resume and --out alone, or start again with --overwrite"
        )
