"""Tokens of a defect: found by their jumps, not mistaken for content, and without weight in the fit."""

from dataclasses import replace

import pytest
import torch

from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.fields import LinearConfig, LinearSolver
from dvt.fields.defects import Defect, defect_direction
from dvt.fields.planted import Planted, PlantedConfig, relative_error

CLEAN = PlantedConfig(channels=32, views=64)
BENCHMARK = LinearConfig(resolution=64, smoothness=0.05)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def solved(photo, problem, solver=None):
    """The fit, and the errors of F and of the semantic estimate."""
    planted = Planted(photo, problem)
    fit = (solver or LinearSolver(BENCHMARK)).fit(planted)
    parts = fit.decompose(next(iter(planted))[0][0], planted.coords)
    return fit, relative_error(parts.field, planted.field), relative_error(parts.semantic, planted.field)


KINDS = {
    "scattered": {"outliers": 0.05},
    "flickering": {"outliers": 0.1, "outlier_rate": 0.5},
    "persistent": {"outliers": 0.1, "outlier_rate": 0.5, "outlier_cells": 32},
    "a cone": {"outliers": 0.05, "outlier_spread": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 4])
def test_a_defect_is_found_whatever_its_pattern_and_hardly_matters(photo, kind, seed):
    _, clean, clean_semantic = solved(photo, replace(CLEAN, seed=seed))
    problem = replace(CLEAN, seed=seed, **KINDS[kind])
    fit, field, semantic = solved(photo, problem)
    assert fit.gate is not None
    assert field < 1.7 * clean and semantic < 1.9 * clean_semantic
    _, plain, _ = solved(photo, problem, LinearSolver(replace(BENCHMARK, robust=False)))
    assert plain > 3 * field


def test_the_gate_names_the_true_outliers_and_no_other_token(photo):
    planted = Planted(photo, replace(CLEAN, outliers=0.05))
    gate = LinearSolver(BENCHMARK).fit(planted).gate
    for tokens, coords in planted:
        outlier = (tokens - planted.truth(coords) - planted.artifact).norm(dim=-1) > 4
        assert torch.equal(gate(tokens)[..., 0] > 0, outlier)


def test_h_of_a_token_without_the_defect_is_exactly_zero(photo):
    planted = Planted(photo, replace(CLEAN, outliers=0.05))
    fit = LinearSolver(BENCHMARK).fit(planted)
    tokens, coords = next(iter(planted))
    outlier = (tokens - planted.truth(coords) - planted.artifact).norm(dim=-1) > 4
    assert fit.residual(tokens)[outlier].norm(dim=-1).min() > 4 and not fit.residual(tokens)[~outlier].any()


def shapes(kind, side=256):
    """(3, side, side) pictures of the highest contrast."""
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    pictures = {
        "disc": (x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.15**2,
        "small disc": (x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.04**2,
        "horizon": y > 0.7,
        "dots": (x * 8 % 1 - 0.5) ** 2 + (y * 8 % 1 - 0.5) ** 2 < 0.03,
        "checkers": ((x * 8).long() + (y * 8).long()) % 2 > 0,
    }
    return pictures[kind].float().expand(3, -1, -1)


@pytest.mark.parametrize("kind", ["disc", "small disc", "horizon", "dots", "checkers"])
def test_content_of_the_highest_contrast_is_no_defect(kind):
    assert LinearSolver(BENCHMARK).fit(Planted(shapes(kind), CLEAN)).gate is None


def test_a_clean_photograph_and_pure_noise_have_no_defect(photo):
    for seed in range(3):
        assert solved(photo, replace(CLEAN, seed=seed))[0].gate is None
    coords = Planted(photo, CLEAN).view_coords
    assert LinearSolver(BENCHMARK).fit([(noise(*coords.shape[:3], 16), coords)]).gate is None


def test_a_large_token_at_one_position_is_an_artifact_and_no_defect(photo):
    planted = Planted(photo, CLEAN)
    spike = torch.zeros(16, 16, 32)
    spike[3, 5] = 40.0
    fit = LinearSolver(BENCHMARK).fit([(tokens + spike, coords) for tokens, coords in planted])
    assert fit.gate is None
    assert relative_error(fit.artifact, planted.artifact + spike) < 0.02


# -- over images ------------------------------------------------------------------------------------------------------


def maps_with(direction, images=12, size=30.0, chance=0.02, seed=0):
    """Maps (8, 9, C) of noise around a mean, a few tokens of each moved along the direction."""
    mean = 3 * noise(len(direction), seed=seed + 1)
    for k in range(images):
        tokens = mean + noise(8, 9, len(direction), seed=seed + 10 + k)
        drawn = torch.rand(8, 9, 1, generator=torch.Generator().manual_seed(seed + 500 + k))
        yield tokens + size * (drawn < chance) * direction


def test_the_direction_of_many_images_is_found_within_a_degree_or_two():
    truth = torch.nn.functional.normalize(noise(48, seed=7), dim=0)
    found = defect_direction(maps_with(truth))
    assert float(found.direction @ truth) > 0.998 and found.size == pytest.approx(30, rel=0.05)
    assert found.images >= 6 and found.share == pytest.approx(0.02, abs=0.01)
    batch = defect_direction([torch.stack([*maps_with(truth)])])
    torch.testing.assert_close(batch.direction, found.direction)


def test_images_without_one_have_no_direction():
    truth = torch.nn.functional.normalize(noise(48, seed=7), dim=0)
    assert defect_direction([]) is None
    assert defect_direction(maps_with(truth, chance=0.0)) is None
    ramp = (5 * torch.rand(8, 9, 1, generator=torch.Generator().manual_seed(1))).exp() * truth  # content in between
    assert defect_direction([each + ramp for each in maps_with(truth, chance=0.0)]) is None
    each_its_own = [next(maps_with(torch.nn.functional.normalize(noise(48, seed=k), dim=0), 1)) for k in range(12)]
    assert defect_direction(each_its_own) is None
    one = [*maps_with(truth, images=1, chance=0.2)]
    assert defect_direction(one) is None and defect_direction(one, fewest_images=1) is not None


def test_a_known_direction_finds_outliers_too_few_for_one_image(photo):
    """Six of 16,640 tokens: the image alone cannot call that a defect, and a known direction can."""
    planted = Planted(photo, CLEAN)
    truth = torch.nn.functional.normalize(noise(32, seed=5), dim=0)
    size = 5 * float(planted.field.norm(dim=-1).mean())
    batches = [(tokens.clone(), coords) for tokens, coords in planted]
    places = [(1, 3, 4), (2, 8, 8), (5, 2, 11), (7, 14, 1), (9, 9, 3), (11, 6, 6)]
    for view, row, column in places:
        batches[0][0][view, row, column] += size * truth
    assert LinearSolver(BENCHMARK).fit(batches).gate is None
    fit = LinearSolver(BENCHMARK, defect=Defect(truth, size)).fit(batches)
    marked = (fit.gate(torch.cat([tokens for tokens, _ in batches]))[..., 0] > 0).nonzero().tolist()
    assert sorted(map(tuple, marked)) == sorted(places)


def test_bad_defects_are_refused():
    with pytest.raises(ShapeError, match="length 1"):
        Defect(torch.ones(4), 1.0)
    with pytest.raises(ConfigError, match="size"):
        Defect(torch.eye(4)[0], 0.0)
    with pytest.raises(ShapeError, match="feature sizes"):
        defect_direction([noise(4, 4, 3), noise(4, 4, 5)])
    with pytest.raises(ShapeError, match="token map"):
        defect_direction([noise(4, 3)])
    with pytest.raises(NonFiniteError, match="NaN"):
        defect_direction([noise(4, 4, 3) * float("nan")])
