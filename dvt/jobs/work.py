"""Define the work of a job over many images: it turns the plan's shards into records, in a fixed order."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dvt.backbones import Backbone
from dvt.backbones.tiles import Tiling
from dvt.errors import ImageError, NonFiniteError
from dvt.grids import Size
from dvt.images import size_and_sha256
from dvt.jobs.intake import Intake
from dvt.jobs.profile import Profile
from dvt.jobs.reduction import Reduction
from dvt.store import ImageEntry, Job, Record, Shard

log = logging.getLogger(__name__)

#: Threads that read images, unless told otherwise.
THREADS = min(16, os.cpu_count() or 1)
Failure = tuple[str, str]  # path, reason


@dataclass
class Summary:
    """Count the results of a run over many images.

    Args:
        done: images computed now.
        skipped: images that the store held already.
        failed: (path, reason) of images that could not be used.
        extraction_seconds: seconds in views and the backbone.
        fitting_seconds: seconds in the solver.
        shards: shards written now.
        profile: the time of each stage.
    """

    done: int = 0
    skipped: int = 0
    failed: list[Failure] = field(default_factory=list)
    extraction_seconds: float = 0.0
    fitting_seconds: float = 0.0
    shards: int = 0
    profile: Profile = field(default_factory=Profile)

    def add(self, made: ShardResult) -> None:
        """Add the counts of a shard."""
        self.done += len(made.records)
        self.failed += made.failed
        self.extraction_seconds += made.extraction_seconds
        self.fitting_seconds += made.fitting_seconds
        self.shards += bool(made.records)
        self.profile.add(made.profile)

    def merge(self, other: Summary) -> None:
        """Add the summary of another process."""
        for name in ("done", "skipped", "extraction_seconds", "fitting_seconds", "shards"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failed += other.failed
        self.profile.add(other.profile)


@dataclass
class ShardResult:
    """Hold a computed shard of the plan.

    Args:
        shard: the plan's entry.
        records: records of the images that could be used.
        failed: (path, reason) of the other images.
        artifact: (h, w, C) the artifact that its images share, if any.
        profile: the time of each stage; `wall` is that since the previous shard was yielded.
    """

    shard: Shard
    records: list[Record] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    artifact: Tensor | None = None
    profile: Profile = field(default_factory=Profile)

    @property
    def extraction_seconds(self) -> float:
        """The seconds spent in views and the backbone."""
        return self.profile.of("views", "backbone")

    @property
    def fitting_seconds(self) -> float:
        """The seconds spent in the solver."""
        return self.profile.of("solve")


class Work(ABC):
    """Turn images into records; each job subclasses it.

    Args:
        backbone: its device is used.
        job: everything that the tokens depend on.
        shard_images: images per shard.
        threads: number of threads that read files.
        strict: raise on an image that cannot be used, instead of reporting it.
        reduction: computes the array that images of a grid shape share, if any; `make` gets it with each shard.
        tiling: reads images in windows; None reads each in one piece.
    """

    def __init__(
        self,
        backbone: Backbone,
        job: Job,
        *,
        shard_images: int,
        threads: int,
        strict: bool = False,
        reduction: Reduction | None = None,
        tiling: Tiling | None = None,
    ):
        self.backbone, self.job = backbone, job
        self.shard_images, self.threads, self.strict = shard_images, threads, strict
        self.reduction, self.tiling = reduction, tiling

    def input_size(self, size: Size) -> Size:
        """Find the size (H, W) to which an image is resized."""
        return self.backbone.input_size(size) if self.tiling is None else self.tiling.input_size(self.backbone, size)

    def index_image(self, path: str | Path) -> ImageEntry:
        """Find an image's hash and grid shape from its file's bytes and header.

        Raises:
            ImageError: the image cannot be read, or is too large.
        """
        size, sha256 = size_and_sha256(path)
        return ImageEntry(str(path), sha256, self.backbone.grid(self.input_size(size)))

    @abstractmethod
    def make(
        self, shards: Iterable[tuple[Shard, Tensor | None]], tick: Callable[[], None] = lambda: None
    ) -> Generator[ShardResult, None, None]:
        """Compute shards, each of which comes with the array that its images share, if any; tick after every image.

        `shards` may be advanced in another thread, and before earlier results are yielded, so it must not wait for
        them. A caller that does not read to the end must close the iterator, or its threads keep running.

        Raises:
            ConfigError: the memory is too small.
            ImageError, NonFiniteError: with strict, an image cannot be used.
        """

    @contextmanager
    def reported(self, path: str | Path, failed: list[Failure]) -> Iterator[None]:
        """Record an image that cannot be used in `failed`, or raise if the work is strict."""
        try:
            yield
        except (ImageError, NonFiniteError) as error:
            if self.strict:
                raise
            log.info("skipped %s: %s", path, error)  # the summary lists them all
            failed.append((str(path), str(error)))

    def records(
        self,
        intake: Intake,
        terms: Mapping[str, Tensor],
        prefix: Tensor | None,
        error: Exception | None,
        failed: list[Failure],
        tick: Callable[[], None],
    ) -> Iterator[Record]:
        """Yield a record for each copy of an image; report a copy that cannot be used under its own path.

        Args:
            intake: the result of reading the image.
            terms: its maps (h, w, C) by name.
            prefix: (P, C), if any.
            error: the reason if the image was read but cannot be used, else None.
            failed: list to which copies that cannot be used are added.
            tick: called for every copy.
        """
        for entry, problem in intake.outcomes(error):
            tick()
            with self.reported(entry.path, failed):
                if problem is not None:
                    raise problem
                yield Record(entry.path, entry.sha256, intake.size, terms, prefix)
