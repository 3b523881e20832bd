"""Speed and memory of `dvt extract`: images a second beside bare timm loops over the same files, and peak memory.

python benchmarks/extract.py --images DIR --threads 1 --rounds 5

"loop" decodes, resizes and forwards one batch after the other and keeps nothing; "forward" does not even decode: its
batches lie ready in memory. Rounds alternate, so that all meet the same machine. Memory is the peak of a process of
its own, at two numbers of images. Each section prints a table; the last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import dvt
from dvt.backbones import Backbone, load_backbone
from dvt.devices import autocast
from dvt.images import find_images, image_size, load_image
from dvt.jobs.extract import ExtractConfig, extract_images
from dvt.store import FeatureStore
from dvt.views import resize
from tables import table

TARGET = 0.95
MEGABYTE = 1 << 20
# More than this between few and many images is growth: an image's entry in the lists takes a few hundred bytes.
GROWTH_MEGABYTES = 32


def make_backbone(options: argparse.Namespace) -> Backbone:
    demo = options.backbone == "vit_tiny_patch16_224"
    weights = dvt.demo_weights() if demo else None
    backbone = load_backbone(options.backbone, weights=weights, pretrained=False, size=options.size)
    return backbone.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


# -- speed ------------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> dict[str, Any]:
    backbone, paths = make_backbone(options), find_images(options.images)[: options.count]
    batches = by_size(backbone, paths, options.batch)
    ready = [torch.stack([load(backbone, path) for path in batch]) for batch in batches]
    config = ExtractConfig(dtype=options.dtype, batch=options.batch)
    runs: dict[str, Callable[[], None]] = {
        "forward": lambda: forward(backbone, ready, options.dtype),
        "loop": lambda: loop(backbone, batches, options.dtype),
        "extract": lambda: extract(backbone, paths, config),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - start_cpu)
    rows = [
        {
            "what": name,
            "images_per_second": len(paths) / statistics.median(seconds[name]),
            "processor_seconds": statistics.median(processor[name]),
            "extract_over_it": ratio(seconds[name], seconds["extract"]),
        }
        for name in runs
    ]
    table(f"{len(paths)} images, {options.backbone}, {backbone.device}, medians of {options.rounds} rounds", rows)
    over_loop = {"median": rows[1]["extract_over_it"], "rounds": ratios(seconds["loop"], seconds["extract"])}
    print(f"  extract over the bare loop: {over_loop['median']:.3f}, target {TARGET}")
    return {"rows": rows, "over_loop": over_loop, "over_forward": ratios(seconds["forward"], seconds["extract"])}


def ratios(bare: list[float], ours: list[float]) -> list[float]:
    """Of neighbours in time, because the machine may be shared."""
    return [b / o for b, o in zip(bare, ours, strict=True)]


def ratio(bare: list[float], ours: list[float]) -> float:
    return statistics.median(ratios(bare, ours))


def by_size(backbone: Backbone, paths: list[Path], batch: int) -> list[list[Path]]:
    groups: dict[tuple[int, int], list[Path]] = {}
    for path in paths:
        groups.setdefault(backbone.input_size(image_size(path)), []).append(path)
    return [group[i : i + batch] for group in groups.values() for i in range(0, len(group), batch)]


def load(backbone: Backbone, path: Path) -> Tensor:
    pixels = load_image(path)
    return resize(pixels, backbone.input_size((pixels.shape[1], pixels.shape[2])))


@torch.no_grad()
def forward(backbone: Backbone, batches: list[Tensor], dtype: str) -> None:
    """timm's own forward pass over normalised batches, and nothing else."""
    device = backbone.device
    for images in batches:
        with autocast(device, dtype):
            backbone.model.forward_features((images.to(device) - backbone.mean) / backbone.std)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loop(backbone: Backbone, batches: list[list[Path]], dtype: str) -> None:
    for batch in batches:
        forward(backbone, [torch.stack([load(backbone, path) for path in batch])], dtype)


def extract(backbone: Backbone, paths: list[Path], config: ExtractConfig) -> None:
    """Everything: hashes, plan, decoding, forward passes, and a store on disk."""
    with tempfile.TemporaryDirectory() as folder:
        summary = extract_images(backbone, paths, Path(folder) / "store", config)
        if summary.done != len(paths):
            raise RuntimeError(f"{len(summary.failed)} of {len(paths)} images failed")


# -- memory -----------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a process that extracts few images, and of one that extracts many."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in options.memory_images:
            make_images(Path(folder) / str(number), number)
            arguments = ["--child", str(Path(folder) / str(number)), "--threads", str(options.threads)]
            process = subprocess.run(
                [sys.executable, __file__, "memory", *arguments], check=True, capture_output=True, text=True
            )
            rows.append({"images": number, **json.loads(process.stdout.splitlines()[-1])})
    growth = rows[-1]["peak_megabytes"] - rows[0]["peak_megabytes"]
    table("peak memory of one process, images of 96 x 96", rows)
    print(f"  growth {growth:.1f} MB, {'flat' if growth < GROWTH_MEGABYTES else 'NOT FLAT'}")
    return {"rows": rows, "growth_megabytes": growth, "flat": growth < GROWTH_MEGABYTES}


def make_images(folder: Path, number: int) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(number):
        Image.fromarray(generator.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(folder / f"{i:06}.png")


def memory_child(options: argparse.Namespace) -> dict[str, Any]:
    backbone = load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=96)
    paths = find_images(options.child)
    with tempfile.TemporaryDirectory() as folder:
        extract_images(backbone, paths, folder, ExtractConfig(batch=16, shard_images=32))
        stored = sum(file.stat().st_size for file in Path(folder).glob("*.h5")) / MEGABYTE
        if len(FeatureStore(folder)) != len(paths):
            raise RuntimeError("images are missing")
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"stored_megabytes": stored, "peak_megabytes": kilobytes / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=("speed", "memory"))
    parser.add_argument("--images", type=Path, default=Path(dvt.__file__).parent / "data" / "photos")
    parser.add_argument("--count", type=int, default=64, help="images of the folder, the first ones")
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the forward pass")
    parser.add_argument("--memory-images", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(memory_child(options)))
        return
    machine = {"machine": platform.machine(), "cores": torch.get_num_threads(), "torch": torch.__version__}
    results = {name: {"speed": speed, "memory": memory}[name](options) for name in dict.fromkeys(options.sections)}
    print(json.dumps({**machine, **results}))


if __name__ == "__main__":
    main()
