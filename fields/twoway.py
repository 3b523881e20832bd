"""Sum and solve the two-way model of shifted windows, T[v, p] = F[p + offset_v] + G[p] (ours).

Windows at the image's own scale, shifted by whole patches over the mirrored image, show the same content patches at
different positions. So F has one vector per content patch and G one per position, without interpolation. F can be
eliminated exactly (its part of the normal equations is diagonal). The remaining n x n system for G depends only on
offsets and token weights: all channels share it and, without weights, so do all images of a grid shape. Beyond the
border a patch shows mirrored content, for which a network may give other tokens than for the original, so it is a
separate unknown.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dvt import grids
from dvt.devices import upload
from dvt.errors import ConfigError
from dvt.fields.equations import factor_artifact
from dvt.grids import Size


class Solution(NamedTuple):
    """F (B, M, C) of the content patches, 0 where none was seen, G (B, n, C), mean zero, and the squared norm (B,)
    that they leave of all tokens, each in float64."""

    field: Tensor
    artifact: Tensor
    left: Tensor


class TwoWay:
    """Sum over the windows of B images that share their offsets, and solve.

    Args:
        images: B, the number of images.
        grid: (h, w) patches of a window; n = h w.
        period: (rows, columns) after which the mirrored image repeats itself; M = rows * columns content patches.
        channels: C.
        like: a tensor whose device is used and whose dtype, at least float32, holds the sums.
    """

    def __init__(self, images: int, grid: Size, period: Size, channels: int, like: Tensor):
        self.grid, self.period = grid, period
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self.content = like.new_zeros(images, period[0] * period[1], channels)
        self.position = like.new_zeros(images, grid[0] * grid[1], channels)
        self.square = torch.zeros(images, dtype=torch.float64, device=like.device)
        self.offsets = torch.zeros(0, 2, dtype=torch.long)
        self.weights: Tensor | None = None
        self._built: _System | None = None

    def add(self, tokens: Tensor, offsets: Tensor, weights: Tensor | None = None) -> None:
        """Add windows of every image: tokens (B, V, n, C), offsets (V, 2), weights (B, V, n) or None for 1.

        Raises:
            ConfigError: some windows come with weights and others without.
        """
        if len(self.offsets) and (weights is None) != (self.weights is None):
            raise ConfigError("some windows have weights and others none; give weights for all of them or for none")
        tokens = tokens.to(self.content.dtype)
        weighted = tokens if weights is None else tokens * weights.to(tokens)[..., None]
        index = self._index(offsets)
        self.content.index_add_(1, index.flatten(), weighted.flatten(1, 2))
        self.position += weighted.sum(1)
        self.square += (weighted * tokens).sum((1, 2, 3), dtype=torch.float64)
        self.offsets = torch.cat((self.offsets, offsets))
        self._built = None
        if weights is not None:
            known = weights.new_zeros(len(weights), 0, weights.shape[2]) if self.weights is None else self.weights
            self.weights = torch.cat((known, weights), dim=1)

    def score(self) -> Tensor:
        """Compute the right-hand side of G's equations, (B, n, C): the positions' tokens minus their contents' means.

        Without an artifact it is a sum of noise only.
        """
        index = self._index(self.offsets)
        weights = self._weights()
        count = weights.new_zeros(len(weights), self.content.shape[1])
        count.index_add_(1, index.flatten(), weights.flatten(1))
        mean = self.content / count.clamp_min(torch.finfo(count.dtype).tiny)[..., None]
        return self.position - (mean[:, index] * weights[..., None]).sum(1)

    def equations(self) -> tuple[Tensor, Tensor]:
        """Compute each image's part, (B, n, n) and (B, n, C), of the equations of a shared artifact."""
        system = self._system()
        schur = system.schur.expand(len(self.content), -1, -1)
        return schur, self.position.double() - system.to_positions(self.content.double() * system.inverse)

    def solve(self, ridge: float, artifact: Tensor | None = None) -> Solution:
        """Solve for F and G by least squares, or for F alone if G is known.

        Args:
            ridge: ridge of G, relative to the mean diagonal of its system; it decides what the offsets leave open.
            artifact: (n, C) a known G of all images.
        """
        system = self._system()
        content, position = self.content.double(), self.position.double()
        if artifact is None:
            rhs = position - system.to_positions(content * system.inverse)
            found = system.solve(rhs, ridge)
        else:
            found = artifact.to(position).expand_as(position)
        shown = system.to_contents(found)
        field = (content - shown) * system.inverse
        # |y - A f - P g|^2 = |y|^2 - 2 x'b + x'H x, where x is (f, g) and H x is made block by block.
        gram_field = system.seen[..., None] * field + shown
        gram_artifact = system.to_positions(field) + system.count[..., None] * found
        left = self.square + (field * (gram_field - 2 * content)).sum((1, 2))
        left += (found * (gram_artifact - 2 * position)).sum((1, 2))
        return Solution(field, found, left.clamp_min(0))

    def observed(self) -> Tensor:
        """Sum the weights of each content patch over the windows, (B or 1, M)."""
        return self._system().seen

    def _index(self, offsets: Tensor) -> Tensor:
        return upload(grids.lattice_index(self.grid, offsets, self.period), self.content.device)

    def _weights(self) -> Tensor:
        ones = self.content.new_ones(1, len(self.offsets), self.position.shape[1])
        return ones if self.weights is None else self.weights.to(ones)

    def _system(self) -> _System:
        if self.weights is None:
            key = self.offsets.numpy().tobytes()
            return _shared_system(self.grid, self.period, key, str(self.content.device))
        if self._built is None:
            self._built = _System(self._index(self.offsets), self.weights.double(), self.period[0] * self.period[1])
        return self._built


class _System:
    """Hold the part of the equations without tokens, for windows' content patches (V, n) and weights (B, V, n).

    Attributes:
        seen, inverse: (B, M) and (B, M, 1) the weight of every content patch, and its reciprocal, or 0 for weight 0.
        count: (B, n) the weight of every position.
        schur: (B, n, n) the system of G after eliminating F.
    """

    def __init__(self, index: Tensor, weights: Tensor, contents: int):
        self.images, _, self.positions = weights.shape
        self.contents = contents
        image = torch.arange(self.images, device=index.device)[:, None, None]
        rows = (index + contents * image).flatten()
        columns = (torch.arange(self.positions, device=index.device) + self.positions * image).expand_as(weights)
        seen = weights.new_zeros(self.images * contents).index_add_(0, rows, weights.flatten())
        self.seen, self.count = seen.view(self.images, contents), weights.sum(1)
        self.inverse = torch.where(self.seen > 0, 1 / self.seen.clamp_min(1e-300), 0)[..., None]
        # A'WP, the weight of every content patch at every position, image by image: a sparse matrix.
        self.cross = torch.sparse_coo_tensor(
            torch.stack((rows, columns.flatten())),
            weights.flatten(),
            (self.images * contents, self.images * self.positions),
            check_invariants=False,
        ).coalesce()
        self.schur = torch.diag_embed(self.count) - self._coupling()
        self._factors: dict[float, Tensor] = {}

    def _coupling(self) -> Tensor:
        """Compute the coupling of positions (B, n, n) through the content that they show: P'WA (A'WA)^-1 A'WP."""
        rows, columns = self.cross.indices()
        shown = self.cross.values().new_zeros(self.images * self.contents, self.positions)
        shown[rows, columns % self.positions] = self.cross.values() * self.inverse.flatten()[rows]
        coupling = (self.cross.T @ shown).view(self.images, self.positions, self.positions)
        return (coupling + coupling.mT) / 2

    def to_positions(self, values: Tensor) -> Tensor:
        """Add up values (B, M, C) of content patches over the positions that showed them: (B, n, C)."""
        return self._product(self.cross.T, values, self.positions)

    def to_contents(self, values: Tensor) -> Tensor:
        """Add up values (B, n, C) of positions over the content patches that they showed: (B, M, C)."""
        return self._product(self.cross, values, self.contents)

    def _product(self, matrix: Tensor, values: Tensor, rows: int) -> Tensor:
        if self.images > 1:
            return (matrix @ values.flatten(0, 1)).view(self.images, rows, -1)
        # One system for all images: they are handled side by side, as more channels.
        side = values.transpose(0, 1).flatten(1)
        return (matrix @ side).view(rows, len(values), -1).transpose(0, 1)

    def solve(self, rhs: Tensor, ridge: float) -> Tensor:
        """Solve schur g = rhs for g (B, n, C), mean zero."""
        if ridge not in self._factors:
            self._factors[ridge] = factor_artifact(self.schur, ridge)
        artifact = torch.cholesky_solve(rhs, self._factors[ridge].expand(len(rhs), -1, -1))
        return artifact - artifact.mean(-2, keepdim=True)


@lru_cache(maxsize=8)
def _shared_system(grid: Size, period: Size, offsets: bytes, device: str) -> _System:
    """Build the system of unweighted windows, which depends only on the offsets."""
    windows = torch.frombuffer(bytearray(offsets), dtype=torch.long).view(-1, 2)
    index = grids.lattice_index(grid, windows, period).to(device)
    return _System(index, torch.ones(1, *index.shape, dtype=torch.float64, device=device), period[0] * period[1])
