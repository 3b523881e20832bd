"""Implement the bodies of denoisers other than a transformer block: trained baselines, and closed-form removals.

Each is a module (patches (B, h, w, C), prefix) -> patches; its `reset` makes it the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dvt import grids
from dvt.denoiser.config import DenoiserConfig
from dvt.denoiser.remedies.bodies import DefectRemoval, RegisterNeurons


class Convolution(nn.Module):
    """Compute x + Conv(x), a 1 x 1 or 3 x 3 convolution over the token map with zero padding."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        size = {"conv1x1": 1, "conv3x3": 3}[config.kind]
        self.conv = nn.Conv2d(config.feature_dim, config.feature_dim, size, padding=size // 2)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Start as the identity: add nothing."""
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def forward(self, patches: Tensor, prefix: Tensor | None = None) -> Tensor:
        return patches + self.conv(patches.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Linear(nn.Module):
    """Compute x - (x - mean) W W': set tokens to the mean along the columns of W (C, rank), orthonormal or zero."""

    mean: Tensor
    directions: Tensor

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(config.feature_dim))
        self.register_buffer("directions", torch.empty(config.feature_dim, config.rank))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Start as the identity: remove nothing."""
        self.mean.zero_()
        self.directions.zero_()

    def forward(self, patches: Tensor, prefix: Tensor | None = None) -> Tensor:
        return patches - ((patches - self.mean) @ self.directions) @ self.directions.T


class Subtract(nn.Module):
    """Subtract a stored artifact (h, w, C), resampled to the grid of the tokens: x - G(p)."""

    artifact: Tensor

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.register_buffer("artifact", torch.empty(*config.grid, config.feature_dim))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Start as the identity: subtract nothing."""
        self.artifact.zero_()

    def forward(self, patches: Tensor, prefix: Tensor | None = None) -> Tensor:
        return patches - grids.resample(self.artifact, (patches.shape[1], patches.shape[2]))


#: The body of each kind of denoiser except "block", which is in :mod:`dvt.denoiser.model`.
BODIES: dict[str, Callable[[DenoiserConfig], Any]] = {
    "conv1x1": Convolution,
    "conv3x3": Convolution,
    "defect": DefectRemoval,
    "linear": Linear,
    "registers": RegisterNeurons,
    "subtract": Subtract,
}
