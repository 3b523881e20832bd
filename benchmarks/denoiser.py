"""Numbers of the online denoiser: what it costs, what it gives for how many images, and whether the store holds it up.

python benchmarks/denoiser.py latency --threads 2
python benchmarks/denoiser.py quality pipeline --store STORE_OF_DVT_DENOISE --steps 300

Each section prints a table; the last line of the output is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvt.analysis import position_decodability, with_null
from dvt.backbones import load_backbone
from dvt.denoiser import Denoiser, DenoiserConfig
from dvt.denoiser.attach import attach
from dvt.denoiser.pairs import InMemory, Pairs, pair_batches, split
from dvt.denoiser.scores import denoiser_loss, evaluate
from dvt.denoiser.train import FITTED, DenoiserTraining
from dvt.denoiser.variants import fit_linear, fit_subtract
from dvt.store import FeatureStore
from dvt.tokens import Tokens
from dvt.training import TrainingConfig, train
from tables import interval, table

KINDS = ("subtract", "linear", "conv1x1", "conv3x3", "block")
LATENCY_MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")


# -- cost -------------------------------------------------------------------------------------------------------------


def latency(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Backbone against backbone + denoiser, in turns, so that both meet the same machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [measure(name, device, options) for name in LATENCY_MODELS]
    table(f"one forward pass of {options.batch} images on {device}, medians of {options.repeats}", rows)
    return rows


def measure(name: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    backbone = load_backbone(name, pretrained=False).to(device)
    grid = backbone.grid(backbone.image_size)
    denoiser = Denoiser(DenoiserConfig("block", backbone.feature_dim, grid)).to(device).eval()
    clean = attach(denoiser, backbone).eval()
    images = torch.randn(options.batch, 3, *backbone.image_size, device=device)
    both: dict[str, list[float]] = {"raw": [], "clean": []}
    with torch.no_grad():
        for number in range(options.repeats + 2):
            for key, model in (("raw", backbone.model), ("clean", clean)):
                seconds = timed(partial(model.forward_features, images), device)
                if number >= 2:
                    both[key].append(seconds)
    parameters = {key: sum(p.numel() for p in module.parameters()) for key, module in backbone_and(denoiser, backbone)}
    return {
        "model": name,
        "backbone_ms": 1e3 * statistics.median(both["raw"]),
        "with_denoiser_ms": 1e3 * statistics.median(both["clean"]),
        # of neighbours in time, because the machine may be shared
        "ratio": statistics.median(c / r for r, c in zip(both["raw"], both["clean"], strict=True)),
        "parameter_share": parameters["denoiser"] / parameters["backbone"],
        "megabytes": peak(partial(backbone.model.forward_features, images), device),
        "megabytes_with": peak(partial(clean.forward_features, images), device),
    }


def backbone_and(denoiser: Denoiser, backbone: Any) -> list[tuple[str, torch.nn.Module]]:
    return [("denoiser", denoiser), ("backbone", backbone.model)]


def timed(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak(run: Callable[[], Any], device: torch.device) -> float:
    """Megabytes that a forward pass allocates at most: the driver's count on a GPU, the profiler's on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.no_grad():
            run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        run()
    live = top = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            top = max(top, live)
    return top / 1e6


# -- quality against images -------------------------------------------------------------------------------------------


def quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Cosine to the semantic tokens and position decodability on held-out images, by kind and training images."""
    pairs = Pairs(FeatureStore(options.store)).in_memory()
    rows, everything = [], []
    for count in options.images:
        for kind in ("no-op", *KINDS):
            runs = [quality_of(kind, count, seed, pairs, options) for seed in range(options.seeds)]
            cosine, position = (interval([run[key] for run in runs]) for key in ("cosine", "position"))
            rows.append(
                {
                    "images": runs[0]["images"],
                    "kind": kind,
                    "cosine": cosine["mean"],
                    "+-": cosine["half"],
                    "position_R2": position["mean"],
                    "+- ": position["half"],
                    "null_R2": statistics.fmean(run["null"] for run in runs),
                    "minutes": statistics.fmean(run["minutes"] for run in runs),
                }
            )
            everything.append({**rows[-1], "runs": runs})
            print(f"  {rows[-1]}", flush=True)
    targets = [decodability(target_maps(pairs, held_out(pairs, seed)[1])) for seed in range(options.seeds)]
    print(f"\nposition R^2 of the semantic tokens themselves: {statistics.fmean(r for r, _ in targets):.3f}")
    table(f"held-out images, means over {options.seeds} seeds with 95 % intervals", rows)
    return everything


def held_out(pairs: InMemory, seed: int) -> tuple[list[int], list[int]]:
    return split(pairs.sha256s, 1 / 6, seed)


def quality_of(kind: str, count: int, seed: int, pairs: InMemory, options: argparse.Namespace) -> dict[str, Any]:
    chosen, held = held_out(pairs, seed)
    chosen = chosen[:count]
    start = time.perf_counter()
    denoise = made(kind, chosen, seed, pairs, options)
    minutes = (time.perf_counter() - start) / 60
    scores = evaluate({"it": lambda batch: denoise(batch["raw"])}, (pairs[i] for i in held))["it"]
    with torch.no_grad():
        r2, null = decodability([denoise(pairs[i]["raw"][None].float()) for i in held])
    return {"images": len(chosen), "seed": seed, **scores, "position": r2, "null": null, "minutes": minutes}


def made(
    kind: str, chosen: list[int], seed: int, pairs: InMemory, options: argparse.Namespace
) -> Callable[[Tensor], Tensor]:
    """A denoiser of that kind from those images."""
    items = [pairs[i] for i in chosen]
    if kind == "no-op":
        return lambda tokens: tokens
    if kind == "linear":
        return fit_linear(item["raw"].float() for item in items)
    if kind == "subtract":
        return fit_subtract(item["raw"].float() - item["target"].float() for item in items)
    assert kind not in FITTED
    loop = replace(DenoiserTraining().loop, steps=options.steps, batch_size=options.batch, seed=seed)
    config = DenoiserTraining(kind=kind, loop=loop)
    channels = items[0]["raw"].shape[-1]
    grid = max({pairs.grids[i] for i in chosen}, key=[pairs.grids[i] for i in chosen].count)
    denoiser = Denoiser(config.denoiser(channels, grid), torch.Generator().manual_seed(seed))
    batches = pair_batches(pairs, chosen, options.batch, options.steps, seed)
    with tempfile.TemporaryDirectory() as folder:
        train(denoiser, denoiser_loss, batches, config.loop, folder)
    return denoiser.eval()


def target_maps(pairs: InMemory, held: list[int]) -> list[Tensor]:
    return [pairs[i]["target"][None].float() for i in held]


def decodability(maps: list[Tensor]) -> tuple[float, float]:
    """Position R^2 on held-out images, and with shuffled positions."""
    score = with_null(position_decodability, [Tokens.of(each) for each in maps], torch.Generator().manual_seed(0))
    return score.value, score.null


# -- input pipeline ---------------------------------------------------------------------------------------------------


def pipeline(options: argparse.Namespace) -> dict[str, Any]:
    """Steps a second fed from the store's files, over the same steps fed from tensors in memory, in turns."""
    pairs = Pairs(FeatureStore(options.store))
    memory = pairs.in_memory()
    chosen = list(range(len(pairs)))
    seconds: dict[str, list[float]] = {"store": [], "memory": []}
    for number in range(options.rounds + 1):
        for name, source in (("store", pairs), ("memory", memory)):
            took = steps_of(source, chosen, options)
            if number:
                seconds[name].append(took)
    rate = {name: options.pipeline_steps / statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(m / s for s, m in zip(seconds["store"], seconds["memory"], strict=True))
    row = {"store_steps_a_second": rate["store"], "memory_steps_a_second": rate["memory"], "ratio": ratio}
    table(
        f"{options.pipeline_steps} steps of {options.batch} images, medians of {options.rounds} rounds in turns", [row]
    )
    return row


def steps_of(source: Pairs | InMemory, chosen: list[int], options: argparse.Namespace) -> float:
    channels, steps = source[0]["raw"].shape[-1], options.pipeline_steps
    denoiser = Denoiser(DenoiserConfig("block", channels, source.grids[0]), torch.Generator().manual_seed(0))
    batches = pair_batches(source, chosen, options.batch, steps, seed=0)
    config = TrainingConfig(steps, options.batch, 1e-4, validate_every=0, checkpoint_every=steps)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train(denoiser, denoiser_loss, batches, config, folder)
        return time.perf_counter() - start


# -- the whole --------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "latency": latency,
    "quality": quality,
    "pipeline": pipeline,
}


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=[*SECTIONS, "all"])
    parser.add_argument("--store", type=Path, help="a store of `dvt denoise`, for quality and pipeline")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 30, 100], help="training images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of a trained kind")
    parser.add_argument("--batch", type=int, default=16, help="images a step, or a forward pass")
    parser.add_argument("--repeats", type=int, default=20, help="forward passes that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the pipeline section")
    parser.add_argument("--pipeline-steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    needs = {"quality", "pipeline", "all"} & set(options.sections)
    if needs and options.store is None:
        parser.error(f"{', '.join(sorted(needs))} needs --store: make one with `dvt denoise IMAGES --out STORE`")
    return options


def sections(options: argparse.Namespace) -> Iterator[str]:
    return iter(SECTIONS) if "all" in options.sections else iter(dict.fromkeys(options.sections))


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    result = {"machine": machine(), **{name: SECTIONS[name](options) for name in sections(options)}}
    print(json.dumps(result, default=float))


if __name__ == "__main__":
    main()
