"""Read an image as RGB in [0, 1], its size from the header, and the hash of its bytes."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dvt.errors import ImageError
from dvt.images.members import member_bytes, split_member
from dvt.images.urls import fetched, image_error, is_url

log = logging.getLogger(__name__)

ImageLike = str | Path | Tensor | np.ndarray | Image.Image
"""The types in which functions take an image: a file or URL, a PIL image, or pixels (see :func:`read_image`)."""

MAX_PIXELS = 178_956_970
"""The largest image that is decoded, in pixels (Pillow's own limit). Loading an image at the limit takes 4 to 6 GB."""

# Tolerance beyond [0, 1], for values computed in half precision.
_ROUNDING = 1e-3

# A fixed list, because Pillow would otherwise start Ghostscript for PostScript files.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "TGA")

_ORIENTATION_TAG, _TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_SAMPLES = 0x0112, 256, 257, 277

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_size(path: str | Path) -> tuple[int, int]:
    """Read an image's size (H, W) in pixels as displayed (EXIF orientation applied) from the header alone.

    Raises:
        ImageError: the file is missing, unreadable, not an image, or larger than :data:`MAX_PIXELS`.
    """
    with _opened(path) as (image, file):
        return _displayed_size(image, file, path)


def size_and_sha256(path: str | Path) -> tuple[tuple[int, int], str]:
    """Read :func:`image_size` and :func:`file_sha256` from the same bytes, opened or downloaded once."""
    with _opened(path) as (image, file):
        return _displayed_size(image, file, path), _sha256(file, path)


def load_image(path: str | Path, sha256: str | None = None) -> Tensor:
    """Load one image as (3, H, W) float32 RGB in [0, 1], turned according to its EXIF orientation.

    Grey becomes three equal channels. 16-bit grey is divided by 65535, never clipped; colours of 16 bits per channel
    are read as 8. The values of a float TIFF must lie in [0, 1]. Transparent pixels are composited over white. CMYK is
    converted without its colour profile. If a file has several frames or pages, the first is read, with a warning that
    names the file; a TIFF of more than four bands is refused.

    Args:
        path: path or URL of the file.
        sha256: the expected hash of its bytes, if known.

    Raises:
        ImageError: the file is missing, unreadable, empty, truncated, corrupt, not an image, of an unsupported kind,
            larger than :data:`MAX_PIXELS` (refused by its header, before anything is decoded), or has another hash.
    """
    return _floating(load_pixels(path, sha256))


def load_pixels(path: str | Path, sha256: str | None = None) -> Tensor:
    """Load an image as :func:`load_image` does, but uint8, a quarter, if its colours are opaque and have 8 bits."""
    with _opened(path) as (image, file):
        if sha256 is not None and _sha256(file, path) != sha256:
            raise ImageError("its bytes changed since it was listed; run the same command again")
        if _has_more(image):
            _warn_of_more(str(path))
        image.load()
        # The orientation is read after load(), which turns a TIFF and removes its tag.
        method = _TRANSPOSE.get(_orientation(image, file, path))
        transparent = image.info.get("transparency")
        upright = image.transpose(method) if method is not None else image
        return _rgb(upright, transparent)


def load_stored(path: str | Path) -> Image.Image:
    """Load an image's values as they are stored (indices, 16 bits, floats), turned as :func:`load_image` does.

    Raises:
        ImageError: as :func:`load_image`.
    """
    with _opened(path) as (image, file):
        image.load()
        method = _TRANSPOSE.get(_orientation(image, file, path))
        form = image.format
        upright = image.transpose(method) if method is not None else image
        upright.format = form
        return upright


def read_image(image: ImageLike) -> Tensor:
    """Read an image of any accepted type as (3, H, W) RGB in [0, 1]; a float tensor is returned unchanged.

    Args:
        image: a file or URL, a PIL image (turned by its EXIF orientation), a NumPy array (H, W, 3) or a tensor
            (3, H, W); pixels are uint8 in 0 to 255, or floats in [0, 1].

    Raises:
        ImageError: the image cannot be read, or its pixels have another shape, type or range.
    """
    if isinstance(image, (str, Path)):
        return load_image(image)
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
        return _floating(_rgb(upright, upright.info.get("transparency")))
    if not isinstance(image, (Tensor, np.ndarray)):
        raise ImageError(f"an image was given as {type(image).__name__}; give a path, PIL image, NumPy array or tensor")
    last = isinstance(image, np.ndarray)
    _check_shape(tuple(image.shape), last)
    # Copy, because torch does not take arrays that are read-only or have negative strides.
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy()) if isinstance(image, np.ndarray) else image
    if pixels.dtype == torch.uint8:
        return _floating(pixels)
    if not pixels.is_floating_point():
        raise ImageError(f"pixels of type {image.dtype} were given; give uint8 in 0 to 255, or floats in [0, 1]")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise ImageError(
            f"pixels of type {image.dtype} from {low:.4g} to {high:.4g} were given; floats must lie in [0, 1]: divide "
            "values of 0 to 255 by 255, undo a normalisation, clip values that a resize left outside"
        )
    return pixels.to(torch.float32) if last else pixels


def _check_shape(shape: tuple[int, ...], last: bool) -> None:
    """Refuse pixels that are not (H, W, 3) with channels last, or (3, H, W) with channels first."""
    kind, wanted = ("array", "(H, W, 3)") if last else ("tensor", "(3, H, W)")
    if len(shape) == 3 and shape[2 if last else 0] == 3 and min(shape) > 0:
        return
    todo = f"give a {wanted} {kind}"
    if len(shape) == 4:
        todo = "give one image at a time; dvt.denoise takes batches"
    elif len(shape) == 3 and shape[0 if last else 2] == 3:
        todo = f"move its channels: image.{'transpose(1, 2, 0)' if last else 'permute(2, 0, 1)'}"
    raise ImageError(f"one image as {kind} must be {wanted} RGB, but has shape {shape}: {todo}")


def file_sha256(path: str | Path) -> str:
    """Compute the hexadecimal SHA-256 of a file's bytes, read in pieces.

    Raises:
        ImageError: the file is missing or cannot be read.
    """
    with regular_file(path) as file:
        return _sha256(file, path)


def _displayed_size(image: Image.Image, file: BinaryIO, path: str | Path) -> tuple[int, int]:
    width, height = image.size
    if image.format == "TIFF":  # only some versions of Pillow have already turned .size
        tags: Any = image
        width, height = tags.tag_v2[_TIFF_WIDTH], tags.tag_v2[_TIFF_HEIGHT]
    turned = _orientation(image, file, path) >= 5
    return (width, height) if turned else (height, width)


def _sha256(file: BinaryIO, path: str | Path) -> str:
    """Hash the whole file, and restore its position."""
    digest, position = hashlib.sha256(), file.tell()
    try:
        file.seek(0)
        while piece := file.read(1 << 20):
            digest.update(piece)
        file.seek(position)
    except OSError as error:
        raise image_error(path, error) from error
    return digest.hexdigest()


@contextmanager
def regular_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for reading, after refusing devices and pipes, which could block or never end."""
    if is_url(path):
        with io.BytesIO(fetched(str(path))) as content:
            yield content
        return
    if inner := split_member(path):
        with io.BytesIO(member_bytes(*inner)) as content:
            yield content
        return
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise image_error(path, "it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")
        file = open(path, "rb")  # noqa: SIM115  closed below; only errors of opening are to become ImageErrors
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise image_error(path, error) from error
    with file:
        yield file


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """Open an image, read its header and check its size; turn any error of a decoder into an ImageError."""
    with regular_file(path) as file:
        try:
            if not file.read(1):
                raise ImageError("the file is empty")
            file.seek(0)
            # By file and not by name, for which Pillow may map the file: if it is truncated then, the process dies.
            with _header(file) as image:
                _check_size(image)
                _check_bands(image)
                yield image, file
        except ImageError as error:
            raise image_error(path, error) from error
        except Image.UnidentifiedImageError as error:
            raise image_error(path, f"it is not an image of a known format ({', '.join(_formats())})") from error
        except Image.DecompressionBombError as error:
            raise image_error(
                path, f"it has more than {MAX_PIXELS} pixels, the largest size that is decoded"
            ) from error
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise image_error(path, error) from error


def _header(file: BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns at half of its limit; _check_size applies our limit.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=_formats())


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"it has no pixels ({height} x {width})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"it has {height} x {width} pixels; at most {MAX_PIXELS} are decoded")


def _check_bands(image: Image.Image) -> None:
    tags: Any = getattr(image, "tag_v2", {})
    bands = tags.get(_TIFF_SAMPLES, 1)
    if isinstance(bands, int) and bands > 4:  # Pillow would read the first band as a grey image
        raise ImageError(f"it has {bands} bands; write three of them, as red, green and blue, to another file")


def _has_more(image: Image.Image) -> bool:
    """Tell if there are more frames or pages than one; in a camera's MPO they are previews, and do not count."""
    try:
        return image.format in ("GIF", "PNG", "TIFF", "WEBP") and bool(getattr(image, "is_animated", False))
    except Exception:  # damage after the first page is no reason to refuse the first page
        return False


@functools.lru_cache(maxsize=4096)
def _warn_of_more(path: str) -> None:
    log.warning("%s has several frames or pages; the first is read. Split it into files to use the others", path)


def _orientation(image: Image.Image, file: BinaryIO, path: str | Path) -> int:
    """Read the EXIF orientation, 1 to 8; 1 if there is none or, with a warning, if it is damaged, as viewers do."""
    try:
        # PngImageFile.getexif would decode all pixels to find EXIF data after them.
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
    """Find the eXIf chunk of a PNG at any place; the standard allows it after the pixels."""
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
    """Convert integers in 0..65535, or floats in [0, 1], to (H, W) float32 in [0, 1]."""
    top = 1.0 if mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= top):  # also true for NaN
        raise ImageError(f"its values of kind {mode} lie in [{low:g}, {high:g}]; they must lie in [0, {top:g}]")
    grey = torch.from_numpy(values.astype(np.float32)).div_(top)
    if mode.startswith("I") and isinstance(transparent, int):
        grey[torch.from_numpy(values == transparent)] = 1.0
    return grey


def _rgb(image: Image.Image, transparent: object) -> Tensor:
    """Convert an image to (3, H, W): uint8, or float32 where it has more bits or is composited over white."""
    if image.mode.startswith(("I", "F")):
        return _grey(np.asarray(image), image.mode, transparent).expand(3, -1, -1).contiguous()
    mode = "RGBA" if image.has_transparency_data else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    pixels = np.empty((image.height, image.width, len(mode)), np.uint8)
    for top in range(0, image.height, 256):  # at once, Pillow would make several copies
        part = pixels[top : top + 256]
        part[:] = np.asarray(image.crop((0, top, image.width, top + len(part))))
    rgb = torch.from_numpy(pixels).movedim(-1, 0)
    if len(rgb) == 3:
        return rgb
    alpha = rgb[3].float().div_(255)
    return _floating(rgb[:3]).mul_(alpha).add_(1 - alpha)


def _floating(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels (3, H, W) to float32 in [0, 1]; floats are returned unchanged."""
    if pixels.dtype != torch.uint8:
        return pixels
    return torch.empty(pixels.shape, device=pixels.device).copy_(pixels).div_(255)
