"""Choose how many tokens a token-by-token prior masks in training, and how many each sampling step fills."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def draw_mask_ratios(count: int, generator: torch.Generator) -> Tensor:
    """Draw shares of masked tokens (count,): normal with mean 1 and deviation .25, truncated to [.7, 1]; mean .867.

    Source:
        Li et al., Autoregressive Image Generation without Vector Quantization (MAR), 2024.
    """
    low = torch.special.ndtr(torch.tensor((0.7 - 1) / 0.25)).item()
    draws = torch.rand(count, generator=generator, device=generator.device)
    return (1 + 0.25 * torch.special.ndtri(low + (0.5 - low) * draws)).clamp(0.7, 1)


def unmasking(length: int, steps: int) -> list[int]:
    """List how many tokens each sampling step fills: a cosine schedule, at least one per step, `length` in all.

    >>> unmasking(16, 4)
    [2, 3, 5, 6]
    """
    steps = min(steps, length)
    left = [math.floor(length * math.cos(math.pi / 2 * step / steps)) for step in range(steps)] + [0]
    for step in range(1, steps):
        left[step] = max(min(left[step], left[step - 1] - 1), steps - step)
    return [before - after for before, after in pairwise(left)]
