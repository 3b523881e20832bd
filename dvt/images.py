"""Images on disk or behind URLs: finding them, measuring them from the header, and reading them as RGB in [0, 1].

URLs are whatever fsspec knows (``s3://bucket/key``, ``gs://``, ``https://``, ...); each is read whole, once a call.

Whatever is wrong with a file ends in an :class:`~dvt.errors.ImageError` that names the file and the reason; nothing
is replaced, padded or skipped silently.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import logging
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dvt.errors import ImageError

log = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970
"""The largest image that is decoded, in pixels (Pillow's own limit). One at the limit takes 4 to 6 GB to load."""

MAX_BYTES = 2 << 30
"""The largest object that is fetched from a URL."""

SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga")
    + (".tif", ".tiff", ".webp")
)
"""File names that count as images inside a folder or a glob; a file given by name may have any other."""

# A closed list: Pillow would otherwise also start Ghostscript for PostScript files.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "TGA")
_PIECE_BYTES = 64 << 20  # most images are one request
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z0-9+.-]+)*://")
_LINE_BYTES = 1 << 16  # no path is longer
_ORIENTATION_TAG, _TIFF_WIDTH, _TIFF_HEIGHT = 0x0112, 256, 257
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_url(path: str | Path) -> bool:
    """Whether it is a URL; those stay text, because a Path would drop one of the slashes.

    >>> is_url("s3://bucket/photo.jpg"), is_url("photos/a.jpg")
    (True, False)
    """
    return isinstance(path, str) and _URL.match(path) is not None


def find_images(specs: Sequence[str | Path]) -> list[Path]:
    """The images that files, folders, globs and text lists stand for.

    Args:
        specs: each is a file (any name), a folder (searched recursively for :data:`SUFFIXES`, symlinks followed,
            names that begin with a dot left out), a glob (``**`` allowed; its matches are treated like the
            contents of a folder), or a ``.txt`` list of such entries, one a line, where an empty line or one that
            begins with ``#`` means nothing and a relative entry is relative to the folder of the list.

    Returns:
        Paths as given (not resolved), sorted as text; of several paths to one file only the first stays.

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
    """:func:`find_images` that takes URLs too.

    Args:
        specs: as :func:`find_images` takes them, or URLs of files, folders, globs or lists (of ``http://`` no folders
            or globs). A list may hold URLs; in a list behind a URL all other entries are relative to it.

    Returns:
        Paths, and URLs as text, sorted as text.

    Raises:
        ImageError: as :func:`find_images`, or a URL cannot be read.
    """
    specs = [specs] if isinstance(specs, (str, Path)) else list(specs)
    found = sorted({os.fspath(path) for spec in specs for path in _expand(os.fspath(spec), lists=True)})
    if not found:
        given = ", ".join(repr(os.fspath(spec)) for spec in specs) or "an empty list"
        raise ImageError(f"no images found in {given}; give image files, folders, globs or a .txt list of paths")
    unique = {path if is_url(path) else os.path.realpath(path): path for path in reversed(found)}
    return [path if is_url(path) else Path(path) for path in sorted(unique.values())]


def image_size(path: str | Path) -> tuple[int, int]:
    """(H, W) in pixels as displayed (EXIF orientation applied), from the header, without decoding pixels.

    Raises:
        ImageError: the file is missing, unreadable, not an image, or larger than :data:`MAX_PIXELS`.
    """
    with _opened(path) as (image, file):
        return _displayed_size(image, file, path)


def size_and_sha256(path: str | Path) -> tuple[tuple[int, int], str]:
    """:func:`image_size` and :func:`file_sha256` from the same bytes, which are fetched once."""
    with _opened(path) as (image, file):
        return _displayed_size(image, file, path), _sha256(file, path)


def load_image(path: str | Path, sha256: str | None = None) -> Tensor:
    """One image as (3, H, W) float32 RGB in [0, 1], turned as its EXIF orientation says.

    Grey becomes three equal channels. Sixteen-bit grey is divided by 65535, never clipped; 16 bits a channel of colour
    are read as 8. A float TIFF must already lie in [0, 1]. Transparent pixels are composited over white. CMYK is
    converted without its colour profile. Of an animation or a multi-page file the first frame is read.

    Args:
        path: of the file.
        sha256: of its bytes, where they are known already.

    Raises:
        ImageError: the file is missing, unreadable, empty, truncated, corrupt, not an image, of an unsupported kind,
            larger than :data:`MAX_PIXELS` (refused from the header, before anything is decoded), or has other bytes.
    """
    with _opened(path) as (image, file):
        if sha256 is not None and _sha256(file, path) != sha256:
            raise ImageError("its bytes changed since it was listed; run the same command again")
        image.load()
        # Read after load(): a TIFF has been turned by then, and its tag is gone.
        method = _TRANSPOSE.get(_orientation(image, file, path))
        transparent = image.info.get("transparency")
        upright = image.transpose(method) if method is not None else image
        if upright.mode.startswith(("I", "F")):
            return _grey(np.asarray(upright), upright.mode, transparent).expand(3, -1, -1).contiguous()
        return _colour(upright)


def file_sha256(path: str | Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes, read in pieces.

    Raises:
        ImageError: the file is missing or cannot be read.
    """
    with _regular_file(path) as file:
        return _sha256(file, path)


def _displayed_size(image: Image.Image, file: BinaryIO, path: str | Path) -> tuple[int, int]:
    width, height = image.size
    if image.format == "TIFF":  # some versions of Pillow have already turned .size, some have not
        tags: Any = image
        width, height = tags.tag_v2[_TIFF_WIDTH], tags.tag_v2[_TIFF_HEIGHT]
    turned = _orientation(image, file, path) >= 5
    return (width, height) if turned else (height, width)


def _sha256(file: BinaryIO, path: str | Path) -> str:
    """The hash of the whole file, which is left where it stood."""
    digest, position = hashlib.sha256(), file.tell()
    try:
        file.seek(0)
        while piece := file.read(1 << 20):
            digest.update(piece)
        file.seek(position)
    except OSError as error:
        raise _error(path, error) from error
    return digest.hexdigest()


def _error(path: str | Path, reason: object) -> ImageError:
    if isinstance(reason, OSError) and reason.strerror:
        reason = reason.strerror
    elif isinstance(reason, Exception):
        reason = str(reason) or type(reason).__name__
    return ImageError(f"cannot read image {os.fspath(path)!r}: {reason}")


# -- finding ----------------------------------------------------------------------------------------------------------


def _expand(spec: str, lists: bool) -> Iterator[str]:
    if is_url(spec):
        yield from _expand_url(spec, lists)
    elif os.path.isdir(spec):
        yield from _walk(spec)
    elif os.path.lexists(spec):
        yield from _read_list(spec) if lists and spec.lower().endswith(".txt") else [spec]
    elif glob.has_magic(spec):
        try:
            matches = list(_matches(spec))
        except ImageError:
            raise
        except (RecursionError, ValueError, re.error) as error:  # thousands of folders deep, or a NUL byte
            raise ImageError(f"{_short(spec)} cannot be used as a pattern of paths: {error}") from error
        found = [m for match in matches for m in (_walk(match) if os.path.isdir(match) else [match])]
        images = [match for match in found if _is_image_name(match)]
        if lists and not images:  # in a list, a pattern may stand for what is still to come
            raise ImageError(
                f"no images found in {_short(spec)}; give image files, folders, globs or a .txt list of paths"
            )
        yield from images
    else:
        raise ImageError(f"{_short(spec)} does not exist; give image files, folders, globs or a .txt list of paths")


def _expand_url(url: str, lists: bool) -> Iterator[str]:
    if lists and url.lower().endswith(".txt"):
        yield from _read_list(url)
    elif url.startswith(("http://", "https://")):  # "?" is no wildcard in these, and nothing lists a folder
        yield url
    else:
        with _fetching(url):
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


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _short(spec: str) -> str:
    return repr(spec if len(spec) < 500 else f"{spec[:500]}...")


def _matches(spec: str) -> Iterator[str]:
    """glob's matches, but ``**`` enters each folder once: with two symlinks to a folder above, glob never ends."""
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
    """A folder and those below it, each once, and the names of their files."""

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
        with _regular_file(path) as file:
            for number, raw in enumerate(iter(lambda: file.readline(_LINE_BYTES), b""), 1):
                if len(raw) == _LINE_BYTES:
                    raise ImageError(f"line {number} takes more than 64 KB; a list is text, one path a line")
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if "\0" in line:
                    raise ImageError("it holds a NUL byte; a list is text, one path a line")
                if line and not line.startswith("#"):
                    yield from _expand(_beside(base, line), lists=False)
    except (ImageError, UnicodeDecodeError) as error:
        raise ImageError(f"in image list {path!r}: {error}") from error


def _beside(base: str, line: str) -> str:
    """An entry of a list in the folder `base`; one of a list behind a URL stays behind it."""
    if is_url(line):
        return line
    return f"{base}/{line.lstrip('/')}" if is_url(base + "/") else os.path.join(base, line)


# -- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def _regular_file(path: str | Path) -> Iterator[BinaryIO]:
    """The open file; devices and pipes, which could block or never end, are refused before they are opened."""
    if is_url(path):
        with io.BytesIO(_fetched(str(path))) as content:
            yield content
        return
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise _error(path, "it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")
        file = open(path, "rb")  # noqa: SIM115  closed below; only the opening may be called an unreadable file
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise _error(path, error) from error
    with file:
        yield file


def url_files(url: str) -> tuple[Any, str]:
    """The fsspec file system that a URL lies on, and its path there.

    Raises:
        ImportError, ValueError: a package is missing, or nothing is known by that name.
    """
    import fsspec

    return fsspec.core.url_to_fs(url)


@contextmanager
def _fetching(url: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except ImportError as error:
        raise _error(
            url,
            f"a package is missing ({error}); https:// needs `pip install aiohttp requests`, s3:// s3fs, gs:// gcsfs",
        ) from error
    except Exception as error:  # each file system has its own errors
        raise _error(url, error) from error


def _fetched(url: str) -> bytes:
    """The whole object, if it is of a bounded size."""
    with _fetching(url):
        files, place = url_files(url)
        # Some servers do not tell the size, and some lie: what is read is bounded too.
        if (files.info(place).get("size") or 0) <= MAX_BYTES:
            content = io.BytesIO()
            with files.open(place, "rb", cache_type="none") as file:
                while content.tell() <= MAX_BYTES and (piece := file.read(_PIECE_BYTES)):
                    content.write(piece)
            if content.tell() <= MAX_BYTES:
                return content.getvalue()
    raise _error(url, f"it has more than {MAX_BYTES >> 30} GB, the most that is fetched")


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """The image with its header read and its size checked, and its file; whatever a decoder raises is an ImageError."""
    with _regular_file(path) as file:
        if not file.read(1):
            raise _error(path, "the file is empty")
        file.seek(0)
        try:
            # Not by name: Pillow may then map the file, and one that is cut short meanwhile kills the process.
            with _header(file) as image:
                _check_size(image)
                yield image, file
        except ImageError as error:
            raise _error(path, error) from error
        except Image.UnidentifiedImageError as error:
            raise _error(path, f"it is not an image of a known format ({', '.join(_formats())})") from error
        except Image.DecompressionBombError as error:
            raise _error(path, f"it has more than {MAX_PIXELS} pixels, the most that is decoded") from error
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise _error(path, error) from error


def _header(file: BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns from half of its limit on; _check_size decides instead.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=_formats())


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"it has no pixels ({height} x {width})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"it has {height} x {width} pixels; at most {MAX_PIXELS} are decoded")


def _orientation(image: Image.Image, file: BinaryIO, path: str | Path) -> int:
    """The EXIF orientation, 1 to 8; 1 when there is none or when it is damaged, as viewers do, with a log line."""
    try:
        # Not PngImageFile.getexif, which decodes all pixels to look behind them.
        exif = Image.Image.getexif(image)
        if image.format == "PNG" and _ORIENTATION_TAG not in exif and (late := _late_png_exif(file)):
            exif = Image.Exif()
            exif.load(b"Exif\0\0" + late)
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception as error:  # Pillow's EXIF parser raises nearly anything on damaged bytes
        log.warning("%r: its EXIF block is damaged (%s); read as it is stored, not turned", os.fspath(path), error)
        return 1
    return value if value in _TRANSPOSE else 1


def _late_png_exif(file: BinaryIO) -> bytes | None:
    """The eXIf chunk of a PNG wherever it stands; the standard allows it behind the pixels."""
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"eXIf":
                return file.read(min(length, 1 << 16))
            file.seek(length + 4, os.SEEK_CUR)
        return None
    finally:
        file.seek(position)


def _grey(values: np.ndarray, mode: str, transparent: object) -> Tensor:
    """(H, W) float32 in [0, 1] from integers in 0..65535, or from floats in [0, 1]."""
    top = 1.0 if mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= top):  # also true for NaN
        raise ImageError(f"its values of kind {mode} lie in [{low:g}, {high:g}]; they must lie in [0, {top:g}]")
    grey = torch.from_numpy(values.astype(np.float32)).div_(top)
    if mode.startswith("I") and isinstance(transparent, int):
        grey[torch.from_numpy(values == transparent)] = 1.0
    return grey


def _colour(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1] from any 8-bit image, transparency composited over white."""
    pixels = np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    rgb = torch.from_numpy(pixels).movedim(-1, 0)
    out = torch.empty(3, *pixels.shape[:2]).copy_(rgb[:3]).div_(255)
    if len(rgb) == 4:
        alpha = rgb[3].float().div_(255)
        out.mul_(alpha).add_(1 - alpha)
    return out
