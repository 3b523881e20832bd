"""Which tokens of shifted windows to trust: a plain test of their length, and what a fit leaves of them (ours).

A flickering outlier is long in one window and not in the next, and a content patch is seen in a few windows only: their
mean is lost to a single one. So what is long beside what is ordinary at its position gets no weight before anything is
fitted; content of high contrast is among it, whose loss costs a little precision and no more, because it is kept in
the estimate. Then what the two-way model leaves of the others sets their weights (Geman-McClure).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvt import grids
from dvt.fields.config import ShiftConfig
from dvt.fields.pilot import geman_mcclure, mix_channels
from dvt.fields.twoway import TwoWay
from dvt.grids import Size
from dvt.tokens import norm_bound

# Windows from which a median over them stands for what a position holds.
_FEWEST_WINDOWS = 5
# Windows in which a position's token is short, from which its median is theirs alone.
_FEWEST_SHORT = 3
# Times that weights are found from a fit with the last ones.
_ROUNDS = 2


class Trust:
    """Weights for the tokens of an image's windows, learnt from its first ones.

    Args:
        tokens: (V, n, C) of the first windows.
        offsets: (V, 2) theirs.
        grid, period: as :class:`~dvt.fields.twoway.TwoWay` takes them.
        config: `sigmas` and `cutoff` are read.
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
        """Weigh tokens (V, n, C) of windows at offsets (V, 2): (V, n) in [0, 1]."""
        return self._weigh(self._sketch(tokens), offsets)

    def is_long(self, tokens: Tensor) -> Tensor:
        """Tell which tokens (V, n, C) are long beside what is ordinary at their position: (V, n) bool."""
        return self._length(self._sketch(tokens)) > self.limit

    def _weigh(self, sketched: Tensor, offsets: Tensor) -> Tensor:
        short = (self._length(sketched) <= self.limit).to(sketched)
        if self.fit is None:
            return short
        field, artifact, usual = self.fit
        left = (sketched - field[self._index(offsets)] - artifact).norm(dim=-1)
        return short * torch.where(usual > 0, geman_mcclure(left, usual, self.config.cutoff), 1)

    def _fitted(self, sketched: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fit F and G to what is trusted so far; with the norm that they usually leave of it."""
        weights = self._weigh(sketched, offsets)
        sums = TwoWay(1, self.grid, self.period, sketched.shape[2], sketched)
        sums.add(sketched[None], offsets, weights[None])
        solution = sums.solve(self.config.ridge)
        field, artifact = solution.field[0].to(sketched), solution.artifact[0].to(sketched)
        left = (sketched - field[self._index(offsets)] - artifact).norm(dim=-1)
        return field, artifact, left[weights > 0.5].median()

    def _sketch(self, tokens: Tensor) -> Tensor:
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return tokens.to(dtype) @ self.mix.to(dtype)

    def _length(self, sketched: Tensor) -> Tensor:
        return (sketched - self.ordinary).norm(dim=-1)

    def _index(self, offsets: Tensor) -> Tensor:
        return grids.lattice_index(self.grid, offsets, self.period).to(self.mix.device)


def _median_of_short(sketched: Tensor, long: Tensor) -> Tensor:
    """Take the median (n, S) over windows of tokens that are not long, or of all tokens where few are short.

    Where most windows have a long token, that is an artifact and ordinary there; an outlier is not.
    """
    short = sketched.masked_fill(long[..., None], float("nan")).nanmedian(0).values
    enough = (~long).sum(0) >= _FEWEST_SHORT
    return torch.where(enough[:, None], short, sketched.median(0).values)
