"""A planted problem: views whose semantic field and artifact are known, which no real ViT can give.

The field is a photograph's response to random filters; the artifact is smooth waves, a wave of the patch grid's own
frequency and a few large outlier positions. Sizes of the terms are relative to the field's root mean square.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dvt import grids
from dvt.errors import ShapeError
from dvt.grids import Size
from dvt.views import ViewConfig, draw_boxes


@dataclass(frozen=True)
class PlantedConfig:
    """The planted problem's sizes; all amplitudes are relative to the field's root mean square of 1.

    Args:
        channels: feature size C.
        grid: (h, w) of every view.
        views: random views beside the whole image.
        artifact: root mean square of G.
        noise: standard deviation of the noise on every token and channel.
        outliers: share of tokens that carry a content-dependent high-norm h; 0 plants none.
        outlier_rate: share of the flattest content that carries them, so that `outliers` / `outlier_rate` of it is flat.
        outlier_cells: None draws them anew in every view; a number fixes them to content: so many cells along each side
            of the image are outliers in every view, or in none.
        outlier_spread: how far an outlier's direction is turned from the common one, as the tangent of the angle; large
            numbers leave none in common.
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
        """F* at coordinates (..., 2): (..., C)."""
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
        """h*: on some of the tokens whose content is flattest; which of them differs from view to view, or not."""
        norm = self.truth(coords).norm(dim=-1)
        drawn, size = (torch.rand(norm.shape, generator=generator) for _ in range(2))
        chosen = (norm < self._flat_below) & (self._fixed(coords, drawn) < self.config.outlier_rate)
        size = self.config.outlier_norm * self._mean_norm * (0.75 + 0.5 * size)
        return (chosen * size)[..., None] * self._directions(norm.shape, generator)

    def _fixed(self, coords: Tensor, drawn: Tensor) -> Tensor:
        """A random number in [0, 1] for each token: its own, or its content's cell's."""
        cells = self.config.outlier_cells
        if cells is None:
            return drawn
        table = torch.rand(cells, cells, generator=torch.Generator().manual_seed(self.config.seed + 2))
        x, y = (coords * cells).long().clamp(0, cells - 1).unbind(-1)
        return table[y, x]

    def _directions(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The outliers' directions, (C,) or (..., C)."""
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
        """The norm below which `outlier_rate` of the tokens gives the share of outliers asked for."""
        norms = self._map.norm(dim=-1).flatten()
        return float(norms.quantile(min(1.0, self.config.outliers / self.config.outlier_rate))) if self.config.outliers else 0.0


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """|estimate - truth| / |truth| over (h, w, C), after removing each one's mean over positions (the gauge)."""
    if estimate.shape != truth.shape:
        raise ShapeError(f"estimate {tuple(estimate.shape)} and truth {tuple(truth.shape)} must have the same shape")
    estimate, truth = (a.double() - a.double().mean((0, 1)) for a in (estimate, truth))
    return float((estimate - truth).norm() / truth.norm())


def _filter_response(image: Tensor, config: PlantedConfig, generator: torch.Generator, side: int = 384) -> Tensor:
    """(side, side, C) responses of a photograph to random filters under a Gaussian window, each of unit variance."""
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
    """(h, w, C): three smooth waves a channel, a checkerboard of the patch grid, four large outlier positions."""
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
