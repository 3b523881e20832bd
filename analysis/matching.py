"""Match two images by their features: mutual nearest neighbours, or given points."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dvt import grids
from dvt.errors import ConfigError, NonFiniteError, ShapeError

_ROWS = 1024  # rows compared at once
_DRAWN = 40  # most lines drawn in a picture: the best matches


@dataclass(frozen=True)
class ImageMatches:
    """Hold pairs of matching places; pairs found by a search are sorted, best first.

    Args:
        first: (n, 2) coordinates (x, y) in [0, 1]^2 of the first image.
        second: (n, 2) coordinates of the second image.
        likeness: (n,) cosines, in [-1, 1].
    """

    first: Tensor
    second: Tensor
    likeness: Tensor

    def __len__(self) -> int:
        return len(self.likeness)

    def to_json(self) -> list[dict[str, Any]]:
        """List the pairs as plain values."""
        rows = zip(self.first.tolist(), self.second.tolist(), self.likeness.tolist(), strict=True)
        return [{"first": a, "second": b, "cosine": value} for a, b, value in rows]


def match_images(
    first: Tensor,
    second: Tensor,
    points: Tensor | None = None,
    ratio: float = 1.0,
    centres: tuple[Tensor, Tensor] | None = None,
) -> ImageMatches:
    """Match the token maps of two images.

    The mean of each map is removed first, since denoised features are known up to a constant vector; then tokens are
    compared by their cosine.

    Args:
        first: (h, w, C) tokens of one image, one per patch or finer (:func:`dvt.upsample`).
        second: (h', w', C) tokens of the other image.
        points: (n, 2) coordinates (x, y) in [0, 1]^2 of the first image, for each of which the most alike place in
            the second is found; None finds all pairs that are each other's nearest neighbour.
        ratio: in (0, 1]; keeps mutual neighbours whose distance (1 - cosine) is at most this fraction of the
            distance to the second nearest. 1 keeps all.
        centres: patch centres (h, w, 2) of either map, if patches overlap; None means that the grids tile the images.

    Raises:
        ShapeError: the maps are not (h, w, C) of equal C, or points are not (n, 2).
        ConfigError: ratio or a point is out of range.
        NonFiniteError: a token is NaN or infinite.

    Source: mutual nearest neighbours and the ratio test of Lowe (IJCV 2004).

    >>> tokens = torch.eye(6).view(2, 3, 6)
    >>> found = match_images(tokens, tokens.flip(1))
    >>> len(found), bool(torch.allclose(found.first[:, 0], 1 - found.second[:, 0]))
    (6, True)
    """
    _check_pair(first, second, points, ratio)
    one, other = (nnf.normalize((t.float() - t.float().mean((0, 1))).flatten(0, 1), dim=-1) for t in (first, second))
    maps = (first, second)
    known = centres or [grids.grid_centres((t.shape[0], t.shape[1])) for t in maps]
    if any(c.shape != (*t.shape[:2], 2) for c, t in zip(known, maps, strict=True)):
        raise ShapeError(f"centres {[tuple(c.shape) for c in known]} do not fit maps {[tuple(t.shape) for t in maps]}")
    places, others = (c.flatten(0, 1).to(t.device) for c, t in zip(known, maps, strict=True))
    if points is not None:
        own = torch.cdist(points.to(places), places).argmin(1)
        value, where, _ = _nearest(one[own], other)
        return ImageMatches(points.cpu(), others[where].cpu(), value.cpu())
    value, where, next_best = _nearest(one, other)
    _, back, _ = _nearest(other, one)
    clear = (1 - value) <= ratio * (1 - next_best)
    kept = ((back[where] == torch.arange(len(one), device=one.device)) & clear).nonzero()[:, 0]
    kept = kept[value[kept].argsort(descending=True, stable=True)]
    return ImageMatches(places[kept].cpu(), others[where[kept]].cpu(), value[kept].cpu())


def _check_pair(first: Tensor, second: Tensor, points: Tensor | None, ratio: float) -> None:
    if first.ndim != 3 or second.ndim != 3 or first.shape[2] != second.shape[2]:
        raise ShapeError(
            f"maps {tuple(first.shape)} and {tuple(second.shape)} cannot be matched: both must be (h, w, C), of one "
            "backbone and layer"
        )
    if min(first.shape[0] * first.shape[1], second.shape[0] * second.shape[1]) < 2:
        raise ShapeError("each map needs two tokens or more, of which one can be the nearer")
    if not 0 < ratio <= 1:
        raise ConfigError(f"ratio is {ratio}; it must lie in (0, 1]: 1 keeps all mutual neighbours")
    if points is not None:
        if points.ndim != 2 or points.shape[1] != 2:
            raise ShapeError(f"points have shape {tuple(points.shape)}; they must be (n, 2)")
        if not bool(((points >= 0) & (points <= 1)).all()):
            raise ConfigError(f"points {points.tolist()} must be (x, y) in [0, 1], (0, 0) the top left corner")
    if not bool(first.isfinite().all() & second.isfinite().all()):
        raise NonFiniteError("a token map holds NaN or infinity and cannot be matched; compute it again")


def _nearest(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find each row's largest cosine, its index, and the second largest; computed in pieces to bound the memory."""
    best = [(part @ columns.T).topk(2, dim=1) for part in rows.split(_ROWS)]
    values, where = (torch.cat([each[k] for each in best]) for k in (0, 1))
    return values[:, 0], where[:, 0], values[:, 1]


def match_figure(pixels: tuple[Tensor, Tensor], matches: dict[str, ImageMatches]) -> Any:
    """Draw matches as lines between two photographs (3, H, W), a row for each kind of features.

    If there are many, only the best are drawn. Colours follow the place in the first image's width.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch

    height = max(each.shape[1] / each.shape[2] for each in pixels)
    figure = Figure(figsize=(10, len(matches) * (5 * height + 0.4)), layout="constrained", facecolor="white")
    for axes, (name, found) in zip(figure.subplots(len(matches), 2, squeeze=False), matches.items(), strict=True):
        for axis, each in zip(axes, pixels, strict=True):
            aspect = each.shape[1] / each.shape[2]
            axis.imshow(each.cpu().clamp(0, 1).movedim(0, -1).numpy(), extent=(0, 1, 1, 0), aspect=aspect)
            axis.set_axis_off()
        shown = min(len(found), _DRAWN)
        axes[0].set_title(f"{name}: {len(found)} matches" + f", {shown} drawn" * (shown < len(found)), loc="left")
        for a, b in zip(found.first[:shown].tolist(), found.second[:shown].tolist(), strict=True):
            colour = colormaps["turbo"](a[0])
            ends: dict[str, Any] = {"coordsA": "data", "coordsB": "data", "axesA": axes[0], "axesB": axes[1]}
            figure.add_artist(ConnectionPatch(a, b, **ends, color=colour, linewidth=1.1, alpha=0.8))
            for axis, point in zip(axes, (a, b), strict=True):
                axis.plot(*point, "o", color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.8)
    return figure


def save_matches(pixels: tuple[Tensor, Tensor], matches: dict[str, ImageMatches], path: str | Path) -> Path:
    """Write the picture of :func:`match_figure` as PNG."""
    from dvt.analysis.pictures import save

    return save(match_figure(pixels, matches), path)
