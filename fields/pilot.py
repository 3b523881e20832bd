"""A robust pilot fit on the first views: it chooses resolution and smoothness and knows an outlier token (ours).

Every channel is mixed into a few random projections, which keep squared lengths on average, so the pilot costs little.
Its fit is what every later token is held against: robust weights need no second pass over the views.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from dvt import grids
from dvt.fields.equations import NormalEquations
from dvt.grids import Size

if TYPE_CHECKING:
    from dvt.fields.linear import LinearConfig

# Random projections that stand for all channels.
SKETCH = 32
# Nodes along the shorter side up to which a resolution is affordable: the cost grows with the fourth power.
FINEST = 112
# Values of lambda that are tried.
SMOOTHNESS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# One view in so many is held out.
HELD_OUT = 5
# Tokens at nearby image points, the token itself among them.
NEIGHBOURS = 9
# The smoothness at which weights and the artifact are found, before one is chosen.
MIDDLE = 0.1


class Pilot:
    """A fit of sketched tokens.

    Args:
        batches: the first views, (tokens (V, n, C), coords (V, n, 2)).
        grid: (h, w) of a view, n = h w.
        config: resolution and smoothness may be None; they are chosen then.
        known: (n, C) artifact, or None to fit it.

    Attributes:
        resolution, smoothness: as given or chosen, by the squared error on held-out views.
        error: mean squared norm of what a fit leaves of inlying tokens of views that it has not seen.
    """

    def __init__(self, batches: list[tuple[Tensor, Tensor]], grid: Size, config: LinearConfig, known: Tensor | None):
        self.config = config
        self.mix = _mix(batches[0][0], config.seed)
        self.tokens = torch.cat([self.sketch(tokens) for tokens, _ in batches])
        self.coords = torch.cat([coords for _, coords in batches]).to(self.tokens)
        points = self.coords.reshape(-1, 2).cpu().numpy()
        count = min(NEIGHBOURS, len(points))
        self._tree = cKDTree(points)
        self._neighbours = self._tree.query(points, k=count)[1].reshape(len(points), count)
        artifact = None if known is None else self.sketch(known)
        if artifact is None and len(self.tokens) == 1:
            artifact = torch.zeros_like(self.tokens[0])
        self._token_weights = self.tokens.new_ones(self.tokens.shape[:2])
        held = torch.arange(len(self.tokens), device=self.tokens.device) % HELD_OUT == HELD_OUT // 2
        self.resolution, self.smoothness, self.error = self._choose(grid, artifact, held)
        everything = torch.ones_like(held)
        equations = self._equations(everything, self.resolution)
        self.field, self.artifact = equations.solve(self.smoothness, artifact, config.ridge)
        self.usual = self._usual(grid)

    def sketch(self, tokens: Tensor) -> Tensor:
        """(..., C) tokens or nodes mixed into (..., S)."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return tokens.to(dtype) @ self.mix.to(dtype)

    def left(self, sketched: Tensor, coords: Tensor) -> Tensor:
        """What F and G leave of sketched tokens (V, n, S)."""
        return _left(sketched, coords, self.field, self.artifact, self.resolution)

    def weights(self, tokens: Tensor, coords: Tensor) -> Tensor:
        """Robust weights (V, n) of tokens (V, n, C); all 1 where the pilot leaves nothing."""
        if not self.usual.any():
            return torch.ones(tokens.shape[:2], device=tokens.device)
        coords = coords.to(self.tokens)
        left = self.left(self.sketch(tokens), coords).norm(dim=-1)
        return geman_mcclure(left, grids.sample(self.usual, coords)[..., 0], self.config.cutoff)

    def _usual(self, grid: Size) -> Tensor:
        """(rows, columns, 1) norm that a fit usually leaves of a token near each node, at least the global median."""
        left = self.left(self.tokens, self.coords).norm(dim=-1)
        rows, columns = node_resolution(grid, 2 * min(grid) + 1)
        _, near = self._tree.query(grids.node_coords((rows, columns)).view(-1, 2).numpy(), k=self._neighbours.shape[1])
        local = self._local(left, near.reshape(rows * columns, -1), 2)
        return local.clamp_min(left.median()).view(rows, columns, 1)

    def noise(self, field: Tensor, artifact: Tensor) -> float:
        """Half the squared difference of what F and G (all channels) leave of two tokens at almost one image point.

        Neighbours come from different views, so what they share is the field's own error and cancels (the nugget of
        the residuals' variogram, in geostatistics). The median makes it blind to outlier tokens.
        """
        left = _left(self.tokens, self.coords, self.sketch(field), self.sketch(artifact), self.resolution)
        left = left.flatten(0, 1)
        if len(left) < 2:
            return float(left.square().sum())
        near = torch.as_tensor(self._neighbours[:, 1], device=left.device)
        return float((left - left[near]).square().sum(-1).median() / 2)

    def _choose(self, grid: Size, artifact: Tensor | None, held: Tensor) -> tuple[Size, float, float]:
        """Resolution, smoothness and held-out error.

        The artifact and the weights hardly depend on the first two: they are found once, at a middle resolution. The
        sum of squared differences of neighbouring nodes is the integral of |grad F|^2 at every resolution (in two
        dimensions), so the best smoothness at one is the best at all.
        """
        config = self.config
        sizes = _candidates(grid, self.coords[..., 0].numel()) if config.resolution is None else [config.resolution]
        choices = SMOOTHNESS if config.smoothness is None else (config.smoothness,)
        middle, *others = (node_resolution(grid, size) for size in sizes)
        if not held.any():
            return middle, choices[len(choices) // 2], 0.0
        if config.robust:
            self._reweigh(~held, artifact, middle)
        _, artifact = self._equations(~held, middle).solve(MIDDLE, artifact, config.ridge)

        def error(resolution: Size, smoothness: float) -> float:
            field, _ = self._equations(~held, resolution).solve(smoothness, artifact)
            left = _left(self.tokens[held], self.coords[held], field, artifact, resolution).square().sum(-1)
            return float((left * self._token_weights[held]).sum() / self._token_weights[held].sum())

        best, smoothness = min((error(middle, value), value) for value in choices)
        best, resolution = min([(best, middle), *((error(other, smoothness), other) for other in others)])
        return resolution, smoothness, best

    def _reweigh(self, views: Tensor, artifact: Tensor | None, resolution: Size) -> None:
        """Robust weights (V, n) of all tokens, from a plain fit of some views."""
        fit = self._equations(views, resolution).solve(MIDDLE, artifact, self.config.ridge)
        odd = self._oddity(_left(self.tokens, self.coords, *fit, resolution))
        if odd.median() > 0:
            # The second least: up to seven outliers among nine neighbours do not raise what is usual there.
            usual = self._local(odd, self._neighbours, 2).view_as(odd).clamp_min(odd.median())
            self._token_weights = geman_mcclure(odd, usual, self.config.cutoff)

    def _oddity(self, left: Tensor) -> Tensor:
        """(V, n) distance of what is left of a token from the median of its neighbours in the image.

        Detail that the field is too coarse for is shared by the neighbours, which come from other views; an outlier is
        alone. So detail is not mistaken for outliers.
        """
        return (left - self._local(left, self._neighbours, (NEIGHBOURS + 1) // 2).view_as(left)).norm(dim=-1)

    def _local(self, values: Tensor, near: np.ndarray, rank: int) -> Tensor:
        """(M, ...) the rank-th least of the tokens' values (V, n, ...) over neighbours (M, k)."""
        near_values = values.flatten(0, 1)[torch.as_tensor(near, device=values.device)]
        return near_values.kthvalue(min(rank, near.shape[1]), dim=1).values

    def _equations(self, views: Tensor, resolution: Size) -> NormalEquations:
        tokens = self.tokens[views]
        equations = NormalEquations(resolution, tokens.shape[1], tokens.shape[2], tokens)
        equations.add(tokens, self.coords[views], self._token_weights[views])
        return equations


def geman_mcclure(norm: Tensor, scale: Tensor | float, cutoff: float) -> Tensor:
    """Weights in (0, 1] of residuals of some norm: 1 / (1 + (norm / (cutoff scale))^2)^2."""
    return (1 + (norm / (cutoff * scale)).square()).pow(-2)


def node_resolution(grid: Size, shorter: int) -> Size:
    """(rows, columns) of nodes with `shorter` along the grid's shorter side and equal spacing in patches."""
    rows, columns = (max(2, round((shorter - 1) * side / min(grid)) + 1) for side in grid)
    return rows, columns


def _candidates(grid: Size, tokens: int) -> list[int]:
    """Numbers of nodes along the shorter side that are tried; smoothness is chosen at the first.

    Four a patch, or as many as are affordable; then two, and six if there are two tokens for every node. Spread from
    border to border, that many do not fall on the whole image's patch centres, where a bilinear fit is worst.
    """
    first = next((multiple for multiple in (4, 3) if multiple * min(grid) <= FINEST), 2)
    rows, columns = node_resolution(grid, 6 * min(grid))
    fine = [6] if min(rows, columns) <= FINEST and 2 * rows * columns <= tokens else []
    return [multiple * min(grid) for multiple in dict.fromkeys((first, 2, *fine))]


def _left(sketched: Tensor, coords: Tensor, field: Tensor, artifact: Tensor, resolution: Size) -> Tensor:
    nodes = field.view(*resolution, -1).to(sketched)
    return sketched - artifact.to(sketched) - grids.sample(nodes, coords)


def _mix(tokens: Tensor, seed: int) -> Tensor:
    """(C, S) orthonormal columns, scaled so that the squared length of a token is kept on average."""
    channels = tokens.shape[-1]
    width = min(SKETCH, channels)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(channels, width, generator=generator, dtype=torch.float64)).Q
    return (basis * (channels / width) ** 0.5).to(tokens.device)
