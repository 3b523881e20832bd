"""Run a job in the processes that `accelerate launch` or torchrun started, one for each GPU of a machine.

The first process holds the store's lock, lists the images and plans; every process makes a part of the shards and
writes them into the folder. The plan is that of one process, so the shards are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dvt.devices import is_gpu
from dvt.errors import ConfigError, DvtError
from dvt.grids import Size
from dvt.jobs.reduction import Reduction, first_images, stored_artifacts, tree_sum
from dvt.jobs.run import check_run, list_images, save_shards, shards_left
from dvt.jobs.work import Summary, Work
from dvt.progress import Progress, silent
from dvt.store import FeatureStore, ImageEntry, Job, Record, Shard, StoreWriter, commit_shard, write_shard

if TYPE_CHECKING:
    from accelerate import PartialState

_PATIENCE = timedelta(days=7)  # processes wait for the slowest one, and shards may take hours


def is_launched() -> bool:
    """Tell whether this is one of several processes that share a job."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run(
    work: Work,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    wait: bool = True,
    started: Callable[[Job], None] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Run a job as :func:`dvt.jobs.run.run` does, in all processes together; all of them call this.

    Returns:
        In the first process the summary of all, in the others that of their own part.

    Raises:
        ConfigError: the processes do not agree on the job, or see different folders.
        DvtError: an error of the first process, raised in all of them; a process's own.
    """
    check_run(paths, out)
    state, progress = _joined(work), progress or silent
    progress = progress if state.is_main_process else silent
    with ExitStack() as stack:
        planned = _agreed(state, partial(_plan, stack, work, paths, Path(out), wait, started, progress))
        if planned.job != work.job.digest:
            raise ConfigError("the processes would make different tokens: start all of them with the same settings")
        if not (Path(out) / "writer.lock").exists():
            raise ConfigError(f"the folder {str(out)!r} is not the one of the first process; give one that all share")
        artifacts = dict(planned.artifacts)
        if work.reduction is not None:
            artifacts |= _reduced(state, work.reduction, planned, progress)
        summary = _made(state, work, planned, artifacts, Path(out), progress)
        return _added(state, summary, planned.summary)


@dataclass
class _Plan:
    """Hold what the first process finds: the job's digest, all images, shards to make, arrays that are stored."""

    job: str
    images: list[ImageEntry]
    shards: list[Shard]
    artifacts: dict[Size, Tensor]
    summary: Summary


def _joined(work: Work) -> PartialState:
    from accelerate import PartialState

    return PartialState(cpu=not is_gpu(work.backbone.device), timeout=_PATIENCE)


def _plan(
    stack: ExitStack,
    work: Work,
    paths: Sequence[str | Path],
    out: Path,
    wait: bool,
    started: Callable[[Job], None] | None,
    progress: Progress,
) -> _Plan:
    """Hold the store's lock until the end of the run, list the images and plan."""
    writer, summary = stack.enter_context(StoreWriter(out, work.job, wait=wait)), Summary()
    if started:
        started(work.job)
    with summary.profile.timed("look"):
        images = list(list_images(work, paths, summary, progress))
    committed = {path.stem for path in out.glob("*.h5")}
    shards = shards_left(images, writer.images, committed, work.job, work.shard_images)
    summary.skipped = len(images) - sum(len(shard.images) for shard in shards)
    known = stored_artifacts(FeatureStore(out)) if work.reduction is not None and writer.done else {}
    return _Plan(work.job.digest, images, shards, known, summary)


def _agreed(state: PartialState, make: Callable[[], Any]) -> Any:
    """Call a function in the first process, and return its result, or raise its error, in all."""
    from accelerate.utils import broadcast_object_list

    result: Any = None
    if state.is_main_process:
        try:
            result = make()
        except DvtError as error:
            result = error
    result = broadcast_object_list([result])[0]
    if isinstance(result, DvtError):
        raise result
    return result


def _reduced(state: PartialState, reduction: Reduction, planned: _Plan, progress: Progress) -> dict[Size, Tensor]:
    """Compute the arrays that images share: parts in all processes, their sum, in the order of one, in the first."""
    found: dict[Size, Tensor] = {}
    missing = {shard.images[0].grid for shard in planned.shards} - planned.artifacts.keys()
    for grid in sorted(missing):
        images = first_images(planned.images, grid, reduction.images)
        parts = _parts(state, reduction, images, progress)
        total = tree_sum(parts, reduction.add_known) if state.is_main_process else [*parts] and None
        artifact = _agreed(state, partial(_finished, reduction, total))
        if artifact is not None:
            found[grid] = artifact
    return found


def _finished(reduction: Reduction, total: Any | None) -> Tensor | None:
    return None if total is None else reduction.finished(total).cpu()


def _parts(
    state: PartialState, reduction: Reduction, images: Sequence[ImageEntry], progress: Progress
) -> Iterator[Any | None]:
    """Yield, in the first process, the part of each image; the others only take their turns."""
    from accelerate.utils import gather_object

    for start in range(0, len(images), state.num_processes):
        mine = images[start + state.process_index : start + state.process_index + 1]
        mine = mine if start + state.process_index < len(images) else []
        parts = gather_object([reduction.part(image) for image in mine])
        progress("artifact", min(start + state.num_processes, len(images)), len(images))
        yield from parts


def _made(
    state: PartialState, work: Work, planned: _Plan, artifacts: dict[Size, Tensor], out: Path, progress: Progress
) -> Summary:
    """Make this process's part of the shards: every n-th, so that all finish at about the same time."""
    mine = planned.shards[state.process_index :: state.num_processes]
    total, done, summary = sum(len(shard.images) for shard in mine), 0, Summary()

    def tick() -> None:
        nonlocal done
        done += 1
        progress(work.job.config["verb"], done, total)

    tasks = ((shard, artifacts.get(shard.images[0].grid)) for shard in mine)
    with closing(work.make(tasks, tick)) as making:
        save_shards(_Committed(out, work.job), making, summary)
    return summary


class _Committed:
    """Write shards into a folder whose lock the first process holds."""

    def __init__(self, folder: Path, job: Job):
        self.folder, self.job = folder, job

    def write(self, name: str, records: Sequence[Record], artifact: np.ndarray | Tensor | None = None) -> Path:
        """Commit a shard."""
        content = partial(write_shard, name=name, job=self.job, records=records, artifact=artifact)
        return commit_shard(self.folder, name, content)


def _added(state: PartialState, summary: Summary, planned: Summary) -> Summary:
    """Add up the summaries of all processes, in the first."""
    from accelerate.utils import gather_object

    parts = gather_object([summary])
    if not state.is_main_process:
        return summary
    for part in parts:
        planned.merge(part)
    return planned
