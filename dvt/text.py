"""Escape names, which may hold any characters, so that a terminal or a page shows them and does not obey them."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

#: Characters of a line of a terminal that nobody has widened.
WIDTH = 80


def visible(name: str | os.PathLike[str]) -> str:
    r"""Write a name in one line of printable characters, all others as Python's escapes.

    File names on Linux are bytes: they may hold line breaks, terminal commands, and marks of text direction.

    >>> print(visible("a\x1b]0;title\x07\nb.png"))
    a\x1b]0;title\x07\nb.png
    """
    return "".join(each if each.isprintable() else _escaped(each) for each in os.fspath(name))


def visible_lines(text: str) -> str:
    """Escape a text as :func:`visible` does, but keep its line breaks; for our own text with names in it."""
    return "\n".join(map(visible, text.split("\n")))


def markdown(name: str) -> str:
    r"""Escape a name for Markdown, so that nothing in it begins a heading, link, code, table cell or HTML.

    >>> print(markdown("a|b`c`<i>"))
    a\|b\`c\`\<i\>
    """
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", visible(name))


def wrapped(text: str, width: int = WIDTH) -> str:
    """Write lines that are longer than a terminal as several, which keep the indentation.

    >>> print(wrapped("  one two three", 10))
      one two
      three
    """
    return "\n".join(_broken(line, width) for line in text.split("\n"))


def _broken(line: str, width: int, end: str = "") -> str:
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip(" ")))
    after = indent + "  " * (line.lstrip().startswith("- ") or bool(end))
    broken = textwrap.wrap(
        line.strip(),
        width - len(end),
        initial_indent=indent,
        subsequent_indent=after,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"{end}\n".join(broken)


def shell_lines(command: str, indent: int = 4, width: int = WIDTH) -> str:
    r"""Write a command of the shell on several lines that can be pasted as they are; quoted words stay whole.

    >>> print(shell_lines("dvt inspect 'my store' --verify", 2, 18))
      dvt inspect \
        'my store' \
        --verify
    """
    words = re.findall(r"(?:'[^']*'|\"[^\"]*\"|\\.|\S)+", command)
    return _broken(" " * indent + " ".join(word.replace(" ", "\0") for word in words), width, " \\").replace("\0", " ")


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """Write a table in columns; columns that a terminal has no room for follow in tables of their own.

    Args:
        head: the titles of the columns.
        lines: the cells of each line; the first names it, and is repeated in each table.
        width: of the terminal in characters.

    >>> print(aligned(["row", "first", "second"], [["a", "1", "2"]], 12))
    row  first
    a    1
    <BLANKLINE>
    row  second
    a    2
    """
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    groups: list[list[int]] = [[0]]
    for column in range(1, len(head)):
        taken = sum(widths[i] + 2 for i in groups[-1]) + widths[column]
        if taken > width and len(groups[-1]) > 1:
            groups.append([0])
        groups[-1].append(column)
    return "\n\n".join(
        "\n".join("  ".join(line[i].ljust(widths[i]) for i in group).rstrip() for line in [head, *lines])
        for group in groups
    )


def counted(number: int, noun: str) -> str:
    """Write a number and what it counts, in the plural unless it is one.

    >>> counted(1, "image"), counted(0, "image"), counted(1200, "held-out image")
    ('1 image', '0 images', '1200 held-out images')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def differing(theirs: Mapping[str, Any], mine: Mapping[str, Any], mine_are: str = "you ask for") -> str:
    """Say in words in which settings two runs differ; empty if they are equal. Nested settings are compared one by one.

    Args:
        theirs: settings of an earlier run, by name.
        mine: those of another.
        mine_are: what introduces the other's values.

    >>> differing({"views": {"count": 12, "seed": 0}, "size": 224}, {"views": {"count": 6, "seed": 0}})
    'views.count 12 (you ask for 6), size 224 (you ask for none)'
    """
    there, here = flat(theirs), flat(mine)
    changed = [name for name in there | here if there.get(name) != here.get(name) or (name in there) != (name in here)]
    had = (f"{name} {_brief(there[name])}" if name in there else f"no {name}" for name in changed)
    asked = (_brief(here[name]) if name in here else "none" for name in changed)
    return ", ".join(f"{old} ({mine_are} {new})" for old, new in zip(had, asked, strict=True))


def _brief(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 3:
        return f"{len(value)} of them"
    text = repr(value)
    return text if len(text) <= 90 else f"{text[:90]}..."


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """List nested values in one dictionary, by names such as "views.count"."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {before + name: value}
    return found


def _escaped(character: str) -> str:
    return repr(character)[1:-1]  # repr escapes characters that are not printable
