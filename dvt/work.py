"""A job over many images, cut into shards: what `dvt denoise` and `dvt extract` share, in one process or on a cluster.

A :class:`Work` turns a shard of the plan into its records, and nothing it does depends on the other shards or on who
does it. :func:`run` has it done here; :mod:`dvt.cluster` by many.
"""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dvt.backbones import Backbone
from dvt.errors import ConfigError, ImageError, NonFiniteError
from dvt.grids import Size
from dvt.images import is_url, size_and_sha256
from dvt.pipeline import SharedEquations, add_equations, checked_input_size, tree_sum
from dvt.profile import Profile
from dvt.store import FeatureStore, Job, Record, Shard, StoreWriter, plan

log = logging.getLogger(__name__)

#: Threads that read images, unless told otherwise.
THREADS = min(16, os.cpu_count() or 1)
_LOOK_AHEAD = 64

Progress = Callable[[str, int, int], None]
Planned = tuple[str, str, Size]  # path, sha256, grid, as the plan has them
Failure = tuple[str, str]  # path, reason
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Summary:
    """What a run over many images did.

    Args:
        done: images computed now.
        skipped: images that the store held already.
        failed: (path, reason) of images that could not be used.
        extraction_seconds: in views and the backbone.
        fitting_seconds: in the solver.
        shards: shards written now.
        profile: where the time went.
    """

    done: int = 0
    skipped: int = 0
    failed: list[Failure] = field(default_factory=list)
    extraction_seconds: float = 0.0
    fitting_seconds: float = 0.0
    shards: int = 0
    profile: Profile = field(default_factory=Profile)

    def add(self, made: Made) -> None:
        """Count a shard."""
        self.done += len(made.records)
        self.failed += made.failed
        self.extraction_seconds += made.extraction_seconds
        self.fitting_seconds += made.fitting_seconds
        self.shards += bool(made.records)
        self.profile.add(made.profile)


@dataclass
class Made:
    """A shard of the plan, computed.

    Args:
        shard: of the plan.
        records: of its images that could be used.
        failed: (path, reason) of the others.
        artifact: (h, w, C) that its images share, if any.
        profile: where the time went; `wall` since the shard before was handed out.
    """

    shard: Shard
    records: list[Record] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    artifact: Tensor | None = None
    profile: Profile = field(default_factory=Profile)

    @property
    def extraction_seconds(self) -> float:
        """In views and the backbone."""
        return self.profile.of("views", "backbone")

    @property
    def fitting_seconds(self) -> float:
        """In the solver."""
        return self.profile.of("solve")


def job_of(backbone: Backbone, settings: dict[str, Any]) -> Job:
    """The store's job: a backbone, and the other settings that the tokens depend on."""
    return Job(
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        layer=backbone.layer,
        stride=backbone.stride,
        size=backbone.image_size,
        config=settings,
    )


class Work(ABC):
    """What is done with images.

    Args:
        backbone: its device is used.
        job: everything that the tokens depend on.
        shard_images: images a shard.
        threads: for reading files.
        strict: raise on an image that cannot be used, instead of reporting it.
        shared_images: how many images an artifact that all of a grid shape share is fitted on; 0 for none.
    """

    def __init__(
        self,
        backbone: Backbone,
        job: Job,
        *,
        shard_images: int,
        threads: int,
        strict: bool = False,
        shared_images: int = 0,
    ):
        self.backbone, self.job = backbone, job
        self.shard_images, self.threads, self.strict = shard_images, threads, strict
        self.shared_images = shared_images

    def look(self, path: str | Path) -> Planned:
        """Path, hash and grid shape, from a file's bytes and header.

        Raises:
            ImageError: it cannot be read, or is too large.
        """
        size, sha256 = size_and_sha256(path)
        return str(path), sha256, self.backbone.grid(checked_input_size(self.backbone, size))

    @abstractmethod
    def make(
        self, shards: Iterable[tuple[Shard, Tensor | None]], tick: Callable[[], None] = lambda: None
    ) -> Generator[Made, None, None]:
        """Each shard, which comes with the artifact that its images share if any, computed; tick after every image.

        Shards may be taken from another thread, and before those in front of them are handed out: they must not wait
        for these. A caller that does not read to the end closes the iterator, or its threads live on.

        Raises:
            ConfigError: the memory is too small.
            ImageError, NonFiniteError: with strict, an image cannot be used.
        """

    def equations(self, image: Planned) -> SharedEquations | None:
        """The image's share of a shared artifact's equations; None where it cannot be used."""
        raise NotImplementedError

    def solve(self, equations: SharedEquations) -> Tensor:
        """The artifact (h, w, C) that many images share, from the sum of their equations."""
        raise NotImplementedError

    @contextmanager
    def reported(self, path: str | Path, failed: list[Failure]) -> Iterator[None]:
        """Turn an image that cannot be used into a line of the summary, unless strict."""
        try:
            yield
        except (ImageError, NonFiniteError) as error:
            if self.strict:
                raise
            log.warning("skipped %s: %s", path, error)
            failed.append((str(path), str(error)))


def run(
    work: Work,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    wait: bool = True,
    started: Callable[[Job], None] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Have a work done in this process, into a feature store; the same call again does what is left.

    Memory does not grow with the number of images beyond their list of paths and hashes.

    Args:
        work: what is to be done.
        paths: image files, from :func:`dvt.images.find_images`.
        out: the store's folder.
        wait: wait for another writer of the same store, instead of refusing.
        started: called with the job once the folder is locked and known to hold nothing else.
        progress: called with (what, done, total) after every image.

    Raises:
        ConfigError: `paths` is one path, or `out` a URL.
        StoreError: the folder cannot be written, or holds another job's tokens.
        DvtError: what `work` raises.
    """
    check_run(paths, out)
    progress, summary = progress or (lambda what, done, total: None), Summary()
    start = time.perf_counter()
    with StoreWriter(out, work.job, wait=wait) as writer:
        if started:
            started(work.job)
        with summary.profile.timed("look"):
            images = list(_listed(work, paths, summary, progress))
        summary.skipped = sum(sha256 in writer.done for _, sha256, _ in images)
        committed = {path.stem for path in writer.folder.glob("*.h5")}
        shards = shards_left(images, writer.done, committed, work.job, work.shard_images)
        total, done = sum(len(shard.images) for shard in shards), 0

        def tick() -> None:
            nonlocal done
            done += 1
            progress(work.job.config["verb"], done, total)

        artifacts = _Artifacts(work, images, out if writer.done else None, summary.profile)
        with closing(work.make(((shard, artifacts.of(shard)) for shard in shards), tick)) as making:
            _save(writer, making, summary)
    summary.profile.wall = time.perf_counter() - start
    return summary


def check_run(paths: Sequence[str | Path], out: str | Path) -> None:
    """That this process can run a job with these.

    Raises:
        ConfigError: one path instead of several, or a URL as the store.
    """
    if isinstance(paths, (str, Path)):
        raise ConfigError(f"paths is {str(paths)!r}, one path; give a list, such as find_images({str(paths)!r})")
    if is_url(str(out)):
        raise ConfigError(
            f"the store {str(out)!r} is a URL, which a run in one process does not write to; give a folder, or a Ray "
            "cluster by --ray ('local' starts one here), dvt.cluster.run in Python"
        )


def shards_left(
    images: Sequence[Planned], done: set[str], committed: set[str], job: Job, shard_images: int
) -> list[Shard]:
    """The shards to make; where an image could not be used in an earlier run, the cuts are still where they were.

    Such an image is missing in its shard, and so not done; among the images left it would move all cuts behind it.

    Args:
        images: all of the job.
        done: hashes of the images in the store.
        committed: names of the store's shards.
        job: as :func:`dvt.store.plan` takes it.
        shard_images: images a shard.
    """
    whole = plan(images, shard_images, job, by_grid=True)
    tried = {image[:2] for shard in whole if shard.name in committed for image in shard.images}
    left = [image for image in images if image[1] not in done]
    parts = ([image for image in left if (image[:2] in tried) == again] for again in (False, True))
    return [shard for part in parts for shard in plan(part, shard_images, job, by_grid=True)]


def artifact_images(images: Sequence[Planned], grid: Size, count: int) -> list[Planned]:
    """Those that the artifact of a grid shape is fitted on: the first in order of their paths, each content once."""
    first: dict[str, Planned] = {}
    for image in sorted(image for image in images if image[2] == grid):
        first.setdefault(image[1], image)
    return list(first.values())[:count]


def stored_artifacts(store: FeatureStore) -> dict[Size, Tensor]:
    """The shared artifacts (h, w, C) by grid shape that a store holds."""
    found: dict[Size, Tensor] = {}
    for index, grid in enumerate(store.grids):
        if grid not in found and (artifact := store.artifact(index)) is not None:
            found[grid] = torch.from_numpy(artifact).float()
    return found


def as_stored(artifact: Tensor) -> Tensor:
    """As the store keeps it, so that a run that is resumed from the store subtracts the same numbers."""
    half = artifact.half().float()
    return half if half.isfinite().all() else artifact


class _Artifacts:
    """The shared artifact of each grid shape: from the store of a job that goes on, else fitted when first needed."""

    def __init__(self, work: Work, images: Sequence[Planned], resumed: str | Path | None, profile: Profile):
        self.work, self.images, self.profile = work, images, profile
        stored = stored_artifacts(FeatureStore(resumed)) if work.shared_images and resumed is not None else {}
        self.found: dict[Size, Tensor | None] = {**stored}

    def of(self, shard: Shard) -> Tensor | None:
        grid = shard.images[0][2]
        if self.work.shared_images and grid not in self.found:
            first = artifact_images(self.images, grid, self.work.shared_images)
            with self.profile.timed("artifact"):
                total = tree_sum((self.work.equations(image) for image in first), add_equations)
                self.found[grid] = None if total is None else as_stored(self.work.solve(total))
        return self.found.get(grid)


def _listed(work: Work, paths: Sequence[str | Path], summary: Summary, progress: Progress) -> Iterator[Planned]:
    with reading_threads(work.threads) as readers:
        for number, (path, found) in enumerate(ahead(readers, work.look, paths, _LOOK_AHEAD)):
            with work.reported(path, summary.failed):
                yield found.result()
            progress("look", number + 1, len(paths))


def _save(writer: StoreWriter, shards: Iterable[Made], summary: Summary) -> None:
    """Writes each shard while the next one is computed; at most one waits to be written."""
    saving: Future[Profile] | None = None
    with ThreadPoolExecutor(1) as saver:
        for made in shards:
            if saving is not None:
                summary.profile.add(saving.result())
            saving = saver.submit(_written, writer, made) if made.records else None
            summary.add(made)
        if saving is not None:
            summary.profile.add(saving.result())


def _written(writer: StoreWriter, made: Made) -> Profile:
    profile = Profile()
    with profile.timed("write"):
        path = writer.write(made.shard.name, made.records, made.artifact)
    profile.written_bytes = path.stat().st_size
    return profile


@contextmanager
def reading_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for reading images, with one core each: resizing would otherwise start threads of its own in each."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # what threads started from now on begin with; this one has kept its own


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """Each item with its result, in order, while `depth` others are being worked on: a long list takes no memory."""
    queue: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            queue.append((item, pool.submit(work, item)))
            if len(queue) > depth:
                yield queue.popleft()
        while queue:
            yield queue.popleft()
    finally:
        for _, future in queue:
            future.cancel()
