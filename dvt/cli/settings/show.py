"""Hold the settings of `dvt show`, `dvt match` and `dvt search`, which compare raw and clean features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from dvt.cli.settings.common import DenoiserOptions, Output
from dvt.errors import ConfigError
from dvt.fields.config import Product

if TYPE_CHECKING:
    from torch import Tensor

    from dvt.backbones import Backbone


@dataclass(frozen=True, kw_only=True)
class CleanOptions(DenoiserOptions):
    """Hold the options of commands that clean single photographs, by a denoiser or by stage one."""

    product: Product | None = None
    """The product of the decomposition that cleans a photograph without --denoiser; by default removed."""
    strength: float | None = None
    """Share of the change to apply, from 0 (raw tokens) to 1; by default 1, or the denoiser's own strength."""
    views: int | None = None
    """Number of views of that decomposition; by default as many as the product needs; 0 for raw features only."""
    upsample: int = 1
    """Upsampling factor per side; the maps' edges then follow the photograph's."""

    def check_clean(self) -> None:
        """Refuse numbers out of their range."""
        if self.upsample < 1:
            raise ConfigError(f"upsample is {self.upsample}; it must be 1 or more")
        if self.views is not None and self.views < 0:
            raise ConfigError(f"views is {self.views}; it must be 0, for raw features alone, or more")

    def terms_of(self, backbone: Backbone, pixels: Tensor) -> dict[str, Tensor]:
        """Compute a photograph's raw map (h, w, C) and a clean one, by name, on the CPU."""
        import torch

        from dvt.fields.config import DenoiseConfig
        from dvt.fields.image import denoise
        from dvt.views import resize

        clean = None if self.denoiser is None else self.token_function(backbone)
        if clean is None and self.views != 0:
            strength = 1.0 if self.strength is None else self.strength
            config = DenoiseConfig(views=self.views, product=self.product, strength=strength)  # type: ignore[arg-type]
            parts = denoise(backbone, pixels, config)
            return {"raw": parts.raw.cpu(), "semantic": parts.semantic.cpu()}
        with torch.no_grad():
            inputs = resize(pixels.to(backbone.device), backbone.input_size((pixels.shape[1], pixels.shape[2])))
            tokens = backbone(inputs[None]).to(torch.float32)
        maps = {"raw": tokens.patches[0].cpu()}
        return maps if clean is None else maps | {"denoised": clean(tokens).patches[0].cpu()}


@dataclass(frozen=True)
class Show(CleanOptions):
    """Draw raw and clean features in PCA colours that are common to all images: a picture per image, and one page."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Photographs (files, folders, globs, a .txt list of paths), or one feature store."""
    out: Path
    """Folder for the pictures and index.html."""
    terms: tuple[str, ...] = ()
    """Terms to show, such as raw and semantic; by default all terms of a store, or raw and clean."""
    foreground: bool = False
    """Mask the background by the first component, and colour the foreground by its own components."""
    count: int = 100
    """The largest number of images, evenly spaced."""


@dataclass(frozen=True)
class MatchCommand(CleanOptions):
    """Match two photographs by raw and by clean features; write a picture and the pairs as JSON."""

    first: tyro.conf.Positional[Path]
    """A photograph."""
    second: tyro.conf.Positional[Path]
    """Another photograph."""
    out: Path
    """Folder for matches.png and matches.json."""
    points: tuple[tuple[float, float], ...] = ()
    """Points x y in [0, 1] of the first photograph to find in the second; by default all mutual neighbours."""
    ratio: float = 1.0
    """Keep mutual neighbours whose distance, over that of the second nearest, is at most this; 1 keeps all."""


@dataclass(frozen=True)
class SearchCommand(CleanOptions):
    """Find the images of a store that look like a photograph or a part of it, by raw and by clean features.

    Without --product and --views the photograph is cleaned as the store's images were.
    """

    query: tyro.conf.Positional[Path]
    """A photograph."""
    store: tyro.conf.Positional[Path]
    """A store of `dvt extract` or `dvt denoise`, made with the same backbone."""
    out: Path
    """Folder for search.png and search.json."""
    box: tuple[float, float, float, float] | None = None
    """x0 y0 x1 y1 in [0, 1]: the part of the photograph to look for; by default whole images are compared."""
    count: int = 5
    """The largest number of images to show."""
    index: Path | None = None
    """Folder of a faiss index of the store, made if it is missing: it chooses the images that are compared. By default
    all are."""


@dataclass(frozen=True)
class View(Output):
    """Show a store as an interactive page: tap a patch, see what is similar to it in raw and in clean features."""

    store: tyro.conf.Positional[Path]
    """A folder of shards, or one shard, of `dvt denoise` or `dvt extract`."""
    out: Path | None = None
    """Write the page to this .html file; without it, the page is served to browsers on this machine."""
    images: int = 12
    """Images at most, evenly spaced over the store."""
    port: int = 0
    """Port of this machine's own address to serve on; 0 takes a free one."""
    browser: bool = True
    """Open the page in the browser."""
