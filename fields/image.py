"""Decompose one image (stage one): run its views through the backbone, and solve."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dvt.backbones import Backbone, choose_precision
from dvt.backbones.inference import in_halves
from dvt.devices import autocast, upload
from dvt.errors import ConfigError, ImageError
from dvt.fields.config import PRODUCT_VIEWS, DenoiseConfig
from dvt.fields.decomposition import Decomposition, Fit
from dvt.fields.linear import LinearSolver
from dvt.fields.neural import NeuralSolver
from dvt.fields.shifts import ShiftSolver
from dvt.grids import Size
from dvt.images import ImageLike, read_image
from dvt.jobs.profile import StageTimer
from dvt.tokens import Tokens
from dvt.upsampling import upsample
from dvt.views import Shifts, ViewConfig, Views

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
        self.dtype = getattr(torch, choose_precision(backbone, dtype))
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

    def upsampled(self, image: Tensor, factor: int) -> Tensor:
        """Upsample the semantic features to (factor h, factor w, C), guided by the image (3, H, W).

        See :func:`dvt.upsample`.
        """
        return upsample(self.decomposition.semantic, image, factor, centres=self.coords)


def denoise(
    backbone: Backbone,
    image: ImageLike,
    config: DenoiseConfig | None = None,
    artifact: Tensor | None = None,
) -> Decomposition:
    """Split the features of one image into a semantic field, an artifact and a residual.

    Args:
        backbone: from :func:`dvt.load_backbone` or :func:`dvt.wrap`; its device is used.
        image: a path or URL, a PIL image, a NumPy array (H, W, 3) or a tensor (3, H, W): uint8, or RGB in [0, 1].
        config: settings; the defaults suit a laptop.
        artifact: (h, w, C) a known artifact, for example one shared by many images.

    Returns:
        The terms at the patches of the whole image, each (h, w, C); `.semantic` is the denoised map.
    """
    return denoise_image(backbone, image, config or DenoiseConfig(), artifact).decomposition


def denoise_image(
    backbone: Backbone, image: ImageLike, config: DenoiseConfig, artifact: Tensor | None = None
) -> DecomposedImage:
    """Denoise as :func:`denoise` does, and also return the fit, the prefix tokens and the seconds."""
    views = TokenViews(backbone, read_image(image), config.views, config.dtype)
    start = time.perf_counter()
    fit = make_solver(config).fit(views, artifact)
    decomposition = fit.decompose(views.whole.patches[0], views.coords).weakened(config.strength)
    if views.device.type == "cuda":
        torch.cuda.current_stream(views.device).synchronize()
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
