"""The parts of a report's page that need no script: words, tables, charts and galleries, as HTML.

Whatever comes from a report is escaped here: names of files and denoisers may hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from dvt.analysis import charts
from dvt.analysis.pictures import pca_colours
from dvt.analysis.results import Report, matching
from dvt.analysis.scores import METRICS, Row

TERMS = {"semantic": "semantic F", "artifact": "artifact G", "residual": "residual h"}
_SUBTRACTED = ("artifact", "residual")
_HEAT_MAPS = 12


def label(variant: str) -> str:
    """What a variant is called on the page."""
    return TERMS.get(variant, variant)


def layer_name(layer: int) -> str:
    return "final" if layer == -1 else f"block {layer}"


def image_names(report: Report) -> list[str]:
    """File names without folders, which are the reader's own business; numbered where two are the same."""
    names = [PurePath(each).name or each for each in report.images]
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def variants_of(report: Report, backbone: str) -> list[str]:
    """Raw first, then denoisers, then terms, of all that a backbone has numbers or maps of."""
    found = [row.variant for row in report.rows if row.backbone == backbone]
    found += [each["variant"] for each in matching(report.index["maps"], backbone=backbone)]
    rank = {"raw": 0, "semantic": 2, "artifact": 3, "residual": 4}
    return sorted(dict.fromkeys(found), key=lambda variant: rank.get(variant, 1))


# -- words


def summary(report: Report) -> str:
    """What was measured and what was found, in sentences."""
    count = len(report.images)
    names = ", ".join(dict.fromkeys(each["label"] for each in report.backbones))
    parts = [
        f"Do the dense features of {names} hold more than the picture: traces of where a patch lies, or tokens out of "
        f"scale? This page measures it on {count} {'image' if count == 1 else 'images'}, beside what chance gives, "
        "and lets you look."
    ]
    paragraphs = "".join(f'<p class="lead">{escape(part)}</p>' for part in parts)
    return paragraphs + "".join(_findings(report, each) for each in report.backbones)


def _findings(report: Report, about: dict[str, Any]) -> str:
    items = [
        _finding(
            report,
            about,
            "position_share",
            "Position in the features",
            _percent,
            "of the variance within an image stays at the patch position when the content moves",
        ),
        _finding(
            report,
            about,
            "position_r2",
            "Position a probe can read",
            charts.number,
            "is the R\N{SUPERSCRIPT TWO} of a linear probe that reads a patch\N{RIGHT SINGLE QUOTATION MARK}s position from its token, on images it was not fitted on",
        ),
        _finding(
            report,
            about,
            "outlier_share",
            "Tokens out of scale",
            _percent,
            "of the tokens have a norm beyond five robust sigmas",
        ),
    ]
    heading = f"<h3>{escape(about['label'])}</h3>" if len(report.backbones) > 1 else ""
    return heading + '<dl class="findings">' + "".join(items) + "</dl>"


def _finding(report: Report, about: dict[str, Any], metric: str, title: str, show: Any, meaning: str) -> str:
    rows = {row.variant: row for row in _own_rows(report, about) if row.metric == metric and row.value is not None}
    raw = rows.get("raw")
    if raw is None or raw.value is None:
        return ""
    others = [
        f"{escape(label(name))} {show(rows[name].value)}"
        for name in variants_of(report, about["label"])
        if name in rows and name != "raw" and name not in _SUBTRACTED
    ]
    change = f' <span class="after">{"; ".join(others)}</span>' if others else ""
    return (
        f'<div><dt>{escape(title)}</dt><dd><span class="big">{show(raw.value)}</span>{change}'
        f"<p>{escape(meaning)} (raw). {escape(_against_null(raw, show))}</p></dd></div>"
    )


def _against_null(row: Row, show: Any) -> str:
    if row.null is None:
        return ""
    chance = f"Chance gives {show(row.null)}"
    if row.null_low is None or row.null_high is None or row.value is None:
        return f"{chance}."
    if row.value > row.null_high:
        return f"{chance}: this is beyond its 95 % interval."
    if row.value < row.null_low:
        return f"{chance}: this is below its 95 % interval."
    return f"{chance}: this is within its 95 % interval."


def _percent(value: float) -> str:
    return (
        charts.number(100 * value).rstrip("0").rstrip(".") + " %"
        if abs(value) < 0.001
        else f"{100 * value:.1f} %".replace("-", "\N{MINUS SIGN}")
    )


# -- the table


def tables(report: Report) -> str:
    """For each backbone: value, interval and null of every metric and variant, with the notes they carry."""
    return "".join(_table(report, about) for about in report.backbones)


def _table(report: Report, about: dict[str, Any]) -> str:
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
    remarks = "".join(f"<li>{escape(note)}</li>" for note in notes)
    caption = (
        f"{about['label']}, {_layer_phrase(about['layer'])}: value, 95 % interval over images, and what chance gives"
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr><th scope='col'>Metric</th>{heads}"
        f"<th scope='col'>Value, interval, and null in grey</th></tr></thead><tbody>{body}</tbody></table></div>"
        + (f'<ol class="notes">{remarks}</ol>' if notes else "")
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


def layer_charts(report: Report) -> str:
    """Each metric of the raw tokens over layers; nothing if no backbone has several."""
    lines = {each["label"]: _layer_rows(report, each["label"]) for each in report.backbones}
    lines = {name: rows for name, rows in lines.items() if len({row.layer for row in rows}) > 1}
    if not lines:
        return ""
    last = max(row.layer for rows in lines.values() for row in rows) + 1
    figures = []
    for name, metric in METRICS.items():
        drawn = [
            (number, [_point(row, last) for row in rows if row.metric == name and row.value is not None])
            for number, rows in enumerate(lines.values())
        ]
        drawn = [(number, points) for number, points in drawn if len(points) > 1]
        if drawn:
            names = {p.place: "final" if p.place == last else f"{p.place:.0f}" for _, line in drawn for p in line}
            spoken = f"{metric.title} over layers: " + "; ".join(
                f"{names[p.place]} {charts.number(p.value)}" for _, line in drawn for p in line
            )
            figures.append(
                f"<figure><figcaption>{escape(metric.title)}<small>{escape(metric.better)} is better</small>"
                f"</figcaption>{charts.curves(drawn, names, spoken)}</figure>"
            )
    legend = "".join(charts.key(i, name) for i, name in enumerate(lines)) if len(lines) > 1 else ""
    return (
        "<section><h2>Over the layers</h2><p>Raw tokens of each block, numbered from 0, and after the final norm. "
        f"Bands are 95 % intervals over images, dotted lines the null. {legend}</p>"
        f'<div class="charts">{"".join(figures)}</div></section>'
    )


def _layer_rows(report: Report, backbone: str) -> list[Row]:
    return sorted(
        (row for row in report.rows if row.backbone == backbone and row.variant == "raw" and row.value is not None),
        key=lambda row: (row.layer == -1, row.layer),
    )


def _point(row: Row, last: int) -> charts.Point:
    value = float(row.value or 0)
    low, high = (value if each is None else each for each in (row.low, row.high))
    return charts.Point(last if row.layer == -1 else row.layer, value, low, high, row.null)


def position_maps(report: Report) -> str:
    """What stays at each position, for all variants and some layers."""
    figures = []
    for about in report.backbones:
        entries = matching(report.index["positions"], backbone=about["label"])
        own = [each for each in entries if each["layer"] == about["layer"]]
        others = sorted(
            (each for each in entries if each["layer"] != about["layer"]), key=lambda e: (e["layer"] == -1, e["layer"])
        )
        for entry in [*own, *others[:: max(1, -(-len(others) // _HEAT_MAPS))]]:
            values = report.arrays[entry["array"]]
            name = f"{label(entry['variant'])}, {layer_name(entry['layer'])}"
            name = f"{about['label']}, {name}" if len(report.backbones) > 1 else name
            figures.append(
                f'<figure><img class="map" src="{charts.heat(values)}" width="{values.shape[1]}" '
                f'height="{values.shape[0]}" alt="{escape(f"Norm of the mean token at each position: {name}")}">'
                f"<figcaption>{escape(name)}<small>0 to {charts.number(float(values.max()))}</small></figcaption></figure>"
            )
    if not figures:
        return ""
    return (
        "<section><h2>What stays at the position</h2><p>The mean token at each patch position while the content moves, "
        "without its mean over positions: nothing but the artifact is left. The colour is its norm, from dark (0) to "
        f'bright (the largest of that map).</p><div class="maps">{"".join(figures)}</div></section>'
    )


def norm_charts(report: Report) -> str:
    """Histograms of token norms at each backbone's own layer."""
    figures = []
    for about in report.backbones:
        order = variants_of(report, about["label"])
        entries = matching(report.index["norms"], backbone=about["label"], layer=about["layer"])
        counts = [(order.index(e["variant"]), report.arrays[e["array"]], e["edges"]) for e in entries]
        if counts:
            legend = "".join(charts.key(number, label(order[number]), line=True) for number, _, _ in counts)
            spoken = "; ".join(
                f"{label(order[number])}: {int(values.sum())} tokens, median {charts.number(_median(values, edges))}"
                for number, values, edges in counts
            )
            figures.append(
                f"<figure><figcaption>{escape(about['label'])} {legend}</figcaption>"
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


def gallery(report: Report, shown: Sequence[int]) -> str:
    """Photographs beside their token maps in colours, at each backbone's own layer."""
    names, parts = image_names(report), []
    for about in report.backbones:
        entries = matching(report.index["maps"], backbone=about["label"], layer=about["layer"])
        order = [name for name in variants_of(report, about["label"]) if any(e["variant"] == name for e in entries)]
        rows = "".join(
            _strip(report, [e for e in entries if e["image"] == image], order, image, names[image]) for image in shown
        )
        if rows and order:
            heads = "".join(f'<th scope="col">{escape(label(name))}</th>' for name in order)
            caption = f"{about['label']}, {_layer_phrase(about['layer'])}"
            parts.append(
                f'<div class="scroll" tabindex="0" role="region" aria-label="Features in colour: {escape(caption)}">'
                f'<table class="gallery"><caption>{escape(caption)}</caption><thead><tr><th scope="col">image</th>{heads}'
                f"</tr></thead><tbody>{rows}</tbody></table></div>"
            )
    if not parts:
        return ""
    return (
        "<section><h2>Features in colour</h2><p>Three principal components as red, green and blue, the same for the raw "
        "and the cleaned features of an image: equal colours are alike features. Artifact and residual have colours of "
        f"their own. Raw = F + G + h.</p>{''.join(parts)}</section>"
    )


def _strip(report: Report, entries: Sequence[dict[str, Any]], order: Sequence[str], image: int, name: str) -> str:
    maps = {entry["variant"]: torch.from_numpy(report.arrays[entry["array"]].astype(np.float32)) for entry in entries}
    together = [each for each in order if each in maps and each not in _SUBTRACTED]
    colours = dict(zip(together, pca_colours([maps[each] for each in together]), strict=True)) if together else {}
    colours |= {each: pca_colours(maps[each])[0] for each in maps if each in _SUBTRACTED}
    cells = [f'<td><img data-photo="{image}" alt="{escape(name)}"></td>']
    for variant in order:
        found = colours.get(variant)
        if found is None:
            cells.append("<td></td>")
        else:
            alt = escape(f"{label(variant)} features of {name} in colour")
            cells.append(
                f'<td><img class="map" src="{charts.png(found.numpy())}" width="{found.shape[1]}" '
                f'height="{found.shape[0]}" alt="{alt}"></td>'
            )
    return f"<tr>{''.join(cells)}</tr>"


# -- how


def method(report: Report, reduced: Sequence[str]) -> str:
    """What it took, which weights, which settings, and what the page leaves out."""
    seconds = report.seconds
    facts = [
        (
            each["label"],
            f"{each['name']}, {_layer_phrase(each['layer'])}, patches of {each['patch_size'][0]} x {each['patch_size'][1]} "
            f"pixels, images of {each['image_size'][0]} x {each['image_size'][1]}, {each['feature_dim']} channels, "
            f"weights {str(each['weights_sha256'])[:12]}",
        )
        for each in report.backbones
    ]
    facts.append(
        (
            "time",
            f"backbone {seconds['forward']:.1f} s, decompositions besides it {seconds['fields']:.1f} s, denoisers "
            f"{seconds['denoisers']:.1f} s, metrics and reading {seconds['metrics']:.1f} s",
        )
    )
    facts.append(("settings", ", ".join(f"{name} {value}" for name, value in report.config.items())))
    facts.append(("in this page", " ".join(reduced)))
    listed = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return (
        "<section><h2>How it was measured</h2><p>Smooth features please most of these metrics: read them beside a score "
        "that needs labels (<code>dvt probe</code>). Chance is the same metric where there is nothing to find: positions "
        "shuffled, or noise of the same mean and spread. table.csv beside report.json has every number.</p>"
        f'<dl class="facts">{listed}</dl></section>'
    )


def _layer_phrase(layer: int) -> str:
    return "final layer" if layer == -1 else f"block {layer}"


def _own_rows(report: Report, about: dict[str, Any]) -> list[Row]:
    return [row for row in report.rows if row.backbone == about["label"] and row.layer == about["layer"]]
