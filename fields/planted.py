"""Make planted problems, whose semantic field and artifact are known, unlike those of a real ViT.

:class:`Planted` is a stream of views: its field is a photograph's response to random filters, with one value per point
in all views. :class:`PlantedBackbone` is a model of pixels: its field changes with scale and mirroring, like a real
network's, so any design of views can be evaluated on it. Both have an artifact of smooth waves, a wave at the patch
grid's frequency and a few large outlier positions. Sizes are relative to the field's root mean square.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dvt import grids
from dvt.backbones import Backbone, BackboneSpec
from dvt.errors import ConfigError, ShapeError
from dvt.grids import Size
from dvt.tokens import Tokens
from dvt.views import ViewConfig, draw_boxes, resize


@dataclass(frozen=True)
class PlantedConfig:
    """Hold the sizes of a planted problem; all amplitudes are relative to the field's root mean square of 1.

    Args:
        channels: feature size C.
        grid: (h, w) of every view.
        views: number of random views beside the whole image.
        artifact: root mean square of G.
        noise: standard deviation of the noise on every token and channel.
        outliers: share of tokens that carry a content-dependent high-norm h; 0 plants none.
        outlier_rate: share of outliers among flat content; the flattest `outliers` / `outlier_rate` of all tokens are
            flat.
        outlier_cells: None draws outliers anew in every view; a number fixes them to content: the image is divided into
            that many cells along each side, and each cell is an outlier in all views or in none.
        outlier_spread: tangent of the angle between an outlier's direction and the common one; with large numbers there
            is no common direction.
        outlier_norm: norm of such an h relative to the mean norm of the field's tokens.
        blur: standard deviation of the field's filters, as a share of the image; about half a patch of a small view.
        seed: seed of filters, artifact, noise and outliers.
    """

    channels: int = 64
    grid: Size = (16, 16)
    views: int = 128
    artifact: float = 0.65
    noise: float = 0.05
    outliers: float = 0.0
    outlier_rate: float = 0.2
    outlier_cells: int | None = None
    outlier_spread: float = 0.0
    outlier_norm: float = 4.0
    blur: float = 0.02
    seed: int = 0


class Planted:
    """Views of a planted field and artifact.

    Iterating yields batches of (tokens (V, h, w, C), coords (V, h, w, 2)), the same at every iteration.

    Args:
        image: (3, H, W) photograph in [0, 1].
        config: sizes and amplitudes.

    Attributes:
        coords: (h, w, 2) of the whole image.
        field: (h, w, C) the true F there.
        artifact: (h, w, C) the true G, mean zero over positions.
    """

    def __init__(self, image: Tensor, config: PlantedConfig | None = None, batch: int = 16):
        self.config = config or PlantedConfig()
        self.batch = batch
        generator = torch.Generator().manual_seed(self.config.seed)
        self._map = _filter_response(image, self.config, generator)
        self.artifact = _artifact(self.config, generator)
        self._outlier_direction = nnf.normalize(torch.randn(self.config.channels, generator=generator), dim=0)
        self.coords = grids.grid_centres(self.config.grid)
        self.field = self.truth(self.coords)
        boxes, flips = draw_boxes(ViewConfig(count=self.config.views, seed=self.config.seed), generator)
        self.view_coords = grids.view_to_image(self.coords, boxes, flips)

    def truth(self, coords: Tensor) -> Tensor:
        """Evaluate F* (..., C) at coordinates (..., 2)."""
        return grids.sample(self._map, coords)

    def __len__(self) -> int:
        return len(self.view_coords)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        for coords in self.view_coords.split(self.batch):
            tokens = self.truth(coords) + self.artifact
            tokens += self.config.noise * torch.randn(tokens.shape, generator=generator)
            yield tokens + self._outliers(coords, generator), coords

    def _outliers(self, coords: Tensor, generator: torch.Generator) -> Tensor:
        """Plant h* on some of the tokens with the flattest content, drawn anew in each view or fixed to content."""
        norm = self.truth(coords).norm(dim=-1)
        drawn, size = (torch.rand(norm.shape, generator=generator) for _ in range(2))
        chosen = (norm < self._flat_below) & (self._fixed(coords, drawn) < self.config.outlier_rate)
        size = self.config.outlier_norm * self._mean_norm * (0.75 + 0.5 * size)
        return (chosen * size)[..., None] * self._directions(norm.shape, generator)

    def _fixed(self, coords: Tensor, drawn: Tensor) -> Tensor:
        """Draw a number in [0, 1] for each token, or one for each cell of content."""
        cells = self.config.outlier_cells
        if cells is None:
            return drawn
        table = torch.rand(cells, cells, generator=torch.Generator().manual_seed(self.config.seed + 2))
        x, y = (coords * cells).long().clamp(0, cells - 1).unbind(-1)
        return table[y, x]

    def _directions(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Draw the outliers' directions, (C,) or (..., C)."""
        common, spread = self._outlier_direction, self.config.outlier_spread
        if not spread:
            return common
        turn = torch.randn(*shape, len(common), generator=generator)
        turn = nnf.normalize(turn - (turn @ common)[..., None] * common, dim=-1)
        return nnf.normalize(common + spread * turn, dim=-1)

    @property
    def _mean_norm(self) -> float:
        return float(self._map.norm(dim=-1).mean())

    @property
    def _flat_below(self) -> float:
        """Find the norm below which tokens are flat, so that `outlier_rate` of them gives the share `outliers`."""
        norms = self._map.norm(dim=-1).flatten()
        return (
            float(norms.quantile(min(1.0, self.config.outliers / self.config.outlier_rate)))
            if self.config.outliers
            else 0.0
        )


@dataclass(frozen=True)
class PlantedBackboneConfig:
    """Hold the settings of a planted backbone; amplitudes are relative to the field's root mean square of 1.

    Args:
        channels: feature size C.
        patch: pixels of a patch, in both directions.
        size: input size in pixels that images' shorter sides are resized to.
        artifact: root mean square of G; 0 plants none.
        context: share of F's size that comes from attention over all patches of a view, so that F depends on the rest
            of the view; with 0, only a patch's own pixels matter.
        noise: root mean square of noise that depends on content and position together; it is the same for the same
            pixels at the same position.
        outliers: share of the flattest fifth of the patches that carry a high norm; 0 plants none.
        flicker: let outliers depend on the position, too; otherwise only content decides, in every view.
        outlier_norm: norm of an outlier's h relative to the mean norm of the field's tokens.
        seed: seed of filters, artifact, noise and outliers.
    """

    channels: int = 64
    patch: int = 16
    size: int = 224
    artifact: float = 0.65
    context: float = 0.0
    noise: float = 0.0
    outliers: float = 0.0
    flicker: bool = False
    outlier_norm: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.artifact, self.context, self.noise, self.outlier_norm) < 0 or not 0 <= self.outliers <= 1:
            raise ConfigError(
                f"artifact ({self.artifact}), context ({self.context}), noise ({self.noise}) and outlier_norm "
                f"({self.outlier_norm}) must be 0 or more, and outliers ({self.outliers}) a share in [0, 1]"
            )


class PlantedBackbone(Backbone):
    """Compute tokens as F(pixels of the patch) + G(position) + noise + h(outliers), with each term known.

    F is two layers of random filters on a patch's own pixels, so it changes with the scale and the mirroring of a
    view, but not with a shift by whole patches. With `context`, a layer of random attention follows, through which a
    shift changes F, because the view's other content changes.

    Args:
        image: (3, H, W) in [0, 1], the photograph on which amplitudes are measured.
        config: sizes and amplitudes.
    """

    model: _PlantedNet

    def __init__(self, image: Tensor, config: PlantedBackboneConfig | None = None):
        config = config or PlantedBackboneConfig()
        net = _PlantedNet(config)
        patch, size = (config.patch,) * 2, grids.fit_size((config.size,) * 2, config.size, (config.patch,) * 2)
        spec = BackboneSpec("planted", patch, stride=patch, image_size=size, feature_dim=config.channels)
        super().__init__(net, lambda model, images: Tokens.of(model(images)), spec, mean=(0.5,) * 3, std=(0.5,) * 3)
        net.calibrate(self.normalise(resize(image, self.input_size((image.shape[1], image.shape[2])))[None]))

    def semantic(self, images: Tensor) -> Tensor:
        """Compute F (B, h, w, C) of images (B, 3, H, W) in [0, 1]."""
        return self.model.semantic(self.normalise(images))

    def artifact(self, grid: Size) -> Tensor:
        """Return G (h, w, C), mean zero over positions."""
        return self.model.artifact(grid)

    def outliers(self, images: Tensor) -> Tensor:
        """Tell (B, h, w) which patches of images (B, 3, H, W) in [0, 1] carry an outlier."""
        return self.model.outliers(self.normalise(images))


class _PlantedNet(nn.Module):
    """The terms of :class:`PlantedBackbone` for normalised images."""

    filters: Tensor
    mix: Tensor
    direction: Tensor
    phases: Tensor
    attention: Tensor
    scale: Tensor
    flat_below: Tensor
    mean_norm: Tensor

    def __init__(self, config: PlantedBackboneConfig, hidden: int = 96, coarse: int = 6):
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        # Smooth random filters, like those of a trained network's first layer: half of them respond to detail.
        sides = [min(coarse, config.patch)] * (hidden // 2) + [min(3, config.patch)] * (hidden - hidden // 2)
        filters = [_smooth_filter(side, config.patch, generator) for side in sides]
        self.register_buffer("filters", torch.stack(filters))
        self.register_buffer("mix", torch.randn(hidden, config.channels, generator=generator) / hidden**0.5)
        self.register_buffer("direction", nnf.normalize(torch.randn(config.channels, generator=generator), dim=0))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(config.channels, generator=generator))
        for name in ("scale", "flat_below", "mean_norm"):
            self.register_buffer(name, torch.ones(()))
        square = (2, config.channels, config.channels)
        self.register_buffer("attention", torch.randn(square, generator=generator) / config.channels**0.5)
        self._artifacts: dict[Size, Tensor] = {}

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Give F unit variance on these images, and outliers the flattest fifth of their patches."""
        for _ in range(4 if self.config.context else 1):  # attention is not linear in the scale
            field = self.semantic(images)
            self.scale /= (field - field.mean((0, 1, 2))).square().mean().sqrt()
        self.mean_norm.copy_(self.semantic(images).norm(dim=-1).mean())
        self.flat_below.copy_(self._patches(images).std(-1).quantile(0.2))

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            field = self.semantic(images)
            artifact = self.artifact((field.shape[1], field.shape[2])).to(field)
            outlier = self.config.outlier_norm * self.mean_norm * self.direction
            return field + artifact + self._noise(field) + self.outliers(images)[..., None] * outlier

    def semantic(self, images: Tensor) -> Tensor:
        response = nnf.conv2d(images, self.filters, stride=self.config.patch).movedim(1, -1)
        local = self.scale * (nnf.gelu(response) @ self.mix)
        return local if self.config.context == 0 else local + self.config.context * self._attend(local)

    def _attend(self, local: Tensor) -> Tensor:
        """Compute random self-attention (B, h, w, C) over a view's patches, of about the size of `local`."""
        tokens = nnf.layer_norm(local, local.shape[-1:]).flatten(1, 2)
        key, value = self.attention
        logits = 2 * (tokens @ key) @ tokens.mT / tokens.shape[-1] ** 0.5
        return ((logits.softmax(-1) @ tokens) @ value).view_as(local)

    def artifact(self, grid: Size) -> Tensor:
        if grid not in self._artifacts:
            config = PlantedConfig(channels=self.config.channels, grid=grid, artifact=self.config.artifact)
            self._artifacts[grid] = _artifact(config, torch.Generator().manual_seed(self.config.seed + 1))
        return self._artifacts[grid]

    def outliers(self, images: Tensor) -> Tensor:
        patches = self._patches(images)
        # A smooth reading of the content, so that neighbouring flat patches are outliers together.
        draw = 2 * patches.mean(-1)
        if self.config.flicker:
            draw = draw + self._place(patches)
        return (patches.std(-1) < self.flat_below) & (draw.remainder(1) < self.config.outliers)

    def _noise(self, field: Tensor) -> Tensor:
        """Make waves of content and position together, fast in both, so that their mean over either is about zero."""
        turns = 40 * (field @ self.direction)[..., None] + 2 * torch.pi * self._place(field)[..., None] + self.phases
        return self.config.noise * 2**0.5 * torch.sin(turns)

    def _place(self, values: Tensor) -> Tensor:
        """Hash every position (h, w) to a number in [0, 1), without a pattern."""
        generator = torch.Generator().manual_seed(self.config.seed + 2)
        return torch.rand(values.shape[1:3], generator=generator).to(values)

    def _patches(self, images: Tensor) -> Tensor:
        """Cut out the pixels (B, h, w, 3 P P) of every patch."""
        patches = nnf.unfold(images, self.config.patch, stride=self.config.patch).mT
        return patches.unflatten(1, [side // self.config.patch for side in images.shape[-2:]])


def _smooth_filter(side: int, patch: int, generator: torch.Generator) -> Tensor:
    """Make a random filter (3, P, P) of side x side numbers, enlarged, of unit norm over sqrt(patch)."""
    small = torch.randn(1, 3, side, side, generator=generator)
    large = nnf.interpolate(small, size=(patch, patch), mode="bicubic", align_corners=False)[0]
    return 6 * large / (large.norm() * patch**0.5)


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """Compute |estimate - truth| / |truth| over (h, w, C) without each one's mean over positions (the gauge)."""
    if estimate.shape != truth.shape:
        raise ShapeError(f"estimate {tuple(estimate.shape)} and truth {tuple(truth.shape)} must have the same shape")
    estimate, truth = (a.double() - a.double().mean((0, 1)) for a in (estimate, truth))
    return float((estimate - truth).norm() / truth.norm())


def _filter_response(image: Tensor, config: PlantedConfig, generator: torch.Generator, side: int = 384) -> Tensor:
    """Compute a photograph's responses (side, side, C) to random filters under a Gaussian, each of unit variance."""
    photo = nnf.interpolate(image[None], size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    sigma = config.blur * side
    radius = round(2.5 * sigma)
    offset = torch.arange(-radius, radius + 1, dtype=torch.float32)
    window = torch.exp(-(offset**2) / (2 * sigma**2))
    # Low-resolution random kernels under the window: their response varies over about sigma, not over a pixel.
    kernels = torch.randn(config.channels, 3, 5, 5, generator=generator)
    kernels = nnf.interpolate(kernels, size=(len(offset),) * 2, mode="bicubic", align_corners=True)
    kernels = kernels * window[:, None] * window
    padded = nnf.pad(photo - photo.mean((2, 3), keepdim=True), (radius,) * 4, mode="reflect")
    size = tuple(a + b - 1 for a, b in zip(padded.shape[-2:], kernels.shape[-2:], strict=True))
    spectrum = torch.einsum("iyx,oiyx->oyx", torch.fft.rfft2(padded, s=size)[0], torch.fft.rfft2(kernels, s=size))
    response = torch.fft.irfft2(spectrum, s=size)[:, 2 * radius : 2 * radius + side, 2 * radius : 2 * radius + side]
    response = response - response.mean((1, 2), keepdim=True)
    return (response / response.std((1, 2), keepdim=True)).permute(1, 2, 0).contiguous()


def _artifact(config: PlantedConfig, generator: torch.Generator) -> Tensor:
    """Plant (h, w, C): three smooth waves a channel, a checkerboard of the patch grid, four large outlier positions."""
    height, width = config.grid
    x, y = grids.grid_centres(config.grid).unbind(-1)
    waves = torch.zeros(height, width, config.channels)
    for _ in range(3):
        fx, fy = 3 * torch.rand(2, config.channels, generator=generator)
        phase = 2 * torch.pi * torch.rand(config.channels, generator=generator)
        waves += torch.sin(2 * torch.pi * (x[..., None] * fx + y[..., None] * fy) + phase)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    checkers = 1 - 2 * ((rows + columns) % 2).float()[..., None]
    waves += 0.5 * checkers * torch.randn(config.channels, generator=generator)
    where = torch.randperm(height * width, generator=generator)[: max(1, height * width // 64)]
    waves.view(-1, config.channels)[where] += 4 * torch.randn(len(where), config.channels, generator=generator)
    waves = waves - waves.mean((0, 1))
    return waves * (config.artifact / waves.square().mean().sqrt())
