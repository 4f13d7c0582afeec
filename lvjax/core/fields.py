# SPDX-License-Identifier: Apache-2.0
"""What the fields of a dataclass of settings may be: a test of each, and the same in words."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lvjax.core.errors import InputError


class Rule(NamedTuple):
    """allows: whether a value may be.  words: what may be, to stand after "give"."""

    allows: Callable[[Any], bool]
    words: str


def is_whole(x, low: float = 1, high: float = math.inf) -> bool:
    """Whether x is an int from `low` to `high`."""
    return type(x) is int and low <= x <= high


def is_real(x, low: float, high: float) -> bool:
    """Whether x is an int or a float from `low` to `high`."""
    return type(x) in (int, float) and low <= x <= high and math.isfinite(x)


def whole(low: int = 1, high: float = math.inf) -> Rule:
    """Whole numbers from `low` to `high`."""
    upto = f" to {high}" if high < math.inf else ""
    return Rule(lambda x: is_whole(x, low, high), f"a whole number from {low}{upto}")


def real(low: float, high: float = math.inf, example: str = "") -> Rule:
    """Numbers from `low` to `high`; example: one, for the words."""
    upto = f" to {high:.6f}".rstrip("0").rstrip(".") if high < math.inf else ""
    words = f"a number from {low:.6f}".rstrip("0").rstrip(".") + upto
    return Rule(
        lambda x: is_real(x, low, high), words + (f", for example {example}" * bool(example))
    )


def one_of(names) -> Rule:
    """One of some names."""
    names = tuple(names)
    return Rule(lambda x: x in names, f"one of {', '.join(names)}")


FLAG = Rule(lambda x: type(x) is bool, "True or False")


def optional(rule: Rule) -> Rule:
    """What a rule allows, or None."""
    return Rule(lambda x: x is None or rule.allows(x), f"None or {rule.words}")


def check_fields(value, name: str, rules: dict[str, Rule]) -> None:
    """Raises: InputError for the first field of a dataclass that its rule does not allow.

    name: of the whole in messages, as in "defaults.steps is 0; give a whole number from 1", or "".
    """
    for field, rule in rules.items():
        if not rule.allows(given := getattr(value, field)):
            called = f"{name}.{field}" if name else field
            raise InputError(f"{called} is {given!r}; give {rule.words}")
