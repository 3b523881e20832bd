"""Round features to discrete tokens, by k-means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dvt.errors import ConfigError, NonFiniteError, ShapeError


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
