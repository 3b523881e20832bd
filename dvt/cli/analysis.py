"""Run `dvt analyze`, `dvt doctor`, `dvt probe` and `dvt report`, which measure features with nulls and intervals."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dvt.cli.common import check_place, keep_settings, progress_bar, resolved, save_json, say_ahead, shown
from dvt.cli.remedies import compared, product_command, remedy_commands
from dvt.cli.settings.analysis import Analyze, Doctor, ProbeCommand, ReportCommand
from dvt.cli.settings.common import DenoiserOptions
from dvt.errors import ConfigError
from dvt.fields.config import DenoiseConfig, Product
from dvt.fields.image import check_views, denoise_image
from dvt.files import writable
from dvt.images import find_images
from dvt.store import FeatureStore
from dvt.text import counted, visible_lines, wrapped

if TYPE_CHECKING:
    from torch import Tensor

    from dvt.analysis.doctor import Diagnosis
    from dvt.analysis.measure import Decompose
    from dvt.analysis.probes.heads import SavedHead
    from dvt.analysis.probes.table import ProbeReport
    from dvt.backbones import Backbone


#: The products that the doctor compares.
_PRODUCTS: tuple[Product, ...] = ("removed", "ensembled")


def analyze(command: Analyze, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt analyze`; the exit code is 0 when the report is written."""
    from dvt.analysis.measure import analyze as measure

    check_place(command.out, "analyze")
    paths = find_images(command.images)
    settings = resolved(command, command="analyze", images=paths)
    if command.views is not None and command.views < 0:
        raise ConfigError(f"views is {command.views}; it must be 0, for no decomposition, or more")
    backbone = command.load()
    analysis = command.analysis
    if analysis.layers != "all":
        analysis = replace(analysis, layers=(*analysis.layers, *command.layers_of(backbone)[:-1]))
    backbones = [backbone, *(command.load(name) for name in command.compare)]
    source = FeatureStore(command.store) if command.store else _decompose(backbone, command.product, command.views)
    count = min(len(paths), analysis.images)
    say_ahead(console, backbone, len(backbones) * _passes(command, count), counted(count, "image"))
    none: list[None] = [None] * len(command.compare)
    with progress_bar(console) as progress:
        report = measure(
            backbones,
            paths,
            analysis,
            variants=[_variants(command, backbone), *({} for _ in none)],
            semantic=[source, *none],
            progress=progress,
        )
    report.save(command.out)
    keep_settings(command.out, settings)
    console.print(visible_lines(report.to_text(command.nulls)), markup=False, highlight=False)
    console.print(f"report: {shown(str(command.out))}; `dvt report {shown(str(command.out))}` makes a page from it")
    return 0, {**report.to_json(), "settings": settings, "out": str(command.out)}


def doctor(command: Doctor, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt doctor`; the exit code is 0 for any diagnosis."""
    from dvt.analysis.doctor import diagnose

    paths = find_images(command.images)
    settings = resolved(command, command="doctor", images=paths)
    backbone = command.load()
    variants = _variants(command, backbone)
    count = min(len(paths), command.doctor.images)
    say_ahead(console, backbone, _doctors_passes(command, count), counted(count, "image"))
    commands: dict[str, str] = {}
    refused: dict[str, str] = {}
    products: dict[str, Decompose] = {}
    with progress_bar(console) as progress:
        if command.remedies:
            found, commands, refused = compared(command, backbone, paths, command.images, progress)
            variants |= found
            products = {name: _terms_of(backbone, DenoiseConfig(product=name)) for name in _PRODUCTS}
            commands |= {name: product_command(name, command, command.images) for name in _PRODUCTS}
        diagnosis = diagnose(
            backbone,
            paths,
            variants,
            command.doctor,
            commands=commands,
            decompose=None if products else _decompose(backbone),
            products=products,
            progress=progress,
        )
    how = remedy_commands(diagnosis.remedy, command, command.images)
    diagnosis = replace(diagnosis, how=how, denoise_product=None if products else _PRODUCTS[0])
    _print_diagnosis(console, diagnosis, refused)
    return 0, {**diagnosis.to_json(), "refused": refused, "settings": settings}


def _print_diagnosis(console: Console, diagnosis: Diagnosis, refused: dict[str, str]) -> None:
    console.print(visible_lines(diagnosis.to_text()), markup=False, highlight=False)
    for reason in dict.fromkeys(refused.values()):
        names = ", ".join(name for name, why in refused.items() if why == reason)
        console.print(f"\n{wrapped(visible_lines(f'{names}: {reason}'))}", markup=False, highlight=False)


def probe(command: ProbeCommand, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt probe`; the exit code is 0 when all rows are scored."""
    from dvt.analysis.probes.heads import check_head_path, check_keeps_head
    from dvt.analysis.probes.protocol import run_probe

    settings = resolved(command, command="probe")
    if command.out is not None:
        writable(command.out)
    if command.save is not None:
        check_keeps_head(command.probe)
        check_head_path(command.save)
        writable(command.save)
        if command.denoiser is not None and len(command.layer) > 1:
            raise ConfigError("a head of several layers takes raw features: leave --denoiser out, or give one --layer")
    elif command.names:
        raise ConfigError("--names are kept with a head: give --save head.safetensors too")
    backbone = command.load()
    variants: dict[str, Any] = _variants(command, backbone)
    if command.store is not None:
        variants["semantic"] = FeatureStore(command.store, "semantic")
    with progress_bar(console) as progress:
        report = run_probe(command.probe, backbone, variants, progress, command.layers_of(backbone))
    console.print(visible_lines(report.table()), markup=False, highlight=False)
    result = {**report.to_dict(), "settings": settings}
    if command.out is not None:
        save_json(command.out, result)
    if command.save is not None:
        _keep_head(command, backbone, report).save(command.save)
        console.print(f"head: {shown(str(command.save))}; `dvt predict` takes it")
    return 0, result


def _keep_head(command: ProbeCommand, backbone: Backbone, report: ProbeReport) -> SavedHead:
    """Make the head of the features that the command asks for: denoised, upsampled, of several layers."""
    from dvt.analysis.probes.heads import kept_head
    from dvt.analysis.probes.variants import RAW, UPSAMPLED, joined_row

    denoiser = command.load_denoiser(backbone)
    layers = command.layers_of(backbone)
    own = RAW if len(layers) < 2 else joined_row(backbone, layers)
    row = (own if denoiser is None else "denoised") + (UPSAMPLED if command.probe.upsample > 1 else "")
    identity = None if denoiser is None else denoiser.identity
    channels = backbone.feature_dim * len(layers) * (2 if command.probe.class_token else 1)
    return kept_head(command.probe, report.probes[row], backbone, layers, channels, identity, command.names)


def report(command: ReportCommand, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt report`; the exit code is 0 when the page is written."""
    from dvt.analysis.page.report import write_report

    if command.out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"the report is a web page: --out must end in .html, got {shown(str(command.out))}")
    path = write_report(command.folder, command.out)
    size = path.stat().st_size
    console.print(f"{shown(str(path))}: {size / 1e6:.1f} MB, open it in any browser")
    return 0, {"out": str(path), "bytes": size}


def _variants(command: DenoiserOptions, backbone: Backbone) -> dict[str, Any]:
    clean = command.variant(backbone)
    return {} if clean is None else {"denoised": clean}


def _decompose(backbone: Backbone, product: Product | None = None, views: int | None = None) -> Decompose | None:
    """Make the function that decomposes an image by stage one; None if `views` is 0."""
    if views == 0:
        return None
    config = DenoiseConfig(views=views, product=product)  # type: ignore[arg-type]
    check_views(backbone, config.views)
    return _terms_of(backbone, config)


def _passes(command: Analyze, images: int) -> int:
    """Count the passes of a backbone that an analysis takes: whole images, windows, shifts and decompositions."""
    config, views = command.analysis, 0
    if command.store is None and command.views != 0:
        views = _views(command.product, command.views)
    windows = min(images, config.share_images) * config.windows + min(images, config.shift_images) * 6
    return images * (1 + views) + windows + 6 * views  # the last: the shift stability of two decompositions


def _doctors_passes(command: Doctor, images: int) -> int:
    config = command.doctor
    views = sum(_views(product) for product in _PRODUCTS) if command.remedies else 0
    tried = min(images, config.product_images) * (1 + config.product_windows)
    return images * (1 + config.windows) + (tried * views if command.remedies else _views())


def _views(product: Product | None = None, views: int | None = None) -> int:
    """Count the passes of one image's decomposition."""
    return 1 + DenoiseConfig(views=views, product=product).views.count  # type: ignore[arg-type]


def _terms_of(backbone: Backbone, config: DenoiseConfig) -> Decompose:
    def terms(image: Tensor) -> dict[str, Tensor]:
        parts = denoise_image(backbone, image, config).decomposition
        return {"semantic": parts.semantic, "artifact": parts.artifact, "residual": parts.residual}

    return terms
