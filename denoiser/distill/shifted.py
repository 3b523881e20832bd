"""Average a backbone's tokens over views of an image that are shifted by whole patches.

The input lies in the middle of a canvas, which is larger by a margin of whole patches. So a patch shows the same pixels
in each view that contains it, also in mirrored ones, and its tokens are averaged without interpolation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dvt import grids
from dvt.backbones import Backbone
from dvt.grids import Size
from dvt.images import load_image
from dvt.tokens import Tokens
from dvt.views import ViewConfig, cut, draw_boxes


@dataclass(frozen=True)
class Canvas:
    """Lay out an example: a window, which is the student's input, in the middle, and a margin for shifted views.

    Args:
        window: (H, W) of the backbone's input.
        stride: pixels between neighbouring patches.
        margin: (rows, columns) of patches on each side of the window; 0 without shifted views.
        mirrors: True if the patches of a mirrored window coincide with those of the window.
    """

    window: Size
    stride: Size
    margin: Size
    mirrors: bool

    @classmethod
    def of(cls, backbone: Backbone, shift: float = 0.0) -> Canvas:
        """Make the canvas for a backbone's input; it has room for shifts up to a share of the input's sides.

        Shifts are at least a patch; a share of 0 is for no shifts.
        """
        rows, columns = (max(1, round(shift * n)) if shift else 0 for n in backbone.grid(backbone.image_size))
        window, stride = backbone.image_size, backbone.stride
        return cls(window, stride, (rows, columns), (window[1] - backbone.patch_size[1]) % stride[1] == 0)

    @property
    def size(self) -> Size:
        """The size (H, W) of the canvas."""
        height, width = (w + 2 * m * s for w, m, s in zip(self.window, self.margin, self.stride, strict=True))
        return height, width

    def cut(self, canvases: Tensor, row: int, column: int) -> Tensor:
        """Cut out the view (B, 3, H, W) of canvases (B, 3, H', W') whose first patch is at this row and column."""
        top, left = row * self.stride[0], column * self.stride[1]
        return canvases[:, :, top : top + self.window[0], left : left + self.window[1]]

    def middle(self, canvases: Tensor) -> Tensor:
        """Cut out the student's input."""
        return self.cut(canvases, *self.margin)

    def read(self, path: str | Path, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
        """Read a random part of an image as a canvas (3, H', W'), with its aspect ratio, mirrored half of the time."""
        image, (height, width) = load_image(path), self.size
        shape = (image.shape[1], image.shape[2])
        ratio = width * shape[0] / (height * shape[1])  # the canvas's aspect ratio over the image's
        most = min(ratio, 1 / ratio)  # the largest share of the image's area that a canvas can show
        config = ViewConfig(count=1, scale=(scale[0] * most, scale[1] * most), ratio=(ratio, ratio))
        boxes, flips = draw_boxes(config, generator)
        return cut(image, grids.boxes_to_pixels(boxes[1:], shape), flips[1:], self.size)[0]

    def draw_shifts(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw shifts (count, 3): each view's first row and column of patches on the canvas, and 1 if mirrored."""
        rows, columns = (torch.randint(2 * m + 1, (count,), generator=generator) for m in self.margin)
        mirrored = (torch.arange(count) % 2) * int(self.mirrors)
        return torch.stack((rows, columns, mirrored), dim=1)


@torch.no_grad()
def view_mean(backbone: Backbone, canvas: Canvas, canvases: Tensor, shifts: Tensor) -> tuple[Tensor, Tokens]:
    """Average the tokens of the same patch over shifted views (Post Hoc Registers, here with shifts by whole patches).

    An artifact of position is replaced by its mean over the positions at which the views show the patch. If no view
    shows a patch, its token does not change.

    Args:
        backbone: the frozen backbone.
        canvas: layout of the canvases.
        canvases: (B, 3, H', W').
        shifts: (views, 3) from :meth:`Canvas.draw_shifts`.

    Returns:
        (B, h, w, C) in float32, and the tokens of the window itself.
    """
    own = backbone(canvas.middle(canvases))
    (height, width), (top, left) = own.grid, canvas.margin
    total = torch.zeros(
        len(own), height + 2 * top, width + 2 * left, own.feature_dim, dtype=torch.float32, device=canvases.device
    )
    count = torch.zeros_like(total[:1, :, :, :1])
    for row, column, mirrored in shifts.tolist():
        view = canvas.cut(canvases, row, column)
        patches = backbone(view.flip(-1)).patches.flip(2) if mirrored else backbone(view).patches
        place = (slice(None), slice(row, row + height), slice(column, column + width))
        total[place] += patches.float()
        count[place] += 1
    middle = (slice(None), slice(top, top + height), slice(left, left + width))
    seen = count[middle]
    return torch.where(seen > 0, total[middle] / seen.clamp(min=1), own.patches.float()), own
