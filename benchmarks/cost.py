"""The cost model (cost_model.py) counted against PyTorch, held against this machine, and turned into predictions.

python benchmarks/cost.py flops local h200
python benchmarks/cost.py scale

flops   closed formulas beside torch's own counter, for three sizes of ViT and for the linear solver
local   rates of this machine, then predicted and measured seconds of `dvt extract`, `dvt denoise` and a training step
h200    10,000 images through stage one and two on one H200: a prediction, nothing was run there
scale   10 million images: hours, nodes, bytes, shards, requests, and the memory and time of the plan, measured here

Each section prints tables; the last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from scipy.spatial import cKDTree
from torch.utils.flop_counter import FlopCounterMode

import cost_model as model
import dvt
from cost_model import Fleet, Machine, Size, Vit
from dvt.backbones import Backbone, load_backbone
from dvt.denoiser import Denoiser, DenoiserConfig
from dvt.denoiser.scores import denoiser_loss
from dvt.fields import LinearSolver
from dvt.fields.config import DenoiseConfig
from dvt.fields.image import TokenViews
from dvt.images import find_images, image_size, load_image
from dvt.jobs.extract import ExtractConfig, extract_images
from dvt.jobs.profile import flop_counter
from dvt.store import Job, Record, StoreWriter, plan
from dvt.views import ViewConfig, resize
from tables import described_machine, photographs, table

BUNDLED = "vit_tiny_patch16_224"
TARGET_MODEL, TARGET_GRID, TARGET_VIEWS, TARGET_IMAGES = "vit_base_patch14_dinov2.lvd142m", (37, 37), 64, 10_000
PHOTO = (375, 500)  # a usual photograph of a data set, height and width in pixels, and its bytes as a JPEG
PHOTO_BYTES = 110_000

# Share of a CPU core's measured GEMM rate and copying rate that whole jobs reach: softmax, GELU and LayerNorm cost time
# and few FLOPs, blocks of the solver are small. One number, found once on one machine, not fitted to each row.
CPU_EFFICIENCY = 0.8
# The same share of nominal rates for a GPU: assumed, low and high. Large products alone reach 790 of 989 TFLOP/s.
GPU_EFFICIENCY = {"low": 0.35, "middle": 0.5, "high": 0.65}
H200_CORES = 16
MEMORY_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # shards are put together as fast as a core can
H200 = {
    "forward": 989e12,  # bfloat16, dense
    "single": 67e12,
    "double": 67e12,  # tensor cores
    "traffic": 4.8e12,
    "cut": 4.8e12 / 100,  # about 8 passes of 12 bytes a pixel
    "selected": 2e8,  # assumed: a block of threads for each
    "launches": 1.5e5,  # assumed: 7 microseconds from Python
    "link": 2e10,
}


def seconds_of(run: Callable[[], Any], rounds: int) -> float:
    """Processor seconds, the least of some rounds after one that does not count: other programs only ever add."""
    run()
    return min(clocked(run) for _ in range(rounds))


def clocked(run: Callable[[], Any]) -> float:
    """Processor seconds of all threads: what the model adds up, and not what other programs take meanwhile."""
    start = time.process_time()
    run()
    return time.process_time() - start


# -- formulas against torch's counter ---------------------------------------------------------------------------------


def counted_vit(name: str, size: int) -> int:
    """FLOPs of one image in timm's model, counted without weights."""
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False, num_classes=0).eval()
    with torch.no_grad(), flop_counter() as counter:
        net.forward_features(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


def counted_linear(views: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """FLOPs of the linear solver's matrix products.

    The counter takes a sparse matrix for a dense one, and does not know products that are added in place.
    """

    def dense(a: torch.Tensor, b: torch.Tensor, **_: object) -> int:
        return 2 * a.shape[0] * a.shape[1] * b.shape[1] if a.layout == torch.strided else 0

    def added(target: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
        return 2 * a[0] * a[1] * a[2] * b[2]

    dense._get_raw = True  # type: ignore[attr-defined]  the counter's name for "give tensors, not shapes"
    ours = {torch.ops.aten.mm: dense, torch.ops.aten.baddbmm_: added}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        LinearSolver().fit(views)
    return counter.get_total_flops()


def closed_linear(channels: int, grid: Size, views: int) -> float:
    """The formula's share that the counter sees: products, not triangular solves."""
    looked = min(views, model.PILOT_VIEWS) * grid[0] * grid[1]
    solves = model.pilot_solves(grid, looked)
    solves.append(model.Solve(solves[0].nodes, channels, grid[0] * grid[1], True))
    dense = views * grid[0] * grid[1] * 2 * channels * (2 * model.SKETCH + 1)
    return sum(solve.products for solve in solves) + dense + model.screen_products(looked)


def flops(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name, vit in model.VITS.items():
        size = 518 if vit.patch == 14 else 224
        closed, counted = vit.flops((size // vit.patch, size // vit.patch)), counted_vit(name, size)
        rows.append({"what": f"{name}, {size}", "formula": closed, "counted": counted})
    backbone = bundled()
    views = TokenViews(backbone, load_image(bundled_photos()[0]), ViewConfig(count=15))
    batches = list(views)
    rows.append(
        {
            "what": "linear solver, bundled ViT, 16 views",
            "formula": closed_linear(backbone.feature_dim, views.whole.grid, 16),
            "counted": counted_linear(batches),
        }
    )
    rows = [row | {"formula / counted": row["formula"] / row["counted"]} for row in rows]
    table(
        "GFLOPs of one image",
        [row | {"formula": row["formula"] / 1e9, "counted": row["counted"] / 1e9} for row in rows],
    )
    return {"rows": rows, "worst": max(abs(row["formula / counted"] - 1) for row in rows)}


# -- this machine -----------------------------------------------------------------------------------------------------


def bundled() -> Backbone:
    return load_backbone(BUNDLED, weights=dvt.demo_weights())


def bundled_photos() -> list[Path]:
    return find_images([Path(dvt.__file__).parent / "data" / "photos"])


def gemm(dtype: torch.dtype, side: int = 1024) -> float:
    """FLOPs a second of a square product."""
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: a @ b, 9)


def copying(megabytes: int = 256) -> float:
    """Bytes a second, read and written."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), 5)


def selecting(tokens: int = 4096) -> float:
    """Order statistics among neighbours, a second."""
    values = torch.randn(tokens, model.NEIGHBOURS, model.SKETCH)
    return tokens * model.SKETCH / seconds_of(lambda: values.kthvalue(5, dim=1), 3)


def looking_up(points: int) -> float:
    """Points a second through the kd-tree: build it, then find each one's neighbours."""
    coords = np.random.default_rng(0).random((points, 2), dtype=np.float32)
    return points / seconds_of(lambda: cKDTree(coords).query(coords, k=model.NEIGHBOURS), 3)


def shard_of(channels: int, grid: Size, images: int) -> list[Record]:
    """Records with two terms and a prefix in half precision."""
    maps = {term: torch.randn(*grid, channels).half() for term in ("raw", "denoised")}
    return [Record(f"{i}.jpg", f"{i:064x}", PHOTO, maps, torch.randn(1, channels).half()) for i in range(images)]


def storing(place: str | None = None, channels: int = 768, grid: Size = (37, 37), images: int = 8) -> dict[str, float]:
    """Bytes a second of a shard put together and written to `place`; the file's bytes over the formula's."""
    records = shard_of(channels, grid, images)
    with tempfile.TemporaryDirectory(dir=place) as folder, StoreWriter(folder, Job("vit", "ab")) as writer:
        seconds = seconds_of(lambda: writer.write("shard", records), 3)
        found = next(Path(folder).glob("*.h5")).stat().st_size
    formula = images * model.stored_bytes(channels, grid, 1, 2)
    return {"rate": formula / seconds, "over_formula": found / formula}


def rates(photos: list[Path]) -> dict[str, float]:
    """What one core of this machine does a second, by the names of :class:`cost_model.Work`."""
    size = image_size(photos[0])
    images = [load_image(path) for path in photos]
    target = bundled().input_size(size)
    decoded = sum(height * width for height, width in map(image_size, photos))
    cut = len(photos) * target[0] * target[1]
    resized = cut / seconds_of(lambda: [resize(image, target) for image in images], 3)
    return {
        "forward": gemm(torch.float32),
        "single": gemm(torch.float32),
        "double": gemm(torch.float64),
        "traffic": copying(),
        "cut": resized / CPU_EFFICIENCY,  # measured, not nominal
        "selected": selecting(),
        "launches": 1e6,  # no launch on a CPU: what PyTorch takes for a call
        "link": 1e12,  # nothing is sent
        "decoded": decoded / seconds_of(lambda: [load_image(path) for path in photos], 3),
        "resized": resized,
        "points": looking_up(49 * 294),
        "stored": storing()["rate"],
    }


def measured_extract(backbone: Backbone, photos: list[Path]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return clocked(lambda: extract_images(backbone, photos, Path(folder) / "s", ExtractConfig(batch=16, workers=1)))


def measured_denoise(backbone: Backbone, photos: list[Path]) -> tuple[float, float]:
    """Processor seconds, and the solver's share of the time."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        summary = dvt.denoise_images(backbone, photos, Path(folder) / "s", DenoiseConfig(product="blend"))
        spent = time.process_time() - start
    return spent, summary.fitting_seconds / (summary.fitting_seconds + summary.extraction_seconds)


def training_step(channels: int, grid: Size, batch: int) -> Callable[[], None]:
    """A step of stage two on random tokens, without reading them."""
    denoiser = Denoiser(DenoiserConfig("block", channels, grid), torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(denoiser.parameters(), 1e-3)
    tokens = {name: torch.randn(batch, *grid, channels) for name in ("raw", "target")}

    def step() -> None:
        optimizer.zero_grad()
        denoiser_loss(denoiser, tokens)["loss"].backward()
        optimizer.step()

    return step


def local(options: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured processor seconds an image, one thread."""
    backbone, vit = bundled(), model.VITS[BUNDLED]
    with tempfile.TemporaryDirectory() as folder:
        photos = photographs(options.photos or Path(folder), options.images)
        few = photos[: options.denoise_images]
        machine = Machine("this machine, one thread", rates(photos), CPU_EFFICIENCY, overlap=False)
        photo = image_size(photos[0])
        grid = backbone.grid(backbone.input_size(photo))
        step = training_step(vit.channels, grid, 8)
        measured_extract(backbone, few)
        times: dict[str, list[float]] = {"extract": [], "denoise": [], "training": []}
        shares = []
        for _ in range(options.rounds):
            times["extract"].append(measured_extract(backbone, photos) / len(photos))
            spent, share = measured_denoise(backbone, few)
            times["denoise"].append(spent / len(few))
            shares.append(share)
            times["training"].append(seconds_of(step, 3) / 8)
    works = {
        "extract": model.extract(vit, grid, photo, denoiser=False, width=4),
        "denoise": model.stage_one(vit, grid, photo, ViewConfig().count, width=4),
        "training": {"a step": model.stage_two(vit.channels, grid, width=4)},
    }
    table(machine.name, [{"rate": name, "a second": f"{rate:.3g}"} for name, rate in machine.rates.items()])
    parts = {f"{job}: {name}": machine.seconds(work) for job, each in works.items() for name, work in each.items()}
    table("predicted milliseconds an image", [{"part": n, **scaled(found, 1e3)} for n, found in parts.items()])
    rows = [
        {
            "job": job,
            "predicted_seconds": sum(machine.seconds(work)["all"] for work in works[job].values()),
            "measured_seconds": min(times[job]),
            "images_a_second": 1 / min(times[job]),
        }
        for job in works
    ]
    rows = [row | {"predicted / measured": row["predicted_seconds"] / row["measured_seconds"]} for row in rows]
    title = f"processor seconds an image of {photo[0]} x {photo[1]}, bundled ViT, best of {options.rounds} rounds"
    table(title, rows)
    solver = ("pilot", "sums", "solve")
    predicted = [machine.seconds(works["denoise"][name])["all"] for name in works["denoise"]]
    share = sum(machine.seconds(works["denoise"][name])["all"] for name in solver) / sum(predicted)
    print(f"  the solver's share of stage one: predicted {share:.3f}, measured {min(shares):.3f}")
    stored = storing(images=2)["over_formula"]
    print(
        f"  bytes of a shard over the formula's: {stored:.4f}; bfloat16 GEMM {gemm(torch.bfloat16) / 1e9:.0f} GFLOP/s"
    )
    return {
        "rates": dict(machine.rates),
        "efficiency": CPU_EFFICIENCY,
        "rows": rows,
        "solver_share": {"predicted": share, "measured": min(shares)},
        "stored_over_formula": stored,
    }


def scaled(found: dict[str, float], factor: float) -> dict[str, float]:
    return {name: value * factor for name, value in found.items()}


# -- one H200 ---------------------------------------------------------------------------------------------------------


def h200_machine(case: str, host: dict[str, float], cores: int = H200_CORES, writers: int = 1) -> Machine:
    """One H200 with some cores of this machine's kind."""
    achieved = {name: host[name] for name in (*model.HOST, "stored")}
    return Machine(f"H200, {case}", {**H200, **achieved}, GPU_EFFICIENCY[case], cores, writers)


def host_rates() -> dict[str, float]:
    """Decoding, kd-tree and writer of one core here, at the target's sizes."""
    with tempfile.TemporaryDirectory() as folder:
        photos = photographs(Path(folder), 8, PHOTO)
        images = [load_image(path) for path in photos]
        side = 14 * TARGET_GRID[0]
        return {
            "decoded": 8 * PHOTO[0] * PHOTO[1] / seconds_of(lambda: [load_image(path) for path in photos], 3),
            "resized": 8 * side**2 / seconds_of(lambda: [resize(image, (side, side)) for image in images], 3),
            "points": looking_up(model.PILOT_VIEWS * TARGET_GRID[0] * TARGET_GRID[1]),
            "stored": storing(MEMORY_DISK)["rate"],
        }


def h200(options: argparse.Namespace) -> dict[str, Any]:
    """Minutes of both stages, by part and by how good the GPU's efficiency is."""
    vit, host = model.VITS[TARGET_MODEL], host_rates()
    floor = TARGET_IMAGES * (TARGET_VIEWS + 1) * vit.flops(TARGET_GRID) / 790e12 / 60
    solver = sum(model.linear(vit.channels, TARGET_GRID, TARGET_VIEWS + 1).values(), model.Work())
    with_solver = floor + TARGET_IMAGES * (solver.single / H200["single"] + solver.double / H200["double"]) / 60
    table("one core here, a second", [{"rate": name, "a second": f"{rate:.3g}"} for name, rate in host.items()])
    works = model.stage_one(vit, TARGET_GRID, PHOTO, TARGET_VIEWS, batch=8)
    machines = {case: h200_machine(case, host) for case in GPU_EFFICIENCY}
    rows = [{"part": name} | each_case(machines, work, TARGET_IMAGES) for name, work in works.items()]
    step = model.stage_two(vit.channels, TARGET_GRID)
    rows.append({"part": "stage two, 1,000 steps of 16"} | each_case(machines, step, 16_000))
    table(f"minutes of the busiest resource, {TARGET_IMAGES} images, 8 solved together", rows)
    totals = []
    for batch in (1, 8, 32):
        one = sum(model.stage_one(vit, TARGET_GRID, PHOTO, TARGET_VIEWS, batch=batch).values(), model.Work())
        for case, machine in machines.items():
            first = scaled(machine.seconds(one), TARGET_IMAGES / 60)
            second = machine.seconds(step)["all"] * 16_000 / 60
            turns = first["device"] + first["host"] + first["writer"]
            ends = {"both stages": first.pop("all") + second, "both, nothing overlaps": turns + second}
            totals.append({"solved together": batch, "GPU": case, **first, **ends})
    table("minutes of device, host and writer, and of both stages when these overlap", totals)
    print(f"  floor: {floor:.1f} minutes, the views' forward passes alone at 790 TFLOP/s; target 60, reference 21,908")
    print(f"  {with_solver:.1f} with the solver's FLOPs at their nominal rates")
    print("  a prediction: nothing here has run on a GPU")
    return {"floor_minutes": floor, "floor_with_solver": with_solver, "host": host, "parts": rows, "totals": totals}


def each_case(machines: dict[str, Machine], work: model.Work, images: float) -> dict[str, float]:
    return {case: max(m.seconds(work).values()) * images / 60 for case, m in machines.items()}


# -- ten million images -----------------------------------------------------------------------------------------------

IMAGES = 10_000_000
SHARDS = (16, 64, 256, 1024)
PLAN_SIZES = (100_000, 1_000_000)


def plan_child(count: int) -> dict[str, float]:
    """Seconds and bytes of the list of images and its plan, in a process of its own."""
    before, start = resident(), time.process_time()
    hashes = (hashlib.sha256(str(i).encode()).hexdigest() for i in range(count))
    images = [(f"s3://bucket/photos/{i // 1000:05}/{i:09}.jpg", sha256, (37, 37)) for i, sha256 in enumerate(hashes)]
    listed, started = resident(), time.process_time()
    shards = plan(images, 64, Job("vit", "ab"))
    end = time.process_time()
    return {
        "images": count,
        "shards": len(shards),
        "list_seconds": started - start,
        "plan_seconds": end - started,
        "list_bytes": listed - before,
        "peak_bytes": peak_bytes() - before,
    }


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Most bytes that this process has held."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if "VmHWM" in line))


def plan_slope(sizes: tuple[int, int]) -> dict[str, Any]:
    """What one more image costs the process that plans, from two sizes."""
    rows = [json.loads(child("--plan", str(count))) for count in sizes]
    table("the list of images and its plan, one process each", rows)
    more = rows[1]["images"] - rows[0]["images"]
    names = ("list_seconds", "plan_seconds", "list_bytes", "peak_bytes")
    return {name: (rows[1][name] - rows[0][name]) / more for name in names}


def child(*arguments: str) -> str:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1]


def opening(shards: int = 200) -> float:
    """Seconds a shard that a writer takes to look at what is done."""
    records = shard_of(64, (2, 2), 64)
    with tempfile.TemporaryDirectory() as folder:
        with StoreWriter(folder, Job("vit", "ab")) as writer:
            for number in range(shards):
                writer.write(f"shard-{number}", records)
        return clocked(lambda: StoreWriter(folder, Job("vit", "ab")).__enter__().__exit__()) / shards


def hashing(megabytes: int = 32) -> float:
    """Bytes a second."""
    data = bytes(megabytes << 20)
    return len(data) / seconds_of(lambda: hashlib.sha256(data).digest(), 3)


def fleets(vit: Vit, grid: Size, host: dict[str, float]) -> list[dict[str, Any]]:
    """Hours, nodes and bytes of both jobs, with the writer as it is and with one that keeps up."""
    rows = []
    for job in ("extract", "denoise", "denoise --keep-terms"):
        if job == "extract":
            works = model.extract(vit, grid, PHOTO, denoiser=True)
        else:
            works = model.stage_one(vit, grid, PHOTO, TARGET_VIEWS, batch=32, keep_terms="keep" in job)
        work = sum(works.values(), model.Work())
        now = h200_machine("middle", host).seconds(work)
        device = Fleet(IMAGES, 1 / now["device"], work.stored, SHARDS[0])
        slowest = Fleet(IMAGES, 1 / now["all"], work.stored, SHARDS[0])
        rows.append(
            {
                "job": job,
                "GPU images/s": device.rate,
                "GPU hours": IMAGES / device.rate / 3600,
                "nodes, a day": device.nodes(24),
                "nodes, a week": device.nodes(168),
                "as it is, images/s": slowest.rate,
                "nodes, a day ": slowest.nodes(24),
                "nodes, a week ": slowest.nodes(168),
                "MB an image": work.stored / 1e6,
                "TB": IMAGES * work.stored / 1e12,
                "node writes, GB/s": device.node_write_rate / 1e9,
                "CPU cores a GPU": h200_machine("middle", host, cores=1).seconds(work)["host"] * device.rate,
                "writers a GPU": now["writer"] * device.rate,
            }
        )
    return rows


def scale(options: argparse.Namespace) -> dict[str, Any]:
    vit, host = model.VITS[TARGET_MODEL], host_rates()
    jobs = fleets(vit, TARGET_GRID, host)
    for row in jobs:
        table(f"10 million images: {row['job']}", [{"what": k, "value": v} for k, v in row.items()])
    slope, look, sha = plan_slope(options.plan_sizes), opening(), hashing()
    stored = model.stored_bytes(vit.channels, TARGET_GRID, vit.prefix, 2)
    shards = [Fleet(IMAGES, 1, stored, count) for count in SHARDS]
    shard_rows = [
        {
            "shard_images": fleet.shard_images,
            "shards": fleet.shards,
            "GB a shard": fleet.shard_bytes / 1e9,
            "PUT requests, parts of 64 MB": fleet.shards * (2 + -(-fleet.shard_bytes // (64 << 20))),
            "looking into them again, minutes": look * fleet.shards / 60,
        }
        for fleet in shards
    ]
    table("shards, two terms", shard_rows)
    driver = {
        "plan, GB": slope["peak_bytes"] * IMAGES / 1e9,
        "plan, seconds": (slope["plan_seconds"] + slope["list_seconds"]) * IMAGES,
        "read again to hash, TB": PHOTO_BYTES * IMAGES / 1e12,
        "SHA-256, core hours": PHOTO_BYTES * IMAGES / sha / 3600,
        "LIST requests of 1,000": IMAGES / 1000,
        "LIST one by one at 0.1 s, minutes": IMAGES / 1000 * 0.1 / 60,
        "GET to hash at 30 ms, 64 at a time, minutes": IMAGES * 0.03 / 64 / 60,
        "looking into shards already there, ms a shard": look * 1e3,
    }
    table("the process that plans", [{"what": name, "value": value} for name, value in driver.items()])
    return {"host": host, "jobs": jobs, "shards": shard_rows, "plan_slope": slope, "driver": driver}


# -- the command ------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "flops": flops,
    "local": local,
    "h200": h200,
    "scale": scale,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=["flops", "local", "h200"], help=f"of {', '.join(SECTIONS)}")
    parser.add_argument(
        "--images", type=int, default=24, help="photographs of the extraction, cut from the bundled ones"
    )
    parser.add_argument("--denoise-images", type=int, default=4, help="how many of them go through stage one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=Path, help="leave the photographs in this folder, for other benchmarks")
    parser.add_argument("--plan-sizes", type=int, nargs=2, default=PLAN_SIZES)
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        print(json.dumps(plan_child(options.plan)))
        return
    if wrong := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(wrong))}; choose from {', '.join(SECTIONS)}")
    torch.set_num_threads(1)  # rates and jobs of one core, so that they can be compared
    load = os.getloadavg()[0]
    results = {"cost": {name: SECTIONS[name](options) for name in dict.fromkeys(options.sections)}}
    print(json.dumps({**described_machine(), "load": [load, os.getloadavg()[0]], **results}))


if __name__ == "__main__":
    main()
