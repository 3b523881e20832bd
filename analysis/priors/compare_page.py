"""Write the page of a comparison: a table, curves against steps, and samples beside the held-out images."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from dvt.analysis.pictures import save
from dvt.files import whole_file
from dvt.text import counted

_ROWS = 8  # held-out images that are shown
_STYLE = "body{font:15px sans-serif;max-width:75em;margin:2em auto}td,th{padding:.2em .7em;text-align:right}"


def write_page(report: dict[str, Any], pictures: Mapping[str, Tensor], out: Path) -> Path:
    """Write page.html, curves.png and samples.png into a folder.

    Args:
        report: the report of :func:`dvt.analysis.priors.compare.compare_priors`.
        pictures: for each column (n, 3, S, S) in [0, 1].
        out: the folder.
    """
    images = [_curves(report, out / "curves.png"), save_samples(pictures, out / "samples.png")]
    shown = "".join(
        f'<p><img style="max-width:100%" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in images
    )
    counts, seeds = report["images"], report["config"]["seeds"]
    words = (
        f"One prior for each kind of tokens and seed ({seeds}), {counted(counts['training'], 'image')} to learn from "
        f"and {counts['held_out']} held out, {report['config']['steps']} steps. Mean and 95 % t interval over seeds; "
        "differences to raw are paired by seed. Change: mean of the curve's last quarter minus that of the quarter "
        "before. Cosines compare the yardstick's features of sample and truth, without the training images' mean."
    )
    tables = "".join(_table(report, name) for name in next(iter(report["kinds"].values())) if "others" not in name)
    with whole_file(out / "page.html") as part:
        part.write_text(
            '<!doctype html><meta charset="utf-8"><title>Priors conditioned on other tokens</title>'
            f"<style>{_STYLE}</style>"
            f"<h1>Priors conditioned on other tokens</h1><p>{words}{tables}{shown}",
            encoding="utf-8",
        )
    return out / "page.html"


def with_interval(value: dict[str, float]) -> str:
    """Write a mean with its interval.

    >>> with_interval({"mean": 0.5, "half": 0.01})
    '0.500 +- 0.010'
    """
    return f"{value['mean']:.3f} +- {value['half']:.3f}"


def _table(report: dict[str, Any], name: str) -> str:
    columns = ("best", "best_over_raw", "last", "last_over_raw")
    head = "".join(f"<th>{escape(each.replace('_', ' '))}" for each in ("conditioned on", *columns, "change"))
    rows = []
    for kind, measures in report["kinds"].items():
        found = measures[name]
        cells = "".join(f"<td>{with_interval(found[each])}" for each in columns)
        rows.append(f"<tr><th>{escape(kind)}{cells}<td>{found['change_in_last_quarter']:+.4f}")
    return f"<h2>{escape(name.replace('_', ' '))}</h2><table><tr>{head}{''.join(rows)}</table>"


def _curves(report: dict[str, Any], path: Path) -> Path:
    from matplotlib.figure import Figure

    names = [name for name in next(iter(report["kinds"].values())) if "others" not in name]
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained", facecolor="white")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, (kind, measures) in enumerate(report["kinds"].items()):
            points, steps = measures[name]["curve"], measures[name]["steps"]
            mean, half = ([point[each] for point in points] for each in ("mean", "half"))
            (line,) = axis.plot(steps, mean, label=kind, linestyle=("-", "--", ":")[number % 3])
            low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
        axis.set_title(name.replace("_", " "), fontsize=10, loc="left")
        axis.set_xlabel("steps")
        every = [point["mean"] for measures in report["kinds"].values() for point in measures[name]["curve"]]
        room = 0.05 * (max(every) - min(every) or 1.0)
        axis.set_ylim(min(every) - room, max(every) + room)
    axis.legend(fontsize=8)
    return save(figure, path)


def save_samples(pictures: Mapping[str, Tensor], path: Path) -> Path:
    """Write columns of pictures (n, 3, S, S), side by side and named, to a .png file."""
    from matplotlib.figure import Figure

    count = min(_ROWS, *(len(each) for each in pictures.values()))
    figure = Figure(figsize=(1.2 * len(pictures), 1.2 * count + 0.4), layout="constrained", facecolor="white")
    axes = figure.subplots(count, len(pictures), squeeze=False)
    for column, (name, values) in enumerate(pictures.items()):
        for row in range(count):
            axes[row, column].imshow(values[row].permute(1, 2, 0).float().numpy(), interpolation="nearest")
            axes[row, column].set_axis_off()
        axes[0, column].set_title(name, fontsize=8, loc="left")
    return save(figure, path)
