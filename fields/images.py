"""Decompose many images into a feature store (stage one).

Threads read and decode files ahead. With overlap, another thread runs the backbone on the views of one image after the
other, while this thread solves; see :mod:`dvt.jobs.overlap`. None of this changes a number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from dvt.backbones import Backbone, choose_precision
from dvt.devices import Event, finish, handed_over, in_stream, is_gpu, new_stream, pinned, record
from dvt.errors import ImageError
from dvt.fields.batches import ViewBatch
from dvt.fields.config import DenoiseConfig
from dvt.fields.decomposition import Decomposition, Fit
from dvt.fields.image import DecomposedImage, TokenViews, check_views, fit_images, images_together
from dvt.fields.shared import SharedArtifact
from dvt.grids import Size
from dvt.images import find_sources
from dvt.jobs.ahead import ahead, reading_threads
from dvt.jobs.intake import distinct, read_copies
from dvt.jobs.overlap import Ahead, InTurn
from dvt.jobs.profile import Profile, flop_counter
from dvt.jobs.run import run
from dvt.jobs.work import THREADS, ShardResult, Summary, Work
from dvt.progress import Progress
from dvt.store import ImageEntry, Job, Record, Shard

log = logging.getLogger(__name__)

ALL_TERMS = ("raw", "semantic", "artifact", "residual")

OnImage = Callable[[Path, Tensor, DecomposedImage], None]
#: (V, h, w, C) tokens, (V, h, w, 2) coordinates, and the event after which a GPU has both.
TimedBatch = tuple[Tensor, Tensor, "Event | None"]


def denoise_images(
    backbone: Backbone,
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    config: DenoiseConfig | None = None,
    *,
    keep_terms: bool = False,
    shard_images: int = 16,
    strict: bool = False,
    wait: bool = True,
    profile: bool = False,
    started: Callable[[Job], None] | None = None,
    progress: Progress | None = None,
    on_image: OnImage | None = None,
) -> Summary:
    """Decompose many images into a feature store; repeating the call continues an interrupted run.

    Args:
        backbone: its device is used.
        paths: image files; or one folder, glob, list or URL, as :func:`dvt.images.find_sources` takes it.
        out: the store's folder.
        config: settings; None takes the defaults.
        keep_terms: also store the artifact and the residual.
        shard_images: images per shard; a killed run loses at most the shards being computed and the one being written.
        strict: raise on the first image that cannot be used, instead of reporting it at the end.
        wait: wait for another writer of the same store, instead of raising.
        profile: also count the backbone's operations, in the first batch of each grid shape.
        started: called with the job once the folder is locked and known to hold no other job.
        progress: called with (what, done, total) after every image.
        on_image: called with (path, pixels, result) for every image computed, for pictures.

    Raises:
        StoreError: the folder cannot be written, or holds another job's tokens.
        ImageError: with strict, an image cannot be read.
        NonFiniteError: with strict, an image's tokens hold NaN or infinity.
        ConfigError: not even half a batch of views fits into the memory.
    """
    if isinstance(paths, (str, Path)):
        paths = find_sources([paths])
    work = DecomposeWork(
        backbone,
        config or DenoiseConfig(),
        keep_terms=keep_terms,
        shard_images=shard_images,
        strict=strict,
        profile=profile,
        on_image=on_image,
    )
    return run(work, paths, out, wait=wait, started=started, progress=progress)


def denoise_job(backbone: Backbone, config: DenoiseConfig, keep_terms: bool) -> Job:
    """Describe everything that the tokens of stage one depend on, as a Job."""
    terms = list(ALL_TERMS if keep_terms else ALL_TERMS[:2])
    config = replace(config, dtype=choose_precision(backbone, config.dtype))
    return Job.of(backbone, {"verb": "denoise", "terms": terms, **config.job_settings()})


class DecomposeWork(Work):
    """Do the work of a stage one job; see :func:`denoise_images` for the arguments."""

    def __init__(
        self,
        backbone: Backbone,
        config: DenoiseConfig,
        *,
        keep_terms: bool = False,
        shard_images: int = 16,
        strict: bool = False,
        profile: bool = False,
        on_image: OnImage | None = None,
    ):
        check_views(backbone, config.views)
        config = replace(config, dtype=choose_precision(backbone, config.dtype))
        super().__init__(
            backbone,
            denoise_job(backbone, config, keep_terms),
            shard_images=shard_images,
            threads=THREADS,
            strict=strict,
            reduction=SharedArtifact(backbone, config) if config.shared_artifact else None,
        )
        self.config, self.profile, self.on_image = config, profile, on_image
        self.terms = ALL_TERMS if keep_terms else ALL_TERMS[:2]
        self.device = backbone.device
        self.gpu = is_gpu(self.device)
        # TF32 is a setting of the whole process: in another thread, the solver would multiply in it at times.
        self.overlap = (self.gpu if config.overlap is None else config.overlap) and config.dtype != "tf32"
        self.group = images_together(config, self.device)
        self._flops: dict[Size, float] = {}

    def make(
        self, shards: Iterable[tuple[Shard, Tensor | None]], tick: Callable[[], None] = lambda: None
    ) -> Generator[ShardResult, None, None]:
        """Compute each shard; with overlap, the backbone meanwhile runs on the next ones."""
        stream = new_stream(self.device) if self.overlap else None
        start, waited = time.perf_counter(), 0.0
        with self._feed(shards) as feed:
            for group, streams in feed:
                made = group[0].made
                with in_stream(self.device, stream):
                    self._solve([image for image in group if image.intake.used >= 0], streams)
                    for image in group:
                        made.records += self._finished(image, tick)
                        image.intake.pixels = image.views = image.result = None
                if group[-1].last:
                    standing = feed.waited - waited if self.overlap else made.profile.of("solve", "fetch", "pictures")
                    made.profile.spend("wait_solver", standing)
                    made.profile.wall, waited = time.perf_counter() - start, feed.waited
                    yield made
                    start = time.perf_counter()

    # -- in the thread that goes ahead, if there is one ---------------------------------------------------------------

    def _feed(
        self, shards: Iterable[tuple[Shard, Tensor | None]]
    ) -> Ahead[list[_Image], TimedBatch] | InTurn[list[_Image], TimedBatch]:
        groups = self._groups(shards)
        if not self.overlap:
            return InTurn(groups, self._sources)
        views = self.config.views
        batches = -(-(1 + views.count) // views.batch)
        pilot = min(batches, -(-self.config.linear.pilot_views // views.batch))
        # The linear solver reads the pilot's views of all images first; the neural solver reads all views of an image.
        first = pilot if self.config.solver == "linear" else batches
        return Ahead(groups, self._sources, first=first, budget=self.group * pilot)

    def _groups(self, shards: Iterable[tuple[Shard, Tensor | None]]) -> Generator[list[_Image], None, None]:
        """Group images to be solved together; they are of one shard, so they have one grid shape and artifact."""
        group: list[_Image] = []
        depth = self.threads if self.gpu else int(self.overlap)  # a large image takes gigabytes
        with reading_threads(self.threads) as readers:
            for image, loading in ahead(readers, self._load, _images(shards), depth):
                with image.made.profile.timed("wait_images"):
                    loading.result()
                group.append(image)
                if image.last or len(group) == self.group:
                    yield group
                    group = []

    def _load(self, image: _Image) -> None:
        image.intake = read_copies(image.copies, partial(self._prepare, image.made.artifact is not None))

    def _prepare(self, shared: bool, pixels: Tensor, entry: ImageEntry) -> Tensor:
        if self.reduction is not None and not shared:
            TokenViews(self.backbone, pixels, self.config.views)  # raises if the reason is in this image itself
            raise ImageError(
                f"there is no shared artifact for {entry.path!r}: none of the images to fit it to could be used"
            )
        return pinned(pixels, self.device)

    def _sources(self, group: list[_Image]) -> list[_Source]:
        return [_Source(self, image) for image in group if image.intake.used >= 0]

    def batches(self, image: _Image) -> Iterator[TimedBatch]:
        """Run an image's views through the backbone; each call starts from the first view."""
        if image.views is None:
            image.views = TokenViews(self.backbone, image.intake.pixels, self.config.views, self.config.dtype)
            image.intake.pixels = image.intake.pixels if self.on_image else None
        for tokens, coords in self._counted(image.views):
            yield tokens, coords, record(self.device, blocking=True) if self.overlap else None

    def _counted(self, views: TokenViews) -> Iterator[tuple[Tensor, Tensor]]:
        batches, grid = iter(views), (views.coords.shape[0], views.coords.shape[1])
        if not self.profile or grid in self._flops:
            return batches
        with flop_counter() as counter:
            first = next(batches)
        self._flops[grid] = counter.get_total_flops() / len(first[0])
        return chain([first], batches)

    # -- in the thread that solves ------------------------------------------------------------------------------------

    def _solve(self, images: list[_Image], streams: Sequence[Iterable[TimedBatch]]) -> None:
        """Solve the images, and store each image's result or error in it."""
        if not images:
            return
        made, start = images[0].made, time.perf_counter()
        readings = [_Reading(stream) for stream in streams]
        artifact = None if made.artifact is None else made.artifact.to(self.device)
        fits, strength = fit_images(self.config, readings, artifact), self.config.strength
        found = [_decomposed(*each, strength) for each in zip(images, fits, strict=True)]
        finish(self.device)
        seconds = time.perf_counter() - start
        for image in images:
            made.profile.add(image.profile(self._flops, self.threads))
        waited = sum(each.seconds for each in readings)
        seconds -= waited if self.overlap else sum(image.seconds for image in images)
        made.profile.spend("solve", seconds)
        if self.overlap:
            made.profile.spend("wait_backbone", waited)
        for image, each in zip(images, found, strict=True):
            image.result = (
                each if isinstance(each, Exception) else DecomposedImage(*each, image.seconds, seconds / len(images))
            )

    def _finished(self, image: _Image, tick: Callable[[], None]) -> Iterator[Record]:
        """Yield the records of an image and its copies."""
        made, result, intake = image.made, image.result, image.intake
        terms, prefix = {}, None
        if isinstance(result, DecomposedImage):
            with made.profile.timed("fetch"):
                maps = result.decomposition.terms()
                terms, prefix = {term: maps[term].cpu() for term in self.terms}, result.prefix.cpu()
            if self.on_image:
                with made.profile.timed("pictures"):
                    self.on_image(Path(image.copies[intake.used].path), intake.pixels, result)
        error = result if isinstance(result, Exception) else None
        return self.records(intake, terms, prefix, error, made.failed, tick)


@dataclass(eq=False)
class _Image:
    """Hold an image in progress: its copies, the record of its reading, and its result or error."""

    made: ShardResult
    copies: list[ImageEntry]
    last: bool  # of its shard
    intake: Any = None  # Intake, once it was read
    views: Any = None  # TokenViews, from then on until it is solved
    result: DecomposedImage | Exception | None = None

    @property
    def seconds(self) -> float:
        """The seconds in views and the backbone."""
        return 0.0 if self.views is None else self.views.seconds

    def profile(self, flops: dict[Size, float], readers: int) -> Profile:
        """Add up the profile of this image, without the parts that belong to its group."""
        profile = Profile(readers=readers)
        profile.add(self.intake.profile)
        if self.views is not None:
            for stage, seconds in self.views.timer.seconds().items():
                profile.spend(stage, seconds)
            grid = self.copies[0].grid
            profile.views = len(self.views.views)
            profile.flops = profile.views * flops.get(grid, 0.0)
        return profile


def _images(shards: Iterable[tuple[Shard, Tensor | None]]) -> Iterator[_Image]:
    for shard, artifact in shards:
        made, images = ShardResult(shard, artifact=artifact), distinct(shard)
        for number, copies in enumerate(images, 1):
            yield _Image(made, copies, last=number == len(images))


@dataclass
class _Source:
    """Iterate an image's views from the beginning, each time, for :class:`~dvt.jobs.overlap.Ahead`."""

    work: DecomposeWork
    image: _Image

    def __iter__(self) -> Iterator[TimedBatch]:
        return self.work.batches(self.image)


class _Reading:
    """Read a stream for the solver, and count the seconds of waiting for tokens."""

    def __init__(self, stream: Iterable[TimedBatch]):
        self.stream, self.seconds = stream, 0.0

    def __iter__(self) -> Iterator[ViewBatch]:
        batches = iter(self.stream)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches, None)
                if batch is not None and batch[2] is not None:
                    batch[2].synchronize()
            finally:
                self.seconds += time.perf_counter() - start
            if batch is None:
                return
            tokens, coords, _ = batch
            yield handed_over(tokens), handed_over(coords)


def _decomposed(
    image: _Image, fit: Fit | Exception, strength: float
) -> tuple[Decomposition, Tensor, Tensor, Fit] | Exception:
    if isinstance(fit, Exception):
        return fit
    whole, coords = image.views.whole, image.views.coords
    raw, prefix, coords = (handed_over(each) for each in (whole.patches, whole.prefix, coords))
    return fit.decompose(raw[0], coords).weakened(strength), prefix[0], coords, fit
