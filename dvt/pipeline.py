"""Stage one of one image: its views through the backbone, and a solver."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from dvt import grids
from dvt.backbones import Backbone
from dvt.errors import ConfigError, ImageError
from dvt.fields import Decomposition, Fit, LinearConfig, LinearSolver, NeuralConfig, NeuralSolver
from dvt.fields.shifts import ShiftConfig, ShiftSolver
from dvt.grids import Size
from dvt.images import load_image
from dvt.profile import Laps
from dvt.tokens import Tokens
from dvt.views import Shifts, ViewConfig, Views, product_views, upload

log = logging.getLogger(__name__)

# More patches than this take gigabytes of attention; only a very long or thin image has them.
MAX_PATCHES = 16_384

#: Smoothness of the field over scales: labels like it smoother than held-out tokens do (benchmarks/products.py).
ENSEMBLED_SMOOTHNESS = 1.0

#: One image's share, or that of several, of a shared artifact's equations, (n, n) and (n, C), and its grid (h, w).
SharedEquations = tuple[tuple[Tensor, Tensor], Size]
Part = TypeVar("Part")


@dataclass(frozen=True)
class DenoiseConfig:
    """How stage one is done. `views.batch`, `solve_images` and `overlap` change speed and memory, not the job.

    Args:
        views: how views are drawn; the other products take `product_views(product)`.
        product: "removed" (this image's tokens without the artifact, from shifted windows), "ensembled" (the field over
            scales, from crops) or "blend" (between the two, from crops).
        solver: "linear" (closed form, the default) or "neural" (gradient fitting, as in the paper).
        linear: settings of the linear solver.
        neural: settings of the neural solver.
        shifts: settings of the solver of shifted windows.
        shared_artifact: fit one artifact for all images of a grid shape, instead of one each.
        shared_images: images that the shared artifact is fitted on, the first ones in order of their paths.
        dtype: of the backbone's forward pass; fitting is always done in float32 or better.
        solve_images: images of one grid shape that are solved together; their tokens are held in memory at once. None
            takes 8 for the linear solver on a GPU, else 1.
        overlap: let the backbone go on with the next images while some are solved; None does so on a GPU.
    """

    views: ViewConfig = field(default_factory=ViewConfig)
    product: Literal["blend", "removed", "ensembled"] = "blend"
    solver: Literal["linear", "neural"] = "linear"
    linear: LinearConfig = field(default_factory=LinearConfig)
    neural: NeuralConfig = field(default_factory=NeuralConfig)
    shifts: ShiftConfig = field(default_factory=ShiftConfig)
    shared_artifact: bool = False
    shared_images: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    solve_images: int | None = None
    overlap: bool | None = None

    def __post_init__(self) -> None:
        if self.solver not in ("linear", "neural"):
            raise ConfigError(f"solver is {self.solver!r}; it must be 'linear' or 'neural'")
        if self.product not in ("blend", "removed", "ensembled"):
            raise ConfigError(f"product is {self.product!r}; it must be 'blend', 'removed' or 'ensembled'")
        if (self.views.kind == "shifts") != (self.product == "removed"):
            kind = "shifts" if self.product == "removed" else "crops"
            raise ConfigError(
                f"the product {self.product!r} is made of {kind}, and the views are {self.views.kind}; draw them with "
                f"ViewConfig(kind={kind!r})"
            )
        if self.product == "removed" and self.solver != "linear":
            raise ConfigError("the product 'removed' has a closed form only; leave --solver at linear")
        if self.shared_artifact and self.solver != "linear":
            raise ConfigError("a shared artifact is fitted by the linear solver only; leave --solver at linear")
        if self.shared_images < 1:
            raise ConfigError(f"shared_images is {self.shared_images}; it must be 1 or more")
        if self.solve_images is not None and self.solve_images < 1:
            raise ConfigError(f"solve_images is {self.solve_images}; it must be 1 or more, or left out to be chosen")

    def numbers(self) -> dict[str, Any]:
        """The settings that the tokens depend on, for the job's hash: not the other solver's."""
        settings = asdict(self)
        for name in ("linear", "neural", "shifts"):
            if name != ("shifts" if self.product == "removed" else self.solver):
                settings.pop(name)
        settings["views"].pop("batch")
        for name in ("solve_images", "overlap"):
            settings.pop(name)
        if not self.shared_artifact:
            settings.pop("shared_images")
        return settings

    @classmethod
    def of(
        cls, product: Literal["blend", "removed", "ensembled"], count: int | None = None, **settings: Any
    ) -> DenoiseConfig:
        """The settings recommended for a product, with another number of views or other settings where given."""
        views = product_views(product) if product != "blend" else ViewConfig()
        return cls(views=views if count is None else replace(views, count=count), product=product, **settings)

    def make_solver(self) -> LinearSolver | NeuralSolver | ShiftSolver:
        """The solver that these settings describe."""
        if self.product == "removed":
            return ShiftSolver(self.shifts)
        if self.product == "ensembled" and self.solver == "linear":
            smoothness = ENSEMBLED_SMOOTHNESS if self.linear.smoothness is None else self.linear.smoothness
            return LinearSolver(replace(self.linear, blend=False, smoothness=smoothness))
        return LinearSolver(self.linear) if self.solver == "linear" else NeuralSolver(self.neural)


class TokenViews:
    """The views of one image after the backbone: batches of (tokens (V, h, w, C), coords (V, h, w, 2)), float32.

    Attributes:
        coords: (h, w, 2) of the whole image's patches.
        laps: of "views", in which they are cut, and "backbone".
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
        draw = Shifts if config.kind == "shifts" else Views
        self.views = draw(upload(image, self.device), size, self.coords, config)
        self.dtype = getattr(torch, dtype)
        self.laps = Laps(self.device)
        self._whole: Tokens | None = None

    @property
    def whole(self) -> Tokens:
        """The tokens of the whole image (batch of 1), once the first batch has been read."""
        if self._whole is None:
            raise RuntimeError("the whole image's tokens are not known yet; read the first batch of views before")
        return self._whole

    @property
    def seconds(self) -> float:
        """Spent in cutting views and in the backbone, so far; on a GPU its own seconds, which this waits for."""
        return sum(self.laps.seconds().values())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        views = iter(self.views)
        while True:
            self.laps.mark()
            if (batch := next(views, None)) is None:
                return
            images, coords = batch
            self.laps.mark("views")
            tokens = self._forward(images)
            if self._whole is None:  # of its own, not to hold the whole batch
                self._whole = Tokens(tokens.patches[:1].clone(), tokens.prefix[:1].clone())
            self.laps.mark("backbone")
            yield tokens.patches, coords

    def _forward(self, images: Tensor) -> Tokens:
        return Tokens(**in_halves(self._tokens, images))

    @torch.no_grad()
    def _tokens(self, images: Tensor) -> dict[str, Tensor]:
        with autocast(self.device, self.dtype):
            tokens = self.backbone(images).to(torch.float32)
        return {"patches": tokens.patches, "prefix": tokens.prefix}


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision for a forward pass; float32 means none."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def in_halves(compute: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
    """What a function makes of a batch; when the memory is too small for it, of its two halves.

    Args:
        compute: images (B, 3, H, W) to maps (B, ...) by name.
        images: (B, 3, H, W).

    Raises:
        ConfigError: not even half of the batch fits.
    """
    try:
        return compute(images)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        log.warning("out of memory with %d images at a time; trying half as many", len(images))
    # Not in the handler, whose traceback still holds the tensors of the first try.
    half = -(-len(images) // 2)
    try:
        halves = [compute(part) for part in images.split(half)]
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ConfigError(
            f"the memory is too small for {half} images of {images.shape[2]} x {images.shape[3]} pixels at a time; "
            "lower the batch or the size of the images"
        ) from error
    return {name: torch.cat([part[name] for part in halves]) for name in halves[0]}


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory, or the host's, is too small."""
    # On the CPU, torch raises a bare RuntimeError.
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


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
        torch.cuda.current_stream(views.device).synchronize()
    seconds, extraction = time.perf_counter() - start, views.seconds
    return Denoised(decomposition, views.whole.prefix[0], fit, extraction, seconds - extraction)


def shared_artifact(backbone: Backbone, images: Iterable[str | Path | Tensor], config: DenoiseConfig) -> Tensor:
    """The one artifact (h, w, C) that explains many images of one grid shape best, by the linear solver.

    Each image keeps a field of its own; their reduced equations for the artifact add up.
    """
    parts: Iterable[SharedEquations | None] = (equations(backbone, image, config) for image in images)
    if (total := tree_sum(parts, add_equations)) is None:
        raise ImageError("no image was given; a shared artifact needs at least one")
    return closed_form(config).solve_shared(*total)


def equations(backbone: Backbone, image: str | Path | Tensor, config: DenoiseConfig) -> SharedEquations:
    """One image's share of the equations of an artifact that many images have in common."""
    pixels = image if isinstance(image, Tensor) else load_image(image)
    views = TokenViews(backbone, pixels, config.views, config.dtype)
    parts = closed_form(config).artifact_equations(views)
    return parts, views.whole.grid


def closed_form(config: DenoiseConfig) -> LinearSolver | ShiftSolver:
    """The solver that finds shared artifacts: of shifted windows where the product is made of them."""
    return ShiftSolver(config.shifts) if config.product == "removed" else LinearSolver(config.linear)


def add_equations(first: SharedEquations | None, second: SharedEquations | None) -> SharedEquations | None:
    """Their sum; None, of an image that could not be used, adds nothing.

    Raises:
        ConfigError: the images differ in grid shape.
    """
    if first is None or second is None:
        return second if first is None else first
    (left, grid), (right, other) = first, second
    if grid != other:
        raise ConfigError(f"a shared artifact needs images of one grid shape, got {grid} and {other}")
    return (left[0] + right[0], left[1] + right[1]), grid


def tree_sum(parts: Iterable[Part], add: Callable[[Part, Part], Part]) -> Part | None:
    """The sum of parts, added in pairs, the pairs in pairs, and so on; None without any.

    Floating-point sums depend on the order: here it follows from the number of parts alone, wherever each sum is made.
    At most log2 of the number of parts are held at a time.

    >>> tree_sum("abcdefg", lambda first, second: f"({first}{second})")
    '(((ab)(cd))((ef)g))'
    """
    held: list[tuple[int, Part]] = []  # sums and the numbers of their parts, all powers of two, falling
    for part in parts:
        size = 1
        while held and held[-1][0] == size:
            part, size = add(held.pop()[1], part), 2 * size
        held.append((size, part))
    while len(held) > 1:
        (size, last), (before, previous) = held.pop(), held.pop()
        held.append((before + size, add(previous, last)))
    return held[0][1] if held else None


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
