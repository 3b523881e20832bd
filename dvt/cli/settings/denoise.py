"""Hold the settings of `dvt denoise`, `dvt inspect` and `dvt demo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from dvt.cli.settings.common import Output
from dvt.cli.settings.jobs import JobOptions
from dvt.fields.config import LinearConfig, NeuralConfig, Product


@dataclass(frozen=True)
class Denoise(JobOptions):
    """Split each image's features into a semantic field, an artifact and a residual; write a store and pictures.

    Run the same command again to compute only what is missing.
    """

    product: Product | None = None
    """removed: each image's own tokens without the artifact; ensembled: the field over scales, best for labelled tasks;
    blend: between the two. By default removed, or ensembled with the neural solver."""
    strength: float = 1.0
    """Share of the change to apply, from 0 (the raw tokens) to 1: "semantic" is raw + strength (product - raw)."""
    views: int | None = None
    """Views per image, beside the whole image; by default 16 for the product removed, else 48 (paper: 768)."""
    solver: Literal["linear", "neural"] = "linear"
    """Closed form (seconds), or gradient fitting as in the paper (minutes)."""
    shared_artifact: bool = False
    """Fit one artifact to all images of a grid shape, instead of one to each image."""
    shared_images: int = 32
    """Number of images to which the shared artifact is fitted."""
    keep_terms: bool = False
    """Also store the artifact and the residual."""
    pictures: bool = True
    """Draw a picture for each image, in OUT/pictures; not with --ray."""
    upsample: int = 1
    """Also write the semantic features upsampled by this factor, guided by the image, to OUT/upsampled."""
    upsampler: str | None = None
    """Upsample by AnyUp instead of the filter: a file of its published weights, or "anyup" or "anyup-dinov2", which are
    downloaded."""
    seed: int = 0
    """Seed of the views and the solver."""
    batch: int = 16
    """Views per forward pass."""
    shard_images: int | None = None
    """Images per shard, by default 16, or 4 with --tile; a killed run loses at most the shards being computed and the
    one being written."""
    solve_images: int | None = None
    """Number of images solved together; by default 8 on a GPU, 1 on a CPU."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Run the backbone on the next images while others are solved; "auto" does so on a GPU."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    """Settings of the linear solver."""
    neural: NeuralConfig = field(default_factory=NeuralConfig)
    """Settings of the neural solver."""

    @property
    def images_a_shard(self) -> int:
        """The number of images per shard; a shard of large images is held in memory, too."""
        return self.shard_images if self.shard_images is not None else 16 if self.tile is None else 4


@dataclass(frozen=True)
class Inspect(Output):
    """Show the content of a feature store."""

    store: tyro.conf.Positional[str]
    """A folder of shards, or one shard."""
    verify: bool = False
    """Check all checksums and name damaged shards."""


@dataclass(frozen=True)
class Demo(Output):
    """Try stage one on bundled photographs and a small bundled ViT; needs no network."""

    out: Path = Path("dvt-demo")
    """Folder for the store and the pictures."""
    views: int = 48
    """Number of views."""
    device: str = "auto"
    """"cpu", "cuda" or "auto"."""
