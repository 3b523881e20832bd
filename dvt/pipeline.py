"""Stage one over images: views through the backbone, a solver, the store and the pictures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dvt import grids
from dvt.backbones import Backbone
from dvt.errors import ConfigError, ImageError, NonFiniteError
from dvt.fields import Decomposition, Fit, LinearConfig, LinearSolver, NeuralConfig, NeuralSolver
from dvt.grids import Size
from dvt.images import file_sha256, image_size, load_image
from dvt.store import FeatureStore, Job, Record, Shard, StoreWriter, plan
from dvt.tokens import Tokens
from dvt.views import ViewConfig, Views

log = logging.getLogger(__name__)

ALL_TERMS = ("raw", "semantic", "artifact", "residual")
# More patches than this take gigabytes of attention; only a very long or thin image has them.
MAX_PATCHES = 16_384


@dataclass(frozen=True)
class DenoiseConfig:
    """What changes the numbers of stage one.

    Args:
        views: how views are drawn.
        solver: "linear" (closed form, the default) or "neural" (gradient fitting, as in the paper).
        linear: settings of the linear solver.
        neural: settings of the neural solver.
        shared_artifact: fit one artifact for all images of a grid shape, instead of one each.
        shared_images: images that the shared artifact is fitted on, the first ones in order of their paths.
        dtype: of the backbone's forward pass; fitting is always done in float32 or better.
    """

    views: ViewConfig = field(default_factory=ViewConfig)
    solver: Literal["linear", "neural"] = "linear"
    linear: LinearConfig = field(default_factory=LinearConfig)
    neural: NeuralConfig = field(default_factory=NeuralConfig)
    shared_artifact: bool = False
    shared_images: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if self.solver not in ("linear", "neural"):
            raise ConfigError(f"solver is {self.solver!r}; it must be 'linear' or 'neural'")
        if self.shared_artifact and self.solver != "linear":
            raise ConfigError("a shared artifact is fitted by the linear solver only; leave --solver at linear")
        if self.shared_images < 1:
            raise ConfigError(f"shared_images is {self.shared_images}; it must be 1 or more")

    def numbers(self) -> dict[str, Any]:
        """The settings that the tokens depend on, for the job's hash: not the other solver's."""
        settings = asdict(self)
        settings.pop("neural" if self.solver == "linear" else "linear")
        settings["views"].pop("batch")
        if not self.shared_artifact:
            settings.pop("shared_images")
        return settings

    def make_solver(self) -> LinearSolver | NeuralSolver:
        """The solver that these settings describe."""
        return LinearSolver(self.linear) if self.solver == "linear" else NeuralSolver(self.neural)


class TokenViews:
    """The views of one image after the backbone: batches of (tokens (V, h, w, C), coords (V, h, w, 2)), float32.

    Attributes:
        coords: (h, w, 2) of the whole image's patches.
        seconds: spent in cutting views and in the backbone.
    """

    def __init__(self, backbone: Backbone, image: Tensor, config: ViewConfig, dtype: str = "float32"):
        self.backbone = backbone
        self.device = backbone.mean.device
        size = checked_input_size(backbone, (image.shape[1], image.shape[2]))
        self.coords = backbone.centres(size)
        if min(self.coords.shape[:2]) < 2:
            raise ImageError(
                f"an image of {image.shape[1]} x {image.shape[2]} pixels has only {self.coords.shape[0]} x "
                f"{self.coords.shape[1]} patches; its decomposition needs at least 2 x 2: choose a larger size"
            )
        self.views = Views(image.to(self.device), size, self.coords, config)
        self.dtype = getattr(torch, dtype)
        self.seconds = 0.0
        self._whole: Tokens | None = None

    @property
    def whole(self) -> Tokens:
        """The tokens of the whole image (batch of 1), once the first batch has been read."""
        if self._whole is None:
            raise RuntimeError("the whole image's tokens are not known yet; read the first batch of views before")
        return self._whole

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = time.perf_counter()
        for images, coords in self.views:
            tokens = self._forward(images)
            self._whole = self._whole or tokens[:1]
            self._settle()
            self.seconds += time.perf_counter() - start
            yield tokens.patches, coords
            start = time.perf_counter()

    @torch.no_grad()
    def _forward(self, images: Tensor) -> Tokens:
        with autocast(self.device, self.dtype):
            return self.backbone(images).to(torch.float32)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision for a forward pass; float32 means none."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@dataclass(frozen=True)
class Denoised:
    """One image after stage one.

    Args:
        decomposition: its terms on the whole image's patch grid.
        prefix: (P, C) prefix tokens of the whole image.
        fit: the solver's fit; evaluates F anywhere.
        extraction_seconds: in views and the backbone.
        fitting_seconds: in the solver.
    """

    decomposition: Decomposition
    prefix: Tensor
    fit: Fit
    extraction_seconds: float
    fitting_seconds: float

    def upsampled(self, factor: int) -> Tensor:
        """(factor h, factor w, C) semantic features: F between the patch centres, plus what the estimate adds to F."""
        height, width = self.decomposition.raw.shape[:2]
        grid = (factor * height, factor * width)
        coords = grids.grid_centres(grid, device=self.decomposition.raw.device)
        detail = self.decomposition.semantic - self.decomposition.field
        return self.fit.semantic(coords) + grids.resample(detail, grid)


def denoise(
    backbone: Backbone,
    image: str | Path | Tensor,
    config: DenoiseConfig | None = None,
    artifact: Tensor | None = None,
) -> Decomposition:
    """Split the features of one image into a semantic field, an artifact and a residual.

    Args:
        backbone: from :func:`dvt.load_backbone` or :func:`dvt.wrap`; its device is used.
        image: a path, or (3, H, W) RGB in [0, 1].
        config: settings; the defaults suit a laptop.
        artifact: (h, w, C) a known artifact, for example one shared by many images.

    Returns:
        The terms at the patches of the whole image, each (h, w, C); `.semantic` is the denoised map.
    """
    return denoise_image(backbone, image, config or DenoiseConfig(), artifact).decomposition


def denoise_image(
    backbone: Backbone, image: str | Path | Tensor, config: DenoiseConfig, artifact: Tensor | None = None
) -> Denoised:
    """:func:`denoise` with the fit, the prefix tokens and the seconds beside the decomposition."""
    pixels = image if isinstance(image, Tensor) else load_image(image)
    views = TokenViews(backbone, pixels, config.views, config.dtype)
    start = time.perf_counter()
    fit = config.make_solver().fit(views, artifact)
    decomposition = fit.decompose(views.whole.patches[0], views.coords)
    if views.device.type == "cuda":
        torch.cuda.synchronize(views.device)
    seconds = time.perf_counter() - start
    return Denoised(decomposition, views.whole.prefix[0], fit, views.seconds, seconds - views.seconds)


def shared_artifact(backbone: Backbone, images: Iterable[str | Path | Tensor], config: DenoiseConfig) -> Tensor:
    """The one artifact (h, w, C) that explains many images of one grid shape best, by the linear solver.

    Each image keeps a field of its own; their reduced equations for the artifact add up.
    """
    solver, total, grid = LinearSolver(config.linear), None, (0, 0)
    for image in images:
        pixels = image if isinstance(image, Tensor) else load_image(image)
        views = TokenViews(backbone, pixels, config.views, config.dtype)
        part = solver.artifact_equations(views)
        grid = views.whole.grid
        if total is not None and total[1].shape != part[1].shape:
            raise ConfigError(f"a shared artifact needs images of one grid shape; one has {grid}")
        total = part if total is None else (total[0] + part[0], total[1] + part[1])
    if total is None:
        raise ImageError("no image was given; a shared artifact needs at least one")
    return solver.solve_shared(total, grid)


@dataclass
class Summary:
    """What a run over many images did.

    Args:
        done: images computed now.
        skipped: images that the store held already.
        failed: (path, reason) of images that could not be read.
        extraction_seconds: in views and the backbone.
        fitting_seconds: in the solver.
        shards: shards written now.
    """

    done: int = 0
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    extraction_seconds: float = 0.0
    fitting_seconds: float = 0.0
    shards: int = 0


@dataclass(frozen=True)
class _Listed:
    path: Path
    sha256: str
    size: Size
    grid: Size


Progress = Callable[[str, int, int], None]
Each = Callable[[Path, Tensor, Denoised], None]


def denoise_images(
    backbone: Backbone,
    paths: Sequence[Path],
    out: str | Path,
    config: DenoiseConfig,
    *,
    keep_terms: bool = False,
    shard_images: int = 16,
    strict: bool = False,
    wait: bool = True,
    progress: Progress | None = None,
    each: Each | None = None,
) -> Summary:
    """Stage one for many images into a feature store; the same call again does what is left.

    Args:
        paths: image files, from :func:`dvt.images.find_images`.
        out: the store's folder.
        keep_terms: also store the artifact and the residual.
        shard_images: images a shard; a killed run loses at most the shard in hand.
        strict: raise on the first image that cannot be read, instead of reporting it at the end.
        wait: wait for another writer of the same store, instead of refusing.
        progress: called with (what, done, total) after every image.
        each: called with (path, pixels, result) for every image computed, for pictures.

    Raises:
        StoreError: the folder cannot be written, or holds another job's tokens.
        ImageError: with strict, an image cannot be read.
    """
    summary, progress = Summary(), progress or (lambda what, done, total: None)
    terms = _terms(keep_terms)
    with StoreWriter(out, job_of(backbone, config, keep_terms), wait=wait) as writer:
        listed = list(_look(backbone, paths, summary, strict, progress))
        todo = [item for item in listed if item.sha256 not in writer.done]
        summary.skipped = len(listed) - len(todo)
        by_key = {(str(item.path), item.sha256): item for item in todo}
        images = [(str(item.path), item.sha256, item.grid) for item in todo]
        resumed = config.shared_artifact and writer.done
        shared: dict[Size, Tensor | None] = dict(_stored_artifacts(out, backbone.mean.device)) if resumed else {}
        run = _Run(backbone, config, terms, summary, strict, each, lambda: progress("denoise", summary.done, len(todo)))
        for shard in plan(images, shard_images, writer.job, by_grid=config.shared_artifact):
            grid = shard.images[0][2]
            if config.shared_artifact and grid not in shared:
                shared[grid] = _fit_shared(backbone, listed, grid, config)
            artifact = shared.get(grid)
            records = list(run.records(shard, by_key, artifact))
            if records:
                writer.write(shard.name, records, artifact)
                summary.shards += 1
    return summary


def job_of(backbone: Backbone, config: DenoiseConfig, keep_terms: bool) -> Job:
    """The store's job: everything that the tokens depend on."""
    terms = _terms(keep_terms)
    return Job(
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        layer=backbone.layer,
        stride=backbone.stride,
        size=backbone.image_size,
        config={"verb": "denoise", "terms": list(terms), **config.numbers()},
    )


def checked_input_size(backbone: Backbone, image_size: Size) -> Size:
    """:meth:`Backbone.input_size`; ImageError where attention would take gigabytes."""
    size = backbone.input_size(image_size)
    height, width = backbone.grid(size)
    if height * width > MAX_PATCHES:
        raise ImageError(
            f"an image of {image_size[0]} x {image_size[1]} pixels would take {height} x {width} patches, more than "
            f"{MAX_PATCHES}; crop it to a less extreme aspect ratio, or choose a smaller size"
        )
    return size


def _terms(keep_terms: bool) -> tuple[str, ...]:
    return ALL_TERMS if keep_terms else ALL_TERMS[:2]


def _look(
    backbone: Backbone, paths: Sequence[Path], summary: Summary, strict: bool, progress: Progress
) -> Iterator[_Listed]:
    """Hash and grid shape of every image that can be read at all, from its bytes and its header."""
    for number, path in enumerate(paths):
        with reported(path, summary, strict):
            size = image_size(path)
            yield _Listed(path, file_sha256(path), size, backbone.grid(checked_input_size(backbone, size)))
        progress("look", number + 1, len(paths))


@dataclass(frozen=True)
class _Run:
    backbone: Backbone
    config: DenoiseConfig
    terms: Sequence[str]
    summary: Summary
    strict: bool
    each: Each | None
    tick: Callable[[], None]

    def records(
        self, shard: Shard, listed: dict[tuple[str, str], _Listed], artifact: Tensor | None
    ) -> Iterator[Record]:
        """Records of a shard's images; copies of the same bytes, which lie next to each other, are computed once."""
        last, result = "", None
        for path, sha256, _ in shard.images:
            item = listed[path, sha256]
            if sha256 != last or result is None:  # a copy that cannot be read is reported under its own path
                last, result = sha256, self._denoise(item.path, artifact)
            if result is None:
                continue
            self.summary.done += 1
            self.tick()
            maps = result.decomposition.terms()
            yield Record(path, sha256, item.size, {term: maps[term].cpu() for term in self.terms}, result.prefix.cpu())

    def _denoise(self, path: Path, artifact: Tensor | None) -> Denoised | None:
        with reported(path, self.summary, self.strict):
            pixels = load_image(path)
            result = denoise_image(self.backbone, pixels, self.config, artifact)
            self.summary.extraction_seconds += result.extraction_seconds
            self.summary.fitting_seconds += result.fitting_seconds
            if self.each:
                self.each(path, pixels, result)
            return result
        return None


def _stored_artifacts(out: str | Path, device: torch.device) -> dict[Size, Tensor]:
    """The shared artifacts (h, w, C) by grid shape that a store holds already."""
    store, found = FeatureStore(out), {}
    for index, grid in enumerate(store.grids):
        if grid not in found and (artifact := store.artifact(index)) is not None:
            found[grid] = torch.from_numpy(artifact).float().to(device)
    return found


def _fit_shared(backbone: Backbone, listed: Sequence[_Listed], grid: Size, config: DenoiseConfig) -> Tensor | None:
    """The artifact (h, w, C) of a grid shape, from its first images in order of their paths; None without any."""
    paths = sorted({item.sha256: item.path for item in reversed(listed) if item.grid == grid}.values())
    images = _readable(paths[: config.shared_images])
    if (first := next(images, None)) is None:
        return None
    artifact = shared_artifact(backbone, chain([first], images), config)
    # As the store keeps it, so that a run that is resumed from the store subtracts the same numbers.
    half = artifact.half().float()
    return half if half.isfinite().all() else artifact


def _readable(paths: Iterable[Path]) -> Iterator[Tensor]:
    for path in paths:
        try:
            yield load_image(path)
        except ImageError as error:  # reported when its own turn comes
            log.debug("left out of the shared artifact: %s", error)


@contextmanager
def reported(path: Path, summary: Summary, strict: bool) -> Iterator[None]:
    """Turn an image that cannot be used into a line of the summary, unless strict."""
    try:
        yield
    except (ImageError, NonFiniteError) as error:
        if strict:
            raise
        log.warning("skipped %s: %s", path, error)
        summary.failed.append((str(path), str(error)))
