"""Write the parts of a report's page that need no script: text, tables, charts and galleries, as HTML.

Everything from a report is escaped here, because names of files and denoisers may hold any characters.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image

from dvt.analysis.findings import Findings, drawn_at_centres, matching, position_top
from dvt.analysis.metrics.scores import METRICS, Row
from dvt.analysis.page import charts
from dvt.analysis.pictures import pca_colours
from dvt.text import counted

TERM_LABELS = {"semantic": "semantic", "artifact": "artifact", "residual": "residual"}
SUBTRACTED = ("artifact", "residual")
_95 = "95\N{NARROW NO-BREAK SPACE}%"
_HEAT_MAPS = 12


def label(variant: str) -> str:
    """Name a variant as the page does."""
    return TERM_LABELS.get(variant, variant)


def image_names(report: Findings) -> list[str]:
    """List file names without their folders, which stay private; equal names get numbers."""
    names = [PurePath(each).name or each for each in report.images]
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def variants_of(report: Findings, backbone: str) -> list[str]:
    """List the variants for which a backbone has numbers or maps: raw first, then denoisers, then terms."""
    found = [row.variant for row in report.rows if row.backbone == backbone]
    found += [each["variant"] for each in matching(report.index["maps"], backbone=backbone)]
    rank = {"raw": 0, "semantic": 2, "artifact": 3, "residual": 4}
    return sorted(dict.fromkeys(found), key=lambda variant: rank.get(variant, 1))


# -- words


def summary(report: Findings) -> str:
    """Write sentences about the measurement and its main findings."""
    names, count = ", ".join(each["label"] for each in report.backbones), len(report.images)
    lead = (
        f"Do the dense features of {names} hold more than the picture: traces of where a patch lies, or tokens out of "
        f"scale? Measured on {counted(count, 'image')}, beside what chance gives."
    )
    return f'<p class="lead">{escape(lead)}</p>' + "".join(_findings(report, each) for each in report.backbones)


_FINDINGS = (
    (
        "position_own",
        "Position share",
        "of the variance of {raw} within an image stays at the patch position when the content moves.",
    ),
    (
        "position_r2",
        "Position R\N{SUPERSCRIPT TWO}",
        "is the R\N{SUPERSCRIPT TWO} of a linear probe that reads where a patch lies from its {raw}, on images that it "
        "was not fitted on.",
    ),
    (
        "outlier_share",
        "Norm outliers",
        "of the {raw} have a norm more than five robust standard deviations away from the median.",
    ),
)


def _findings(report: Findings, about: dict[str, Any]) -> str:
    items = "".join(_finding(report, about, *each) for each in _FINDINGS)
    heading = f"<h3>{escape(about['label'])}</h3>" if len(report.backbones) > 1 else ""
    return f'{heading}<dl class="findings">{items}</dl>'


def _finding(report: Findings, about: dict[str, Any], metric: str, title: str, meaning: str) -> str:
    rows = {row.variant: row for row in _own_rows(report, about) if row.metric == metric and row.value is not None}
    if "raw" not in rows:
        return ""
    show: Callable[[float | None], str] = charts.number if metric == "position_r2" else _percent
    others = [
        f'<span class="of">{escape(label(name))}</span> {show(rows[name].value)}'
        for name in variants_of(report, about["label"])
        if name in rows and name not in ("raw", *SUBTRACTED)
    ]
    after = f'<span class="after">{"<br>".join(others)}</span>' if others else ""
    text = f"{meaning.format(raw='raw tokens')} {_against_null(rows['raw'], show)}"
    value = show(rows["raw"].value)
    return (
        f'<div><dt>{escape(title)}</dt><dd><span class="big">{value}</span> <span class="of">raw</span>'
        f"{after}<p>{escape(text)}</p></dd></div>"
    )


def _against_null(row: Row, show: Callable[[float | None], str]) -> str:
    if row.null is None:
        return ""
    if row.null_low is None or row.null_high is None or row.value is None:
        return f"Chance gives {show(row.null)}."
    side = "above" if row.value > row.null_high else "below" if row.value < row.null_low else "within"
    return f"Chance gives {show(row.null)}; raw is {side} its {_95} interval."


def _percent(value: float | None) -> str:
    return charts.number(value, 1, 100) + "\N{NARROW NO-BREAK SPACE}%"


# -- the table


def tables(report: Findings) -> str:
    """Write for each backbone the value, interval and null of every metric and variant, with their notes."""
    return "".join(_table(report, about) for about in report.backbones)


def _table(report: Findings, about: dict[str, Any]) -> str:
    rows = _own_rows(report, about)
    variants = [name for name in variants_of(report, about["label"]) if any(row.variant == name for row in rows)]
    cells = {(row.metric, row.variant): row for row in rows}
    notes: dict[str, int] = {}
    body = ""
    for name, metric in METRICS.items():
        here = [cells.get((name, variant)) for variant in variants]
        if any(here):
            shown = "".join(f"<td>{_cell(row, notes)}</td>" for row in here)
            chart = charts.dots(here, f"{metric.title}: " + "; ".join(_spoken(row) for row in here if row))
            body += (
                f'<tr><th scope="row">{escape(metric.title)}<small>{escape(metric.meaning)}; '
                f"{escape(metric.better)} is better</small></th>{shown}<td>{chart}</td></tr>"
            )
    heads = "".join(f'<th scope="col">{charts.key(i, label(name))}</th>' for i, name in enumerate(variants))
    heads = f'<th scope="col">Metric</th>{heads}<th scope="col">Beside chance (grey)</th>'
    remarks = "".join(f"<li>{escape(note)}</li>" for note in notes)
    where = f"{about['label']}, {_layer_phrase(about['layer'])}"
    caption = f"{where}: value, {_95} interval over images, and what chance gives"
    return _scrolling(caption, f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>") + (
        f'<ol class="notes">{remarks}</ol>' if notes else ""
    )


def _scrolling(caption: str, table: str) -> str:
    return (
        f'<p class="caption">{escape(caption)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">{table}</div>'
    )


def _cell(row: Row | None, notes: dict[str, int]) -> str:
    if row is None:
        return '<span class="none">\N{EN DASH}</span>'
    mark = f"<sup>{notes.setdefault(row.note, len(notes) + 1)}</sup>" if row.note else ""
    if row.value is None:
        return f'<span class="none">\N{EN DASH}</span>{mark}'
    text = f'<span class="value">{charts.number(row.value)}</span>{mark}'
    if row.low is not None and row.high is not None:
        text += f"<small>{charts.number(row.low)} to {charts.number(row.high)}</small>"
    if row.null is not None:
        text += f'<small class="chance">chance {charts.number(row.null)}</small>'
    return text


def _spoken(row: Row) -> str:
    return f"{label(row.variant)} " + ("none" if row.value is None else charts.number(row.value))


# -- charts


def layer_charts(report: Findings) -> str:
    """Draw each metric of the raw tokens over layers; empty if no backbone has several layers."""
    lines = {each["label"]: _layer_rows(report, each["label"]) for each in report.backbones}
    lines = {name: rows for name, rows in lines.items() if len({row.layer for row in rows}) > 1}
    if not lines:
        return ""
    deepest = max(row.layer for rows in lines.values() for row in rows)
    last = deepest + max(1, round(deepest / 9))  # room for its name
    figures = "".join(_layer_chart(name, list(lines.values()), last) for name in METRICS)
    legend = "".join(charts.key(i, name) for i, name in enumerate(lines)) if len(lines) > 1 else ""
    return (
        "<section><h2>Over the layers</h2><p>Raw tokens of each block, numbered from 0, and after the final norm. "
        f"Bands are {_95} intervals over images, dotted lines what chance gives. {legend}</p>"
        f'<div class="charts">{figures}</div></section>'
    )


def _layer_chart(metric: str, lines: Sequence[Sequence[Row]], last: int) -> str:
    drawn = [(number, [_point(row, last) for row in rows if row.metric == metric]) for number, rows in enumerate(lines)]
    drawn = [(number, points) for number, points in drawn if len(points) > 1]
    if not drawn:
        return ""
    title, names = METRICS[metric].title, {p.place: f"{p.place:.0f}" for _, line in drawn for p in line}
    names |= {last: "final"} if last in names else {}
    spoken = "; ".join(f"{names[p.place]} {charts.number(p.value)}" for _, line in drawn for p in line)
    return (
        f"<figure><figcaption>{escape(title)}<small>{escape(METRICS[metric].better)} is better</small></figcaption>"
        f"{charts.curves(drawn, names, f'{title} over layers: {spoken}')}</figure>"
    )


def _layer_rows(report: Findings, backbone: str) -> list[Row]:
    rows = [row for row in report.rows if row.backbone == backbone and row.variant == "raw" and row.value is not None]
    return sorted(rows, key=lambda row: (row.layer == -1, row.layer))


def _point(row: Row, last: int) -> charts.Point:
    value = float(row.value or 0)
    low, high = (value if each is None else each for each in (row.low, row.high))
    return charts.Point(last if row.layer == -1 else row.layer, value, low, high, row.null)


def position_maps(report: Findings) -> str:
    """Draw the part due to position, for all variants and some layers."""
    figures = []
    for about in report.backbones:
        entries = matching(report.index["positions"], backbone=about["label"])
        own = [each for each in entries if each["layer"] == about["layer"]]
        others = sorted(
            (each for each in entries if each["layer"] != about["layer"]), key=lambda e: (e["layer"] == -1, e["layer"])
        )
        for entry in [*own, *others[:: max(1, -(-len(others) // _HEAT_MAPS))]]:
            values = report.arrays[entry["array"]]
            name = f"{label(entry['variant'])}, {_layer_phrase(entry['layer'])}"
            name = f"{about['label']}, {name}" if len(report.backbones) > 1 else name
            top = position_top(report, entry)
            drawn = drawn_at_centres(about, torch.tensor(values)).numpy()
            image = _map(
                charts.heat(drawn, top), about["image_size"], f"Norm of the mean token at each position: {name}"
            )
            scale = f"at most {charts.number(float(values.max()))}, scale 0 to {charts.number(top)}"
            figures.append(f"<figure>{image}<figcaption>{escape(name)}<small>{scale}</small></figcaption></figure>")
    if not figures:
        return ""
    return (
        "<section><h2>What stays at the position</h2><p>The mean token at each patch position while the content moves, "
        "without its mean over positions: nothing but the artifact is left. The colour is its norm, from dark (0) to "
        "bright; all maps of one layer have one scale, so that what a denoiser has removed is dark. Blocks differ in "
        f'the size of their tokens, and have a scale each.</p><div class="maps">{"".join(figures)}</div></section>'
    )


def norm_charts(report: Findings) -> str:
    """Draw histograms of token norms at each backbone's own layer."""
    figures = []
    for about in report.backbones:
        order = variants_of(report, about["label"])
        entries = matching(report.index["norms"], backbone=about["label"], layer=about["layer"])
        counts = [(order.index(e["variant"]), report.arrays[e["array"]], e["edges"]) for e in entries]
        if counts:
            name = f"{escape(about['label'])}: " if len(report.backbones) > 1 else ""
            legend = "".join(charts.key(number, label(order[number]), line=True) for number, _, _ in counts)
            spoken = "; ".join(
                f"{label(order[number])}: {counted(int(values.sum()), 'token')}, median "
                f"{charts.number(_median(values, edges))}"
                for number, values, edges in counts
            )
            figures.append(
                f"<figure><figcaption>{name}{legend}</figcaption>"
                f"{charts.histogram(counts, f'Histogram of token norms. {spoken}')}</figure>"
            )
    if not figures:
        return ""
    return (
        "<section><h2>Norms of tokens</h2><p>How many tokens have which L2 norm, counts on a logarithmic scale: "
        "outliers stand apart on the right.</p>"
        f'<div class="charts wide">{"".join(figures)}</div></section>'
    )


def _median(counts: np.ndarray, edges: Sequence[float]) -> float:
    place = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    return (edges[place] + edges[place + 1]) / 2


# -- galleries


def gallery(report: Findings, shown: Sequence[int]) -> str:
    """Show photographs beside their token maps in colours, at each backbone's own layer."""
    parts = "".join(_gallery(report, about, shown) for about in report.backbones)
    if not parts:
        return ""
    subtracted = any(each["variant"] in SUBTRACTED for each in report.index["maps"])
    own = " Artifact and residual have colours of their own. Raw = semantic + artifact + residual." * subtracted
    return (
        "<section><h2>Features in colour</h2><p>Three principal components as red, green and blue, the same for the "
        f"raw and the cleaned features of an image: equal colours are alike features.{own}</p>{parts}</section>"
    )


def _gallery(report: Findings, about: dict[str, Any], shown: Sequence[int]) -> str:
    names = image_names(report)
    entries = matching(report.index["maps"], backbone=about["label"], layer=about["layer"])
    order = [name for name in variants_of(report, about["label"]) if matching(entries, variant=name)]
    if not order or not shown:
        return ""
    rows = "".join(_strip(report, about, matching(entries, image=image), order, image, names[image]) for image in shown)
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ["image", *map(label, order)])
    caption = f"{about['label']}, {_layer_phrase(about['layer'])}"
    return _scrolling(caption, f'<table class="gallery"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>')


def _strip(
    report: Findings,
    about: dict[str, Any],
    entries: Sequence[dict[str, Any]],
    order: Sequence[str],
    image: int,
    name: str,
) -> str:
    maps = {entry["variant"]: torch.from_numpy(report.arrays[entry["array"]].astype(np.float32)) for entry in entries}
    together = [each for each in order if each in maps and each not in SUBTRACTED]
    colours = dict(zip(together, pca_colours([maps[each] for each in together]), strict=True)) if together else {}
    # Artifact and residual get colours of their own: in one range with the others, they would make those grey.
    colours |= {each: pca_colours(maps[each])[0] for each in maps if each in SUBTRACTED}
    size = photo_size(report.arrays[matching(report.index["jpegs"], image=image)[0]["array"]])
    cells = [f'<img data-photo="{int(image)}" alt="{escape(name)}">']
    for variant in order:
        found = colours.get(variant)
        alt = f"{label(variant)} features of {name} in colour"
        if found is None:
            cells.append("")
        else:
            cells.append(_map(charts.png(drawn_at_centres(about, found).numpy()), size, alt))
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def photo_size(jpeg: np.ndarray) -> tuple[int, int]:
    """Read the size (height, width) of a report's photograph from its bytes."""
    with Image.open(io.BytesIO(jpeg.tobytes()), formats=("JPEG",)) as image:
        return image.height, image.width


def _map(address: str, shape: Sequence[int], alt: str) -> str:
    return f'<img class="map" src="{address}" width="{shape[1]}" height="{shape[0]}" alt="{escape(alt)}">'


# -- how


def method(report: Findings, reduced: Sequence[str]) -> str:
    """Write how long it took, which weights and settings it used, and what the page leaves out."""
    seconds = report.seconds
    facts = {each["label"]: _described(each) for each in report.backbones} | {
        "time": f"backbone {seconds['forward']:.1f} s, decompositions besides it {seconds['fields']:.1f} s, denoisers "
        f"{seconds['denoisers']:.1f} s, metrics and reading {seconds['metrics']:.1f} s",
        "settings": "; ".join(f"{name.replace('_', ' ')} {_listed(value)}" for name, value in report.config.items()),
        "this page": " ".join(reduced),
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return (
        "<section><h2>How it was measured</h2><p>Smooth features please most of these metrics: read them beside a "
        "score that needs labels (<code>dvt probe</code>). Chance is the same metric where there is nothing to find: "
        "positions shuffled, or noise of the same mean and spread. <code>table.csv</code> beside "
        f'<code>report.json</code> has every number.</p><dl class="facts">{listed}</dl></section>'
    )


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def _described(about: dict[str, Any]) -> str:
    (rows, columns), (height, width) = about["patch_size"], about["image_size"]
    down, across = about.get("stride", (rows, columns))
    every = "" if (down, across) == (rows, columns) else f" every {down} x {across} pixels"
    return (
        f"{about['name']}, {_layer_phrase(about['layer'])}, patches of {rows} x {columns} pixels{every}, meant for "
        f"images of {height} x {width}, {about['feature_dim']} channels, weights {str(about['weights_sha256'])[:12]}"
        f"{', ' + about['precision'] if 'precision' in about else ''}"
    )


def _layer_phrase(layer: int) -> str:
    return "final layer" if layer == -1 else f"block {layer}"


def _own_rows(report: Findings, about: dict[str, Any]) -> list[Row]:
    return [row for row in report.rows if row.backbone == about["label"] and row.layer == about["layer"]]
