"""Ways to bring features to a finer grid, scored on human segments: bilinear, a plain bilateral filter, `dvt.upsample`.

python benchmarks/upsampling.py --photos DIR --segments DIR --count 24 --threads 1

DIR of segments holds NAME.png (whole numbers, one a segment) for photographs NAME.jpg. Features of the bundled ViT, raw
and both products of stage one, are upsampled 4 x. Each pixel takes the segment whose mean feature is most like its own
(cosine about the image's mean; class scores are enlarged bilinearly to the photograph); segments below 1 % of the image
are left out. Scores: mIoU; the share of right pixels within 3 pixels of a boundary; and the edge ratio, the mean change
between neighbouring cells of different segments over that between cells of one segment. Intervals are paired bootstraps
over photographs. "another image" guides by the photograph turned by 180 degrees, as a null. Without the folders only
seconds and memory are measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor

import dvt
from dvt import grids
from dvt.denoiser.anyup import AnyUp
from dvt.fields.config import DenoiseConfig
from dvt.images import load_image
from dvt.views import resize
from tables import described_machine, table

FACTOR, NEAR, LEAST = 4, 3, 0.01
SCORES = ("mIoU", "near boundaries", "edge ratio")
SCALES = np.array([100, 100, 1])  # of mIoU and accuracy, in points, and the edge ratio


def bilateral(tokens: Tensor, image: Tensor, factor: int, colour: float = 0.07, places: float = 1.5) -> Tensor:
    """Joint bilateral upsampling: each cell averages the tokens around it, by distance and by colour (CIE Lab)."""
    from dvt.upsampling import _lab

    height, width, channels = tokens.shape
    guide = _lab(resize(image, (factor * height, factor * width)))
    low = nnf.avg_pool2d(guide, factor)
    y, x = ((torch.arange(factor * n) + 0.5) / factor - 0.5 for n in (height, width))
    total, weights = torch.zeros(len(y), len(x), channels), torch.zeros(len(y), len(x), 1)
    for down in range(-4, 5):
        for right in range(-4, 5):
            i, j = y.round().long() + down, x.round().long() + right
            inside = ((i >= 0) & (i < height))[:, None] & ((j >= 0) & (j < width))
            away = ((y - i)[:, None] ** 2 + (x - j) ** 2) / (2 * places**2)
            i, j = i.clamp(0, height - 1), j.clamp(0, width - 1)
            apart = (guide - low[:, i][:, :, j]).square().sum(0) / (2 * colour**2)
            weight = ((-away - apart).exp() * inside)[..., None]
            total, weights = total + weight * tokens[i][:, j], weights + weight
    return total / weights.clamp_min(1e-30)


WAYS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "bilinear": lambda t, _, f: grids.resample(t, (f * t.shape[0], f * t.shape[1])),
    "bilateral": bilateral,
    "dvt.upsample": dvt.upsample,
    "another image": lambda t, image, f: dvt.upsample(t, image.flip(1, 2), f),
}


def scores(fine: Tensor, segments: Tensor) -> tuple[float, float, float]:
    """mIoU and the share of right pixels near boundaries, of the nearest mean of a segment; and the edge ratio."""
    places, labels = torch.unique(segments, return_inverse=True)
    masks = nnf.one_hot(labels, len(places)).movedim(-1, 0).float()
    large = masks.mean((1, 2)) >= LEAST
    share = nnf.interpolate(masks[None], fine.shape[:2], mode="area")[0].flatten(1)
    flat = fine.flatten(0, 1) - fine.mean((0, 1))
    means = share @ flat / share.sum(1, keepdim=True).clamp_min(1e-6)
    like = nnf.normalize(flat, dim=-1) @ nnf.normalize(means, dim=-1).T
    like = nnf.interpolate(like.T.view(1, -1, *fine.shape[:2]), labels.shape, mode="bilinear")[0]
    found = like.masked_fill(~large[:, None, None], -9).argmax(0)
    counted = large[labels]
    overlaps = [
        float((counted & (found == k) & (labels == k)).sum() / (((found == k) & counted) | (labels == k)).sum())
        for k in large.nonzero()[:, 0]
    ]
    edges = torch.zeros(labels.shape)
    edges[1:][labels.diff(dim=0) != 0] = edges[:-1][labels.diff(dim=0) != 0] = 1
    edges[:, 1:][labels.diff(dim=1) != 0] = edges[:, :-1][labels.diff(dim=1) != 0] = 1
    near = counted & (nnf.max_pool2d(edges[None], 2 * NEAR + 1, 1, NEAR)[0] > 0)
    return float(np.mean(overlaps)), float((found == labels)[near].float().mean()), edge_ratio(fine, labels)


def edge_ratio(fine: Tensor, labels: Tensor) -> float:
    """Mean change of features between neighbouring cells of different segments, over that within segments."""
    cells = nnf.interpolate(labels[None, None].float(), fine.shape[:2], mode="nearest-exact")[0, 0]
    across, within = [], []
    for axis in (0, 1):
        change, crossed = fine.diff(dim=axis).norm(dim=-1), cells.diff(dim=axis) != 0
        across.append(change[crossed])
        within.append(change[~crossed])
    return float(torch.cat(across).mean() / torch.cat(within).mean())


def difference(one: np.ndarray, other: np.ndarray) -> list[str]:
    """Mean and 95 % paired bootstrap interval of each score."""
    apart = SCALES * (one - other)
    draws = apart[np.random.default_rng(0).integers(0, len(apart), (4000, len(apart)))].mean(1)
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    return [f"{apart[:, k].mean():+.2f} [{low[k]:+.2f}, {high[k]:+.2f}]" for k in range(3)]


def quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    files = sorted(options.segments.glob("*.png"))
    files = [file for i, file in enumerate(files) if i % 5 > 1][: options.count]  # the others chose the settings
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for file in files:
        image = load_image(options.photos / f"{file.stem}.jpg")
        segments = torch.from_numpy(np.array(Image.open(file)).astype(np.int64))
        removed = dvt.denoise(backbone, image)
        ensembled = dvt.denoise(backbone, image, DenoiseConfig(product="ensembled")).semantic
        for name, tokens in {"raw": removed.raw, "removed": removed.semantic, "ensembled": ensembled}.items():
            for way, upsampled in WAYS.items():
                found.setdefault((name, way), []).append(scores(upsampled(tokens, image, FACTOR), segments))
    values = {key: np.array(each) for key, each in found.items()}
    rows = []
    for (name, way), each in values.items():
        apart = difference(values[name, "dvt.upsample"], each)
        scored = dict(zip(SCORES, (SCALES * each.mean(0)).round(2).tolist(), strict=True))
        less = {f"dvt.upsample less this: {score}": text for score, text in zip(SCORES, apart, strict=True)}
        rows.append({"features": name, "way": way} | scored | less)
    table(f"{FACTOR} x, {len(files)} photographs", rows)
    return rows


def cost(grid: Sequence[int] = (37, 37), channels: int = 384) -> list[dict[str, Any]]:
    """Seconds of the processor and growth of the peak of memory beside the result, in this order: it never falls."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(*grid, channels, generator=generator)
    image = torch.rand(3, 518, 518, generator=generator)
    rows = []
    for factor in (4, 8, 14):
        for way in ("bilinear", "dvt.upsample"):
            start = time.process_time()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            result = WAYS[way](tokens, image, factor)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            seconds = time.process_time() - start
            rows.append({"cells": f"{result.shape[0]} x {result.shape[1]}", "way": way, "seconds": seconds})
            rows[-1] |= {"result MB": result.nbytes >> 20, "peak grew by MB": peak >> 10}
            del result
    table(f"cost, {grid[0]} x {grid[1]} tokens of {channels} channels", rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of NAME.jpg")
    parser.add_argument("--segments", type=Path, help="folder of NAME.png")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--anyup", help="weights of AnyUp, as `--upsampler` takes them: one more row")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.anyup:
        WAYS["AnyUp"] = AnyUp.load(options.anyup).upsample
    result: dict[str, Any] = {"benchmark": "upsampling", "machine": described_machine(), "cost": cost()}
    if options.photos and options.segments:
        result["quality"] = quality(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
