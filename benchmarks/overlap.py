"""What `dvt denoise` gains when the backbone goes on while images are solved: images a second, and its busy share.

python benchmarks/overlap.py --threads 1 --rounds 5

"sequential" solves one image after the other in the thread that runs the backbone; "overlap" runs the backbone in a
thread of its own; "groups" also solves several images together. Rounds alternate, so that all meet the same machine,
whose load is given: two busy threads take more of a machine that others use too. Sections: the bundled ViT on the
processor; a stand-in for a backbone on a device of its own; ViT-B/14 at 518 pixels where there is a GPU. The last line
of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import avg_pool2d

import dvt
from dvt.backbones import Backbone, load_backbone, wrap
from dvt.fields.config import DenoiseConfig
from dvt.fields.images import denoise_images
from dvt.images import find_images
from dvt.jobs.profile import Profile
from dvt.tokens import Tokens
from dvt.views import ViewConfig
from tables import described_machine, photographs, table

WAYS: dict[str, dict[str, Any]] = {
    "sequential": {"overlap": False, "solve_images": 1},
    "overlap": {"overlap": True, "solve_images": 1},
    "groups": {"overlap": True, "solve_images": 8},
}
NO_GPU = "there is no GPU"


def compare(backbone: Backbone, paths: Sequence[Path], config: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Every way in every round, after a first round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    processor: dict[str, list[float]] = {name: [] for name in WAYS}
    profiles: dict[str, list[Profile]] = {name: [] for name in WAYS}
    load = os.getloadavg()[0]
    for number in range(rounds + 1):
        for name, way in WAYS.items():
            some = paths if number else paths[:1]
            start, start_cpu = time.perf_counter(), time.process_time()
            profile = run(backbone, some, DenoiseConfig(**config, **way))
            if number:
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - start_cpu)
                profiles[name].append(profile)
    rows = [row(name, len(paths), seconds, processor[name], profiles[name]) for name in WAYS]
    table(f"{len(paths)} images of {config['views'].count} views, {backbone.name}, {backbone.device}", rows)
    for name, found in profiles.items():
        print(f"  {name}: {found[-1].bound()}")
    return {"rows": rows, "load": [load, os.getloadavg()[0]], "flops_per_view": flops(profiles["sequential"][-1])}


def run(backbone: Backbone, paths: Sequence[Path], config: DenoiseConfig) -> Profile:
    with tempfile.TemporaryDirectory() as folder:
        summary = denoise_images(backbone, paths, Path(folder) / "store", config, profile=True)
        if summary.done != len(paths):
            raise RuntimeError(f"{len(summary.failed)} of {len(paths)} images failed")
    return summary.profile


def row(
    name: str, images: int, seconds: dict[str, list[float]], processor: list[float], profiles: list[Profile]
) -> dict[str, Any]:
    def share(*stages: str) -> float:
        return statistics.median(profile.of(*stages) / profile.wall for profile in profiles)

    return {
        "what": name,
        "images_per_second": images / statistics.median(seconds[name]),
        "ratio": statistics.median(s / own for s, own in zip(seconds["sequential"], seconds[name], strict=True)),
        "processor_seconds": statistics.median(processor),
        "backbone_busy": share("views", "backbone"),
        "solver_busy": share("solve", "fetch"),
        "waited_for_solver": share("wait_solver"),
        "waited_for_images": share("wait_images"),
    }


def flops(profile: Profile) -> float:
    return profile.flops / max(profile.views, 1)


def on_cpu(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    backbone = load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=options.size)
    paths = find_images([options.images])[: options.count] if options.images else photographs(folder, options.count)
    return compare(backbone, paths, {"views": ViewConfig(count=options.views)}, options.rounds)


def on_stand_in(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A backbone that keeps no processor busy, as on a GPU: it sleeps, and the tokens are the photographs' colours."""

    def tokens(model: torch.nn.Module, images: torch.Tensor) -> Tokens:
        time.sleep(options.milliseconds / 1000 * len(images))
        colours = avg_pool2d(images, 16).permute(0, 2, 3, 1)
        return Tokens.of(colours.repeat(1, 1, 1, 64))

    backbone = wrap(torch.nn.Identity(), tokens, 16, name="stand-in", image_size=options.size, feature_dim=192)
    paths = photographs(folder, options.count)
    return compare(backbone, paths, {"views": ViewConfig(count=options.views)}, options.rounds)


def on_gpu(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """ViT-B/14 at 518 pixels with 64 views, random weights: speed does not depend on their values."""
    if not torch.cuda.is_available():
        print(f"\nGPU: skipped, {NO_GPU}")
        return {"skipped": NO_GPU}
    name = "vit_base_patch14_dinov2.lvd142m"
    backbone = load_backbone(name, pretrained=False, size=518).to("cuda")
    paths = photographs(folder, 8 if options.smoke else 32, size=(600, 600))
    config = {"views": ViewConfig(count=64, batch=32), "dtype": "bfloat16"}
    return compare(backbone, paths, config, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder; cuts of the bundled photographs if it is left out")
    parser.add_argument("--count", type=int, default=8, help="images")
    parser.add_argument("--views", type=int, default=48)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of an operation")
    parser.add_argument("--milliseconds", type=float, default=10, help="a view takes in the stand-in for a device")
    parser.add_argument("--smoke", action="store_true", help="under a minute: 2 small images, 16 views, 1 round")
    options = parser.parse_args()
    if options.smoke:
        options.count, options.views, options.size, options.rounds = 2, 16, 112, 1
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "cpu": on_cpu(options, Path(folder) / "cpu"),
            "stand_in": on_stand_in(options, Path(folder) / "stand_in"),
            "gpu": on_gpu(options, Path(folder) / "gpu"),
        }
    print(json.dumps({"machine": described_machine(), **results}))


if __name__ == "__main__":
    main()
