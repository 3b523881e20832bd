"""The grid encoding against a loop over nodes, against dvt.grids, and against tinycudann where there is one."""

import importlib.util
import math

import numpy as np
import pytest
import torch

from dvt.errors import ConfigError, ShapeError
from dvt.fields.encodings import GridLayout, TinyCudaGrid, TorchGrid, make_encoding
from dvt.grids import sample

HAS_TINYCUDANN = importlib.util.find_spec("tinycudann") is not None and torch.cuda.is_available()

DENSE = GridLayout(levels=4, base=3, finest=11, channels=2, hash_entries=2**10)
HASHED = GridLayout(levels=4, base=3, finest=40, channels=4, hash_entries=2**6)


def table_of(layout, seed=0):
    shape = (int(layout.entries.sum()), layout.channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive_nodes(layout, level, x, y):
    """Rows and weights of one point's four nodes, written from the rule with whole numbers and plain Python."""
    sizes, growth = [], (layout.finest / layout.base) ** (1 / (layout.levels - 1)) * (1 - 1e-6)
    for k in range(level + 1):
        scale = layout.base * growth**k - 1
        resolution = math.ceil(scale) + 1
        sizes.append(min(math.ceil(resolution**2 / 8) * 8, layout.hash_entries))
    shrink = 1 - 0.5 / (layout.base - 1)
    px, py = x * shrink * scale + 0.5, y * shrink * scale + 0.5
    for dy in (0, 1):
        for dx in (0, 1):
            i, j = int(px) + dx, int(py) + dy
            row = i + j * resolution if resolution**2 <= sizes[level] else i ^ (j * 2654435761 % 2**32)
            weight = (px % 1 if dx else 1 - px % 1) * (py % 1 if dy else 1 - py % 1)
            yield sum(sizes[:level]) + row % sizes[level], weight


def naive_encoding(layout, table, coords):
    rows = []
    for x, y in coords.double().tolist():
        levels = [
            sum(weight * table[row].double() for row, weight in naive_nodes(layout, level, x, y))
            for level in range(layout.levels)
        ]
        rows.append(torch.cat(levels))
    return torch.stack(rows).float()


@pytest.mark.parametrize("layout", [DENSE, HASHED], ids=["dense", "hashed"])
def test_values_equal_a_naive_loop(layout):
    table, coords = table_of(layout), torch.rand(60, 2, generator=torch.Generator().manual_seed(1))
    coords = torch.cat((coords, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.37]])))
    encoded = TorchGrid(layout, table)(coords)
    torch.testing.assert_close(encoded, naive_encoding(layout, table, coords), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("layout", [DENSE, HASHED], ids=["dense", "hashed"])
def test_gradients_equal_a_naive_loop(layout):
    coords = torch.rand(20, 2, generator=torch.Generator().manual_seed(2))
    outer = torch.randn(20, layout.features, generator=torch.Generator().manual_seed(3))
    grid = TorchGrid(layout, table_of(layout))
    (grid(coords) * outer).sum().backward()
    expected = torch.zeros_like(grid.table, dtype=torch.float64)
    for point, (x, y) in enumerate(coords.double().tolist()):
        for level, part in enumerate(outer[point].double().split(layout.channels)):
            for row, weight in naive_nodes(layout, level, x, y):
                expected[row] += weight * part
    torch.testing.assert_close(grid.table.grad, expected.float(), rtol=1e-4, atol=2e-4)


def test_only_levels_beyond_the_entries_are_hashed():
    assert HASHED.resolutions.tolist() == [3, 8, 17, 40]
    assert HASHED.entries.tolist() == [16, 64, 64, 64]
    assert (HASHED.resolutions**2 > HASHED.entries).tolist() == [False, False, True, True]


def test_the_papers_grid_is_dense_up_to_its_finest_level():
    layout = GridLayout()
    assert (layout.resolutions[0], layout.resolutions[-1], layout.features) == (16, 1024, 128)
    assert np.all(np.diff(layout.resolutions) > 0)
    assert np.all(layout.resolutions**2 <= layout.entries) and layout.entries[-1] == 2**20


def test_a_single_level_is_bilinear_interpolation_between_nodes():
    layout = GridLayout(levels=1, base=9, finest=9, channels=8, hash_entries=2**10)
    table, coords = table_of(layout), torch.rand(200, 2)
    coords[:4] = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    nodes = table[:81].view(9, 9, 8)
    expected = sample(nodes, (coords * (1 - 0.5 / 8) * 8 + 0.5) / 8)
    torch.testing.assert_close(TorchGrid(layout, table)(coords), expected, rtol=1e-4, atol=1e-4)


def test_dense_levels_reproduce_linear_functions_up_to_the_border():
    layout = DENSE
    values = [
        torch.stack((torch.arange(n**2) % n, torch.arange(n**2) // n), -1).float() for n in layout.resolutions.tolist()
    ]
    table = torch.cat(
        [
            torch.nn.functional.pad(v, (0, 0, 0, int(e) - len(v)), value=1e6)
            for v, e in zip(values, layout.entries, strict=True)
        ]
    )
    coords = torch.cartesian_prod(torch.linspace(0, 1, 21), torch.linspace(0, 1, 21))
    encoded = TorchGrid(layout, table)(coords).view(-1, layout.levels, 2)
    expected = coords[:, None] * layout.shrink * torch.from_numpy(layout.scales)[:, None] + 0.5
    torch.testing.assert_close(encoded, expected, rtol=1e-4, atol=1e-4)


def test_points_outside_take_the_borders_value():
    grid = TorchGrid(DENSE, table_of(DENSE))
    torch.testing.assert_close(
        grid(torch.tensor([[-3.0, 0.4], [0.2, 1.5]])), grid(torch.tensor([[0.0, 0.4], [0.2, 1.0]]))
    )


def test_initial_values_are_small_and_follow_the_generator():
    one, same, other = (DENSE.initial_table(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert 0.9e-4 < one.abs().max() <= 1e-4


@pytest.mark.parametrize(
    "wrong",
    [{"levels": 0}, {"base": 1}, {"finest": 8}, {"channels": 3}, {"hash_entries": 1000}, {"hash_entries": 4}],
)
def test_sizes_outside_their_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        GridLayout(**wrong)


def test_a_table_of_another_size_is_refused():
    with pytest.raises(ShapeError, match="initial_table"):
        TorchGrid(DENSE, torch.zeros(10, 2))


def test_kinds():
    assert isinstance(make_encoding("torch", DENSE, table_of(DENSE)), TorchGrid)
    assert isinstance(make_encoding("auto", DENSE, table_of(DENSE)), TorchGrid)
    with pytest.raises(ConfigError, match="CUDA device"):
        make_encoding("tinycudann", DENSE, table_of(DENSE))
    with pytest.raises(ConfigError, match="'auto'"):
        make_encoding("numpy", DENSE, table_of(DENSE))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", [DENSE, HASHED], ids=["dense", "hashed"])
def test_cuda_equals_cpu(layout):
    table, coords = table_of(layout), torch.rand(500, 2)
    there = TorchGrid(layout, table.cuda())(coords.cuda()).cpu()
    torch.testing.assert_close(there, TorchGrid(layout, table)(coords), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_TINYCUDANN, reason="needs tinycudann and a CUDA device")
@pytest.mark.parametrize("layout", [DENSE, HASHED, GridLayout()], ids=["dense", "hashed", "paper"])
def test_tinycudann_gives_the_same_numbers(layout):
    table, coords = table_of(layout).cuda(), torch.rand(500, 2).cuda()
    outer = torch.randn(500, layout.features).cuda()
    ours, theirs = TorchGrid(layout, table.clone()), TinyCudaGrid(layout, table.clone())
    torch.testing.assert_close(ours(coords), theirs(coords), rtol=1e-3, atol=1e-3)
    (ours(coords) * outer).sum().backward()
    (theirs(coords) * outer).sum().backward()
    torch.testing.assert_close(ours.table.grad.flatten(), theirs.grid.params.grad, rtol=1e-3, atol=1e-3)
