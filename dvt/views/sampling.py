"""Cut the views of one image: random crops and flips, or shifted windows, with the coordinates of every patch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dvt import grids
from dvt.devices import upload
from dvt.errors import ShapeError
from dvt.grids import Size
from dvt.views.config import ViewConfig

_PART_ROWS = 32  # rows of a part of a resized image that are computed together


def draw_boxes(config: ViewConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw random boxes in [0, 1]^2 and flips.

    Area is uniform in config.scale and log(aspect) uniform in config.ratio, both relative to the image. Draws are
    made on the CPU, so that every device sees the same views.

    Returns:
        boxes (1 + count, 4) as (x0, y0, x1, y1) and flips (1 + count,) bool; the first is the whole image, unflipped.
    """
    area, aspect, x, y, flip = torch.rand(5, config.count, generator=generator, dtype=torch.float64)
    area = config.scale[0] + area * (config.scale[1] - config.scale[0])
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    aspect = (low + aspect * (high - low)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = x * (1 - width), y * (1 - height)
    boxes = torch.stack((x, y, x + width, y + height), dim=-1)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    return torch.cat((whole, boxes)), torch.cat((torch.tensor([False]), flip < config.flip))


def resize(image: Tensor, size: Size) -> Tensor:
    """Resize an image (..., 3, H, W) to (H', W'), bicubic, antialiased, clamped to [0, 1]."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    batched = image if image.ndim == 4 else image[None]
    out = nnf.interpolate(batched, size=tuple(size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    return out if image.ndim == 4 else out[0]


def resize_part(image: Tensor, size: Size, corner: Size, part: Size) -> Tensor:
    """Compute a part of :func:`resize` without the rest, to rounding: (3, *part) floats, for images that are large.

    Args:
        image: (3, H, W), uint8 or floats in [0, 1], on the CPU.
        size: (H', W') to which the whole image would be resized.
        corner: (row, column) of the part's first pixel in the resized image.
        part: (height, width) of the part.
    """
    sides = zip(image.shape[1:], size, corner, part, strict=True)
    (top, down), (left, across) = (_cubic(length, new, first, count) for length, new, first, count in sides)
    found = []
    for some in down.split(_PART_ROWS):  # an image that shrinks has many pixels for a part
        used = some.any(0).nonzero().flatten()
        first, last = int(used[0]), int(used[-1]) + 1
        pixels = image[:, top + first : top + last, left : left + across.shape[1]]
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        found.append(some[:, first:last] @ (pixels @ across.T))
    return torch.cat(found, 1).clamp(0, 1)


def _cubic(length: int, new: int, start: int, count: int) -> tuple[int, Tensor]:
    """Compute the weights (count, n) of pixels in an antialiased bicubic resize of a side, and the first pixel's place.

    They are those of torch.nn.functional.interpolate (Keys' cubic, a = -0.5).
    """
    scale = length / new
    wide = max(scale, 1.0)
    centres = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * scale
    first = max(0, math.floor(float(centres[0]) - 2 * wide))
    last = min(length, math.ceil(float(centres[-1]) + 2 * wide))
    x = (torch.arange(first, last, dtype=torch.float64) + 0.5 - centres[:, None]).abs() / wide
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return first, (weights / weights.sum(1, keepdim=True)).float()


def cut(image: Tensor, pixels: Tensor, flips: Tensor, size: Size) -> Tensor:
    """Cut whole-pixel boxes (V, 4) out of an image (3, H, W), resize, then mirror them: views (V, 3, H', W')."""
    if image.ndim != 3:
        raise ShapeError(f"an image has shape (3, H, W), got {tuple(image.shape)}")
    # Boxes and flips lie on the CPU, so that nothing here waits for a GPU.
    views = (resize(image[:, y0:y1, x0:x1], size) for x0, y0, x1, y1 in pixels.tolist())
    return torch.stack([view.flip(-1) if flip else view for view, flip in zip(views, flips.tolist(), strict=True)])


def cut_window(image: Tensor, corner: tuple[int, int]) -> Tensor:
    """Cut a window of an image's own size (3, H, W) with its top left pixel (row, column) anywhere, also outside.

    Beyond its borders the image is mirrored.
    """
    # The indices are made where the image is: from the host, each of them would wait for a GPU's queue.
    sides = zip(corner, image.shape[1:], strict=True)
    rows, columns = (grids.mirrored(torch.arange(a, a + n, device=image.device), n) for a, n in sides)
    return image[:, rows][:, :, columns]


class Shifts:
    """Yield windows of one image at its own scale, as batches of (images (V, 3, H', W'), coords (V, h, w, 2)).

    The first is the whole image; the others are shifted by whole steps of the patch grid over the mirrored image, and
    their coordinates leave [0, 1]. Iterating again yields the same windows.

    Args:
        image: (3, H, W) in [0, 1], on the device where windows are to be cut.
        size: (H', W') of a window: the model input, to which the image is resized.
        centres: (h, w, 2) patch centres of the image, at least 2 x 2.
        config: only `count`, `reach`, `seed` and `batch` are used.

    Attributes:
        offsets: (1 + count, 2) in steps, down and to the right.
    """

    def __init__(self, image: Tensor, size: Size, centres: Tensor, config: ViewConfig):
        self.config, self.centres = config, centres
        self.image = resize(image, size)
        grid = (centres.shape[0], centres.shape[1])
        generator = torch.Generator().manual_seed(config.seed)
        self.offsets = grids.draw_offsets(grid, config.count, config.reach, generator)
        _, period = grids.lattice(centres[None])
        self.step = (2 / period[0], 2 / period[1])
        self._pixels = self.offsets * torch.tensor([round(a * b) for a, b in zip(self.step, size, strict=True)])

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = (each.split(self.config.batch) for each in (self.offsets, self._pixels))
        for offsets, pixels in zip(*batches, strict=True):
            windows = torch.stack([cut_window(self.image, (row, column)) for row, column in pixels.tolist()])
            yield windows, grids.offset_coords(self.centres, offsets, self.step)


class Views:
    """Yield the views of one image, as batches of (images (V, 3, H', W'), coords (V, h, w, 2)).

    Iterating again yields the same views, so nothing needs to be kept. Boxes are rounded to whole pixels of the
    source, and the coordinates are those of the rounded boxes: they are exact.

    Args:
        image: (3, H, W) in [0, 1], on the device where views are to be cut.
        size: (H', W') of each view: the model input.
        centres: (h, w, 2) patch centres in a view, from :meth:`dvt.backbones.Backbone.centres`.
        config: settings for drawing views.
    """

    def __init__(self, image: Tensor, size: Size, centres: Tensor, config: ViewConfig | None = None):
        self.config = config or ViewConfig()
        self.size = size
        self.centres = centres
        # Shrink the image to the resolution at which even the smallest view is not enlarged: more only costs time.
        useful = [math.ceil(side / math.sqrt(self.config.scale[0] / self.config.ratio[1])) for side in size]
        shape = (min(image.shape[1], useful[0]), min(image.shape[2], useful[1]))
        self.image = resize(image, shape)
        boxes, self.flips = draw_boxes(self.config, torch.Generator().manual_seed(self.config.seed))
        self.pixels = grids.boxes_to_pixels(boxes, shape)
        self.boxes = grids.boxes_from_pixels(self.pixels, shape)
        self._placed = upload(self.boxes.to(centres.dtype), centres.device), upload(self.flips, centres.device)

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        boxes, flips = self._placed
        for start in range(0, len(self), self.config.batch):
            part = slice(start, start + self.config.batch)
            images = cut(self.image, self.pixels[part], self.flips[part], self.size)
            yield images, grids.view_to_image(self.centres, boxes[part], flips[part]).to(images.device)
