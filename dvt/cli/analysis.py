"""Run `dvt analyze`, `dvt doctor`, `dvt probe` and `dvt report`: what the features hold, with nulls and intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from dvt.analysis.doctor import DoctorConfig
from dvt.analysis.measure import AnalyzeConfig
from dvt.analysis.probes.protocol import ProbeConfig
from dvt.cli.common import DenoiserOptions, progress_bar, resolved, save_json, shown
from dvt.cli.remedies import compared
from dvt.errors import ConfigError
from dvt.fields.config import DenoiseConfig, Product
from dvt.fields.image import denoise_image
from dvt.files import writable
from dvt.images import find_images
from dvt.store import FeatureStore
from dvt.text import visible_lines

if TYPE_CHECKING:
    from torch import Tensor

    from dvt.analysis.measure import Decompose
    from dvt.backbones import Backbone


@dataclass(frozen=True)
class Analyze(DenoiserOptions):
    """Measure the artifacts of a backbone's features: raw, decomposed and denoised, each beside its null."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths."""
    out: Path
    """Folder for report.json, tables and plots; `dvt report` makes one page of it."""
    store: Path | None = None
    """A store of `dvt denoise` with these images, whose terms are measured; without it they are computed."""
    product: Product | None = None
    """The product of a decomposition computed here; if not given, that of `dvt denoise`."""
    views: int | None = None
    """Views of a decomposition computed here, beside the whole image; if not given, as many as suit the product; 0 for
    no decomposition."""
    compare: tuple[str, ...] = ()
    """Further backbones, by timm name, to measure beside the first; raw features only."""
    analysis: Annotated[AnalyzeConfig, tyro.conf.arg(name="")] = field(default_factory=AnalyzeConfig)
    """What is measured."""


@dataclass(frozen=True)
class Doctor(DenoiserOptions):
    """Say on one page whether a backbone needs denoising, against what, and what it costs."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths; ten or more are better."""
    remedies: bool = False
    """Find and compare the remedies that need no training, too."""
    doctor: Annotated[DoctorConfig, tyro.conf.arg(name="")] = field(default_factory=DoctorConfig)
    """What counts as an artifact."""


@dataclass(frozen=True)
class ProbeCommand(DenoiserOptions):
    """Score features on labelled data: raw, denoised and baselines in one table, with intervals."""

    probe: Annotated[ProbeConfig, tyro.conf.arg(name=""), tyro.conf.PositionalRequiredArgs]
    """The task, the data and the protocol."""
    store: Path | None = None
    """A store of `dvt denoise` with these images; its semantic tokens are a row of their own."""
    out: Path | None = None
    """A JSON file to write too."""


@dataclass(frozen=True)
class ReportCommand:
    """Make one interactive page, which needs no network, from what `dvt analyze` wrote."""

    folder: tyro.conf.Positional[Path]
    """The folder that `dvt analyze` wrote."""
    out: Path = Path("report.html")
    """The page to write."""
    json: bool = False
    """Print one JSON object on standard output."""


def analyze(command: Analyze, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt analyze`: exit code 0 when the report is written."""
    from dvt.analysis.measure import analyze as measure

    paths = find_images(command.images)
    settings = resolved(command, command="analyze", images=paths)
    if command.views is not None and command.views < 0:
        raise ConfigError(f"views is {command.views}; it must be 0, for no decomposition, or more")
    backbone = command.load()
    backbones = [backbone, *(command.load(name) for name in command.compare)]
    source = FeatureStore(command.store) if command.store else _decompose(backbone, command.product, command.views)
    none: list[None] = [None] * len(command.compare)
    with progress_bar(console) as progress:
        report = measure(
            backbones,
            paths,
            command.analysis,
            variants=[_variants(command, backbone), *({} for _ in none)],
            semantic=[source, *none],
            progress=progress,
        )
    report.save(command.out)
    console.print(visible_lines(report.to_text()), markup=False, highlight=False)
    console.print(f"report: {shown(str(command.out))}; `dvt report {shown(str(command.out))}` makes one page of it")
    return 0, {**report.to_json(), "settings": settings, "out": str(command.out)}


def doctor(command: Doctor, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt doctor`: exit code 0 when there is an answer, whatever it is."""
    from dvt.analysis.doctor import diagnose

    paths = find_images(command.images)
    settings = resolved(command, command="doctor", images=paths)
    backbone = command.load()
    variants = _variants(command, backbone)
    commands: dict[str, str] = {}
    refused: dict[str, str] = {}
    with progress_bar(console) as progress:
        if command.remedies:
            found, commands, refused = compared(command, backbone, paths, command.images, progress)
            variants |= found
        diagnosis = diagnose(
            backbone,
            paths,
            variants,
            command.doctor,
            commands=commands,
            decompose=_decompose(backbone),
            progress=progress,
        )
    console.print(visible_lines(diagnosis.to_text()), markup=False, highlight=False)
    for name, reason in refused.items():
        console.print(f"\n{name}: {visible_lines(reason)}", markup=False, highlight=False)
    return 0, {**diagnosis.to_json(), "refused": refused, "settings": settings}


def probe(command: ProbeCommand, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt probe`: exit code 0 when all rows are scored."""
    from dvt.analysis.probes.protocol import run_probe

    settings = resolved(command, command="probe")
    if command.out is not None:
        writable(command.out)
    backbone = command.load()
    variants: dict[str, Any] = _variants(command, backbone)
    if command.store is not None:
        variants["semantic"] = FeatureStore(command.store, "semantic")
    with progress_bar(console) as progress:
        report = run_probe(command.probe, backbone, variants, progress)
    console.print(visible_lines(report.table()), markup=False, highlight=False)
    result = {**report.to_dict(), "settings": settings}
    if command.out is not None:
        save_json(command.out, result)
    return 0, result


def report(command: ReportCommand, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt report`: exit code 0 when the page is written."""
    from dvt.analysis.page.report import write_report

    path = write_report(command.folder, command.out)
    size = path.stat().st_size
    console.print(f"{shown(str(path))}: {size / 1e6:.1f} MB, open it in any browser")
    return 0, {"out": str(path), "bytes": size}


def _variants(command: DenoiserOptions, backbone: Backbone) -> dict[str, Any]:
    clean = command.variant(backbone)
    return {} if clean is None else {"denoised": clean}


def _decompose(backbone: Backbone, product: Product | None = None, views: int | None = None) -> Decompose | None:
    """Make the function that decomposes an image by stage one; None for no views."""
    if views == 0:
        return None
    config = DenoiseConfig(views=views, product=product)  # type: ignore[arg-type]

    def terms(image: Tensor) -> dict[str, Tensor]:
        parts = denoise_image(backbone, image, config).decomposition
        return {"semantic": parts.semantic, "artifact": parts.artifact, "residual": parts.residual}

    return terms
