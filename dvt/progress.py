"""Report the progress of long work by callbacks, and tell which of several processes speaks for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

#: Called with (what, done, total) after every step of long work, in the caller's thread.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Do nothing; the default for arguments of the type Progress."""


def is_first_process() -> bool:
    """Tell whether this process reports and writes the results: the first of a distributed run, or the only one."""
    torch = sys.modules.get("torch")  # not imported here: commands ask this before they need it
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return bool(torch.distributed.get_rank() == 0)
    return os.environ.get("RANK", "0") == "0"  # as torchrun and accelerate set it
