"""What do the tokens hold? `dvt prior compare` on scikit-learn's digits, or on images of yours.

python benchmarks/priors.py                            # digits
python benchmarks/priors.py --images FOLDER --side 32  # photographs
python benchmarks/priors.py --smoke                    # seconds: whether it runs

Kinds of tokens, all of the small ViT that comes with dvt: raw; raw less the training images' mean map; raw - G with
one artifact for all; each image's own decomposition, removed and ensembled; a learned centring in the prior itself; the
mean map alone; another image's tokens. The curves are in OUT/page.html; the last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import dvt
from dvt.analysis.priors.compare import Comparison, compare_priors, look
from dvt.analysis.priors.compare_page import with_interval
from dvt.cli.prior_compare import decompositions
from dvt.images import find_images
from tables import table


def write_digits(folder: Path, count: int) -> None:
    """Digits of scikit-learn as files, in a fixed random order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0))[:count].tolist()
    for number in order:
        path = folder / str(digits.target[number]) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] / 16 * 255).round().astype("uint8")).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a folder of photographs; scikit-learn's digits if not given")
    parser.add_argument("--side", type=int, default=8, help="pixels of the images generated")
    parser.add_argument("--patch", type=int, help="pixels of a target token; an eighth of the side, at least 2")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="tiny: only whether it runs")
    parser.add_argument("--out", type=Path, help="the folder of the page; a temporary one if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.images or scratch) if options.images else Path(scratch) / "digits"
        if not options.images:
            write_digits(folder, 16 if options.smoke else 480)
        steps = 4 if options.smoke else options.steps
        config = Comparison(seeds=2 if options.smoke else options.seeds)
        loop = replace(config.prior.loop, steps=steps, validate_every=max(1, steps // 8), log_every=max(1, steps // 8))
        patch = options.patch or max(2, options.side // 8)
        config = replace(config, prior=replace(config.prior, side=options.side, patch=patch, width=48, loop=loop))
        size = 112 if options.images else 64
        backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=size)
        material = look(find_images([folder]), backbone, config, *decompositions(backbone))
        report = compare_priors(material, options.out or Path(scratch) / "out", config)
    for name in next(iter(report["kinds"].values())):
        columns = ("best", "best_over_raw", "last", "last_over_raw")
        rows = [{"kind": k, **{c: with_interval(m[name][c]) for c in columns}} for k, m in report["kinds"].items()]
        table(name, rows)
    print(json.dumps({**report, "data": options.images or "digits", "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
