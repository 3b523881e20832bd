"""What each remedy without training does on the bundled ViT: position, faithfulness, outliers.

python benchmarks/remedies.py --images FOLDER [--fit 12] [--test 12] [--windows 48]

Remedies are found on some photographs and measured on others. Intervals are 95 %: bootstrap over images for the R^2,
t over images for cosines. The reference "direct" is the mean over windows at the image's own scale, shifted by whole
patches in real context, of token - shared G; the window itself is left out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dvt
from dvt.analysis.metrics import log_norm_outliers, scores
from dvt.analysis.metrics.positions import PositionMeans, torus_windows
from dvt.backbones import Backbone
from dvt.denoiser import Denoiser, fit_linear, fit_remedies, fit_subtract
from dvt.images import find_images, load_image
from dvt.views import resize
from tables import described_machine, interval, table


@torch.no_grad()
def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    large = [p for p in find_images([options.images]) if min(load_image(p).shape[1:]) >= 256]
    chosen = large[:: max(1, len(large) // (options.fit + options.test))][: options.fit + options.test]
    fit, test = chosen[::2], chosen[1::2]
    start = time.perf_counter()
    remedies, refused = fit_remedies(backbone, fit)
    print(f"found in {time.perf_counter() - start:.1f} s on {len(fit)} photographs; measured on {len(test)} others")
    for name, reason in refused.items():
        print(f"{name}: {reason}")
    shared = shared_artifact(backbone, fit)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"raw": lambda patches: patches}
    ways |= dict(remedies)
    ways["fit_linear (waves)"] = fit_linear(backbone(squares(p, backbone)).patches[0] for p in fit)
    ways["raw - shared G"] = fit_subtract([shared])
    rows = measured(backbone, test, ways, shared, options.windows)
    table(f"{len(test)} photographs, windows of {backbone.image_size}", [shown(row) for row in rows])
    cards = {name: plain(denoiser) for name, denoiser in remedies.items()}
    print(json.dumps({"rows": rows, "refused": refused, "cards": cards, "machine": described_machine()}))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=Path(dvt.demo_weights()).parent / "photos")
    parser.add_argument("--fit", type=int, default=12)
    parser.add_argument("--test", type=int, default=12)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def measured(
    backbone: Backbone, test: list[Path], ways: dict[str, Callable[[Tensor], Tensor]], shared: Tensor, windows: int
) -> list[dict[str, Any]]:
    """A row for each way of treating tokens."""
    raw = [backbone(squares(path, backbone)) for path in test]
    targets = [direct(backbone, path, shared, windows, seed) for seed, path in enumerate(test)]
    found = []
    for name, way in ways.items():
        tokens = [each.with_patches(way(each.patches)) for each in raw]
        position = scores.position_r2_row(tokens, torch.Generator().manual_seed(0), 5)
        subtracted = interval([cosine(t.patches[0], r.patches[0] - shared) for t, r in zip(tokens, raw, strict=True)])
        faithful = interval([cosine(t.patches[0], target) for t, target in zip(tokens, targets, strict=True)])
        found.append(
            {
                "tokens": name,
                "position R2": [position.value, position.low, position.high],
                "its null": position.null,
                "cosine to raw - shared G": subtracted,
                "cosine to direct": faithful,
                "outliers": float(log_norm_outliers(tokens).mean()),
            }
        )
    return found


def shared_artifact(backbone: Backbone, images: list[Path]) -> Tensor:
    """(h, w, C) G of the backbone, from torus windows of the images."""
    means = PositionMeans()
    for seed, path in enumerate(images):
        image = load_image(path)
        image = resize(image, backbone.input_size((image.shape[1], image.shape[2])))
        means.add(backbone(torus_windows(image, backbone.image_size, 16, seed)).patches)
    return means.share(2).artifact


def squares(path: Path, backbone: Backbone) -> Tensor:
    """(1, 3, H, W) the window in the middle of the photograph, whose shorter side becomes 8/7 of it."""
    image, (top, left) = placed(path, backbone)
    height, width = backbone.image_size
    return image[None, :, top : top + height, left : left + width]


def placed(path: Path, backbone: Backbone) -> tuple[Tensor, tuple[int, int]]:
    """A photograph that leaves room for shifts on all sides, and where its middle window lies, in whole patches."""
    image, (height, width), (py, px) = load_image(path), backbone.image_size, backbone.patch_size
    scale = max((height + 6 * py) / image.shape[1], (width + 6 * px) / image.shape[2])
    image = resize(image, (round(scale * image.shape[1]), round(scale * image.shape[2])))
    return image, ((image.shape[1] - height) // 2 // py * py, (image.shape[2] - width) // 2 // px * px)


def direct(backbone: Backbone, path: Path, shared: Tensor, windows: int, seed: int) -> Tensor:
    """(h, w, C) the reference; a patch that no other window shows is NaN."""
    image, (top, left) = placed(path, backbone)
    (height, width), (py, px), (h, w) = backbone.image_size, backbone.patch_size, shared.shape[:2]
    rows, columns = (image.shape[1] - height) // py + 1, (image.shape[2] - width) // px + 1
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed)).tolist()
    own = (top // py, left // px)
    offsets = [(i // columns, i % columns) for i in order if (i // columns, i % columns) != own][:windows]
    total = torch.zeros(rows + h - 1, columns + w - 1, shared.shape[2])
    count = torch.zeros(rows + h - 1, columns + w - 1, 1)
    for y, x in offsets:
        window = image[None, :, y * py : y * py + height, x * px : x * px + width]
        total[y : y + h, x : x + w] += backbone(window).patches[0] - shared
        count[y : y + h, x : x + w] += 1
    return (total / count)[own[0] : own[0] + h, own[1] : own[1] + w]


def cosine(first: Tensor, second: Tensor) -> float:
    """Of two maps (h, w, C) without their means, over the patches where both are known."""
    known = second.isfinite().all(-1)
    first, second = first[known] - first[known].mean(0), second[known] - second[known].mean(0)
    return float((first * second).sum() / (first.norm() * second.norm()))


def plain(denoiser: Denoiser) -> dict[str, Any]:
    return {key: value for key, value in denoiser.card.items() if key != "weights_sha256"}


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its intervals as text."""

    def text(value: Any) -> Any:
        if isinstance(value, dict):
            return f"{value['mean']:.3f} +- {value['half']:.3f}"
        return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]" if isinstance(value, list) else value

    return {key: text(value) for key, value in row.items()}


if __name__ == "__main__":
    main()
