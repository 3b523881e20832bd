"""Search a feature store for images that look like a given image, or like a part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dvt import grids
from dvt.errors import ConfigError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from dvt.analysis.search_index import SearchIndex
    from dvt.store import FeatureStore

_CANDIDATES = 8  # images of an index compared for each one asked for

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """Hold one image of a store that looks like the query.

    Args:
        path: path of the image, as in the store.
        cosine: cosine of the two mean tokens or, for a region, that of the best window, in [-1, 1].
        box: (x0, y0, x1, y1) in [0, 1] of the best window; None if whole images were compared.
    """

    path: str
    cosine: float
    box: Box | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def search(
    store: FeatureStore,
    query: Tensor,
    box: Box | None = None,
    count: int = 10,
    centres: Callable[[grids.Size], Tensor] = grids.grid_centres,
    progress: Callable[[str, int, int], None] | None = None,
    index: SearchIndex | None = None,
) -> list[Found]:
    """Find the images of a store that look most like a query, by an exact search, or among an index's candidates.

    The store's mean token is subtracted from both, because denoised features are known only up to a constant vector.
    Whole images are compared by the cosine of their mean tokens. A region is compared with every window of as many
    patches of an image, by the cosine of mean tokens; the best window counts.

    Args:
        store: the store, opened with the term to compare.
        query: (h, w, C) tokens of the same term, backbone and layer.
        box: (x0, y0, x1, y1) in [0, 1] of the query's region; None compares whole images.
        count: the largest number of images to return.
        centres: maps a grid (h, w) to its patch centres, if patches overlap; by default they tile the images.
        progress: called with (what, done, total).
        index: an index of the same store and term, which chooses the images to compare; None compares all.

    Returns:
        The images found, the best first.

    Raises:
        ShapeError: the query's tokens have other channels than the store's.
        ConfigError: the box is empty or leaves the image, or count is below 1.
        NonFiniteError: the query holds NaN or infinity.
    """
    if count < 1:
        raise ConfigError(f"count is {count}; it must be 1 or more")
    if box is not None and not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ConfigError(f"box {box} must be (x0, y0, x1, y1) in [0, 1], with x0 < x1 and y0 < y1")
    channels = store[0].patches.shape[-1]
    if query.ndim != 3 or query.shape[-1] != channels:
        raise ShapeError(f"the query has shape {tuple(query.shape)}; this store is searched with (h, w, {channels})")
    if not bool(query.isfinite().all()):
        raise NonFiniteError("the query's tokens hold NaN or infinity; compute them again")
    means = [_mean(store, i) for i in range(len(store))] if index is None else []
    centre = torch.stack(means).mean(0) if index is None else index.centre
    x0, y0, x1, y1 = 0, 0, query.shape[1], query.shape[0]
    if box is not None:
        x0, y0, x1, y1 = grids.cells_in_box(box, centres((query.shape[0], query.shape[1])))
    mean = query[y0:y1, x0:x1].cpu().float().mean((0, 1))
    wanted, found, paths = mean - centre, [], store.images
    chosen = range(len(store)) if index is None else index.candidates(mean, _CANDIDATES * count)
    for done, i in enumerate(chosen, 1):
        if box is None:
            own = means[i] if means else _mean(store, i)
            found.append(Found(paths[i], float(nnf.cosine_similarity(own - centre, wanted, dim=0))))
        else:
            tokens = store[i].patches[0].float() - centre
            value, cells = _best_window(tokens, wanted, (y1 - y0, x1 - x0))
            at = grids.box_of_cells(cells, centres((tokens.shape[0], tokens.shape[1]))).tolist()
            found.append(Found(paths[i], value, (at[0], at[1], at[2], at[3])))
        if progress:
            progress("images", done, len(chosen))
    return sorted(found, key=lambda each: -each.cosine)[:count]


def _mean(store: FeatureStore, i: int) -> Tensor:
    """Compute the mean token (C,) of an image."""
    return store[i].patches[0].float().mean((0, 1))


def _best_window(tokens: Tensor, wanted: Tensor, window: grids.Size) -> tuple[float, tuple[int, int, int, int]]:
    """Find the window of a map whose mean token is most similar to a given one: the cosine, and (x0, y0, x1, y1)."""
    size = (min(window[0], tokens.shape[0]), min(window[1], tokens.shape[1]))
    means = nnf.avg_pool2d(tokens.movedim(-1, 0)[None], size, stride=1)[0]
    values = nnf.cosine_similarity(means, wanted[:, None, None], dim=0)
    row, column = divmod(int(values.argmax()), values.shape[1])
    return float(values.max()), (column, row, column + size[1], row + size[0])


def search_figure(query: Tensor, box: Box | None, found: dict[str, list[Found]], load: Callable[[str], Any]) -> Any:
    """Draw a query (3, H, W) and the images found, one row per term, with boxes around the windows found.

    Args:
        load: loads the (3, H, W) pixels of a path, or returns None if the photograph is not available.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = 1 + max(len(each) for each in found.values())
    figure = Figure(figsize=(2.6 * columns, 2.4 * len(found)), layout="constrained", facecolor="white")
    for axes, (term, results) in zip(figure.subplots(len(found), columns, squeeze=False), found.items(), strict=True):
        for axis in axes:
            axis.set_axis_off()
        shown = [(query, f"query, {term}", box), *((load(r.path), f"{r.cosine:.2f}", r.box) for r in results)]
        for axis, (pixels, title, place) in zip(axes, shown, strict=False):
            axis.set_title(title, fontsize=10, loc="left")
            if pixels is None:
                axis.text(0.5, 0.5, "photograph\nnot available", ha="center")
                continue
            aspect = pixels.shape[1] / pixels.shape[2]
            axis.imshow(pixels.cpu().clamp(0, 1).movedim(0, -1).numpy(), extent=(0, 1, 1, 0), aspect=aspect)
            if place is not None:
                x0, y0, x1, y1 = place
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="#E69F00", linewidth=2))
    return figure
