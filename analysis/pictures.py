"""Draw token maps: the same colours for the same features, norms, and similarity to chosen points.

Figures are made without pyplot, so that no backend is chosen and no global state is touched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dvt import grids
from dvt.errors import ShapeError
from dvt.files import whole_file
from dvt.images.own import SOFTWARE
from dvt.showing import pca_colours, standardised

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Four hues that colour-blind readers can tell apart, also on photographs (after Okabe and Ito).
_MARKS = ("#E69F00", "#56B4E9", "#CC79A7", "#F0E442")
INK = "#222222"


def choose_points(semantic: Tensor, count: int = 4, centres: Tensor | None = None) -> Tensor:
    """Choose patches that represent the parts of a picture, the same for the same map: (count, 2) coordinates (x, y).

    The tokens, without those at the border if the map is large enough, are clustered into twice as many clusters as
    points. The largest cluster is taken first, then repeatedly the one whose centre is farthest from those taken. Each
    is represented by the patch nearest to its centre that leaves room for the marks. If there are fewer different
    tokens than `count`, fewer points are returned. `centres`, (h, w, 2), are those of patches that overlap.
    """
    from sklearn.cluster import KMeans

    height, width = semantic.shape[:2]
    centres = (grids.grid_centres((height, width)) if centres is None else centres.cpu()).flatten(0, 1)
    margin = 1.5 / torch.tensor([width, height])
    inner = ((centres > margin) & (centres < 1 - margin)).all(-1)
    if int(inner.sum()) < 4 * count:
        inner = torch.ones_like(inner)
    features = torch.nn.functional.normalize(standardised(semantic.cpu()), dim=-1).flatten(0, 1)[inner]
    places = centres[inner]
    different = len(features.unique(dim=0))
    count = min(count, different)
    clusters = KMeans(min(2 * count, different), n_init=4, random_state=0).fit(features.numpy())
    means = torch.from_numpy(clusters.cluster_centers_)
    taken = [int(torch.from_numpy(clusters.labels_).long().bincount().argmax())]
    while len(taken) < count:
        taken.append(int(torch.cdist(means, means[taken]).amin(1).argmax()))
    unlike = torch.cdist(means[taken], features)
    spread = places * torch.tensor([width, height]) / min(height, width)
    points: list[int] = []
    for row in unlike:
        crowded = torch.cdist(spread, spread[points]).lt(0.2).any(1) if points else torch.zeros_like(row).bool()
        points.append(int(torch.where(crowded, row + unlike.max() + 1, row).argmin()))
    return places[points]


def similarity(tokens: Tensor, point: Tensor, centres: Tensor | None = None) -> Tensor:
    """Compute the cosine similarity (h, w), in [-1, 1], of every token of an (h, w, C) map to the token at (x, y).

    The map's mean is removed first: semantic features are only known up to one constant vector, and that constant
    would dominate the cosine. `centres`, (h, w, 2), are those of patches that overlap.
    """
    centred = tokens.float() - tokens.float().mean((0, 1))
    centres = grids.grid_centres((tokens.shape[0], tokens.shape[1])) if centres is None else centres
    centres = centres.to(tokens.device)
    nearest = (centres - point.to(centres)).square().sum(-1).flatten().argmin()
    return torch.cosine_similarity(centred, centred.flatten(0, 1)[nearest], dim=-1)


def decomposition_figure(
    image: Tensor,
    raw: Tensor,
    semantic: Tensor,
    artifact: Tensor,
    residual: Tensor | None = None,
    points: Tensor | None = None,
    centres: Tensor | None = None,
) -> Figure:
    """Draw one image's decomposition: features in colour, norms, and similarities in raw and semantic features.

    Args:
        image: (3, H, W) in [0, 1].
        raw: (h, w, C) tokens of the backbone.
        semantic: the denoised tokens, of the same shape.
        artifact: the position artifact, of the same shape.
        residual: the input-dependent residual; None shows raw - semantic - artifact instead.
        points: up to four (x, y) in [0, 1]^2 to which all tokens are compared; None chooses by :func:`choose_points`.
        centres: (h, w, 2) of the patches, if they overlap; None means that they tile the image.

    Returns:
        A matplotlib figure without a window; a notebook shows it, :func:`save` writes it.
    """
    from matplotlib.figure import Figure

    shapes = {tuple(each.shape) for each in (raw, semantic, artifact, *([] if residual is None else [residual]))}
    if len(shapes) > 1 or raw.ndim != 3 or image.ndim != 3 or image.shape[0] != 3:
        raise ShapeError(f"the image must be (3, H, W) and all maps one (h, w, C), got {tuple(image.shape)}, {shapes}")
    if points is not None and (points.ndim != 2 or points.shape[1] != 2 or not 1 <= len(points) <= len(_MARKS)):
        raise ShapeError(f"points must be (1 to {len(_MARKS)}, 2), got {tuple(points.shape)}")
    raw, semantic, artifact = (each.detach().cpu().float() for each in (raw, semantic, artifact))
    points = choose_points(semantic, len(_MARKS), centres) if points is None else points.cpu()
    rest = raw - semantic - artifact if residual is None else residual.detach().cpu().float()

    # Images narrower than 1:2 or flatter than 1:5 are stretched to that ratio, or titles would collide.
    ratio = min(max(image.shape[1] / image.shape[2], 0.2), 2.0)
    # A panel keeps room for its title, and the page of a portrait stays readable on a screen.
    panel = max(2.4, min(2.95, 3.3 / ratio))
    height = 4 * (panel * max(ratio, 0.3) + 0.42) + 0.2
    figure = Figure(figsize=(4 * panel + 1.2, height), layout="constrained", facecolor="white")
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.06, h_pad=0.06, wspace=0.012, hspace=0.01, rect=(0.006, 0.006, 0.988, 0.988))
    axes = figure.subplots(4, 4)
    for axis in axes.flat:
        axis.set_axis_off()
        for part in (axis.xaxis, axis.yaxis, *axis.spines.values()):  # or the layout measures them all the same
            part.set_visible(False)
    _colour_row(axes[0], image, raw, semantic, artifact, points, ratio)
    last = "left over" if residual is None else "residual"
    terms = {"raw": raw, "semantic": semantic, "artifact": artifact, last: rest}
    _norm_row(figure, axes[1], terms, ratio)
    _similarity_rows(
        figure, axes[2:], [[similarity(each, p, centres) for p in points] for each in (raw, semantic)], points, ratio
    )
    for picture in (each for axis in axes.flat for each in axis.images):
        values = torch.as_tensor(picture.get_array())
        if values.shape[:2] == raw.shape[:2]:
            picture.set_data(grids.drawn_cells(values, centres).numpy())
    return figure


def _show(axis: Axes, values: Tensor, title: str, aspect: float, **options: Any) -> Any:
    """Show a map in the coordinates of the unit square, so that points in [0, 1]^2 lie at their places."""
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_title(title, fontsize=10.5, color=INK, loc="left", pad=5)
    return axis.imshow(values.numpy(), extent=(0, 1, 1, 0), interpolation="nearest", aspect=aspect, **options)


def _mark(axis: Axes, point: Tensor, number: int, label: bool = True) -> None:
    x, y = point.tolist()
    axis.plot(
        [x],
        [y],
        "o",
        markersize=15 if label else 11,
        color=_MARKS[number],
        markeredgecolor="white",
        mew=1.6,
        clip_on=False,
    )
    if label:
        axis.text(x, y, str(number + 1), fontsize=9, weight="bold", color=INK, ha="center", va="center_baseline")


def _colour_row(
    axes: Any, image: Tensor, raw: Tensor, semantic: Tensor, artifact: Tensor, points: Tensor, aspect: float
) -> None:
    raw_colours, semantic_colours = pca_colours([raw, semantic])
    photograph = image.detach().cpu().clamp(0, 1).movedim(0, -1)
    _show(axes[0], photograph, "Input, with points to compare", aspect)
    for number, point in enumerate(points):
        _mark(axes[0], point, number)
    _show(axes[1], raw_colours, "Raw, PCA colours", aspect)
    _show(axes[2], semantic_colours, "Semantic, same colours", aspect)
    _show(axes[3], pca_colours(artifact)[0], "Artifact, its own colours", aspect)


def _norm_row(figure: Figure, axes: Any, terms: dict[str, Tensor], aspect: float) -> None:
    norms = {name: each.norm(dim=-1) for name, each in terms.items()}
    top = max(float(each.max()) for each in norms.values())
    for axis, (name, norm) in zip(axes, norms.items(), strict=True):
        picture = _show(axis, norm, _norm_title(name, norm, top), aspect, cmap="viridis", vmin=0, vmax=top)
    _quiet(figure.colorbar(picture, ax=list(axes), shrink=0.9, aspect=18, pad=0.012), "L2 norm")


def _norm_title(name: str, norm: Tensor, top: float) -> str:
    """Say why a map is flat: many models end in a norm, after which all tokens have about one length."""
    median = float(norm.median())
    if float(norm.max()) <= 1e-5 * top:
        return f"Norm, {name}: zero"
    if float(norm.max() - norm.min()) < 0.05 * median:
        return f"Norm, {name}: {median:.3g} (final norm)"
    return f"Norm, {name} (median {median:.3g})"


def _similarity_rows(figure: Figure, axes: Any, maps: list[list[Tensor]], points: Tensor, aspect: float) -> None:
    low = float(torch.stack([each for row in maps for each in row]).quantile(0.02))
    low = min(low, 0.9)
    for row, name in enumerate(("raw", "semantic")):
        for number, (axis, values) in enumerate(zip(axes[row], maps[row], strict=False)):
            title = f"Similarity to point {number + 1}, {name}"
            picture = _show(axis, values, title, aspect, cmap="magma", vmin=low, vmax=1)
            _mark(axis, points[number], number, label=False)
    _quiet(figure.colorbar(picture, ax=list(axes.flat), shrink=0.6, aspect=28, pad=0.012), "cosine similarity")


def _quiet(bar: Any, label: str) -> None:
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, colors=INK, length=2)
    bar.set_label(label, fontsize=10, color=INK)


def save(figure: Figure, path: str | Path, dpi: int = 110) -> Path:
    """Write a figure as PNG; after an interruption the file is whole or absent.

    It says that dvt drew it, so that it is never taken for a photograph.

    Returns:
        The path; missing folders are created.
    """
    path = Path(path)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=dpi, metadata={"Software": SOFTWARE})
    return path
