"""Hold the settings of `dvt extract` and `dvt store merge|export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dvt.cli.settings.common import LayersOptions, Output, Remade
from dvt.cli.settings.jobs import JobOptions


@dataclass(frozen=True)
class Extract(LayersOptions, JobOptions):
    """Write the tokens of images, raw and with --denoiser also denoised, to a feature store.

    Run the same command again to compute only what is missing.
    """

    batch: int = 32
    """Images per forward pass."""
    shard_images: int | None = None
    """Images per shard, by default 64, or 4 with --tile; a killed run loses at most the shard being computed and the
    one being written."""
    workers: int | None = None
    """Threads that read and decode images; by default the number of the processor's cores, at most 16."""
    upsample: int = 1
    """Also write the denoised features, or without a denoiser the raw ones, upsampled by this factor, guided by the
    image, to OUT/upsampled."""
    upsampler: str | None = None
    """Upsample by AnyUp instead of the filter: a file of its published weights, or "anyup" or "anyup-dinov2", which are
    downloaded."""

    @property
    def images_a_shard(self) -> int:
        """The number of images per shard; a shard of large images is held in memory, too."""
        return self.shard_images if self.shard_images is not None else 64 if self.tile is None else 4


@dataclass(frozen=True)
class StoreMerge(Output):
    """Merge stores of the same job, for example from several machines, into one.

    Run the same command again to continue an interrupted merge. Stores of different jobs are refused.
    """

    stores: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of shards, or shards."""
    out: Path
    """Folder of the merged store."""
    wait: bool = True
    """Wait for another writer of the same store, instead of refusing."""


@dataclass(frozen=True)
class StoreExport(Output, Remade):
    """Write a store as .npy files (one per image and term), as one zarr group, or as safetensors files."""

    store: tyro.conf.Positional[Path]
    """A folder of shards, or one shard."""
    out: Path
    """A new folder, or that of an interrupted export."""
    form: Annotated[Literal["npy", "zarr", "safetensors"], tyro.conf.arg(name="format")] = "npy"
    """The format to write; zarr needs the package of that name."""
    terms: tuple[str, ...] = ()
    """Terms to export, such as raw or denoised; by default all."""
