"""Upsampling guided by an image: a naive loop, edges kept, laws, tiles that change nothing, bad input."""

import math

import pytest
import torch

import dvt
from dvt import grids, upsampling
from dvt.errors import ConfigError, NonFiniteError, ShapeError


def two_halves(rows=6, columns=8, patch=8, at=27):
    """Tokens of two kinds, an image of two colours whose edge lies inside a patch, and on which side each cell is."""
    image = torch.full((3, rows * patch, columns * patch), 0.2)
    image[:, :, at:] = 0.8
    share = (torch.arange(columns * patch) >= at).float().view(columns, patch).mean(1)
    tokens = torch.stack((share, 1 - share), -1).expand(rows, columns, 2).contiguous()
    return tokens, image, torch.arange(columns * patch) >= at


def naive(tokens, image, size, rounds, contrast):
    """The definition, pixel by pixel."""
    guide = upsampling._lab(upsampling.resize(image, size))
    guide = guide / (contrast * guide.flatten(1).var(1, correction=0).sum().sqrt())
    values = grids.resample(tokens, size)
    ratios = [size[0] / tokens.shape[0], size[1] / tokens.shape[1]]
    for _ in range(rounds):
        for level in range(1 + math.ceil(math.log2(max(ratios)))):
            down, right = (max(1, round(ratio / 2**level)) for ratio in ratios)
            result = torch.zeros_like(values)
            for i in range(size[0]):
                for j in range(size[1]):
                    total = 0.0
                    for y in (-1, 0, 1):
                        for x in (-1, 0, 1):
                            a, b = min(max(i + y * down, 0), size[0] - 1), min(max(j + x * right, 0), size[1] - 1)
                            apart = float((guide[:, a, b] - guide[:, i, j]).square().sum()) + y * y + x * x
                            result[i, j] += math.exp(-apart / 2) * values[a, b]
                            total += math.exp(-apart / 2)
                    result[i, j] /= total
            values = result
    return values


@pytest.mark.parametrize("size", [(12, 16), (11, 9)])
def test_it_is_what_a_naive_loop_computes(size):
    generator = torch.Generator().manual_seed(0)
    tokens, image = torch.randn(3, 4, 5, generator=generator), torch.rand(3, 24, 32, generator=generator)
    expected = naive(tokens, image, size, rounds=2, contrast=0.3)
    found = dvt.upsample(tokens, image, size=size, rounds=2, contrast=0.3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_edge_inside_a_patch_is_found_to_the_pixel():
    tokens, image, right = two_halves()
    fine = dvt.upsample(tokens, image, size=image.shape[1:])
    bilinear = grids.resample(tokens, image.shape[1:])
    assert torch.equal(fine[..., 0].gt(0.5), right.expand(len(fine), -1))
    assert not torch.equal(bilinear[..., 0].gt(0.5), right.expand(len(fine), -1))
    edge = fine[:, :, 0].diff(dim=1).abs()
    assert edge[:, 26].min() > 10 * edge[:, [20, 24, 28, 32]].max()  # one step, where the image has it


def test_without_edges_it_is_smooth_and_constants_stay():
    tokens = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    flat = torch.full((3, 64, 96), 0.5)
    fine = dvt.upsample(tokens, flat, 4)
    assert fine.diff(dim=0).abs().max() < grids.resample(tokens, (16, 24)).diff(dim=0).abs().max()
    assert fine.amin() >= tokens.amin() - 1e-5 and fine.amax() <= tokens.amax() + 1e-5
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(1))
    same = torch.full((4, 6, 3), 2.5)
    torch.testing.assert_close(dvt.upsample(same, image, 4), torch.full((16, 24, 3), 2.5))


def test_tiles_and_groups_of_channels_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tokens, image = torch.randn(7, 9, 5, generator=generator), torch.rand(3, 60, 80, generator=generator)
    whole = dvt.upsample(tokens, image, 4, rounds=2)
    monkeypatch.setattr(upsampling, "_TILE", 10)
    monkeypatch.setattr(upsampling, "_FLOATS", 2 * 34 * 40)
    monkeypatch.setattr(upsampling, "_BAND", 300)
    torch.testing.assert_close(dvt.upsample(tokens, image, 4, rounds=2), whole, atol=1e-6, rtol=1e-6)


def test_it_is_linear_in_the_tokens_and_mirrors_with_the_image():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, 6, 3, generator=generator)
    image = torch.rand(3, 32, 48, generator=generator)
    both = dvt.upsample(torch.stack((first, second, 2 * first - second)), image.expand(3, -1, -1, -1), 4)
    torch.testing.assert_close(both[2], 2 * both[0] - both[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dvt.upsample(first.flip(1), image.flip(2), 4), both[0].flip(1), atol=1e-4, rtol=1e-4)


def test_factor_one_half_precision_and_the_places_of_overlapping_patches():
    tokens, image, _ = two_halves()
    assert torch.equal(dvt.upsample(tokens, image, 1), tokens)
    assert dvt.upsample(tokens.half(), image, 2).dtype == torch.float16
    ramp = torch.arange(5.0).view(1, 5, 1).expand(5, 5, 1)
    centres = grids.patch_centres((24, 24), (8, 8), (4, 4))
    fine = dvt.upsample(ramp, torch.full((3, 24, 24), 0.5), size=(24, 24), centres=centres, rounds=1)
    tiled = dvt.upsample(ramp, torch.full((3, 24, 24), 0.5), size=(24, 24), rounds=1)
    assert float(fine[12, 12] - fine[12, 11]) > 1.1 * float(tiled[12, 12] - tiled[12, 11])  # 4 pixels apart, not 4.8


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"factor": None}, ConfigError, "either a factor or a size"),
        ({"size": (12, 16)}, ConfigError, "either a factor or a size"),
        ({"factor": 0}, ConfigError, "factor is 0"),
        ({"factor": 1.5}, ConfigError, "whole number"),
        ({"factor": None, "size": (5, 16)}, ShapeError, "smaller than the grid"),
        ({"image": torch.zeros(1, 48, 64)}, ShapeError, "fit together"),
        ({"image": torch.zeros(1, 3, 48, 64)}, ShapeError, "fit together"),
        ({"image": torch.full((3, 48, 64), math.nan)}, NonFiniteError, "NaN"),
        ({"centres": torch.zeros(2, 2, 2)}, ShapeError, "centres"),
        ({"rounds": 0}, ConfigError, "rounds"),
        ({"contrast": 0}, ConfigError, "contrast"),
    ],
)
def test_bad_input_is_refused(change, error, words):
    tokens, image, _ = two_halves()
    arguments = {"tokens": tokens, "image": image, "factor": 2} | change
    with pytest.raises(error, match=words):
        dvt.upsample(**arguments)
