"""Randomise the conditions of a generative prior (dropping, pseudo-text); make discrete tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dvt.errors import ConfigError, NonFiniteError, ShapeError


def drop(condition: Tensor, null: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace a random share of conditions (B, ...) by ``null``, for classifier-free guidance.

    Args:
        condition: (B, ...).
        null: the replacement, learned or zero, broadcastable to one condition.
        share: probability of replacement in [0, 1]; Lumos takes .1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of dropped conditions must lie in [0, 1], got {share}")
    dropped = torch.rand(len(condition), generator=generator, device=generator.device) < share
    return torch.where(dropped.to(condition.device).view(-1, *[1] * (condition.ndim - 1)), null, condition)


# --- LAFITE: image features with noise, in place of text features


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


# --- discrete tokens


@dataclass(frozen=True)
class Codebook:
    """Hold cluster centres (K, C) in feature space, for discrete tokens, the baseline for continuous ones."""

    centres: Tensor

    @classmethod
    def fit(cls, features: Tensor, count: int, seed: int = 0) -> Codebook:
        """Find the k-means centres of (..., C) features, such as the patch tokens of many images.

        Raises:
            ConfigError: there are fewer features than centres.
            NonFiniteError: a feature is NaN or infinite.
        """
        from sklearn.cluster import MiniBatchKMeans

        rows = features.detach().flatten(0, -2).float().cpu()
        if not 1 <= count <= len(rows):
            raise ConfigError(f"count must lie in 1 ... {len(rows)}, the number of features, got {count}")
        if not bool(rows.isfinite().all()):
            raise NonFiniteError("features hold NaN or infinity; compute them again")
        means = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=4096).fit(rows.numpy())
        return cls(torch.from_numpy(means.cluster_centers_).to(features))

    def encode(self, features: Tensor) -> Tensor:
        """Find the index of the nearest centre of each feature: (..., C) -> (...)."""
        if features.shape[-1] != self.centres.shape[1]:
            raise ShapeError(f"features have {features.shape[-1]} channels, the codebook {self.centres.shape[1]}")
        rows = features.flatten(0, -2).to(self.centres)
        parts = [torch.cdist(part, self.centres).argmin(1) for part in rows.split(16384)]
        return torch.cat(parts).view(features.shape[:-1])

    def decode(self, ids: Tensor) -> Tensor:
        """Look up the centres of indices: (...) -> (..., C)."""
        return self.centres[ids]
