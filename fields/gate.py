"""A test whether views have an artifact at all, with a stated rate of false alarms (ours).

The views fall into groups. In each, F is eliminated exactly, so the score of the two-way model (what the tokens of a
position have beyond the mean of their content) is a linear function of the views' noise alone where there is no
artifact: independent from group to group, and as likely as its negative. Then all 2^(K-1) ways to give the K groups
signs are equally likely to make their sum the longest. An artifact is the same in all groups and makes it so with
equal signs. The test is exact for any number of tokens and any symmetric noise, heavy-tailed, correlated between
channels or neighbours; it needs noise that is independent from view to view.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dvt.errors import ConfigError
from dvt.fields.twoway import TwoWay
from dvt.grids import Size

# Random mixtures that stand for all channels; they keep squared lengths on average.
SKETCH = 64


class SignTest:
    """Scores of an image's windows in groups, by turns.

    Args:
        grid, period: as :class:`~dvt.fields.twoway.TwoWay` takes them.
        channels: C.
        like: a tensor whose device is used.
        groups: K; the least p-value is 2^(1-K), and a group needs two windows to say anything.
    """

    def __init__(self, grid: Size, period: Size, channels: int, like: Tensor, groups: int = 8):
        width = min(SKETCH, channels)
        basis = torch.randn(channels, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.mix = torch.linalg.qr(basis).Q.to(like)
        self.groups = [TwoWay(1, grid, period, width, like) for _ in range(groups)]
        self.count = 0

    def add(self, tokens: Tensor, offsets: Tensor, weights: Tensor | None = None) -> None:
        """Add windows: tokens (V, n, C), offsets (V, 2), weights (V, n) or None for 1."""
        sketched = tokens.to(self.mix) @ self.mix
        turn = (self.count + torch.arange(len(tokens))) % len(self.groups)
        for number, group in enumerate(self.groups):
            mine = turn == number
            if mine.any():
                own = None if weights is None else weights[None, mine.to(weights.device)]
                group.add(sketched[None, mine.to(sketched.device)], offsets[mine], own)
        self.count += len(tokens)

    def p_value(self) -> float:
        """The probability of an artifact as strong as this one, or stronger, where there is none.

        Raises:
            ConfigError: there are fewer than two windows for each group.
        """
        if self.count < 2 * len(self.groups):
            raise ConfigError(
                f"{self.count} windows are too few to test for an artifact in {len(self.groups)} groups of two or "
                f"more; draw at least {2 * len(self.groups)}, or do without the test (alarm=1)"
            )
        scores = torch.cat([group.score().flatten(1) for group in self.groups]).double()
        return sign_flip_p_value(scores @ scores.T)


def sign_flip_p_value(gram: Tensor) -> float:
    """The share of the 2^(K-1) choices of signs s with s' gram s at least 1' gram 1, for inner products (K, K)."""
    rest = itertools.product((1.0, -1.0), repeat=len(gram) - 1)
    signs = torch.tensor([(1.0, *each) for each in rest], dtype=gram.dtype, device=gram.device)
    lengths = ((signs @ gram) * signs).sum(-1)
    # The first choice is the observed one; rounding must not decide a tie against it.
    return float((lengths >= lengths[0] - 1e-9 * gram.diagonal().sum()).double().mean())
