"""Do all coordinate arithmetic: patch centres, crops, flips, strides, resizing and bilinear grids.

Sizes are (height, width). Coordinates are (x, y) in [0, 1]^2, where (0, 0) is the top left corner of the
top left pixel and (1, 1) the bottom right corner of the bottom right one. The centre of patch k of n is
(k + 0.5) / n. Boxes are (x0, y0, x1, y1).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dvt.errors import ConfigError, ShapeError
from dvt.grids.windows import (  # noqa: F401  (offered to others from here)
    Size,
    draw_offsets,
    lattice,
    lattice_blocks,
    lattice_centres,
    lattice_index,
    mirrored,
    offset_coords,
)

_DRAWN = 4  # pixels per cell and side of a map whose cells are not equally large


def fit_size(image_size: Size, shorter_side: int, patch: Size) -> Size:
    """Compute the model input size (H, W) that keeps an image's aspect ratio.

    Args:
        image_size: (H, W) of the image in pixels.
        shorter_side: the wanted size of the shorter side, which is met up to rounding to the patch.
        patch: (height, width) of a patch in pixels; both sides are rounded to multiples of it.

    >>> fit_size((320, 480), 224, (16, 16))
    (224, 336)
    """
    if min(image_size) < 1 or shorter_side < 1 or min(patch) < 1:
        raise ConfigError(f"sizes must be positive, got image {image_size}, size {shorter_side}, patch {patch}")
    scale = shorter_side / min(image_size)
    height, width = (max(1, round(side * scale / step)) * step for side, step in zip(image_size, patch, strict=True))
    return height, width


def grid_shape(size: Size, patch: Size, stride: Size | None = None) -> Size:
    """Count the patches (h, w) that fit into an input of (H, W) pixels, with one patch every `stride` pixels.

    >>> grid_shape((224, 336), (16, 16)), grid_shape((224, 336), (16, 16), (8, 8))
    ((14, 21), (27, 41))
    """
    height, width = ((s - p) // d + 1 for s, p, d in zip(size, patch, stride or patch, strict=True))
    return height, width


def patch_centres(size: Size, patch: Size, stride: Size | None = None, device=None) -> Tensor:
    """Compute the coordinates of the patch centres of an input, (h, w, 2).

    Args:
        size: (H, W) of the input in pixels.
        patch: patch size in pixels.
        stride: pixels between neighbouring patches; None means the patch size.

    >>> patch_centres((32, 64), (16, 16))[0, :, 0].tolist()
    [0.125, 0.375, 0.625, 0.875]
    """
    stride = stride or patch
    rows, columns = (
        (torch.arange(n, dtype=torch.float64, device=device) * d + p / 2) / s
        for n, d, p, s in zip(grid_shape(size, patch, stride), stride, patch, size, strict=True)
    )
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).float()


def grid_centres(grid: Size, device=None) -> Tensor:
    """Compute the coordinates (h, w, 2) of the cell centres of an h x w grid that tiles the image."""
    return patch_centres(grid, (1, 1), device=device)


def overlapping_centres(grid: Size, patch: Size, stride: Size, device=None) -> Tensor:
    """Compute the patch centres (h, w, 2) of a grid whose input's size is not known, but is a multiple of the patch.

    >>> size, patch, stride = (48, 64), (16, 16), (8, 8)
    >>> grid = grid_shape(size, patch, stride)
    >>> bool((overlapping_centres(grid, patch, stride) == patch_centres(size, patch, stride)).all())
    True
    """
    size = [p * (-(-(n - 1) * d // p) + 1) for n, p, d in zip(grid, patch, stride, strict=True)]
    return patch_centres((size[0], size[1]), patch, stride, device)


def cell_edges(centres: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the edges y (h + 1,) and x (w + 1,) between the cells of patch centres (h, w, 2), from 0 to 1.

    A cell is where its centre is the nearest: edges lie halfway between neighbours, and the outermost on the image's.

    >>> [edges.tolist() for edges in cell_edges(patch_centres((16, 32), (16, 16), (8, 8)))]
    [[0.0, 1.0], [0.0, 0.375, 0.625, 1.0]]
    """
    lines = centres[:, 0, 1], centres[0, :, 0]
    rows, columns = (torch.cat((m.new_zeros(1), (m[1:] + m[:-1]) / 2, m.new_ones(1))) for m in lines)
    return rows, columns


def drawn_cells(values: Tensor, centres: Tensor | None) -> Tensor:
    """Enlarge a map (h, w, ...) for a picture that fills the image's rectangle, by the value of the nearest centre.

    Args:
        centres: (h, w, 2) of the map's patches. If they tile the image, or are None, each value is one pixel as it is.
    """
    grid = (values.shape[0], values.shape[1])
    if centres is None or torch.allclose(centres.cpu(), grid_centres(grid), atol=1e-4):
        return values
    rows, columns = (
        torch.bucketize((torch.arange(_DRAWN * n) + 0.5) / (_DRAWN * n), edges[1:-1].contiguous())
        for n, edges in zip(grid, cell_edges(centres.cpu()), strict=True)
    )
    return values[rows[:, None], columns]


def cell_pixels(centres: Tensor, size: Size, count: int) -> tuple[Tensor, Tensor]:
    """Choose count x count pixels of an image, evenly spread over each cell of patch centres (h, w, 2).

    Returns:
        indices of rows (count h,) and columns (count w,) of the image.

    >>> [each.tolist() for each in cell_pixels(patch_centres((16, 32), (16, 16)), (16, 32), 2)]
    [[4, 12], [4, 12, 20, 28]]
    """
    found = []
    for edges, length in zip(cell_edges(centres.double().cpu()), size, strict=True):
        inside = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        places = (edges[:-1, None] + inside * edges.diff()[:, None]).flatten() * length
        found.append((places + 1e-3).long().clamp(max=length - 1))  # centres are rounded, and pixels begin at integers
    return found[0], found[1]


def box_of_cells(cells: tuple[int, int, int, int], centres: Tensor) -> Tensor:
    """Compute the box (4,) in [0, 1] of cells (x0, y0, x1, y1), the end exclusive, of patch centres (h, w, 2)."""
    rows, columns = cell_edges(centres)
    x0, y0, x1, y1 = cells
    return torch.stack((columns[x0], rows[y0], columns[x1], rows[y1]))


def cells_in_box(box: tuple[float, float, float, float], centres: Tensor) -> tuple[int, int, int, int]:
    """Find the cells (x0, y0, x1, y1), the end exclusive, whose edges are nearest to a box in [0, 1]; one or more."""
    rows, columns = cell_edges(centres)
    x0, y0, x1, y1 = (
        int((edges - place).abs().argmin()) for edges, place in zip((columns, rows) * 2, box, strict=True)
    )
    x0, y0 = min(x0, len(columns) - 2), min(y0, len(rows) - 2)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def enlarge(maps: Tensor, size: Size, centres: Tensor | None = None) -> Tensor:
    """Sample maps (B, K, h, w) at the pixels of an image, bilinear: (B, K, *size).

    Args:
        centres: (h, w, 2) of the maps' patches; None for patches that tile the image. Beyond the outermost ones their
            value is repeated.
    """
    if maps.shape[2:] == size and centres is None:
        return maps
    if centres is None:
        return nnf.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    first, last = centres[0, 0].to(maps), centres[-1, -1].to(maps)
    places = 2 * (grid_centres(size, maps.device).to(maps) - first) / (last - first).clamp_min(1e-9) - 1
    return nnf.grid_sample(maps, places.expand(len(maps), -1, -1, -1), padding_mode="border", align_corners=True)


def middle_square(grid: Size) -> tuple[int, int, int]:
    """Find the largest square of cells in the middle of a grid: (top, left, side) in cells.

    >>> middle_square((2, 5))
    (0, 1, 2)
    """
    side = min(grid)
    return (grid[0] - side) // 2, (grid[1] - side) // 2, side


def cells_to_pixels(square: tuple[int, int, int], grid: Size, image_size: Size) -> tuple[int, int, int, int]:
    """Find the pixels (top, left, bottom, right) under a square of cells of a grid that tiles an image; ends excluded.

    >>> cells_to_pixels((0, 1, 2), (2, 5), (20, 50))
    (0, 10, 20, 30)
    """
    top, left, side = square
    down, across = image_size[0] / grid[0], image_size[1] / grid[1]
    return round(top * down), round(left * across), round((top + side) * down), round((left + side) * across)


def share_of(size: Size, shares: tuple[float, float, float, float]) -> tuple[slice, slice]:
    """Find the rows and columns of a part of an image: shares (top, bottom, left, right) of its sides, rounded down.

    >>> share_of((480, 640), (45 / 480, 471 / 480, 41 / 640, 601 / 640))
    (slice(45, 471, None), slice(41, 601, None))
    """
    top, bottom, left, right = (
        int(share * length + 1e-6) for share, length in zip(shares, (size[0], size[0], size[1], size[1]), strict=True)
    )
    return slice(top, bottom), slice(left, right)


def node_coords(resolution: Size, device=None) -> Tensor:
    """Compute the coordinates (rows, columns, 2) of a bilinear grid's nodes; its corners are the image's corners."""
    rows, columns = (torch.linspace(0, 1, n, dtype=torch.float64, device=device) for n in resolution)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).float()


def view_to_image(coords: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Convert a view's own coordinates to image coordinates.

    Args:
        coords: (..., 2) coordinates in the view, the same for all views.
        boxes: (V, 4) the views' boxes in image coordinates.
        flips: (V,) bool, True if the view was mirrored left to right after the crop.

    Returns:
        (V, ..., 2) coordinates in the image.
    """
    extra = (1,) * (coords.ndim - 1)
    boxes = boxes.to(coords).view(-1, *extra, 4)
    flips = flips.to(coords.device).view(-1, *extra)
    x = torch.where(flips, 1 - coords[..., 0], coords[..., 0])
    y = coords[..., 1].expand_as(x)
    return torch.stack(
        (boxes[..., 0] + x * (boxes[..., 2] - boxes[..., 0]), boxes[..., 1] + y * (boxes[..., 3] - boxes[..., 1])), -1
    )


def image_to_view(coords: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Convert image coordinates (V, ..., 2) to the view's own: the inverse of :func:`view_to_image`."""
    extra = (1,) * (coords.ndim - 2)
    boxes = boxes.to(coords).view(-1, *extra, 4)
    flips = flips.to(coords.device).view(-1, *extra)
    x = (coords[..., 0] - boxes[..., 0]) / (boxes[..., 2] - boxes[..., 0])
    y = (coords[..., 1] - boxes[..., 1]) / (boxes[..., 3] - boxes[..., 1])
    return torch.stack((torch.where(flips, 1 - x, x), y), dim=-1)


def boxes_from_pixels(pixels: Tensor, image_size: Size) -> Tensor:
    """Convert boxes (..., 4) in whole pixels (x0, y0, x1, y1), the end exclusive, to [0, 1]."""
    height, width = image_size
    return pixels.double() / pixels.new_tensor([width, height, width, height]).double()


def boxes_to_pixels(boxes: Tensor, image_size: Size) -> Tensor:
    """Round boxes (..., 4) in [0, 1] to whole pixels, each inside the image and at least one pixel wide and high."""
    height, width = image_size
    x0, y0, x1, y1 = (boxes * boxes.new_tensor([width, height, width, height])).round().long().unbind(-1)
    x0, y0 = x0.clamp(0, width - 1), y0.clamp(0, height - 1)
    return torch.stack((x0, y0, x1.clamp(max=width).maximum(x0 + 1), y1.clamp(max=height).maximum(y0 + 1)), dim=-1)


def rotated_view(size: Size, degrees: float, zoom: float, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """Make the affine map (2, 3) from the coordinates of a rotated and scaled view to the image's, in float64.

    The view has the image's aspect ratio. :func:`move` applies the map.

    Args:
        size: (H, W) of the image in pixels, in which the rotation preserves angles and lengths.
        degrees: clockwise rotation of the view's frame on the image; the picture in the view rotates the other way.
        zoom: sides of the view's frame over those of the image; below 1 the view shows an enlarged part.
        centre: (x, y) of the frame's centre in the image.

    >>> map = rotated_view((100, 200), degrees=90, zoom=0.5)
    >>> move(torch.tensor([[0.5, 0.5], [1.0, 0.5]]), map)  # the right end of the view is 50 pixels below the centre
    tensor([[0.5000, 0.5000],
            [0.5000, 1.0000]])
    """
    if min(size) < 1 or zoom <= 0:
        raise ConfigError(f"the size must be 1 pixel or more and the zoom positive, got {size} and {zoom}")
    angle = torch.tensor(math.radians(degrees), dtype=torch.float64)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).view(2, 2)
    sides = torch.tensor([size[1], size[0]], dtype=torch.float64)
    linear = zoom * turn * sides / sides[:, None]
    shift = torch.tensor(centre, dtype=torch.float64) - linear @ torch.tensor([0.5, 0.5], dtype=torch.float64)
    return torch.cat((linear, shift[:, None]), dim=1)


def frame_reach(size: Size, degrees: float) -> tuple[float, float]:
    """Compute the sides (x, y) of the upright box around an image's rotated frame, over the sides of the image.

    A view of :func:`rotated_view` lies inside the image if zoom times each side is at most 1, and the view's centre is
    at least half of that away from the image's borders.

    >>> [round(each, 9) for each in frame_reach((100, 200), 90)]
    [0.5, 2.0]
    """
    height, width = size
    cosine, sine = (abs(f(math.radians(degrees))) for f in (math.cos, math.sin))
    return cosine + sine * height / width, cosine + sine * width / height


def move(coords: Tensor, matrix: Tensor) -> Tensor:
    """Apply a (2, 3) map to coordinates (..., 2), in their dtype."""
    matrix = matrix.to(coords)
    return coords @ matrix[:, :2].T + matrix[:, 2]


def sample_pixels(image: Tensor, coords: Tensor) -> Tensor:
    """Interpolate an image (3, H, W) at coordinates (H', W', 2): (3, H', W'), bicubic, clamped to [0, 1].

    Of images (B, 3, H, W), each is interpolated at its own coordinates (B, H', W', 2). At a pixel's centre the result
    is that pixel; beyond the image its border is repeated. There is no antialiasing, so points should lie at most about
    a pixel apart.
    """
    grid, alone = (2 * coords - 1).to(image), image.ndim == 3
    images, grids = (image[None], grid[None]) if alone else (image, grid)
    values = nnf.grid_sample(images, grids, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 1)
    return values[0] if alone else values


def interpolation(coords: Tensor, resolution: Size) -> tuple[Tensor, Tensor]:
    """Find the four neighbours of points on a bilinear grid whose corner nodes lie on the image's corners.

    Args:
        coords: (..., 2) in [0, 1]; points outside are clamped to the border.
        resolution: (rows, columns) of nodes; node (i, j) lies at (j / (columns - 1), i / (rows - 1)).

    Returns:
        index (..., 4) of the flattened nodes, in the order (top left, top right, bottom left, bottom right), and
        their weights (..., 4), which add up to 1.
    """
    rows, columns = resolution
    if rows < 2 or columns < 2:
        raise ConfigError(f"a bilinear grid needs at least 2 x 2 nodes, got {resolution}")
    x = coords[..., 0].clamp(0, 1) * (columns - 1)
    y = coords[..., 1].clamp(0, 1) * (rows - 1)
    j = x.floor().clamp(max=columns - 2)
    i = y.floor().clamp(max=rows - 2)
    fx, fy = x - j, y - i
    weight = torch.stack(((1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy), dim=-1)
    first = (i * columns + j).long()
    return torch.stack((first, first + 1, first + columns, first + columns + 1), dim=-1), weight


def sample(grid: Tensor, coords: Tensor) -> Tensor:
    """Sample a node grid (rows, columns, C) at coordinates (..., 2), bilinear, as :func:`interpolation`: (..., C)."""
    index, weight = interpolation(coords.to(grid), (grid.shape[0], grid.shape[1]))
    return (grid.flatten(0, 1)[index] * weight[..., None]).sum(-2)


def resample(maps: Tensor, grid: Size) -> Tensor:
    """Resample a map of cells (..., h, w, C) to another grid of cells, centres aligned, bilinear.

    Reducing a grid is antialiased. Use it for artifacts, position embeddings and token maps.
    """
    if maps.ndim < 3:
        raise ShapeError(f"a map has shape (..., h, w, C), got {tuple(maps.shape)}")
    # No shortcut for equal grids: comparing sizes would fix them in an exported graph.
    if not torch.compiler.is_compiling() and tuple(maps.shape[-3:-1]) == tuple(grid):
        return maps
    lead = maps.shape[:-3]
    flat = maps.reshape(-1, *maps.shape[-3:]).movedim(-1, 1)
    out = nnf.interpolate(flat.float(), size=tuple(grid), mode="bilinear", align_corners=False, antialias=True)
    return out.movedim(1, -1).reshape(*lead, *grid, maps.shape[-1]).to(maps.dtype)


def window_corners(image_size: Size, window: Size, step: Size) -> Tensor:
    """List the top left pixels (row, column) of all windows inside an image, (N, 2), whole steps apart.

    Raises:
        ShapeError: the image is smaller than a window.

    >>> window_corners((32, 48), (32, 32), (16, 16)).tolist()
    [[0, 0], [0, 16]]
    """
    if any(side < needed for side, needed in zip(image_size, window, strict=True)):
        raise ShapeError(
            f"an image of {image_size[0]} x {image_size[1]} pixels holds no window of {window[0]} x {window[1]}; "
            "enlarge the image or choose a smaller window"
        )
    sides = [torch.arange(0, a - b + 1, d) for a, b, d in zip(image_size, window, step, strict=True)]
    return torch.cartesian_prod(*sides)


def sample_centres(maps: Tensor, coords: Tensor, centres: Tensor) -> Tensor:
    """Sample a map (h, w, C), given at patch centres (h, w, 2), at coordinates (..., 2), bilinear: (..., C).

    Points beyond the outermost centres get the border's value.
    """
    first, last = centres[0, 0].to(maps), centres[-1, -1].to(maps)
    return sample(maps, (coords.to(maps) - first) / (last - first))
