"""Write one self-contained HTML page of an analysis: numbers, charts, galleries and an interactive viewer."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

import dvt
from dvt.analysis.findings import drawn_at_centres, matching
from dvt.analysis.measure.sample import spread
from dvt.analysis.page import charts, sections
from dvt.analysis.results import Report
from dvt.errors import ConfigError
from dvt.files import whole_file
from dvt.text import counted

_ASSETS = Path(__file__).parent / "assets"
# The size for data in a page of 8 MB; charts, text and script take much less than 1 MB.
_ROOM = 7_200_000
# With fewer directions, maps show hardly anything: rather leave out images.
_LEAST_DIRECTIONS = 8


@dataclass(frozen=True)
class PageBudget:
    """Hold the images and directions of a report that fit into a page.

    Args:
        images: indices in the report of the images to show.
        directions: number of directions of the token maps to show, those with most variance.
        left_out: number of images with token maps that are not shown.
        of: number of directions in the report.
    """

    images: list[int]
    directions: int
    left_out: int
    of: int


def write_report(folder: str | Path, out: str | Path) -> Path:
    """Make one self-contained page from a folder written by :meth:`dvt.analysis.Report.save`.

    Args:
        folder: the folder with report.json and data.npz.
        out: the HTML file; missing folders are created, an existing file is replaced atomically.

    Returns:
        `out`. The page needs no network and stays below 8 MB; it states what was left out for that.

    Raises:
        ConfigError: the folder holds no report or a damaged one, or the page cannot be written.
    """
    page, out = render(Report.load(folder)), Path(out)
    try:
        with whole_file(out) as part:
            part.write_text(page, encoding="utf-8")
    except ConfigError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise ConfigError(f"cannot write the page to {str(out)!r}: {reason}; name a file") from error
    return out


@dataclass(frozen=True)
class PageWords:
    """Hold the words of a page on which nothing was measured.

    Args:
        title: plain text.
        lead: HTML, what the page shows.
    """

    title: str
    lead: str


def render(report: Report, words: PageWords | None = None) -> str:
    """Write the page as HTML; with `words`, without the numbers and how they were measured.

    Raises:
        ConfigError: arrays or entries are not as :mod:`dvt.analysis.results` describes them.
    """
    try:
        _check(report)
        report, zeros = _without_zeros(report)
        fit = fitting(report)
        left_out = [*_reduced(report, fit), *zeros]
        body = {
            "summary": words.lead if words else sections.summary(report),
            "tables": "" if words else f"<section><h2>The numbers</h2>{sections.tables(report)}</section>",
            "figures": sections.layer_charts(report) + sections.position_maps(report) + sections.norm_charts(report),
            "gallery": sections.gallery(report, fit.images),
            "method": f"<p>{escape(' '.join(left_out))}</p>" if words else sections.method(report, left_out),
        }
        data = json.dumps(_data(report, fit), allow_nan=False, separators=(",", ":"))
    except ConfigError:
        raise
    except Exception as error:  # values of the right types may still contradict each other
        raise ConfigError(
            f"the report contradicts its schema ({type(error).__name__}: {error}); make it again with "
            "`dvt analyze IMAGES... --out DIR`"
        ) from error
    style, script = ((_ASSETS / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    title = words.title if words else "Artifacts in " + ", ".join(each["label"] for each in report.backbones)
    return Template((_ASSETS / "report.html").read_text(encoding="utf-8")).substitute(
        body,
        title=escape(title),
        heading=escape(title).replace("_", "_<wbr>"),
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        viewer="" if fit.images else "hidden",
        version=escape(dvt.__version__),
        # In a script element, only a "<" could end the data too early.
        data=data.replace("<", "\\u003c"),
        style=style,
        script=script,
    )


def fitting(report: Report) -> PageBudget:
    """Find how many directions fit into a page of 8 MB; if too few do, find how many images to leave out."""
    pixels = {entry["image"]: entry["array"] for entry in report.index["jpegs"]}
    own = {(each["label"], each["layer"]) for each in report.backbones}
    patches: Counter[int] = Counter()
    drawn: Counter[int] = Counter()  # of them those of a gallery
    for entry in report.index["maps"]:
        height, width, _ = report.arrays[entry["array"]].shape
        patches[entry["image"]] += height * width
        drawn[entry["image"]] += height * width * ((entry["backbone"], entry["layer"]) in own)
    images = [image for image in pixels if image in patches]
    most = min((report.arrays[entry["array"]].shape[2] for entry in report.index["maps"]), default=0)
    for count in range(len(images), 0, -1):
        kept = [images[i] for i in spread(len(images), count)]
        total = sum(patches[image] for image in kept)
        # Base64 makes 4 bytes of 3; a gallery takes at most 5 bytes per patch (3 where none overlap), an entry's fields
        # about 150.
        bytes_left = _ROOM * 3 // 4 - sum(report.arrays[pixels[image]].size for image in kept)
        bytes_left -= 5 * sum(drawn[image] for image in kept)
        bytes_left -= 150 * len(report.index["maps"])
        directions = min(most, bytes_left // total)
        if directions >= min(most, _LEAST_DIRECTIONS):
            return PageBudget(kept, directions, len(images) - count, most)
    return PageBudget([], 0, len(images), most)


def _without_zeros(report: Report) -> tuple[Report, list[str]]:
    """Leave out the maps of terms that are zero; return the rest, and a sentence about those left out."""
    zero = [
        entry
        for entry in report.index["maps"]
        if entry["variant"] in sections.SUBTRACTED and not report.arrays[entry["array"]].any()
    ]
    if not zero:
        return report, []
    kept = [entry for entry in report.index["maps"] if entry not in zero]
    names = ", ".join(sorted({sections.label(entry["variant"]) for entry in zero}))
    images = len({entry["image"] for entry in zero})
    total = len({entry["image"] for entry in report.index["maps"]})
    said = f"The {names} of {images} of {counted(total, 'image')} is zero and not shown."
    left = {(entry["backbone"], entry["variant"]) for entry in kept}
    gone = {(entry["backbone"], entry["variant"]) for entry in zero} - left  # zero in all images
    norms = [entry for entry in report.index["norms"] if (entry["backbone"], entry["variant"]) not in gone]
    return replace(report, index={**report.index, "maps": kept, "norms": norms}), [said]


def _reduced(report: Report, fit: PageBudget) -> list[str]:
    if not fit.of:
        return ["The analysis kept no token maps (its setting `shown` is 0), so there is no interactive viewer."]
    channels = ", ".join(str(each["feature_dim"]) for each in report.backbones)
    said = [
        f"Token maps are stored with 8 bits, in {fit.directions} of {channels} directions (those with most of the "
        "variance), without their mean over positions; cosines are computed from these."
    ]
    if fit.directions < fit.of:
        said.append(f"The report has {fit.of} directions; the others are left out to stay below 8 MB.")
    if fit.left_out:
        images = counted(fit.left_out + len(fit.images), "image")
        said.append(f"{fit.left_out} of {images} left out to stay below 8 MB.")
    return said


def _check(report: Report) -> None:
    """Refuse arrays whose shapes or types do not fit their kind."""
    kinds = {"jpegs": (np.uint8, 1), "maps": (np.int8, 3), "positions": (np.floating, 2), "norms": (np.integer, 1)}
    for kind, (dtype, dims) in kinds.items():
        for entry in report.index[kind]:
            name = entry["array"]
            if name not in report.arrays:
                raise ConfigError(f"the report lacks the array {name!r} of {kind}")
            array = report.arrays[name]
            if not np.issubdtype(array.dtype, dtype) or array.ndim != dims or not array.size:
                raise ConfigError(
                    f"the array {name!r} of {kind} has shape {array.shape} of {array.dtype}, not {dims} dimensions of "
                    f"{dtype.__name__}"
                )
            image, layer = entry.get("image", 0), entry.get("layer", 0)
            if not isinstance(layer, int) or image not in range(max(1, len(report.images))):
                raise ConfigError(f"the array {name!r} belongs to image {image} of {len(report.images)}, layer {layer}")


def _data(report: Report, fit: PageBudget) -> dict[str, Any]:
    """Collect the data for the script: photographs, and token maps in the directions that fit."""
    names = sections.image_names(report)
    jpegs = {entry["image"]: report.arrays[entry["array"]] for entry in report.index["jpegs"]}
    order = {each["label"]: sections.variants_of(report, each["label"]) for each in report.backbones}
    return {
        "images": [
            {
                "number": image,
                "name": names[image],
                "size": sections.photo_size(jpegs[image])[::-1],
                "jpeg": _base64(jpegs[image]),
            }
            for image in fit.images
        ],
        "backbones": [
            {
                "label": each["label"],
                "layer": each["layer"],
                "variants": order[each["label"]],
                "cells": _cells(report, each, fit.images),
            }
            for each in report.backbones
        ],
        "labels": {variant: sections.label(variant) for variants in order.values() for variant in variants},
        "maps": [_map(report, entry, fit.directions) for entry in report.index["maps"] if entry["image"] in fit.images],
        "colours": _base64((charts.viridis() * 255).round().astype(np.uint8)),
    }


def _cells(report: Report, about: dict[str, Any], images: Sequence[int]) -> dict[str, list[list[int]]]:
    """List the rows and the columns of each grid that its picture shows from pixel to pixel, if patches overlap."""
    found = {}
    for entry in matching(report.index["maps"], backbone=about["label"]):
        height, width, _ = report.arrays[entry["array"]].shape
        if entry["image"] in images and f"{height}x{width}" not in found:
            places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
            if (drawn := drawn_at_centres(about, places)) is not places:
                found[f"{height}x{width}"] = [drawn[:, 0, 0].tolist(), drawn[0, :, 1].tolist()]
    return found


def _map(report: Report, entry: dict[str, Any], directions: int) -> dict[str, Any]:
    values = report.arrays[entry["array"]]
    fields = {name: entry[name] for name in ("image", "backbone", "layer", "variant")}
    kept = np.ascontiguousarray(values[..., :directions])
    return {**fields, "scale": float(entry["scale"]), "shape": list(kept.shape), "values": _base64(kept)}


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _digest(text: str) -> str:
    """Hash a script or style, so that the page allows this text and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
