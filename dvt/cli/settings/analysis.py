"""Settings of `dvt analyze`, `dvt doctor`, `dvt probe` and `dvt report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dvt.analysis.config import AnalyzeConfig, DoctorConfig, ProbeConfig
from dvt.cli.settings.common import DenoiserOptions, LayersOptions, Options, Output
from dvt.fields.config import Product


@dataclass(frozen=True)
class Analyze(LayersOptions):
    """Measure the artifacts of a backbone's features: raw, decomposed and denoised, each beside its null."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths."""
    out: Path
    """Folder for report.json, tables and plots; `dvt report` makes one page of it."""
    store: Path | None = None
    """A store of `dvt denoise` with these images, whose terms are measured; without it, dvt decomposes the images."""
    product: Product | None = None
    """The product of a decomposition computed here; by default the one of `dvt denoise`."""
    views: int | None = None
    """Number of views of a decomposition computed here, beside the whole image; by default as many as the product
    needs; 0 for no decomposition."""
    compare: tuple[str, ...] = ()
    """Further backbones, by timm name, to measure beside the first; raw features only."""
    nulls: bool = False
    """Print what chance gives beside each number; the report holds it anyway."""
    analysis: Annotated[AnalyzeConfig, tyro.conf.arg(name="")] = field(default_factory=AnalyzeConfig)
    """Settings of the measurement."""


@dataclass(frozen=True)
class Doctor(DenoiserOptions):
    """Say on one page whether a backbone needs denoising, against what, and what it costs."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths; ten or more are better."""
    remedies: bool = False
    """Also compare what needs no training: the remedies, and the products of stage one."""
    doctor: Annotated[DoctorConfig, tyro.conf.arg(name="")] = field(default_factory=DoctorConfig)
    """Settings of the examination, and thresholds above which a value counts as an artifact."""


@dataclass(frozen=True)
class ProbeCommand(LayersOptions):
    """Score features on labelled data: raw, denoised and baselines in one table, with intervals."""

    probe: Annotated[ProbeConfig, tyro.conf.arg(name=""), tyro.conf.PositionalRequiredArgs]
    """The task, the data and the protocol."""
    store: Path | None = None
    """A store of `dvt denoise` with these images; its semantic tokens are a row of their own."""
    out: Path | None = None
    """A JSON file to write the results to."""
    save: Path | None = None
    """A .safetensors file for the trained head, which `dvt predict` takes: of the denoised features with --denoiser,
    of the upsampled ones with --upsample."""
    names: tuple[str, ...] = ()
    """Names of the classes in order, kept with the head."""


@dataclass(frozen=True, kw_only=True)
class Predict(Options):
    """Predict label maps, depth maps or boxes of photographs with the head that `dvt probe --save` kept."""

    head: tyro.conf.Positional[Path]
    """The head's file; it knows its backbone, denoiser and classes, and refuses others."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths."""
    out: Path
    """Folder for the predictions (labels/, depth/ or boxes.json) and overlays/, a picture for each photograph."""
    backbone: str | None = None
    """Name of the backbone, if it is loaded by another name than the head knows."""
    weights: str | None = None
    """A file instead of the hub's weights, or "demo"; they must be those that the head was trained with."""
    denoiser: str | None = None
    """File, folder or hub repository of the denoiser that the head was trained with."""
    size: int | None = None
    """Shorter side of the model's input in pixels; by default as in training."""


@dataclass(frozen=True)
class ReportCommand(Output):
    """Make one interactive page from the results of `dvt analyze`; the page needs no network."""

    folder: tyro.conf.Positional[Path]
    """The folder that `dvt analyze` wrote."""
    out: Path = Path("report.html")
    """The page to write."""
