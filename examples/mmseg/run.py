"""Train and test a linear segmentation head on raw and on denoised features with mmsegmentation, side by side.

    python examples/mmseg/run.py examples/mmseg/voc2012.py --denoiser denoiser.safetensors --data-root VOCdevkit/VOC2012
    python examples/mmseg/run.py examples/mmseg/camvid.py --denoiser FILE --data-root camvid --iterations 200

Both runs have the same seed: the same crops in the same order and the same first weights of the head. The last line of
the output is one JSON object. How to install mmsegmentation: docs/mmseg.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from dvt.denoiser.mmseg import DvtBackbone
from dvt.errors import DvtError

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
DIFFERENCE = "difference"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config such as voc2012.py")
    parser.add_argument("--denoiser", help="file, folder or hub repository; without it only raw features are scored")
    parser.add_argument("--backbone", help="timm model in place of the config's")
    parser.add_argument("--weights", help="file of the backbone's weights; needs --backbone")
    parser.add_argument("--layer", type=int, help="block whose tokens are read, in place of the config's")
    parser.add_argument("--data-root", type=Path, help="folder of the data, in place of the config's")
    parser.add_argument("--iterations", type=int, help="instead of the config's 40,000; the schedule shrinks with it")
    parser.add_argument("--seed", type=int, help="in place of the config's")
    parser.add_argument("--workers", type=int, help="processes that load data, in place of the config's")
    parser.add_argument("--work-dir", type=Path, help="logs and checkpoints; out/mmseg/CONFIG if not given")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints in the work dir")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="any other setting, as KEY=VALUE")
    args = parser.parse_args(arguments)
    if not args.config.is_file():
        parser.error(f"there is no config {str(args.config)!r}")
    if args.weights and not args.backbone:
        parser.error("--weights belongs to a backbone: give --backbone too")
    if args.iterations is not None and args.iterations < 1:
        parser.error(f"--iterations is {args.iterations}; it must be 1 or more")
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers is {args.workers}; it must be 0 or more")
    return args


def load_config(args: argparse.Namespace) -> Config:
    """The config with everything that the arguments say, of the run on raw features."""
    config = Config.fromfile(args.config)
    if args.backbone:
        config.model.backbone.update(name=args.backbone, weights=args.weights)
    if args.layer is not None:
        config.model.backbone.layer = args.layer
    if args.iterations:
        shorten(config, args.iterations)
    if args.seed is not None:
        config.randomness.seed = args.seed
    for name in LOADERS:
        if args.data_root:
            config[name].dataset.data_root = str(args.data_root)
        if args.workers is not None:
            config[name].update(num_workers=args.workers, persistent_workers=args.workers > 0)
    config.resume = args.resume
    config.merge_from_dict(args.cfg_options or {})
    if not Path(root := config.train_dataloader.dataset.data_root).is_dir():
        raise DvtError(
            f"there is no folder {root!r}; --data-root is the folder of the data that {args.config} describes"
        )
    return config


def shorten(config: Config, iterations: int) -> None:
    """Fewer (or more) iterations; warm-up, decay and validation keep their shares."""
    factor = iterations / config.train_cfg.max_iters
    for part in config.param_scheduler:
        part.begin = round(part.begin * factor)
        part.end = max(part.begin + 2, round(part.end * factor))  # mmengine's linear warm-up needs two steps
    config.train_cfg.update(max_iters=iterations, val_interval=max(1, round(config.train_cfg.val_interval * factor)))
    checkpoint = config.default_hooks.checkpoint
    checkpoint.interval = max(1, round(checkpoint.interval * factor))


def of_variant(config: Config, variant: str, denoiser: str | None, channels: int, folder: Path) -> Config:
    """The config of one of the runs, in a folder of its own."""
    config = copy.deepcopy(config)
    config.model.backbone.denoiser = denoiser
    several = not isinstance(config.model.decode_head.in_channels, int)
    config.model.decode_head.in_channels = [channels] * len(config.model.decode_head.in_index) if several else channels
    config.work_dir = str(folder / variant)
    config.experiment_name = f"{folder.name}_{variant}_{time.time_ns()}"  # mmengine keeps one logger a name
    return config


def score(config: Config) -> dict[str, float]:
    """Trains and tests; what mmseg's IoUMetric says of the test set, in per cent."""
    runner = Runner.from_cfg(config)
    runner.train()
    return {name: round(float(value), 2) for name, value in runner.test().items()}  # as mmseg rounds them


def table(results: dict[str, dict[str, float]]) -> str:
    """A row for each of raw, denoised and their difference."""
    names = list(results["raw"])
    lines = [f"{'':12}" + "".join(f"{name:>10}" for name in names)]
    for variant, row in results.items():
        sign = "+" if variant == DIFFERENCE else ""
        lines.append(f"{variant:12}" + "".join(f"{row[name]:{sign}10.2f}" for name in names))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    config = load_config(args)
    folder = args.work_dir or Path("out/mmseg") / args.config.stem
    # Before hours of training: whether backbone and denoiser can be made, and what the head will read.
    options = {name: value for name, value in config.model.backbone.items() if name != "type"}
    channels = DvtBackbone(**(options | {"denoiser": args.denoiser})).feature_dim

    results, seconds = {}, {}
    for variant, denoiser in {"raw": None, "denoised": args.denoiser}.items():
        if variant == "raw" or denoiser:
            start = time.perf_counter()
            results[variant] = score(of_variant(config, variant, denoiser, channels, folder))
            seconds[variant] = round(time.perf_counter() - start, 1)
    if args.denoiser:
        results[DIFFERENCE] = {
            name: round(results["denoised"][name] - value, 2) for name, value in results["raw"].items()
        }

    iterations = config.train_cfg.max_iters
    head = config.model.decode_head.type
    print(f"\n{args.config.stem}, {options['name']}, {head}, {iterations} iterations, test, per cent")
    print(table(results))
    report = {
        "config": str(args.config),
        "backbone": options,
        "denoiser": args.denoiser,
        "iterations": iterations,
        "seed": config.randomness.seed,
        "seconds": seconds,
        "results": results,
    }
    print(json.dumps(report, default=str), flush=True)
    return report


if __name__ == "__main__":
    try:
        main()
    except DvtError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
