"""Run `dvt prior train|sample|evaluate`: what can be generated from the tokens shows what they hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from dvt.analysis.priors.runs import PriorTraining
from dvt.cli.common import DenoiserOptions, plain, progress_bar, quiet_unless_first, resolved, shown
from dvt.devices import find_device
from dvt.images import find_images


@dataclass(frozen=True)
class PriorTrain(DenoiserOptions):
    """Train a generative prior on images and the tokens that a backbone sees in them, raw or denoised.

    The same command goes on where it was stopped. `accelerate launch --module dvt.cli prior train ...` uses several
    GPUs.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths."""
    out: Path
    """The run's folder."""
    # No prefixes: the settings of the training loop inside it are --steps, --batch-size and so on.
    prior: Annotated[PriorTraining, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(
        default_factory=PriorTraining
    )
    """What is trained, and how."""


@dataclass(frozen=True)
class PriorSample:
    """Draw samples beside the held-out images that they are conditioned on; the run's folder is all it needs."""

    run: tyro.conf.Positional[Path]
    """A folder of `dvt prior train`."""
    out: Path | None = None
    """The .png file to write; samples.png in the run's folder if not given."""
    images: int = 8
    """Rows at most, one a held-out image."""
    samples: int = 4
    """Samples of each."""
    steps: int = 18
    """Noise levels of the sampler."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 for none."""
    seed: int = 0
    """Seed of the samples."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; "auto" takes a GPU where there is one."""
    json: bool = False
    """Print one JSON object on standard output, everything else on standard error."""


@dataclass(frozen=True)
class PriorEvaluate(DenoiserOptions):
    """Measure a prior on its held-out images: round trip, Frechet distance, memorisation, each beside its null."""

    run: tyro.conf.Positional[Path]
    """A folder of `dvt prior train`; give the backbone and the denoiser of the training."""
    steps: int = 18
    """Noise levels of the sampler."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 for none."""
    seed: int = 0
    """Seed of the samples."""


@dataclass(frozen=True)
class PriorCommand:
    """Train, sample or evaluate a generative prior on tokens."""

    action: Annotated[
        Annotated[PriorTrain, tyro.conf.subcommand("train", prefix_name=False)]
        | Annotated[PriorSample, tyro.conf.subcommand("sample", prefix_name=False)]
        | Annotated[PriorEvaluate, tyro.conf.subcommand("evaluate", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    @property
    def json(self) -> bool:
        return self.action.json


def prior(command: PriorCommand, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt prior`: exit code 0 when the action is done."""
    action = command.action
    if isinstance(action, PriorTrain):
        return _train(action, console)
    return _sample(action, console) if isinstance(action, PriorSample) else _evaluate(action, console)


def _train(command: PriorTrain, console: Console) -> tuple[int, dict[str, Any]]:
    from dvt.analysis.priors.runs import train_prior

    paths = find_images(command.images)
    settings = resolved(command, command="prior train", images=paths)
    console = quiet_unless_first(console)
    backbone = command.load()
    denoiser, device = command.token_function(backbone), find_device(command.device)
    with progress_bar(console) as progress:
        report = train_prior(paths, backbone, command.out, command.prior, denoiser, progress, device)
    counts = f"{report['training']} images to learn from, {report['held_out']} held out"
    losses = f"loss {report['loss']:.4f}, held out {report['held_out_loss']:.4f} (1 is an untrained prior)"
    console.print(f"{counts}; {losses}; {report['seconds']:.0f} s")
    run = shown(str(command.out))
    console.print(f"run: {run}; samples: {shown(report['samples'])}; more by `dvt prior sample {run}`")
    return 0, {**report, "settings": settings}


def _sample(command: PriorSample, console: Console) -> tuple[int, dict[str, Any]]:
    from dvt.analysis.priors.runs import sample_prior

    report = sample_prior(
        command.run,
        command.out,
        command.images,
        command.samples,
        command.steps,
        command.guidance,
        command.seed,
        device=find_device(command.device),
    )
    console.print(f"{shown(str(report['out']))}: {report['samples']} samples of {report['images']} images")
    return 0, {**report, "out": str(report["out"]), "settings": plain(command, command="prior sample")}


def _evaluate(command: PriorEvaluate, console: Console) -> tuple[int, dict[str, Any]]:
    from dvt.analysis.priors.runs import evaluate_prior

    settings = resolved(command, command="prior evaluate")
    backbone = command.load()
    report = evaluate_prior(
        command.run,
        backbone,
        command.token_function(backbone),
        command.steps,
        command.guidance,
        command.seed,
        find_device(command.device),
    )
    _print_evaluation(console, report)
    return 0, {**report, "settings": settings}


def _print_evaluation(console: Console, report: dict[str, Any]) -> None:
    table = Table("", "value", "beside it")
    table.add_row("held-out loss", f"{report['held_out_loss']:.4f}", "1 untrained")
    if (trip := report["round_trip"]) is not None:
        beside = f"{trip['shuffled']:.4f} other conditions; {trip['sigmas']:.1f} standard errors apart"
        table.add_row("round-trip cosine", f"{trip['matched']:.4f}", f"{beside}; {trip['ceiling']:.4f} real pictures")
    frechet = report["frechet"]
    table.add_row("Frechet distance", f"{frechet['generated']:.3f}", f"{frechet['held_out']:.3f} held-out images")
    if (copies := report["memorisation"]) is not None:
        values = ", ".join(f"{name} {value:.3f}" for name, value in copies.items())
        table.add_row("memorisation", values, "share .05 is chance")
    console.print(table)
