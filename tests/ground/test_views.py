"""Views: the coordinates they claim are the coordinates they show."""

import itertools
import math

import pytest
import torch
from scipy import stats

from dvt import grids
from dvt.errors import ConfigError, ShapeError
from dvt.views import Shifts, ViewConfig, Views, cut, cut_window, draw_boxes, resize


def coordinate_image(height, width):
    """(3, H, W) whose channels are x, y and 0 at the centre of each pixel."""
    x, y = grids.grid_centres((height, width)).unbind(-1)
    return torch.stack((x, y, torch.zeros_like(x)))


def patch_means(images, patch, stride):
    """(V, h, w, 2) mean of the first two channels over each patch, by a naive loop over patches."""
    height, width = images.shape[-2:]
    rows, columns = range(0, height - patch[0] + 1, stride[0]), range(0, width - patch[1] + 1, stride[1])
    means = [
        images[:, :2, y : y + patch[0], x : x + patch[1]].mean((2, 3)) for y, x in itertools.product(rows, columns)
    ]
    return torch.stack(means, 1).view(len(images), len(rows), len(columns), 2)


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("image", "shorter", "patch", "stride"),
    [
        ((320, 480), 224, (16, 16), (16, 16)),
        ((333, 251), 224, (16, 16), (16, 16)),
        ((240, 240), 112, (14, 14), (7, 7)),
        ((301, 200), 96, (16, 16), (11, 6)),
        ((260, 310), 96, (16, 8), (16, 8)),
        ((1400, 1900), 64, (16, 16), (16, 16)),  # larger than is useful: reduced before the views are cut
        ((90, 120), 224, (16, 16), (16, 16)),  # every view is an enlargement
    ],
)
def test_every_patch_shows_the_coordinates_that_are_given_for_it(image, shorter, patch, stride, flip):
    size = grids.fit_size(image, shorter, patch)
    centres = grids.patch_centres(size, patch, stride)
    views = Views(coordinate_image(*image), size, centres, ViewConfig(count=12, flip=flip, batch=5))
    boxes = views.boxes
    extent = torch.stack((boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]), -1)
    patch_extent = extent * torch.tensor([patch[1] / size[1], patch[0] / size[0]])  # of each view's patch, in the image
    seen = 0
    for images, coords in views:
        assert images.shape[1:] == (3, *size) and coords.shape == (len(images), *centres.shape)
        off = (patch_means(images, patch, stride) - coords).abs() / patch_extent[seen : seen + len(images), None, None]
        assert off.max() < 0.05
        seen += len(images)
    assert seen == len(views) == 13


def test_the_mirror_is_in_the_picture_and_in_the_coordinates():
    size, patch = (64, 64), (16, 16)
    views = Views(coordinate_image(100, 100), size, grids.patch_centres(size, patch), ViewConfig(count=4, flip=1.0))
    images, coords = next(iter(views))
    assert (coords[0, :, 1:, 0] > coords[0, :, :-1, 0]).all()  # the whole image is never mirrored
    assert (coords[1:, :, 1:, 0] < coords[1:, :, :-1, 0]).all() and (coords[1:, 1:, :, 1] > coords[1:, :-1, :, 1]).all()
    assert (images[1:, 0, :, 0] > images[1:, 0, :, -1]).all()


# -- how boxes are drawn --------------------------------------------------------------------------------------------


def test_boxes_have_the_promised_distribution():
    config = ViewConfig(count=20_000, scale=(0.1, 0.5), ratio=(3 / 4, 4 / 3), flip=0.3)
    boxes, flips = draw_boxes(config, torch.Generator().manual_seed(1))
    assert boxes.shape == (20_001, 4) and flips.shape == (20_001,)
    assert boxes[0].tolist() == [0, 0, 1, 1] and not flips[0]
    assert (boxes >= 0).all() and (boxes <= 1 + 1e-12).all()
    width, height = (boxes[1:, 2] - boxes[1:, 0]).numpy(), (boxes[1:, 3] - boxes[1:, 1]).numpy()
    area, aspect = width * height, width / height
    assert stats.kstest(area, stats.uniform(0.1, 0.4).cdf).pvalue > 1e-3
    log_ratio = math.log(4 / 3)
    assert stats.kstest([math.log(a) for a in aspect], stats.uniform(-log_ratio, 2 * log_ratio).cdf).pvalue > 1e-3
    free = 1 - width
    assert stats.kstest(boxes[1:, 0].numpy() / free, "uniform").pvalue > 1e-3  # every place is as likely
    assert stats.kstest(boxes[1:, 1].numpy() / (1 - height), "uniform").pvalue > 1e-3
    assert abs(flips[1:].double().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 20_000)
    assert abs(stats.pearsonr(area, aspect)[0]) < 0.05 and abs(stats.pearsonr(area, flips[1:].numpy())[0]) < 0.05


def test_a_box_never_leaves_the_image_even_when_ratio_and_scale_ask_for_it():
    boxes, _ = draw_boxes(ViewConfig(count=500, scale=(0.9, 1.0), ratio=(0.2, 5.0)), torch.Generator().manual_seed(0))
    assert (boxes >= 0).all() and (boxes <= 1 + 1e-12).all() and (boxes[:, 2:] > boxes[:, :2]).all()


def tiny_views(seed=0, count=6, shape=(50, 70), batch=4):
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(9))
    return Views(image, (32, 48), grids.patch_centres((32, 48), (16, 16)), ViewConfig(count, seed=seed, batch=batch))


def drawn(views):
    images, coords = (torch.cat(part) for part in zip(*views, strict=True))
    return images, coords


def test_the_same_seed_gives_the_same_views_and_another_seed_others():
    first, same, other = (drawn(tiny_views(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[1], other[1])


def test_iterating_again_and_in_other_batches_gives_the_same_views():
    views = tiny_views()
    first, again, by_one = drawn(views), drawn(views), drawn(tiny_views(batch=1))
    for other in (again, by_one):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = drawn(tiny_views())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(tiny_views()), strict=True))


def test_the_whole_image_comes_first():
    views = tiny_views()
    images, coords = drawn(views)
    torch.testing.assert_close(images[0], resize(views.image, (32, 48)))
    torch.testing.assert_close(coords[0], grids.patch_centres((32, 48), (16, 16)))
    assert len(drawn(tiny_views(count=0))[0]) == 1


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (200, 1), (1, 200), (2, 2)])
def test_tiny_images_give_finite_views_with_coordinates_inside(shape):
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(2))
    views = Views(image, (32, 32), grids.patch_centres((32, 32), (16, 16)), ViewConfig(count=20))
    images, coords = drawn(views)
    assert images.shape == (21, 3, 32, 32) and images.isfinite().all()
    assert images.min() >= 0 and images.max() <= 1
    assert (coords > 0).all() and (coords < 1).all()


def test_cut_takes_whole_pixels_before_it_resizes():
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(3))
    pixels, flips = torch.tensor([[4, 2, 12, 10], [4, 2, 12, 10]]), torch.tensor([False, True])
    plain, mirrored = cut(image, pixels, flips, (8, 8))
    assert torch.equal(plain, image[:, 2:10, 4:12])
    assert torch.equal(mirrored, plain.flip(-1))
    with pytest.raises(ShapeError, match=r"\(3, H, W\)"):
        cut(image[None], pixels, flips, (8, 8))


def test_resize_stays_in_range_and_keeps_constants():
    step = torch.zeros(3, 16, 16)
    step[:, :, 8:] = 1  # bicubic overshoots at a step
    assert resize(step, (64, 64)).min() == 0 and resize(step, (64, 64)).max() == 1
    torch.testing.assert_close(resize(torch.full((2, 3, 9, 9), 0.3), (20, 5)), torch.full((2, 3, 20, 5), 0.3))


@pytest.mark.parametrize(
    "bad",
    [
        {"count": -1},
        {"batch": 0},
        {"scale": (0.0, 0.5)},
        {"scale": (0.5, 0.4)},
        {"scale": (0.5, 1.1)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"flip": 1.5},
        {"flip": -0.1},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=r"must|probability"):
        ViewConfig(**bad)


# Shifts ----------------------------------------------------------------------------------------------------------


def shifts(size=(64, 96), stride=16, count=12, **settings):
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    centres = grids.patch_centres(size, (16, 16), (stride, stride))
    return image, Shifts(image, size, centres, ViewConfig(count, "shifts", batch=5, **settings))


def test_the_first_window_is_the_image_and_all_are_pieces_of_the_mirrored_one():
    image, windows = shifts()
    pictures, coords = (torch.cat(part) for part in zip(*windows, strict=True))
    assert len(windows) == len(pictures) == 13 and torch.equal(pictures[0], image)
    wide = torch.cat((image.flip(-1), image, image.flip(-1)), -1)
    tiled = torch.cat((wide.flip(-2), wide, wide.flip(-2)), -2)
    for picture, where, (down, right) in zip(pictures, coords, windows.offsets.tolist(), strict=True):
        top, left = 64 + 16 * down, 96 + 16 * right
        assert torch.equal(picture, tiled[:, top : top + 64, left : left + 96])
        torch.testing.assert_close(where, coords[0] + torch.tensor([right / 6, down / 4]))


def test_windows_of_overlapping_patches_move_by_the_stride():
    image, windows = shifts(stride=8)
    down, right = windows.offsets[1].tolist()
    picture = next(iter(windows))[0][1]
    assert torch.equal(picture, cut_window(image, (8 * down, 8 * right)))


def test_settings_of_shifts_are_checked():
    with pytest.raises(ConfigError, match="'crops' or 'shifts', all of one kind"):
        ViewConfig(kind="both")
    with pytest.raises(ConfigError, match="reach is 0"):
        ViewConfig(kind="shifts", reach=0)
    with pytest.raises(ConfigError, match="2 x 2"):
        shifts(size=(16, 96))
