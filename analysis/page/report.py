"""Write one HTML page of an analysis: numbers, charts, galleries, features to point at; nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

import dvt
from dvt.analysis.measure.sample import spread
from dvt.analysis.page import charts, sections
from dvt.analysis.results import Report
from dvt.errors import ConfigError
from dvt.files import whole_file

_ASSETS = Path(__file__).parent / "assets"
# A page of 8 MB, of which charts, words and script take well under one.
_ROOM = 7_200_000
# Fewer directions than this show hardly anything: then images are left out.
_LEAST_DIRECTIONS = 8


@dataclass(frozen=True)
class PageBudget:
    """Hold what of a report's pictures fits into a page.

    Args:
        images: those shown, by their number in the report.
        directions: of the token maps, the first ones, which have most of the variance.
        left_out: images with token maps that are not shown.
        of: directions that the report has.
    """

    images: list[int]
    directions: int
    left_out: int
    of: int


def write_report(folder: str | Path, out: str | Path) -> Path:
    """Make one self-contained page of what :meth:`dvt.analysis.Report.save` wrote.

    Args:
        folder: with report.json and data.npz.
        out: the HTML file; folders that it needs are made, a file there is replaced, at once.

    Returns:
        out. The page fetches nothing and, for pictures, stays below 8 MB; it says what was left out for that.

    Raises:
        ConfigError: the folder holds no report, a damaged one, or the page cannot be written.
    """
    page, out = render(Report.load(folder)), Path(out)
    try:
        with whole_file(out) as part:
            part.write_text(page, encoding="utf-8")
    except ConfigError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise ConfigError(f"cannot write the page to {str(out)!r}: {reason}; name a file") from error
    return out


def render(report: Report) -> str:
    """Write the page as HTML.

    Raises:
        ConfigError: arrays or entries are not what :mod:`dvt.analysis.results` says.
    """
    try:
        _check(report)
        report, zeros = _without_zeros(report)
        fit = fitting(report)
        body = {
            "summary": sections.summary(report),
            "tables": sections.tables(report),
            "figures": sections.layer_charts(report) + sections.position_maps(report) + sections.norm_charts(report),
            "gallery": sections.gallery(report, fit.images),
            "method": sections.method(report, [*_reduced(report, fit), *zeros]),
        }
        data = json.dumps(_data(report, fit), allow_nan=False, separators=(",", ":"))
    except ConfigError:
        raise
    except Exception as error:  # of numbers that fit their types and nothing else
        raise ConfigError(
            f"the report does not hold what its schema says ({type(error).__name__}: {error}); make it again with "
            "`dvt analyze IMAGES... --out DIR`"
        ) from error
    style, script = ((_ASSETS / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    title = "Artifacts in " + ", ".join(each["label"] for each in report.backbones)
    return Template((_ASSETS / "report.html").read_text(encoding="utf-8")).substitute(
        body,
        title=escape(title),
        heading=escape(title).replace("_", "_<wbr>"),
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        viewer="" if fit.images else "hidden",
        version=escape(dvt.__version__),
        # In a script element only "<" could end the data early.
        data=data.replace("<", "\\u003c"),
        style=style,
        script=script,
    )


def fitting(report: Report) -> PageBudget:
    """Find how many directions, and if those get too few how many images, a page of 8 MB can hold."""
    pixels = {entry["image"]: entry["array"] for entry in report.index["jpegs"]}
    patches: dict[int, int] = {}
    for entry in report.index["maps"]:
        height, width, _ = report.arrays[entry["array"]].shape
        patches[entry["image"]] = patches.get(entry["image"], 0) + height * width
    images = [image for image in pixels if image in patches]
    most = min((report.arrays[entry["array"]].shape[2] for entry in report.index["maps"]), default=0)
    for count in range(len(images), 0, -1):
        kept = [images[i] for i in spread(len(images), count)]
        total = sum(patches[image] for image in kept)
        # Base64 makes 4 bytes of 3; a gallery takes at most 3 bytes a patch, an entry's fields about 150.
        bytes_left = _ROOM * 3 // 4 - sum(report.arrays[pixels[image]].size for image in kept) - 3 * total
        bytes_left -= 150 * len(report.index["maps"])
        directions = min(most, bytes_left // total)
        if directions >= min(most, _LEAST_DIRECTIONS):
            return PageBudget(kept, directions, len(images) - count, most)
    return PageBudget([], 0, len(images), most)


def _without_zeros(report: Report) -> tuple[Report, list[str]]:
    """Leave out terms that are zero, which show nothing, and return a sentence that says so."""
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
    said = f"The {names} of {images} of {len({e['image'] for e in report.index['maps']})} images is zero and not shown."
    return replace(report, index={**report.index, "maps": kept}), [said]


def _reduced(report: Report, fit: PageBudget) -> list[str]:
    if not fit.of:
        return ["The analysis kept no token maps (its setting shown is 0), so there is nothing to point at."]
    channels = ", ".join(str(each["feature_dim"]) for each in report.backbones)
    said = [
        f"Token maps have 8 bits in {fit.directions} of {channels} directions, those with most of the variance, and no "
        "mean over positions; cosines are of these."
    ]
    if fit.directions < fit.of:
        said.append(f"The report has {fit.of} directions; the others are left out to stay below 8 MB.")
    if fit.left_out:
        said.append(f"{fit.left_out} of {fit.left_out + len(fit.images)} images are left out to stay below 8 MB.")
    return said


def _check(report: Report) -> None:
    """Refuse arrays that the page would draw as nonsense."""
    kinds = {"jpegs": (np.uint8, 1), "maps": (np.int8, 3), "positions": (np.floating, 2), "norms": (np.integer, 1)}
    for kind, (dtype, dims) in kinds.items():
        for entry in report.index[kind]:
            name = entry["array"]
            if name not in report.arrays:
                raise ConfigError(f"the report misses the array {name!r} of {kind}")
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
    """Collect what the script needs: photographs, and token maps in the directions that fit."""
    names = sections.image_names(report)
    jpegs = {entry["image"]: report.arrays[entry["array"]] for entry in report.index["jpegs"]}
    order = {each["label"]: sections.variants_of(report, each["label"]) for each in report.backbones}
    return {
        "images": [
            {"number": image, "name": names[image], "size": _size(jpegs[image]), "jpeg": _base64(jpegs[image])}
            for image in fit.images
        ],
        "backbones": [
            {"label": each["label"], "layer": each["layer"], "variants": order[each["label"]]}
            for each in report.backbones
        ],
        "labels": {variant: sections.label(variant) for variants in order.values() for variant in variants},
        "maps": [_map(report, entry, fit.directions) for entry in report.index["maps"] if entry["image"] in fit.images],
        "colours": _base64((charts.viridis() * 255).round().astype(np.uint8)),
    }


def _map(report: Report, entry: dict[str, Any], directions: int) -> dict[str, Any]:
    values = report.arrays[entry["array"]]
    fields = {name: entry[name] for name in ("image", "backbone", "layer", "variant")}
    kept = np.ascontiguousarray(values[..., :directions])
    return {**fields, "scale": float(entry["scale"]), "shape": list(kept.shape), "values": _base64(kept)}


def _size(jpeg: np.ndarray) -> Sequence[int]:
    from PIL import Image

    with Image.open(io.BytesIO(jpeg.tobytes()), formats=("JPEG",)) as image:
        return image.size


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _digest(text: str) -> str:
    """Hash a script or style, so that the page allows this text and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
