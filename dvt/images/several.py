"""Read several images that were given as one argument: a list, a batch or another iterable."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from dvt.errors import ImageError
from dvt.grids import Size
from dvt.images.find import find_images
from dvt.images.read import ImageLike, read_image

log = logging.getLogger(__name__)

Found = TypeVar("Found")


def several_images(given: Any) -> Iterator[Tensor] | None:
    """Read a list, batch or other iterable of images; an ImageError of reading one says which it is.

    Args:
        given: one image, as :func:`read_image` takes it; or a list or another iterable of images, an array
            (B, H, W, 3) or a tensor (B, 3, H, W).

    Returns:
        The pixels of :func:`read_image`, one image after the other; None if one image was given.

    Raises:
        ImageError: a batch is empty.
    """
    batch = isinstance(given, (Tensor, np.ndarray))
    if (batch and given.ndim != 4) or isinstance(given, (str, Path, Image.Image, Mapping, bytes)):
        return None
    if not isinstance(given, Iterable):
        return None
    several: Any = given
    what = f"the batch {tuple(several.shape)}" if batch else "the list"
    if hasattr(several, "__len__") and not len(several):
        raise ImageError(f"{what} holds no image; give one or more")
    return _told(several, what)


def image_list(given: Any) -> list[ImageLike]:
    """List the images of one argument, which is an image, a list, batch or other iterable of images, or a folder.

    Nothing is read. An empty list stays empty.

    Raises:
        ImageError: it is none of these, or the path leads to no image.
    """
    if isinstance(given, (str, Path)):
        return list(find_images([given]))
    one = isinstance(given, (Tensor, np.ndarray)) and given.ndim != 4
    if one or isinstance(given, Image.Image):
        return [given]
    if isinstance(given, (Mapping, bytes)) or not isinstance(given, Iterable):
        raise ImageError(
            f"images were given as {type(given).__name__}; give a list of paths, PIL images, NumPy arrays or tensors"
        )
    return list(given)


def _told(images: Iterable[ImageLike], what: str) -> Iterator[Tensor]:
    """Read images one by one, and say of an error which image it is."""
    for number, image in enumerate(images, 1):
        try:
            yield read_image(image)
        except ImageError as error:
            raise ImageError(f"image {number} of {what}: {error}") from error


def readable(images: Sequence[ImageLike], check: Callable[[Any], Found]) -> dict[int, Found]:
    """Check images, and leave out those that cannot be read or used, with a warning that names each.

    Args:
        images: files, URLs or pixels.
        check: called with each image; if it raises an ImageError, the image is left out.

    Returns:
        The results of `check`, by the image's index; empty if no image was given.

    Raises:
        ImageError: images were given, but none can be used.
    """
    found: dict[int, Found] = {}
    said = ""
    for number, image in enumerate(images):
        try:
            found[number] = check(image)
        except ImageError as error:
            name = repr(os.fspath(image)) if isinstance(image, (str, Path)) else f"image {number + 1}"
            said = str(error) if name in str(error) else f"{name}: {error}"
            log.warning("left out: %s", said)
    if len(images) and not found:
        raise none_usable(len(images), said)
    return found


def none_usable(count: int, said: str) -> ImageError:
    """Make the error of images of which none can be used; `said` is the last one's name and reason.

    >>> print(none_usable(1, "'a.txt' is no image"))
    the image given cannot be used: 'a.txt' is no image
    >>> print(none_usable(3, "'c.txt' is no image"))
    none of the 3 images can be used; the last one: 'c.txt' is no image
    """
    return ImageError(
        f"the image given cannot be used: {said}"
        if count == 1
        else f"none of the {count} images can be used; the last one: {said}"
    )


def usable_images(images: Sequence[ImageLike], *fits: Callable[[Size], Size]) -> list[int]:
    """List the indices of the images that can be decoded and have an accepted size.

    The others are left out as by :func:`readable`.

    Args:
        images: files, URLs or pixels.
        fits: functions called with an image's (H, W), such as :meth:`dvt.backbones.Backbone.input_size`; if one raises
            an ImageError, the image is left out.
    """

    def check(image: ImageLike) -> None:
        pixels = read_image(image)
        for fit in fits:
            fit((pixels.shape[1], pixels.shape[2]))

    return list(readable(images, check))
