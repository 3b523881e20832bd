"""Find images: turn files, folders, globs, text lists and URLs into a sorted list of paths."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dvt.errors import ImageError
from dvt.files import similar
from dvt.images.members import CONTAINERS, expand_container, is_container, split_member
from dvt.images.own import is_own_picture, is_store
from dvt.images.read import regular_file
from dvt.images.urls import fetching, is_url, url_files
from dvt.text import counted

log = logging.getLogger(__name__)

SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga")
    + (".tif", ".tiff", ".webp")
)
"""Suffixes by which files in a folder or a glob count as images; a file given by its own name may have any suffix."""

_LINE_BYTES = 1 << 16  # no path is longer


def find_images(specs: Sequence[str | Path]) -> list[Path]:
    """Find the images that files, folders, globs and text lists stand for.

    Args:
        specs: each is a file (any name), a folder (searched recursively for :data:`SUFFIXES`, symlinks followed,
            names that begin with a dot left out), a glob (``**`` allowed; its matches are treated like the
            contents of a folder), a .tar archive or a video, by its name or by a glob, each of which stands for the
            images in it, FILE#CHOICE for some of them (:mod:`dvt.images.members`), or a ``.txt`` list of such entries,
            one per line. Empty lines and lines that begin with ``#`` are skipped; a relative entry is relative to the
            folder of the list. Pictures that dvt drew are left out of folders and globs, with a warning.

    Returns:
        Paths as given (not resolved), sorted as text; if several lead to one file, only the first of them.

    Raises:
        ImageError: nothing is found, an entry does not exist or is a URL, or a folder or list cannot be read.
    """
    found = find_sources(specs)
    for path in found:
        if isinstance(path, str):
            raise ImageError(
                f"{path!r} is a URL; only `dvt extract` and `dvt denoise` (in Python, find_sources) take URLs: give a "
                "local file"
            )
    return [Path(path) for path in found]


def find_sources(specs: Sequence[str | Path]) -> list[Path | str]:
    """Find images as :func:`find_images` does, also behind URLs.

    Args:
        specs: as :func:`find_images` takes them, or URLs of files, folders, globs or lists (``http://`` has no folders
            or globs). A list may hold URLs; the other entries of a list behind a URL are relative to that URL.

    Returns:
        Paths, and URLs as text, sorted as text.

    Raises:
        ImageError: as :func:`find_images`, or a URL cannot be read.
    """
    specs = [specs] if isinstance(specs, (str, Path)) else list(specs)
    found = sorted({os.fspath(path) for spec in specs for path in _expand(os.fspath(spec), lists=True)})
    if not found:
        if not specs:
            raise ImageError("no images were given; give image files, folders, globs or a .txt list of paths")
        given = ", ".join(repr(os.fspath(spec)) for spec in specs)
        raise ImageError(f"no images found in {given}{_instead(specs)}")
    unique = {path if is_url(path) else os.path.realpath(path): path for path in reversed(found)}
    return [path if is_url(path) else Path(path) for path in sorted(unique.values())]


def _instead(specs: Sequence[str | Path]) -> str:
    """Say what to give instead: of a store, the photographs that it was made of."""
    for spec in [os.fspath(each) for each in specs]:
        if is_store(spec):
            return (
                f"; {_short(spec)} is a feature store: give the photographs that it was made of, or hand it over as "
                "a store, where the command takes one (--store)"
            )
    return "; give image files, folders, globs or a .txt list of paths"


def _expand(spec: str, lists: bool) -> Iterator[str]:
    if is_url(spec):
        yield from _expand_url(spec, lists)
    elif os.path.isdir(spec):
        yield from _photographs(spec, list(_walk(spec)))
    elif os.path.lexists(spec):
        yield from _read_list(spec) if lists and spec.lower().endswith(".txt") else _inside(spec)
    elif inner := split_member(spec):
        yield from expand_container(*inner, _is_image_name)
    elif glob.has_magic(spec):
        try:
            matches = list(_matches(spec))
        except ImageError:
            raise
        except (RecursionError, ValueError, re.error) as error:  # thousands of folders deep, or a NUL byte
            raise ImageError(f"{_short(spec)} cannot be used as a pattern of paths: {error}") from error
        found = [m for match in matches for m in (_walk(match) if os.path.isdir(match) else [match])]
        images = _photographs(spec, [m for m in found if _is_image_name(m) or (m in matches and is_container(m))])
        if lists and not images:  # a pattern in a list may match nothing yet
            raise ImageError(
                f"no images found in {_short(spec)}; give image files, folders, globs or a .txt list of paths"
            )
        yield from (image for each in images for image in _inside(each))
    else:
        hint = similar(spec) or "; give image files, folders, globs or a .txt list of paths"
        raise ImageError(f"{_short(spec)} does not exist{hint}")


def _inside(path: str) -> list[str]:
    """List the images in an archive or a video; another file is an image itself."""
    return expand_container(path, "", _is_image_name) if is_container(path) else [path]


def _expand_url(url: str, lists: bool) -> Iterator[str]:
    if re.split(r"[#?]" if url.startswith("http") else "#", url)[0].lower().endswith(CONTAINERS):
        raise ImageError(
            f"{_short(url)} is an archive or a video behind a URL, and those are read from files alone: download it "
            "first (curl -O, aws s3 cp, gsutil cp), then give the file"
        )
    if lists and url.lower().endswith(".txt"):
        yield from _read_list(url)
    elif url.startswith(("http://", "https://")):  # here "?" begins a query, and folders cannot be listed
        yield url
    else:
        with fetching(url):
            files, place = url_files(url)
            if glob.has_magic(place):
                matches = files.glob(place, detail=True)
                folders = [name for name, info in matches.items() if info["type"] == "directory"]
                start = re.split(r"[*?\[]", place, maxsplit=1)[0].rpartition("/")[0]
                found = [n for n in matches if n not in folders and _is_image_name(n) and not _hidden(n, start)]
            elif files.isfile(place):
                yield url
                return
            else:
                folders, found = [place], []
            for folder in folders:
                found += [name for name in files.find(folder) if _is_image_name(name) and not _hidden(name, folder)]
        if not found and not glob.has_magic(place):
            raise ImageError(f"{url!r} holds no images, or does not exist; give an image, a folder, a glob or a list")
        yield from (files.unstrip_protocol(name) for name in found)


def _hidden(name: str, folder: str) -> bool:
    return "/." in name[len(folder.rstrip("/")) :]


def _photographs(spec: str, found: list[str]) -> list[str]:
    """Leave out the pictures that dvt drew, and say how many there were."""
    photographs = [path for path in found if not is_own_picture(path)]
    if drawn := len(found) - len(photographs):
        log.warning("left out %s in %s that dvt drew itself", counted(drawn, "picture"), _short(spec))
    return photographs


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _short(spec: str) -> str:
    return repr(spec if len(spec) < 500 else f"{spec[:500]}...")


def _matches(spec: str) -> Iterator[str]:
    """Match as glob does, but let ``**`` enter each folder once: glob never ends if two symlinks lead to a parent."""
    waiting = [re.sub(r"(?<![^/])\*\*$", "", spec) or os.curdir]  # a folder that matches is searched anyway
    known = set(waiting)
    while waiting:
        pattern = waiting.pop()
        deep = re.search(r"(?<![^/])(?:\*\*/+)+", pattern)
        if deep is None:
            yield from glob.iglob(pattern)
            continue
        head = pattern[: deep.start()] or os.curdir
        for base in filter(os.path.isdir, glob.iglob(head)):
            for here, _ in _folders(base):
                inner = os.path.join(glob.escape(here), pattern[deep.end() :])
                if inner not in known:
                    known.add(inner)
                    waiting.append(inner)


def _walk(folder: str) -> Iterator[str]:
    for here, files in _folders(folder):
        yield from (os.path.join(here, name) for name in files if _is_image_name(name) and not name.startswith("."))


def _folders(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Walk a folder and those below it, each once, with the names of their files."""

    def unreadable(error: OSError) -> None:
        raise ImageError(f"cannot read folder {error.filename!r}: {error.strerror}") from error

    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(here)
        if real in seen:  # a symlink back to a folder above, or a second way into this one
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield here, files


def _read_list(path: str) -> Iterator[str]:
    base = path.rpartition("/")[0] if is_url(path) else os.path.dirname(path)
    try:
        with regular_file(path) as file:
            for number, raw in enumerate(iter(lambda: file.readline(_LINE_BYTES), b""), 1):
                if len(raw) == _LINE_BYTES:
                    raise ImageError(f"line {number} takes more than 64 KB; a list must be text with one path per line")
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if "\0" in line:
                    raise ImageError("it holds a NUL byte; a list must be text with one path per line")
                if line and not line.startswith("#"):
                    yield from _expand(_beside(base, line), lists=False)
    except (ImageError, UnicodeDecodeError) as error:
        raise ImageError(f"in image list {path!r}: {error}") from error
    except OSError as error:
        raise ImageError(f"cannot read image list {path!r}: {error.strerror or error}") from error


def _beside(base: str, line: str) -> str:
    """Resolve an entry of a list that lies in `base`, a folder or a URL; entries cannot leave a URL."""
    if is_url(line):
        return line
    return f"{base}/{line.lstrip('/')}" if is_url(base + "/") else os.path.join(base, line)
