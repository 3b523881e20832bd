"""Read images from URLs of any file system that fsspec supports (``s3://bucket/key``, ``gs://``, ``https://``, ...)."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvt.errors import ImageError
from dvt.files import similar

MAX_BYTES = 2 << 30
"""The largest object, in bytes, that is downloaded from a URL."""

_PIECE_BYTES = 64 << 20  # most images are one request

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z0-9+.-]+)*://")


def is_url(path: str | Path) -> bool:
    """Tell URLs from paths; URLs stay text, because a Path would drop one of the slashes.

    >>> is_url("s3://bucket/photo.jpg"), is_url("photos/a.jpg")
    (True, False)
    """
    return isinstance(path, str) and _URL.match(path) is not None


def image_error(path: str | Path, reason: object) -> ImageError:
    """Make the error that names an image and says in a few words why it cannot be read."""
    if isinstance(reason, FileNotFoundError):
        reason = f"No such file or directory{similar(path)}"
    elif isinstance(reason, OSError) and reason.strerror:
        reason = reason.strerror
    elif isinstance(reason, Exception):
        reason = str(reason) or type(reason).__name__
    return ImageError(f"cannot read image {os.fspath(path)!r}: {reason}")


def url_files(url: str) -> tuple[Any, str]:
    """Find the fsspec file system that a URL lies on, and its path there.

    Raises:
        ImportError: the package for this kind of URL is not installed.
        ValueError: fsspec does not know this kind of URL.
    """
    import fsspec

    return fsspec.core.url_to_fs(url)


@contextmanager
def fetching(url: str) -> Iterator[None]:
    """Turn every error of reading a URL into an ImageError that names the URL."""
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
    """Download a whole object.

    Raises:
        ImageError: it cannot be read, or has more than :data:`MAX_BYTES` bytes.
    """
    with fetching(url):
        files, place = url_files(url)
        # Some servers give no size or a wrong one, so the bytes are counted while reading, too.
        if (files.info(place).get("size") or 0) <= MAX_BYTES:
            content = io.BytesIO()
            with files.open(place, "rb", cache_type="none") as file:
                while content.tell() <= MAX_BYTES and (piece := file.read(_PIECE_BYTES)):
                    content.write(piece)
            if content.tell() <= MAX_BYTES:
                return content.getvalue()
    raise image_error(url, f"it has more than {MAX_BYTES >> 30} GB, the largest size that is downloaded")
