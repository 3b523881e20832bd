"""Find out which grid a file's position embedding was made for; files hold the number of positions only."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from torch import Tensor

from dvt.backbones import families
from dvt.errors import WeightsError
from dvt.grids import Size

logger = logging.getLogger(__name__)

_TABLES = (
    "pos_embed",
    "embeddings.position_embeddings",
    "embeddings.position_embedding.weight",
    "visual.positional_embedding",
    "positional_embedding",
)
_LIKELY, _CLEARLY = 0.7, 0.5  # factors by which a grid's roughness is below others', to take it and to insist on it


def grid_of_weights(model: families.Model, state: Mapping[str, Tensor], asked: Size | None, source: str) -> Size | None:
    """Find the grid (h, w) of the position embedding in a file, if it is not what timm takes it for.

    timm takes a table of n positions for the model's own grid, or for a square one. Another grid with n positions
    (5 x 20 beside 10 x 10) would be read wrongly in silence. Trained embeddings change slowly along columns, so the
    table itself tells the grids apart.

    Args:
        model: built by timm, at its own size.
        state: the file's tensors.
        asked: the grid that the user's input size gives, if one was given.
        source: the name of the file in messages.

    Returns:
        The grid, or None if timm reads the table rightly, or there is none.

    Raises:
        WeightsError: the table is one of a grid that is neither asked for nor what timm takes it for.
    """
    table = next((state[name] for name in _TABLES if name in state and state[name].is_floating_point()), None)
    if table is None or not hasattr(families.embedding(model), "grid_size"):
        return None
    rows = table.reshape(-1, table.shape[-1])
    own = families.pair(tuple(families.embedding(model).grid_size))
    counts = _patch_counts(model, own, len(rows))
    if asked is not None and math.prod(asked) in counts:
        patches, other = rows[-math.prod(asked) :], own if _same(own, asked) else _square(math.prod(asked))
        if other not in (None, asked):
            return _decided(patches, asked, other, source)
        _check_taken(patches, asked, families.patch_size(model), source)
        return asked
    squares = [square for square in map(_square, counts) if square is not None]
    taken = own if math.prod(own) in counts else squares[0] if squares else None
    if taken is not None:
        _check_taken(rows[-math.prod(taken) :], taken, families.patch_size(model), source)
    return None


def _patch_counts(model: families.Model, own: Size, rows: int) -> list[int]:
    """List the numbers of patches that a table can hold: without positions of prefix tokens, or without one."""
    table = getattr(families.core(model), "pos_embed", None)
    prefix = 0 if not isinstance(table, Tensor) else table.shape[-2] - math.prod(own)
    return [rows - count for count in dict.fromkeys((prefix, 1))]


def _same(grid: Size | None, other: Size) -> bool:
    return grid is not None and math.prod(grid) == math.prod(other)


def _square(count: int) -> Size | None:
    side = math.isqrt(max(count, 0))
    return (side, side) if side and side * side == count else None


def _decided(patches: Tensor, asked: Size, other: Size, source: str) -> Size | None:
    """Choose between the grid asked for and the one that timm takes a table of as many positions for."""
    ratio = _roughness(patches, asked) / max(_roughness(patches, other), 1e-12)
    found = asked if ratio <= 1 / _LIKELY else None
    logger.warning(
        "%s: its %d positions fit a grid of %s and one of %s; taken as %s, %s",
        source,
        len(patches),
        _text(asked),
        _text(other),
        _text(found or other),
        "because of the size asked for" if _LIKELY < ratio <= 1 / _LIKELY else "whose rows are alike",
    )
    return found


def _check_taken(patches: Tensor, taken: Size, patch: Size, source: str) -> None:
    """Refuse a table that is clearly of another grid than timm takes it for."""
    count = len(patches)
    others = [(h, count // h) for h in range(2, count // 2 + 1) if count % h == 0 and h != taken[0]]
    if min(taken) < 2 or not others:
        return
    best = min(others, key=lambda grid: _roughness(patches, grid))
    if _roughness(patches, best) < _CLEARLY * min(1, _roughness(patches, taken)):
        size = best[0] * patch[0], best[1] * patch[1]
        raise WeightsError(
            f"the {count} positions in {source} look like a grid of {_text(best)}, not of {_text(taken)}: load them "
            f"with size={size}, the input size that they were made for"
        )


def _roughness(patches: Tensor, grid: Size) -> float:
    """Compare the change from row to row of a table (h w, C) with that from the end of a row to the next one's start.

    Both are mean squares; the ratio is far below 1 for the right grid of a trained table, and about 1 for noise.
    """
    maps = patches.float().view(*grid, -1)
    down, jumps = maps.diff(dim=0).square().mean(), (maps[1:, 0] - maps[:-1, -1]).square().mean()
    ratio = float(down / jumps.clamp_min(1e-12))
    return ratio if math.isfinite(ratio) else math.inf


def _text(grid: Size) -> str:
    return f"{grid[0]} x {grid[1]}"
