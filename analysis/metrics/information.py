"""Compute the maximal information coefficient of many features at once with one position axis."""

from __future__ import annotations

import torch
from torch import Tensor

from dvt.errors import ConfigError, ShapeError

# Channels handled together: bounds the interval tables at some tens of megabytes without slowing small inputs.
_FEATURES_AT_ONCE = 64


def mic(features: Tensor, position: Tensor, exponent: float = 0.6, clumps: int = 15) -> Tensor:
    """Compute the maximal information coefficient (MIC) of each feature with one position axis.

    MIC is the largest mutual information between the two variables over all grids of a x b cells with
    a b <= B = n^exponent, divided by log min(a, b), so that any noiseless relation scores 1 and independence tends to
    0. As in ApproxMaxMI, one axis is cut into parts of equal counts and a dynamic program finds the best cuts of the
    other; both orders are tried. Equal values are never separated: they share their middle rank. All cuts between the
    distinct values of a position axis are candidates; for a feature axis that is cut into at most m parts, there are
    ``clumps * m`` candidates, evenly spread over those that separate tokens of different rows.

    Args:
        features: (n, C) one row per token.
        position: (n,) the coordinate of each token; few distinct values are expected (the grid's columns or rows).
        exponent: exponent of the bound B on the number of cells; .6 in both papers.
        clumps: number of candidate cuts per part; 15 as in the original program. A third of that takes a third of the
            time, but misses cuts, which lowers small values by up to .07 at 294 tokens.

    Returns:
        (C,) values in [0, 1]; 0 for a constant feature or position.

    Raises:
        ShapeError: the two do not have the same number of tokens, or there are fewer than 4.

    Source:
        Reshef et al., Detecting Novel Associations in Large Data Sets, Science 334, 2011, and its supplement.

    >>> x = torch.arange(8.0).repeat(8)
    >>> mic(torch.stack([-x, torch.zeros(64)], dim=1), x).tolist()
    [1.0, 0.0]
    """
    if features.ndim != 2 or position.shape != features.shape[:1] or len(position) < 4:
        raise ShapeError(
            f"features must be (n, C) and position (n,) with n >= 4, got {tuple(features.shape)} and "
            f"{tuple(position.shape)}"
        )
    if not 0 < exponent <= 1 or clumps < 1:
        raise ConfigError(f"exponent must be in (0, 1] and clumps at least 1, got {exponent} and {clumps}")
    _, codes = position.unique(return_inverse=True)
    chunks = features.detach().float().T.split(_FEATURES_AT_ONCE)
    return torch.cat([_mic_chunk(chunk.contiguous(), codes, exponent, clumps) for chunk in chunks])


def most_informative(features: Tensor, position: Tensor, count: int, exponent: float = 0.6) -> Tensor:
    """Choose the features that most likely have the largest MIC, by their information with fixed cuts.

    Both axes are cut into parts of equal counts, for every grid shape that :func:`mic` would search. This takes a
    fiftieth of the time of :func:`mic`.

    Args:
        features: (n, C) one row per token.
        position: (n,) the coordinate of each token.
        count: number of features to choose.

    Returns:
        (count,) indices of features, best first; all C indices if there are fewer features.
    """
    _, codes = position.unique(return_inverse=True)
    columns = features.detach().float().T.contiguous()
    channels, tokens = columns.shape
    rank = _middle_rank(columns.sort(dim=1).values, columns)
    position_rank = _middle_rank(codes.sort().values[None], codes[None])[0]
    bound, levels = max(tokens**exponent, 4.0), int(codes.max()) + 1
    best, ones = columns.new_zeros(channels), torch.ones_like(columns)
    for rows in range(2, int(bound / 2) + 1):
        cells = min(int(bound / rows), levels)
        if cells < 2:
            continue
        cell = _equal_parts(rank, rows, tokens) * cells + _equal_parts(position_rank, cells, tokens)
        table = (
            columns.new_zeros(channels, rows * cells).scatter_add_(1, cell, ones).unflatten(1, (rows, cells)) / tokens
        )
        outer = table.sum(1, keepdim=True) * table.sum(2, keepdim=True)
        information = torch.xlogy(table, table / outer.clamp(min=1e-12)).sum((1, 2))
        best = torch.maximum(best, information / torch.tensor(float(min(rows, cells))).log())
    return best.argsort(descending=True)[:count]


def _mic_chunk(features: Tensor, codes: Tensor, exponent: float, clumps: int) -> Tensor:
    """Compute the MIC of (C, n) features with n position codes 0 .. levels - 1."""
    channels, count = features.shape
    levels = int(codes.max()) + 1
    bound = max(count**exponent, 4.0)
    ordered, order = features.sort(dim=1)
    rank = _middle_rank(ordered, features)
    position_rank = _middle_rank(codes.sort().values[None], codes[None])[0]
    parted = ordered[:, 1:] != ordered[:, :-1]
    edge = torch.ones_like(parted[:, :1])
    tied = ~(torch.cat((edge, parted), 1) & torch.cat((parted, edge), 1))
    by_position = torch.nn.functional.one_hot(codes, levels).T.float()
    best = features.new_zeros(channels)
    for rows in range(2, int(bound / 2) + 1):
        columns = int(bound / rows)
        row_of_token = _equal_parts(rank, rows, count)
        inside = by_position @ torch.nn.functional.one_hot(row_of_token, rows).float()
        best = torch.maximum(best, _best_cuts(_from_zero(inside), min(columns, levels)))

        row_of_token = _equal_parts(position_rank, rows, count)[order]
        inside = torch.nn.functional.one_hot(row_of_token, rows).float()
        # A best cut never separates two neighbours of one row, unless one of them is several tokens of equal value.
        useful = parted & ((row_of_token[:, 1:] != row_of_token[:, :-1]) | tied[:, 1:] | tied[:, :-1])
        cuts = _spread_cuts(torch.cat((useful, edge), 1), clumps * columns)
        ends = _from_zero(inside).gather(1, cuts[..., None].expand(-1, -1, rows))
        best = torch.maximum(best, _best_cuts(ends, columns))
    return best.clamp(0, 1)


def _middle_rank(ordered: Tensor, values: Tensor) -> Tensor:
    """Rank each value of (C, n) in (0, n); equal values share the middle of their ranks."""
    return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)) / 2


def _equal_parts(rank: Tensor, parts: int, count: int) -> Tensor:
    return (rank * (parts / count)).long().clamp(max=parts - 1)


def _spread_cuts(useful: Tensor, most: int) -> Tensor:
    """Choose at most ``most`` evenly spread cuts per row, including the end: (C, k + 1) with 0 first.

    Args:
        useful: (C, n) True if a cut may come after the token; the last is true.
        most: the largest k; rows with fewer useful cuts repeat some.
    """
    seen = useful.long().cumsum(1)
    available = seen[:, -1:]
    count = min(most, int(available.max()))
    steps = torch.arange(count + 1, device=useful.device)
    wanted = (steps * available + count - 1) // count
    return torch.searchsorted(seen, wanted) + (steps > 0)


def _from_zero(counts: Tensor) -> Tensor:
    """Add a row of zeros before cumulative counts: (C, k + 1, rows)."""
    return torch.cat((torch.zeros_like(counts[:, :1]), counts.cumsum(1)), dim=1)


def _best_cuts(cumulative: Tensor, columns: int) -> Tensor:
    """Find the best normalised mutual information of 2 .. ``columns`` columns with the given rows: (C,).

    Args:
        cumulative: (C, k + 1, rows) number of tokens of each row left of each of k + 1 possible cuts, including both
            ends.
        columns: the largest number of columns.

    n times the conditional entropy H(row | column) is a sum over columns, so the best m columns that end at a cut
    follow from the best m - 1 columns that end at an earlier one.
    """
    total = cumulative.sum(-1)
    width = total[:, None, :] - total[:, :, None]
    cost = torch.xlogy(width, width.clamp(min=0))
    for row in cumulative.unbind(-1):
        inside = (row[:, None, :] - row[:, :, None]).clamp(min=0)
        cost = cost - torch.xlogy(inside, inside)
    cost = cost.masked_fill(width < 0, torch.inf)
    reached = cost[:, 0]
    whole, tokens, rows = reached[:, -1], total[:, -1], cumulative.shape[-1]
    best = torch.zeros_like(whole)
    for column in range(2, columns + 1):
        reached = (reached[:, :, None] + cost).amin(1)
        scale = torch.tensor(float(min(column, rows))).log()
        best = torch.maximum(best, (whole - reached[:, -1]) / (tokens * scale))
    return best
