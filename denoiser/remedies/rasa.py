"""Remove position in rounds: fit a linear probe of position, and remove its directions from the tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from dvt import grids
from dvt.denoiser.config import DenoiserConfig
from dvt.denoiser.model import Denoiser
from dvt.denoiser.variants import checked_maps
from dvt.errors import ConfigError, ShapeError

logger = logging.getLogger(__name__)

#: Adjusted R^2 below which a probe reads no position.
_NOTHING = 0.02


def fit_rasa(maps: Iterable[Tensor], rounds: int = 8, ridge: float = 1.0) -> Denoiser:
    """Fit a denoiser that removes the directions from which linear probes read (x, y), probe by probe (as RASA).

    Each round fits a ridge probe to the tokens after the previous rounds, and removes its two weight directions. The
    rounds end early when the probe's R^2, adjusted for the number of channels, falls below .02. The penalty must be
    large: without it a probe reads position along directions where tokens hardly vary, and many rounds do not remove
    the artifact (on the bundled ViT, R^2 is still .93 after 32 directions with a ridge of 1e-4, and 0 after 8 with a
    ridge of 1). Other functions of position than linear ones of (x, y) remain;
    :func:`~dvt.denoiser.variants.fit_linear` also removes waves. The layout of the photographs (sky above) counts as
    position.

    Args:
        maps: (h, w, C) raw token maps of several images, of any grids; read once.
        rounds: the largest number of rounds, each of two directions.
        ridge: penalty, as a share of the mean variance of a channel.

    Returns:
        A denoiser of kind "linear". Its card holds the R^2 before each round and after the last ("r2").

    Raises:
        ShapeError: there are no maps, they differ in feature size, or there are fewer tokens than channels.
        NonFiniteError: a map holds NaN or infinity.
        ConfigError: rounds or ridge is out of range.
    """
    if rounds < 1 or not ridge > 0:
        raise ConfigError(f"rounds must be at least 1 and ridge positive, got {rounds} and {ridge}")
    products, channels, grid = torch.zeros(()), 0, (1, 1)
    for tokens in checked_maps(maps):
        grid, channels = (tokens.shape[0], tokens.shape[1]), tokens.shape[2]
        values = tokens.double().flatten(0, 1)
        places = grids.grid_centres(grid).to(values).flatten(0, 1)
        rows = torch.cat((values, places, torch.ones_like(values[:, :1])), dim=1)
        products = products + rows.T @ rows
    count = int(products[-1, -1])
    if count <= channels + 1:
        raise ShapeError(f"a probe of {channels} channels needs more tokens than that, got {count}; give more images")
    mean = products[-1, :-1] / count
    covariance = products[:-1, :-1] / count - mean[:, None] * mean
    directions, read = _rounds(covariance, channels, min(rounds, channels // 2), ridge, count)
    if not directions.shape[1]:
        logger.warning("no probe reads position (adjusted R2 %.3f); nothing is removed", read[0])
    rank = max(1, directions.shape[1])
    denoiser = Denoiser(DenoiserConfig("linear", channels, grid, rank=rank))
    denoiser.body.mean.copy_(mean[:channels])
    denoiser.body.directions[:, : directions.shape[1]] = directions.float()
    denoiser.card = {"directions": directions.shape[1], "r2": read}
    return denoiser.eval()


def _rounds(covariance: Tensor, channels: int, rounds: int, ridge: float, count: int) -> tuple[Tensor, list[float]]:
    """Find the directions (C, n) to remove, and the adjusted R^2 before each round and after the last."""
    within, across, places = (
        covariance[:channels, :channels],
        covariance[:channels, channels:],
        covariance[channels:, channels:],
    )
    penalty = ridge * within.diagonal().mean() * torch.eye(channels).to(within)
    directions, read = within[:, :0], []
    while True:
        left = torch.eye(channels).to(within) - directions @ directions.T
        own, to = left @ within @ left, left @ across
        weights = torch.linalg.solve(own + penalty, to)
        explained = 2 * (weights * to).sum(0) - (weights * (own @ weights)).sum(0)
        share = float((explained / places.diagonal()).mean())
        read.append(1 - (1 - share) * (count - 1) / (count - channels - 1))
        if read[-1] < _NOTHING or directions.shape[1] >= 2 * rounds:
            return directions, read
        directions = torch.linalg.qr(torch.cat((directions, left @ weights), dim=1))[0]
