"""How values on the command line are read: numbers, choices and what may be left out, refused in plain words."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

REGISTRY = ConstructorRegistry()
_NUMBERS: dict[type, tuple[str, str]] = {int: ("INT", "a whole number"), float: ("FLOAT", "a number")}
_NONE = "none"  # in any case; only where a setting's default is something else need anybody say it


@REGISTRY.primitive_rule
def _rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read numbers and choices, and either of them where None is allowed, which tyro shows as one more choice."""
    members = get_args(info.type) if get_origin(info.type) in (Union, types.UnionType) else (info.type,)
    others = [each for each in members if each is not types.NoneType]
    if others and all(get_origin(each) is Literal for each in others):
        others = [Literal[tuple(choice for each in others for choice in get_args(each))]]
    if len(others) != 1 or (reader := _reader(others[0], len(members) > 1)) is None:
        return None
    metavar, read = reader
    optional = len(members) > 1

    def value_of(texts: list[str]) -> Any:
        return None if optional and texts[0].lower() == _NONE else read(texts[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=value_of,
        is_instance=lambda value: value is None if optional and value is None else _matches(value, others[0]),
        str_from_instance=lambda value: [str(value)],
    )


def refusal(panel: str) -> str:
    """Take from a panel of tyro's, which shows a whole option with its type and text, what is wrong, as one sentence.

    >>> print(refusal("Value error\\n ---- \\n Error parsing --views: 'x' is not a whole number \\n ---- \\n For help"))
    --views: 'x' is not a whole number.
    """
    parts: list[list[str]] = [[]]
    for line in (re.sub("[\u2500-\u257f]", "-", each).strip(" -") for each in panel.splitlines()):
        if line:
            parts[-1].append(line)
        elif parts[-1]:
            parts.append([])
    title, *first = parts[0] or [""]
    text = re.sub(r"^Error parsing (\{[^}]*\}: )?", "", " ".join(first or parts[1] or [title]))
    text = re.sub(r"^Unrecognized options: (-[^,]*).*", r"there is no option \1", text)
    text = re.sub(r"^Unrecognized options: ([^,]*).*", r"\1 is one argument too many", text)
    text = re.sub(r"^Missing value for argument '(.*)'\. Expected (\S+) values?\.?", r"\1 must be given a value", text)
    return text if text.endswith((".", "?")) else f"{text}."


def _reader(kind: Any, optional: bool) -> tuple[str, Callable[[str], Any]] | None:
    """Choose how the text of one value becomes one of this type, and what help calls it; None leaves it to tyro."""
    if kind in _NUMBERS:
        metavar, words = _NUMBERS[kind]
        return metavar, lambda text: _number(text, kind, words)
    if get_origin(kind) is Literal and all(isinstance(each, str) for each in get_args(kind)):
        return "{" + ",".join(get_args(kind)) + "}", lambda text: _choice(text, get_args(kind))
    if optional and isinstance(kind, type) and kind.__module__ in ("builtins", "pathlib") and kind is not bool:
        return ("STR" if kind is str else kind.__name__.upper()), kind
    return None


def _number(text: str, kind: Callable[[str], Any], words: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {words}") from None


def _choice(text: str, allowed: tuple[str, ...]) -> str:
    if text in allowed:
        return text
    near = difflib.get_close_matches(text, allowed, 1, 0.5)
    guess = f"did you mean {near[0]!r}? There" if near else "there"
    raise ValueError(f"{text!r} is not among the choices; {guess} are {', '.join(allowed)}")


def _matches(value: Any, kind: Any) -> bool | Literal["~"]:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return isinstance(value, kind) or ("~" if kind is float and isinstance(value, int) else False)
