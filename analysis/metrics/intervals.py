"""Bootstrap over images: draw how often each image counts, and compute the interval of the resulting values."""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 1000


def resample_counts(images: int, resamples: int, generator: torch.Generator) -> Tensor:
    """Draw bootstrap samples of N images each, with replacement.

    Args:
        images: N.
        resamples: R samples.
        generator: draws them; on the CPU.

    Returns:
        (R, N) float64, the number of times that each image occurs in each sample.

    >>> resample_counts(3, 2, torch.Generator().manual_seed(0)).sum(1).tolist()
    [3.0, 3.0]
    """
    drawn = torch.randint(images, (resamples, images), generator=generator)
    return torch.zeros(resamples, images, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def central_interval(values: Tensor) -> tuple[float, float] | None:
    """Compute the central 95 % interval of the finite values; None if there are none.

    >>> central_interval(torch.arange(41.0))
    (1.0, 39.0)
    """
    values = values[values.isfinite()]
    if not len(values):
        return None
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
