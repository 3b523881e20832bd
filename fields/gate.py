"""A test whether windows have an artifact at all, with a stated rate of false alarms (ours).

The image's content is divided into groups of small blocks, by a fixed draw. In each group the score of the two-way
model (what the tokens of a position have beyond the mean of their content) is a linear function of noise alone where
there is no artifact: independent from group to group, and as likely as its negative. Then all 2^(K-1) ways to give the
K groups signs are equally likely to make their sum the longest. An artifact is the same for all contents and makes it
so with equal signs. The test is exact for symmetric noise that is independent between contents, whatever its size and
tails and however its channels or windows go together; and it tells an artifact from what a window's other content does
to a token, which differs from content to content. Where that is strong, groups go against each other (all content of a
window shifts together and each position's mean is taken out), so false alarms become rarer than stated, and a weak
artifact is missed: a tenth of the tokens' size in about half of the images of a ViT without position embedding.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dvt import grids
from dvt.grids import Size

# Random mixtures that stand for all channels; they keep squared lengths on average.
TEST_CHANNELS = 64
# Patches along the side of a block. A network's noise goes together in neighbours: they should share a group.
BLOCK = 2


class SignTest:
    """Scores of an image's windows by groups of content.

    Args:
        grid, period: as :class:`~dvt.fields.twoway.TwoWay` takes them.
        channels: C.
        like: a tensor whose device is used.
        groups: K, or as many as the grid has patches, if these are fewer. The least p-value is 2^(1-K): where it is
            above the rate of false alarms, the test finds no artifact, whatever the tokens.
    """

    def __init__(self, grid: Size, period: Size, channels: int, like: Tensor, groups: int = 8):
        self.grid, self.period = grid, period
        groups = min(groups, grid[0] * grid[1])
        blocks = (grids.lattice_blocks(period, side, groups) for side in (BLOCK, 1))
        self.group = next(group for group in blocks if len(group.unique()) == groups).to(like.device)
        width = min(TEST_CHANNELS, channels)
        basis = torch.randn(channels, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.mix = torch.linalg.qr(basis).Q.to(like)
        self.content = self.mix.new_zeros(period[0] * period[1], width)
        self.position = self.mix.new_zeros(groups * grid[0] * grid[1], width)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def add(self, tokens: Tensor, offsets: Tensor, weights: Tensor | None = None) -> None:
        """Add windows: tokens (V, n, C), offsets (V, 2), weights (V, n) or None for 1."""
        index = grids.lattice_index(self.grid, offsets, self.period).to(self.mix.device)
        weights = self.mix.new_ones(index.shape) if weights is None else weights.to(self.mix)
        sketched = (tokens.to(self.mix) @ self.mix * weights[..., None]).flatten(0, 1)
        self.content.index_add_(0, index.flatten(), sketched)
        self.position.index_add_(0, self._place(index).flatten(), sketched)
        self.seen.append((index, weights))

    def p_value(self) -> float:
        """Compute the probability of an artifact at least as strong as this one where there is none."""
        index, weights = (torch.cat(part) for part in zip(*self.seen, strict=True))
        count = weights.new_zeros(len(self.content)).index_add_(0, index.flatten(), weights.flatten())
        mean = self.content / count.clamp_min(torch.finfo(count.dtype).tiny)[:, None]
        expected = (mean[index] * weights[..., None]).flatten(0, 1)
        score = self.position.index_add(0, self._place(index).flatten(), expected, alpha=-1)
        score = score.view(-1, index.shape[1] * mean.shape[1]).double()
        return sign_flip_p_value(score @ score.T)

    def _place(self, index: Tensor) -> Tensor:
        """Find the row (V, n) of `position` for each token: its content's group, then its position."""
        return self.group[index] * index.shape[1] + torch.arange(index.shape[1], device=index.device)


def sign_flip_p_value(gram: Tensor) -> float:
    """Compute the share of the 2^(K-1) choices of signs s with s' gram s at least 1' gram 1, for products (K, K).

    >>> sign_flip_p_value(torch.ones(4, 4)), sign_flip_p_value(torch.eye(4))
    (0.125, 1.0)
    """
    rest = itertools.product((1.0, -1.0), repeat=len(gram) - 1)
    signs = torch.tensor([(1.0, *each) for each in rest], dtype=gram.dtype, device=gram.device)
    lengths = ((signs @ gram) * signs).sum(-1)
    # The first choice is the observed one; rounding must not decide a tie against it.
    return float((lengths >= lengths[0] - 1e-9 * gram.diagonal().sum()).double().mean())
