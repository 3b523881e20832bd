"""The products of stage one: is `removed` faithful and harmless, does `ensembled` serve labels, and at what cost.

python benchmarks/products.py planted faithful labels seconds --natural DIR --segments DIR
python benchmarks/products.py pictures --natural DIR --sheet docs/products.png

planted   relative error on a backbone of pixels whose F and G are known, ten photographs and seeds
faithful  cosine to the mean of real windows shifted by whole patches (docs/method.md), the image's own window left out
labels    same-segment AUC: does the cosine of two tokens tell pairs of one human segment, at equal distance
seconds   of each product as `dvt denoise` makes it, over those of the blend in float32, photograph by photograph
pictures  a sheet of photographs, raw tokens, both products and the artifact, in joint colours

Each section prints a table with 95 % t intervals over images; the last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata
from torch import Tensor

import dvt
from dvt import grids
from dvt.backbones import Backbone, choose_precision, load_backbone
from dvt.fields.config import DenoiseConfig, ShiftConfig
from dvt.fields.equations import solve_artifact
from dvt.fields.image import TokenViews, denoise_image
from dvt.fields.planted import PlantedBackbone, PlantedBackboneConfig, relative_error
from dvt.fields.shifts import ShiftSolver
from dvt.images import load_image
from tables import described_machine, interval, table

WINDOW = 224
Scores = dict[str, list[float]]


def pick(files: list[Path], count: int) -> list[Path]:
    """`count` of the files, evenly spaced."""
    return [files[k * len(files) // count] for k in range(min(count, len(files)))]


def summary(scores: Scores, base: str) -> list[dict[str, Any]]:
    """Mean and interval of each estimate, and of its paired difference to another."""
    rows = []
    for name, values in scores.items():
        own, gain = interval(values), interval([a - b for a, b in zip(values, scores[base], strict=True)])
        row = {"estimate": name, "mean": own["mean"], "+-": own["half"]}
        rows.append(row | {"gain": gain["mean"], "of +-": gain["half"]})
    return rows


def estimates(
    backbone: Backbone, pixels: Tensor, dtype: str, designs: dict[str, DenoiseConfig]
) -> Iterator[tuple[str, Tensor, float]]:
    """(name, map (h, w, C), seconds) of each design, raw and both terms of the first before it."""
    for name, config in designs.items():
        start = time.perf_counter()
        parts = denoise_image(backbone, pixels, replace(config, dtype=dtype)).decomposition
        seconds = time.perf_counter() - start
        if name == next(iter(designs)):
            yield "raw", parts.raw, 0.0
        yield name, parts.semantic, seconds
        if name.startswith(("blend", "removed")):
            yield f"{name}: F", parts.field, seconds
            yield f"{name}: raw - G", parts.raw - parts.artifact, seconds


DESIGNS = {
    "blend, 49": DenoiseConfig(product="blend"),
    "removed, 17": DenoiseConfig(product="removed"),
    "removed, 49": DenoiseConfig(product="removed", views=48),
    "ensembled, 49": DenoiseConfig(product="ensembled"),
}


def chosen_designs(designs: dict[str, DenoiseConfig], options: argparse.Namespace) -> dict[str, DenoiseConfig]:
    """Those that were asked for, and the blend, which the others are compared with."""
    return {k: v for k, v in designs.items() if not options.designs or k in options.designs or k == "blend, 49"}


# -- planted ----------------------------------------------------------------------------------------------------------


def planted(options: argparse.Namespace) -> dict[str, Any]:
    """Errors on planted backbones without and with context, the gate's findings, and two controls."""
    files = pick(sorted(options.natural.glob("*.jpg")), options.planted)
    rows = []
    for context in (0.0, 0.5):
        for amplitude in (0.0, 0.1, 0.65, 2.0):
            scores, found = defaultdict(list), 0
            for seed, path in enumerate(files):
                config = PlantedBackboneConfig(artifact=amplitude, context=context, seed=seed)
                errors, gate = planted_errors(config, load_image(path))
                found += gate
                for name, value in errors.items():
                    scores[name].append(value)
            row = {"context": context, "G": amplitude, "found": f"{found}/{len(files)}"}
            for name, values in scores.items():
                each = interval(values)
                row |= {name: each["mean"], f"{name} +-": each["half"], f"{name} max": max(values)}
            rows.append(row)
    table(f"Planted backbone, {len(files)} photographs and seeds: relative errors", rows)
    return {"rows": rows}


def planted_errors(config: PlantedBackboneConfig, pixels: Tensor) -> tuple[dict[str, float], bool]:
    """Relative errors by estimate, and whether the test found an artifact."""
    backbone = PlantedBackbone(pixels, config)
    views = TokenViews(backbone, pixels, DenoiseConfig(product="removed").views)
    batches = list(views)
    truth = backbone.semantic(views.views.image[None])[0]
    raw = views.whole.patches[0]
    blend = denoise_image(backbone, pixels, DenoiseConfig(product="blend")).decomposition.semantic
    fit = ShiftSolver().fit(batches)
    tokens, coords = (torch.cat(part) for part in zip(*batches, strict=True))
    wrong = coords[torch.randperm(len(coords), generator=torch.Generator().manual_seed(config.seed))]
    lost = ShiftSolver().fit([(tokens, wrong)])
    errors = {
        "raw": relative_error(raw, truth),
        "blend": relative_error(blend, truth),
        "removed": relative_error(fit.decompose(raw, views.coords).semantic, truth),
        "shuffled": relative_error(lost.decompose(raw, views.coords).semantic, truth),
    }
    return errors, fit.found


# -- outliers ---------------------------------------------------------------------------------------------------------


def outliers(options: argparse.Namespace) -> dict[str, Any]:
    """Errors of tokens that are no outliers themselves, beside outliers on a share of the flat fifth of the patches."""
    files = pick(sorted(options.natural.glob("*.jpg")), options.planted)
    kinds = [(0.0, False), *((share, flicker) for flicker in (False, True) for share in (0.2, 0.5, 0.8))]
    scores: dict[tuple[float, bool], list[dict[str, float]]] = {kind: [] for kind in kinds}
    for seed, path in enumerate(files):
        pixels = load_image(path)
        for share, flicker in kinds:
            config = PlantedBackboneConfig(context=0.5, noise=0.1, outliers=share, flicker=flicker, seed=seed)
            scores[share, flicker].append(outlier_errors(config, pixels))
    rows = []
    for (share, flicker), found in scores.items():
        row: dict[str, Any] = {"of the flat fifth": share, "kind": "flickering" if flicker else "persistent"}
        for name in found[0]:
            clean = [each[name] for each in scores[0.0, False]]
            values, ratios = [each[name] for each in found], [e[name] / c for e, c in zip(found, clean, strict=True)]
            each = interval(values)
            row |= {name: each["mean"], f"{name} +-": each["half"]}
            if name != "raw":
                row |= {f"{name} / clean, worst": max(ratios)}
        rows.append(row)
    table(f"Planted outliers, {len(files)} photographs and seeds: relative errors of the other tokens", rows)
    return {"rows": rows}


def outlier_errors(config: PlantedBackboneConfig, pixels: Tensor) -> dict[str, float]:
    """Relative errors by estimate of the tokens that are no outliers in the whole image."""
    backbone = PlantedBackbone(pixels, config)
    views = TokenViews(backbone, pixels, DenoiseConfig().views)
    batches = list(views)
    whole, raw = views.views.image[None], views.whole.patches[0]
    truth, plain = backbone.semantic(whole)[0], ~backbone.outliers(whole)[0]
    errors = {"raw": relative_error(raw[plain][None], truth[plain][None])}
    for name, robust in (("removed", True), ("removed, not robust", False)):
        fit = ShiftSolver(ShiftConfig(robust=robust)).fit(batches)
        errors[name] = relative_error(fit.decompose(raw, views.coords).semantic[plain][None], truth[plain][None])
    return errors


# -- faithful ---------------------------------------------------------------------------------------------------------


def faithful(options: argparse.Namespace) -> dict[str, Any]:
    """Cosine to the shift target, both centred; the shared artifact comes from photographs that are not scored."""
    backbone = load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    files = sorted(options.natural.glob("bsds_*.jpg"))
    chosen = pick(files, options.images)
    shared = shared_artifact(backbone, [path for path in files if path not in chosen], options.dtype)
    scores, seconds = defaultdict(list), defaultdict(list)
    for path in chosen:
        pixels = load_image(path)
        corner = [(side - WINDOW) // 32 * 16 for side in pixels.shape[1:]]
        target = shift_target(backbone, pixels, corner, shared, options.dtype)
        window = pixels[:, corner[0] : corner[0] + WINDOW, corner[1] : corner[1] + WINDOW].contiguous()
        for name, each, spent in estimates(backbone, window, options.dtype, chosen_designs(DESIGNS, options)):
            scores[name].append(centred_cosine(each, target))
            seconds[name].append(spent)
            if name == "raw":
                scores["raw - shared G"].append(centred_cosine(each - shared, target))
    rows = summary(scores, "blend, 49")
    table(f"Cosine to the shift target, {len(chosen)} windows; gain over blend, 49", rows)
    return {"rows": rows, "seconds": {name: float(np.median(each)) for name, each in seconds.items()}, "each": scores}


def shared_artifact(backbone: Backbone, files: list[Path], dtype: str) -> Tensor:
    """(h, w, C) of the central windows of some photographs, by the two-way model."""
    config, solver, total = DenoiseConfig(product="removed", views=12), ShiftSolver(), None
    for path in files:
        pixels = load_image(path)
        top, left = ((side - WINDOW) // 32 * 16 for side in pixels.shape[1:])
        window = pixels[:, top : top + WINDOW, left : left + WINDOW]
        part = solver.artifact_equations(TokenViews(backbone, window, config.views, dtype))
        total = part if total is None else (total[0] + part[0], total[1] + part[1])
    return solve_artifact(*total, solver.config.ridge).float().view(*backbone.grid((WINDOW, WINDOW)), -1)


@torch.no_grad()
def shift_target(backbone: Backbone, pixels: Tensor, corner: list[int], shared: Tensor, dtype: str) -> Tensor:
    """(h, w, C) the mean of token - shared G over real windows at most 3 patches off along the shorter side of the
    photograph and 5 along the longer, the window at the corner left out."""
    patch = backbone.patch_size[0]
    reach = torch.tensor([5, 3] if pixels.shape[1] > pixels.shape[2] else [3, 5])
    corners = grids.window_corners(tuple(pixels.shape[1:]), (WINDOW, WINDOW), backbone.patch_size)
    offsets = (corners - torch.tensor(corner)) // patch
    offsets = offsets[(offsets.abs() <= reach).all(1) & (offsets != 0).any(1)]
    height, width = shared.shape[:2]
    total, count = torch.zeros_like(shared), torch.zeros(height, width, 1)
    for part in offsets.split(32):
        starts = (torch.tensor(corner) + patch * part).tolist()
        windows = torch.stack([pixels[:, y : y + WINDOW, x : x + WINDOW] for y, x in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            tokens = backbone(windows).patches.float() - shared
        for (down, right), each in zip(part.tolist(), tokens, strict=True):
            rows = slice(max(0, down), min(height, height + down))
            columns = slice(max(0, right), min(width, width + right))
            total[rows, columns] += each[max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
            count[rows, columns] += 1
    return total / count


def centred_cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of two maps after removing each one's mean over positions."""
    one, other = (each - each.mean((0, 1)) for each in (one, other))
    return float((one * other).sum() / one.norm() / other.norm())


# -- labels -----------------------------------------------------------------------------------------------------------

BINS = ((1, 2), (2, 4), (4, 8), (8, 16))


def labels(options: argparse.Namespace) -> dict[str, Any]:
    """Same-segment AUC of all segmented photographs."""
    backbone = load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    small = DenoiseConfig(product="ensembled")
    designs = DESIGNS | {
        "ensembled, 97": DenoiseConfig(product="ensembled", views=96),
        "ensembled, 49, unmirrored": replace(small, views=replace(small.views, flip=0.0)),
    }
    designs = chosen_designs(designs, options)
    scores, files = defaultdict(list), pick(sorted(options.segments.glob("*.png")), options.segmented)
    for path in files:
        segments = torch.from_numpy(np.array(Image.open(path)).astype(np.int64))
        pixels = load_image(options.natural / f"{path.stem}.jpg")
        for name, each, _ in estimates(backbone, pixels, options.dtype, designs):
            scores[name].append(same_segment_auc(each, segments))
    rows = summary(scores, "blend, 49")
    table(f"Same-segment AUC, {len(files)} photographs; gain over blend, 49", rows)
    return {"rows": rows, "each": scores}


def same_segment_auc(tokens: Tensor, segments: Tensor) -> float:
    """How well the cosine of two centred tokens tells pairs of one segment from others, averaged over bins of distance.

    Args:
        tokens: (h, w, C).
        segments: (H, W) whole numbers; a patch has the segment of most of its pixels.
    """
    grid = (tokens.shape[0], tokens.shape[1])
    first, second, bins = pairs(grid)
    flat = torch.nn.functional.normalize((tokens - tokens.mean((0, 1))).flatten(0, 1), dim=1)
    cosine = (flat @ flat.T)[first, second].numpy()
    segment = majority(segments, grid)
    same = (segment[first] == segment[second]).numpy()
    return float(np.mean([auc(cosine[each], same[each]) for each in bins if 0 < same[each].sum() < each.sum()]))


def auc(score: np.ndarray, true: np.ndarray) -> float:
    """The probability that a true pair scores above another."""
    hits = true.sum()
    return float((rankdata(score)[true].sum() - hits * (hits + 1) / 2) / (hits * (len(true) - hits)))


@lru_cache(maxsize=4)
def pairs(grid: grids.Size) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    """All pairs of patches of a grid, and which of them lie in each bin of distance in patches."""
    first, second = torch.triu_indices(grid[0] * grid[1], grid[0] * grid[1], 1)
    down, right = (first // grid[1] - second // grid[1]).float(), (first % grid[1] - second % grid[1]).float()
    distance = torch.hypot(down, right)
    return first, second, [((distance >= low) & (distance < high)).numpy() for low, high in BINS]


def majority(segments: Tensor, grid: grids.Size) -> Tensor:
    """(h w,) the segment of most pixels of each patch."""
    rows, columns = (
        ((torch.arange(side) + 0.5) * count / side).long() for side, count in zip(segments.shape, grid, strict=True)
    )
    cell, kinds = rows[:, None] * grid[1] + columns, int(segments.max()) + 1
    counts = torch.bincount((cell * kinds + segments).flatten(), minlength=grid[0] * grid[1] * kinds)
    return counts.view(-1, kinds).argmax(1)


# -- seconds ----------------------------------------------------------------------------------------------------------


def seconds(options: argparse.Namespace) -> dict[str, Any]:
    """Processor and clock seconds of each product at its defaults, over those of the blend in float32."""
    backbone = load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    designs = {
        "blend, float32": DenoiseConfig(product="blend"),
        "removed": DenoiseConfig(product="removed", dtype="auto"),
        "ensembled": DenoiseConfig(product="ensembled", dtype="auto"),
        "ensembled, float32": DenoiseConfig(product="ensembled"),
    }
    spent: dict[str, list[tuple[float, float]]] = defaultdict(list)
    # Asked once for a job, not for each image.
    designs = {name: replace(each, dtype=choose_precision(backbone, each.dtype)) for name, each in designs.items()}
    for path in [None, *pick(sorted(options.natural.glob("*.jpg")), options.timed)]:  # the first is a warm-up
        pixels = load_image(path or sorted(options.natural.glob("*.jpg"))[0])
        for name, config in designs.items():
            start = time.process_time(), time.perf_counter()
            denoise_image(backbone, pixels, config)
            if path is not None:
                spent[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    rows = []
    for name, times in spent.items():
        base = spent["blend, float32"]
        processor, clock = (
            interval([each[k] / other[k] for each, other in zip(times, base, strict=True)]) for k in (0, 1)
        )
        row: dict[str, Any] = {"product": name, "dtype": designs[name].dtype}
        row |= {"processor seconds": float(np.median([each[0] for each in times])), "over blend": processor["mean"]}
        rows.append(row | {"+-": processor["half"], "by the clock": clock["mean"], "clock +-": clock["half"]})
    table(f"Seconds an image, {options.timed} photographs, each beside the blend", rows)
    return {"rows": rows}


# -- pictures ---------------------------------------------------------------------------------------------------------


def pictures(options: argparse.Namespace) -> dict[str, Any]:
    """A sheet: one photograph a row; the colours of a row are the same directions in all its maps."""
    from matplotlib.figure import Figure

    from dvt.analysis import pca_colours

    backbone = load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    files = pick(sorted(options.natural.glob("*.jpg")), options.pictures)
    titles = ("photograph", "raw", "removed", "ensembled", "artifact")
    sheet = Figure(figsize=(2.0 * len(titles), 1.5 * len(files)), layout="constrained")
    rows = sheet.subplots(len(files), len(titles), squeeze=False)
    for path, axes in zip(files, rows, strict=True):
        pixels = load_image(path)
        removed, ensembled = (
            denoise_image(backbone, pixels, DenoiseConfig(product=product, dtype=options.dtype)).decomposition
            for product in ("removed", "ensembled")
        )
        colours = pca_colours([removed.raw, removed.semantic, ensembled.semantic], removed.artifact)
        shape = (pixels.shape[2] / colours[0].shape[1], pixels.shape[1] / colours[0].shape[0])
        axes[0].imshow(pixels.permute(1, 2, 0).numpy())
        for axis, each in zip(axes[1:], colours, strict=True):
            axis.imshow(each.numpy(), aspect=shape[1] / shape[0], interpolation="nearest")
        for axis in axes:
            axis.set_axis_off()
    for axis, title in zip(rows[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    sheet.savefig(options.sheet, dpi=80)
    return {"files": [path.name for path in files], "sheet": str(options.sheet)}


# -- the command ------------------------------------------------------------------------------------------------------

SECTIONS = {
    "planted": planted,
    "outliers": outliers,
    "faithful": faithful,
    "labels": labels,
    "seconds": seconds,
    "pictures": pictures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=[*SECTIONS])
    parser.add_argument("--natural", type=Path, required=True, help="folder of photographs (.jpg)")
    parser.add_argument("--segments", type=Path, help="folder of segmentations (.png) of some of them")
    parser.add_argument("--planted", type=int, default=10, help="photographs and seeds of the planted backbone")
    parser.add_argument("--images", type=int, default=24, help="photographs of the shift target")
    parser.add_argument("--segmented", type=int, default=40, help="segmented photographs")
    parser.add_argument("--designs", nargs="*", help="of `faithful` and `labels`; all of them if not given")
    parser.add_argument("--timed", type=int, default=10, help="photographs of `seconds`")
    parser.add_argument("--pictures", type=int, default=8, help="photographs of the sheet")
    parser.add_argument("--sheet", type=Path, default=Path("products.png"), help="where the sheet is written")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of forward passes")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"machine": described_machine(), "dtype": options.dtype}
    for name in options.sections:
        start = time.perf_counter()
        results[name] = SECTIONS[name](options) | {"wall": time.perf_counter() - start}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
