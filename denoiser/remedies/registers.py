"""Find test-time registers: the few MLP neurons that make the outlier tokens.

Source: Vision Transformers Don't Need Trained Registers (arXiv 2506.08010), which ranks neurons by their mean
activation at the outliers. Here the outliers also decide how many neurons are taken, and up to which block [ours].
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dvt.backbones import Backbone, families
from dvt.denoiser.config import DenoiserConfig
from dvt.denoiser.model import Denoiser
from dvt.denoiser.remedies.install import mlp_outputs, registered_backbone, timm_model
from dvt.denoiser.remedies.outliers import (
    OutlierTokens,
    block_norms,
    entering,
    find_outliers,
    inputs,
)
from dvt.errors import BackboneError, ConfigError
from dvt.images import ImageLike
from dvt.progress import Progress
from dvt.text import counted

logger = logging.getLogger(__name__)

#: The share of the outliers that may remain.
_LEFT = 0.1


@torch.no_grad()
def fit_registers(
    backbone: Backbone, images: Sequence[ImageLike], most: int = 64, progress: Progress | None = None
) -> Denoiser:
    """Find the neurons that make a model's outlier tokens, for a register that is added without training.

    Neurons of all blocks up to the one where the outliers appear are ranked by how much more they write at outliers
    than elsewhere: the difference of their mean magnitudes times the norm of their column of the MLP's last layer.
    The fewest neurons in this order are taken whose removal leaves at most a tenth of the outliers.

    Args:
        backbone: a timm model of :data:`dvt.denoiser.remedies.install.FAMILIES`, at any layer.
        images: paths, or images (3, H, W) in [0, 1]; ten or more are better. They are read several times.
        most: the largest number of neurons to take.
        progress: called with (what, done, total).

    Returns:
        A denoiser of kind "registers": attach it, or call ``denoised_backbone(denoiser, backbone)``. Its card holds the
        shares of outliers before and after.

    Raises:
        BackboneError: the model has no such MLPs or no outliers, or a few neurons are not what makes them.
        ImageError: no image is given.
    """
    if most < 1:
        raise ConfigError(f"at least one neuron must be allowed, got most={most}")
    mlp_outputs(timm_model(backbone))
    found = find_outliers(block_norms(backbone, images, progress), backbone.name)
    order = _ranked(backbone, images, found, progress)[:most]
    shares = _Shares(backbone, images, found, order, progress)
    count = shares.fewest(_LEFT * found.share)
    if shares.of(count) > 0.5 * found.share:
        raise BackboneError(
            f"no {most} neurons of {backbone.name} make its outliers: with {count} neurons moved, "
            f"{shares.of(count):.2%} of tokens are outliers, before {found.share:.2%}. Nothing was changed; use the "
            "remedy defect, or dvt denoise"
        )
    if shares.of(count) > _LEFT * found.share:
        logger.warning(
            "after moving %s, %.2f %% of tokens are still outliers", counted(count, "neuron"), 100 * shares.of(count)
        )
    denoiser = _registers(backbone, order[:count])
    places = [[int(i) for i in place] for place in order[:count]]
    denoiser.card = {"neurons": places, "outliers_before": found.share, "outliers_after": shares.of(count)}
    return denoiser


class _Shares:
    """Measure the share of tokens that are still outliers when the first n neurons are moved."""

    def __init__(
        self,
        backbone: Backbone,
        images: Sequence[ImageLike],
        found: OutlierTokens,
        order: Tensor,
        progress: Progress | None,
    ) -> None:
        self.backbone, self.images, self.found, self.order, self.progress = backbone, images, found, order, progress
        self.known = {0: found.share}

    def of(self, count: int) -> float:
        """Measure the share of outliers after moving the first `count` neurons; later calls return the known value."""
        if count not in self.known:
            clean = registered_backbone(_registers(self.backbone, self.order[:count]), self.backbone)
            norms = block_norms(clean, self.images, self.progress)
            left = torch.cat([each[self.found.block] for each in norms]) > self.found.bound
            self.known[count] = float(left.double().mean())
        return self.known[count]

    def fewest(self, enough: float) -> int:
        """Find the smallest count that leaves at most `enough` (double it, then bisect); else the best count tried."""
        low, high = 0, 1
        while self.of(high) > enough:
            if high >= len(self.order):
                return min(self.known, key=lambda count: (self.known[count], count))
            low, high = high, min(2 * high, len(self.order))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.of(middle) <= enough else (middle, high)
        return high


def _ranked(backbone: Backbone, images: Sequence[ImageLike], found: OutlierTokens, progress: Progress | None) -> Tensor:
    """Rank all neurons by how much they write at the outliers, most first: (D * blocks, 2) pairs (block, neuron)."""
    model = timm_model(backbone)
    layers, prefix = mlp_outputs(model)[: found.rising + 1], families.prefix_tokens(model)
    sums = [torch.zeros(2, layer.in_features, dtype=torch.float64) for layer in layers]
    with entering(layers) as seen:
        for image, mask in zip(inputs(backbone, images, progress, "neurons"), found.masks, strict=True):
            backbone.at_layers(image, [found.block])
            for total, hidden in zip(sums, (seen[number] for number in range(len(layers))), strict=True):
                magnitude = hidden[0, prefix:].abs().double().cpu()
                total += torch.stack((magnitude[mask].sum(0), magnitude[~mask].sum(0)))
    counts = torch.tensor([sum(int(m.sum()) for m in found.masks), sum(int((~m).sum()) for m in found.masks)])
    written = [
        (total[0] / counts[0] - total[1] / counts[1].clamp(min=1)) * _written(block, layer)
        for total, block, layer in zip(sums, families.core(model).blocks, layers, strict=False)
    ]
    best = torch.cat(written).argsort(descending=True)
    widths = torch.tensor([layer.in_features for layer in layers])
    starts = widths.cumsum(0) - widths
    block = torch.bucketize(best, widths.cumsum(0), right=True)
    return torch.stack((block, best - starts[block]), dim=1)


def _written(block: Any, layer: nn.Linear) -> Tensor:
    """Compute the norm (D,) of the vector that each neuron of an MLP adds to a token at an activation of 1."""
    weight = layer.weight.detach().double().cpu()
    scale = getattr(getattr(block, "ls2", None), "gamma", getattr(block, "gamma_2", None))
    return (weight if scale is None else scale.detach().double().cpu()[:, None] * weight).norm(dim=0)


def _registers(backbone: Backbone, places: Tensor) -> Denoiser:
    grid = backbone.grid(backbone.image_size)
    denoiser = Denoiser(DenoiserConfig("registers", backbone.feature_dim, grid, rank=len(places)))
    denoiser.body.places.copy_(places)
    return denoiser.eval()
