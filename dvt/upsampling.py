"""Upsample token maps to a finer grid, guided by their image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dvt import grids
from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.grids import Size
from dvt.views import resize

ROUNDS = 6
CONTRAST = 0.3
_TILE = 640  # cells per side; one tile with its border is held in memory beside the result
_FLOATS = 1 << 21  # values filtered at once; of more, arrays leave the cache, and glibc maps each anew, page by page
_BAND = 1 << 19  # values of a filter's result that are added up together, while they are in the processor's cache
_LEAST_RANGE = 0.01  # smallest range of the filter, for a flat image, in units of lightness
_NEIGHBOURS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]


def upsample(
    tokens: Tensor,
    image: Tensor,
    factor: int | None = None,
    *,
    size: Size | None = None,
    centres: Tensor | None = None,
    rounds: int = ROUNDS,
    contrast: float = CONTRAST,
) -> Tensor:
    """Upsample token maps so that their edges follow those of the image; nothing is trained.

    The maps are enlarged (bilinear) and then smoothed repeatedly by 3 x 3 cross-bilateral filters at distances of a
    patch, half a patch, ... and one cell: neighbours of similar colour (CIE Lab) are averaged, others are not. The
    range of the filter is the standard deviation of the image's colours times `contrast`. Tiles and groups of channels
    are filtered one by one, so the memory needed beside the result does not grow with the size.

    Args:
        tokens: (h, w, C) or (B, h, w, C) tokens of any layer of any backbone, raw or denoised.
        image: (3, H, W) or (B, 3, H, W) RGB in [0, 1], of any size; it covers the same area as the tokens.
        factor: number of cells per token and side; 1 changes nothing.
        size: (H', W') of the result, instead of a factor, not smaller than the grid; give the image's size for features
            of each pixel.
        centres: (h, w, 2) coordinates of the tokens. None takes those of patches that tile the image; for overlapping
            patches give :meth:`dvt.backbones.Backbone.centres`.
        rounds: number of passes of the filters.
        contrast: range of the filter, in standard deviations of the image's colours.

    Returns:
        (H', W', C) or (B, H', W', C), in the dtype and on the device of the tokens.

    Raises:
        ShapeError: tokens, image or centres do not fit together, or the size is smaller than the grid.
        ConfigError: neither or both of factor and size are given, or a setting is out of range.
        NonFiniteError: a token or a pixel is NaN or infinite.

    Source: joint bilateral upsampling (Kopf et al., SIGGRAPH 2007), iterated over the distances of an edge-avoiding
    a-trous transform (Dammertz et al., HPG 2010). docs/upsampling.md compares it with other filters.

    >>> tokens, image = torch.zeros(2, 4, 8), torch.zeros(3, 32, 64)
    >>> image[:, :, 24:], tokens[:, 1], tokens[:, 2:] = 1, 0.5, 1  # a bright part that begins within a patch
    >>> upsample(tokens, image, 4)[0, :, 0].gt(0.5).int().tolist()
    [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    maps, images, wanted = _checked(tokens, image, factor, size, rounds, contrast)
    grid = (maps.shape[1], maps.shape[2])
    centres = grids.grid_centres(grid, maps.device) if centres is None else centres
    if tuple(centres.shape) != (*grid, 2):
        raise ShapeError(f"centres have shape {tuple(centres.shape)}; tokens of grid {grid} need {(*grid, 2)}")
    if wanted == grid:
        return tokens
    pairs = zip(maps, images, strict=True)
    found = torch.stack([_upsampled(one, pixels, wanted, centres, rounds, contrast) for one, pixels in pairs])
    return found if tokens.ndim == 4 else found[0]


def _checked(
    tokens: Tensor, image: Tensor, factor: int | None, size: Size | None, rounds: int, contrast: float
) -> tuple[Tensor, Tensor, Size]:
    """Check the arguments; return maps (B, h, w, C), images (B, 3, H, W) and the size of the result."""
    if tokens.ndim not in (3, 4) or image.ndim != tokens.ndim or image.shape[-3] != 3:
        raise ShapeError(
            f"tokens {tuple(tokens.shape)} and image {tuple(image.shape)} do not fit together: give (h, w, C) and "
            "(3, H, W), or (B, h, w, C) and (B, 3, H, W)"
        )
    maps, images = (tokens, image) if tokens.ndim == 4 else (tokens[None], image[None])
    if len(maps) != len(images) or not min(maps.shape) or not min(images.shape):
        raise ShapeError(f"tokens {tuple(maps.shape)} need one image each, got images {tuple(images.shape)}")
    if (factor is None) == (size is None):
        raise ConfigError(f"give either a factor or a size, got factor {factor} and size {size}")
    if factor is not None and (factor != int(factor) or factor < 1):
        raise ConfigError(f"factor is {factor}; it must be a whole number, 1 or more")
    if rounds < 1 or not contrast > 0:
        raise ConfigError(f"rounds must be 1 or more and contrast positive, got {rounds} and {contrast}")
    grid = (maps.shape[1], maps.shape[2])
    wanted = size or (grid[0] * int(factor or 1), grid[1] * int(factor or 1))
    if any(a < b for a, b in zip(wanted, grid, strict=True)):
        raise ShapeError(f"the size {wanted} is smaller than the grid {grid}; upsampling only makes maps larger")
    if not (torch.compiler.is_compiling() or bool(maps.isfinite().all() & images.isfinite().all())):
        raise NonFiniteError("the tokens or the image hold NaN or infinity, which a filter would spread; skip them")
    return maps, images, wanted


def _upsampled(maps: Tensor, image: Tensor, size: Size, centres: Tensor, rounds: int, contrast: float) -> Tensor:
    """Upsample one map (h, w, C) to a size, tile by tile."""
    guide = _lab(resize(image.to(maps.device, torch.float32), size))
    spread = contrast * guide.var((1, 2), correction=0).sum().sqrt().clamp_min(_LEAST_RANGE)
    guide = guide / spread
    steps = [_halvings(a / b) for a, b in zip(size, maps.shape, strict=False)]
    count = max(map(len, steps))
    down, right = ([side[min(i, len(side) - 1)] for i in range(count)] for side in steps)
    distances = list(zip(down, right, strict=True))
    border = rounds * sum(down), rounds * sum(right)
    points = grids.grid_centres(size, maps.device)
    result = maps.new_empty(*size, maps.shape[2])
    for inner, outer, cut in _tiles(size, border):
        weights = [_weights(guide[:, outer[0], outer[1]], distance) for distance in distances]
        places = points[outer]
        group = max(1, _FLOATS // places[..., 0].numel())
        for start in range(0, maps.shape[2], group):
            part = maps[..., start : start + group].float()
            values = grids.sample_centres(part, places, centres).movedim(-1, 0)
            for _ in range(rounds):
                for distance, weight in zip(distances, weights, strict=True):
                    values = _filtered(values, weight, distance)
            result[inner[0], inner[1], start : start + group] = values.movedim(0, -1)[cut].to(result.dtype)
    return result


def _halvings(ratio: float) -> list[int]:
    """List distances from a patch down to one cell: [4, 2, 1] for 4 cells per patch.

    >>> _halvings(14.0)
    [14, 7, 4, 2, 1]
    """
    found = [max(1, round(ratio))]
    while found[-1] > 1:
        ratio /= 2
        found.append(max(1, round(ratio)))
    return found


Part = tuple[slice, slice]


def _tiles(size: Size, border: tuple[int, ...]) -> Iterator[tuple[Part, Part, Part]]:
    """Cut a map into tiles; yield each tile, the tile with the border that the filters reach, and its place in that."""
    for top in range(0, size[0], _TILE):
        for left in range(0, size[1], _TILE):
            first = (top, left)
            last = [min(a + _TILE, length) for a, length in zip(first, size, strict=True)]
            start = [max(0, a - reach) for a, reach in zip(first, border, strict=True)]
            stop = [min(length, b + reach) for b, reach, length in zip(last, border, size, strict=True)]
            inner, outer = (tuple(map(slice, *each)) for each in ((first, last), (start, stop)))
            cut = tuple(slice(a - s, b - s) for a, b, s in zip(first, last, start, strict=True))
            yield inner, outer, cut  # type: ignore[misc]


def _weights(guide: Tensor, distance: Size) -> Tensor:
    """Compute the filter weights (9, H, W) of the neighbours at a distance; they add up to 1."""
    around = _neighbours(guide, distance)
    apart = torch.stack([(each - guide).square().sum(0) for each in around])
    away = apart.new_tensor([row * row + column * column for row, column in _NEIGHBOURS])
    return (-(apart + away[:, None, None]) / 2).softmax(0)


def _filtered(values: Tensor, weights: Tensor, distance: Size) -> Tensor:
    """Average each cell of a map (c, H, W) with its neighbours at a distance, by weights (9, H, W)."""
    around, total = list(_neighbours(values, distance)), torch.zeros_like(values)
    rows = max(1, _BAND // values[:, 0].numel())
    for top in range(0, values.shape[1], rows):
        band = slice(top, top + rows)
        for weight, each in zip(weights, around, strict=True):
            total[:, band].addcmul_(weight[band], each[:, band])
    return total


def _neighbours(values: Tensor, distance: Size) -> Iterator[Tensor]:
    """Yield a map (c, H, W) shifted to each of the 9 neighbours; beyond the map its border is repeated."""
    height, width = values.shape[1:]
    down, right = distance
    padded = nnf.pad(values[None], (right, right, down, down), mode="replicate")[0]
    for row, column in _NEIGHBOURS:
        top, left = down * (1 + row), right * (1 + column)
        yield padded[:, top : top + height, left : left + width]


def _lab(image: Tensor) -> Tensor:
    """Convert an sRGB image (3, H, W) to CIE Lab / 100 (D65), where distances follow perceived differences."""
    linear = torch.where(image > 0.04045, ((image + 0.055) / 1.055) ** 2.4, image / 12.92)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    white = linear.new_tensor([0.95047, 1.0, 1.08883])
    xyz = torch.einsum("ij,jhw->ihw", linear.new_tensor(to_xyz) / white[:, None], linear)
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp_min(0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack((1.16 * y - 0.16, 5 * (x - y), 2 * (y - z)))
