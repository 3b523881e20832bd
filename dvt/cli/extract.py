"""`dvt extract` and `dvt store merge|export`: tokens of many images on disk, and what can be done with them there."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dvt.cli.common import DenoiserOptions, plain, progress_bar, save_json
from dvt.extract import ExtractConfig, extract_images
from dvt.images import find_images
from dvt.store_tools import export_store, merge_stores


@dataclass(frozen=True)
class Extract(DenoiserOptions):
    """Write the tokens of images, raw and with --denoiser also denoised, to a feature store.

    The same command again computes what is missing and nothing else.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, or a .txt list of paths."""
    out: Path
    """Folder of the feature store."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the forward pass."""
    batch: int = 32
    """Images a forward pass."""
    shard_images: int = 64
    """Images a shard; a killed run loses at most the shard in hand and the one being written."""
    workers: int | None = None
    """Threads that read and decode images; the processor's cores, at most 16, if not given."""
    strict: bool = False
    """Stop at the first image that cannot be read."""
    wait: bool = True
    """Wait for another writer of the same store, instead of refusing."""


@dataclass(frozen=True, kw_only=True)
class _StoreOptions:
    json: bool = False
    """Print one JSON object on standard output, everything else on standard error."""
    dry_run: bool = False
    """Print the resolved settings and stop."""


@dataclass(frozen=True)
class StoreMerge(_StoreOptions):
    """Put stores that the same job made, for example on several machines, into one.

    The same command again does what is left. Stores of different jobs are refused.
    """

    stores: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of shards, or shards."""
    out: Path
    """Folder of the store that holds all of them."""
    wait: bool = True
    """Wait for another writer of the same store, instead of refusing."""


@dataclass(frozen=True)
class StoreExport(_StoreOptions):
    """Write a store as .npy files, one an image and term, or as one zarr group."""

    store: tyro.conf.Positional[Path]
    """A folder of shards, or one shard."""
    out: Path
    """A new folder."""
    form: Annotated[Literal["npy", "zarr"], tyro.conf.arg(name="format")] = "npy"
    """What to write; zarr needs the package of that name."""
    terms: tuple[str, ...] = ()
    """Terms to export, such as raw or denoised; all if not given."""


@dataclass(frozen=True)
class Store:
    """Merge or export feature stores."""

    action: Annotated[
        Annotated[StoreMerge, tyro.conf.subcommand("merge", prefix_name=False)]
        | Annotated[StoreExport, tyro.conf.subcommand("export", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    @property
    def json(self) -> bool:
        return self.action.json


def extract(command: Extract, console: Console) -> tuple[int, dict[str, Any]]:
    """`dvt extract`: 0 when every image is in the store, 2 when some could not be read."""
    config = ExtractConfig(command.dtype, command.batch, command.shard_images, command.workers)
    paths = find_images(command.images)
    settings = plain(command, command="extract", images=paths)
    if command.dry_run:
        console.print_json(data=settings)
        return 0, settings
    backbone = command.load()
    denoiser = command.load_denoiser(backbone)
    behind = "" if denoiser is None else f" and its denoiser ({denoiser.config.kind}, strength {denoiser.strength:g})"
    console.print(f"{escape(backbone.name)}{behind}: {len(paths)} images")
    start = time.perf_counter()
    with progress_bar(console) as progress:
        summary = extract_images(
            backbone,
            paths,
            command.out,
            config,
            denoiser,
            strict=command.strict,
            wait=command.wait,
            started=lambda job: save_json(command.out / "config.json", {"job": job.attributes(), **settings}),
            progress=progress,
        )
    result = {**dataclasses.asdict(summary), "seconds": time.perf_counter() - start, "store": str(command.out)}
    del result["fitting_seconds"]  # nothing is fitted
    _print_summary(console, result)
    return (2 if summary.failed else 0), result


def _print_summary(console: Console, result: dict[str, Any]) -> None:
    table = Table("", "", show_header=False)
    table.add_row("images done", str(result["done"]))
    table.add_row("skipped, already in the store", str(result["skipped"]))
    table.add_row("failed", str(len(result["failed"])))
    table.add_row("shards written", str(result["shards"]))
    table.add_row("seconds in extraction", f"{result['extraction_seconds']:.1f}")
    if result["done"]:
        table.add_row("images a second", f"{result['done'] / result['extraction_seconds']:.1f}")
    table.add_row("seconds in all", f"{result['seconds']:.1f}")
    console.print(table)
    console.print(f"store: {escape(result['store'])}")
    for path, reason in result["failed"]:
        console.print(f"[yellow]skipped[/] {escape(path)}: {escape(reason)}")


def store(command: Store, console: Console) -> tuple[int, dict[str, Any]]:
    """`dvt store`: 0 when the action is done."""
    action = command.action
    return _merge(action, console) if isinstance(action, StoreMerge) else _export(action, console)


def _merge(command: StoreMerge, console: Console) -> tuple[int, dict[str, Any]]:
    settings = plain(command, command="store merge")
    if command.dry_run:
        console.print_json(data=settings)
        return 0, settings
    with progress_bar(console) as progress:
        counts = merge_stores(command.stores, command.out, wait=command.wait, progress=progress)
    console.print(
        f"store: {escape(str(command.out))}: {counts['images']} images in {counts['shards']} shards written, "
        f"{counts['present']} were there already"
    )
    return 0, {**counts, "store": str(command.out), "settings": settings}


def _export(command: StoreExport, console: Console) -> tuple[int, dict[str, Any]]:
    settings = plain(command, command="store export")
    if command.dry_run:
        console.print_json(data=settings)
        return 0, settings
    with progress_bar(console) as progress:
        images = export_store(command.store, command.out, command.form, command.terms, progress=progress)
    console.print(f"{escape(str(command.out))}: {images} images as {command.form}")
    return 0, {"images": images, "out": str(command.out), "settings": settings}
