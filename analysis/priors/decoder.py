"""Decode feature tokens to pixels, so that generated features can be shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dvt.analysis.priors.targets import patchify, unpatchify
from dvt.analysis.priors.token_set import BATCH, Rows
from dvt.errors import ShapeError
from dvt.views import resize

_RIDGE = 1e-2  # relative to the mean variance of an input


@dataclass(frozen=True)
class PixelDecoder:
    """Decode each token and its eight neighbours linearly as a patch of pixels (ours).

    Args:
        weights: (9 C + 1, 3 p^2), one row per input and one for a constant, for patches of p x p pixels.
    """

    weights: Tensor

    @classmethod
    def fit(cls, maps: Rows, pictures: Rows) -> PixelDecoder:
        """Fit by ridge regression on standardised feature maps and the pictures that they come from.

        Args:
            maps: N maps (h, w, C).
            pictures: N pictures (3, S, S).
        """
        height, width, channels = maps.shape[1:]
        patch = max(1, round(int(pictures.shape[2]) / height))
        size = 9 * channels + 1
        left, right = torch.zeros(size, size), torch.zeros(size, 3 * patch**2)
        for start in range(0, len(maps), BATCH):
            rows = list(range(start, min(start + BATCH, len(maps))))
            shown = torch.stack([resize(each, (height * patch, width * patch)) for each in pictures[rows].float()])
            x, y = _inputs(maps[rows].float().cpu()), patchify(shown, patch).flatten(0, 2)
            left, right = left + x.T @ x, right + x.T @ y
        ridge = _RIDGE * left.diagonal()[:-1].mean() * torch.eye(size)
        ridge[-1, -1] = 0  # no penalty on the constant
        return cls(torch.linalg.lstsq(left + ridge, right).solution)

    def __call__(self, maps: Tensor) -> Tensor:
        """Decode standardised maps (B, h, w, C) as pictures (B, 3, h p, w p) in [0, 1]."""
        batch, height, width, channels = maps.shape
        if 9 * channels + 1 != len(self.weights):
            raise ShapeError(f"this decoder takes {(len(self.weights) - 1) // 9} channels, got {channels}")
        patches = (_inputs(maps.float()) @ self.weights.to(maps.device)).view(batch, height, width, -1)
        return unpatchify(patches, round((patches.shape[-1] / 3) ** 0.5)).clamp(0, 1)


def _inputs(maps: Tensor) -> Tensor:
    """List each token with its neighbours and a one: (B h w, 9 C + 1); edge tokens are repeated beyond the edge."""
    padded = functional.pad(maps.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate")
    rows = functional.unfold(padded, 3).transpose(1, 2).flatten(0, 1)
    return functional.pad(rows, (0, 1), value=1.0)
