"""What bfloat16 changes: seconds and tokens of `dvt denoise`, image by image beside float32, and what tokens are worth.

python benchmarks/precision.py --photos FOLDER --images 12 --threads 1
python benchmarks/precision.py --photos FOLDER --images 12 --data CAMVID --ignore 11

Both precisions take turns on each image; ratios and relative differences are means with 95 % intervals over images.
Seconds are the processor's, so that other programs on the machine change them little. Shift stability is the cosine of
a token and the same point in shifted windows, its 5 % point. With --data, kNN segmentation of raw tokens too, with the
paired bootstrap interval over images of its table. The last line of the output is one JSON object.
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
from dvt.analysis import position_decodability, shift_stability, with_null
from dvt.analysis.probes import ProbeConfig, run_probe
from dvt.backbones import Backbone, choose_precision, in_precision
from dvt.fields.config import DenoiseConfig
from dvt.fields.image import denoise_image
from dvt.images import find_images, load_image
from dvt.tokens import Tokens
from dvt.views import resize
from tables import interval, table

PRECISIONS = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", default=str(Path(dvt.__file__).parent / "data" / "photos"))
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--products", nargs="*", default=["removed", "ensembled"])
    parser.add_argument("--data", help="labelled images for a probe, as `dvt probe knn` takes them")
    parser.add_argument("--ignore", type=int, nargs="*", default=[], help="ids in the labels to leave out")
    parser.add_argument("--cache", help="folder for the probe's features")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    paths = find_images([options.photos])[: options.images]
    rows = [row for product in options.products for row in measure(backbone, paths, DenoiseConfig(product=product))]
    table(f"{len(paths)} photographs; 'auto' takes {choose_precision(backbone)} here", rows)
    found = {"images": len(paths), "threads": options.threads, "rows": rows, "stability": stability(backbone, paths)}
    if options.data is not None:
        found["probe"] = probe(backbone, options)
    print(json.dumps(found))


def stability(backbone: Backbone, paths: list[Path]) -> dict[str, Any]:
    """The 5 % point of the cosines of tokens under shifts, in both precisions, and the difference image by image."""
    values: dict[str, list[float]] = {each: [] for each in PRECISIONS}
    patch = backbone.patch_size[0]
    for path in paths:
        pixels = load_image(path)
        size = backbone.input_size((pixels.shape[1], pixels.shape[2]))
        larger = resize(pixels, (size[0] + 4 * patch, size[1] + 4 * patch))
        for each in PRECISIONS:
            found = shift_stability(in_precision(backbone, each), larger, size, backbone.patch_size)
            values[each].append(float(found.p5))
    lost = [rough - exact for exact, rough in zip(*(values[each] for each in PRECISIONS), strict=True)]
    row: dict[str, Any] = {}
    for each in PRECISIONS:
        row |= named(each, values[each])
    row |= named("difference", lost)
    table("shift stability, 5 % point", [row])
    return row


def probe(backbone: Backbone, options: argparse.Namespace) -> dict[str, Any]:
    """Segment by nearest neighbours from raw tokens in both precisions."""
    config = ProbeConfig(
        "knn",
        options.data,
        ignore=tuple(options.ignore),
        protocol="crops",
        train_images=60,
        test_images=40,
        baselines=(),
        cache=options.cache,
    )
    report = run_probe(config, backbone, {"bfloat16": in_precision(backbone, "bfloat16")})
    print(report.table())
    return report.to_dict()


def measure(backbone: Backbone, paths: list[Path], config: DenoiseConfig) -> list[dict[str, Any]]:
    """One row a term: bfloat16 against float32, and the position that a probe reads from each."""
    ratios: list[float] = []
    differences: dict[str, list[float]] = {"raw": [], "semantic": []}
    maps: dict[tuple[str, str], list[Tokens]] = {}
    for number, path in enumerate(paths):
        pixels, seconds, found = load_image(path), {}, {}
        for precision in PRECISIONS if number % 2 else PRECISIONS[::-1]:
            start = time.process_time()
            found[precision] = denoise_image(backbone, pixels, replace(config, dtype=precision))
            seconds[precision] = time.process_time() - start
        ratios.append(seconds["bfloat16"] / seconds["float32"])
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
        rows.append(row | named("seconds", ratios))
    return rows


def named(name: str, values: list[float]) -> dict[str, float]:
    found = interval(values)
    return {name: found["mean"], f"{name} +-": found["half"]}


if __name__ == "__main__":
    main()
