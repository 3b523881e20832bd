"""Score a ridge regression on held-out groups, computed only from sums of products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dvt.errors import ShapeError

RegressionGroup = tuple[Tensor, Tensor]

# Relative to the mean variance of a standardised feature, which is 1.
_STRENGTHS = torch.logspace(-7, 2, 19, dtype=torch.float64)
_FOLDS = 5


@dataclass(frozen=True)
class HeldOut:
    """Hold the squared prediction errors of each held-out group, and the target sums that R^2 compares them with.

    Args:
        errors: (G, K) sums of squared errors, float64.
        sums: (G, K) sums of the targets.
        squares: (G, K) sums of the squared targets.
        counts: (G,) numbers of tokens.
    """

    errors: Tensor
    sums: Tensor
    squares: Tensor
    counts: Tensor

    def r2(self, weights: Tensor | None = None) -> Tensor:
        """Compute R^2 (..., K) over all groups, or with group weights (..., G), such as those of a bootstrap."""
        weights = torch.ones_like(self.counts) if weights is None else weights.to(self.counts)
        total = weights @ self.sums
        spread = weights @ self.squares - total.square() / (weights @ self.counts)[..., None]
        return 1 - (weights @ self.errors) / spread


def held_out(train: list[RegressionGroup], test: list[RegressionGroup], width: int | None = None) -> HeldOut:
    """Fit a ridge and measure its errors on held-out groups; cross-validation over training groups picks the strength.

    Features are standardised on the training groups. Only sums of products of a group's rows are kept, so the
    tokens are read twice and never joined.

    Args:
        train: (features (n, C), targets (n, K)) of two groups or more.
        test: (features, targets) of one group or more.
        width: number of targets in a block; each block has its own strength. None means one block. Further blocks
            (shuffled targets, for a null) cost almost nothing.

    Raises:
        ShapeError: there are too few groups, or a target is constant in the held-out ones.
    """
    if len(train) < 2 or not test:
        raise ShapeError(f"a ridge needs 2 training groups and 1 to test, got {len(train)} and {len(test)}")
    size = train[0][0].shape[1]
    count = sum(len(x) for x, _ in train)
    mean = torch.stack([x.double().sum(0) for x, _ in train]).sum(0) / count
    deviation = (torch.stack([(x.double() - mean).square().sum(0) for x, _ in train]).sum(0) / count).sqrt()
    deviation = torch.where(deviation > 1e-12 * (1 + mean.abs()), deviation, torch.ones_like(deviation))

    folds = [_products(train[start::_FOLDS], mean, deviation) for start in range(min(_FOLDS, len(train)))]
    whole = torch.stack(folds).sum(0)
    strengths = _STRENGTHS.to(whole.device)
    errors = torch.stack([_squared_errors(fold, _ridge(whole - fold, size, strengths)) for fold in folds])
    by_block = errors.sum(0).unflatten(1, (-1, width or errors.shape[2])).sum(2)
    best = by_block.argmin(0).repeat_interleave(width or errors.shape[2])
    # Every target keeps the weights of its own strength.
    chosen = _ridge(whole, size, strengths[best.unique()])[torch.searchsorted(best.unique(), best)]
    weights = chosen.diagonal(dim1=0, dim2=2)
    return _held_out_errors(test, mean, deviation, weights)


def _held_out_errors(test: list[RegressionGroup], mean: Tensor, deviation: Tensor, weights: Tensor) -> HeldOut:
    parts = []
    for features, targets in test:
        values = targets.double()
        rows = torch.cat(((features.double() - mean) / deviation, values, torch.ones_like(values[:, :1])), dim=1)
        parts.append(torch.stack(((rows @ weights).square().sum(0), values.sum(0), values.square().sum(0))))
    errors, sums, squares = torch.stack(parts, dim=1)
    counts = torch.tensor([len(targets) for _, targets in test]).to(errors)
    if not bool((squares.sum(0) - sums.sum(0).square() / counts.sum() > 0).all()):
        raise ShapeError("a target is constant over the held-out tokens, so R^2 is not defined; give other targets")
    return HeldOut(errors, sums, squares, counts)


def _products(groups: list[RegressionGroup], mean: Tensor, deviation: Tensor) -> Tensor:
    """Sum the products of the rows [standardised features, targets, 1]: (C + K + 1, C + K + 1)."""
    total = mean.new_zeros(())
    for features, targets in groups:
        scaled = (features.double() - mean) / deviation
        rows = torch.cat((scaled, targets.double(), torch.ones_like(scaled[:, :1])), dim=1)
        total = total + rows.T @ rows
    return total


def _ridge(products: Tensor, size: int, strengths: Tensor) -> Tensor:
    """Solve for (A, C + K + 1, K) such that a row [features, targets, 1] times it is the error of prediction."""
    mean = products[:, -1] / products[-1, -1]
    centred = products - products[-1, -1] * mean[:, None] * mean
    values, directions = torch.linalg.eigh(centred[:size, :size])
    inner = directions.T @ centred[:size, size:-1]
    shrunk = inner / (values.clamp(min=0)[:, None] + strengths[:, None, None] * products[-1, -1])
    weights = directions @ shrunk
    identity = torch.eye(inner.shape[1]).to(weights).expand(len(strengths), -1, -1)
    intercept = mean[size:-1] - mean[:size] @ weights
    return torch.cat((-weights, identity, -intercept[:, None]), dim=1)


def _squared_errors(products: Tensor, errors: Tensor) -> Tensor:
    """Sum the squared errors of the rows behind ``products``: (A, K)."""
    return (errors * (products @ errors)).sum(1)
