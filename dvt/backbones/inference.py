"""Running a backbone: memories that are too small, and inputs that would take too much of them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from dvt.backbones.backbone import Backbone
from dvt.devices import out_of_memory
from dvt.errors import ConfigError, ImageError
from dvt.grids import Size

log = logging.getLogger(__name__)

# More patches than this take gigabytes of attention; only a very long or thin image has them.
MAX_PATCHES = 16_384


def in_halves(compute: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
    """Run `compute` on a batch; on out-of-memory, on its two halves.

    Args:
        compute: images (B, 3, H, W) to maps (B, ...) by name.
        images: (B, 3, H, W).

    Raises:
        ConfigError: not even half of the batch fits.
    """
    try:
        return compute(images)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        log.warning("out of memory with %d images at a time; trying half as many", len(images))
    # Not in the handler, whose traceback still holds the tensors of the first try.
    half = -(-len(images) // 2)
    try:
        halves = [compute(part) for part in images.split(half)]
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ConfigError(
            f"the memory is too small for {half} images of {images.shape[2]} x {images.shape[3]} pixels at a time; "
            "lower the batch or the size of the images"
        ) from error
    return {name: torch.cat([part[name] for part in halves]) for name in halves[0]}


def checked_input_size(backbone: Backbone, image_size: Size) -> Size:
    """Choose the (H, W) to resize an image to, as :meth:`Backbone.input_size` does.

    Raises:
        ImageError: attention over that many patches would take gigabytes.
    """
    size = backbone.input_size(image_size)
    height, width = backbone.grid(size)
    if height * width > MAX_PATCHES:
        raise ImageError(
            f"an image of {image_size[0]} x {image_size[1]} pixels would take {height} x {width} patches, more than "
            f"{MAX_PATCHES}; crop it to a less extreme aspect ratio, or choose a smaller size"
        )
    return size
