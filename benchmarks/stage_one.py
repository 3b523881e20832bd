"""Numbers of stage one: accuracy and cost of both solvers, views, and which estimate serves real features best.

python benchmarks/stage_one.py planted full views --threads 2
python benchmarks/stage_one.py camvid natural --camvid DIR --natural DIR

Each section prints a table; the last line of the output is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor, nn

from dvt.analysis import position_decodability, position_mic, with_null
from dvt.backbones import Backbone, load_backbone
from dvt.fields import Fit, LinearConfig, LinearSolver, NeuralConfig, NeuralSolver
from dvt.fields.config import DenoiseConfig
from dvt.fields.image import TokenViews, denoise_image
from dvt.fields.planted import Planted, PlantedConfig, relative_error
from dvt.images import load_image
from dvt.tokens import Tokens
from dvt.views import ViewConfig
from tables import table

WEIGHTS = Path(__file__).parents[1] / "dvt" / "data" / "vit_tiny_patch16_224.mae_photos.safetensors"
MODEL = "vit_tiny_patch16_224"


# -- CamVid: which estimate serves a linear probe best ----------------------------------------------------------------

CLASSES, VOID, LABELS_A_PATCH = 11, 11, 4


@dataclass(frozen=True)
class Frame:
    """One image's features by variant, (h, w, C) each, and labels (4 h, 4 w)."""

    maps: dict[str, Tensor]
    labels: Tensor


def pick(files: list[Path], count: int) -> list[Path]:
    """`count` of the files, evenly spaced, so that every film is there."""
    return [files[k * len(files) // count] for k in range(min(count, len(files)))]


def read_frame(path: Path, crop: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels (3, H, W) and labels (H, W); with crop, of a random square of .5 to .65 of the image's height."""
    pixels = load_image(path)
    labels = Path(str(path).replace("/images/", "/annotations/")).with_suffix(".png")
    classes = torch.from_numpy(np.array(Image.open(labels))).long()
    if crop:
        share, top, left = torch.rand(3, generator=generator).tolist()
        side = round(pixels.shape[1] * (0.5 + 0.15 * share))
        y, x = round(top * (pixels.shape[1] - side)), round(left * (pixels.shape[2] - side))
        pixels, classes = pixels[:, y : y + side, x : x + side], classes[y : y + side, x : x + side]
    return pixels, classes


def frame_features(
    backbone: Backbone, frames: list[tuple[Tensor, Tensor]], views: int, shared_images: int
) -> tuple[list[Frame], dict[str, float]]:
    """Features of every frame by variant; the shared artifact is fitted on the first ones, which are for training."""
    solver, total, kept, seconds = LinearSolver(), None, [], {"extraction": 0.0, "fitting": 0.0}
    for index, (pixels, classes) in enumerate(frames):
        source = TokenViews(backbone, pixels, ViewConfig(count=views))
        batches = list(source)
        start = time.perf_counter()
        fit = solver.fit(batches)
        seconds["extraction"] += source.seconds
        seconds["fitting"] += time.perf_counter() - start
        if index < shared_images:
            part = solver.artifact_equations(batches)
            total = part if total is None else (total[0] + part[0], total[1] + part[1])
        half = [(tokens.half(), coords) for tokens, coords in batches]
        kept.append((source.whole.patches[0], source.coords, fit, half, classes))
    shared = solver.solve_shared(total, kept[0][0].shape[:2])
    return [variants(solver, shared, *item) for item in kept], seconds


def variants(
    solver: LinearSolver, shared: Tensor, raw: Tensor, coords: Tensor, fit: Fit, half: list, classes: Tensor
) -> Frame:
    """All estimates of one frame's clean features."""
    own = fit.decompose(raw, coords)
    given = solver.fit([(tokens.float(), where) for tokens, where in half], shared).decompose(raw, coords)
    waves = torch.cos(torch.pi * coords[..., None] * torch.arange(4))
    height, width = raw.shape[:2]
    size = (LABELS_A_PATCH * height, LABELS_A_PATCH * width)
    return Frame(
        {
            "position only": (waves[:, :, 0, :, None] * waves[:, :, 1, None, :]).flatten(2),
            "raw": raw,
            "F": own.field,
            "raw - G": raw - own.artifact,
            "blend": own.semantic,
            "raw - shared G": raw - given.artifact,
            "F, shared G": given.field,
            "blend, shared G": given.semantic,
            "raw and F": torch.cat((raw, own.field), dim=-1),
            "raw and blend": torch.cat((raw, own.semantic), dim=-1),
        },
        nnf.interpolate(classes[None, None].float(), size=size, mode="nearest-exact")[0, 0].long(),
    )


def probe(train: list[Frame], test: list[Frame], variant: str, seed: int, epochs: int = 25) -> Tensor:
    """(images, 11, 11) confusion counts on the test frames of BatchNorm + 1x1 convolution, trained on `train`."""
    x = torch.stack([frame.maps[variant] for frame in train]).permute(0, 3, 1, 2).contiguous()
    y = torch.stack([frame.labels for frame in train])
    generator = torch.Generator().manual_seed(seed)
    head = nn.Sequential(nn.BatchNorm2d(x.shape[1]), nn.Conv2d(x.shape[1], CLASSES, 1))
    nn.init.normal_(head[1].weight, std=0.01, generator=generator)
    nn.init.zeros_(head[1].bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-3)
    batches = -(-len(x) // 8)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).tensor_split(batches):
            logits = nnf.interpolate(head(x[part]), size=y.shape[1:], mode="bilinear", align_corners=False)
            loss = nnf.cross_entropy(logits, y[part], ignore_index=VOID)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return torch.stack([confusion(head.eval(), frame.maps[variant], frame.labels) for frame in test])


@torch.no_grad()
def confusion(head: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = head(tokens.permute(2, 0, 1)[None])
    found = nnf.interpolate(logits, size=labels.shape, mode="bilinear", align_corners=False)[0].argmax(0)
    known = labels != VOID
    pairs = labels[known] * CLASSES + found[known]
    return torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES).double()


def mean_iou(counts: Tensor) -> Tensor:
    """Mean IoU in per cent over the classes that occur, of confusion counts (..., 11, 11)."""
    hit = counts.diagonal(dim1=-2, dim2=-1)
    either = counts.sum(-1) + counts.sum(-2) - hit
    present = counts.sum(-1) > 0
    return 100 * (hit / either.clamp_min(1) * present).sum(-1) / present.sum(-1)


def interval(scores: dict[str, Tensor], variant: str, draws: int = 400) -> tuple[float, float]:
    """95 % bootstrap interval over test images of the gain over raw, counts of all seeds added up."""
    one, other = scores[variant].sum(0), scores["raw"].sum(0)
    chosen = torch.randint(len(one), (draws, len(one)), generator=torch.Generator().manual_seed(0))
    gain = mean_iou(one[chosen].sum(1)) - mean_iou(other[chosen].sum(1))
    return tuple(gain.quantile(torch.tensor([0.025, 0.975], dtype=gain.dtype)).tolist())


def camvid_protocol(options: argparse.Namespace, crop: bool) -> dict[str, Any]:
    """Scores of all variants on random crops or on whole frames."""
    backbone = load_backbone(MODEL, weights=WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    train, test = (
        [read_frame(path, crop, generator) for path in pick(sorted((options.camvid / "images" / split).iterdir()), n)]
        for split, n in (("train", options.images), ("test", options.images // 2))
    )
    frames, seconds = frame_features(backbone, train + test, options.views, min(24, len(train)))
    scores = {
        name: torch.stack([probe(frames[: len(train)], frames[len(train) :], name, seed) for seed in range(3)])
        for name in frames[0].maps
    }
    rows = []
    for name, counts in scores.items():
        each = mean_iou(counts.sum(1)).tolist()
        low, high = interval(scores, name)
        row = {"features": name, "mIoU": statistics.mean(each), "std of 3 seeds": statistics.stdev(each)}
        rows.append(row | {"gain over raw, 95 % low": low, "high": high})
    what = "random crops" if crop else "whole frames"
    table(f"CamVid, {what}: {len(train)} train and {len(test)} test images, {options.views} views", rows)
    return {"train": len(train), "test": len(test), "seconds": seconds, "rows": rows}


def camvid(options: argparse.Namespace) -> dict[str, Any]:
    return {"crops": camvid_protocol(options, True), "frames": camvid_protocol(options, False)}


# -- planted: known truth ---------------------------------------------------------------------------------------------

FIXED = LinearConfig(resolution=64, smoothness=0.05, robust=False, residual=False)
SMALL_NEURAL = NeuralConfig(levels=8, finest=128, steps=1000, lr=0.02)


def photograph(options: argparse.Namespace) -> Tensor:
    """The photograph whose filter responses are the planted field."""
    if options.image:
        return load_image(options.image)
    from skimage.data import astronaut

    return torch.from_numpy(astronaut()).permute(2, 0, 1).float() / 255


def errors(fit: Fit, problem: Planted, raw: Tensor) -> dict[str, float]:
    """Relative errors of every estimate on the whole image, and of F over the tokens of all views."""
    terms = fit.decompose(raw, problem.coords)
    everywhere = problem.view_coords.flatten(1, 2)
    return {
        "F": relative_error(terms.field, problem.field),
        "F over tokens": relative_error(fit.semantic(everywhere), problem.truth(everywhere)),
        "G": relative_error(terms.artifact, problem.artifact),
        "raw - G": relative_error(raw - terms.artifact, problem.field),
        "semantic": relative_error(terms.semantic, problem.field),
    }


def timed(fit: Callable[[], Fit], runs: int = 1) -> tuple[Fit, float]:
    """The fit and the seconds of the fastest of some runs."""
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        result = fit()
        best = min(best, time.perf_counter() - start)
    return result, best


def seconds_of_steps(config: NeuralConfig, batches: list, steps: int = 20) -> float:
    """Seconds that all steps of a configuration take, from the time between the first and the last of a few."""
    times: list[float] = []
    short = replace(config, steps=steps)
    NeuralSolver(short).fit(batches, progress=lambda done, total: times.append(time.perf_counter()))
    return (times[-1] - times[0]) / (steps - 1) * config.steps


def planted(options: argparse.Namespace) -> dict[str, Any]:
    """Both solvers on one planted problem, and the linear one with planted outliers."""
    problem = Planted(photograph(options), PlantedConfig())
    batches = list(problem)
    raw = batches[0][0][0]
    solvers: dict[str, tuple[Callable[[], Fit], int]] = {
        "linear, fixed resolution 64": (lambda: LinearSolver(FIXED).fit(batches), 3),
        "linear, defaults": (lambda: LinearSolver().fit(batches), 3),
        "neural, 8 levels, 1,000 steps": (lambda: NeuralSolver(SMALL_NEURAL).fit(batches), 1),
        "neural, 8 levels, 2,000 steps, lr .01": (
            lambda: NeuralSolver(NeuralConfig(levels=8, finest=128, steps=2000)).fit(batches),
            1,
        ),
    }
    rows = []
    for name, (fit, runs) in solvers.items():
        start = time.process_time()
        result, seconds = timed(fit, runs)
        processor = (time.process_time() - start) / runs
        found = errors(result, problem, raw)
        rows.append({"solver": name, **found, "seconds": seconds, "processor_seconds": processor})
    for row in rows:
        row["times fixed"] = row["seconds"] / rows[0]["seconds"]
    table(f"Planted, {len(problem)} views of 16x16, C=64; raw error {relative_error(raw, problem.field):.3f}", rows)
    paper = seconds_of_steps(NeuralConfig(), batches)
    print(f"  the paper's neural settings (16 levels, 25,000 steps), from 20 steps: {paper:.0f} s")
    print(f"  that is {paper / rows[0]['seconds']:.0f} times linear fixed, {paper / rows[1]['seconds']:.0f} defaults")
    return {"rows": rows, "paper_seconds": paper, "outliers": planted_outliers(options)}


def planted_outliers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The robust weights' effect: .02 of the tokens carry a large residual that depends on their content."""
    image, rows = photograph(options), []
    for share in (0.0, 0.02):
        problem = Planted(image, PlantedConfig(outliers=share))
        batches = list(problem)
        for robust in (True, False):
            fit = LinearSolver(LinearConfig(robust=robust)).fit(batches)
            rows.append({"outliers": share, "robust": robust, **errors(fit, problem, batches[0][0][0])})
    clean = rows[0]["F over tokens"]
    rows = [row | {"F over tokens / clean": row["F over tokens"] / clean} for row in rows]
    table("Planted outliers, linear solver, its other settings at their defaults", rows)
    return rows


def views(options: argparse.Namespace) -> dict[str, Any]:
    """Error against the number of views."""
    image, rows = photograph(options), []
    for count in (8, 16, 32, 48, 64, 128, 256, 512, 768):
        found = []
        for seed in range(5):
            problem = Planted(image, PlantedConfig(views=count, seed=seed))
            batches = list(problem)
            fit, seconds = timed(lambda batches=batches: LinearSolver().fit(batches))
            found.append(errors(fit, problem, batches[0][0][0]) | {"seconds": seconds})
        mean = {key: statistics.mean(row[key] for row in found) for key in found[0]}
        spread = statistics.stdev(row["semantic"] for row in found)
        rows.append({"views": count, **mean, "std of semantic": spread})
    table("Planted, error against views (linear, defaults; mean of 5 seeds)", rows)
    return {"rows": rows}


# -- full: the reference's size ---------------------------------------------------------------------------------------

FULL = PlantedConfig(channels=768, grid=(37, 37), views=768)
CONFIGS = {
    "resolution 96": LinearConfig(resolution=96, smoothness=0.05, robust=False, residual=False),
    "everything on": LinearConfig(),
}


class StoredViews:
    """Views read from a file of half-precision tokens, so that neither making nor keeping them counts."""

    def __init__(self, folder: Path, device: str = "cpu", batch: int = 16):
        self.file, self.device, self.batch = folder / "tokens.f16", device, batch
        self.truth = torch.load(folder / "truth.pt", weights_only=True)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with open(self.file, "rb") as file:
            for coords in self.truth["view_coords"].split(self.batch):
                start = time.perf_counter()
                shape = (*coords.shape[:3], self.truth["field"].shape[-1])
                tokens = torch.from_numpy(np.fromfile(file, np.float16, int(np.prod(shape)))).view(shape)
                batch = tokens.to(self.device).float(), coords.to(self.device)
                self.seconds += time.perf_counter() - start
                yield batch


def make_views(folder: Path, options: argparse.Namespace) -> None:
    """Write the full-size planted problem; run in a process of its own, as it takes gigabytes."""
    problem = Planted(photograph(options), FULL)
    truth = {"coords": problem.coords, "field": problem.field, "artifact": problem.artifact}
    torch.save(truth | {"view_coords": problem.view_coords}, folder / "truth.pt")
    with open(folder / "tokens.f16", "wb") as file:
        for tokens, _ in problem:
            tokens.half().numpy().tofile(file)


def peak_memory() -> int:
    """Most bytes that this process has held at once."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent's memory too where the child was made by vfork
        return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_full(folder: Path, name: str) -> dict[str, Any]:
    """One fit on the CPU: seconds without reading, growth of the peak memory, errors."""
    source = StoredViews(folder)
    next(iter(source))
    truth, before, source.seconds = source.truth, peak_memory(), 0.0
    load = os.getloadavg()[0]
    fit, seconds = timed(lambda: LinearSolver(CONFIGS[name]).fit(source))
    grown = peak_memory() - before
    raw = next(iter(source))[0][0]
    terms = fit.decompose(raw, truth["coords"])
    return {
        "fit": f"linear, {name}",
        "F": relative_error(terms.field, truth["field"]),
        "G": relative_error(terms.artifact, truth["artifact"]),
        "semantic": relative_error(terms.semantic, truth["field"]),
        "resolution": fit.config.resolution,
        "seconds": seconds - source.seconds,
        "reading": source.seconds,
        "GB": grown / 1e9,
        "load": load,
    }


def measure_cuda(folder: Path) -> dict[str, Any]:
    """Seconds of both solvers on a GPU that holds the views already."""
    batches = list(StoredViews(folder, "cuda"))

    def once(config: LinearConfig) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        LinearSolver(config).fit(batches)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds = {name: min(once(config) for _ in range(3)) for name, config in CONFIGS.items()}
    return seconds | {"neural, from 200 steps": seconds_of_steps(NeuralConfig(), batches, 200)}


def full(options: argparse.Namespace) -> dict[str, Any]:
    """The reference's full size, every measurement in a process of its own."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        child(folder, "make", options)
        rows = [child(folder, name, options) for name in CONFIGS]
        table("Full size: 769 views of 37x37, C=768", rows)
        cuda = child(folder, "cuda", options) if torch.cuda.is_available() else None
    print(f"  seconds on the GPU: {cuda}" if cuda else "  no CUDA device here: its times are left out")
    return {"rows": rows, "cuda": cuda}


def child(folder: str, job: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", folder, job, "--threads", str(options.threads)]
    command += ["--image", str(options.image)] if options.image else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_child(options: argparse.Namespace) -> dict[str, Any]:
    folder, job = Path(options.child[0]), options.child[1]
    if job == "make":
        make_views(folder, options)
        return {}
    return measure_cuda(folder) if job == "cuda" else measure_full(folder, job)


# -- natural photographs through a trained ViT ------------------------------------------------------------------------


class ForwardClock:
    """Seconds that a backbone spends in its forward pass."""

    def __init__(self, backbone: Backbone):
        self.seconds, self.began = 0.0, 0.0
        backbone.register_forward_pre_hook(self._start)
        backbone.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.began


def natural(options: argparse.Namespace) -> dict[str, Any]:
    """Position in the terms of real features, and where the time goes."""
    backbone = load_backbone(MODEL, weights=WEIGHTS)
    clock = ForwardClock(backbone)
    maps: dict[str, list[Tokens]] = {}
    paths = pick(sorted(options.natural.glob("*.jpg")), options.limit)
    load_image(paths[0])
    config = DenoiseConfig(product="blend")
    denoise_image(backbone, paths[0], config)
    clock.seconds, start, spent = 0.0, time.perf_counter(), {"extraction": 0.0, "fitting": 0.0}
    for path in paths:
        done = denoise_image(backbone, path, config)
        terms = done.decomposition
        spent["extraction"] += done.extraction_seconds
        spent["fitting"] += done.fitting_seconds
        found = {"raw": terms.raw, "F": terms.field, "semantic": terms.semantic, "G": terms.artifact}
        for name, tokens in (found | {"raw - G": terms.raw - terms.artifact}).items():
            maps.setdefault(name, []).append(Tokens.of(tokens))
    spent |= {"all": time.perf_counter() - start, "forward": clock.seconds}
    seconds = {name: value / len(paths) for name, value in spent.items()}
    rows = [position_row(name, tokens, options.mic_images) for name, tokens in maps.items()]
    table(f"{len(paths)} photographs, {config.views.count} views: position in each term", rows)
    share = 1 - seconds["forward"] / seconds["all"]
    print(f"  seconds an image: {', '.join(f'{name} {value:.2f}' for name, value in seconds.items())}")
    print(f"  share of everything but the backbone's forward pass: {share:.2f}")
    return {"images": len(paths), "rows": rows, "seconds_an_image": seconds, "share_besides_forward": share}


def position_row(name: str, tokens: list[Tokens], mic_images: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    some = tokens[:: max(1, len(tokens) // mic_images)][:mic_images]
    read = with_null(position_decodability, tokens, generator, draws=3)
    mic = with_null(position_mic, some, generator, draws=2)
    return {"term": name, "R2": read.value, "its null": read.null, "MIC": mic.value, "MIC null": mic.null}


# -- the command ------------------------------------------------------------------------------------------------------

SECTIONS = {"planted": planted, "full": full, "views": views, "camvid": camvid, "natural": natural}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=["all"], help=f"of {', '.join(SECTIONS)}, or all")
    parser.add_argument("--camvid", type=Path, help="folder with images/ and annotations/, each with train/ and test/")
    parser.add_argument("--natural", type=Path, help="folder of photographs (.jpg)")
    parser.add_argument("--image", type=Path, help="photograph of the planted problem (scikit-image's astronaut)")
    parser.add_argument("--images", type=int, default=120, help="CamVid training images; half as many for the test")
    parser.add_argument("--views", type=int, default=32, help="views of a CamVid image")
    parser.add_argument("--limit", type=int, default=120, help="photographs of --natural that are used")
    parser.add_argument("--mic-images", type=int, default=12, help="of these, how many for the MIC")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sections = list(SECTIONS) if "all" in options.sections else options.sections
    if wrong := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(wrong))}; choose from {', '.join(SECTIONS)}, all")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(run_child(options)))
        return
    results: dict[str, Any] = {"threads": options.threads, "cores": os.cpu_count(), "torch": torch.__version__}
    for name in options.sections:
        folder = getattr(options, name) if name in ("camvid", "natural") else Path()
        if folder is None or not folder.is_dir():
            print(f"\n{name}: skipped, its folder {'is not given' if folder is None else f'{folder} is missing'}")
            continue
        load, start = os.getloadavg(), time.perf_counter()
        found = SECTIONS[name](options)
        results[name] = found | {"wall": time.perf_counter() - start, "load": [load, os.getloadavg()]}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
