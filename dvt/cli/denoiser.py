"""Run `dvt train`, `dvt distill` and `dvt export`, the commands of the online denoiser."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from dvt.cli.common import begin_anew, keep_settings, keeping, progress_bar, resolved, shown
from dvt.cli.settings.denoiser import Distill, Export, Train
from dvt.denoiser.train import train_denoiser
from dvt.devices import find_device
from dvt.files import writable
from dvt.images import find_images
from dvt.text import counted


def train(command: Train, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt train`; the exit code is 0 when the denoiser is written."""
    settings = resolved(command, command="train")
    device = find_device(command.device)
    if command.overwrite:
        begin_anew(command.out, "train")
    with progress_bar(console) as progress:
        progress = keeping(progress, command.out, settings)
        _, report = train_denoiser(command.store, command.out, command.training, progress=progress, device=device)
    keep_settings(command.out, settings)
    _print_training(console, report)
    return 0, {**report, "settings": settings}


def distill(command: Distill, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt distill`; the exit code is 0 when the backbone is written."""
    from dvt.denoiser.distill.job import distill_backbone
    from dvt.denoiser.distill.other import distill_student

    paths = find_images(command.images)
    settings = resolved(command, command="distill", images=paths)
    backbone = command.load()
    denoiser = command.load_denoiser(backbone)
    if command.overwrite:
        begin_anew(command.out, "distill")
    with progress_bar(console) as progress:
        progress = keeping(progress, command.out, settings)
        common = (paths, command.out, command.training, denoiser, progress)
        student = command.load_student()
        if student is None:
            report = distill_backbone(backbone, *common)
        else:
            report = distill_student(backbone, student, *common)
    keep_settings(command.out, settings)
    _print_distillation(console, report, command.student or backbone.name)
    return 0, {**report, "settings": settings}


def export(command: Export, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt export`; the exit code is 0 when the file is written and its outputs equal the backbone's."""
    from dvt.backbones.export import ExportConfig
    from dvt.backbones.export import export as write
    from dvt.denoiser.attach import denoised_backbone

    config = ExportConfig(grid=command.grid, opset=command.opset)
    settings = resolved(command, command="export")
    backbone = command.load_exact()
    denoiser = command.load_denoiser(backbone)
    if denoiser is not None:
        backbone = denoised_backbone(denoiser, backbone, command.force)
    with console.status("exporting and comparing"):
        written = write(backbone, writable(command.out), config)
    sizes = "every size in whole patches" if written.dynamic_grid else f"images of {written.size} only"
    console.print(f"{shown(str(written.path))}: images (B, 3, H, W) in [0, 1] to patches (B, h, w, C); {sizes}")
    console.print(f"largest difference from the backbone on {len(written.tried)} inputs: {written.deviation:.1e}")
    return 0, {**dataclasses.asdict(written), "settings": settings}


def _print_distillation(console: Console, report: dict[str, Any], backbone: str) -> None:
    table = Table("held-out images", "MSE + 1 - cosine", "MSE", "cosine to the teacher", "prefix to the original")
    for name, scores in {**report["baselines"], "distilled": report["validation"]}.items():
        table.add_row(name.replace("_", " "), *(f"{scores[key]:.4f}" if key in scores else "-" for key in _SCORES))
    console.print(table)
    counts = f"{counted(report['training'], 'image')} to learn from, {report['held_out']} held out"
    console.print(f"{counts}; {report['parameters']:,} parameters; {report['seconds']:.0f} s")
    out = shown(report["out"])
    if "projection" in report:
        console.print(f"projection to the teacher's tokens: {shown(report['projection'])}")
    console.print(f"backbone: {out}; give it to any command with --backbone {shown(backbone)} --weights {out}")


_SCORES = ("loss", "mse", "cosine", "prefix_cosine")


def _print_training(console: Console, report: dict[str, Any]) -> None:
    rows = {**report["baselines"], f"denoiser ({report['kind']})": report["validation"]}
    table = Table("held-out images", "MSE + 1 - cosine", "MSE", "cosine")
    for name, scores in rows.items():
        table.add_row(name.replace("_", " "), *(f"{scores[key]:.4f}" for key in ("loss", "mse", "cosine")))
    console.print(table)
    console.print(
        f"{counted(report['training'], 'image')} to learn from, {report['held_out']} held out; "
        f"{report['parameters']:,} parameters; {report['seconds']:.0f} s"
    )
    best = min(scores["loss"] for scores in report["baselines"].values())
    if report["validation"]["loss"] >= best and "steps" in report:
        console.print("[yellow]the denoiser is no better than a baseline above: use more images or more steps[/]")
    console.print(f"denoiser: {shown(report['out'])}")
