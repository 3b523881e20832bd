"""Estimate the artifact of position from images of noise, without photographs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dvt.backbones import Backbone
from dvt.denoiser.config import DenoiserConfig
from dvt.denoiser.model import Denoiser
from dvt.denoiser.variants import checked_maps, fit_subtract
from dvt.errors import ConfigError, ShapeError

logger = logging.getLogger(__name__)

#: A direction counts as one of position if its eigenvalue is this many times the largest that chance gave.
_BEYOND_CHANCE = 2.0


@torch.no_grad()
def noise_maps(backbone: Backbone, count: int = 16, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Compute the tokens (h, w, C) of images of noise, at the backbone's own size.

    Args:
        backbone: any backbone.
        count: number of images, at least 2; each pixel and colour is uniform in [0, 1].
        generator: draws the pixels, on the CPU; None takes one seeded with 0.
    """
    if count < 2:
        raise ConfigError(f"the mean of noise images needs 2 or more of them, got {count}")
    generator = generator or torch.Generator().manual_seed(0)
    for _ in range(count):
        image = torch.rand(1, 3, *backbone.image_size, generator=generator)
        yield backbone(image.to(backbone.device)).patches[0].float()


def fit_noise(maps: Iterable[Tensor]) -> Denoiser:
    """Make a denoiser that subtracts the artifact of position, estimated as the mean map over noise images.

    The map's mean over positions is removed. Then it is shrunk by the positive-part James-Stein factor [ours], max(0, 1
    - (variance of the mean map due to chance) / (its variance over positions)), so that hardly anything is subtracted
    if tokens do not depend on position.

    Args:
        maps: (h, w, C) tokens of noise images (:func:`noise_maps`), of one grid; read once.

    Returns:
        A denoiser of kind "subtract". Its card holds the factor ("kept", in [0, 1]).

    Raises:
        ShapeError: there are fewer than two maps, or several grids or feature sizes.
        NonFiniteError: a map holds NaN or infinity.
    """
    total, squares, count = torch.zeros(()), 0.0, 0
    for each in _of_one_grid(maps):
        centred = each.double() - each.double().mean((0, 1))
        total, squares, count = total + centred, squares + float(centred.square().sum()), count + 1
    if count < 2:
        raise ShapeError(f"2 maps or more are needed to separate position from chance, got {count}")
    artifact = total / count
    size = float(artifact.square().sum())
    chance = (squares - count * size) / (count - 1) / count
    kept = max(0.0, 1 - chance / size) if size > 0 else 0.0
    if kept < 0.5:
        logger.warning("position makes %.0f %% of the mean of %d noise images, chance the rest", 100 * kept, count)
    denoiser = fit_subtract([kept * artifact])
    denoiser.card = {"kept": kept, "noise_images": count}
    return denoiser


def fit_insid3(maps: Iterable[Tensor], rank: int = 8) -> Denoiser:
    """Make a denoiser that removes the leading directions of position in noise images (the aim and SVD are INSID3's).

    The directions are eigenvectors of the mean map's covariance over positions, estimated as the product of two
    independent halves of the images [ours]. The noise in that product is as often negative as positive. So an
    eigenvalue that is less than twice the magnitude of the most negative one is due to chance, and is not removed.

    Args:
        maps: (h, w, C) tokens of noise images (:func:`noise_maps`), of one grid; read once.
        rank: the largest number of directions to remove.

    Returns:
        A denoiser of kind "linear". Its card holds the number of directions found ("directions").

    Raises:
        ShapeError: there are fewer than two maps, or several grids or feature sizes.
        NonFiniteError: a map holds NaN or infinity.
        ConfigError: the rank is out of range.
    """
    sums, mean, count = [torch.zeros(()), torch.zeros(())], torch.zeros(()), 0
    for each in _of_one_grid(maps):
        mean = mean + each.double().mean((0, 1))
        sums[count % 2] = sums[count % 2] + (each.double() - each.double().mean((0, 1)))
        count += 1
    if count < 2:
        raise ShapeError(f"two halves need 2 maps or more, got {count}")
    height, width, channels = sums[0].shape
    if not 1 <= rank <= channels:
        raise ConfigError(f"rank must lie between 1 and the feature size {channels}, got {rank}")
    product = sums[0].flatten(0, 1).T @ sums[1].flatten(0, 1)
    values, vectors = torch.linalg.eigh(product + product.T)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    real = values > _BEYOND_CHANCE * -torch.linalg.eigvalsh(product + product.T)[0].clamp(max=-1e-12)
    if not real.any():
        logger.warning("no direction of position was found in %d noise images; nothing is removed", count)
    denoiser = Denoiser(DenoiserConfig("linear", channels, (height, width), rank=rank))
    denoiser.body.mean.copy_(mean / count)
    denoiser.body.directions.copy_(vectors * real)
    denoiser.card = {"directions": int(real.sum()), "noise_images": count}
    return denoiser.eval()


def _of_one_grid(maps: Iterable[Tensor]) -> Iterator[Tensor]:
    first = None
    for number, each in enumerate(checked_maps(maps)):
        first = first or each.shape
        if each.shape != first:
            raise ShapeError(f"map {number} has shape {tuple(each.shape)}, the first {tuple(first)}; give one grid")
        yield each
