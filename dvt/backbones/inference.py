"""Run a backbone on a batch that may be too large for the memory."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from dvt.devices import out_of_memory
from dvt.errors import ConfigError

log = logging.getLogger(__name__)


def in_halves(compute: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
    """Run `compute` on a batch; on out-of-memory, on its two halves.

    Args:
        compute: maps images (B, 3, H, W) to maps (B, ...) by name.
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
    # Outside of the handler: inside, the exception's traceback would keep the tensors of the first try in memory.
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
