"""List the options of a command from its settings class: name, values, default, text and group.

tyro parses the command line; this list is what help, the completion of shells, `dvt config` and the documents are made
from. A test compares it with tyro's own.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

#: Groups in the order of help: those that most people need come first, the internals of solvers last. Each is a title
#: and the classes whose fields it holds.
GROUPS: dict[str, tuple[str, ...]] = {
    "arguments": (),
    "options": (),
    "model": ("BackboneOptions", "LayersOptions"),
    "denoiser": ("DenoiserOptions",),
    "clean features": ("CleanOptions",),
    "prior": ("PriorTraining",),
    "denoiser to train": ("DenoiserTraining",),
    "fine-tuning": ("BackboneTraining",),
    "measurement": ("AnalyzeConfig", "DoctorConfig"),
    "protocol": ("ProbeConfig",),
    "remedy": ("RemedyConfig",),
    "comparison": ("Comparison",),
    "loop": ("Loop",),
    "encoder": ("Represent", "EncoderConfig"),
    "sampling": ("Sampling",),
    "training": ("TrainingConfig",),
    "job": ("JobOptions",),
    "running and output": ("Options", "Output", "Remade"),
    "head (internals)": ("HeadConfig",),
    "linear solver (internals)": ("LinearConfig",),
    "neural solver (internals)": ("NeuralConfig",),
}
_TITLES = {kind: title for title, kinds in GROUPS.items() for kind in kinds}
_VALUES = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Option:
    """Describe one option of a command.

    Args:
        flags: its flags, such as ("--json", "--no-json"); empty for a positional argument.
        name: the name of a positional argument, or of the field.
        field: where the value is in the settings, such as ("linear", "ridge").
        values: what its value looks like, such as "INT" or "{a,b}"; empty for a switch.
        choices: the allowed values, if they are listed.
        default: the value if it is not given, or MISSING if it must be given.
        text: what it does.
        group: the title of its group in help.
    """

    flags: tuple[str, ...]
    name: str
    field: tuple[str, ...]
    values: str
    choices: tuple[str, ...]
    default: Any
    text: str
    group: str

    @property
    def required(self) -> bool:
        """True if it must be given."""
        return self.default is dataclasses.MISSING and not self.values.endswith("...")


@functools.cache
def options_of(settings: type) -> tuple[Option, ...]:
    """List a command's options by group, in the order of help."""
    found = list(_walk(settings, settings, (), "", False))
    order = list(GROUPS)
    return tuple(sorted(found, key=lambda each: (order.index(each.group), each.default is not dataclasses.MISSING)))


def _walk(settings: type, command: type, place: tuple[str, ...], prefix: str, omit: bool) -> Iterator[Option]:
    hints = get_type_hints(settings, include_extras=True)
    for field in dataclasses.fields(settings):
        kind, marks = _unwrapped(hints[field.name])
        if tyro.conf.Suppress in marks:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        inner = (*place, field.name)
        own = next((each.name for each in marks if getattr(each, "name", None) is not None), field.name)
        if dataclasses.is_dataclass(kind):
            bare = omit or tyro.conf.OmitArgPrefixes in marks
            below = "" if bare else prefix if own == "" else f"{prefix}{own}."
            instance = None if default is dataclasses.MISSING else default
            for each in _walk(kind, command, inner, below, bare):  # type: ignore[arg-type]
                positional = tyro.conf.PositionalRequiredArgs in marks and each.required
                each = dataclasses.replace(each, default=_value(instance, each, len(inner)))
                yield _positional(each) if positional else each
            continue
        yield _option(settings, command, field.name, kind, marks, default, inner, f"{prefix}{own}")


def _option(
    settings: type, command: type, field: str, kind: Any, marks: tuple[Any, ...], default: Any, place: Any, name: str
) -> Option:
    shown, short = name.replace("_", "-"), [each for mark in marks for each in getattr(mark, "aliases", None) or ()]
    flags = (*short, f"--{shown}") if kind is not bool else (*short, f"--{shown}", _negative(shown))
    values, choices = _values(kind)
    text, owner = _text(settings, field)
    must = default is dataclasses.MISSING
    title = "options" if must or owner == command.__name__ else _TITLES.get(owner, "options")
    found = Option(flags, field, place, values, choices, default, text, title)
    return _positional(found) if tyro.conf.Positional in marks else found


def _positional(option: Option) -> Option:
    """Turn an option into an argument without a flag."""
    values = option.name.upper() + (" ..." if option.values.endswith("...") else "")
    return dataclasses.replace(option, flags=(), values=values, group="arguments")


def _negative(name: str) -> str:
    """Name the switch that turns an option off, as tyro does: --linear.no-robust."""
    before, dot, last = name.rpartition(".")
    return f"--{before}{dot}no-{last}"


def _value(instance: Any, option: Option, depth: int) -> Any:
    """Find the default of a nested option in its parent's default, if there is one."""
    if instance is None:
        return option.default
    return functools.reduce(getattr, option.field[depth:] or option.field[-1:], instance)


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split a type into what it is and tyro's marks on it."""
    marks: tuple[Any, ...] = ()
    while get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        marks += tuple(more)
    return hint, marks


def _values(kind: Any) -> tuple[str, tuple[str, ...]]:
    """Say in help's words what a value of a type looks like, and list it where it can be listed."""
    kind, _ = _unwrapped(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if kind is bool:
        return "", ()
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}", tuple(map(str, inner))
    if origin in (Union, types.UnionType):
        parts = [_values(each) for each in inner if each is not types.NoneType]
        choices = tuple(each for _, some in parts for each in some)
        listed = ["{" + ",".join(choices) + "}"] if choices else []
        return "|".join(listed + [each for each, some in parts if not some]), choices
    if origin is tuple:
        many = inner[-1] is Ellipsis
        words, choices = _values(inner[0])
        return (f"{words} ..." if many else " ".join(_values(each)[0] for each in inner)), choices
    return _VALUES.get(kind, getattr(kind, "__name__", str(kind)).upper()), ()


def _text(settings: type, field: str) -> tuple[str, str]:
    """Find a field's text and the class that it was first written in; a class that repeats a field takes it over."""
    for each in settings.__mro__:
        if field in vars(each).get("__annotations__", {}):
            known = _texts(each)
            first = [base.__name__ for base in settings.__mro__ if field in vars(base).get("__annotations__", {})]
            text = known.get(field) or _text_of_bases(each, field)
            return text, next((name for name in reversed(first) if name in _TITLES), first[-1])
    return "", settings.__name__


def _text_of_bases(settings: type, field: str) -> str:
    return next((text for base in settings.__mro__[1:-1] if (text := _texts(base).get(field))), "")


@functools.cache
def _texts(settings: type) -> dict[str, str]:
    """Read the texts of a class's fields: the strings below them, or the Args of its docstring.

    They are read from the source, so that they are there under `python -OO` too.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(settings))).body[0]
    except (OSError, SyntaxError):
        return {}
    assert isinstance(tree, ast.ClassDef)
    found = _arguments(ast.get_docstring(tree) or "")
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            value = after.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[node.target.id] = _plain(value.value)
    return found


def _arguments(docstring: str) -> dict[str, str]:
    """Read the section Args of a docstring; an entry may name several arguments."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(r"^ {4}([\w, ]+):((?:.*\n?)(?: {8}.*\n?)*)", section[1], re.MULTILINE)
    return {name: _plain(text) for names, text in entries for name in names.split(", ")}


def _plain(text: str) -> str:
    """Join the lines of a text, and leave out the roles of its references."""
    return re.sub(r":\w+:`", "`", " ".join(text.split()))
