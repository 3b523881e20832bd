"""Run a job in this process, into a feature store; repeating the call continues an interrupted run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dvt.errors import ConfigError
from dvt.images import is_url
from dvt.jobs.ahead import ahead, reading_threads
from dvt.jobs.profile import Profile
from dvt.jobs.reduction import Reduced
from dvt.jobs.work import ShardResult, Summary, Work
from dvt.progress import Progress
from dvt.store import ImageEntry, Job, Record, Shard, StoreWriter, plan

log = logging.getLogger(__name__)

_LOOK_AHEAD = 64


class ShardWriter(Protocol):
    """Commit shards, as :class:`dvt.store.StoreWriter` does."""

    def write(self, name: str, records: Sequence[Record], artifact: Tensor | None = None) -> Path: ...


def run(
    work: Work,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    wait: bool = True,
    started: Callable[[Job], None] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Run a job in this process, into a feature store; repeating the call continues an interrupted run.

    Memory does not grow with the number of images beyond their list of paths and hashes.

    Args:
        work: the work of the job.
        paths: image files, from :func:`dvt.images.find_images`.
        out: the store's folder.
        wait: wait for another writer of the same store instead of raising an error.
        started: called with the job once the folder is locked and known to hold nothing else.
        progress: called with (what, done, total) after every image.

    Raises:
        ConfigError: `paths` is a single path, or `out` is a URL.
        StoreError: the folder cannot be written, or holds another job's tokens.
        DvtError: any error that `work` raises.
    """
    check_run(paths, out)
    progress, summary = progress or (lambda what, done, total: None), Summary()
    start = time.perf_counter()
    with StoreWriter(out, work.job, wait=wait) as writer:
        if started:
            started(work.job)
        with summary.profile.timed("look"):
            images = list(list_images(work, paths, summary, progress))
        committed = {path.stem for path in writer.folder.glob("*.h5")}
        shards = shards_left(images, writer.images, committed, work.job, work.shard_images)
        total, done = sum(len(shard.images) for shard in shards), 0
        summary.skipped = len(images) - total

        def tick() -> None:
            nonlocal done
            done += 1
            progress(work.job.config["verb"], done, total)

        shared = Reduced(work.reduction, images, out if writer.done else None, summary.profile)
        with closing(work.make(((shard, shared.of(shard)) for shard in shards), tick)) as making:
            save_shards(writer, making, summary)
    summary.profile.wall = time.perf_counter() - start
    return summary


def check_run(paths: Sequence[str | Path], out: str | Path) -> None:
    """Check that this process can run a job with these arguments.

    Raises:
        ConfigError: `paths` is a single path, or `out` is a URL.
    """
    if isinstance(paths, (str, Path)):
        raise ConfigError(f"paths is {str(paths)!r}, one path; give a list, such as find_images({str(paths)!r})")
    if is_url(str(out)):
        raise ConfigError(
            f"the store {str(out)!r} is a URL, which a run in one process does not write to; give a folder, or a Ray "
            "cluster by --ray ('local' starts one here), dvt.jobs.cluster.run in Python"
        )


def shards_left(
    images: Sequence[ImageEntry], stored: set[tuple[str, str]], committed: set[str], job: Job, shard_images: int
) -> list[Shard]:
    """Plan the shards still to make. Unusable images of an earlier run do not change how images are cut into shards.

    Such an image is missing in its shard, and so not done; among the images left it would move all cuts behind it.

    An image is done when its bytes are in the store, under whatever path: but where the plan has copies in several
    shards and some of these are there, a killed run still owes the copies in the others.

    Args:
        images: all images of the job.
        stored: (path, hash) of the images in the store.
        committed: names of the store's shards.
        job: as :func:`dvt.store.plan` takes it.
        shard_images: images per shard.
    """
    whole, done = plan(images, shard_images, job, by_grid=True), {sha256 for _, sha256 in stored}
    tried = {image[:2] for shard in whole if shard.name in committed for image in shard.images}
    begun, known = {sha256 for _, sha256 in tried}, tried | stored
    left = {image for image in images if image.sha256 not in done or (image.sha256 in begun and image[:2] not in known)}
    untouched = [shard for shard in whole if shard.name not in committed and left.issuperset(shard.images)]
    rest = left.difference(*(shard.images for shard in untouched))
    parts = ([image for image in rest if (image[:2] in tried) == again] for again in (False, True))
    return untouched + [shard for part in parts for shard in plan(part, shard_images, job, by_grid=True)]


def list_images(work: Work, paths: Sequence[str | Path], summary: Summary, progress: Progress) -> Iterator[ImageEntry]:
    """Yield the entry of each image that can be read; report the others in the summary."""
    with reading_threads(work.threads) as readers:
        for number, (path, found) in enumerate(ahead(readers, work.index_image, paths, _LOOK_AHEAD)):
            with work.reported(path, summary.failed):
                yield found.result()
            progress("look", number + 1, len(paths))


def save_shards(writer: ShardWriter, shards: Iterable[ShardResult], summary: Summary) -> None:
    """Write each shard while the next one is computed; at most one waits to be written."""
    saving: Future[Profile] | None = None
    with ThreadPoolExecutor(1) as saver:
        for made in shards:
            if saving is not None:
                summary.profile.add(saving.result())
            saving = saver.submit(_written, writer, made) if made.records else None
            summary.add(made)
        if saving is not None:
            summary.profile.add(saving.result())


def _written(writer: ShardWriter, made: ShardResult) -> Profile:
    profile = Profile()
    with profile.timed("write"):
        path = writer.write(made.shard.name, made.records, made.artifact)
    log.info("wrote %s: %d images", path, len(made.records))
    profile.written_bytes = path.stat().st_size
    return profile
