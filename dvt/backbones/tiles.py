"""Read large images in overlapping windows, whose tokens are blended into one map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from dvt import grids
from dvt.backbones.backbone import Backbone
from dvt.errors import ConfigError, ImageError
from dvt.grids import Size

MOST_PATCHES = 1 << 18
"""The largest number of patches of an image that is read in windows: 8192 x 8192 pixels at a patch of 16."""


@dataclass(frozen=True)
class Tiling:
    """Cut an image into windows of a backbone's own input size (:attr:`~dvt.backbones.Backbone.image_size`).

    Windows begin at whole patches, so the patches of all windows coincide. A patch's token is the weighted mean over
    the windows that show it; the weight falls to almost zero at a window's border (sin^2 along both sides), so no
    window ends in a step. Memory beside image and result is that of one batch of windows.

    Args:
        size: shorter side in pixels to which an image is resized before it is cut; None keeps its own. An image is
            never smaller than a window.
        overlap: share of a window's side that the next window shows, too, at least; in [0, 0.9].

    Raises:
        ConfigError: a value is out of its range.
    """

    size: int | None = None
    overlap: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 0.9:
            raise ConfigError(f"overlap is {self.overlap}; it must lie in [0, 0.9]")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"size is {self.size}; it must be 1 or more")

    def input_size(self, backbone: Backbone, image_size: Size) -> Size:
        """Find the size (H, W) in whole patches to which an image is resized.

        Raises:
            ImageError: it would have more than :data:`MOST_PATCHES` patches.
        """
        shorter = max(self.size or min(image_size), *backbone.image_size)
        size = grids.fit_size(image_size, shorter, backbone.patch_size)
        height, width = backbone.grid(size)
        if height * width > MOST_PATCHES:
            raise ImageError(
                f"an image of {image_size[0]} x {image_size[1]} pixels would take {height} x {width} patches, more "
                f"than {MOST_PATCHES}; choose a smaller --size, or crop it"
            )
        return size

    def corners(self, backbone: Backbone, size: Size) -> list[Size]:
        """List the (row, column) of each window's first patch; the last windows end with the image."""
        window = backbone.grid(backbone.image_size)
        rows, columns = (_starts(n, side, self.overlap) for n, side in zip(backbone.grid(size), window, strict=True))
        return list(product(rows, columns))

    def cut(self, backbone: Backbone, image: Tensor, corner: Size) -> Tensor:
        """Cut the window (3, H, W) out of an image whose first patch is at a corner."""
        top, left = (place * step for place, step in zip(corner, backbone.stride, strict=True))
        height, width = backbone.image_size
        return image[:, top : top + height, left : left + width]

    def blended(
        self,
        backbone: Backbone,
        image: Tensor,
        compute: Callable[[Tensor], dict[str, Tensor]],
        batch: int,
    ) -> dict[str, Tensor]:
        """Compute the maps of all windows and blend them.

        Args:
            backbone: gives the windows' size and patches.
            image: (3, H, W) of :meth:`input_size`.
            compute: maps windows (B, 3, H', W') to maps (B, h', w', C) and vectors (B, P, C), by name.
            batch: windows at a time.

        Returns:
            Maps (h, w, C) of the whole image, and the mean vectors (P, C) of the windows, in float32.
        """
        size = (image.shape[1], image.shape[2])
        grid, window = backbone.grid(size), backbone.grid(backbone.image_size)
        weight, corners = _weights(window), self.corners(backbone, size)
        total: dict[str, Tensor] = {}
        share = torch.zeros(*grid, 1)
        for some in _groups(corners, batch):
            found = compute(torch.stack([self.cut(backbone, image, corner) for corner in some]))
            for name, values in found.items():
                if name not in total:
                    shape = grid if values.ndim == 4 else (values.shape[1],)
                    total[name] = torch.zeros(*shape, values.shape[-1])
                for (row, column), each in zip(some, values.float().cpu(), strict=True):
                    if values.ndim == 4:
                        total[name][row : row + window[0], column : column + window[1]] += weight * each
                    else:
                        total[name] += each / len(corners)
            for row, column in some:
                share[row : row + window[0], column : column + window[1]] += weight
        return {name: values / share if values.ndim == 3 else values for name, values in total.items()}


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """List the starts of windows that spread evenly over a length, as few as overlap at least by a share of a side.

    >>> _starts(10, 4, 0.5), _starts(4, 4, 0.5), _starts(9, 4, 0)
    ([0, 2, 4, 6], [0], [0, 2, 5])
    """
    step = max(1, math.floor(side * (1 - overlap)))
    gaps = math.ceil((length - side) / step)
    return [i * (length - side) // gaps for i in range(gaps + 1)] if gaps else [0]


def _weights(window: Size) -> Tensor:
    """Compute the weight (h, w, 1) of each patch of a window."""
    down, across = (torch.sin(torch.pi * grids.grid_centres((n, 1))[:, 0, 1]).square() for n in window)
    return (down[:, None] * across)[..., None]


def _groups(corners: list[Size], batch: int) -> Iterator[list[Size]]:
    for start in range(0, len(corners), batch):
        yield corners[start : start + batch]
