"""Measure how much of the tokens depends on the patch position alone, by moving the content; needs no labels.

A probe that reads position from photographs also reads their layout (sky above, road below). Here the content moves:
windows are cut at random offsets out of the image mirrored into a torus, so that every position sees every place of
the image equally often. If the mean over windows still differs between positions, the model causes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dvt.analysis.metrics.intervals import central_interval, resample_counts
from dvt.analysis.metrics.nulls import Score
from dvt.errors import ConfigError, ShapeError
from dvt.grids import Size


def torus_windows(image: Tensor, size: Size, count: int, seed: int) -> Tensor:
    """Cut windows from an image that is mirrored along both axes and repeated without end, so that it has no seams.

    Args:
        image: (3, H, W), at the scale that the model is meant to see.
        size: (height, width) of a window in pixels, at most twice the image's.
        count: the number of windows V, even. The offsets of each half cover the image evenly, and the two halves are
            independent of each other.
        seed: seed of the random offsets, which are uniform over all pixels.

    Returns:
        (V, 3, height, width).
    """
    if image.ndim != 3 or size[0] > 2 * image.shape[1] or size[1] > 2 * image.shape[2]:
        raise ShapeError(f"windows of {size} need an image (3, H, W) of at least half their size, got {image.shape}")
    if count < 2 or count % 2:
        raise ConfigError(f"the number of windows must be even and at least 2, got {count}")
    torus = torch.cat((image, image.flip(-1)), -1)
    torus = torch.cat((torus, torus.flip(-2)), -2)
    halves = [torch.quasirandom.SobolEngine(2, scramble=True, seed=2 * seed + half).draw(count // 2) for half in (0, 1)]
    offsets = (torch.cat(halves).double() * torch.tensor(torus.shape[1:])).long()
    rows, columns = (
        (start[:, None] + torch.arange(side)) % whole
        for start, side, whole in zip(offsets.unbind(1), size, torus.shape[1:], strict=True)
    )
    return torch.stack([torus[:, y][:, :, x] for y, x in zip(rows, columns, strict=True)])


@dataclass(frozen=True)
class PositionShare:
    """Hold the share of the tokens' variance that is due to position; see :class:`PositionMeans`.

    Args:
        shared: the share of the variance that is due to position and the same in all images, with its null; None for
            a single image.
        own: the share that is due to position within each image: `shared` plus what differs between images.
        shared_interval: 95 % bootstrap interval over images.
        own_interval: the same for `own`.
        artifact: (h, w, C) the mean over all windows, without its mean over positions: an estimate of G.
        images: how many were averaged.
    """

    shared: Score | None
    own: Score
    shared_interval: tuple[float, float] | None
    own_interval: tuple[float, float] | None
    artifact: Tensor
    images: int


class PositionMeans:
    """Collect the tokens of each image's torus windows; :meth:`share` computes how much of their variance is position.

    With tokens y = F + G + noise over windows and positions, F independent of the position by construction, the mean
    over one half of an image's windows is G plus noise, and that over the other half G plus other noise: the product
    of the two halves is |G|^2 without bias (`own`). So is the product of the means of two images, for the part of G
    that both have (`shared`). Both are divided by the variance of a token about its image's mean. In an image whose
    share is s, two patches of equal content have a cosine of about 1 - s, once the image's mean is removed.

    The null moves each window's tokens around the torus at random, which keeps their smoothness: permuting them
    would make them noise and the interval too narrow.

    Args:
        draws: number of random draws of the null.
        seed: seed of the null.

    Source: ours.
    """

    def __init__(self, draws: int = 5, seed: int = 0) -> None:
        if draws < 2:
            raise ConfigError(f"an interval needs at least 2 draws of the null, got {draws}")
        self._generator = torch.Generator().manual_seed(seed)
        self._products: list[Tensor] = []  # of each image: 1 + draws products of its halves
        self._variance: list[float] = []
        self._means: list[Tensor] = []
        self._null_sums: list[Tensor] | None = None
        self._null_squares = torch.zeros(draws, dtype=torch.float64)
        self._draws = draws

    def add(self, patches: Tensor) -> None:
        """Add the windows (V, h, w, C) of one image, in the order of :func:`torus_windows`."""
        tokens = patches.detach().float()
        if tokens.ndim != 4 or len(tokens) < 2 or len(tokens) % 2:
            raise ShapeError(f"windows must be (V, h, w, C) with V even, got {tuple(tokens.shape)}")
        if self._means and self._means[0].shape != tokens.shape[1:]:
            raise ShapeError(f"windows must all be {tuple(self._means[0].shape)}, got {tuple(tokens.shape[1:])}")
        tokens = tokens - tokens.mean((0, 1, 2))
        self._variance.append(float(tokens.square().sum(-1).mean()))
        product, mean = _halves(tokens)
        self._means.append(mean)
        products = [product]
        self._null_sums = self._null_sums or [torch.zeros_like(mean) for _ in range(self._draws)]
        for draw in range(self._draws):
            product, mean = _halves(self._moved(tokens))
            products.append(product)
            self._null_sums[draw] += mean
            self._null_squares[draw] += float(mean.square().sum(-1).mean())
        self._products.append(torch.stack(products).double().cpu())

    def _moved(self, tokens: Tensor) -> Tensor:
        height, width = tokens.shape[1:3]
        steps = torch.rand(len(tokens), 2, generator=self._generator) * torch.tensor([height, width])
        return torch.stack(
            [each.roll((y, x), (0, 1)) for each, (y, x) in zip(tokens, steps.int().tolist(), strict=True)]
        )

    def share(self, resamples: int = 1000) -> PositionShare:
        """Compute the shares, their nulls and intervals.

        Raises:
            ShapeError: no image was added.
        """
        if not self._means:
            raise ShapeError("no image was added; the share of position needs the windows of at least one")
        count, variance = len(self._means), torch.tensor(self._variance, dtype=torch.float64)
        total = variance.mean().clamp(min=torch.finfo(torch.float64).tiny)
        products = torch.stack(self._products)
        own = products.mean(0) / total
        weights = resample_counts(count, resamples, self._generator)
        interval = (
            central_interval((weights @ products[:, 0]) / (weights @ variance).clamp(min=1e-300)) if count > 1 else None
        )
        means = torch.stack(self._means)
        shared, shared_interval = None, None
        if count > 1:
            gram = torch.einsum("ihwc,jhwc->ij", means, means).double().cpu() / (means.shape[1] * means.shape[2])
            pairs = gram - gram.diagonal().diag()
            value = float(pairs.sum() / (count * (count - 1)) / total)
            sums = torch.stack([each.square().sum(-1).mean() for each in self._null_sums or []]).double().cpu()
            null = (sums - self._null_squares) / (count * (count - 1)) / total
            shared = score_of(value, null)
            both = torch.einsum("ri,ij,rj->r", weights, pairs, weights)
            apart = weights.sum(1).square() - weights.square().sum(1)
            several = apart > 0  # a resample that drew one image only has no pairs
            spread = (weights @ variance / count).clamp(min=1e-300)
            shared_interval = central_interval(both[several] / apart[several] / spread[several])
        artifact = means.mean(0)
        return PositionShare(
            shared, score_of(float(own[0]), own[1:]), shared_interval, interval, artifact - artifact.mean((0, 1)), count
        )


def _halves(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply the two halves' position means, averaged over positions; also return the mean of both (h, w, C)."""
    first, second = (half.mean(0) for half in tokens.chunk(2))
    first, second = first - first.mean((0, 1)), second - second.mean((0, 1))
    return (first * second).sum(-1).mean(), (first + second) / 2


def score_of(value: float, null: Tensor) -> Score:
    """Put a value beside the mean of its null and the null's 95 % prediction interval (Student's t)."""
    from scipy.stats import t as student

    half = float(student.ppf(0.975, len(null) - 1)) * float(null.std()) * (1 + 1 / len(null)) ** 0.5
    mean = float(null.mean())
    return Score(value, mean, mean - half, mean + half)
