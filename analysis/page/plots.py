"""Draw the pictures of a report: the part due to position, norms, features in colours, and curves over layers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dvt.analysis.findings import drawn_at_centres, position_top
from dvt.analysis.metrics.scores import METRICS, Row
from dvt.analysis.pictures import INK, pca_colours, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dvt.analysis.findings import Findings

# Hues that colour-blind readers can tell apart (after Okabe and Ito), in this order.
_LINES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STRIPS = 6
_MAPS = 6
_TICKS = 8  # blocks named under a curve over layers, at most


def save_plots(report: Findings, folder: Path) -> list[Path]:
    """Write as PNG each picture for which the report has data."""
    makers = {"position": position_figure, "norms": norm_figure, "pca": pca_figure, "layers": layer_figure}
    figures = {name: make(report) for name, make in makers.items()}
    return [save(figure, folder / f"{name}.png") for name, figure in figures.items() if figure is not None]


def position_figure(report: Findings) -> Figure | None:
    """Draw the norm of the part due to position, for each variant and up to six layers; one row per backbone.

    All maps of one layer share a colour scale, so a map without much of an artifact is dark.
    """
    rows = [_thinned(_entries(report, "positions", each["label"]), each["layer"]) for each in report.backbones]
    if not any(rows):
        return None
    figure, axes = _page(len(rows), max(len(row) for row in rows), 2.3, 2.3)
    for line, entries, about in zip(axes, rows, report.backbones, strict=True):
        for axis, entry in zip(line, entries, strict=False):
            values = drawn_at_centres(about, torch.tensor(report.arrays[entry["array"]])).numpy()
            picture = axis.imshow(values, cmap="viridis", vmin=0, vmax=max(position_top(report, entry), 1e-9))
            _title(axis, f"{entry['variant']}, {_layer(entry)}")
            bar = figure.colorbar(picture, ax=axis, shrink=0.8)
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=7)
    figure.suptitle("Norm of what stays at the position", fontsize=11, color=INK)
    return figure


def norm_figure(report: Findings) -> Figure | None:
    """Draw histograms of token norms at each backbone's own layer, with logarithmic counts."""
    rows = [_own(_entries(report, "norms", each["label"]), each["layer"]) for each in report.backbones]
    if not any(rows):
        return None
    figure, axes = _page(1, len(rows), 4.6, 3.2)
    for axis, entries, each in zip(axes[0], rows, report.backbones, strict=True):
        _frame(axis)
        for number, entry in enumerate(entries):
            axis.stairs(
                report.arrays[entry["array"]], entry["edges"], color=_colour(number), label=entry["variant"], lw=1.6
            )
        axis.set_yscale("symlog", linthresh=1)
        axis.set_xlabel("token norm", fontsize=9)
        axis.set_ylabel("tokens", fontsize=9)
        axis.legend(frameon=False, fontsize=8)
        _title(axis, each["label"])
    return figure


def pca_figure(report: Findings) -> Figure | None:
    """Draw images and their token maps in three principal colours, the same for all variants of an image."""
    label, layer = report.backbones[0]["label"], report.backbones[0]["layer"]
    # A term that is zero in all images shows nothing.
    entries = [each for each in _own(_entries(report, "maps", label), layer) if report.arrays[each["array"]].any()]
    pictures = {entry["image"]: entry["array"] for entry in report.index["jpegs"]}
    numbers = [number for number in pictures if any(entry["image"] == number for entry in entries)][:_STRIPS]
    if not numbers:
        return None
    variants = list(dict.fromkeys(entry["variant"] for entry in entries))
    figure, axes = _page(len(numbers), 1 + len(variants), 2.2, 1.7)
    for line, number in zip(axes, numbers, strict=True):
        photograph = _decoded(report.arrays[pictures[number]])
        line[0].imshow(photograph)
        _title(line[0], "input" if number == numbers[0] else "")
        here = {entry["variant"]: entry for entry in entries if entry["image"] == number}
        maps = {
            name: torch.from_numpy(report.arrays[entry["array"]].astype(np.float32)) for name, entry in here.items()
        }
        # Artifact and residual get colours of their own: in one range with the others, they would make those grey.
        alone = [name for name in maps if name in ("artifact", "residual")]
        together = [name for name in maps if name not in alone]
        colours = dict(zip(together, pca_colours([maps[name] for name in together]), strict=True))
        colours |= {name: pca_colours(maps[name])[0] for name in alone}
        for axis, name in zip(line[1:], variants, strict=True):
            if name in colours:
                drawn = drawn_at_centres(report.backbones[0], colours[name]).numpy()
                axis.imshow(drawn, interpolation="nearest", extent=(0, photograph.shape[1], photograph.shape[0], 0))
            _title(axis, name if number == numbers[0] else "")
    figure.suptitle(f"{label}: features in colour", fontsize=11, color=INK)
    return figure


def layer_figure(report: Findings) -> Figure | None:
    """Draw each metric of the raw tokens over layers, with its interval and, if it has one, its null."""
    curves = {each["label"]: _curve(report, each["label"]) for each in report.backbones}
    if all(len({row.layer for row in rows}) < 2 for rows in curves.values()):
        return None
    drawn = {
        name: {row.layer for rows in curves.values() for row in rows if row.metric == name and row.value is not None}
        for name in METRICS
    }
    names = [name for name, layers in drawn.items() if len(layers) > 1]  # others have no curve
    blocks = sorted({layer for layers in drawn.values() for layer in layers} - {-1})
    final, columns = blocks[-1] + 1, 4
    figure, axes = _page(-(-len(names) // columns), columns, 3.1, 2.4)
    for axis, name in zip(axes.flat, names, strict=False):
        _frame(axis)
        for number, (label, rows) in enumerate(curves.items()):
            _draw_curve(
                axis,
                [row for row in rows if row.metric == name and row.value is not None],
                final,
                label,
                _colour(number),
            )
        better = METRICS[name].better
        _title(axis, f"{METRICS[name].title} ({better} is better)")
        ticks = [block for block in blocks[:: -(-len(blocks) // _TICKS)] if block < final - 1 or len(blocks) <= _TICKS]
        axis.set_xticks([*ticks, final], [*map(str, ticks), "final"])
        axis.set_xlabel("block; final: the last one, after the final norm", fontsize=8)
    if len(curves) > 1:
        axes.flat[0].legend(frameon=False, fontsize=8)
    return figure


def _curve(report: Findings, label: str) -> list[Row]:
    rows = [row for row in report.rows if row.backbone == label and row.variant == "raw"]
    return sorted(rows, key=lambda row: (row.layer == -1, row.layer))


def _draw_curve(axis: Any, rows: list[Row], final: int, label: str, colour: str) -> None:
    places = [final if row.layer == -1 else row.layer for row in rows]
    values = [row.value for row in rows]
    low = [row.value if row.low is None else row.low for row in rows]
    high = [row.value if row.high is None else row.high for row in rows]
    axis.fill_between(places, low, high, color=colour, alpha=0.2, lw=0)
    axis.plot(places, values, "o-", color=colour, ms=3, lw=1.5, label=label)
    null = [(place, row.null) for place, row in zip(places, rows, strict=True) if row.null is not None]
    if null:
        axis.plot(*zip(*null, strict=True), ":", color=colour, lw=1.2, label=f"{label}, null")


def _entries(report: Findings, kind: str, label: str) -> list[dict[str, Any]]:
    return [entry for entry in report.index.get(kind, []) if entry["backbone"] == label]


def _own(entries: list[dict[str, Any]], layer: int) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["layer"] == layer]


def _thinned(entries: list[dict[str, Any]], own: int) -> list[dict[str, Any]]:
    """Choose the own layer's variants and a few other layers, in order."""
    others = sorted((e for e in entries if e["layer"] != own), key=lambda e: (e["layer"] == -1, e["layer"]))
    step = max(1, -(-len(others) // _MAPS))
    return others[::step] + _own(entries, own)


def _page(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """Make a figure without pyplot, and its (rows, columns) axes, which are off until they are used."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width + 0.4, rows * height + 0.5), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _frame(axis: Any) -> None:
    axis.set_axis_on()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=INK)


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, fontsize=9, color=INK, loc="left")


def _layer(entry: dict[str, Any]) -> str:
    return "final" if entry["layer"] == -1 else f"block {entry['layer']}"


def _colour(number: int) -> str:
    return _LINES[number % len(_LINES)]


def _decoded(values: np.ndarray) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(values.tobytes()), formats=("JPEG",)) as image:
        return np.asarray(image.convert("RGB"))
