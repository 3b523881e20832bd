"""Run `dvt extract`, which writes the tokens of many images to a store, and `dvt store merge|export`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dvt.cli.beside import check_upsample, fine_suffix, load_upsampler, names_beside, write_index, write_map
from dvt.cli.common import keep_settings, keeping, progress_bar, resolved, shown
from dvt.cli.jobs import print_job, run_job
from dvt.cli.replay import settings_file
from dvt.cli.settings.extract import Extract, StoreExport, StoreMerge
from dvt.images import find_sources
from dvt.jobs.extract import ExtractConfig, ExtractWork
from dvt.store.tools import export_store, merge_stores
from dvt.text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from dvt.backbones import Backbone


def extract(command: Extract, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt extract`; the exit code is 0 if every image is in the store, 2 if some could not be read."""
    layers = command.layer[:-1]
    config = ExtractConfig(
        command.precision, command.batch, command.images_a_shard, command.workers, layers, command.tiling
    )
    check_upsample(command.upsample, command.ray, command.upsampler)
    paths = find_sources(command.images)
    settings = resolved(command, command="extract", images=paths)
    behind = "" if command.denoiser is None else " and its denoiser"
    head = f"{shown(command.backbone)}{behind}: {counted(len(paths), 'image')}"
    with progress_bar(console) as bar:
        names = names_beside(paths) if command.upsample > 1 else {}
        make, begun = partial(_extraction, command, config, names), partial(console.print, head)
        summary, seconds = run_job(command, make, paths, settings, bar, begun)
    result = print_job(console, command, summary, seconds, [("precision", settings["dtype"])])
    if names:
        suffix = fine_suffix(command.upsample, command.upsampler)
        write_index(console, Path(command.out) / "upsampled", names, suffix, summary.failed)
    return (2 if summary.failed else 0), result


def _extraction(command: Extract, config: ExtractConfig, names: dict[Path, str]) -> ExtractWork:
    backbone = command.load_exact()
    fine = _Fine(command, names, backbone) if names else None
    return ExtractWork(backbone, config, command.load_denoiser(backbone), strict=command.strict, on_image=fine)


class _Fine:
    """Write each image's upsampled features next to the store."""

    def __init__(self, command: Extract, names: dict[Path, str], backbone: Backbone):
        self.factor, self.folder = command.upsample, Path(command.out) / "upsampled"
        self.names, self.backbone = names, backbone
        self.suffix = fine_suffix(command.upsample, command.upsampler)
        self.finer = load_upsampler(command.upsampler, backbone.device)

    def __call__(self, path: Path, pixels: Tensor, maps: Mapping[str, Tensor]) -> None:
        tokens = maps.get("denoised", maps["raw"]).float().to(self.backbone.device)
        centres = self.backbone.centres((pixels.shape[1], pixels.shape[2]))
        write_map(self.folder / f"{self.names[path]}{self.suffix}", self.finer(tokens, pixels, self.factor, centres))


def merge(command: StoreMerge, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt store merge`; the exit code is 0 when all shards are in one store."""
    settings = resolved(command, command="store merge")
    with progress_bar(console) as progress:
        counts = merge_stores(command.stores, command.out, wait=command.wait, progress=progress)
    console.print(
        f"store: {shown(str(command.out))}: {counted(counts['images'], 'image')} in "
        f"{counted(counts['shards'], 'shard')} written, {counts['present']} there already"
    )
    return 0, {**counts, "store": str(command.out), "settings": settings}


def export(command: StoreExport, console: Console) -> tuple[int, dict[str, Any]]:
    """Run `dvt store export`; the exit code is 0 when the folder is written."""
    settings = resolved(command, command="store export")
    with progress_bar(console) as progress:
        progress = keeping(progress, command.out, settings)
        given = (command.store, command.out, command.form, command.terms)
        images = export_store(*given, overwrite=command.overwrite, progress=progress)
    if command.form == "zarr":  # whose readers warn of every file that they do not know
        settings_file(str(command.out)).unlink(missing_ok=True)
    else:
        keep_settings(command.out, settings)
    console.print(f"{shown(str(command.out))}: {counted(images, 'image')} as {command.form}")
    return 0, {"images": images, "out": str(command.out), "settings": settings}
