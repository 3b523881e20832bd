"""Weight the tokens of shifted windows: by a test of their norm, and by their residual in a fit (ours).

An outlier has a large norm in one window and not in the next, and each patch of content is seen in only a few windows,
so a single outlier spoils their mean. Therefore, before any fit, tokens far from the ordinary token of their position
get no weight. Content of high contrast is among them; leaving it out of the fit only costs a little precision, because
the estimate keeps it. Then the residuals of the two-way model set the weights of the others (Geman-McClure).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvt import grids
from dvt.devices import upload
from dvt.fields.config import ShiftConfig
from dvt.fields.pilot import geman_mcclure, mix_channels
from dvt.fields.twoway import TwoWay
from dvt.grids import Size
from dvt.tokens import norm_bound

# Windows needed for a median over them to represent the ordinary token of a position.
_FEWEST_WINDOWS = 5
# Windows with a short token at a position needed for the median to be that of the short tokens alone.
_FEWEST_SHORT = 3
# Rounds of fitting with the current weights and computing new ones.
_ROUNDS = 2


class Trust:
    """Compute weights for the tokens of an image's windows, from a fit of the first windows.

    Args:
        tokens: (V, n, C) tokens of the first windows.
        offsets: (V, 2) offsets of these windows.
        grid, period: as :class:`~dvt.fields.twoway.TwoWay` takes them.
        config: `sigmas`, `cutoff` and `ridge` are used.
    """

    def __init__(self, tokens: Tensor, offsets: Tensor, grid: Size, period: Size, config: ShiftConfig):
        self.config, self.grid, self.period = config, grid, period
        self.mix = mix_channels(tokens, seed=0)
        sketched = self._sketch(tokens)
        self.ordinary = sketched.flatten(0, 1).median(0).values
        self.limit = norm_bound(self._length(sketched), config.sigmas)
        if len(sketched) >= _FEWEST_WINDOWS:
            self.ordinary = _median_of_short(sketched, self.is_long(tokens))
            self.limit = norm_bound(self._length(sketched), config.sigmas)
        self.fit: tuple[Tensor, Tensor, Tensor] | None = None
        for _ in range(_ROUNDS):
            self.fit = self._fitted(sketched, offsets)

    def weights(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        """Compute the weights (V, n), in [0, 1], of tokens (V, n, C) of windows at offsets (V, 2)."""
        return self._weigh(self._sketch(tokens), offsets)

    def is_long(self, tokens: Tensor) -> Tensor:
        """Tell which tokens (V, n, C) are far from the ordinary token of their position: (V, n) bool."""
        return self._length(self._sketch(tokens)) > self.limit

    def _weigh(self, sketched: Tensor, offsets: Tensor) -> Tensor:
        short = (self._length(sketched) <= self.limit).to(sketched)
        if self.fit is None:
            return short
        field, artifact, usual = self.fit
        left = (sketched - field[self._index(offsets)] - artifact).norm(dim=-1)
        return short * torch.where(usual > 0, geman_mcclure(left, usual, self.config.cutoff), 1)

    def _fitted(self, sketched: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fit F and G with the current weights; return them and the median norm of the residuals."""
        weights = self._weigh(sketched, offsets)
        sums = TwoWay(1, self.grid, self.period, sketched.shape[2], sketched)
        sums.add(sketched[None], offsets, weights[None])
        solution = sums.solve(self.config.ridge)
        field, artifact = solution.field[0].to(sketched), solution.artifact[0].to(sketched)
        left = (sketched - field[self._index(offsets)] - artifact).norm(dim=-1)
        # NaN beside a mask instead of fewer tokens, whose number a GPU would have to tell first.
        return field, artifact, left.masked_fill(weights <= 0.5, float("nan")).nanmedian()

    def _sketch(self, tokens: Tensor) -> Tensor:
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return tokens.to(dtype) @ self.mix.to(dtype)

    def _length(self, sketched: Tensor) -> Tensor:
        return (sketched - self.ordinary).norm(dim=-1)

    def _index(self, offsets: Tensor) -> Tensor:
        return upload(grids.lattice_index(self.grid, offsets, self.period), self.mix.device)


def _median_of_short(sketched: Tensor, long: Tensor) -> Tensor:
    """Take the median (n, S) over windows of tokens that are not long, or of all tokens if few are short.

    If most windows have a long token at a position, it is an artifact, and ordinary there; it is not an outlier.
    """
    short = sketched.masked_fill(long[..., None], float("nan")).nanmedian(0).values
    enough = (~long).sum(0) >= _FEWEST_SHORT
    return torch.where(enough[:, None], short, sketched.median(0).values)
