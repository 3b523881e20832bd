"""Settings of `dvt prior train|sample|evaluate|loop|compare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dvt.analysis.priors.config import Comparison, Loop, PriorTraining, Sampling
from dvt.cli.settings.common import DenoiserOptions, Options
from dvt.training.config import TrainingConfig


@dataclass(frozen=True)
class PriorFlags(PriorTraining):
    """Name the flags of the training loop without a prefix, as for the denoiser: --steps, not --prior.loop.steps."""

    loop: Annotated[TrainingConfig, tyro.conf.arg(name="")] = PriorTraining.loop
    """How the training loop runs."""


@dataclass(frozen=True)
class PriorTrain(DenoiserOptions):
    """Train a generative prior on images and the tokens that a backbone sees in them, raw or denoised.

    The same command goes on where it was stopped. `accelerate launch --module dvt.cli prior train ...` uses several
    GPUs.
    """

    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders (searched recursively), globs, or a .txt list of paths."""
    out: Path = Path("run")
    """The run's folder."""
    store: Path | None = None
    """A feature store whose tokens are taken, instead of images and a backbone."""
    term: str = "raw"
    """Which of the store's terms: raw, semantic, artifact, residual or denoised."""
    start: Path | None = None
    """Folder of another run whose weights this one starts from: to train it further, or on another condition."""
    prior: Annotated[PriorFlags, tyro.conf.arg(name="")] = field(default_factory=PriorFlags)
    """What is trained, and how."""


@dataclass(frozen=True)
class PriorSample(DenoiserOptions):
    """Draw samples: a sheet beside the held-out images, or files for what you say."""

    run: tyro.conf.Positional[Path]
    """A folder of `dvt prior train`."""
    out: Path | None = None
    """A .png file for a sheet, samples.png in the run's folder if not given; or a folder, for files and arrays."""
    condition: tuple[Path, ...] = ()
    """Images whose tokens condition the samples; give the backbone and the denoiser of the training."""
    label: tuple[str, ...] = ()
    """Names of classes, of a prior that was trained with labels."""
    images: int = 8
    """Rows of a sheet at most, one a held-out image."""
    count: int = 4
    """Samples of each condition."""
    sampling: Annotated[Sampling, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)
    """How samples are drawn."""


@dataclass(frozen=True)
class PriorEvaluate(Options):
    """Measure priors on their held-out images by one yardstick: round trip, distances, memorisation, beside nulls."""

    run: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of `dvt prior train`, of the same images."""
    yardstick: str | None = None
    """A timm model that looks, beside pixels and random filters; best one that no run was conditioned on."""
    yardstick_weights: str | None = None
    """Its weights, a file; "demo" means the small ViT that comes with dvt."""
    yardstick_size: int | None = None
    """Shorter side of its input in pixels."""
    count: int = 2000
    """Samples of each run at least."""
    sampling: Annotated[Sampling, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)
    """How samples are drawn."""


@dataclass(frozen=True)
class PriorCompare(DenoiserOptions):
    """Compare priors conditioned on raw and on cleaned tokens, with the same seeds, split and budget, against steps.

    The same command goes on with the runs that are missing.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths."""
    out: Path
    """The folder: compare.json, page.html and the runs."""
    decompose: bool = False
    """Also compare raw - G (one artifact for all images) and each image's own decomposition, removed and ensembled."""
    comparison: Annotated[Comparison, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(
        default_factory=Comparison
    )
    """What is compared, and the budget."""


@dataclass(frozen=True)
class PriorLoop(Options):
    """Refit a prior without a condition on its own samples, round after round, and measure what becomes of it."""

    run: tyro.conf.Positional[Path]
    """A folder of `dvt prior train --condition None`."""
    out: Path
    """A folder for the rounds and loop.json."""
    loop: Annotated[Loop, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(default_factory=Loop)
    """The loop."""
    sampling: Annotated[Sampling, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)
    """How samples are drawn."""


@dataclass(frozen=True)
class PriorCommand:
    """Train, sample, evaluate, loop or compare generative priors on tokens."""

    action: Annotated[
        Annotated[PriorTrain, tyro.conf.subcommand("train", prefix_name=False)]
        | Annotated[PriorSample, tyro.conf.subcommand("sample", prefix_name=False)]
        | Annotated[PriorEvaluate, tyro.conf.subcommand("evaluate", prefix_name=False)]
        | Annotated[PriorLoop, tyro.conf.subcommand("loop", prefix_name=False)]
        | Annotated[PriorCompare, tyro.conf.subcommand("compare", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    @property
    def json(self) -> bool:
        return self.action.json
