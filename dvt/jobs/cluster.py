"""The work of :mod:`dvt.jobs.work` on a Ray cluster: one actor a device, one shard of the plan a call.

The driver holds the list of images and the plan, and no model. Each actor makes the work once, computes shards, and
uploads each whole; what a shard holds depends on its images alone, so neither the number of actors nor their deaths
change a byte. A call whose actor or node dies is given to another; its actor is made again when there is room for it.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dvt
from dvt.errors import ConfigError, StoreError
from dvt.files import new_part
from dvt.grids import Size
from dvt.images import is_url
from dvt.jobs.ahead import ahead, reading_threads
from dvt.jobs.ray_pool import TRIES, Hello, LostCall, Pool, brief, connected
from dvt.jobs.reduction import Reduction, first_images, stored_artifacts, tree_sum
from dvt.jobs.run import shards_left
from dvt.jobs.work import Failure, ShardResult, Summary, Work
from dvt.progress import Progress
from dvt.store import FeatureStore, ImageEntry, Job, Shard, StoreWriter, shard_file
from dvt.store.remote import ShardTarget

log = logging.getLogger(__name__)

_PATHS_A_CALL = 64  # paths a call


def run(
    make_work: Callable[[], Work],
    images: Sequence[str | Path],
    out: str | Path,
    *,
    address: str = "local",
    workers: int | None = None,
    threads: int = 1,
    device: str = "auto",
    wait: bool = True,
    started: Callable[[Job], None] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Run a job on a Ray cluster, as :func:`dvt.jobs.run.run` does here; repeating the call continues a stopped run.

    The store is the one that a run in one process makes whose torch has `threads` threads, bit for bit, on the same
    kind of processor or GPU.

    Args:
        make_work: called once in each actor, where it finds its device: picklable, for example a partial.
        images: files and URLs, from :func:`dvt.images.find_sources`; every node must be able to read them.
        out: the store's folder, on a file system that all nodes share, or a URL that fsspec can write to.
        address: "local" starts Ray on this machine for this run, "auto" finds the cluster that this machine belongs
            to; else "HOST:PORT" of a cluster or "ray://HOST:PORT". A connection that is there already is used.
        workers: actors; None is one a GPU, or one a CPU core (of `threads` cores each) where there are no GPUs,
            counted again while the cluster grows and shrinks.
        threads: of torch in each actor on a CPU; another number may change last bits.
        device: "cuda" asks Ray for a GPU for each actor, "cpu" for none, "auto" does what the cluster has.
        wait: wait for another writer of the same folder instead of raising an error. URLs have no lock.
        started: called with the job once the target is locked and known to hold nothing else.
        progress: called with (what, done, total) after every shard.

    Returns:
        The same summary as in one process; its seconds are summed over the workers.

    Raises:
        ConfigError: Ray is missing or cannot be reached, a setting is out of range, or workers differ in their job.
        StoreError: the target cannot be written, or holds another job's tokens.
        DvtError: any error that `make_work` raises.
    """
    for name, value in {"workers": workers, "threads": threads}.items():
        if value is not None and value < 1:
            raise ConfigError(f"the number of {name} of the cluster is {value}; it must be 1 or more")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; on a cluster it is 'auto', 'cpu' or 'cuda': a worker sees one GPU")
    if not callable(make_work) or isinstance(images, (str, Path)):
        raise ConfigError("make_work must be a function that makes the work, and images a list of paths")
    target = ShardTarget(str(out) if is_url(str(out)) else os.path.abspath(out))
    target.check()
    with connected(address, workers, threads) as ray:
        if address == "local" and device.startswith("cuda") and not ray.cluster_resources().get("GPU"):
            raise ConfigError(f"device {device!r} cannot be used: this machine has no GPU; take 'auto' or 'cpu'")
        try:
            arguments = (ray.put(make_work), target, threads, os.getcwd())
            with Pool(ray, _Actor, arguments, workers, threads, device) as pool:
                return _run(pool, images, target, wait, started, progress or (lambda what, done, total: None))
        except ray.exceptions.RayError as error:
            raise ConfigError(
                f"the Ray cluster at {address!r} failed: {brief(error)}. The shards that are stored are safe; run the "
                "same command again"
            ) from error


def _run(
    pool: Pool,
    paths: Sequence[str | Path],
    target: ShardTarget,
    wait: bool,
    started: Callable[[Job], None] | None,
    progress: Progress,
) -> Summary:
    summary, hello = Summary(), pool.first(len(paths))
    job = hello.job
    with _held(pool, target, job, wait) as held:
        if started:
            started(job)
        images = _indexed(pool, paths, summary, progress)
        shards = shards_left(images, held.images, held.committed, job, hello.shard_images)
        artifacts: dict[Size, Any] = {}
        if hello.reduced_images:
            artifacts = _artifacts(pool, images, shards, held.artifacts(), hello, progress)
        total, done = sum(len(shard.images) for shard in shards), 0
        summary.skipped = len(images) - total
        calls = [(shard, artifacts.get(shard.images[0].grid), held.marker) for shard in shards]
        for number, made in pool.map("make", calls, last=True):
            if isinstance(made, LostCall):
                summary.failed += [(image.path, made.reason) for image in shards[number].images]
            else:
                summary.add(made)
            done += len(shards[number].images)
            progress(job.config["verb"], done, total)
    return summary


def _indexed(pool: Pool, paths: Sequence[str | Path], summary: Summary, progress: Progress) -> list[ImageEntry]:
    size = max(1, min(_PATHS_A_CALL, len(paths) // (4 * pool.capacity())))
    chunks = [[os.fspath(path) for path in paths[i : i + size]] for i in range(0, len(paths), size)]
    images: list[ImageEntry] = []
    failed: dict[int, list[Failure]] = {}
    done = 0
    for number, found in pool.map("index_images", [(chunk,) for chunk in chunks]):
        if isinstance(found, LostCall):
            failed[number] = [(path, found.reason) for path in chunks[number]]
        else:
            images += found[0]
            failed[number] = found[1]
        done += len(chunks[number])
        progress("look", done, len(paths))
    summary.failed += [failure for number in sorted(failed) for failure in failed[number]]
    return images


# -- what many images share -------------------------------------------------------------------------------------------


def _artifacts(
    pool: Pool,
    images: Sequence[ImageEntry],
    shards: Sequence[Shard],
    stored: dict[Size, Tensor],
    hello: Hello,
    progress: Progress,
) -> dict[Size, Any]:
    """Put an object of Ray for each grid shape that is still needed; None where no image could be used.

    A sum that lay on a node that died is made again from its images: the tree, and so the result, is the same.
    """
    found = {grid: pool.ray.put(artifact) for grid, artifact in stored.items()}
    missing = sorted({shard.images[0].grid for shard in shards} - found.keys())
    leaves = [(image,) for grid in missing for image in first_images(images, grid, hello.reduced_images)]
    tries = 1
    while True:
        try:
            solved = list(_finished(pool, leaves, hello, progress))
            return found | {grid: pool.ray.put(artifact) for grid, artifact in solved if artifact is not None}
        except pool.ray.exceptions.RayError as error:
            if tries == TRIES:
                raise
            log.warning("a part of the shared artifact was lost and is made again: %s", brief(error))
            tries += 1


def _finished(
    pool: Pool, leaves: Sequence[tuple[ImageEntry]], hello: Hello, progress: Progress
) -> Iterator[tuple[Size, Tensor | None]]:
    # No core is asked for: the actors hold all of them, and a sum is over in milliseconds.
    adder = pool.ray.remote(num_cpus=0, max_retries=-1)(_added)
    parts = pool.ordered("part", leaves)

    def ticked(group: Iterable[tuple[int, Any]]) -> Iterator[Any]:
        for number, part in group:
            progress("artifact", number + 1, len(leaves))
            yield None if isinstance(part, LostCall) else part  # reported when its own turn comes

    groups = groupby(parts, key=lambda part: leaves[part[0]][0].grid)
    totals = [(grid, tree_sum(ticked(group), partial(adder.remote, hello.add))) for grid, group in groups]
    for number, artifact in pool.map("finish", [(total,) for _, total in totals]):
        if isinstance(artifact, LostCall):
            raise ConfigError(f"the artifact of grid {totals[number][0]} could not be made: {artifact.reason}")
        yield totals[number][0], artifact


def _added(add: Callable[[Any, Any], Any], first: Any, second: Any) -> Any:
    return add(first, second)


# -- where the shards go ----------------------------------------------------------------------------------------------


@dataclass
class _Held:
    """Hold the existing contents of a target.

    Args:
        images: path and SHA-256 of the stored images.
        committed: names of the stored shards.
        artifacts: reads the stored artifact of each grid shape.
        marker: a file in the folder by which workers check that they see the same folder.
    """

    images: set[tuple[str, str]]
    committed: set[str]
    artifacts: Callable[[], dict[Size, Tensor]]
    marker: str | None = None


@contextmanager
def _held(pool: Pool, target: ShardTarget, job: Job, wait: bool) -> Iterator[_Held]:
    if target.remote:
        yield _held_remotely(pool, target, job)
        return
    with StoreWriter(target.place, job, wait=wait) as writer:
        # The next writer deletes the marker that a killed driver leaves.
        try:
            marker = new_part(writer.folder / "driver.h5")
        except OSError as error:
            raise StoreError(f"cannot write to the store {target.place!r}: {error.strerror or error}") from error
        try:
            committed = {path.stem for path in writer.folder.glob("*.h5")}
            yield _Held(
                set(writer.images),
                committed,
                lambda: stored_artifacts(FeatureStore(target.place)) if committed else {},
                str(marker),
            )
        finally:
            marker.unlink(missing_ok=True)


def _held_remotely(pool: Pool, target: ShardTarget, job: Job) -> _Held:
    names = target.shards()
    chunks = [names[i : i + _PATHS_A_CALL] for i in range(0, len(names), _PATHS_A_CALL)]
    images: set[tuple[str, str]] = set()
    grids: dict[Size, str] = {}
    for number, found in pool.map("index", [(chunk, job) for chunk in chunks]):
        if isinstance(found, LostCall):
            raise StoreError(f"the shards {chunks[number]} of {target.place!r} cannot be read: {found.reason}")
        for name, listed, grid in found:
            images.update(listed)
            if grid is not None:
                grids.setdefault(grid, name)

    def artifacts() -> dict[Size, Tensor]:
        found = {grid: target.index(name, artifact=True).artifact for grid, name in grids.items()}
        return {grid: torch.from_numpy(artifact).float() for grid, artifact in found.items() if artifact is not None}

    return _Held(images, set(names), artifacts)


# -- on the workers ---------------------------------------------------------------------------------------------------


class _Actor:
    """The work on one device. Exceptions leave its methods, not its constructor, so that they keep their type."""

    def __init__(self, make_work: Callable[[], Work], target: ShardTarget, threads: int, folder: str):
        with suppress(OSError):  # relative paths are those of the driver, where there is such a folder
            os.chdir(folder)
        self.make_work, self.target, self.threads = make_work, target, threads
        self._work: Work | None = None
        self._lock = threading.Lock()

    def work(self) -> Work:
        """Make the work once; in every thread, torch has the same number of threads."""
        torch.set_num_threads(self.threads)
        with self._lock:
            if self._work is None:
                self._work = self.make_work()
            return self._work

    def hello(self) -> Hello:
        import ray

        work, node = self.work(), ray.get_runtime_context().get_node_id()
        versions, reduction = (dvt.__version__, torch.__version__), work.reduction
        if reduction is None:
            return Hello(node, versions, work.job, work.shard_images)
        return Hello(node, versions, work.job, work.shard_images, reduction.images, reduction.add_known)

    def index_images(self, paths: Sequence[str]) -> tuple[list[ImageEntry], list[Failure]]:
        work, found, failed = self.work(), [], list[Failure]()
        with reading_threads(work.threads) as readers:
            for path, looking in ahead(readers, work.index_image, paths, len(paths)):
                with work.reported(path, failed):
                    found.append(looking.result())
        return found, failed

    def index(self, names: Sequence[str], job: Job) -> list[tuple[str, list[tuple[str, str]], Size | None]]:
        found = []
        for name in names:
            index = self.target.index(name)
            if index.job.digest != job.digest:
                raise StoreError(
                    f"{self.target.place!r} holds another job's tokens ({job.differences(index.job)}); choose another "
                    "output"
                )
            found.append((name, index.images, index.grid))
        return found

    def part(self, image: ImageEntry) -> tuple[bool, Any]:
        """Make an image's part of the reduction: whether there is one (for the driver), and the part (for the sum)."""
        part = self._reduction().part(image)
        return part is not None, part

    def finish(self, total: Any | None) -> Tensor | None:
        """Compute the array that images share from the sum of their parts."""
        return None if total is None else self._reduction().finished(total).cpu()

    def _reduction(self) -> Reduction:
        reduction = self.work().reduction
        if reduction is None:
            raise ConfigError("the images of this work share nothing, and yet a part of it was asked for")
        return reduction

    def make(self, shard: Shard, artifact: Tensor | None, marker: str | None) -> ShardResult:
        """Compute and store a shard; its records come back without their arrays."""
        work, start = self.work(), time.perf_counter()
        self._check(marker)
        with closing(work.make([(shard, artifact)])) as making:
            (made,) = making
        if made.records:
            with made.profile.timed("write"):
                content = shard_file(shard.name, work.job, made.records, made.artifact)
                self._check(marker)  # again: meanwhile, another run may have taken over from a driver that died
                self.target.put_shard(shard.name, content)
            made.profile.written_bytes += len(content)
        made.profile.wall = time.perf_counter() - start
        stubs = [replace(record, terms={}, prefix=None) for record in made.records]
        return replace(made, records=stubs, artifact=None)

    def _check(self, marker: str | None) -> None:
        if marker is not None and not os.path.exists(marker):
            raise StoreError(
                f"the folder {self.target.place!r} of node {socket.gethostname()} is not the one of the command; "
                "choose one on a file system that all nodes share, or a URL"
            )
