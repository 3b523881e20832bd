"""Report the progress of long work by callbacks."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (what, done, total) after every step of long work, in the caller's thread.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Do nothing; the default for arguments of the type Progress."""
