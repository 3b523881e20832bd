"""Decompose large images window by window (stage one), and blend the terms of the windows.

Each window is decomposed as an image of its own: the artifact belongs to the positions in a window. The terms are
blended with the same weights, so they still add up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dvt.backbones import Backbone
from dvt.backbones.tiles import Tiling
from dvt.errors import ConfigError, ImageError, NonFiniteError
from dvt.fields.config import DenoiseConfig
from dvt.fields.decomposition import Decomposition
from dvt.fields.image import DecomposedImage, check_views, denoise_image
from dvt.fields.images import ALL_TERMS, OnImage, denoise_job
from dvt.images import ImageLike, read_image
from dvt.jobs.ahead import ahead, reading_threads
from dvt.jobs.intake import Intake, distinct, read_copies
from dvt.jobs.work import THREADS, ShardResult, Work
from dvt.store import Job, Shard


def denoise_tiled(
    backbone: Backbone, image: ImageLike, config: DenoiseConfig | None = None, tiling: Tiling | None = None
) -> DecomposedImage:
    """Decompose a large image in overlapping windows of the backbone's input size.

    Args:
        backbone: from :func:`dvt.load_backbone`, with the windows' size as its input size.
        image: as :func:`dvt.denoise` takes it.
        config: settings of the decomposition of a window.
        tiling: the size of the whole image, and the windows' overlap.

    Returns:
        The blended terms on the patch grid of the whole image; `fit` is that of the last window.

    Raises:
        ImageError: the image cannot be read, or has too many patches.
    """
    config, tiling = config or DenoiseConfig(), tiling or Tiling()
    return _decomposed(backbone, read_image(image), config, tiling, (*ALL_TERMS, "field"), torch.float32)


def _decomposed(
    backbone: Backbone, pixels: Tensor, config: DenoiseConfig, tiling: Tiling, names: Sequence[str], dtype: torch.dtype
) -> DecomposedImage:
    """Decompose the pixels of a large image into the terms of some names; the others are zeros that take no memory."""
    windows = _WindowTerms(backbone, config, names)
    maps = tiling.blended(backbone, pixels, windows, batch=1, dtype=dtype)
    prefix, nothing = maps.pop("prefix"), torch.zeros(()).expand_as(maps["raw"])
    parts = Decomposition(**{name: maps.get(name, nothing) for name in (*ALL_TERMS, "field")})
    size = tiling.input_size(backbone, (pixels.shape[1], pixels.shape[2]))
    return DecomposedImage(parts, prefix, backbone.centres(size), windows.fit, **windows.spent)


class _WindowTerms:
    """Decompose windows (1, 3, H, W) into the terms of some names; the fit of the last one and the time are kept."""

    def __init__(self, backbone: Backbone, config: DenoiseConfig, names: Sequence[str]):
        self.backbone, self.config, self.names = backbone, config, names
        self.spent = {"extraction_seconds": 0.0, "fitting_seconds": 0.0}

    def __call__(self, window: Tensor) -> dict[str, Tensor]:
        found = denoise_image(self.backbone, window[0], self.config)
        self.fit = found.fit
        for stage in self.spent:
            self.spent[stage] += getattr(found, stage)
        terms = {name: getattr(found.decomposition, name) for name in self.names}
        return {name: values[None] for name, values in {**terms, "prefix": found.prefix}.items()}


class TiledDecomposeWork(Work):
    """Do the work of a stage one job on large images; :func:`dvt.fields.images.denoise_images` has the arguments.

    `on_image` gets the pixels of :func:`dvt.images.load_pixels`, terms in half precision where they fit into it, and
    zeros for the field.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: DenoiseConfig,
        tiling: Tiling,
        *,
        keep_terms: bool = False,
        shard_images: int = 4,
        strict: bool = False,
        on_image: OnImage | None = None,
    ):
        if config.shared_artifact:
            raise ConfigError(
                "a shared artifact is fitted to whole images, and --tile reads them in windows: leave one of them out"
            )
        check_views(backbone, config.views)
        job = denoise_job(backbone, config, keep_terms)
        job = Job.of(backbone, {**job.config, "tiling": asdict(tiling)})
        super().__init__(backbone, job, shard_images=shard_images, threads=THREADS, strict=strict, tiling=tiling)
        self.config, self.windows, self.on_image = config, tiling, on_image
        self.terms = ALL_TERMS if keep_terms else ALL_TERMS[:2]

    def make(
        self, shards: Iterable[tuple[Shard, Tensor | None]], tick: Callable[[], None] = lambda: None
    ) -> Generator[ShardResult, None, None]:
        """Compute each shard, image by image, while the next image is read."""
        with reading_threads(1) as readers:
            start = time.perf_counter()
            for shard, _ in shards:
                made = ShardResult(shard)
                for _, loading in ahead(readers, partial(read_copies, large=True), distinct(shard), 1):
                    self._add(made, loading.result(), tick)
                made.profile.wall = time.perf_counter() - start
                yield made
                start = time.perf_counter()

    def _add(self, made: ShardResult, intake: Intake, tick: Callable[[], None]) -> None:
        """Add the records of an image and its copies to a shard."""
        made.profile.add(intake.profile)
        terms, prefix, error = {}, None, None
        if intake.pixels is not None:
            try:
                result = self._decomposed(made, intake.pixels, self.windows)
            except (ImageError, NonFiniteError) as problem:
                error = problem
            else:
                maps = result.decomposition.terms()
                terms, prefix = {term: maps[term] for term in self.terms}, result.prefix
                if self.on_image:
                    self.on_image(Path(intake.copies[intake.used].path), intake.pixels, result)
        made.records += self.records(intake, terms, prefix, error, made.failed, tick)
        intake.pixels = None

    def _decomposed(self, made: ShardResult, pixels: Tensor, tiling: Tiling) -> DecomposedImage:
        names = self.terms if self.on_image is None else ALL_TERMS
        result = _decomposed(self.backbone, pixels, self.config, tiling, names, torch.float16)
        made.profile.spend("backbone", result.extraction_seconds)
        made.profile.spend("solve", result.fitting_seconds)
        return result
