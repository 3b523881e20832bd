"""Test if windows have an artifact, with a given false alarm rate (ours).

The image's content is divided at random (with a fixed seed) into K groups of small blocks. For each group the score of
the two-way model is computed: for each position, the sum of its tokens minus the means of their contents. Without an
artifact a score is a linear function of noise alone, so it is independent between groups and as likely as its negative:
of the 2^(K-1) choices of signs for the groups, each is equally likely to give the longest sum. An artifact is the same
for all contents, so it makes the sum with equal signs the longest.

The test is exact for symmetric noise that is independent between contents, whatever its size, tails and correlations
between channels or windows. It also distinguishes an artifact from the influence of a window's other content on a
token, because that differs between contents. If this influence is strong, the groups' scores are negatively correlated
(all content of a window shifts together, and each position's mean is subtracted). Then false alarms are rarer than
stated, and a weak artifact is missed: one of a tenth of the tokens' size, in about half of the images of a ViT without
position embedding.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dvt import grids
from dvt.devices import upload
from dvt.grids import Size

# Number of random projections that represent all channels; they keep squared lengths on average.
TEST_CHANNELS = 64
# Patches along the side of a block. A network's noise is correlated between neighbours, so they should share a group.
BLOCK = 2


class SignTest:
    """Collect the scores of an image's windows by groups of content, and test them.

    Args:
        grid, period: as :class:`~dvt.fields.twoway.TwoWay` takes them.
        channels: C.
        like: a tensor whose device is used.
        groups: K, at most the number of patches of the grid. The smallest p-value is 2^(1-K): if the false alarm rate
            is lower than that, the test cannot find an artifact.
    """

    def __init__(self, grid: Size, period: Size, channels: int, like: Tensor, groups: int = 8):
        self.grid, self.period = grid, period
        groups = min(groups, grid[0] * grid[1])
        blocks = (grids.lattice_blocks(period, side, groups) for side in (BLOCK, 1))
        self.group = upload(next(group for group in blocks if len(group.unique()) == groups), like.device)
        width = min(TEST_CHANNELS, channels)
        basis = torch.randn(channels, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.mix = upload(torch.linalg.qr(basis).Q.to(like.dtype), like.device)
        self.content = self.mix.new_zeros(period[0] * period[1], width)
        self.position = self.mix.new_zeros(groups * grid[0] * grid[1], width)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def add(self, tokens: Tensor, offsets: Tensor, weights: Tensor | None = None) -> None:
        """Add windows: tokens (V, n, C), offsets (V, 2), weights (V, n) or None for 1."""
        index = upload(grids.lattice_index(self.grid, offsets, self.period), self.mix.device)
        weights = self.mix.new_ones(index.shape) if weights is None else weights.to(self.mix)
        sketched = (tokens.to(self.mix) @ self.mix * weights[..., None]).flatten(0, 1)
        self.content.index_add_(0, index.flatten(), sketched)
        self.position.index_add_(0, self._place(index).flatten(), sketched)
        self.seen.append((index, weights))

    def p_value(self) -> float:
        """Compute the p-value: the probability, without an artifact, of a sum at least as long as the observed one."""
        index, weights = (torch.cat(part) for part in zip(*self.seen, strict=True))
        count = weights.new_zeros(len(self.content)).index_add_(0, index.flatten(), weights.flatten())
        mean = self.content / count.clamp_min(torch.finfo(count.dtype).tiny)[:, None]
        expected = (mean[index] * weights[..., None]).flatten(0, 1)
        score = self.position.index_add(0, self._place(index).flatten(), expected, alpha=-1)
        score = score.view(-1, index.shape[1] * mean.shape[1]).double()
        return sign_flip_p_value(score @ score.T)

    def _place(self, index: Tensor) -> Tensor:
        """Compute each token's row of `position`, (V, n), from its content's group and its position."""
        return self.group[index] * index.shape[1] + torch.arange(index.shape[1], device=index.device)


def sign_flip_p_value(gram: Tensor) -> float:
    """Compute the share of the 2^(K-1) choices of signs s with s' gram s >= 1' gram 1, for a Gram matrix (K, K).

    >>> sign_flip_p_value(torch.ones(4, 4)), sign_flip_p_value(torch.eye(4))
    (0.125, 1.0)
    """
    rest = itertools.product((1.0, -1.0), repeat=len(gram) - 1)
    signs = upload(torch.tensor([(1.0, *each) for each in rest], dtype=gram.dtype), gram.device)
    lengths = ((signs @ gram) * signs).sum(-1)
    # The first choice is the observed one; rounding must not decide a tie against it.
    return float((lengths >= lengths[0] - 1e-9 * gram.diagonal().sum()).double().mean())
