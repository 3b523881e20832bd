"""Fit denoisers in closed form, in one pass over token maps, which are not kept in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dvt import grids
from dvt.denoiser.config import DenoiserConfig
from dvt.denoiser.model import Denoiser
from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.grids import Size

#: Singular values of the position waves, and variances of directions, below this share of the largest count as zero.
_NEGLIGIBLE_SHARE = 1e-9


def fit_linear(maps: Iterable[Tensor], rank: int = 8, waves: int = 6) -> Denoiser:
    """Fit a denoiser that removes the directions in which tokens encode their position [ours; the aim is RASA's].

    Tokens are regressed on smooth functions of position, the cosine waves cos(pi i x) cos(pi j y) with i, j < waves.
    The `rank` principal directions of the prediction span the position subspace; along it tokens are set to the mean.
    With enough rank, no linear probe can read any of these functions from the result: on the fitted tokens, their
    covariance with it is zero. RASA's directions, the weights of a probe that predicts position, are small where the
    position signal is strong, so that even many rounds do not remove it.

    Args:
        maps: (h, w, C) raw token maps of several images, of any grids; read once.
        rank: number of directions to remove, at most C.
        waves: number of wave lengths along each axis.

    Returns:
        A denoiser of kind "linear". :mod:`dvt.denoiser.folding` folds it into adjacent layers, at no cost.

    Raises:
        ShapeError: there are no maps, or they differ in feature size.
        NonFiniteError: a map holds NaN or infinity.
        ConfigError: rank or waves is out of range.

    >>> denoiser = fit_linear(torch.rand(5, 9, 12, 16), rank=4)
    >>> denoiser.config.kind, denoiser(torch.rand(1, 9, 12, 16)).shape
    ('linear', torch.Size([1, 9, 12, 16]))
    """
    if waves < 2:
        raise ConfigError(f"waves must be at least 2, got {waves}: a single wave is constant")
    products, channels, grid = torch.zeros(()), 0, (1, 1)
    for tokens in checked_maps(maps):
        grid, channels = (tokens.shape[0], tokens.shape[1]), tokens.shape[2]
        values = tokens.double().flatten(0, 1)
        rows = torch.cat((values, _waves(grid, waves, values), torch.ones_like(values[:, :1])), dim=1)
        products = products + rows.T @ rows
    if not 1 <= rank <= channels:
        raise ConfigError(f"rank must lie between 1 and the feature size {channels}, got {rank}")
    mean, directions = _position_subspace(products, channels, rank)
    denoiser = Denoiser(DenoiserConfig("linear", channels, grid, rank=rank))
    denoiser.body.mean.copy_(mean)
    denoiser.body.directions.copy_(directions)
    return denoiser.eval()


def fit_subtract(artifacts: Iterable[Tensor], grid: Size | None = None) -> Denoiser:
    """Make a denoiser that subtracts the mean artifact over images, stored on one grid and resampled to others.

    Args:
        artifacts: (h, w, C) maps to subtract, one per image: artifact terms (G), which have mean zero, or raw -
            semantic, whose mean then shifts the tokens, too; of any grids; read once.
        grid: (h, w) of the stored artifact; None takes that of the first map.

    Returns:
        A denoiser of kind "subtract".

    Raises:
        ShapeError: there are no maps, or they differ in feature size.
        NonFiniteError: a map holds NaN or infinity.
    """
    total, count = torch.zeros(()), 0
    for artifact in checked_maps(artifacts):
        grid = grid or (artifact.shape[0], artifact.shape[1])
        total, count = total + grids.resample(artifact.double(), grid), count + 1
    denoiser = Denoiser(DenoiserConfig("subtract", total.shape[-1], grid or (1, 1)))
    denoiser.body.artifact.copy_(total / count)
    return denoiser.eval()


def checked_maps(maps: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the maps one by one; raise if there are none, if feature sizes differ, or for NaN and infinity."""
    channels = None
    for number, tokens in enumerate(maps):
        if tokens.ndim != 3 or tokens.shape[-1] != (channels or tokens.shape[-1]):
            raise ShapeError(
                f"map {number} has shape {tuple(tokens.shape)}; all must be (h, w, {channels or 'C'}), one per image"
            )
        if not tokens.isfinite().all():
            raise NonFiniteError(f"map {number} holds NaN or infinity; leave it out, or extract it again in float32")
        channels = tokens.shape[-1]
        yield tokens
    if channels is None:
        raise ShapeError("no token maps were given; a denoiser is fitted to at least one image")


def _waves(grid: Size, count: int, like: Tensor) -> Tensor:
    """Compute cosine waves (h w, count^2 - 1) at the patch centres, without the constant one."""
    x, y = grids.grid_centres(grid).to(like).flatten(0, 1).unbind(-1)
    steps = math.pi * torch.arange(count).to(like)
    waves = torch.cos(y[:, None] * steps)[:, :, None] * torch.cos(x[:, None] * steps)[:, None]
    return waves.flatten(1)[:, 1:]


def _position_subspace(products: Tensor, channels: int, rank: int) -> tuple[Tensor, Tensor]:
    """Find the mean (C,) and directions (C, rank) from sums of products of the rows [token, waves, 1]."""
    count = products[-1, -1]
    mean = products[-1, :-1] / count
    covariance = products[:-1, :-1] / count - mean[:, None] * mean
    across, within = covariance[:channels, channels:], covariance[channels:, channels:]
    # With few positions the waves are linearly dependent; the pseudo-inverse takes the smallest coefficients.
    explained = across @ torch.linalg.pinv(within, rtol=_NEGLIGIBLE_SHARE, hermitian=True) @ across.T
    variances, directions = torch.linalg.eigh(explained)
    variances, directions = variances.flip(0)[:rank], directions.flip(1)[:, :rank]
    return mean[:channels], directions * (variances > _NEGLIGIBLE_SHARE * variances[0])
