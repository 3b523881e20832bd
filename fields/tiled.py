"""Decompose large images window by window (stage one), and blend the terms of the windows.

Each window is decomposed as an image of its own: the artifact belongs to the positions in a window. The terms are
blended with the same weights, so they still add up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from dvt.backbones import Backbone
from dvt.backbones.tiles import Tiling
from dvt.errors import ConfigError, ImageError, NonFiniteError
from dvt.fields.config import DenoiseConfig
from dvt.fields.decomposition import Decomposition
from dvt.fields.image import DecomposedImage, denoise_image
from dvt.fields.images import ALL_TERMS, OnImage, denoise_job
from dvt.images import ImageLike, read_image
from dvt.jobs.ahead import ahead, reading_threads
from dvt.jobs.intake import Intake, distinct, read_copies
from dvt.jobs.work import THREADS, ShardResult, Work
from dvt.store import Job, Shard
from dvt.views import resize


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
    config, tiling, pixels = config or DenoiseConfig(), tiling or Tiling(), read_image(image)
    size = tiling.input_size(backbone, (pixels.shape[1], pixels.shape[2]))
    pixels, last = resize(pixels, size), {}
    spent = {"extraction_seconds": 0.0, "fitting_seconds": 0.0}

    def compute(window: Tensor) -> dict[str, Tensor]:
        found = last["window"] = denoise_image(backbone, window[0], config)
        for stage in spent:
            spent[stage] += getattr(found, stage)
        terms = {**found.decomposition.terms(), "field": found.decomposition.field, "prefix": found.prefix}
        return {name: values[None] for name, values in terms.items()}

    terms = tiling.blended(backbone, pixels, compute, batch=1)
    prefix = terms.pop("prefix")
    return DecomposedImage(Decomposition(**terms), prefix, backbone.centres(size), last["window"].fit, **spent)


class TiledDecomposeWork(Work):
    """Do the work of a stage one job on large images; :func:`dvt.fields.images.denoise_images` has the arguments."""

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
        job = denoise_job(backbone, config, keep_terms)
        job = Job.of(backbone, {**job.config, "tiling": asdict(tiling)})
        super().__init__(backbone, job, shard_images=shard_images, threads=THREADS, strict=strict, tiling=tiling)
        self.config, self.on_image = config, on_image
        self.terms = ALL_TERMS if keep_terms else ALL_TERMS[:2]

    def make(
        self, shards: Iterable[tuple[Shard, Tensor | None]], tick: Callable[[], None] = lambda: None
    ) -> Generator[ShardResult, None, None]:
        """Compute each shard, image by image, while the next image is read."""
        with reading_threads(1) as readers:
            start = time.perf_counter()
            for shard, _ in shards:
                made = ShardResult(shard)
                for _, loading in ahead(readers, read_copies, distinct(shard), 1):
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
                result = self._decomposed(made, intake.pixels)
            except (ImageError, NonFiniteError) as problem:
                error = problem
            else:
                maps = result.decomposition.terms()
                terms, prefix = {term: maps[term] for term in self.terms}, result.prefix
                if self.on_image:
                    self.on_image(Path(intake.copies[intake.used].path), intake.pixels, result)
        made.records += self.records(intake, terms, prefix, error, made.failed, tick)
        intake.pixels = None

    def _decomposed(self, made: ShardResult, pixels: Tensor) -> DecomposedImage:
        result = denoise_tiled(self.backbone, pixels, self.config, self.tiling)
        made.profile.spend("backbone", result.extraction_seconds)
        made.profile.spend("solve", result.fitting_seconds)
        return result
