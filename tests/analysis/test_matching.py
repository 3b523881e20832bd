"""Matching two images: known shifts, the ratio test, points, pictures, bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

from dvt import grids
from dvt.analysis import match_images, save_matches
from dvt.errors import ConfigError, NonFiniteError, ShapeError


def random_map(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(first, second, ratio):
    """Pairs of token numbers, by loops."""
    one, other = (
        torch.nn.functional.normalize((t - t.mean((0, 1))).flatten(0, 1).double(), dim=-1) for t in (first, second)
    )
    likeness = one @ other.T
    pairs = set()
    for i in range(len(one)):
        order = likeness[i].argsort(descending=True)
        j = int(order[0])
        clear = 1 - likeness[i, j] <= ratio * (1 - likeness[i, int(order[1])])
        if int(likeness[:, j].argmax()) == i and clear:
            pairs.add((i, j))
    return pairs


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.7])
def test_it_is_what_loops_find(ratio):
    first, second = random_map(5, 7, 4), random_map(6, 4, 4, seed=1)
    found = match_images(first, second, ratio=ratio)
    numbers = [(a * torch.tensor(size)).floor().long() for a, size in ((found.first, (7, 5)), (found.second, (4, 6)))]
    pairs = {(int(a[1] * 7 + a[0]), int(b[1] * 4 + b[0])) for a, b in zip(*numbers, strict=True)}
    assert pairs == naive(first, second, ratio) and len(pairs) == len(found)
    assert (found.likeness.diff() <= 0).all()


def test_a_shifted_image_is_matched_by_its_shift_and_constants_do_not_count():
    scene = random_map(8, 12, 16)
    first, second = scene[:, :10], 3 * scene[:, 2:] + 5
    found = match_images(first, second, ratio=0.5)
    exact = (found.first - found.second - torch.tensor([0.2, 0.0])).abs().amax(1) < 1e-5
    assert exact.sum() == 8 * 8 and exact.float().mean() > 0.95  # what both show, and hardly anything else
    null = match_images(first, random_map(8, 10, 16, seed=5), ratio=0.5)
    assert len(null) < 4


def test_points_are_found_where_they_lie():
    scene = random_map(8, 12, 16)
    points = grids.grid_centres((8, 10))[2:4, 5].contiguous()
    found = match_images(scene[:, :10], scene[:, 2:], points)
    torch.testing.assert_close(found.second, points - torch.tensor([0.2, 0.0]))
    assert torch.equal(found.first, points) and (found.likeness > 0.9).all()
    assert found.to_json()[0]["second"] == found.second[0].tolist()


def test_the_picture_is_written_and_shows_lines(tmp_path):
    pixels = torch.full((3, 40, 60), 0.5), torch.full((3, 60, 40), 0.5)
    found = match_images(random_map(3, 4, 8), random_map(3, 4, 8))
    path = save_matches(
        pixels, {"raw": found, "clean": match_images(random_map(3, 4, 8), 1 - random_map(3, 4, 8))}, tmp_path / "a.png"
    )
    colours = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert (np.ptp(colours, axis=-1) > 80).sum() > 500  # the rest is grey


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"second": torch.zeros(3, 4, 7)}, ShapeError, "one backbone"),
        ({"second": torch.zeros(1, 1, 8)}, ShapeError, "two tokens"),
        ({"second": torch.full((3, 4, 8), torch.nan)}, NonFiniteError, "NaN"),
        ({"ratio": 0}, ConfigError, "ratio"),
        ({"ratio": 1.1}, ConfigError, "ratio"),
        ({"points": torch.zeros(2)}, ShapeError, "points"),
        ({"points": torch.tensor([[0.5, 1.5]])}, ConfigError, "top left"),
    ],
)
def test_bad_input_is_refused(change, error, words):
    arguments = {"first": random_map(3, 4, 8), "second": random_map(3, 4, 8)} | change
    with pytest.raises(error, match=words):
        match_images(**arguments)
