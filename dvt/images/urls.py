"""Images behind URLs, through whatever fsspec knows (``s3://bucket/key``, ``gs://``, ``https://``, ...)."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvt.errors import ImageError

MAX_BYTES = 2 << 30
"""The largest object that is fetched from a URL."""

_PIECE_BYTES = 64 << 20  # most images are one request

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z0-9+.-]+)*://")


def is_url(path: str | Path) -> bool:
    """Tell URLs from paths; URLs stay text, because a Path would drop one of the slashes.

    >>> is_url("s3://bucket/photo.jpg"), is_url("photos/a.jpg")
    (True, False)
    """
    return isinstance(path, str) and _URL.match(path) is not None


def image_error(path: str | Path, reason: object) -> ImageError:
    if isinstance(reason, OSError) and reason.strerror:
        reason = reason.strerror
    elif isinstance(reason, Exception):
        reason = str(reason) or type(reason).__name__
    return ImageError(f"cannot read image {os.fspath(path)!r}: {reason}")


def url_files(url: str) -> tuple[Any, str]:
    """Find the fsspec file system that a URL lies on, and its path there.

    Raises:
        ImportError, ValueError: a package is missing, or nothing is known by that name.
    """
    import fsspec

    return fsspec.core.url_to_fs(url)


@contextmanager
def fetching(url: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except ImportError as error:
        raise image_error(
            url,
            f"a package is missing ({error}); https:// needs `pip install aiohttp requests`, s3:// s3fs, gs:// gcsfs",
        ) from error
    except Exception as error:  # each file system has its own errors
        raise image_error(url, error) from error


def fetched(url: str) -> bytes:
    """Fetch the whole object, if it is of a bounded size."""
    with fetching(url):
        files, place = url_files(url)
        # Some servers do not tell the size, and some lie: what is read is bounded too.
        if (files.info(place).get("size") or 0) <= MAX_BYTES:
            content = io.BytesIO()
            with files.open(place, "rb", cache_type="none") as file:
                while content.tell() <= MAX_BYTES and (piece := file.read(_PIECE_BYTES)):
                    content.write(piece)
            if content.tell() <= MAX_BYTES:
                return content.getvalue()
    raise image_error(url, f"it has more than {MAX_BYTES >> 30} GB, the most that is fetched")
