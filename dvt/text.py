"""Escape names, which may hold any characters, so that a terminal or a page shows them and does not obey them."""

from __future__ import annotations

import os
import re


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


def _escaped(character: str) -> str:
    return repr(character)[1:-1]  # repr escapes characters that are not printable
