"""Measure the response of a backbone to an image without content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dvt import grids
from dvt.analysis.metrics.nulls import token_maps
from dvt.errors import ConfigError, ShapeError
from dvt.grids import Size
from dvt.tokens import Tokens

TokensOfImages = Callable[[Tensor], Tokens]


@dataclass(frozen=True)
class BlankResponse:
    """The response to an image of one grey.

    Args:
        energy: share of its mean squared value that varies over positions, in [0, 1].
        correlation: correlation with an artifact over positions and channels, in [-1, 1]; None without one.
    """

    energy: float
    correlation: float | None


@torch.no_grad()
def blank_response(
    backbone: TokensOfImages, size: Size, artifact: Tensor | None = None, level: float = 0.5
) -> BlankResponse:
    """Measure a backbone's response to an image without content: any variation over positions is an artifact.

    Args:
        backbone: (B, 3, H, W) images in [0, 1] to tokens.
        size: (H, W) of the image in pixels.
        artifact: (h, w, C) to compare with, resampled to the response's grid; a constant vector is ignored.
        level: grey level, in [0, 1].
    """
    if not 0 <= level <= 1:
        raise ConfigError(f"level must be in [0, 1], got {level}")
    response = token_maps(backbone(torch.full((1, 3, *size), level)))[0].double()
    energy = blank_energy(response)
    return BlankResponse(energy, None if artifact is None else blank_correlation(response, artifact))


def blank_energy(response: Tensor) -> float:
    """Compute the share of the mean squared value of an (h, w, C) response that varies over positions."""
    varying = response.double() - response.double().mean((0, 1))
    return float(varying.square().sum() / response.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny))


def blank_correlation(response: Tensor, artifact: Tensor) -> float:
    """Compute the correlation of an (h, w, C) response with an artifact on any grid, over positions and channels."""
    if artifact.ndim != 3 or artifact.shape[-1] != response.shape[-1]:
        raise ShapeError(f"the artifact must be (h, w, {response.shape[-1]}), got {tuple(artifact.shape)}")
    varying = response.double() - response.double().mean((0, 1))
    other = grids.resample(artifact.to(varying), (response.shape[0], response.shape[1]))
    other = other - other.mean((0, 1))
    return float(torch.cosine_similarity(varying.flatten(), other.flatten(), dim=0))
