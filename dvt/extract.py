"""Tokens of many images into a feature store: raw, and denoised where there is a denoiser.

Three things go on at the same time, in threads: the next two batches are decoded, the backbone runs, and the shard
before is written. None of them changes a number: which image is in which batch follows from the plan alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from dvt.backbones import Backbone, weights_sha256
from dvt.errors import ConfigError, ImageError, NonFiniteError
from dvt.grids import Size
from dvt.images import file_sha256, image_size, load_image
from dvt.pipeline import Progress, Summary, autocast, checked_input_size, reported
from dvt.store import Job, Record, Shard, StoreWriter, plan
from dvt.views import resize

if TYPE_CHECKING:
    from dvt.denoiser import Denoiser

log = logging.getLogger(__name__)

MAX_WORKERS = 16
_AHEAD = 2  # batches being decoded while one is in the backbone: one alone would wait for its slowest image
_LOOK_AHEAD = 64

Item = TypeVar("Item")
Result = TypeVar("Result")
_Planned = tuple[str, str, Size]  # path, sha256, grid, as the plan has them


@dataclass(frozen=True)
class ExtractConfig:
    """How tokens are extracted. Only `dtype` belongs to the store's job: the others change speed and memory.

    Args:
        dtype: of the forward pass, by autocast; tokens are stored in half precision where they fit into it.
        batch: images a forward pass; what is left of a grid shape at the end of a shard makes a smaller one.
        shard_images: images a shard; a killed run loses at most the shard in hand and the one that is being written.
        workers: threads that read and decode images; None takes the processor's cores, at most 16.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch: int = 32
    shard_images: int = 64
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype is {self.dtype!r}; it must be 'float32', 'bfloat16' or 'float16'")
        for name in ("batch", "shard_images", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more")

    @property
    def threads(self) -> int:
        """The number of decoding threads."""
        return self.workers or min(MAX_WORKERS, os.cpu_count() or 1)


def extract_images(
    backbone: Backbone,
    paths: Sequence[Path],
    out: str | Path,
    config: ExtractConfig | None = None,
    denoiser: Denoiser | None = None,
    *,
    strict: bool = False,
    wait: bool = True,
    started: Callable[[Job], None] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Tokens of many images into a feature store; the same call again does what is left.

    The store holds the term "raw" and, with a denoiser, "denoised", on each image's own patch grid, and the prefix
    tokens. Memory does not grow with the number of images beyond their list of paths and hashes.

    Args:
        backbone: its device is used.
        paths: image files, from :func:`dvt.images.find_images`.
        out: the store's folder.
        config: settings.
        denoiser: on the backbone's device, in evaluation mode.
        strict: raise on the first image that cannot be read, instead of reporting it at the end.
        wait: wait for another writer of the same store, instead of refusing.
        started: called with the job once the folder is locked and known to hold nothing else.
        progress: called with (what, done, total) after every image.

    Returns:
        What was done; `extraction_seconds` is the time from the first batch to the last shard.

    Raises:
        StoreError: the folder cannot be written, or holds another job's tokens.
        ImageError: with strict, an image cannot be read.
        NonFiniteError: with strict, an image's tokens hold NaN or infinity.
        ConfigError: not even half a batch fits into the GPU's memory.
    """
    config, progress = config or ExtractConfig(), progress or (lambda what, done, total: None)
    job, summary = extract_job(backbone, config, denoiser), Summary()
    with StoreWriter(out, job, wait=wait) as writer, _decoders(config.threads) as decoders:
        if started:
            started(job)
        sizes: dict[tuple[str, str], Size] = {}
        images: list[_Planned] = []
        for path, sha256, size, grid in _look(backbone, paths, decoders, summary, strict, progress):
            sizes[path, sha256] = size
            images.append((path, sha256, grid))
        summary.skipped = sum(sha256 in writer.done for _, sha256, _ in images)
        shards = _shards_left(images, writer, config.shard_images)
        total = sum(len(shard.images) for shard in shards)
        start = time.perf_counter()
        run = _Run(
            backbone, denoiser, config, decoders, sizes, summary, strict, lambda n: progress("extract", n, total)
        )
        _save(writer, run.shards(shards), summary)
        summary.extraction_seconds = time.perf_counter() - start
    return summary


def extract_job(backbone: Backbone, config: ExtractConfig, denoiser: Denoiser | None = None) -> Job:
    """The store's job: everything that the tokens depend on."""
    settings: dict[str, Any] = {"verb": "extract", "dtype": config.dtype}
    if denoiser is not None:
        settings["denoiser"] = {
            "weights_sha256": weights_sha256(denoiser),
            **asdict(replace(denoiser.config, strength=denoiser.strength)),
        }
    return Job(
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        layer=backbone.layer,
        stride=backbone.stride,
        size=backbone.image_size,
        config=settings,
    )


# -- what is to be done -----------------------------------------------------------------------------------------------


def _look(
    backbone: Backbone,
    paths: Sequence[Path],
    decoders: ThreadPoolExecutor,
    summary: Summary,
    strict: bool,
    progress: Progress,
) -> Iterator[tuple[str, str, Size, Size]]:
    """(path, sha256, size, grid) of every image that can be read at all, from its bytes and its header."""

    def look(path: Path) -> tuple[str, str, Size, Size]:
        size = image_size(path)
        return str(path), file_sha256(path), size, backbone.grid(checked_input_size(backbone, size))

    for number, (path, found) in enumerate(_ahead(decoders, look, paths, _LOOK_AHEAD)):
        with reported(path, summary, strict):
            yield found.result()
        progress("look", number + 1, len(paths))


def _shards_left(images: Sequence[_Planned], writer: StoreWriter, shard_images: int) -> list[Shard]:
    """The shards to make; where an image could not be decoded in an earlier run, the cuts are still where they were.

    Such an image is missing in its shard, and so not done; among the images left it would move all cuts behind it.
    """
    committed = {path.stem for path in writer.folder.glob("*.h5")}
    whole = plan(images, shard_images, writer.job, by_grid=True)
    tried = {image[:2] for shard in whole if shard.name in committed for image in shard.images}
    left = [image for image in images if image[1] not in writer.done]
    parts = ([image for image in left if (image[:2] in tried) == again] for again in (False, True))
    return [shard for part in parts for shard in plan(part, shard_images, writer.job, by_grid=True)]


@dataclass(frozen=True)
class _Task:
    """One batch: the paths of each distinct image, and where it belongs."""

    shard: Shard
    copies: list[list[_Planned]]
    last: bool


def _tasks(shards: Iterable[Shard], batch: int) -> Iterator[_Task]:
    """Batches, which never cross shards, and so are of one grid shape each."""
    for shard in shards:
        distinct = [list(same) for _, same in groupby(shard.images, key=itemgetter(1))]
        for i in range(0, len(distinct), batch):
            yield _Task(shard, distinct[i : i + batch], last=i + batch >= len(distinct))


# -- doing it ---------------------------------------------------------------------------------------------------------


@dataclass
class _Loaded:
    """A batch's images (B, 3, H, W), None where none could be read; by number of the image, why one could not."""

    images: Tensor | None
    errors: dict[int, ImageError] = field(default_factory=dict)


@dataclass(frozen=True)
class _Launched:
    """A batch's maps on their way to the host: twice, because only the numbers tell whether half precision holds them.

    (It nearly always does, and then half of the transfer and of the memory is saved. In a shard that one batch makes
    float32, the others' tokens are those of half precision.)

    Args:
        wide: (B, ...) maps in float32 on the device, by name.
        narrow: the same in half precision on the host, once `arrived`.
        fits: whether `narrow` is finite.
        finite: (B,) whether an image's maps are finite.
    """

    wide: dict[str, Tensor]
    narrow: dict[str, Tensor]
    fits: Tensor
    finite: Tensor
    arrived: torch.cuda.Event | None

    def fetch(self) -> tuple[dict[str, Tensor], list[bool]]:
        """The maps on the host, and which images' are finite."""
        if self.arrived is not None:
            self.arrived.synchronize()
        maps = self.narrow if self.fits else {name: values.cpu() for name, values in self.wide.items()}
        return maps, self.finite.tolist()


@dataclass(frozen=True)
class _Run:
    backbone: Backbone
    denoiser: Denoiser | None
    config: ExtractConfig
    decoders: ThreadPoolExecutor
    sizes: dict[tuple[str, str], Size]
    summary: Summary
    strict: bool
    tick: Callable[[int], None]

    def shards(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[Record]]]:
        """Each shard with its records."""
        records: list[Record] = []
        for task, loaded, launched in self._launched(_tasks(shards, self.config.batch)):
            records += self._records(task, loaded, launched)
            if task.last:
                yield task.shard, records
                records = []

    def _launched(self, tasks: Iterable[_Task]) -> Iterator[tuple[_Task, _Loaded, _Launched | None]]:
        """Batches, one behind: a GPU has the next one before the maps of this one are waited for."""
        behind: tuple[_Task, _Loaded, _Launched | None] | None = None
        with ThreadPoolExecutor(_AHEAD) as gatherers:
            for task, loading in _ahead(gatherers, self._load, tasks, _AHEAD):
                loaded = loading.result()
                launched = None if loaded.images is None else self._launch(loaded.images)
                if behind is not None:
                    yield behind
                behind = (task, replace(loaded, images=None), launched)
        if behind is not None:
            yield behind

    def _load(self, task: _Task) -> _Loaded:
        decoding = [self.decoders.submit(self._decode, same[0]) for same in task.copies]
        images, errors = [], {}
        for number, future in enumerate(decoding):
            try:
                images.append(future.result())
            except ImageError as error:
                errors[number] = error
        if not images:
            return _Loaded(None, errors)
        batch = torch.stack(images)
        return _Loaded(batch.pin_memory() if self.backbone.mean.is_cuda else batch, errors)

    def _decode(self, image: _Planned) -> Tensor:
        path, sha256, _ = image
        return resize(load_image(path), self.backbone.input_size(self.sizes[path, sha256]))

    def _launch(self, images: Tensor) -> _Launched:
        device = self.backbone.mean.device
        wide = self._forward(images.to(device, non_blocking=True))
        narrow = {name: values.half() for name, values in wide.items()}
        fits = torch.stack([values.isfinite().all() for values in narrow.values()]).all()
        finite = torch.stack([values.isfinite().flatten(1).all(1) for values in wide.values()]).all(0)
        moved = {name: values.to("cpu", non_blocking=True) for name, values in narrow.items()}
        fits, finite = fits.to("cpu", non_blocking=True), finite.to("cpu", non_blocking=True)
        return _Launched(
            wide,
            moved,
            fits,
            finite,
            torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None,
        )

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of a batch; when the GPU's memory is too small for it, of its two halves."""
        try:
            return self._maps(images)
        except torch.cuda.OutOfMemoryError:
            log.warning("out of memory with %d images; trying half as many", len(images))
        # Not in the handler, whose traceback still holds the tensors of the first try.
        try:
            halves = [self._maps(half) for half in images.chunk(2)]
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigError(
                f"the GPU's memory is too small for {-(-len(images) // 2)} images at a time; lower the batch "
                f"(now {self.config.batch}) or the size of the images"
            ) from error
        return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}

    @torch.no_grad()
    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        with autocast(images.device, getattr(torch, self.config.dtype)):
            tokens = self.backbone(images).to(torch.float32)
            maps = {"raw": tokens.patches, "prefix": tokens.prefix}
            if self.denoiser is not None:
                maps["denoised"] = self.denoiser(tokens.patches, tokens.prefix)
        return maps

    def _records(self, task: _Task, loaded: _Loaded, launched: _Launched | None) -> Iterator[Record]:
        maps, finite = ({}, []) if launched is None else launched.fetch()
        rows = iter(range(len(finite)))
        for number, same in enumerate(task.copies):
            error: Exception | None = loaded.errors.get(number)
            row = -1 if error else next(rows)
            if error is None and not finite[row]:
                error = NonFiniteError(
                    f"the tokens of {same[0][0]!r} hold NaN or infinity; check the weights, or try another dtype"
                )
            for path, sha256, _ in same:
                with reported(Path(path), self.summary, self.strict):
                    if error is not None:
                        raise error
                    terms = {name: values[row] for name, values in maps.items()}
                    yield Record(path, sha256, self.sizes[path, sha256], terms, terms.pop("prefix"))
                    self.summary.done += 1
                    self.tick(self.summary.done)


def _save(writer: StoreWriter, shards: Iterable[tuple[Shard, list[Record]]], summary: Summary) -> None:
    """Writes each shard while the next one is computed; at most one waits to be written."""
    saving: Future[Path] | None = None
    with ThreadPoolExecutor(1) as saver:
        for shard, records in shards:
            if saving is not None:
                saving.result()
            saving = saver.submit(writer.write, shard.name, records) if records else None
            summary.shards += bool(records)
        if saving is not None:
            saving.result()


@contextmanager
def _decoders(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for decoding, with one core each: resizing would otherwise start threads of its own in each of them."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # what threads started from now on begin with; this one has kept its own


def _ahead(
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
