"""Stage one for many images into a feature store.

Files are read and decoded ahead, in threads. With overlap another thread runs the backbone, on the views of one image
after the other, while this one solves: see :mod:`dvt.overlap`. None of it changes a number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvt.backbones import Backbone
from dvt.errors import ImageError, NonFiniteError
from dvt.fields import Decomposition, Fit
from dvt.grids import Size
from dvt.images import is_url, load_image
from dvt.overlap import Ahead, InTurn
from dvt.pipeline import (
    DenoiseConfig,
    Denoised,
    SharedEquations,
    TokenViews,
    closed_form,
    equations,
    out_of_memory,
)
from dvt.profile import Profile
from dvt.store import Job, Record, Shard
from dvt.work import THREADS, Made, Planned, Progress, Summary, Work, ahead, job_of, log, reading_threads, run

ALL_TERMS = ("raw", "semantic", "artifact", "residual")
_GROUP = 8  # images that a GPU solves together: the solver's many small operations then cost little more than one's

Each = Callable[[Path, Tensor, Denoised], None]
#: (V, h, w, C) tokens, (V, h, w, 2) coordinates, and the event after which a GPU has both.
Batch = tuple[Tensor, Tensor, "torch.cuda.Event | None"]
Views = tuple[Tensor, Tensor]


def denoise_images(
    backbone: Backbone,
    paths: Sequence[str | Path],
    out: str | Path,
    config: DenoiseConfig,
    *,
    keep_terms: bool = False,
    shard_images: int = 16,
    strict: bool = False,
    wait: bool = True,
    profile: bool = False,
    started: Callable[[Job], None] | None = None,
    progress: Progress | None = None,
    each: Each | None = None,
) -> Summary:
    """Stage one for many images into a feature store; the same call again does what is left.

    Args:
        backbone: its device is used.
        paths: image files, from :func:`dvt.images.find_images`.
        out: the store's folder.
        config: settings.
        keep_terms: also store the artifact and the residual.
        shard_images: images a shard; a killed run loses at most the shards in hand and the one being written.
        strict: raise on the first image that cannot be used, instead of reporting it at the end.
        wait: wait for another writer of the same store, instead of refusing.
        profile: also count the backbone's operations, in the first batch of each grid shape.
        started: called with the job once the folder is locked and known to hold nothing else.
        progress: called with (what, done, total) after every image.
        each: called with (path, pixels, result) for every image computed, for pictures.

    Raises:
        StoreError: the folder cannot be written, or holds another job's tokens.
        ImageError: with strict, an image cannot be read.
        NonFiniteError: with strict, an image's tokens hold NaN or infinity.
        ConfigError: not even half a batch of views fits into the memory.
    """
    work = Denoising(
        backbone, config, keep_terms=keep_terms, shard_images=shard_images, strict=strict, profile=profile, each=each
    )
    return run(work, paths, out, wait=wait, started=started, progress=progress)


def denoise_job(backbone: Backbone, config: DenoiseConfig, keep_terms: bool) -> Job:
    """The store's job: everything that the tokens depend on."""
    terms = list(ALL_TERMS if keep_terms else ALL_TERMS[:2])
    return job_of(backbone, {"verb": "denoise", "terms": terms, **config.numbers()})


class Denoising(Work):
    """Stage one as the work of a job; see :func:`denoise_images` for the arguments."""

    def __init__(
        self,
        backbone: Backbone,
        config: DenoiseConfig,
        *,
        keep_terms: bool = False,
        shard_images: int = 16,
        strict: bool = False,
        profile: bool = False,
        each: Each | None = None,
    ):
        super().__init__(
            backbone,
            denoise_job(backbone, config, keep_terms),
            shard_images=shard_images,
            threads=THREADS,
            strict=strict,
            shared_images=config.shared_images if config.shared_artifact else 0,
        )
        self.config, self.profile, self.each = config, profile, each
        self.terms = ALL_TERMS if keep_terms else ALL_TERMS[:2]
        self.device = backbone.mean.device
        self.overlap = self.device.type == "cuda" if config.overlap is None else config.overlap
        self.group = config.solve_images or (_GROUP if self.device.type == "cuda" and config.solver == "linear" else 1)
        self._flops: dict[Size, float] = {}

    def make(
        self, shards: Iterable[tuple[Shard, Tensor | None]], tick: Callable[[], None] = lambda: None
    ) -> Generator[Made, None, None]:
        """Each shard, computed; with overlap, while the backbone has begun with the next ones."""
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" and self.overlap else None
        start, waited = time.perf_counter(), 0.0
        with self._feed(shards) as feed:
            for group, streams in feed:
                made = group[0].made
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    self._solve([image for image in group if image.read >= 0], streams)
                    for image in group:
                        made.records += self._records(image, tick)
                        image.pixels = image.views = image.result = None
                if group[-1].last:
                    standing = feed.waited - waited if self.overlap else made.profile.of("solve", "fetch", "pictures")
                    made.profile.spend("wait_solver", standing)
                    made.profile.wall, waited = time.perf_counter() - start, feed.waited
                    yield made
                    start = time.perf_counter()

    # -- in the thread that goes ahead, if there is one ---------------------------------------------------------------

    def _feed(
        self, shards: Iterable[tuple[Shard, Tensor | None]]
    ) -> Ahead[list[_Image], Batch] | InTurn[list[_Image], Batch]:
        groups = self._groups(shards)
        if not self.overlap:
            return InTurn(groups, self._sources)
        views = self.config.views
        batches = -(-(1 + views.count) // views.batch)
        pilot = min(batches, -(-self.config.linear.pilot_views // views.batch))
        # The linear solver reads its pilot's views of all images before the others; the neural one all of an image.
        first = pilot if self.config.solver == "linear" else batches
        return Ahead(groups, self._sources, first=first, budget=self.group * pilot)

    def _groups(self, shards: Iterable[tuple[Shard, Tensor | None]]) -> Generator[list[_Image], None, None]:
        """Images that are solved together: of one shard, and so of one grid shape and artifact."""
        group: list[_Image] = []
        depth = self.threads if self.device.type == "cuda" else int(self.overlap)  # a large image takes gigabytes
        with reading_threads(self.threads) as readers:
            for image, loading in ahead(readers, self._load, _images(shards), depth):
                with image.made.profile.timed("wait_images"):
                    loading.result()
                group.append(image)
                if image.last or len(group) == self.group:
                    yield group
                    group = []

    def _load(self, image: _Image) -> None:
        """Its pixels, from the first of its copies that can be read."""
        start = time.perf_counter()
        for number, (path, sha256, _) in enumerate(image.copies):
            try:
                pixels = load_image(path, sha256)
                if self.shared_images and image.made.artifact is None:
                    raise ImageError(
                        f"no artifact that {path!r} could share was fitted: none of the images for it was usable"
                    )
            except ImageError as error:
                image.errors[number] = error
                continue
            image.pixels = pixels.pin_memory() if self.device.type == "cuda" else pixels
            image.read, image.size = number, (pixels.shape[1], pixels.shape[2])
            image.bytes = 0 if is_url(path) else os.path.getsize(path)
            break
        image.read_seconds = time.perf_counter() - start

    def _sources(self, group: list[_Image]) -> list[_Source]:
        return [_Source(self, image) for image in group if image.read >= 0]

    def batches(self, image: _Image) -> Iterator[Batch]:
        """An image's views through the backbone; again from the beginning when called again."""
        if image.views is None:
            image.views = TokenViews(self.backbone, image.pixels, self.config.views, self.config.dtype)
            image.pixels = image.pixels if self.each else None
        for tokens, coords in self._counted(image.views):
            ready = torch.cuda.Event(blocking=True) if self.device.type == "cuda" and self.overlap else None
            if ready is not None:
                ready.record(torch.cuda.current_stream(self.device))
            yield tokens, coords, ready

    def _counted(self, views: TokenViews) -> Iterator[tuple[Tensor, Tensor]]:
        batches, grid = iter(views), (views.coords.shape[0], views.coords.shape[1])
        if not self.profile or grid in self._flops:
            return batches
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            first = next(batches)
        self._flops[grid] = counter.get_total_flops() / len(first[0])
        return chain([first], batches)

    # -- in the thread that solves ------------------------------------------------------------------------------------

    def _solve(self, images: list[_Image], streams: Sequence[Iterable[Batch]]) -> None:
        """Each image's result or error."""
        if not images:
            return
        made, start = images[0].made, time.perf_counter()
        readings = [_Reading(stream) for stream in streams]
        artifact = None if made.artifact is None else made.artifact.to(self.device)
        found = [_decomposed(*each) for each in zip(images, self._fits(readings, artifact), strict=True)]
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
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
                each if isinstance(each, Exception) else Denoised(*each, image.seconds, seconds / len(images))
            )

    def _fits(self, views: Sequence[Iterable[Views]], artifact: Tensor | None) -> list[Fit | Exception]:
        """The images' fits; where one cannot be used, or memory is too small for all, each is solved by itself."""
        solver = self.config.make_solver()
        try:
            return [solver.fit(views[0], artifact)] if len(views) == 1 else [*solver.fit_many(views, artifact)]
        except (ImageError, NonFiniteError) as error:
            if len(views) == 1:
                return [error]
        except (RuntimeError, MemoryError) as error:
            if len(views) == 1 or not out_of_memory(error):
                raise
            log.warning("out of memory with %d images solved together; solving them one by one", len(views))
        # Not in the handler, whose traceback still holds the tensors of the first try.
        return [self._fits([each], artifact)[0] for each in views]

    def _records(self, image: _Image, tick: Callable[[], None]) -> Iterator[Record]:
        """Of an image and its copies; one of these that cannot be used is reported under its own path."""
        made, result = image.made, image.result
        terms, prefix = {}, None
        if isinstance(result, Denoised):
            with made.profile.timed("fetch"):
                maps = result.decomposition.terms()
                terms, prefix = {term: maps[term].cpu() for term in self.terms}, result.prefix.cpu()
            if self.each:
                with made.profile.timed("pictures"):
                    self.each(Path(image.copies[image.read][0]), image.pixels, result)
        for number, (path, sha256, _) in enumerate(image.copies):
            tick()
            with self.reported(path, made.failed):
                error = image.errors.get(number, result)
                if isinstance(error, Exception):
                    raise error
                yield Record(path, sha256, image.size, terms, prefix)

    # -- the artifact that images share -------------------------------------------------------------------------------

    def equations(self, image: Planned) -> SharedEquations | None:
        """The image's share of a shared artifact's equations; None where it cannot be used."""
        path, sha256, _ = image
        try:
            return equations(self.backbone, load_image(path, sha256), self.config)
        except (ImageError, NonFiniteError) as error:  # reported when its own turn comes
            log.debug("left out of the shared artifact: %s", error)
            return None

    def solve(self, equations: SharedEquations) -> Tensor:
        """The artifact (h, w, C) that many images share, from the sum of their equations."""
        return closed_form(self.config).solve_shared(*equations)


@dataclass(eq=False)
class _Image:
    """An image on its way: the paths of its copies, what was read of it, and its result or why there is none."""

    made: Made
    copies: list[Planned]
    last: bool  # of its shard
    read: int = -1  # which copy could be read
    pixels: Any = None  # (3, H, W), from then on until its views are made
    size: Size = (0, 0)
    bytes: int = 0
    read_seconds: float = 0.0
    errors: dict[int, Exception] = field(default_factory=dict)  # of copies that could not be read, by number
    views: Any = None  # TokenViews, from then on until it is solved
    result: Denoised | Exception | None = None

    @property
    def seconds(self) -> float:
        """In views and the backbone."""
        return 0.0 if self.views is None else self.views.seconds

    def profile(self, flops: dict[Size, float], readers: int) -> Profile:
        """Everything but what belongs to its group."""
        profile = Profile({"read": self.read_seconds}, images=1, read_bytes=self.bytes, readers=readers)
        if self.views is not None:
            for stage, seconds in self.views.laps.seconds().items():
                profile.spend(stage, seconds)
            grid = self.copies[0][2]
            profile.views = len(self.views.views)
            profile.flops = profile.views * flops.get(grid, 0.0)
        return profile


def _images(shards: Iterable[tuple[Shard, Tensor | None]]) -> Iterator[_Image]:
    """Copies of the same bytes lie next to each other in a shard; they are one image."""
    for shard, artifact in shards:
        made = Made(shard, artifact=artifact)
        distinct = [list(same) for _, same in groupby(shard.images, key=itemgetter(1))]
        for number, copies in enumerate(distinct, 1):
            yield _Image(made, copies, last=number == len(distinct))


@dataclass
class _Source:
    """What :class:`~dvt.overlap.Ahead` iterates: from the beginning, each time."""

    work: Denoising
    image: _Image

    def __iter__(self) -> Iterator[Batch]:
        return self.work.batches(self.image)


class _Reading:
    """A stream as the solver reads it, and the seconds that it waits for tokens."""

    def __init__(self, stream: Iterable[Batch]):
        self.stream, self.seconds = stream, 0.0

    def __iter__(self) -> Iterator[Views]:
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
            yield _handed_over(tokens), _handed_over(coords)


def _decomposed(image: _Image, fit: Fit | Exception) -> tuple[Decomposition, Tensor, Fit] | Exception:
    if isinstance(fit, Exception):
        return fit
    whole, coords = image.views.whole, image.views.coords
    raw, prefix = _handed_over(whole.patches), _handed_over(whole.prefix)
    return fit.decompose(raw[0], _handed_over(coords)), prefix[0], fit


def _handed_over(values: Tensor) -> Tensor:
    """Complete values that another CUDA stream has made: their memory is not given away while this one reads it."""
    if values.is_cuda:
        values.record_stream(torch.cuda.current_stream(values.device))
    return values
