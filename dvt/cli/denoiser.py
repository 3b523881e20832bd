"""`dvt train`, `dvt distill` and `dvt export`: the online denoiser."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from dvt.cli.common import DenoiserOptions, Options, progress_bar, quiet_unless_first, resolved, shown
from dvt.denoiser.distill.config import BackboneTraining
from dvt.denoiser.train import DenoiserTraining, train_denoiser
from dvt.devices import find_device
from dvt.errors import ConfigError
from dvt.files import writable
from dvt.images import find_images
from dvt.training import TrainingConfig


@dataclass(frozen=True)
class DenoiserFlags(DenoiserTraining):
    """Name the flags of the training loop without a prefix: --steps, not --training.loop.steps."""

    loop: Annotated[TrainingConfig, tyro.conf.arg(name="")] = DenoiserTraining.loop
    """How the training loop runs."""


@dataclass(frozen=True)
class BackboneFlags(BackboneTraining):
    """Name the flags of the training loop without a prefix, as :class:`DenoiserFlags` does."""

    loop: Annotated[TrainingConfig, tyro.conf.arg(name="")] = BackboneTraining.loop
    """How the training loop runs."""


@dataclass(frozen=True)
class Train(Options):
    """Distil a store of `dvt denoise` into one small denoiser that runs online.

    The same command goes on where it was stopped. `accelerate launch --module dvt.cli train ...` uses several GPUs.
    """

    store: tyro.conf.Positional[Path]
    """A store with raw and semantic tokens."""
    out: Path
    """The .safetensors file to write; checkpoints and log.csv go beside it, to NAME.run."""
    training: Annotated[DenoiserFlags, tyro.conf.arg(name="")] = field(default_factory=DenoiserFlags)
    """How the denoiser is made."""


@dataclass(frozen=True)
class Distill(DenoiserOptions):
    """Fine-tune a whole backbone to its denoiser's output (or --teacher views), so that its own tokens are clean.

    The same command goes on where it was stopped. `accelerate launch --module dvt.cli distill ...` uses several GPUs.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths; no labels are needed."""
    out: Path
    """The .safetensors file to write; checkpoints and log.csv go beside it, to NAME.run."""
    training: Annotated[BackboneFlags, tyro.conf.arg(name="")] = field(default_factory=BackboneFlags)
    """How the backbone is trained."""


@dataclass(frozen=True)
class Export(DenoiserOptions):
    """Write a backbone, with or without a denoiser, to one file that runs without dvt and timm."""

    out: Path
    """The file to write: .onnx, or .pt2 for torch.export.load."""
    strength: float | None = None
    """How much of the denoiser's change is made, from 0 to 1; its own if not given."""
    grid: Literal["auto", "dynamic", "fixed"] = "auto"
    """"dynamic" takes every size in whole patches, "fixed" one size, "auto" is dynamic where the model can be."""
    opset: int | None = None
    """ONNX operator set; the one that this torch writes best if not given."""


def train(command: Train, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt train`: 0 when the denoiser is written."""
    settings = resolved(command, command="train")
    console = quiet_unless_first(console)
    with progress_bar(console) as progress:
        _, report = train_denoiser(
            command.store, command.out, command.training, progress=progress, device=find_device(command.device)
        )
    _print_training(console, report)
    return 0, {**report, "settings": settings}


def distill(command: Distill, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt distill`: 0 when the backbone is written."""
    from dvt.denoiser.distill.job import distill_backbone

    paths = find_images(command.images)
    settings = resolved(command, command="distill", images=paths)
    console = quiet_unless_first(console)
    backbone = command.load()
    denoiser = command.load_denoiser(backbone)
    with progress_bar(console) as progress:
        report = distill_backbone(backbone, paths, command.out, command.training, denoiser, progress)
    _print_distillation(console, report, backbone.name)
    return 0, {**report, "settings": settings}


def export(command: Export, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt export`: 0 when the file is written and computes what the backbone does."""
    from dvt.backbones.export import ExportConfig
    from dvt.backbones.export import export as write
    from dvt.denoiser.attach import denoised_backbone

    config = ExportConfig(grid=command.grid, opset=command.opset)
    settings = resolved(command, command="export")
    backbone = command.load()
    denoiser = command.load_denoiser(backbone)
    if denoiser is not None:
        denoiser.strength = denoiser.strength if command.strength is None else command.strength
        backbone = denoised_backbone(denoiser, backbone, command.force)
    elif command.strength is not None:
        raise ConfigError("--strength is that of a denoiser; give --denoiser FILE too")
    with console.status("exporting and comparing"):
        written = write(backbone, writable(command.out), config)
    sizes = "every size in whole patches" if written.dynamic_grid else f"images of {written.size} only"
    console.print(f"{shown(str(written.path))}: images (B, 3, H, W) in [0, 1] to patches (B, h, w, C); {sizes}")
    console.print(f"largest difference from the backbone on {len(written.tried)} inputs: {written.deviation:.1e}")
    return 0, {**dataclasses.asdict(written), "settings": settings}


def _print_distillation(console: Console, report: dict[str, Any], backbone: str) -> None:
    table = Table("held-out images", "MSE + 1 - cosine", "MSE", "cosine to the teacher", "prefix to the original")
    for name, scores in {"no op": report["baselines"]["no_op"], "distilled": report["validation"]}.items():
        table.add_row(name, *(f"{scores[key]:.4f}" if key in scores else "-" for key in _SCORES))
    console.print(table)
    counts = f"{report['training']} images to learn from, {report['held_out']} held out"
    console.print(f"{counts}; {report['parameters']:,} parameters; {report['seconds']:.0f} s")
    out = shown(report["out"])
    console.print(f"backbone: {out}; every command takes it by --backbone {shown(backbone)} --weights {out}")


_SCORES = ("loss", "mse", "cosine", "prefix_cosine")


def _print_training(console: Console, report: dict[str, Any]) -> None:
    rows = {**report["baselines"], f"denoiser ({report['kind']})": report["validation"]}
    table = Table("held-out images", "MSE + 1 - cosine", "MSE", "cosine")
    for name, scores in rows.items():
        table.add_row(name.replace("_", " "), *(f"{scores[key]:.4f}" for key in ("loss", "mse", "cosine")))
    console.print(table)
    console.print(
        f"{report['training']} images to learn from, {report['held_out']} held out; {report['parameters']:,} "
        f"parameters; {report['seconds']:.0f} s"
    )
    best = min(scores["loss"] for scores in report["baselines"].values())
    if report["validation"]["loss"] >= best and "steps" in report:
        console.print("[yellow]the denoiser is no better than a baseline above: use more images or more steps[/]")
    console.print(f"denoiser: {shown(report['out'])}")
