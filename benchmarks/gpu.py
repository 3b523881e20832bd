"""One GPU: is everything right on it, and how fast is it. No network, under ten minutes each.

python benchmarks/gpu.py check      every command there and on the CPU, and the tests that need a GPU
python benchmarks/gpu.py speed      stage one at full size, denoise and extract, attach, the writer, 10,000 images
python benchmarks/gpu.py speed --device standin --smoke     the same code on the tests' stand-in, which is no GPU

Weights are random: they change no time. Each table goes to docs/performance.md as it is, under the name of the GPU;
what is extrapolated says so. The last line of the output is one JSON object, which --out also writes to a file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dvt.backbones import Backbone, choose_precision, load_backbone
from dvt.denoiser import Denoiser, DenoiserConfig, DenoiserTraining, train_denoiser
from dvt.denoiser.attach import attach
from dvt.devices import autocast, finish_all, is_gpu, out_of_memory
from dvt.fields import LinearConfig, LinearSolver, NeuralConfig, NeuralSolver
from dvt.fields.config import DenoiseConfig
from dvt.fields.images import denoise_images
from dvt.grids import grid_centres
from dvt.jobs.extract import ExtractConfig, extract_images
from dvt.training.config import TrainingConfig
from dvt.views import ViewConfig
from tables import described_machine, photographs, table

ROOT = Path(__file__).parents[1]
STANDIN = ROOT / "tests" / "device" / "standin.py"
Rows = list[dict[str, Any]]

FULL = {
    "backbones": ("vit_small_patch14_dinov2", "vit_base_patch14_dinov2", "vit_large_patch14_dinov2"),
    "size": 518,
    "images": 10_000,
    "seconds": 20.0,  # of each job; the job of the extrapolation takes three times as long
    "views": (769, 37, 768),
    "steps": 500,
    "train_steps": 100,
    "batches": (1, 2, 4, 8, 16, 32, 64, 128),
}
SMOKE = {
    "backbones": ("test_vit",),
    "size": 96,
    "images": 10_000,
    "seconds": 0.0,
    "views": (17, 6, 16),
    "steps": 10,
    "train_steps": 2,
    "batches": (1, 2),
}


# -- check ------------------------------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Run the tests on the device, and list how many of each file passed."""
    parts = [["tests/device"], *([["tests", "-m", "gpu"]] if is_cuda(options) else [])]
    rows, passed = [], True
    for part in parts:
        with tempfile.TemporaryDirectory() as name:
            report = Path(name) / "report.xml"
            words = [*part, *(["-k", "test_standin or attached"] if options.smoke else []), f"--junitxml={report}"]
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-n", "0", *words],
                cwd=ROOT,
                env={**os.environ, "DVT_TEST_DEVICE": options.device},
                check=False,
            )
            passed = passed and done.returncode in (0, 5)  # 5: there is no such test
            rows += results(report)
    table(f"tests on {options.device}", rows)
    return {"rows": rows, "passed": passed}


def results(report: Path) -> Rows:
    counts: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").split(".")[-1]
        row = counts.setdefault(file, {"file": file, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        kinds = {child.tag for child in case}
        row["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
        row["seconds"] += float(case.get("time", 0))
    return list(counts.values())


# -- speed ------------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all parts; each prints its table as soon as it is known."""
    size, device = SMOKE if options.smoke else FULL, torch.device(options.device)
    found: dict[str, Any] = {"stage_one": stage_one(size, device)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["jobs"] = [row for each in size["backbones"] for row in jobs(each, size, device, folder / each)]
        found["latency"] = [latency(each, size, device) for each in size["backbones"]]
        table("one forward pass of 8 images, raw and with a denoiser", found["latency"])
        found["forward"] = forward(size, device)
        found["writer"] = writer(options)
        found["whole"] = whole(size, device, folder / "whole")
    return found


def stage_one(size: dict[str, Any], device: torch.device) -> Rows:
    """Fit one image of the paper's size from random tokens, which are as much work as others."""
    views, side, channels = size["views"]
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(views, 1, 1, 2, generator=generator) * 0.5
    coords = (boxes + 0.5 * grid_centres((side, side))).to(device)
    tokens = torch.randn(views, side, side, channels, generator=generator).to(device)
    batches = list(zip(tokens.split(64), coords.split(64), strict=True))
    steps = size["steps"]
    solvers: dict[str, tuple[Callable[[], Any], float]] = {
        "linear": (partial(LinearSolver(LinearConfig()).fit, batches), 1),
        "linear, 8 images together": (partial(LinearSolver(LinearConfig()).fit_many, [batches] * 8), 1 / 8),
        f"neural, {steps} of 25,000 steps, extrapolated": (
            partial(NeuralSolver(NeuralConfig(steps=steps)).fit, batches),
            25_000 / steps,
        ),
    }
    rows = []
    for name, (run, factor) in solvers.items():
        seconds = [timed(run, device) for _ in range(2)][-1]  # the first call compiles and allocates
        rows.append({"solver": name, "seconds an image": seconds * factor})
    table(f"stage one, {views} views of {side} x {side}, C = {channels}", rows)
    return rows


def jobs(name: str, size: dict[str, Any], device: torch.device, folder: Path) -> Rows:
    """Images a second of denoise and extract in the precision that "auto" takes, after a first image for warming up."""
    backbone = load_backbone(name, pretrained=False, size=size["size"]).to(device)
    precision = choose_precision(backbone)
    rows = []
    for job in ("denoise", "extract"):
        paths = photographs(folder / f"{job}-photos", 64 if size["seconds"] else 10)
        run = partial(run_job, job, backbone, folder, precision)
        rate = images_a_second(run, paths, size["seconds"], device)
        rows.append({"job": job, "backbone": name, "precision": precision, "images/s": rate})
    table(f"jobs at {size['size']} pixels", rows)
    return rows


def run_job(job: str, backbone: Backbone, folder: Path, precision: Any, paths: list[Path], number: int) -> None:
    out = folder / f"{job}-{number}"
    if job == "extract":
        extract_images(backbone, paths, out, ExtractConfig(dtype=precision))
    else:
        denoise_images(backbone, paths, out, DenoiseConfig(views=ViewConfig(kind="shifts"), dtype=precision))


def images_a_second(
    run: Callable[[list[Path], int], None], paths: list[Path], seconds: float, device: torch.device
) -> float:
    """Repeat a job over photographs until the time is over; the median rate of the repetitions."""
    run(paths[:9], 0)
    rates, start, number = [], time.perf_counter(), 1
    while not rates or time.perf_counter() - start < seconds:
        taken = timed(partial(run, paths, number), device)
        rates.append(len(paths) / taken)
        number += 1
    return statistics.median(rates)


def latency(name: str, size: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The forward pass of a backbone, alone and with a denoiser attached, in turns."""
    backbone = load_backbone(name, pretrained=False, size=size["size"]).to(device)
    denoiser = Denoiser(DenoiserConfig("block", backbone.feature_dim, backbone.grid(backbone.image_size))).to(device)
    clean = attach(denoiser.eval(), backbone).eval()
    images = torch.randn(8, 3, *backbone.image_size, device=device)
    both: dict[str, list[float]] = {"raw": [], "clean": []}
    with torch.no_grad():
        for _ in range(12 if size["seconds"] else 3):
            for key, model in (("raw", backbone.model), ("clean", clean)):
                both[key].append(timed(partial(model.forward_features, images), device))
    raw, denoised = (1e3 * statistics.median(times[2:]) for times in both.values())
    return {"backbone": name, "raw ms": raw, "denoised ms": denoised, "ratio": denoised / raw}


def forward(size: dict[str, Any], device: torch.device) -> Rows:
    """Images a second of the backbone alone by batch, doubled until the memory is full, and compiled at 16."""
    name = size["backbones"][min(1, len(size["backbones"]) - 1)]
    backbone = load_backbone(name, pretrained=False, size=size["size"]).to(device)
    precision, rows = choose_precision(backbone), []
    for batch in size["batches"]:
        try:
            rows.append({"batch": batch, **forward_rate(backbone.model.forward_features, backbone, precision, batch)})
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            break
    if device.type == "cuda":  # the compiler knows no stand-in
        compiled = torch.compile(backbone.model.forward_features)
        rows.append({"batch": "16, compiled", **forward_rate(compiled, backbone, precision, 16)})
    table(f"forward pass of {name} at {size['size']}, {precision}", rows)
    return rows


@torch.no_grad()
def forward_rate(run: Callable[..., Any], backbone: Backbone, precision: str, batch: int) -> dict[str, float]:
    """The first pass, in which a compiler works and memory is allocated, and the median rate of five more."""
    images = torch.randn(batch, 3, *backbone.image_size, device=backbone.device)
    with autocast(backbone.device, precision):
        first, *seconds = [timed(partial(run, images), backbone.device) for _ in range(6)]
    return {"first pass s": first, "images/s": batch / statistics.median(seconds)}


def writer(options: argparse.Namespace) -> dict[str, Any]:
    """MB a second of the shard writer beside plain h5py and the disk, from benchmarks/store.py."""
    maps, rounds = ("4", "1") if options.smoke else ("64", "3")
    command = [sys.executable, str(ROOT / "benchmarks" / "store.py"), "--writing", "--maps", maps, "--rounds", rounds]
    done = subprocess.run(
        [*command, "--grid", "37", "37", "--channels", "768"], capture_output=True, text=True, check=True
    )
    print(done.stdout.rpartition("\n{")[0])
    return json.loads(done.stdout.splitlines()[-1])["writing"]


def whole(size: dict[str, Any], device: torch.device, folder: Path) -> dict[str, Any]:
    """The time of stages one and two for 10,000 images, from a measured minute of the first and steps of the second."""
    name = size["backbones"][min(1, len(size["backbones"]) - 1)]
    backbone = load_backbone(name, pretrained=False, size=size["size"]).to(device)
    paths = photographs(folder / "photos", 64 if size["seconds"] else 10)
    run = partial(run_job, "denoise", backbone, folder, choose_precision(backbone))
    rate = images_a_second(run, paths, 3 * size["seconds"], device)
    steps = size["train_steps"]
    training = DenoiserTraining(loop=TrainingConfig(steps=steps, batch_size=8, learning_rate=1e-4))
    seconds = timed(
        lambda: train_denoiser(folder / "denoise-1", folder / "d.safetensors", training, device=device), device
    )
    row = {
        "backbone": name,
        "measured images/s": rate,
        "measured s a step": seconds / steps,
        "extrapolated minutes, stage one": size["images"] / rate / 60,
        "extrapolated minutes, 1,000 steps of stage two": 1000 * seconds / steps / 60,
    }
    table(f"{size['images']:,} images, extrapolated (goal: 15 minutes on one H200)", [row])
    return row


def timed(run: Callable[[], Any], device: torch.device) -> float:
    finish_all(device)
    start = time.perf_counter()
    run()
    finish_all(device)
    return time.perf_counter() - start


def is_cuda(options: argparse.Namespace) -> bool:
    return torch.device(options.device).type == "cuda"


@contextlib.contextmanager
def device_known(name: str) -> Iterator[None]:
    """Bring in the stand-in if it is asked for, and refuse a GPU that is not there."""
    if name == "standin":
        spec = importlib.util.spec_from_file_location("standin", STANDIN)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if (reason := module.missing()) is not None:
            raise SystemExit(f"there is no stand-in: {reason}")
        module.register()
        with module.present():
            yield
    elif not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; DEVICE=standin SMOKE=--smoke shows the way through the code")
    else:
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("check", "speed"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", help="a JSON file for the results")
    options = parser.parse_args()
    with device_known(options.device):
        assert is_gpu(options.device)
        start = time.perf_counter()
        found = {"check": check, "speed": speed}[options.job](options)
        about = {"job": options.job, "device": options.device, "smoke": options.smoke, "machine": described_machine()}
        result = {**about, "seconds": time.perf_counter() - start, **found}
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    raise SystemExit(0 if result.get("passed", True) else 1)


if __name__ == "__main__":
    main()
