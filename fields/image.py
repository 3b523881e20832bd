"""Decompose one image (stage one): run its views through the backbone, and solve."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from dvt.backbones import Backbone, choose_precision
from dvt.backbones.inference import in_halves
from dvt.devices import autocast, finish, is_gpu, out_of_memory, upload
from dvt.errors import ConfigError, ImageError, NonFiniteError
from dvt.fields.batches import ViewBatch
from dvt.fields.config import PRODUCT_VIEWS, DenoiseConfig, Product
from dvt.fields.decomposition import Decomposition, Fit
from dvt.fields.linear import LinearSolver
from dvt.fields.neural import NeuralSolver
from dvt.fields.shifts import ShiftSolver
from dvt.grids import Size
from dvt.images import ImageLike, read_image, several_images
from dvt.jobs.profile import StageTimer
from dvt.tokens import Tokens
from dvt.views import Shifts, ViewConfig, Views

log = logging.getLogger(__name__)

_GROUP = 8  # images that a GPU solves together: many small operations take little more time than for one image

#: Smoothness of the field over scales at the product's own number of views: labelled tasks score best with a smoother
#: field than held-out tokens choose (benchmarks/products.py). It grows in proportion to more views, whose tokens weigh
#: more against it: they are to make the field surer, not rougher.
ENSEMBLED_SMOOTHNESS = 1.0


class TokenViews:
    """Yield the tokens of one image's views, in batches of (tokens (V, h, w, C), coords (V, h, w, 2)), float32.

    Attributes:
        coords: (h, w, 2) coordinates of the whole image's patches.
        timer: times "views", the cutting, and "backbone".
    """

    def __init__(self, backbone: Backbone, image: Tensor, config: ViewConfig, dtype: str = "float32"):
        self.backbone = backbone
        self.device = backbone.device
        size = backbone.input_size((image.shape[1], image.shape[2]))
        self.coords = backbone.centres(size)
        if min(self.coords.shape[:2]) < 2:
            raise ImageError(
                f"an image of {image.shape[1]} x {image.shape[2]} pixels has only {self.coords.shape[0]} x "
                f"{self.coords.shape[1]} patches; its decomposition needs at least 2 x 2: choose a larger size"
            )
        self.views = _drawn(upload(image, self.device), size, backbone, config)
        self.dtype = choose_precision(backbone, dtype)
        self.timer = StageTimer(self.device)
        self._whole: Tokens | None = None

    @property
    def whole(self) -> Tokens:
        """The tokens of the whole image (batch of 1), once the first batch has been read."""
        if self._whole is None:
            raise RuntimeError("the whole image's tokens are not known yet; read the first batch of views before")
        return self._whole

    @property
    def seconds(self) -> float:
        """The seconds of cutting views and of the backbone so far; on a GPU, wait for it and return its time."""
        return sum(self.timer.seconds().values())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        views = iter(self.views)
        while True:
            self.timer.mark()
            if (batch := next(views, None)) is None:
                return
            images, coords = batch
            self.timer.mark("views")
            tokens = self._forward(images)
            if self._whole is None:  # a copy, because a slice would keep the whole batch in memory
                self._whole = Tokens(tokens.patches[:1].clone(), tokens.prefix[:1].clone())
            self.timer.mark("backbone")
            yield tokens.patches, coords

    def _forward(self, images: Tensor) -> Tokens:
        return Tokens(**in_halves(self._tokens, images))

    @torch.no_grad()
    def _tokens(self, images: Tensor) -> dict[str, Tensor]:
        with autocast(self.device, self.dtype):
            tokens = self.backbone(images).to(torch.float32)
        return {"patches": tokens.patches, "prefix": tokens.prefix}


def check_views(backbone: Backbone, config: ViewConfig) -> None:
    """Refuse settings with which no image has views: what fails on a square does so on the shorter side of any other.

    Raises:
        ConfigError: no image can be used; the message says why.
    """
    try:
        TokenViews(backbone, torch.zeros(3, *[min(backbone.image_size)] * 2), config)
    except ImageError as error:
        raise ConfigError(f"no image can be used with these settings: {error}") from error


def _drawn(image: Tensor, size: Size, backbone: Backbone, config: ViewConfig) -> Shifts | Views:
    """Draw the views of an image (3, H, W).

    Raises:
        ImageError: patches of the mirrored image do not coincide with those of the image.
    """
    if config.kind == "crops":
        return Views(image, size, backbone.centres(size), config)
    try:
        return Shifts(image, size, backbone.centres(size), config)
    except ConfigError as error:
        patch = backbone.patch_size[0]
        raise ImageError(
            f"patches of {patch} pixels at a stride of {backbone.stride[0]} do not coincide with their mirror images "
            f"in an input of {size[0]} x {size[1]}, which the product 'removed' needs: choose --stride {patch} or "
            f"{patch // 2}, another --size, or --product ensembled"
        ) from error


@dataclass(frozen=True)
class DecomposedImage:
    """Hold one image after stage one.

    Args:
        decomposition: the terms on the whole image's patch grid.
        prefix: (P, C) prefix tokens of the whole image.
        coords: (h, w, 2) centres of its patches.
        fit: the solver's fit, which evaluates F at any point.
        extraction_seconds: seconds in views and the backbone.
        fitting_seconds: seconds in the solver.
    """

    decomposition: Decomposition
    prefix: Tensor
    coords: Tensor
    fit: Fit
    extraction_seconds: float
    fitting_seconds: float


@overload
def denoise(  # type: ignore[overload-overlap]  # a batch of pixels is an array, too
    backbone: Backbone,
    image: ImageLike,
    config: DenoiseConfig | None = None,
    artifact: Tensor | None = None,
    *,
    views: int | None = None,
    product: Product | None = None,
    strength: float | None = None,
) -> Decomposition: ...


@overload
def denoise(
    backbone: Backbone,
    image: Iterable[ImageLike],
    config: DenoiseConfig | None = None,
    artifact: Tensor | None = None,
    *,
    views: int | None = None,
    product: Product | None = None,
    strength: float | None = None,
) -> Iterator[Decomposition]: ...


def denoise(
    backbone: Backbone,
    image: ImageLike | Iterable[ImageLike],
    config: DenoiseConfig | None = None,
    artifact: Tensor | None = None,
    *,
    views: int | None = None,
    product: Product | None = None,
    strength: float | None = None,
) -> Decomposition | Iterator[Decomposition]:
    """Split the features of an image, or of several, into a semantic field, an artifact and a residual.

    For many files, :func:`dvt.denoise_images` writes a feature store, and continues after an interruption.

    Args:
        backbone: from :func:`dvt.load_backbone` or :func:`dvt.wrap`; its device is used.
        image: a path or URL, a PIL image, a NumPy array (H, W, 3) or a tensor (3, H, W): uint8, or RGB in [0, 1].
            Or several: a list or any other iterable of those, an array (B, H, W, 3) or a tensor (B, 3, H, W).
        config: settings; the defaults suit a laptop.
        artifact: (h, w, C) a known artifact, for example one shared by many images.
        views: number of views of an image, beside the whole one; instead of a config.
        product: "removed", "ensembled" or "blend", see :class:`DenoiseConfig`; instead of a config.
        strength: share of the change to apply, in [0, 1]; instead of a config.

    Returns:
        The terms at the patches of the whole image, each (h, w, C); `.semantic` is the denoised map. For several images
        an iterator of them, in order, which reads images as it goes. Neighbours of one grid are solved together, as
        many as :attr:`DenoiseConfig.solve_images` says.

    Raises:
        ImageError: an image cannot be read, or has another shape, type or range; which one of several is said.
        ConfigError: both a config and its settings are given, or one is out of range.
    """
    chosen = _chosen(config, {"views": views, "product": product, "strength": strength})
    images = several_images(image)
    if images is not None:
        return _denoised(backbone, images, chosen, artifact)
    return denoise_image(backbone, image, chosen, artifact).decomposition  # type: ignore[arg-type]


def _chosen(config: DenoiseConfig | None, settings: Mapping[str, Any]) -> DenoiseConfig:
    given = {name: value for name, value in settings.items() if value is not None}
    if config is None:
        return DenoiseConfig(**given)
    if not isinstance(config, DenoiseConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; give a dvt.DenoiseConfig, or {', '.join(settings)} alone"
        )
    if given:
        named = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(f"both a config and {named} were given: put them into the DenoiseConfig, or leave it out")
    return config


def _denoised(
    backbone: Backbone, images: Iterable[Tensor], config: DenoiseConfig, artifact: Tensor | None
) -> Iterator[Decomposition]:
    """Denoise images in their order; neighbours of one grid are solved together."""
    count = images_together(config, backbone.device)
    group: list[TokenViews] = []
    for number, pixels in enumerate(images, 1):
        try:
            views = TokenViews(backbone, pixels, config.views, config.dtype)
        except ImageError as error:
            raise ImageError(f"image {number} of several: {error}") from error
        if group and (len(group) == count or views.coords.shape != group[0].coords.shape):
            yield from _solved(group, config, artifact)
            group = []
        group.append(views)
    if group:
        yield from _solved(group, config, artifact)


def _solved(group: Sequence[TokenViews], config: DenoiseConfig, artifact: Tensor | None) -> Iterator[Decomposition]:
    for views, fit in zip(group, fit_images(config, group, artifact), strict=True):
        if isinstance(fit, Exception):
            raise fit
        yield fit.decompose(views.whole.patches[0], views.coords).weakened(config.strength)


def images_together(config: DenoiseConfig, device: torch.device) -> int:
    """Choose how many images of one grid are solved together."""
    return config.solve_images or (_GROUP if is_gpu(device) and config.solver == "linear" else 1)


def fit_images(
    config: DenoiseConfig, views: Sequence[Iterable[ViewBatch]], artifact: Tensor | None = None
) -> list[Fit | Exception]:
    """Fit images of one grid together; if one cannot be used or the memory is too small, fit each by itself.

    Returns:
        For each image its fit, or the ImageError or NonFiniteError that says why it has none.
    """
    solver = make_solver(config)
    try:
        return [solver.fit(views[0], artifact)] if len(views) == 1 else [*solver.fit_many(views, artifact)]
    except (ImageError, NonFiniteError) as error:
        if len(views) == 1:
            return [error]
    except (RuntimeError, MemoryError) as error:
        if len(views) == 1 or not out_of_memory(error):
            raise
        log.warning("out of memory with %d images solved together; solving them one by one", len(views))
    # Outside of the handler: inside, the exception's traceback would keep the tensors of the first try in memory.
    return [fit_images(config, [each], artifact)[0] for each in views]


def denoise_image(
    backbone: Backbone, image: ImageLike, config: DenoiseConfig, artifact: Tensor | None = None
) -> DecomposedImage:
    """Denoise as :func:`denoise` does, and also return the fit, the prefix tokens and the seconds."""
    views = TokenViews(backbone, read_image(image), config.views, config.dtype)
    start = time.perf_counter()
    fit = make_solver(config).fit(views, artifact)
    decomposition = fit.decompose(views.whole.patches[0], views.coords).weakened(config.strength)
    finish(views.device)
    seconds, extraction = time.perf_counter() - start, views.seconds
    return DecomposedImage(decomposition, views.whole.prefix[0], views.coords, fit, extraction, seconds - extraction)


def make_solver(config: DenoiseConfig) -> LinearSolver | NeuralSolver | ShiftSolver:
    """Make the solver for the settings."""
    return NeuralSolver(config.neural) if config.solver == "neural" else closed_form(config)


def closed_form(config: DenoiseConfig) -> LinearSolver | ShiftSolver:
    """Make the closed-form solver for the product's views, which also solves for shared artifacts."""
    if config.product == "removed":
        return ShiftSolver(config.shifts)
    if config.product == "ensembled":
        smoothness = ENSEMBLED_SMOOTHNESS * max(1, config.views.count / PRODUCT_VIEWS["ensembled"].count)
        given = config.linear.smoothness
        return LinearSolver(replace(config.linear, blend=False, smoothness=smoothness if given is None else given))
    return LinearSolver(config.linear)
