"""Extract tokens of many images into a feature store: raw, and with a denoiser also denoised.

Threads do three things at the same time: decode the next two batches, run the backbone, and write the previous shard.
Their timing changes no number: the plan alone decides which image is in which batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dvt.backbones import Backbone, choose_precision
from dvt.backbones.inference import in_halves
from dvt.backbones.layers import choose_layers, layer_term
from dvt.backbones.tiles import Tiling
from dvt.devices import Event, autocast, pinned, record
from dvt.errors import ConfigError, NonFiniteError
from dvt.images import read_image
from dvt.jobs.ahead import ahead, reading_threads
from dvt.jobs.intake import Intake, distinct, read_copies
from dvt.jobs.profile import Profile, StageTimer
from dvt.jobs.run import run
from dvt.jobs.work import THREADS, ShardResult, Summary, Work
from dvt.progress import Progress
from dvt.store import ImageEntry, Job, Record, Shard
from dvt.tokens import TokenMap
from dvt.views import resize

#: Called with an image's path, its pixels (3, H, W) as the backbone took them, and its maps (h, w, C) by term.
OnMaps = Callable[[Path, Tensor, Mapping[str, Tensor]], None]

_AHEAD = 2  # batches decoded while one is in the backbone; with a single one, all would wait for its slowest image


@dataclass(frozen=True)
class ExtractConfig:
    """Hold the settings of an extraction. `dtype`, `layers` and `tiling` belong to the store's job; the others change
    speed and memory.

    Args:
        dtype: dtype of the forward pass, by autocast; "auto" calls :func:`dvt.backbones.choose_precision`. Tokens are
            stored in half precision if their values fit into it.
        batch: images per forward pass; the last batch of a shard may be smaller.
        shard_images: images per shard; a killed run loses at most the shard being computed and the one being written.
        workers: threads that read and decode images; None takes the processor's cores, at most 16.
        layers: further blocks, whose tokens are stored too, as "layer5", from the same forward pass; the backbone's own
            layer is the term "raw", and the one that a denoiser takes.
    """

    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "float32"
    batch: int = 32
    shard_images: int = 64
    workers: int | None = None
    layers: tuple[int, ...] = ()
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "tf32", "bfloat16", "float16"):
            raise ConfigError(f"dtype is {self.dtype!r}; it must be 'auto', 'float32', 'tf32', 'bfloat16' or 'float16'")
        for name in ("batch", "shard_images", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more")

    @property
    def threads(self) -> int:
        """The number of decoding threads."""
        return self.workers or THREADS


def extract_images(
    backbone: Backbone,
    paths: Sequence[str | Path],
    out: str | Path,
    config: ExtractConfig | None = None,
    denoiser: TokenMap | None = None,
    *,
    strict: bool = False,
    wait: bool = True,
    started: Callable[[Job], None] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write the tokens of many images to a feature store; repeating the call continues an interrupted run.

    The store holds the term "raw" and, with a denoiser, "denoised", on each image's own patch grid, and the prefix
    tokens. Memory does not grow with the number of images beyond their list of paths and hashes.

    Args:
        backbone: its device is used.
        paths: image files and URLs, from :func:`dvt.images.find_sources`.
        out: the store's folder.
        config: settings.
        denoiser: a denoiser on the backbone's device, in evaluation mode.
        strict: raise on the first image that cannot be read, instead of reporting it at the end.
        wait: wait for another writer of the same store, instead of refusing.
        started: called with the job once the folder is locked and known to hold no other job.
        progress: called with (what, done, total) after every image.

    Returns:
        A summary of the run; `extraction_seconds` is the backbone's time.

    Raises:
        StoreError: the folder cannot be written, or holds another job's tokens.
        ImageError: with strict, an image cannot be read.
        NonFiniteError: with strict, an image's tokens hold NaN or infinity.
        ConfigError: not even half a batch fits into the GPU's memory.
    """
    work = ExtractWork(backbone, config or ExtractConfig(), denoiser, strict=strict)
    return run(work, paths, out, wait=wait, started=started, progress=progress)


def extract_job(backbone: Backbone, config: ExtractConfig, denoiser: TokenMap | None = None) -> Job:
    """Describe everything that the tokens of an extraction depend on, as a Job."""
    settings: dict[str, Any] = {"verb": "extract", "dtype": choose_precision(backbone, config.dtype)}
    if len(layers := _layers(backbone, config)) > 1:
        settings["layers"] = list(layers)
    if config.tiling is not None:
        settings["tiling"] = asdict(config.tiling)
    if denoiser is not None:
        settings["denoiser"] = denoiser.identity
    return Job.of(backbone, settings)


def _layers(backbone: Backbone, config: ExtractConfig) -> tuple[int, ...]:
    """List the layers to read, the backbone's own last."""
    return choose_layers(backbone, (*config.layers, backbone.layer)) if config.layers else (backbone.layer,)


class ExtractWork(Work):
    """Do the work of an extraction job; see :func:`extract_images` for the arguments.

    `on_image` is called for every computed image, to write files beside the store.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: ExtractConfig,
        denoiser: TokenMap | None = None,
        *,
        strict: bool = False,
        on_image: OnMaps | None = None,
    ):
        config = replace(config, dtype=choose_precision(backbone, config.dtype))
        super().__init__(
            backbone,
            extract_job(backbone, config, denoiser),
            shard_images=config.shard_images,
            threads=config.threads,
            strict=strict,
            tiling=config.tiling,
        )
        self.config, self.denoiser, self.on_image = config, denoiser, on_image
        self.layers = _layers(backbone, config)

    def make(
        self, shards: Iterable[tuple[Shard, Tensor | None]], tick: Callable[[], None] = lambda: None
    ) -> Generator[ShardResult, None, None]:
        """Compute shards, while the images of the next ones are decoded."""
        start, images = time.perf_counter(), self.config.batch if self.tiling is None else 1
        with reading_threads(self.threads) as readers:
            for task, loaded, launched in self._launched(_tasks(shards, images), readers):
                task.made.records += self._records(task, loaded, launched, tick)
                task.made.profile.add(loaded.profile)
                if launched is not None:
                    task.made.profile.add(Profile(launched.timer.seconds()))
                if task.last:
                    task.made.profile.wall = time.perf_counter() - start
                    yield task.made
                    start = time.perf_counter()

    def _launched(
        self, tasks: Iterable[_BatchTask], readers: ThreadPoolExecutor
    ) -> Iterator[tuple[_BatchTask, _Loaded, _Launched | None]]:
        """Yield each batch after the next one is launched: the GPU has work while this one's maps are fetched."""
        behind: tuple[_BatchTask, _Loaded, _Launched | None] | None = None
        depth = _AHEAD if self.tiling is None else 1
        with ThreadPoolExecutor(depth) as gatherers:
            for task, loading in ahead(gatherers, lambda task: self._load(task, readers), tasks, depth):
                with task.made.profile.timed("wait_images"):
                    loaded = loading.result()
                launched = None if loaded.images is None else self._launch(loaded.images)
                if behind is not None:
                    yield behind
                behind = (task, loaded if self.on_image else replace(loaded, images=None), launched)
        if behind is not None:
            yield behind

    def _load(self, task: _BatchTask, readers: ThreadPoolExecutor) -> _Loaded:
        large = self.tiling is not None
        reading = [readers.submit(read_copies, copies, self._prepare, large) for copies in task.copies]
        intakes, images, profile = [future.result() for future in reading], [], Profile(readers=self.threads)
        for intake in intakes:
            profile.add(intake.profile)
            if intake.pixels is not None:
                images.append(intake.pixels)
                intake.pixels = None  # the batch holds a copy
        if not images or large:
            return _Loaded(images[0][None] if images else None, intakes, profile)
        return _Loaded(pinned(torch.stack(images), self.backbone.device), intakes, profile)

    def _prepare(self, pixels: Tensor, entry: ImageEntry) -> Tensor:
        size = self.input_size((pixels.shape[1], pixels.shape[2]))
        return resize(pixels, size) if self.tiling is None else pixels

    def _launch(self, images: Tensor) -> _Launched:
        device = self.backbone.device
        timer = StageTimer(device)
        timer.mark()
        wide = self._computed(images) if self.tiling is None else self._tiled(images[0], self.tiling)
        timer.mark("backbone")
        narrow = {name: values.half() for name, values in wide.items()}
        fits = torch.stack([_finite(values).all() for values in narrow.values()]).all()
        finite = torch.stack([_finite(values) for values in wide.values()]).all(0)
        moved = {name: values.to("cpu", non_blocking=True) for name, values in narrow.items()}
        fits, finite = fits.to("cpu", non_blocking=True), finite.to("cpu", non_blocking=True)
        timer.mark("fetch")
        return _Launched(wide, moved, fits, finite, timer, record(device))

    def _computed(self, images: Tensor) -> dict[str, Tensor]:
        return in_halves(self._maps, images.to(self.backbone.device, non_blocking=True))

    def _tiled(self, image: Tensor, tiling: Tiling) -> dict[str, Tensor]:
        found = tiling.blended(self.backbone, image, self._computed, self.config.batch, torch.float16)
        return {name: values[None] for name, values in found.items()}

    @torch.no_grad()
    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        with autocast(images.device, self.config.dtype):
            own, several = self.backbone.layer, len(self.layers) > 1
            found = self.backbone.at_layers(images, self.layers) if several else {own: self.backbone(images)}
            maps = {layer_term(self.backbone, k): found[k].patches.float() for k in self.layers if k != own}
            tokens = found[own].to(torch.float32)
            maps |= {"raw": tokens.patches, "prefix": tokens.prefix}
            if self.denoiser is not None:
                maps["denoised"] = self.denoiser(tokens.patches, tokens.prefix)
        return maps

    def _records(
        self, task: _BatchTask, loaded: _Loaded, launched: _Launched | None, tick: Callable[[], None]
    ) -> Iterator[Record]:
        maps, finite = ({}, []) if launched is None else launched.fetch()
        rows = iter(range(len(finite)))
        for intake in loaded.intakes:
            row = next(rows) if intake.used >= 0 else -1
            error = None
            if row >= 0 and not finite[row]:
                path = intake.copies[intake.used].path
                error = NonFiniteError(
                    f"the tokens of {path!r} hold NaN or infinity; check the weights, or try another dtype"
                )
            terms = {name: values[row] for name, values in maps.items()} if row >= 0 else {}
            prefix = terms.pop("prefix", None)
            if self.on_image and error is None and row >= 0 and loaded.images is not None:
                pixels = loaded.images[row]
                if self.tiling is not None:
                    pixels = resize(read_image(pixels), self.input_size((pixels.shape[1], pixels.shape[2])))
                self.on_image(Path(intake.copies[intake.used].path), pixels, terms)
            yield from self.records(intake, terms, prefix, error, task.made.failed, tick)


def _finite(values: Tensor) -> Tensor:
    """Tell which of the maps (B, ...) are finite, without a tensor of their size."""
    flat = values.flatten(1)
    if flat.shape[1] == 0:
        return torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    low, high = flat.aminmax(dim=1)
    return low.isfinite() & high.isfinite()


@dataclass(frozen=True)
class _BatchTask:
    """Describe one batch: the copies of each distinct image, and the shard that the batch belongs to."""

    made: ShardResult
    copies: list[list[ImageEntry]]
    last: bool


def _tasks(shards: Iterable[tuple[Shard, Tensor | None]], batch: int) -> Iterator[_BatchTask]:
    """Cut shards into batches. A batch never crosses shards, so all of its images have one grid shape."""
    for shard, _ in shards:
        made, images = ShardResult(shard), distinct(shard)
        for i in range(0, len(images), batch):
            yield _BatchTask(made, images[i : i + batch], last=i + batch >= len(images))


@dataclass(frozen=True)
class _Loaded:
    """Hold a batch's images (B, 3, H, W), None if none could be read, and the record of reading each."""

    images: Tensor | None
    intakes: list[Intake]
    profile: Profile


@dataclass(frozen=True)
class _Launched:
    """Hold a batch's maps while they are copied to the host, in float32 and in half precision.

    Whether half precision can hold them is known only after the forward pass. It nearly always can, which saves half of
    the transfer and of the memory. If one batch makes its shard float32, the other batches' tokens in that shard have
    been rounded to half precision.

    Args:
        wide: (B, ...) maps in float32 on the device, by name.
        narrow: the same in half precision on the host, once `arrived`.
        fits: True if all of `narrow` is finite.
        finite: (B,) True if an image's maps are finite.
        timer: times "backbone", including the denoiser, and "fetch".
        arrived: recorded on the stream after the copies to the host, which are asynchronous: the host must wait for it
            before it reads `narrow`, `fits` or `finite`. None without a GPU.
    """

    wide: dict[str, Tensor]
    narrow: dict[str, Tensor]
    fits: Tensor
    finite: Tensor
    timer: StageTimer
    arrived: Event | None

    def fetch(self) -> tuple[dict[str, Tensor], list[bool]]:
        """Move the maps to the host, and find which images' are finite."""
        if self.arrived is not None:
            self.arrived.synchronize()
        maps = self.narrow if self.fits else {name: values.cpu() for name, values in self.wide.items()}
        return maps, self.finite.tolist()
