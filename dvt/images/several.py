"""Read several images that were given as one argument: a list, a batch or another iterable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dvt.errors import ImageError
from dvt.images.find import find_images
from dvt.images.read import ImageLike, read_image


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
