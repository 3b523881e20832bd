"""Disturb image features until they pass for text features (LAFITE)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dvt.errors import ConfigError


def pseudo_text(features: Tensor, generator: torch.Generator, xi: float = 3.0) -> Tensor:
    """Draw fixed pseudo-text features h = norm(f + xi |f| eps / |eps|), eps standard normal.

    The mean cosine of f and h tends to 1 / sqrt(1 + xi^2) in high dimension.

    Args:
        features: (..., C) image features, of any length.
        xi: strength of the disturbance, at least 0.

    Source:
        Zhou et al., LAFITE: Towards Language-Free Training for Text-to-Image Generation, 2022, with fixed noise.
    """
    if xi < 0:
        raise ConfigError(f"xi must be at least 0, got {xi}")
    noise = functional.normalize(_normal_like(features, generator), dim=-1)
    return functional.normalize(features + xi * features.norm(dim=-1, keepdim=True) * noise, dim=-1)


class PseudoText(nn.Module):
    """Learn pseudo-text features h = norm(f + mu(f) + exp(s(f)) eps) of f = norm(feature).

    At the start it equals :func:`pseudo_text` in high dimension: mu = 0 and exp(s) = xi / sqrt(C). Train it together
    with the generator through ``contrast(h, ..., temperature=.5)``.

    Args:
        feature_dim: C.
        xi: strength of the disturbance at the start, positive.

    Source:
        LAFITE, with trained noise; the initial values are ours.
    """

    def __init__(self, feature_dim: int, xi: float = 3.0) -> None:
        super().__init__()
        if xi <= 0:
            raise ConfigError(f"xi must be positive, got {xi}")
        self.hidden = nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.GELU())
        self.mean, self.log_scale = nn.Linear(feature_dim, feature_dim), nn.Linear(feature_dim, feature_dim)
        for layer in (self.mean, self.log_scale):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.log_scale.bias, math.log(xi / feature_dim**0.5))

    def forward(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Draw pseudo-text (..., C), unit vectors, for features (..., C)."""
        features = functional.normalize(features, dim=-1)
        hidden = self.hidden(features)
        noise = _normal_like(features, generator)
        return functional.normalize(features + self.mean(hidden) + self.log_scale(hidden).exp() * noise, dim=-1)


def _normal_like(features: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(features.shape, generator=generator, device=generator.device).to(features)
