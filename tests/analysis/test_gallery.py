"""Joint PCA colours of many images: known answers, the foreground, finer maps, files, bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

from dvt.analysis import ShownImage, pca, save_gallery
from dvt.errors import ConfigError, NonFiniteError, ShapeError


def scene(seed, rows=6, columns=8, channels=5):
    """An object in the middle of a wide background, with a photograph; the object's tokens have parts of their own."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    inside[2:4, 2:6] = True
    tokens = 0.05 * torch.randn(rows, columns, channels, generator=generator)
    tokens[..., 0] += 4.0 * inside
    tokens[2:4, 2:4, 1] += 1
    image = torch.full((3, 8 * rows, 8 * columns), 0.2)
    image[:, 16:32, 16:48] = 0.8
    return ShownImage(f"scene{seed}", {"raw": tokens, "clean": 2 * tokens + 7}, image), inside


def test_the_same_feature_has_the_same_colour_in_all_images_and_terms():
    (first, _), (second, _) = scene(0), scene(1, 6, 12)
    shown = pca([first, second])
    torch.testing.assert_close(shown[0]["raw"], shown[0]["clean"], atol=1e-4, rtol=0)  # shift and scale of a term
    colours = [shown[0]["raw"][2, 5], shown[1]["raw"][3, 5]]
    assert (colours[0] - colours[1])[0].abs() < 0.1
    assert (shown[0]["raw"][2, 5] - shown[0]["raw"][0, 0])[0].abs() > 0.8
    assert all(each.min() >= 0 and each.max() <= 1 for maps in shown for each in maps.values())


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_side_away_from_the_borders_and_its_parts_differ(sign):
    image, inside = scene(0)
    image = ShownImage("a", {term: sign * each for term, each in image.maps.items()}, image.pixels)
    (shown,) = pca([image], foreground=True)
    white = (shown["raw"] == 1).all(-1)
    assert torch.equal(white, ~inside)
    assert (shown["raw"][2, 2] - shown["raw"][2, 5]).abs().max() > 0.8


def test_finer_colours_end_where_the_object_does_in_the_photograph():
    image, inside = scene(0)
    (shown,) = pca([image], foreground=True, factor=4)
    expected = inside.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal((shown["clean"] == 1).all(-1), ~expected)


def test_pictures_and_the_page_hold_every_map(tmp_path):
    images = [scene(0)[0], ShownImage("<b>&", scene(1)[0].maps)]
    files = save_gallery(images, pca(images), tmp_path / "out")
    assert [path.name for path in files] == ["0000-scene0.png", "0001-<b>&.png", "index.html"]
    assert all(np.asarray(Image.open(path)).std() > 5 for path in files[:2])
    page = files[-1].read_text()
    assert page.count("<img") == 2 + 3 and "<b>&" not in page and "http" not in page


@pytest.mark.parametrize(
    ("images", "options", "error", "words"),
    [
        ([], {}, ConfigError, "no image"),
        ([scene(0)[0], ShownImage("b", {"raw": torch.zeros(2, 2, 5)})], {}, ShapeError, "same terms"),
        ([ShownImage("b", {"raw": torch.zeros(2, 2, 5), "x": torch.zeros(2, 2, 4)})], {}, ShapeError, "in common"),
        ([ShownImage("b", {"raw": torch.zeros(2, 2, 5)})], {"factor": 2}, ConfigError, "not available"),
        ([ShownImage("b", {"raw": torch.full((2, 2, 5), torch.nan)})], {}, NonFiniteError, "NaN"),
        ([scene(0)[0]], {"factor": 0}, ConfigError, "factor"),
    ],
)
def test_bad_input_is_refused(images, options, error, words):
    with pytest.raises(error, match=words):
        pca(images, **options)


def test_constant_and_single_channel_maps_are_shown():
    (flat,) = pca([ShownImage("a", {"raw": torch.ones(3, 3, 4)})])
    assert flat["raw"].std() == 0
    (one,) = pca([ShownImage("a", {"raw": torch.arange(9.0).view(3, 3, 1)})])
    assert one["raw"].shape == (3, 3, 3) and (one["raw"][..., 1:] == 0.5).all()
