"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dvt.errors import ConfigError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name to write to, in a folder that is made; at the end of the block the file takes the name `path`.

    Raises:
        ConfigError: something cannot be written; nothing is left of it.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {str(path)!r}: {error.strerror or error}; make room or choose another place, and run the "
            "same command again"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
