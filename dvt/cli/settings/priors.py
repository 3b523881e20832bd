"""Hold the settings of `dvt prior` and its subcommands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dvt.analysis.priors.config import PriorTraining, Sampling
from dvt.analysis.priors.job_config import Comparison, EncoderConfig, Itit, Loop, Represent, TowerTraining
from dvt.cli.settings.common import DenoiserOptions, Options, Remade
from dvt.training.config import TrainingConfig


@dataclass(frozen=True)
class PriorFlags(PriorTraining):
    """Name the flags of the training loop without a prefix, as for the denoiser: --steps, not --prior.loop.steps."""

    loop: Annotated[TrainingConfig, tyro.conf.arg(name="")] = PriorTraining.loop
    """Settings of the training loop."""


@dataclass(frozen=True)
class PriorTrain(DenoiserOptions, Remade):
    """Train a generative prior on images and their tokens, raw or denoised.

    Run the same command again to continue an interrupted run. `accelerate launch --module dvt.cli prior train ...` uses
    several GPUs.
    """

    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders (searched recursively), globs, or a .txt list of paths."""
    out: Path = Path("run")
    """The run's folder."""
    store: Path | None = None
    """A feature store whose tokens are used, instead of images and a backbone."""
    term: str = "raw"
    """Which of the store's terms: raw, semantic, artifact, residual or denoised."""
    start: Path | None = None
    """Folder of another run whose weights this run starts from, to train longer or with another condition."""
    prior: Annotated[PriorFlags, tyro.conf.arg(name="")] = field(default_factory=PriorFlags)
    """Settings of the prior and its training."""


@dataclass(frozen=True)
class PriorSample(DenoiserOptions):
    """Draw samples: a sheet of samples beside the held-out images, or files for given images, labels or texts."""

    run: tyro.conf.Positional[Path]
    """A folder of `dvt prior train`."""
    out: Path | None = None
    """A .png file for a sheet, by default samples.png in the run's folder; or a folder, for files and arrays."""
    condition: tuple[Path, ...] = ()
    """Images whose tokens condition the samples; give the backbone and the denoiser of the training."""
    label: tuple[str, ...] = ()
    """Names of classes that condition the samples, for a prior that was trained with labels."""
    text: tuple[str, ...] = ()
    """Texts that condition the samples, for a prior that was trained on texts or pseudo-texts."""
    images: int = 8
    """The largest number of rows of a sheet, each with one held-out image."""
    count: int = 4
    """Samples per condition."""
    sampling: Annotated[Sampling, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)
    """How samples are drawn."""


@dataclass(frozen=True)
class PriorEvaluate(Options):
    """Measure priors on their held-out images with common yardsticks: round trip, distances and memorisation."""

    run: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of `dvt prior train`, of the same images."""
    yardstick: str | None = None
    """A timm model whose features are compared, in addition to pixels and random filters; choose one that conditioned
    none of the runs."""
    yardstick_weights: str | None = None
    """A file with the yardstick's weights; "demo" means the small ViT that comes with dvt."""
    yardstick_size: int | None = None
    """Shorter side of the yardstick's input in pixels."""
    head: Path | None = None
    """A head of `dvt probe segmentation --save`, frozen, that compares generated features with the real ones."""
    count: int = 2000
    """The smallest number of samples per run."""
    sampling: Annotated[Sampling, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)
    """How samples are drawn."""


@dataclass(frozen=True)
class PriorCompare(DenoiserOptions, Remade):
    """Compare priors conditioned on raw and on clean tokens, with the same seeds, split and budget, over steps.

    Run the same command again to continue with the missing runs.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths."""
    out: Path
    """The folder for compare.json, page.html and the runs."""
    decompose: bool = False
    """Also compare raw - G (one artifact for all images), and the products removed and ensembled of each image's own
    decomposition."""
    views: int | None = None
    """Views per image of these decompositions; by default as `dvt denoise` takes them."""
    comparison: Annotated[Comparison, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(
        default_factory=Comparison
    )
    """Settings of the comparison and its budget."""


@dataclass(frozen=True)
class PriorLoop(Options, Remade):
    """Refit a prior without a condition on its own samples, round after round, and measure how it changes."""

    run: tyro.conf.Positional[Path]
    """A folder of `dvt prior train --condition None`."""
    out: Path
    """A folder for the rounds and loop.json."""
    loop: Annotated[Loop, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(default_factory=Loop)
    """Settings of the loop."""
    sampling: Annotated[Sampling, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)
    """How samples are drawn."""


@dataclass(frozen=True)
class RepresentFlags(Represent):
    """Name the flags of the encoder and of its training without a prefix."""

    encoder: Annotated[EncoderConfig, tyro.conf.arg(name="")] = Represent.encoder
    """The encoder and its loss."""
    loop: Annotated[TrainingConfig, tyro.conf.arg(name="")] = Represent.loop
    """Settings of the encoder's training loop."""


@dataclass(frozen=True)
class PriorRepresent(Options, Remade):
    """Train encoders on a prior's samples, and probe them on real labels beside encoders of real images."""

    run: tyro.conf.Positional[Path]
    """A folder of `dvt prior train` with a condition, on images in folders named after their class."""
    out: Path
    """A folder for the samples, the encoders, represent.json and curves.png."""
    test: tuple[str, ...] = ()
    """Labelled images to score on, in folders named as the training images'; by default the run's held-out images."""
    represent: Annotated[RepresentFlags, tyro.conf.arg(name="")] = field(default_factory=RepresentFlags)
    """Settings of encoders and probes."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="sampling")] = field(default_factory=Sampling)
    """How samples are drawn; its flags begin with --sampling, because --steps is that of the training."""


@dataclass(frozen=True)
class TowerFlags(TowerTraining):
    """Name the flags of the encoders and of their training without a prefix."""

    encoder: Annotated[EncoderConfig, tyro.conf.arg(name="")] = TowerTraining.encoder
    """The picture encoder; the text encoder is as large."""
    loop: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TowerTraining.loop
    """Settings of the training loop."""


@dataclass(frozen=True)
class PriorTower(Options, Remade):
    """Train a small image-text tower on images and their texts, with rewrites, and score it by the names of classes."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths."""
    text_file: Annotated[Path, tyro.conf.arg(name="texts")]
    """A file of JSON lines: {"image": NAME, "text": TEXT, "rewrites": [TEXT, ...]}, with names relative to the file."""
    out: Path
    """The .safetensors file to write; checkpoints and log.csv go beside it, to NAME.run."""
    test: tuple[str, ...] = ()
    """Labelled images to score on, in folders named after their class; by default the held-out images."""
    tower: Annotated[TowerFlags, tyro.conf.arg(name="")] = field(default_factory=TowerFlags)
    """Settings of the tower and its training."""


@dataclass(frozen=True)
class ItitFlags(Itit):
    """Name the flags of the training loop without a prefix."""

    loop: Annotated[TrainingConfig, tyro.conf.arg(name="")] = Itit.loop
    """Settings of the training loop."""


@dataclass(frozen=True)
class PriorItit(Options, Remade):
    """Train priors from image to text and back with few pairs, with and without cycles over unpaired images and texts.

    Run the same command again to continue with the missing runs.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths; folders are named after a word of the
    images' texts."""
    texts: Path
    """A file of JSON lines: {"image": NAME, "text": TEXT}, with names relative to the file."""
    out: Path
    """A folder for the runs, itit.json and samples.png."""
    test: tuple[str, ...] = ()
    """Images to score on, with texts in the same file; by default a share of the images is held out."""
    itit: Annotated[ItitFlags, tyro.conf.arg(name="")] = field(default_factory=ItitFlags)
    """Settings of the priors and their training."""
