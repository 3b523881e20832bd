"""Hold the results of an analysis: rows of numbers and the data of its pictures; write its tables as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import numpy as np
from torch import Tensor

from dvt import grids
from dvt.analysis.metrics.scores import METRICS, Row
from dvt.errors import ConfigError
from dvt.text import WIDTH, aligned, counted, wrapped

#: Pixels a side of a patch that are believed of a report.
_MOST_PATCH = 1024


@dataclass
class Findings:
    """Hold the results of :func:`dvt.analysis.analyze`.

    Attributes:
        rows: metric x variant x layer x backbone.
        images: names of the images of the sample.
        backbones: {label, name, weights_sha256, layer, patch_size, stride, image_size, feature_dim, precision}
            of each backbone.
        seconds: {forward, fields, denoisers, metrics, total}: seconds in the backbone (views included), in
            decompositions without the backbone, in denoisers, in everything else, and in total.
        config: the settings.
        index: description of the arrays; see :mod:`dvt.analysis.results`.
        arrays: the arrays, by their names in the index.
    """

    rows: list[Row]
    images: list[str]
    backbones: list[dict[str, Any]]
    seconds: dict[str, float]
    config: dict[str, Any] = field(default_factory=dict)
    index: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The seconds in everything but the backbone, divided by the seconds in the backbone."""
        return (self.seconds["total"] - self.seconds["forward"]) / max(self.seconds["forward"], 1e-9)

    def get(self, metric: str, variant: str = "raw", layer: int | None = None, backbone: str | None = None) -> Row:
        """Find one row; layer None is the backbone's own layer, backbone None the first backbone.

        Raises:
            ConfigError: there is no such row.
        """
        backbone = self.backbones[0]["label"] if backbone is None else backbone
        own = {each["label"]: each["layer"] for each in self.backbones}
        layer = own.get(backbone, -1) if layer is None else layer
        for row in self.rows:
            if (row.metric, row.variant, row.layer, row.backbone) == (metric, variant, layer, backbone):
                return row
        raise ConfigError(
            f"the report has no {metric!r} of {variant!r} at layer {layer} of {backbone!r}; it has the metrics "
            f"{sorted({row.metric for row in self.rows})}, the variants {sorted({row.variant for row in self.rows})}, "
            f"the layers {sorted({row.layer for row in self.rows})} of {sorted(own)}"
        )

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """List (title, header, lines) of the main table and of one table for each backbone with several layers."""
        tables = [self._main_table()]
        for each in self.backbones:
            rows = [row for row in self.rows if row.backbone == each["label"] and row.variant == "raw"]
            layers = sorted({row.layer for row in rows}, key=lambda layer: (layer == -1, layer))
            if len(layers) > 1:
                names = [name for name in METRICS if any(row.metric == name for row in rows)]
                cells = {(row.layer, row.metric): "-" if row.value is None else f"{row.value:.3g}" for row in rows}
                lines = [[_layer(layer), *(cells.get((layer, name), "-") for name in names)] for layer in layers]
                tables.append((f"Layers of {each['label']}, raw", ["layer", *(METRICS[n].title for n in names)], lines))
        return tables

    def _main_table(self) -> tuple[str, list[str], list[list[str]]]:
        own = {each["label"]: each["layer"] for each in self.backbones}
        rows = [row for row in self.rows if row.layer == own.get(row.backbone)]
        columns = list(dict.fromkeys((row.backbone, row.variant) for row in rows))
        several = len(self.backbones) > 1
        header = ["metric", "better", *(f"{name}, {variant}" if several else variant for name, variant in columns)]
        cells = {(row.metric, row.backbone, row.variant): _cell(row) for row in rows}
        lines = []
        for name, metric in METRICS.items():
            if any(row.metric == name for row in rows):
                lines.append([metric.title, metric.better, *(cells.get((name, *column), "-") for column in columns)])
        title = "Artifacts: value [95 % interval over images] (null and its 95 % interval)"
        return title, header, lines

    def notes(self) -> list[str]:
        """List the reasons for missing values and the remarks, each of them once."""
        own = {each["label"]: each["layer"] for each in self.backbones}
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.note and row.layer == own.get(row.backbone):
                title = METRICS[row.metric].title
                if row.value is None:
                    found.setdefault(f"not computed: {row.note}", []).append(f"{title} of {row.variant}")
                else:
                    count = counted(row.images, "image")
                    found.setdefault(f"{title}, {count}: {row.note}", []).append(row.variant)
        return [f"{note} ({', '.join(dict.fromkeys(names))})" for note, names in found.items()]

    def to_text(self, nulls: bool = True) -> str:
        """Write everything for a terminal of 80 columns: a block a metric, layers in a table, notes below.

        Args:
            nulls: write what chance gives beside each value; without it a value is only marked where chance gives it.
        """
        first = f"Artifacts, {counted(len(self.images), 'image')}: value [95 % interval over images]"
        parts = [first + (" chance [its interval]" if nulls else "")]
        parts += [block for name in METRICS if (block := self._block(name, nulls))]
        parts += [f"{title}\n\n{aligned(head, lines)}" for title, head, lines in self.tables()[1:]]
        return "\n\n".join([*parts, wrapped("\n".join(self._closing()))])

    def _block(self, name: str, nulls: bool) -> str:
        """Write a metric's title and a line for each variant; "" if it was not asked for."""
        own = {each["label"]: each["layer"] for each in self.backbones}
        rows = [row for row in self.rows if row.metric == name and row.layer == own.get(row.backbone)]
        if not any(row.value is not None for row in rows):
            return ""
        labels = [f"{row.backbone}, {row.variant}" if len(own) > 1 else row.variant for row in rows]
        width = max(map(len, labels))
        lines = [f"{METRICS[name].title} ({METRICS[name].better} is better)"]
        for label, row in zip(labels, rows, strict=True):
            value, chance = _value(row), _chance(row) if nulls else _verdict(row)
            line = f"  {label:<{width}}  {value:<22}  {chance}".rstrip()
            lines += [line] if len(line) <= WIDTH else [f"  {label}", f"      {value:<22}  {chance}".rstrip()]
        return "\n".join(lines)

    def _closing(self) -> list[str]:
        seconds = self.seconds
        return [
            f"{counted(len(self.images), 'image')}. Backbone {seconds['forward']:.1f} s, decompositions without it "
            f"{seconds['fields']:.1f} s, denoisers {seconds['denoisers']:.1f} s, metrics and reading "
            f"{seconds['metrics']:.1f} s: everything but the backbone takes {self.share:.2f} of its time.",
            "Smooth features alone improve most of these metrics: also use a score that needs labels (dvt probe).",
            *(f"- {note}" for note in self.notes()),
        ]

    def to_markdown(self) -> str:
        """Write all tables as Markdown, followed by the notes."""
        parts = []
        for title, header, lines in self.tables():
            escaped = [[cell.replace("|", "\\|") for cell in line] for line in [header, *lines]]
            rule = ["---"] * len(header)
            parts.append(
                f"## {title}\n\n"
                + "\n".join("| " + " | ".join(line) + " |" for line in [escaped[0], rule, *escaped[1:]])
            )
        return "\n\n".join([*parts, "\n".join(f"- {each.removeprefix('- ')}" for each in self._closing())]) + "\n"

    def to_csv(self) -> str:
        """Write every row with all of its fields, as CSV."""
        out = io.StringIO()
        writer = csv.DictWriter(out, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: "" if value is None else value for name, value in asdict(row).items()} for row in self.rows
        )
        return out.getvalue()

    def _repr_html_(self) -> str:
        """Show the tables in a notebook."""
        parts = []
        for title, header, lines in self.tables():
            head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
            body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
            parts.append(
                f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            )
        return "".join(parts) + "".join(f"<p>{escape(each)}</p>" for each in self._closing())


def matching(entries: Sequence[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """Select the entries of an index list whose fields have the given values."""
    return [entry for entry in entries if all(entry[name] == value for name, value in fields.items())]


def position_top(report: Findings, entry: dict[str, Any]) -> float:
    """Find the end of the colour scale of a position map: the largest norm of all variants at its layer."""
    alike = matching(report.index["positions"], backbone=entry["backbone"], layer=entry["layer"])
    return max(float(report.arrays[each["array"]].max()) for each in alike)


def drawn_at_centres(about: Mapping[str, Any], values: Tensor) -> Tensor:
    """Enlarge a map (h, w, ...) of a backbone for a picture, with every patch where it looks, if its patches overlap.

    Args:
        about: the backbone's entry in :attr:`Findings.backbones`; without a stride, patches tile the image.
        values: the map; it is returned as it is where patches tile the image.
    """
    if "stride" not in about:
        return values
    (high, wide), (down, across) = about["patch_size"], about["stride"]
    if not (0 < down <= high <= _MOST_PATCH and 0 < across <= wide <= _MOST_PATCH):
        raise ConfigError(f"patches of {high} x {wide} pixels every {down} x {across} pixels cannot be drawn")
    grid = (values.shape[0], values.shape[1])
    return grids.drawn_cells(values, grids.overlapping_centres(grid, (high, wide), (down, across)))


def _layer(layer: int) -> str:
    return "final" if layer == -1 else str(layer)


def _value(row: Row) -> str:
    if row.value is None:
        return "-"
    return f"{row.value:.3f}" + ("" if row.low is None or row.high is None else f" [{row.low:.3f}, {row.high:.3f}]")


def _chance(row: Row) -> str:
    if row.value is None or row.null is None:
        return ""
    interval = "" if row.null_low is None or row.null_high is None else f" [{row.null_low:.3f}, {row.null_high:.3f}]"
    return f"chance {row.null:.3f}{interval}"


def _verdict(row: Row) -> str:
    """Say of a value that it is no more than chance gives."""
    if row.value is None or row.null_low is None or row.null_high is None:
        return ""
    return "as chance gives" if row.null_low <= row.value <= row.null_high else ""


def _cell(row: Row) -> str:
    if row.value is None:
        return "-"
    text = f"{row.value:.3f}"
    if row.low is not None and row.high is not None:
        text += f" [{row.low:.3f}, {row.high:.3f}]"
    if row.null_low is not None and row.null_high is not None:
        return f"{text} (null {row.null:.3f}, {row.null_low:.3f} to {row.null_high:.3f})"
    return text if row.null is None else f"{text} (null {row.null:.3f})"
