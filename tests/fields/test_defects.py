"""Tokens of a defect: found by their jumps, not mistaken for content, and without weight in the fit."""

from dataclasses import replace

import pytest
import torch

from dvt.fields import LinearConfig, LinearSolver
from dvt.fields.defects import Screen
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


def test_defects_in_many_views_of_a_position_are_told_from_what_is_ordinary_there():
    """A flat region at one place of many views: the median over them is raised by the defects, or is one."""
    views, positions, size = 60, 30, 10.0
    direction = torch.nn.functional.normalize(noise(16, seed=3), dim=0)
    defect = torch.zeros(views, positions, dtype=torch.bool)
    for position, share in enumerate((0.2, 0.3, 0.3, 0.4, 0.48, 0.6)):
        order = torch.randperm(views, generator=torch.Generator().manual_seed(position))
        defect[order[: round(share * views)], position] = True
    tokens = 0.7 * noise(views, positions, 16) + 1.5 * noise(1, positions, 16, seed=1)
    tokens = tokens + size * defect[..., None] * direction
    number = torch.arange(views * positions)
    near = torch.stack([(number + step * positions) % len(number) for step in range(4)], dim=-1)
    screen = Screen(tokens[None], near[None])
    assert torch.equal(screen.first[0] == 0, defect)
    assert torch.equal(screen.weights(0, tokens) == 0, defect)
