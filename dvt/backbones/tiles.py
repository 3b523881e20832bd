"""Read large images in overlapping windows, whose tokens are blended into one map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from dvt import grids
from dvt.backbones.backbone import MAX_PATCHES, Backbone
from dvt.errors import ConfigError, ImageError
from dvt.grids import Size
from dvt.views import resize_part

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
            ConfigError: a window itself has more patches than a backbone takes at once.
        """
        window, (rows, columns) = backbone.image_size, backbone.grid(backbone.image_size)
        if rows * columns > MAX_PATCHES:
            raise ConfigError(
                f"a window of {window[0]} x {window[1]} pixels has {rows} x {columns} patches, more than "
                f"{MAX_PATCHES}; choose a smaller --tile, such as the size that the model was trained at"
            )
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
        """Cut the window (3, H, W) whose first patch is at a corner out of an image that is yet to be resized."""
        top, left = (place * step for place, step in zip(corner, backbone.stride, strict=True))
        size = self.input_size(backbone, (image.shape[1], image.shape[2]))
        return resize_part(image, size, (top, left), backbone.image_size)

    def blended(
        self,
        backbone: Backbone,
        image: Tensor,
        compute: Callable[[Tensor], dict[str, Tensor]],
        batch: int,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """Compute the maps of all windows and blend them.

        Args:
            backbone: gives the windows' size and patches.
            image: (3, H, W) of any size, uint8 or floats in [0, 1]; each window is resized by itself.
            compute: maps windows (B, 3, H', W') to maps (B, h', w', C) and vectors (B, P, C), by name.
            batch: windows at a time.
            dtype: of the maps; one whose values do not fit into it is float32 all the same.

        Returns:
            Maps (h, w, C) of the whole image, and the mean vectors (P, C) of the windows in float32, on the CPU.
        """
        size = self.input_size(backbone, (image.shape[1], image.shape[2]))
        grid, corners = backbone.grid(size), self.corners(backbone, size)
        blend, means = _Blend(grid, backbone.grid(backbone.image_size), dtype), dict[str, Tensor]()
        for some in _groups(corners, batch):
            found = compute(torch.stack([self.cut(backbone, image, corner) for corner in some]))
            found = {name: values.float().cpu() for name, values in found.items()}
            for number, corner in enumerate(some):
                blend.add(corner, {name: values[number] for name, values in found.items() if values.ndim == 4})
            for name, values in found.items():
                if values.ndim == 3:
                    means[name] = means.get(name, 0) + values.sum(0) / len(corners)
        return {**blend.finished(), **means}


class _Blend:
    """Blend the maps of windows that come row by row; full precision is kept of those rows only that still change."""

    def __init__(self, grid: Size, window: Size, dtype: torch.dtype):
        self.grid, self.dtype, self.weight = grid, dtype, _weights(window)
        self.top = 0  # the first row that still changes
        self.shares = torch.zeros(window[0], grid[1], 1)
        self.sums: dict[str, Tensor] = {}
        self.maps: dict[str, Tensor] = {}

    def add(self, corner: Size, maps: dict[str, Tensor]) -> None:
        """Add the maps (h', w', C) of a window."""
        row, column = corner
        self._finish(row)
        place = slice(column, column + self.weight.shape[1])
        for name, values in maps.items():
            if name not in self.maps:
                self.sums[name] = torch.zeros(*self.shares.shape[:2], values.shape[-1])
                self.maps[name] = torch.empty(*self.grid, values.shape[-1], dtype=self.dtype)
            self.sums[name][:, place] += self.weight * values
        self.shares[:, place] += self.weight

    def finished(self) -> dict[str, Tensor]:
        """Return the maps (h, w, C) after the last window, which ends with the image."""
        self._finish(self.grid[0])
        return self.maps

    def _finish(self, row: int) -> None:
        """Keep the rows above a window's first, and begin as many below."""
        count = row - self.top
        if count == 0:
            return
        for name, sums in self.sums.items():
            values = sums[:count] / self.shares[:count]
            if not values.to(self.maps[name].dtype).isfinite().all():
                self.maps[name] = self.maps[name].float()
            self.maps[name][self.top : row] = values
            self.sums[name] = _moved(sums, count)
        self.shares, self.top = _moved(self.shares, count), row


def _moved(rows: Tensor, count: int) -> Tensor:
    """Move rows up by a number of them, and fill the last with zeros."""
    return torch.cat((rows[count:], torch.zeros_like(rows[:count])))


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
