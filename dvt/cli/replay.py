"""Take a command's settings from a file: the config.json of an earlier run, or one that `dvt config` printed."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import tyro

from dvt.cli.options import Option, options_of
from dvt.cli.settings.common import Output, Remade
from dvt.errors import ConfigError
from dvt.files import read_plain
from dvt.schema import checked, parsed_json, read_json
from dvt.text import visible, wrapped

#: What a run's file holds beside its settings.
_ABOUT = ("command", "job")
#: How a command is started and what it prints: no settings of what it does, so they are neither kept nor replayed.
MANNERS = tuple(each.name for kind in (Output, Remade) for each in dataclasses.fields(kind))


def settings_file(place: str) -> Path:
    """Name the file that holds the settings of a run: in its folder or, for a file, in the folder NAME.run beside it.

    >>> print(settings_file("features"), settings_file("denoiser.safetensors"))
    features/config.json denoiser.run/config.json
    """
    path = Path(place)
    return (path.with_suffix(".run") if path.suffix == ".safetensors" else path) / "config.json"


def command_of(place: str) -> str | None:
    """Read which command wrote the settings that a run's place holds; None if it holds none."""
    try:
        kept = read_json(settings_file(place))
    except (OSError, ConfigError):
        return None
    name = kept.get("command") if isinstance(kept, dict) else None
    return name if isinstance(name, str) else None


def defaults_from_file(name: str, settings: type, arguments: Sequence[str]) -> Any:
    """Read the settings that --config or --resume name, as tyro's defaults; None if neither is given.

    Args:
        name: the command's name.
        settings: its settings class.
        arguments: the command line behind the name.

    Raises:
        ConfigError: the file is missing, or holds something else.
    """
    path = _value_of("--config", arguments)
    if path is None and "--resume" in arguments:
        out = _value_of("--out", arguments)
        if out is None:
            raise ConfigError("--resume continues the run in --out: give --out too")
        path = str(settings_file(out))
    if path is None:
        return None
    shown = visible(path)
    try:
        text = read_plain(path).decode()
        values = parsed_json(re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE))
        return _instance(name, settings, values)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(
            f"cannot read the settings {shown!r}: {reason}; give the config.json of an earlier run, or the file that "
            f"`dvt config {name} > settings.json` makes"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"the settings {shown!r} cannot be used: {error}") from error


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    for here, after in zip(arguments, [*arguments, None][1:], strict=True):
        if here == flag:
            return after
        if here.startswith(f"{flag}="):
            return here.partition("=")[2]
    return None


def _instance(name: str, settings: type, values: Any) -> Any:
    """Make a command's settings of JSON values; a setting without a value must come from the command line."""
    inner = values.get("settings") if isinstance(values, dict) else None
    if isinstance(inner, dict) and "command" in inner:  # results hold the settings that made them
        values = inner
    if not isinstance(values, dict):
        raise ConfigError("it holds no named values")
    made_by = values.get("command", name)
    if made_by != name:
        raise ConfigError(f"it is of `dvt {visible(str(made_by))}`, not of `dvt {name}`")
    return _unchecked(settings, {key: value for key, value in values.items() if key not in (*_ABOUT, *MANNERS)})


def _unchecked(settings: type, values: dict[str, Any], within: str = "") -> Any:
    """Make settings whose types alone are checked; tyro, which takes them as defaults, checks the final ones.

    A setting without value or default is left for the command line.
    """
    hints, names = get_type_hints(settings), [each.name for each in dataclasses.fields(settings)]
    if unknown := [key for key in values if key not in names]:
        near = difflib.get_close_matches(unknown[0], names, 1)
        guess = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
        raise ConfigError(f"there is no setting {visible(within + unknown[0])!r}{guess}")
    made: Any = object.__new__(settings)
    for each in dataclasses.fields(settings):
        value: Any = values[each.name] if each.name in values else _default(each)
        if each.name in values or dataclasses.is_dataclass(hints[each.name]):
            value = _checked(value, hints[each.name], within + each.name, each.name in values)
        object.__setattr__(made, each.name, value)
    return made


def _checked(value: Any, kind: Any, name: str, given: bool) -> Any:
    if not dataclasses.is_dataclass(kind):
        return checked(value, kind, name)
    if given and not isinstance(value, dict):
        raise ConfigError(f"{name} is {visible(repr(value)[:80])}; it must be named values")
    if not given and value is not tyro.MISSING:
        return value
    return _unchecked(kind, value if given else {}, f"{name}.")  # type: ignore[arg-type]


def _default(each: dataclasses.Field) -> Any:
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return tyro.MISSING if each.default is dataclasses.MISSING else each.default


def template(name: str, settings: type) -> str:
    """Write all settings of a command as JSON with comments, to be edited and handed to --config."""
    listed = [each for each in options_of(settings) if each.field[0] not in MANNERS]
    needed = [each for each in listed if each.default is dataclasses.MISSING]
    lines = [
        f"# Settings of `dvt {name}`; use them by: dvt {name} ... --config FILE",
        "# Lines like this are comments.",
    ]
    for each in needed:
        lines += ["#", *_comment(f"{each.name}: {each.text} Give it here or on the command line.", 0)]
        lines += [f"# {json.dumps(each.field[-1])}: ..."]
    groups: dict[str, Any] = {}
    for each in (each for each in listed if each not in needed):
        inner = groups
        for part in each.field[:-1]:
            inner = inner.setdefault(part, {})
        inner[each.field[-1]] = each
    return "\n".join([*lines, *_block({"command": name, **groups}, 0)])


def _block(content: dict[str, Any], depth: int) -> list[str]:
    indent, lines = "  " * (depth + 1), ["{"]
    for number, (key, value) in enumerate(content.items(), 1):
        comma = "," if number < len(content) else ""
        if isinstance(value, Option):
            lines += _comment(value.text + (f" {value.values}" if value.choices else ""), depth + 1)
        inner = _block(value, depth + 1) if isinstance(value, dict) else [_json(value)]
        lines += [f"{indent}{json.dumps(key)}: {inner[0]}", *inner[1:]]
        lines[-1] += comma
    return [*lines, "  " * depth + "}"]


def _json(value: Any) -> str:
    return json.dumps(value.default if isinstance(value, Option) else value, default=str)


def _comment(text: str, depth: int) -> list[str]:
    indent = "  " * depth
    return [f"{indent}# {line}" for line in wrapped(text, 100 - len(indent)).split("\n")]
