"""Progress of long work, as callbacks."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (what, done, total) after every step of a long piece of work, from the thread that asked for it.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Say nothing: the default of everything that takes a Progress."""
