"""What bfloat16 changes: seconds and tokens of `dvt denoise`, image by image beside float32.

python benchmarks/precision.py --photos FOLDER --images 12 --threads 1

Both precisions take turns on each image; ratios and relative differences are means with 95 % intervals over images. The
last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dvt
from dvt.analysis import position_decodability, with_null
from dvt.backbones import Backbone, choose_precision
from dvt.fields.config import DenoiseConfig
from dvt.fields.image import denoise_image
from dvt.images import find_images, load_image
from dvt.tokens import Tokens
from tables import interval, table

PRECISIONS = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", default=str(Path(dvt.__file__).parent / "data" / "photos"))
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--products", nargs="*", default=["removed", "ensembled"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    paths = find_images([options.photos])[: options.images]
    rows = [row for product in options.products for row in measure(backbone, paths, DenoiseConfig(product=product))]
    table(f"{len(paths)} photographs; 'auto' takes {choose_precision(backbone)} here", rows)
    print(json.dumps({"images": len(paths), "threads": options.threads, "rows": rows}))


def measure(backbone: Backbone, paths: list[Path], config: DenoiseConfig) -> list[dict[str, Any]]:
    """One row a term: bfloat16 against float32, and the position that a probe reads from each."""
    ratios: dict[str, list[float]] = {"all": [], "backbone": []}
    differences: dict[str, list[float]] = {"raw": [], "semantic": []}
    maps: dict[tuple[str, str], list[Tokens]] = {}
    for number, path in enumerate(paths):
        pixels, seconds, found = load_image(path), {}, {}
        for precision in PRECISIONS if number % 2 else PRECISIONS[::-1]:
            start = time.perf_counter()
            found[precision] = denoise_image(backbone, pixels, replace(config, dtype=precision))
            seconds[precision] = (time.perf_counter() - start, found[precision].extraction_seconds)
        ratios["all"].append(seconds["bfloat16"][0] / seconds["float32"][0])
        ratios["backbone"].append(seconds["bfloat16"][1] / seconds["float32"][1])
        for term in differences:
            exact, rough = (getattr(found[each].decomposition, term) for each in PRECISIONS)
            differences[term].append(float((rough - exact).norm() / exact.norm()))
            for each, values in zip(PRECISIONS, (exact, rough), strict=True):
                maps.setdefault((term, each), []).append(Tokens.of(values))
    rows = []
    for term, values in differences.items():
        row: dict[str, Any] = {"product": config.product, "term": term, **named("difference", values)}
        for each in PRECISIONS:
            score = with_null(position_decodability, maps[term, each], torch.Generator().manual_seed(0))
            row |= {f"R2 {each}": score.value, f"null {each}": score.null}
        rows.append(row | named("seconds", ratios["all"]) | named("backbone seconds", ratios["backbone"]))
    return rows


def named(name: str, values: list[float]) -> dict[str, float]:
    found = interval(values)
    return {name: found["mean"], f"{name} +-": found["half"]}


if __name__ == "__main__":
    main()
