"""Define the options of the commands that make a feature store from images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

from dvt.cli.settings.common import BackboneOptions, Remade
from dvt.errors import ConfigError

if TYPE_CHECKING:
    from dvt.backbones.tiles import Tiling


@dataclass(frozen=True)
class JobOptions(BackboneOptions, Remade):
    """Hold the options of every command that makes a feature store from images."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively), globs, URLs such as s3://bucket/folder, or a .txt list of these."""
    out: str
    """Folder of the feature store; with --ray also a URL."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = dataclasses.field(default="auto", kw_only=True)
    """Precision of the backbone's forward pass. "auto" takes bfloat16 if the device is fast in it and a photograph's
    tokens change by at most half a percent, else tf32 on CUDA by the same trial, else float32; with --ray always
    float32, because workers may differ."""
    tile: int | None = dataclasses.field(default=None, kw_only=True)
    """Read each image in overlapping windows of this many pixels, blended; --size is then the image's shorter side, by
    default its own."""
    strict: bool = dataclasses.field(default=False, kw_only=True)
    """Stop at the first image that cannot be read."""
    wait: bool = dataclasses.field(default=True, kw_only=True)
    """Wait for another writer of the same store, instead of stopping with an error."""
    profile: bool = dataclasses.field(default=False, kw_only=True)
    """Print the time of each stage."""
    ray: str | None = dataclasses.field(default=None, kw_only=True)
    """Run on a Ray cluster: "auto", HOST:PORT or ray://HOST:PORT, or "local" to start one on this machine."""
    ray_workers: int | None = dataclasses.field(default=None, kw_only=True)
    """Workers on the cluster; by default one per GPU, or one per CPU core if there are no GPUs."""
    ray_threads: int = dataclasses.field(default=1, kw_only=True)
    """Threads of each worker on CPUs; another number may change the last bits of tokens."""

    @property
    def precision(self) -> Literal["auto", "float32", "tf32", "bfloat16", "float16"]:
        """The precision to ask for, which is the same on every worker."""
        return "float32" if self.dtype == "auto" and self.ray is not None else self.dtype

    @property
    def input_side(self) -> int | None:
        return self.size if self.tile is None else self.tile

    @property
    def tiling(self) -> Tiling | None:
        """The windows in which images are read; None if each is read in one piece."""
        from dvt.backbones.tiles import Tiling

        if self.tile is None:
            return None
        if self.tile < 1:
            raise ConfigError(f"tile is {self.tile}; give the side of a window in pixels, such as 518")
        return Tiling(self.size)
