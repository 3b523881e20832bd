"""Run `dvt prior compare`: train one prior on raw, clean and position-only tokens each, with the same budget."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from dvt.cli.common import begin_anew, keep_settings, keeping, progress_bar, resolved, shown
from dvt.cli.priors import token_map
from dvt.cli.settings.priors import PriorCompare
from dvt.images import find_images


def compare(command: PriorCompare, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt prior compare`; the exit code is 0 when all runs are done."""
    from dvt.analysis.priors.compare import compare_priors, look

    paths = find_images(command.images)
    settings = resolved(command, command="prior compare", images=paths)
    backbone = command.load()
    treatments, shared = decompositions(backbone, command.views) if command.decompose else ({}, None)
    keep = (command.out / "tokens.safetensors", {"decompose": command.decompose, "views": command.views})
    denoiser = token_map(command, backbone)
    if command.overwrite:
        begin_anew(command.out, "prior compare")
    with progress_bar(console) as progress:
        progress = keeping(progress, command.out, settings)
        material = look(paths, backbone, command.comparison, treatments, shared, denoiser, progress, keep)
        report = compare_priors(material, command.out, command.comparison, progress=progress)
    keep_settings(command.out, settings)
    _print(console, report)
    console.print(f"page: {shown(str(command.out / 'page.html'))}")
    return 0, {**report, "settings": settings}


def decompositions(backbone: Any, views: int | None = None) -> tuple[dict[str, Any], Any]:
    """Make functions that compute each product of an image's own decomposition, and the artifact of several images."""
    from dvt.fields.config import DenoiseConfig
    from dvt.fields.image import denoise
    from dvt.fields.shared import shared_artifact

    products = {
        name: DenoiseConfig(product=name, views=views)  # type: ignore[arg-type]
        for name in ("removed", "ensembled")
    }
    treatments = {
        name: lambda image, config=config: denoise(backbone, image, config).semantic
        for name, config in products.items()
    }
    return treatments, lambda images: shared_artifact(backbone, images, products["removed"])


def _print(console: Console, report: dict[str, Any]) -> None:
    from dvt.analysis.priors.compare_page import with_interval

    for name in next(iter(report["kinds"].values())):
        if "others" in name:
            continue
        table = Table(name.replace("_", " "), "best", "over raw", "last", "over raw", "change in the last quarter")
        for kind, measures in report["kinds"].items():
            found = measures[name]
            cells = (with_interval(found[each]) for each in ("best", "best_over_raw", "last", "last_over_raw"))
            table.add_row(kind, *cells, f"{found['change_in_last_quarter']:+.4f}")
        console.print(table)
