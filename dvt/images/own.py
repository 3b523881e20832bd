"""Recognise pictures that dvt drew and stores that it wrote, which are no photographs, though they lie among them."""

from __future__ import annotations

import os

#: What pictures that dvt draws say in their PNG header under "Software".
SOFTWARE = "dvt"
_HEADER_BYTES = 128  # signature and size take 33; the text follows at once
_MARK = b"tEXtSoftware\x00" + SOFTWARE.encode()


def is_own_picture(path: str) -> bool:
    """Tell whether a file is a picture that dvt drew; one that cannot be read is not."""
    if not path.lower().endswith(".png"):
        return False
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for its writer
            return False
        with open(path, "rb") as file:
            return _MARK in file.read(_HEADER_BYTES)
    except OSError:
        return False


def is_store(path: str) -> bool:
    """Tell whether a path is a feature store by the names in it: a shard, or a folder of shards."""
    if path.endswith(".h5"):
        return os.path.isfile(path)
    try:
        return any(name.endswith(".h5") for name in os.listdir(path))
    except OSError:
        return False
