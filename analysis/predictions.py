"""Draw and write what a kept head predicts: label maps, depth maps and boxes."""

from __future__ import annotations

import colorsys
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dvt.analysis.pictures import INK
from dvt.errors import ShapeError
from dvt.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dvt.analysis.probes.heads import HeadCard

_SHARE = 0.6  # of the colour of a class, over the photograph
_LISTED = 12  # classes of a legend, of the largest
_MILLIMETRES = 1000


def save_map(values: Tensor, path: str | Path) -> None:
    """Write a map as a PNG of one channel, as `dvt probe` reads them: class ids, or depth in whole millimetres.

    Args:
        values: (H, W) whole numbers, or float metres up to 65.535.
        path: of the file, which is whole or absent.

    Raises:
        ShapeError: it is no map.
    """
    from PIL import Image

    if values.ndim != 2:
        raise ShapeError(f"a map is (H, W), got {tuple(values.shape)}")
    numbers = values * _MILLIMETRES if values.is_floating_point() else values
    whole = numbers.round().clamp(0, 65535).numpy()
    small = not values.is_floating_point() and whole.max(initial=0) < 256
    with whole_file(path) as part:
        Image.fromarray(whole.astype(np.uint8 if small else np.uint16)).save(part, "PNG")


def boxes_entry(box: Tensor, pixels: Tensor) -> dict[str, Any]:
    """Describe the box (4,) of an image (3, H, W) as boxes.json has it, in pixels."""
    return {"width": pixels.shape[2], "height": pixels.shape[1], "boxes": [box.tolist()]}


def class_colours(count: int) -> Tensor:
    """Choose a colour for each class, (count, 3) in [0, 1]; neighbouring numbers get hues that are far apart.

    >>> class_colours(3).shape
    torch.Size([3, 3])
    """
    step = next(n for n in range(max(1, round(0.618 * count)), 2 * count + 2) if math.gcd(n, count) == 1)
    hues = [(k * step % count / count, 0.6 + 0.35 * (k % 2), 0.95 - 0.3 * (k // 2 % 2)) for k in range(count)]
    return torch.tensor([colorsys.hsv_to_rgb(*each) for each in hues])


def prediction_figure(pixels: Tensor, found: Tensor, card: HeadCard) -> Figure:
    """Draw a photograph beside the prediction over it.

    Args:
        pixels: (3, H, W) in [0, 1].
        found: what :meth:`dvt.analysis.probes.heads.SavedHead.predict` returned for it.
        card: of the head.
    """
    from matplotlib.figure import Figure

    height, width = pixels.shape[1:]
    ratio = min(max(height / width, 0.3), 2.0)
    figure = Figure(figsize=(11.5, 4.6 * ratio + 0.5), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    photograph = pixels.detach().cpu().clamp(0, 1).movedim(0, -1)
    for axis, title in ((left, "photograph"), (right, card.task)):
        axis.imshow(photograph.numpy())
        axis.set_title(title, fontsize=10.5, color=INK, loc="left")
        axis.set_axis_off()
    if card.task == "depth":
        picture = right.imshow(found.numpy(), cmap="magma_r")
        figure.colorbar(picture, ax=right, shrink=0.85, label="metres")
    elif card.task == "discovery":
        _draw_box(right, found)
    else:
        _draw_labels(right, photograph, found, card)
    return figure


def _draw_box(axis: Any, box: Tensor) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box.tolist()
    axis.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="#E69F00", linewidth=2.5))


def _draw_labels(axis: Any, photograph: Tensor, labels: Tensor, card: HeadCard) -> None:
    from matplotlib.patches import Patch

    colours = class_colours(card.num_classes)
    grey = photograph.mean(-1, keepdim=True)
    axis.imshow((_SHARE * colours[labels] + (1 - _SHARE) * grey).numpy())
    counts = torch.bincount(labels.flatten(), minlength=card.num_classes)
    largest = [k for k in counts.argsort(descending=True, stable=True).tolist() if counts[k]][:_LISTED]
    handles = [Patch(facecolor=tuple(colours[k].tolist()), label=card.name_of(k)) for k in largest]
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
