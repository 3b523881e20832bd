"""Small studies of generative priors, each against its control: `dvt prior`'s parts on scikit-learn's digits.

python benchmarks/priors_studies.py lumos      # a second stage on labels, against the same prior from scratch
python benchmarks/priors_studies.py lafite     # trained without a text, asked with one; the noise and its controls
python benchmarks/priors_studies.py laclip     # a small image-text tower with rewritten texts, against none
python benchmarks/priors_studies.py fluid      # continuous or discrete tokens, in random or raster order
python benchmarks/priors_studies.py mar        # how often the trunk is called, temperature, guidance
python benchmarks/priors_studies.py lumos --smoke   # seconds: whether it runs
python benchmarks/priors_studies.py laclip --images DATA   # DATA/train/CLASS, DATA/test/CLASS, DATA/texts.jsonl

Samples are judged by how many of them a classifier of real test pictures (nearest neighbours in pixels) takes for the
class that was asked for, and by the kernel distance to real test pictures in fixed random filters. Means with 95 % t
intervals over seeds. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

import dvt
from dvt.analysis.priors.compare import interval
from dvt.analysis.priors.compare_page import with_interval
from dvt.analysis.priors.conditions import conditions_of_labels, conditions_of_texts
from dvt.analysis.priors.evaluate import kernel_distance
from dvt.analysis.priors.job_config import EncoderConfig, TowerTraining
from dvt.analysis.priors.run_folder import open_run
from dvt.analysis.priors.runs import PriorTraining, Sampling, train_prior
from dvt.analysis.priors.sampling import draw_maps
from dvt.analysis.priors.scoring import pooled, random_filters
from dvt.analysis.priors.tower import Tower
from dvt.analysis.priors.tower_run import measure, train_tower
from dvt.analysis.probes.classification import KnnClassification
from dvt.images import load_image
from dvt.views import resize
from tables import table

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORIGINAL, REWRITES = "a photo of the {}", ("a handwritten {}", "this is the number {}", "somebody wrote {} here")
UNSEEN = ("a handwritten {}", "look at this {}")  # the first is a rewrite, the second is in no text

Scores = dict[str, dict[str, list[float]]]
"""For each row and measure, the values of all seeds."""


@dataclass(frozen=True)
class Data:
    """Images in folders named after their class, their texts, and the size of everything.

    Args:
        folder: holds train/CLASS/*, test/CLASS/* and texts.jsonl.
        side: of the pictures, in pixels.
        patch: of a target token, in pixels.
        steps: a unit of training; studies take multiples of it.
        seeds: runs of each row.
        scratch: a folder for runs.
        sheet: real pictures and, of each row's first seed, sampled ones: one of every class.
    """

    folder: Path
    side: int
    patch: int
    steps: int
    seeds: int
    scratch: Path
    sheet: dict[str, torch.Tensor] = field(default_factory=dict)

    def files(self, split: str) -> list[Path]:
        return sorted(path for path in (self.folder / split).rglob("*.*") if path.is_file())

    def pictures(self, split: str) -> tuple[torch.Tensor, list[str]]:
        files = self.files(split)
        size = (self.side, self.side)
        return torch.stack([resize(load_image(path), size) for path in files]), [path.parent.name for path in files]

    def training(self, seed: int, steps: int, **changes: Any) -> PriorTraining:
        loop = replace(PriorTraining().loop, steps=steps, batch_size=32, learning_rate=3e-3, ema=0.98, seed=seed)
        loop = replace(loop, checkpoint_every=steps, validate_every=steps, log_every=steps)
        common = {"side": self.side, "patch": self.patch, "width": 48, "depth": 2, "held_out": 0.05, "loop": loop}
        return PriorTraining(**{**common, **changes})


def write_digits(folder: Path, each: tuple[int, int]) -> None:
    """Digits of scikit-learn, so many of each class to learn from and to test on, with texts."""
    from sklearn.datasets import load_digits

    digits, lines = load_digits(), []
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0)).tolist()
    for number, word in enumerate(WORDS):
        rows = [row for row in order if digits.target[row] == number]
        for split, some in (("train", rows[: each[0]]), ("test", rows[each[0] : sum(each)])):
            for row in some:
                path = folder / split / word / f"{row:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((digits.images[row] / 16 * 255).round().astype("uint8")).save(path)
                if split == "train":
                    lines.append(
                        {
                            "image": f"train/{word}/{path.name}",
                            "text": ORIGINAL.format(word),
                            "rewrites": [text.format(word) for text in REWRITES],
                        }
                    )
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))


class Judge:
    """Score sampled pictures of asked classes, with real test pictures as the truth."""

    def __init__(self, data: Data) -> None:
        self.real, named = data.pictures("test")
        self.names = sorted(set(named))
        self.probe = KnnClassification(len(self.names), 5)
        self.probe.fit(_rows(self.real), [torch.tensor(self.names.index(name)) for name in named])
        self.stick = random_filters()
        self.seen = pooled(self.stick(self.real))
        self.sheet = data.sheet
        self.sheet["real"] = torch.stack([self.real[named.index(name)] for name in self.names])

    def __call__(self, row: str, pictures: torch.Tensor, asked: list[str]) -> dict[str, float]:
        self.sheet.setdefault(row, torch.stack([pictures[asked.index(name)] for name in self.names]))
        found = [self.names[int(number)] for number in self.probe.predict(_rows(pictures))]
        right = sum(a == b for a, b in zip(found, asked, strict=True)) / len(asked)
        distance = kernel_distance(self.seen, pooled(self.stick(pictures))).value
        return {"asked class": right, "kernel distance": distance}


def _rows(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.flatten(1)[:, None, None]


def drawn(run: Path, conditions: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    opened = open_run(run, "cpu")
    return opened.pictures_of(draw_maps(sampling, opened.prior, conditions, len(conditions))[0])


def add(scores: Scores, row: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        scores.setdefault(row, {}).setdefault(name, []).append(value)


def asked_labels(judge: Judge, run: Path, each: int) -> tuple[torch.Tensor, list[str]]:
    """Conditions of labels, `each` of every class, and their names."""
    names = [name for name in judge.names for _ in range(each)]
    return conditions_of_labels(open_run(run, "cpu").prior.card, names), names


# --- the studies


def lumos(data: Data) -> Scores:
    """Stage one without labels, then labels on all or a tenth of the pairs; the control starts from scratch."""
    judge, scores = Judge(data), dict[str, dict[str, list[float]]]()
    backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights(), size=64)
    for seed in range(data.seeds):
        first = data.scratch / f"first-{seed}"
        train_prior(data.folder / "train", backbone, first, data.training(seed, 3 * data.steps, condition="mean"))
        for pairs in (1.0, 0.1):
            rows = {"second stage": (first, data.steps), "scratch": (None, data.steps)}
            rows["scratch, as many steps in all"] = (None, 4 * data.steps)
            for name, (start, steps) in rows.items():
                run = data.scratch / f"{name}-{pairs}-{seed}"
                config = data.training(seed, steps, condition="label", pairs=pairs)
                report = train_prior(data.folder / "train", None, run, config, start=start)
                row = f"{name}, {pairs:.0%} of the pairs"
                conditions, names = asked_labels(judge, run, 10)
                made = drawn(run, conditions, Sampling(steps=12, guidance=2, seed=seed))
                values = {"held-out loss": report["held_out_loss"], **judge(row, made, names)}
                add(scores, row, values)
    return scores


def lafite(data: Data) -> Scores:
    """A prior that saw no text is asked with one; controls: no noise, and a prior trained on the texts themselves."""
    judge, scores = Judge(data), dict[str, dict[str, list[float]]]()
    for seed in range(data.seeds):
        tower = data.scratch / f"tower-{seed}.safetensors"
        train_tower(data.files("train"), data.folder / "texts.jsonl", tower, tower_settings(data, seed))
        rows: dict[str, dict[str, Any]] = {
            "image features, no noise": {"condition": "pseudo-text", "pseudo": "none"},
            "fixed noise": {"condition": "pseudo-text", "pseudo": "fixed"},
            "trained noise": {"condition": "pseudo-text", "pseudo": "trained"},
            "the texts themselves": {"condition": "text", "texts": str(data.folder / "texts.jsonl")},
        }
        for name, changes in rows.items():
            run = data.scratch / f"{name}-{seed}"
            config = data.training(seed, 4 * data.steps, tower=str(tower), **changes)
            train_prior(data.files("train"), None, run, config)
            names = [name for name in judge.names for _ in range(10)]
            texts = [ORIGINAL.replace("{}", name) for name in names]
            conditions = conditions_of_texts(run, open_run(run, "cpu").prior.card, texts)
            add(scores, name, judge(name, drawn(run, conditions, Sampling(steps=12, guidance=2, seed=seed)), names))
    return scores


def tower_settings(data: Data, seed: int, **changes: Any) -> TowerTraining:
    encoder = EncoderConfig(
        patch=data.patch, width=48, depth=2, project=32, flip=0.0 if data.side == 8 else 0.5, crop=0.6
    )
    loop = replace(TowerTraining().loop, steps=3 * data.steps, batch_size=48, validate_every=0, seed=seed)
    loop = replace(loop, checkpoint_every=loop.steps, log_every=loop.steps)
    return TowerTraining(data.side, 8, prompts=(ORIGINAL,), held_out=0.05, encoder=encoder, loop=loop, **changes)


def laclip(data: Data) -> Scores:
    """Zero-shot accuracy with the original's prompt, with that of a rewrite, and with one of no text."""
    scores: Scores = {}
    asked = data.pictures("test")
    for seed in range(data.seeds):
        for rewrites in (False, True):
            out = data.scratch / f"tower-{rewrites}-{seed}.safetensors"
            settings = tower_settings(data, seed, rewrites=rewrites)
            train_tower(data.files("train"), data.folder / "texts.jsonl", out, settings, data.files("test"))
            for prompt in (ORIGINAL, *UNSEEN):
                found = measure(Tower.load(out), asked, (asked[0][:1], ["none"]), (prompt,))["zero_shot"]
                add(scores, "rewrites" if rewrites else "originals alone", {prompt: found})
    return scores


def square(data: Data, seed: int) -> dict[str, Path]:
    """Train Fluid's square with one seed: kinds of tokens and orders."""
    runs = {}
    for order in ("random", "raster"):
        for codes in (0, 64):
            name = f"{'discrete' if codes else 'continuous'}, {order}"
            runs[name] = data.scratch / f"{name}-{seed}"
            config = data.training(seed, 6 * data.steps, condition="label", head="token", order=order, codes=codes)
            train_prior(data.files("train"), None, runs[name], config)
    return runs


def fluid(data: Data) -> Scores:
    """One trunk and one budget for all four; the seconds are those of sampling."""
    judge, scores = Judge(data), dict[str, dict[str, list[float]]]()
    for seed in range(data.seeds):
        for name, run in square(data, seed).items():
            conditions, names = asked_labels(judge, run, 10)
            before = time.process_time()
            made = drawn(run, conditions, Sampling(steps=12, ar_steps=8, seed=seed))
            add(scores, name, {**judge(name, made, names), "CPU seconds": time.process_time() - before})
    return scores


def mar(data: Data) -> Scores:
    """One continuous prior in random order, sampled in several ways."""
    judge, scores = Judge(data), dict[str, dict[str, list[float]]]()
    ways = {f"{steps} call{'s' * (steps > 1)} of the trunk": {"ar_steps": steps} for steps in (1, 2, 4, 8, 16)}
    ways |= {f"temperature {value}": {"temperature": value, "ar_steps": 8} for value in (0.8, 0.9)}
    ways |= {
        "guidance 3": {"guidance": 3.0, "ar_steps": 8},
        "guidance rising to 3": {"guidance": 3.0, "rising": True, "ar_steps": 8},
    }
    for seed in range(data.seeds):
        run = data.scratch / f"mar-{seed}"
        config = data.training(seed, 6 * data.steps, condition="label", head="token")
        train_prior(data.files("train"), None, run, config)
        conditions, names = asked_labels(judge, run, 10)
        for name, changes in ways.items():
            add(scores, name, judge(name, drawn(run, conditions, Sampling(steps=12, seed=seed, **changes)), names))
    return scores


def save_sheet(sheet: dict[str, torch.Tensor], path: Path) -> None:
    """Draw a row of pictures for each row of the study, one of every class."""
    figure = Figure(figsize=(9.5, 0.72 * len(sheet)), facecolor="white")
    columns = len(sheet["real"])
    for place, axis in enumerate(figure.subplots(len(sheet), columns, gridspec_kw={"left": 0.25, "right": 0.99}).flat):
        row, column = divmod(place, columns)
        name, pictures = list(sheet.items())[row]
        axis.imshow(pictures[column].clamp(0, 1).movedim(0, -1).numpy(), interpolation="nearest")
        axis.set_axis_off()
        if column == 0:
            axis.text(-0.2, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=100, bbox_inches="tight")


STUDIES: dict[str, Callable[[Data], Scores]] = {
    "lumos": lumos,
    "lafite": lafite,
    "laclip": laclip,
    "fluid": fluid,
    "mar": mar,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "--images", type=Path, help="a folder with train/CLASS, test/CLASS and texts.jsonl; else digits"
    )
    parser.add_argument("--side", type=int, default=8)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="a unit of training; studies take multiples of it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, help="a folder for runs, which are not repeated; a temporary one if not given"
    )
    parser.add_argument("--picture", type=Path, help="draw samples of the first seed to a PNG; laclip has none")
    parser.add_argument("--smoke", action="store_true", help="tiny: only whether it runs")
    options = parser.parse_args()
    if options.picture and options.study == "laclip":
        parser.error("laclip trains a tower, which draws no pictures")
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.images or Path(scratch) / "digits"
        if not options.images:
            write_digits(folder, (8, 4) if options.smoke else (60, 40))
        steps, seeds = (1, 2) if options.smoke else (options.steps, options.seeds)
        data = Data(folder, options.side, options.patch, steps, seeds, options.out or Path(scratch) / "runs")
        scores = STUDIES[options.study](data)
    if options.picture:
        save_sheet(data.sheet, options.picture)
    rows = {row: {name: interval(values) for name, values in found.items()} for row, found in scores.items()}
    table(options.study, [{"": row, **{k: with_interval(v) for k, v in found.items()}} for row, found in rows.items()])
    print(json.dumps({"study": options.study, "rows": rows, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
