"""Find outlier tokens of a defect: they have one direction, are far longer than other tokens, or normal (ours).

A defect is searched for in the tokens alone, before any fit, because a fit that already contains it cannot distinguish
it from content. Long tokens are not sufficient, because real content of high contrast also has them. Two more
properties distinguish a defect: its tokens share one direction, and there are no tokens between them and the others,
whereas content, seen in views of many scales, takes all values between a high and a low one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

# Cosine to the common direction from which a candidate is of the defect: its own content turns it away a little.
ALIGNED = 0.8
# Tokens whose length along the direction lies in this range, in defects' lengths, lie in the gap.
GAP = (0.3, 0.6)
# Most tokens in the gap, for each token of the defect: photographs' content has .2 to .9, planted defects under .1.
IN_GAP = 0.1
# Least size of a defect, in the median length of tokens less what is ordinary.
LARGE = 1.5
# Where a token counts as the defect's, in defects' lengths: in the gap.
CUT = 0.5
# Refinements of the direction, each by the tokens that the last one aligned.
ROUNDS = 3
# Fewest tokens of a defect.
FEWEST = 8
# Neighbours that a token is held against, and the shares of longest differences among which a direction is sought.
PARTNERS = 3
TOPS = (0.003, 0.01, 0.03, 0.1)
# Least share of these that must point one way.
CONCERTED = 0.5
# Views from which a median over them stands for what a position holds.
FEWEST_VIEWS = 5
# Views without the defect from which what is usual at a position is theirs.
FEWEST_LOW = 3


@dataclass(frozen=True)
class Gate:
    """Recognise the tokens of a defect one by one.

    Args:
        along: (C,) the defect's direction over its size.
        middle: product of `along` with an ordinary token.
    """

    along: Tensor
    middle: float

    def __call__(self, raw: Tensor) -> Tensor:
        """Mark (..., 1) by 1 a token (..., C) of the defect and 0 for others."""
        along = raw @ self.along.to(raw) - self.middle
        return (along >= CUT).to(raw)[..., None]


def direction_of_jumps(raw: Tensor, ordinary: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the direction along which tokens of almost one image point differ, all or nothing, in each of B images.

    Content changes little between such tokens, and if it does, some tokens lie between its two values. The ordinary
    token can change abruptly, from a position of mostly sky to one of mostly ground, so a jump must also be one of the
    raw tokens.

    Args:
        raw: (B, N, S) tokens.
        ordinary: (B, N, S) the ordinary tokens of their positions.
        near: (B, N, k) indices of each token's nearest tokens, itself first.

    Returns:
        direction (B, S), size (B,) and found (B,) bool. Nothing here waits for a GPU.
    """
    tokens = raw - ordinary
    other = near[..., 1 : 1 + PARTNERS]
    one = torch.arange(tokens.shape[1], device=near.device)[:, None].expand_as(other)
    pair = torch.stack((one.flatten(1), other.flatten(1)))
    # From the shorter to the longer: a defect adds.
    norm = tokens.norm(dim=-1)
    pair = torch.where(_at(norm, pair).diff(dim=0) < 0, pair.flip(0), pair)
    start, end = (tokens.gather(1, each[..., None].expand(-1, -1, tokens.shape[-1])) for each in pair)
    jumps = end - start
    length = jumps.norm(dim=-1)
    descending = length.sort(dim=-1, descending=True).values
    tops = [length > descending[:, int(share * (length.shape[1] - 1)), None] for share in TOPS]
    trials = [_trial(tokens, raw, pair, jumps, long) for long in tops]
    directions, sizes, blurred = (torch.stack(part) for part in zip(*trials, strict=True))
    best = torch.where(sizes >= LARGE * norm.median(-1).values, blurred, torch.inf).min(0)
    image = torch.arange(len(tokens), device=tokens.device)
    return directions[best.indices, image], sizes[best.indices, image], best.values <= IN_GAP


def _trial(tokens: Tensor, raw: Tensor, pair: Tensor, jumps: Tensor, long: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find direction (B, S) and size (B,) of long jumps, and the share (B,) of unclear ones; inf without jumps."""
    direction, member = _aligned(jumps, long)
    size = _median((jumps @ direction[..., None])[..., 0], member)
    low, high = _at((tokens @ direction[..., None])[..., 0], pair)
    # The defects' own length: jumps between two of them, and such as content makes, are left out.
    size = _median(high, (low < CUT * size[:, None]) & (high >= CUT * size[:, None]))
    low, high = low / size[:, None], high / size[:, None]
    rise = _at((raw @ direction[..., None])[..., 0], pair).diff(dim=0)[0] / size[:, None]
    across = (low < CUT) & (high >= CUT)
    blurred = across & ((low > GAP[0]) | (high < GAP[1]) | (rise < CUT))
    enough = (across.sum(-1) >= FEWEST) & (member.sum(-1) >= CONCERTED * long.sum(-1))
    return direction, size, torch.where(enough, blurred.sum(-1) / across.sum(-1), torch.inf)


def _at(values: Tensor, pair: Tensor) -> Tensor:
    """Gather the values (B, N) at both ends of pairs (2, B, P)."""
    return torch.stack([values.gather(1, each) for each in pair])


def _median(values: Tensor, chosen: Tensor) -> Tensor:
    """Take the median (B,) of the chosen values among (B, N); NaN if none is chosen."""
    return values.masked_fill(~chosen, float("nan")).nanmedian(-1).values


def _aligned(vectors: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
    """Find the direction (B, C) that most long vectors of (B, N, C) share, and mark (B, N) those that do."""
    unit = nnf.normalize(vectors, dim=-1)
    chosen = unit * long[..., None]
    direction = torch.linalg.eigh(chosen.mT @ chosen).eigenvectors[..., -1]
    sign = torch.where((chosen @ direction[..., None]).sum((1, 2)) < 0, -1, 1)
    direction, member = direction * sign[:, None], long
    for _ in range(ROUNDS):
        member = long & ((unit @ direction[..., None])[..., 0] > ALIGNED)
        direction = nnf.normalize(torch.einsum("bn,bnc->bc", member.to(vectors), vectors), dim=-1)
    return direction, member


class Screen:
    """Give weight 0 to the tokens of a defect, which is found in the first views of B images, and 1 to others.

    The ordinary token of a position is the median over the views, so an artifact of position is not a defect. Once the
    direction is known, it is the median over views without the defect: where many views of a position show a flat
    region, defects would raise it.

    Args:
        first: (B, V, n, S) the first views' projected tokens.
        near: (B, V n, k) indices of each token's nearest tokens.
    """

    def __init__(self, first: Tensor, near: Tensor):
        over = first if first.shape[1] >= FEWEST_VIEWS else first.flatten(1, 2)[:, :, None]
        self._ordinary = over.median(1, keepdim=True).values
        ordinary = self._ordinary.expand_as(first)
        direction, size, found = direction_of_jumps(first.flatten(1, 2), ordinary.flatten(1, 2), near)
        # Where there is none, no token lies along nothing.
        self.per_size = torch.where(found[:, None], direction / size[:, None], 0)
        usual = torch.einsum("bpns,bs->bpn", self._ordinary, self.per_size)
        self.middle = usual.flatten(1).median(1).values
        along = torch.einsum("bvns,bs->bvn", first, self.per_size)
        self._level = self._without_defects(usual, along)
        self.first = (along - self._level < CUT).to(first)

    def _without_defects(self, usual: Tensor, along: Tensor) -> Tensor:
        """Find what is usual (B, 1, n) along the direction in views that do not show the defect at a position.

        A position that is far along in nearly every view has an artifact, and keeps it.
        """
        low = along < self.middle[:, None, None] + CUT
        of_low = along.masked_fill(~low, float("nan")).nanmedian(1, keepdim=True).values
        return torch.where(low.sum(1, keepdim=True) >= FEWEST_LOW, of_low, usual)

    def weights(self, image: int, tokens: Tensor) -> Tensor:
        """Compute the weights (V, n) of an image's tokens (V, n, S), projected as `first`."""
        return (tokens @ self.per_size[image] - self._level[image] < CUT).to(tokens)
