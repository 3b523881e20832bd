"""Coordinates of windows shifted by whole patches over a mirrored image, and of the contents that they share."""

from __future__ import annotations

import torch
from torch import Tensor

from dvt.devices import upload
from dvt.errors import ConfigError

Size = tuple[int, int]


def draw_offsets(grid: Size, count: int, reach: float, generator: torch.Generator) -> Tensor:
    """Draw whole-patch offsets (rows, columns) of windows at one scale, (1 + count, 2); the first is (0, 0).

    Rows are spread evenly over -reach h ... reach h, and columns over -reach w ... reach w, in independent random
    orders (a Latin hypercube), so that even few windows show many contents at each position.

    Args:
        grid: (h, w) patches of a window.
        count: number of windows beside the first.
        reach: the largest offset, as a share of the window's sides.
        generator: draws the orders, on the CPU.
    """
    sides = []
    for side in grid:
        order = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator, dtype=torch.float64)
        sides.append(((2 * order / max(count, 1) - 1) * reach * side).round().long())
    return torch.cat((torch.zeros(1, 2, dtype=torch.long), torch.stack(sides, dim=-1)))


def offset_coords(centres: Tensor, offsets: Tensor, step: tuple[float, float]) -> Tensor:
    """Compute the coordinates (V, h, w, 2) of the patches of windows shifted by whole steps, also outside of [0, 1].

    Args:
        centres: (h, w, 2) of the window at offset 0.
        offsets: (V, 2) whole numbers of steps down and to the right.
        step: (vertical, horizontal) length of a step as a share of the window's sides.
    """
    moved = upload(offsets.flip(-1) * torch.tensor([step[1], step[0]], dtype=centres.dtype), centres.device)
    return centres + moved[:, None, None, :]


def lattice(coords: Tensor) -> tuple[Tensor, Size]:
    """Recover the offsets (V, 2) of windows from the result of :func:`offset_coords`, and the period.

    The period (rows, columns), in steps, is the distance after which an image repeats if it is mirrored at its borders.

    Args:
        coords: (V, h, w, 2) coordinates of the patches of windows at the image's own scale.

    Raises:
        ConfigError: the grid has one row or column, or a window is not a shift by whole patches at the image's scale.

    >>> from dvt.grids import grid_centres
    >>> coords = offset_coords(grid_centres((4, 6)), torch.tensor([[0, 0], [2, -3]]), (1 / 4, 1 / 6))
    >>> lattice(coords)
    (tensor([[ 0,  0],
            [ 2, -3]]), (8, 12))
    """
    height, width = coords.shape[1:3]
    if height < 2 or width < 2:
        raise ConfigError(f"shifted windows need a grid of at least 2 x 2 patches, got {height} x {width}")
    coords = coords.double().cpu()
    # For x and y: a step is the distance of neighbours; the first centre is half of the rest of 1 after all steps.
    steps = torch.stack((coords[0, 0, -1, 0] - coords[0, 0, 0, 0], coords[0, -1, 0, 1] - coords[0, 0, 0, 1]))
    count = torch.tensor([width - 1, height - 1])
    steps = steps / count
    first = (1 - steps * count) / 2
    index = (coords - first) / steps
    offsets, period = index[:, 0, 0].round(), 2 / steps
    if (steps > 0).all() and (period - period.round()).abs().max() > 0.01:
        raise ConfigError(
            "a mirrored image does not repeat itself on this grid of patches: shifted windows need a stride that "
            "divides twice the input's sides, and views at the image's own scale"
        )
    whole = offsets[:, None, None] + torch.stack(
        torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), dim=-1
    )
    if (steps <= 0).any() or (index - whole).abs().max() > 0.01:
        raise ConfigError(
            "a view is not an unmirrored window at the image's own scale, shifted by whole patches: views of mixed "
            "kinds, or crops, cannot be solved as shifts; draw them with ViewConfig(kind='shifts')"
        )
    columns, rows = (int(side) for side in period.round())
    return offsets.flip(-1).long(), (rows, columns)


def lattice_index(grid: Size, offsets: Tensor, period: Size) -> Tensor:
    """Find the index (V, n), in 0 ... rows * columns of a period, of the content that each window's patches show.

    >>> lattice_index((2, 2), torch.tensor([[0, 0], [-1, 1]]), (4, 4)).tolist()
    [[0, 1, 4, 5], [13, 14, 1, 2]]
    """
    rows = (offsets[:, :1] + torch.arange(grid[0])).remainder(period[0])
    columns = (offsets[:, 1:] + torch.arange(grid[1])).remainder(period[1])
    return (rows[:, :, None] * period[1] + columns[:, None, :]).flatten(1)


def mirrored(index: Tensor, length: int) -> Tensor:
    """Fold integers into 0 ... length - 1, as indices of a row that is mirrored at its ends.

    >>> mirrored(torch.arange(-3, 7), 3).tolist()
    [2, 1, 0, 0, 1, 2, 2, 1, 0, 0]
    """
    place = index.remainder(2 * length)
    return torch.minimum(place, 2 * length - 1 - place)


def lattice_centres(grid: Size, period: Size) -> Tensor:
    """Compute the patch centres (h, w, 2) of a window whose mirrored image repeats after a period of steps.

    The inverse of :func:`lattice`, for a window at offset 0.

    >>> lattice_centres((2, 2), (4, 4))[0].tolist()
    [[0.25, 0.25], [0.75, 0.25]]
    """
    sides = []
    for count, length in zip(grid, period, strict=True):
        places = torch.arange(count, dtype=torch.float64)
        sides.append(0.5 + (places - (count - 1) / 2) * 2 / length)
    return torch.stack(torch.meshgrid(sides[1], sides[0], indexing="xy"), dim=-1).float()


def lattice_blocks(period: Size, side: int, groups: int) -> Tensor:
    """Assign each content patch of a mirrored image to a group 0 ... groups - 1, at random: (rows * columns,).

    The draw has a fixed seed. Patches of one block of side x side get the same group, as do mirror images of a patch.
    """
    rows, columns = (mirrored(torch.arange(length), length // 2) // side for length in period)
    block = (rows[:, None] * (int(columns.max()) + 1) + columns).flatten()
    lot = torch.randperm(int(block.max()) + 1, generator=torch.Generator().manual_seed(0))
    return lot[block] % groups
