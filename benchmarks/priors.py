"""What do the tokens hold? The same prior, on the same budget, told raw, denoised, position-only or foreign tokens.

python benchmarks/priors.py                                  # digits: under 5 minutes on 2 idle cores
python benchmarks/priors.py --images FOLDER --steps 1500     # photographs
python benchmarks/priors.py --smoke                          # seconds: whether it runs

Conditions, all of them patch tokens of the small ViT that comes with dvt:
    raw         as the backbone gives them
    subtracted  raw - G, with one artifact G for all images: as raw, but for the position
    denoised    the semantic term of each image's own decomposition, which has seen many views of it
    position    G itself: the same for every image
    shuffled    the raw tokens of another image: the null

The backbone's own features of the samples are the yardstick, less their mean over the training images at each
position: so nothing that is the same for all images counts, and all conditions are measured alike. Each section prints
a table; the last line of the output is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dvt
from dvt.analysis.priors.config import PriorConfig
from dvt.analysis.priors.evaluate import features, fit_power_law, frechet_distance, round_trip_cosine
from dvt.analysis.priors.prior import Prior
from dvt.analysis.priors.runs import fit_prior
from dvt.analysis.priors.sampling import held_out_loss
from dvt.analysis.priors.targets import PriorTarget
from dvt.analysis.priors.token_set import square
from dvt.backbones import Backbone
from dvt.fields.config import DenoiseConfig
from dvt.fields.image import denoise
from dvt.fields.shared import shared_artifact
from dvt.images import find_images, load_image
from dvt.training import TrainingConfig
from dvt.views import ViewConfig, resize
from tables import interval, table

KINDS = ("raw", "subtracted", "denoised", "position", "shuffled")
HELD_OUT_DRAWS = 32  # of noise for each image: all runs meet the same


def told(values: dict[str, float]) -> str:
    return f"{values['mean']:.3f} +- {values['half']:.3f}"


# -- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What every run has.

    Args:
        sizes: numbers of training images, ascending; the last ones' samples are measured.
        held_out: images that nothing is trained on.
        side: pixels of the images generated.
        patch: pixels of a target token.
        backbone: pixels of the backbone's input.
        views: of an image, for its decomposition.
        shared: images that the shared artifact is fitted on.
        width, depth: of the prior.
        steps, batch: of the training.
    """

    sizes: tuple[int, ...]
    held_out: int
    side: int
    patch: int
    backbone: int
    views: int
    shared: int
    width: int
    depth: int
    steps: int
    batch: int


DIGITS = Budget((48, 96, 192, 384), 96, 8, 2, 64, 16, 16, 64, 2, 300, 48)
PHOTOS = Budget((12, 24, 48, 96), 24, 32, 4, 112, 32, 24, 128, 3, 600, 24)
SMOKE = Budget((6, 8, 12, 16), 12, 8, 2, 64, 8, 4, 16, 1, 4, 6)


@dataclass(frozen=True)
class Material:
    """Images and their tokens; the first ones are for training, the last `held_out` of the budget are not.

    Args:
        pictures: (N, 3, S, S).
        tokens: by kind, (N, h w, C) patch tokens.
        grid: (h, w) of the tokens.
    """

    pictures: Tensor
    tokens: dict[str, Tensor]
    grid: tuple[int, int]


def open_images(options: argparse.Namespace, count: int) -> list[Tensor]:
    """Square images in a fixed random order, `count` of them."""
    if options.images:
        images = [square(load_image(path)) for path in find_images([options.images])]
    else:
        from sklearn.datasets import load_digits

        images = list(torch.from_numpy(load_digits().images).float()[:, None].expand(-1, 3, -1, -1) / 16)
    if len(images) < count:
        raise SystemExit(f"{count} images are needed, there are {len(images)}; give more, or smaller --sizes")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return [images[i] for i in order.tolist()]


def look(options: argparse.Namespace, budget: Budget) -> Material:
    """All images through the backbone, the decomposition, and the shared artifact of some of the training images."""
    backbone = make_backbone(budget)
    images = open_images(options, budget.sizes[-1] + budget.held_out)
    inputs = [resize(image, backbone.image_size) for image in images]
    config = DenoiseConfig(views=ViewConfig(count=budget.views))
    parts = [denoise(backbone, image, config) for image in inputs]
    raw, denoised = (torch.stack([getattr(part, name) for part in parts]) for name in ("raw", "semantic"))
    artifact = shared_artifact(backbone, inputs[: budget.shared], config)
    cut = budget.sizes[-1]
    foreign = torch.cat((raw[:cut].roll(1, 0), raw[cut:].roll(1, 0)))
    kinds = (raw, raw - artifact, denoised, artifact.expand_as(raw), foreign)
    tokens = {name: values.flatten(1, 2).half() for name, values in zip(KINDS, kinds, strict=True)}
    pictures = torch.stack([resize(image, (budget.side, budget.side)) for image in images])
    return Material(pictures, tokens, (raw.shape[1], raw.shape[2]))


def make_backbone(budget: Budget) -> Backbone:
    return dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=budget.backbone)


# -- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One prior: told tokens of this kind, trained on this many images, with this seed."""

    kind: str
    size: int
    seed: int


def run(job: Job, material: Material, budget: Budget) -> dict[str, Any]:
    """Train; then the held-out loss and, with the most images, samples for all held-out images."""
    torch.set_num_threads(1)
    cut, tokens = budget.sizes[-1], material.tokens[job.kind]
    rows = torch.randperm(cut, generator=torch.Generator().manual_seed(job.seed))[: job.size]
    target = PriorTarget("pixels", budget.patch)
    target = target.fitted(target.encode(material.pictures[:cut], material.tokens["raw"]))
    maps = target.standardise(target.encode(material.pictures, material.tokens["raw"]))
    config = PriorConfig(
        (maps.shape[1], maps.shape[2]),
        maps.shape[3],
        tokens.shape[-1],
        material.grid,
        width=budget.width,
        depth=budget.depth,
    )
    prior = Prior(config, torch.Generator().manual_seed(job.seed))
    training = TrainingConfig(
        budget.steps,
        min(budget.batch, job.size),
        2e-3,
        ema=0.98,
        seed=job.seed,
        checkpoint_every=budget.steps,
        log_every=50,
        validate_every=0,
    )
    held = (maps[cut:], tokens[cut:])
    with tempfile.TemporaryDirectory() as folder:
        fit_prior(prior, (maps[rows], tokens[rows]), held, training, folder)
    answer: dict[str, Any] = {"loss": held_out_loss(prior, *held, draws=HELD_OUT_DRAWS)}
    if job.size == budget.sizes[-1]:
        samples, _ = prior.sample(tokens[cut:], torch.Generator().manual_seed(job.seed))
        pictures = target.decode(samples)
        answer |= measured(pictures, material, budget) | {"pictures": pictures}
    return answer


def measured(pictures: Tensor, material: Material, budget: Budget) -> dict[str, float]:
    """Samples beside the truth, in the backbone's features; also of the truth itself at this number of pixels."""
    backbone, cut = make_backbone(budget), budget.sizes[-1]
    see = partial(features, backbone, read="patch", size=backbone.image_size)
    training, reals, made = (see(each) for each in (material.pictures[:cut], material.pictures[cut:], pictures))
    centre = training.mean(0)
    trip = round_trip_cosine(made - centre, reals - centre)
    mean = [each.mean((1, 2)) for each in (training, made, reals)]
    return {
        "matched": trip.matched,
        "shuffled": trip.shuffled,
        "sigmas": trip.sigmas,
        "frechet": frechet_distance(mean[0], mean[1]),
        "frechet_real": frechet_distance(mean[0], mean[2]),
    }


def run_all(jobs: list[Job], material: Material, budget: Budget, workers: int) -> list[dict[str, Any]]:
    if workers == 1:
        return [run(job, material, budget) for job in jobs]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(pool.map(partial(run, material=material, budget=budget), jobs))


# -- the experiment ---------------------------------------------------------------------------------------------------


def summarise(found: dict[Job, dict[str, Any]], budget: Budget, seeds: int) -> dict[str, Any]:
    """By kind: round trip and Frechet distance with the most images, the loss by size, the power law."""
    result: dict[str, Any] = {}
    for kind in KINDS:
        losses = [[found[Job(kind, size, seed)]["loss"] for seed in range(seeds)] for size in budget.sizes]
        law = fit_power_law(budget.sizes, losses)
        last = [found[Job(kind, budget.sizes[-1], seed)] for seed in range(seeds)]
        names = ("matched", "shuffled", "sigmas", "frechet", "frechet_real")
        scores = {name: interval([each[name] for each in last]) for name in names}
        gap = interval([each["matched"] - each["shuffled"] for each in last])
        raw = [found[Job("raw", budget.sizes[-1], seed)] for seed in range(seeds)]
        over = interval([each["matched"] - other["matched"] for each, other in zip(last, raw, strict=True)])
        by_size = {size: interval(values) for size, values in zip(budget.sizes, losses, strict=True)}
        result[kind] = {**scores, "gap": gap, "over_raw": over, "loss": by_size, "power_law": asdict(law)}
    return result


def tell(result: dict[str, Any], budget: Budget) -> None:
    told_kinds = [(kind, result[kind]) for kind in KINDS]
    names = ("matched", "shuffled", "gap", "over_raw", "frechet", "frechet_real")
    rows = [{"condition": kind, **{name: told(each[name]) for name in names}} for kind, each in told_kinds]
    table(f"samples of priors trained on {budget.sizes[-1]} images: centred cosine with the truth, distance", rows)
    rows = [
        {"condition": kind, **{str(size): told(each["loss"][size]) for size in budget.sizes}}
        for kind, each in told_kinds
    ]
    table("held-out loss by training images", rows)
    laws = [(kind, each["power_law"]) for kind, each in told_kinds]
    table(
        "log L = -k log D + b",
        [
            {"condition": kind, "k": w["k"], "low": w["low"], "high": w["high"], "scatter": w["residual"]}
            for kind, w in laws
        ],
    )


def draw(found: dict[Job, dict[str, Any]], material: Material, budget: Budget, out: Path, rows: int = 8) -> None:
    """Held-out images and a sample of each prior beside them."""
    from matplotlib.figure import Figure

    from dvt.analysis.pictures import save

    columns = {"real": material.pictures[budget.sizes[-1] :]}
    columns |= {kind: found[Job(kind, budget.sizes[-1], 0)]["pictures"] for kind in KINDS}
    figure = Figure(figsize=(1.2 * len(columns), 1.2 * rows + 0.3), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, len(columns))
    for column, (name, pictures) in enumerate(columns.items()):
        for row in range(rows):
            axes[row, column].imshow(pictures[row].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[row, column].set_axis_off()
        axes[0, column].set_title(name, fontsize=9, loc="left")
    save(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a folder of photographs; scikit-learn's digits if not given")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of training images, at least 4")
    parser.add_argument("--held-out", type=int)
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--smoke", action="store_true", help="tiny: only whether it runs")
    parser.add_argument("--out", type=Path, default=Path("priors.png"), help="the picture of samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    budget = SMOKE if options.smoke else PHOTOS if options.images else DIGITS
    changes = {"sizes": options.sizes and tuple(sorted(options.sizes)), "steps": options.steps}
    changes["held_out"] = options.held_out
    budget = replace(budget, **{name: value for name, value in changes.items() if value})

    start = time.perf_counter()
    material = look(options, budget)
    looked = time.perf_counter() - start
    print(f"{len(material.pictures)} images seen in {looked:.0f} s", flush=True)
    jobs = [Job(kind, n, seed) for n in reversed(budget.sizes) for kind in KINDS for seed in range(options.seeds)]
    found = dict(zip(jobs, run_all(jobs, material, budget, options.workers), strict=True))
    result = summarise(found, budget, options.seeds)
    tell(result, budget)
    draw(found, material, budget, options.out)
    seconds = time.perf_counter() - start
    about = {"data": options.images or "digits", "seeds": options.seeds, "budget": asdict(budget), "seconds": seconds}
    print(json.dumps({**about, "conditions": result, "picture": str(options.out)}))


if __name__ == "__main__":
    main()
