"""Names that may hold anything, written so that whoever shows them obeys nothing in them."""

from __future__ import annotations

import os
import re


def visible(name: str | os.PathLike[str]) -> str:
    r"""Write a name in one line of characters that are seen; all others as Python's escapes.

    File names are bytes on Linux: they hold line breaks, terminal commands, and letters that turn the direction.

    >>> print(visible("a\x1b]0;title\x07\nb.png"))
    a\x1b]0;title\x07\nb.png
    """
    return "".join(each if each.isprintable() else _escaped(each) for each in os.fspath(name))


def visible_lines(text: str) -> str:
    """Write a text of our own, in whose lines names may lie, in the same way, but for its line breaks."""
    return "\n".join(map(visible, text.split("\n")))


def markdown(name: str) -> str:
    r"""Write a name as Markdown that shows it: no heading, link, code, table cell or HTML begins in it.

    >>> print(markdown("a|b`c`<i>"))
    a\|b\`c\`\<i\>
    """
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", visible(name))


def _escaped(character: str) -> str:
    return repr(character)[1:-1]  # of what is not printable, Python's escape
