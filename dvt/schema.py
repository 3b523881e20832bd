"""Check the types of values that are read from files, before anything uses them."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from dvt.errors import ConfigError
from dvt.files import MOST_BYTES, read_plain

T = TypeVar("T")


def read_json(path: str | Path, most: int = MOST_BYTES) -> Any:
    """Read a JSON file that anybody may have written.

    Raises:
        OSError: as :func:`dvt.files.read_plain`.
        ConfigError: it is no JSON in UTF-8, or too deep.
    """
    return parsed_json(read_plain(path, most))


def parsed_json(text: str | bytes) -> Any:
    """Read JSON from a text; whatever it cannot be read for is a ConfigError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also of bytes that are no text
        raise ConfigError(f"it is not JSON ({error})") from error


def typed(kind: type[T], values: Any) -> T:
    """Make a dataclass from JSON values of its fields; a list becomes a tuple if the field is one.

    Args:
        kind: a dataclass, or a TypedDict, for which a plain dict is made.
        values: the values by field.

    Raises:
        ConfigError: a field is unknown, missing or of another type. A boolean is not a number; numbers must be finite.

    >>> from dvt.denoiser.config import DenoiserConfig
    >>> typed(DenoiserConfig, {"kind": "block", "feature_dim": 64, "grid": [2, 3]}).grid
    (2, 3)
    """
    try:
        return kind(**_fields(values, kind, kind.__name__))
    except TypeError as error:  # a field without a default is missing
        raise ConfigError(f"{kind.__name__}: {error}") from error


def _fields(values: Any, kind: Any, name: str) -> dict[str, Any]:
    kinds = get_type_hints(kind)
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        _refuse(name, values, "named values")
    if unknown := sorted(values.keys() - kinds.keys()):
        raise ConfigError(f"{name} has no {', '.join(map(repr, unknown[:5]))}; it has {', '.join(kinds)}")
    if is_typeddict(kind) and (missing := sorted(kind.__required_keys__ - values.keys())):
        raise ConfigError(f"{name} misses {', '.join(missing)}")
    return {key: checked(value, kinds[key], f"{name}.{key}") for key, value in values.items()}


def check_ranges(settings: Any, checks: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse the first setting that is out of its range, and name no others.

    Args:
        settings: holds the settings as attributes.
        checks: for each name, whether its value is allowed, and which values are.

    Raises:
        ConfigError: a value is not allowed.
    """
    for name, (fine, allowed) in checks.items():
        if not fine:
            raise ConfigError(f"{name} is {getattr(settings, name)!r}; it must be {allowed}")


def checked(value: Any, kind: Any, name: str) -> Any:
    """Check that a JSON value has a type, and return it, with lists converted to tuples.

    Args:
        value: the JSON value.
        kind: a plain type, a path, a Literal, a union, a list, tuple or dict of such, a TypedDict, or Any.
        name: the value's name in messages.

    Raises:
        ConfigError: the value has another type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        found = any(type(value) is type(each) and value == each for each in inner)
        return value if found else _refuse(name, value, f"one of {', '.join(map(repr, inner))}")
    if origin in (Union, types.UnionType):
        return _one_of(value, inner, name)
    if is_typeddict(kind):
        return _fields(value, kind, name)
    if kind is Path:
        return Path(_plain(value, str, name))
    if origin in (list, tuple):
        return _sequence(value, origin, inner, name)
    if origin is dict:
        if not isinstance(value, dict):
            _refuse(name, value, "named values")
        return {checked(k, inner[0], name): checked(v, inner[1], f"{name}.{k}") for k, v in value.items()}
    return _plain(value, kind, name)


def _one_of(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    for each in kinds:
        try:
            return checked(value, each, name)
        except ConfigError:
            continue
    return _refuse(name, value, " or ".join(getattr(each, "__name__", str(each)) for each in kinds))


def _sequence(value: Any, kind: Any, inner: tuple[Any, ...], name: str) -> Any:
    if not isinstance(value, (list, tuple)):
        _refuse(name, value, "a list")
    if kind is tuple and inner[-1] is not Ellipsis:
        if len(value) != len(inner):
            _refuse(name, value, f"a list of {len(inner)}")
        return tuple(checked(v, k, name) for v, k in zip(value, inner, strict=True))
    return kind(checked(each, inner[0], f"{name}[{i}]") for i, each in enumerate(value))


def _plain(value: Any, kind: Any, name: str) -> Any:
    if kind is float:
        try:
            fits = type(value) in (int, float) and math.isfinite(float(value))
        except OverflowError:
            fits = False
        return value if fits else _refuse(name, value, "a finite number")
    if kind is int and type(value) is int:
        return value if abs(value) < 1 << 62 else _refuse(name, value, "a number of 62 bits")
    return value if type(value) is kind else _refuse(name, value, getattr(kind, "__name__", str(kind)))


def _refuse(name: str, value: Any, wanted: str) -> NoReturn:
    given = "a number of many digits" if isinstance(value, int) and abs(value) >= 1 << 62 else repr(value)
    raise ConfigError(f"{name} is {given[:80]}; it must be {wanted}")
