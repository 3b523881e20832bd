"""Coordinates against hand-computed values, scipy and their own inverses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from dvt import grids
from dvt.errors import ConfigError, ShapeError

SEEDS = st.integers(0, 10**6)


def rand(seed, *shape, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_boxes(seed, count):
    """Boxes at least .05 wide and high, with random flips."""
    a = rand(seed, count, 4)
    size = 0.05 + 0.95 * a[:, 2:]
    corner = a[:, :2] * (1 - size)
    return torch.cat((corner, corner + size), -1), rand(seed + 1, count) < 0.5


# -- sizes and centres ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "side", "patch", "expected"),
    [
        ((320, 480), 224, (16, 16), (224, 336)),
        ((480, 320), 224, (16, 16), (336, 224)),
        ((100, 100), 518, (14, 14), (518, 518)),
        ((1, 1000), 32, (16, 16), (32, 32_000)),
        ((300, 400), 225, (16, 16), (224, 304)),  # 225 -> 14 patches, 300 -> 18.75 patches
        ((200, 200), 5, (16, 16), (16, 16)),  # never less than one patch
        ((64, 96), 64, (16, 8), (64, 96)),
    ],
)
def test_fit_size(image, side, patch, expected):
    assert grids.fit_size(image, side, patch) == expected


@pytest.mark.parametrize("bad", [((0, 5), 8, (1, 1)), ((5, 5), 0, (1, 1)), ((5, 5), 8, (0, 1))])
def test_fit_size_refuses_what_is_not_positive(bad):
    with pytest.raises(ConfigError, match="positive"):
        grids.fit_size(*bad)


@settings(deadline=None)
@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), st.integers(16, 600), st.sampled_from([8, 14, 16]))
def test_fit_size_meets_the_shorter_side_and_the_aspect_ratio_to_half_a_patch(image, side, patch):
    size = grids.fit_size(image, side, (patch, patch))
    for got, given_side in zip(size, image, strict=True):
        exact = side * given_side / min(image)
        assert got % patch == 0 and (abs(got - exact) <= patch / 2 + 1e-6 or got == patch > exact)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16))
def test_centres_of_a_tiling_are_k_and_a_half_over_n(rows, columns, patch):
    centres = grids.patch_centres((rows * patch, columns * patch), (patch, patch))
    assert centres.shape == (rows, columns, 2) and centres.dtype == torch.float32
    np.testing.assert_allclose(centres[0, :, 0], (np.arange(columns) + 0.5) / columns, atol=1e-7)
    np.testing.assert_allclose(centres[:, 0, 1], (np.arange(rows) + 0.5) / rows, atol=1e-7)
    assert torch.equal(centres, grids.grid_centres((rows, columns)))


@settings(deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 16), st.integers(1, 16))
def test_strided_centres_are_the_mean_of_the_pixels_that_a_patch_covers(height, width, patch, stride):
    size = (height + patch, width + patch)
    centres = grids.patch_centres(size, (patch, patch), (stride, stride))
    pixels = (torch.arange(size[1], dtype=torch.float64) + 0.5) / size[1]
    expected = pixels.unfold(0, patch, stride).mean(-1)
    assert grids.grid_shape(size, (patch, patch), (stride, stride)) == tuple(centres.shape[:2])
    np.testing.assert_allclose(centres[0, :, 0], expected, atol=1e-6)


def test_nodes_reach_the_corners():
    nodes = grids.node_coords((3, 5))
    assert nodes[0, 0].tolist() == [0, 0] and nodes[-1, -1].tolist() == [1, 1]
    assert nodes[1, :, 0].tolist() == [0, 0.25, 0.5, 0.75, 1] and nodes[:, 2, 1].tolist() == [0, 0.5, 1]


# -- views ----------------------------------------------------------------------------------------------------------


def test_view_to_image_by_hand():
    coords = torch.tensor([[0.25, 0.5], [1.0, 0.0]])
    boxes = torch.tensor([[0.5, 0.0, 1.0, 0.5], [0.5, 0.0, 1.0, 0.5]])
    got = grids.view_to_image(coords, boxes, torch.tensor([False, True]))
    expected = [[[0.625, 0.25], [1.0, 0.0]], [[0.875, 0.25], [0.5, 0.0]]]
    np.testing.assert_allclose(got, expected, atol=1e-7)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_image_to_view_is_the_inverse(seed, views, rows, columns):
    coords = rand(seed, rows, columns, 2)
    boxes, flips = random_boxes(seed, views)
    there = grids.view_to_image(coords, boxes, flips)
    assert there.shape == (views, rows, columns, 2)
    np.testing.assert_allclose(grids.image_to_view(there, boxes, flips), coords.expand(views, -1, -1, -1), atol=1e-9)
    inside = (there >= boxes[:, None, None, :2]) & (there <= boxes[:, None, None, 2:] + 1e-12)
    assert inside.all()


@settings(deadline=None)
@given(SEEDS, st.integers(1, 60), st.integers(1, 60))
def test_boxes_to_pixels_are_whole_pixels_inside_and_never_empty(seed, height, width):
    boxes = rand(seed, 20, 4)
    boxes = torch.cat((boxes[:, :2].minimum(boxes[:, 2:]), boxes[:, :2].maximum(boxes[:, 2:])), -1)
    x0, y0, x1, y1 = grids.boxes_to_pixels(boxes, (height, width)).unbind(-1)
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= width).all() and (y1 <= height).all()
    assert (x1 > x0).all() and (y1 > y0).all()
    exact = boxes * torch.tensor([width, height, width, height])
    got = torch.stack((x0, y0, x1, y1), -1)
    off = (got - exact).abs()
    wide = (exact[:, 2:] - exact[:, :2] >= 1).all(-1)
    assert (off[wide] <= 0.5 + 1e-9).all() and (off <= 1.5 + 1e-9).all()


@settings(deadline=None)
@given(SEEDS, st.integers(1, 60), st.integers(1, 60))
def test_boxes_of_whole_pixels_come_back(seed, height, width):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, width, (10,), generator=generator)
    y0 = torch.randint(0, height, (10,), generator=generator)
    pixels = torch.stack((x0, y0, x0 + 1 + (width - x0 - 1) // 2, y0 + 1 + (height - y0 - 1) // 2), -1)
    boxes = grids.boxes_from_pixels(pixels, (height, width))
    assert torch.equal(grids.boxes_to_pixels(boxes, (height, width)), pixels)


# -- bilinear grids -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(SEEDS, st.integers(2, 7), st.integers(2, 7))
def test_sampling_equals_scipy(seed, rows, columns):
    values, coords = rand(seed, rows, columns, 3), rand(seed + 1, 30, 2)
    coords[0], coords[1] = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    reference = RegularGridInterpolator((np.linspace(0, 1, rows), np.linspace(0, 1, columns)), values.numpy())
    np.testing.assert_allclose(grids.sample(values, coords), reference(coords.flip(-1).numpy()), atol=1e-12)


@settings(deadline=None)
@given(SEEDS, st.integers(2, 7), st.integers(2, 7))
def test_interpolation_weights_are_a_convex_combination_of_existing_nodes(seed, rows, columns):
    index, weight = grids.interpolation(2 * rand(seed, 50, 2) - 0.5, (rows, columns))
    assert index.min() >= 0 and index.max() < rows * columns
    assert (weight >= 0).all()
    np.testing.assert_allclose(weight.sum(-1), 1, atol=1e-12)


def test_nodes_are_interpolated_exactly_and_points_outside_take_the_border():
    values = rand(0, 4, 5, 2)
    torch.testing.assert_close(grids.sample(values, grids.node_coords((4, 5)).double()), values, atol=1e-6, rtol=0)
    outside = torch.tensor([[-3.0, 0.0], [2.0, 5.0]], dtype=torch.float64)
    assert torch.equal(grids.sample(values, outside), torch.stack((values[0, 0], values[-1, -1])))


@pytest.mark.parametrize("resolution", [(1, 5), (5, 1)])
def test_a_grid_of_one_node_is_refused(resolution):
    with pytest.raises(ConfigError, match="2 x 2"):
        grids.interpolation(torch.rand(3, 2), resolution)


# -- resampling -----------------------------------------------------------------------------------------------------


def test_resample_to_the_same_grid_is_the_identity():
    maps = rand(0, 2, 5, 7, 3)
    assert torch.equal(grids.resample(maps, (5, 7)), maps)
    with pytest.raises(ShapeError, match=r"h, w, C"):
        grids.resample(maps[0, 0], (5, 7))


def ramp_error(old, new):
    """Largest error of a map of its own coordinates, inside the borders' reach, in cells of the new grid."""
    expected = grids.grid_centres(new)
    margin = torch.tensor([max(1 / o, 1 / n) for o, n in zip(old[::-1], new[::-1], strict=True)])
    inside = ((expected > margin) & (expected < 1 - margin)).all(-1)
    assert inside.sum() >= 9
    off = (grids.resample(grids.grid_centres(old), new) - expected).abs()
    assert (off <= margin).all()
    return float((off[inside] * torch.tensor([new[1], new[0]])).max())


@pytest.mark.parametrize(
    ("old", "new"), [((8, 8), (16, 24)), ((9, 7), (13, 30)), ((24, 36), (12, 9)), ((9, 20), (9, 5))]
)
def test_a_linear_ramp_stays_one_inside(old, new):
    assert ramp_error(old, new) < 1e-4


@pytest.mark.parametrize(("old", "new"), [((20, 20), (7, 7)), ((37, 37), (16, 24)), ((14, 21), (10, 10))])
def test_reduction_by_a_broken_factor_moves_a_ramp_by_little_of_a_cell(old, new):
    assert ramp_error(old, new) < 0.05


def test_resample_keeps_leading_dimensions_dtype_and_means():
    maps = rand(1, 2, 3, 12, 12, 4).half()
    small = grids.resample(maps, (4, 6))
    assert small.shape == (2, 3, 4, 6, 4) and small.dtype == torch.float16
    torch.testing.assert_close(small[1, 2], grids.resample(maps[1, 2], (4, 6)))
    constant = torch.full((5, 5, 2), 3.0)
    torch.testing.assert_close(grids.resample(constant, (11, 3)), torch.full((11, 3, 2), 3.0))


# -- turned and scaled views ----------------------------------------------------------------------------------------


def naive_place(x, y, size, degrees, zoom, centre):
    """A view's point in the image, in pixels with complex numbers."""
    height, width = size
    arm = complex((x - 0.5) * width, (y - 0.5) * height) * zoom * np.exp(1j * np.deg2rad(degrees))
    return centre[0] + arm.real / width, centre[1] + arm.imag / height


TURNS = st.tuples(st.floats(-180, 180), st.floats(0.1, 3), st.floats(0, 1), st.floats(0, 1))


@settings(deadline=None)
@given(SEEDS, st.tuples(st.integers(1, 900), st.integers(1, 900)), TURNS)
def test_a_rotated_view_equals_complex_numbers(seed, size, turn):
    degrees, zoom, *centre = turn
    coords, matrix = rand(seed, 3, 4, 2), grids.rotated_view(size, degrees, zoom, tuple(centre))
    there = grids.move(coords, matrix)
    expected = [[naive_place(x, y, size, degrees, zoom, centre) for x, y in row] for row in coords.tolist()]
    np.testing.assert_allclose(there, expected, atol=1e-9 * (1 + max(size) / min(size)))


@settings(deadline=None)
@given(SEEDS, st.floats(0.1, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_rotated_view_without_a_turn_is_a_crop(seed, zoom, x, y):
    matrix = grids.rotated_view((30, 50), 0, zoom, (x, y))
    box = torch.tensor([[x - zoom / 2, y - zoom / 2, x + zoom / 2, y + zoom / 2]], dtype=torch.float64)
    coords = rand(seed, 6, 2)
    crop = grids.view_to_image(coords, box, torch.tensor([False]))[0]
    np.testing.assert_allclose(grids.move(coords, matrix), crop, atol=1e-9)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.floats(-180, 180))
def test_frame_reach_is_the_span_of_the_turned_corners(height, width, degrees):
    corners = grids.move(grids.node_coords((2, 2)).double(), grids.rotated_view((height, width), degrees, 1)).view(4, 2)
    np.testing.assert_allclose(
        corners.amax(0) - corners.amin(0), grids.frame_reach((height, width), degrees), rtol=1e-6
    )


@pytest.mark.parametrize("bad", [((0, 5), 10, 1), ((5, 5), 10, 0), ((5, 5), 10, -1)])
def test_a_rotated_view_refuses_what_is_not_positive(bad):
    with pytest.raises(ConfigError, match="positive"):
        grids.rotated_view(*bad)


def test_sampled_pixels_are_the_pixels_at_their_centres_and_after_a_quarter_turn():
    image = rand(0, 3, 6, 9)
    torch.testing.assert_close(
        grids.sample_pixels(image, grids.grid_centres((6, 9)).double()), image, atol=1e-6, rtol=0
    )
    square = rand(1, 3, 8, 8).float()
    turned = grids.move(grids.grid_centres((8, 8)).double(), grids.rotated_view((8, 8), 90, 1))
    # A frame turned clockwise shows the picture turned the other way.
    expected = square.rot90(1, (1, 2))
    torch.testing.assert_close(grids.sample_pixels(square, turned), expected, atol=1e-5, rtol=0)


def test_sampled_pixels_of_a_smooth_image_are_its_values():
    x, y = grids.grid_centres((40, 60)).double().unbind(-1)
    image = torch.stack((x, y, 0.5 + 0.4 * torch.sin(3 * x + 2 * y)))
    coords = 0.1 + 0.8 * rand(2, 7, 5, 2)
    u, v = coords.unbind(-1)
    expected = torch.stack((u, v, 0.5 + 0.4 * torch.sin(3 * u + 2 * v)))
    # PyTorch's cubic moves a ramp by up to a tenth of a pixel between pixel centres.
    torch.testing.assert_close(grids.sample_pixels(image, coords), expected, atol=0.12 / 40, rtol=0)
    assert grids.sample_pixels(image, torch.full((1, 1, 2), 5.0)).flatten()[:2].tolist() == image[:2, -1, -1].tolist()


# Shifted windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [16, 8, 4])
def test_the_lattice_is_the_inverse_of_offset_coords(stride):
    size, offsets = (64, 96), torch.tensor([[0, 0], [3, -7], [-20, 41]])
    centres = grids.patch_centres(size, (16, 16), (stride, stride))
    coords = grids.offset_coords(centres, offsets, (stride / 64, stride / 96))
    assert coords[0].equal(centres)
    found, period = grids.lattice(coords)
    assert found.tolist() == offsets.tolist() and period == (128 // stride, 192 // stride)
    torch.testing.assert_close(grids.lattice_centres(centres.shape[:2], period), centres)


def test_the_lattice_refuses_a_stride_on_which_mirrored_images_do_not_repeat():
    with pytest.raises(ConfigError, match="stride"):
        grids.lattice(grids.patch_centres((64, 64), (16, 16), (12, 12))[None])


def test_tokens_of_one_content_patch_have_one_index():
    offsets, period, grid = torch.tensor([[0, 0], [1, 2], [-8, 10]]), (8, 10), (4, 5)
    first, moved, around = grids.lattice_index(grid, offsets, period).view(3, *grid)
    assert torch.equal(first[1:, 2:], moved[:3, :3]) and torch.equal(first, around)


def test_offsets_spread_evenly_and_begin_with_the_image():
    offsets = grids.draw_offsets((10, 20), 21, 1.0, torch.Generator().manual_seed(0))
    assert offsets[0].tolist() == [0, 0] and offsets.shape == (22, 2)
    rows, columns = offsets[1:].sort(0).values.unbind(1)
    assert (rows.float() - torch.linspace(-10, 10, 21)).abs().max() <= 1
    assert (columns.float() - torch.linspace(-20, 20, 21)).abs().max() <= 2


def test_an_image_smaller_than_a_window_is_refused():
    with pytest.raises(ShapeError, match="20 x 40 pixels holds no window of 32 x 32"):
        grids.window_corners((20, 40), (32, 32), (16, 16))


def test_values_between_patch_centres_are_bilinear_and_the_border_goes_on():
    centres = grids.patch_centres((64, 96), (16, 16), (8, 8))
    values = 3 * centres - 1
    inner = 0.2 + 0.6 * torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(grids.sample_centres(values, inner, centres), 3 * inner - 1, atol=1e-5, rtol=0)
    assert torch.allclose(grids.sample_centres(values, torch.tensor([[-3.0, 9.0]]), centres), values[-1, 0])
