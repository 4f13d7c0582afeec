# SPDX-License-Identifier: Apache-2.0
"""Configs: a Python file with get_config() -> ConfigDict, found by path or by name, changed by
--set, turned into dataclasses.
"""

import ast
import dataclasses
import difflib
import runpy
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ml_collections import ConfigDict

from lvjax.core.errors import InputError


def find(name: str) -> Path:
    """A config file: a path, or the name of one that comes with lvjax ("pocket" or
    "configs/pocket.py").

    Raises: InputError listing the names that exist.
    """
    if Path(name).is_file():
        return Path(name)
    stem = Path(name).stem
    if Path(name).parts not in ((stem,), (f"{stem}.py",), ("configs", f"{stem}.py")):
        raise InputError(f"no config file {name!r}")
    homes = (
        Path(str(resources.files("lvjax") / "configs")),
        Path(__file__).resolve().parents[2] / "configs",
    )
    for home in homes:
        if (found := home / f"{stem}.py").is_file():
            return found
    known = sorted({p.stem for home in homes if home.is_dir() for p in home.glob("*.py")})
    raise InputError(f"no config {name!r}; give a file or one of {known}")


def load(name: str, changes: list[str] = ()):
    """The ConfigDict of a config with `changes` ("a.b=value") applied.

    Raises: InputError for a file without get_config, an unknown key (with the nearest), or a value
    that is not Python, or an error in the file.
    """
    config = _run(find(name))
    for change in changes:
        key, eq, text = change.partition("=")
        if not eq:
            raise InputError(f"--set {change!r}; write key=value, for example --set seed=3")
        _assign(config, key, _value(text))
    return config


def _run(path: Path):
    """What get_config() of a file returns."""
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is not None:
            return ConfigDict(_text_keys(get_config(), path))
    except InputError:
        raise
    except (Exception, SystemExit) as e:  # noqa: BLE001  somebody's Python: anything can go wrong in it
        what = str(e).splitlines()[0] if str(e) else ""
        raise InputError(
            f"{path} cannot be used ({type(e).__name__}: {what}); correct the file"
        ) from e
    raise InputError(f"{path} has no get_config(); a config is a Python file that defines it")


def _text_keys(values, path) -> dict:
    """What a config holds, as dicts.

    Raises: InputError unless it is a mapping whose keys are text.
    """
    if not hasattr(values, "items"):
        raise InputError(f"{path}: get_config() returned {values!r}; return a ConfigDict")
    if wrong := [k for k in values if not isinstance(k, str)]:
        raise InputError(f"{path} has the key {wrong[0]!r}; keys are names")
    return {k: _text_keys(v, path) if hasattr(v, "items") else v for k, v in values.items()}


def _value(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _assign(config, key: str, value) -> None:
    *parents, last = key.split(".")
    for name in parents:
        _check_key(config, name, key)
        config = config[name]
    _check_key(config, last, key)
    try:
        config[last] = value
    except (TypeError, ValueError) as e:
        raise InputError(f"--set {key}={value!r}: {e}") from e


def _check_key(config, name: str, key: str) -> None:
    keys = list(config) if hasattr(config, "keys") else []
    if not keys:
        raise InputError(f"--set {key}: there is no {name!r}, what stands before it has no keys")
    if name not in keys:
        near = difflib.get_close_matches(name, keys, n=1, cutoff=0.0)
        raise InputError(f"--set {key}: unknown key {name!r}; did you mean {near[0]!r}?")


def build(cls, values) -> Any:
    """A dataclass from a ConfigDict or dict, nested dataclasses and tuples of them included.

    Raises: InputError for an unknown field, with the nearest.
    """
    hints, out = get_type_hints(cls), {}
    names = {f.name for f in dataclasses.fields(cls)}
    for key, value in dict(values).items():
        if key not in names:
            near = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.0)
            raise InputError(f"{cls.__name__} has no field {key!r}; did you mean {near[0]!r}?")
        out[key] = _cast(hints[key], value)
    try:
        return cls(**out)
    except TypeError as e:  # a field without a value
        raise InputError(f"{cls.__name__}: {e}; give all of its fields") from e


def changed(value, fields: dict, changes: list[str]) -> Any:
    """A dataclass with `fields` and then `changes` ("key=value") replaced.

    Raises: InputError for an unknown field, with the nearest.
    """
    fields = dict(fields)
    for change in changes:
        key, eq, text = change.partition("=")
        if not eq:
            raise InputError(f"--set {change!r}; write key=value")
        fields[key] = _value(text)
    return build(type(value), dataclasses.asdict(value) | fields)


def _cast(hint, value):
    kinds = [kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)]
    if kinds and hasattr(value, "items"):
        return build(kinds[0], value)
    if isinstance(value, (list, tuple)):
        inner = (get_args(hint) or (None,))[0]
        return tuple(_cast(inner, v) for v in value)
    return value
