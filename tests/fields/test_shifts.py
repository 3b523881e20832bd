"""The two-way model of shifted windows: known answers, an independent dense solution, and its errors."""

import pytest
import torch

from dvt import grids
from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.fields.planted import PlantedBackbone, PlantedBackboneConfig, relative_error
from dvt.fields.shifts import ShiftConfig, ShiftSolver, say_if_too_small
from dvt.fields.twoway import TwoWay
from dvt.views import Shifts, ViewConfig, resize

GRID, CHANNELS = (5, 6), 3
EXACT = ShiftConfig(ridge=1e-10, alarm=1, average=1, robust=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(windows=12, noise=0.0, artifact=1.0, grid=GRID, channels=CHANNELS, seed=0):
    """Windows (tokens, coords) of a planted two-way model, its F by window (V, h, w, C) and its G."""
    draw = generator(seed)
    offsets = grids.draw_offsets(grid, windows, 1.0, draw)
    coords = grids.offset_coords(grids.grid_centres(grid), offsets, (1 / grid[0], 1 / grid[1]))
    _, period = grids.lattice(coords)
    field = torch.randn(period[0] * period[1], channels, generator=draw)
    field = field[grids.lattice_index(grid, offsets, period)].view(-1, *grid, channels)
    g = artifact * torch.randn(*grid, channels, generator=draw)
    g = g - g.mean((0, 1))
    tokens = field + g
    return tokens + noise * torch.randn(tokens.shape, generator=draw), coords, field, g


def dense(tokens, coords, weights=None):
    """G and the squared error by one dense least-squares problem, one token after the other."""
    offsets, (rows, columns) = grids.lattice(coords)
    views, height, width, channels = tokens.shape
    contents, positions = rows * columns, height * width
    weights = torch.ones(views, positions) if weights is None else weights
    design, target = [], []
    for view in range(views):
        for row in range(height):
            for column in range(width):
                line = torch.zeros(contents + positions, dtype=torch.float64)
                y, x = (offsets[view] + torch.tensor([row, column])).tolist()
                line[y % rows * columns + x % columns] = 1
                line[contents + row * width + column] = 1
                root = weights[view, row * width + column].double().sqrt()
                design.append(root * line)
                target.append(root * tokens[view, row, column].double())
    design, target = torch.stack(design), torch.stack(target)
    found = torch.linalg.lstsq(design, target, driver="gelsd").solution
    artifact = found[contents:].view(height, width, channels)
    return artifact - artifact.mean((0, 1)), (design @ found - target).square().sum()


def test_noiseless_windows_give_the_planted_terms_back_exactly():
    tokens, coords, field, artifact = problem()
    fit = ShiftSolver(EXACT).fit([(tokens[:5], coords[:5]), (tokens[5:], coords[5:])])
    assert (fit.artifact - artifact).abs().max() < 1e-5
    assert fit.noise < 1e-8
    parts = fit.decompose(tokens[0], coords[0])
    assert (parts.semantic - field[0]).abs().max() < 1e-5 and parts.error.abs().max() < 1e-5


@pytest.mark.parametrize("weighted", [False, True])
def test_the_solution_is_that_of_a_dense_least_squares_problem(weighted):
    tokens, coords, _, _ = problem(noise=0.5, grid=(3, 4), windows=9)
    weights = 0.1 + torch.rand(10, 12, generator=generator(3)) if weighted else None
    expected, error = dense(tokens, coords, weights)
    offsets, period = grids.lattice(coords)
    sums = TwoWay(1, (3, 4), period, CHANNELS, tokens)
    sums.add(tokens.flatten(1, 2)[None], offsets, None if weights is None else weights[None])
    solution = sums.solve(1e-10)
    torch.testing.assert_close(solution.artifact[0].view(3, 4, -1), expected, atol=1e-5, rtol=1e-5)
    assert float(solution.left[0]) == pytest.approx(float(error), rel=1e-5)


def test_a_weight_of_zero_takes_a_token_out():
    tokens, coords, _, artifact = problem()
    tokens[3, 2, 2] += 100
    weights = torch.ones(len(tokens), GRID[0] * GRID[1])
    weights[3, 2 * GRID[1] + 2] = 0
    offsets, period = grids.lattice(coords)
    sums = TwoWay(1, GRID, period, CHANNELS, tokens)
    sums.add(tokens.flatten(1, 2)[None], offsets, weights[None])
    found = sums.solve(EXACT.ridge).artifact[0].view(*GRID, -1)
    assert (found - artifact).abs().max() < 1e-5
    assert (ShiftSolver(EXACT).fit([(tokens, coords)]).artifact - artifact).abs().max() > 1


def test_the_gauge_a_constant_goes_into_the_field_and_a_known_artifact_is_centred():
    tokens, coords, field, artifact = problem()
    fit = ShiftSolver(EXACT).fit([(tokens + 7, coords)])
    assert fit.artifact.mean((0, 1)).abs().max() < 1e-6
    assert (fit.field - field[0] - 7).abs().max() < 1e-4
    known = ShiftSolver(EXACT).fit([(tokens, coords)], artifact + 3)
    assert (known.artifact - artifact).abs().max() < 1e-5 and (known.field - field[0]).abs().max() < 1e-5


def test_images_that_are_solved_together_and_the_shared_artifact_agree_with_one():
    first, second = problem(noise=0.3), problem(noise=0.3, seed=0)
    solver = ShiftSolver(EXACT)
    alone = [solver.fit([each[:2]]) for each in (first, second)]
    together = solver.fit_many([[first[:2]], [second[:2]]])
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.artifact, other.artifact)
    shares = [solver.artifact_equations([each[:2]]) for each in (first, second)]
    shared = solver.solve_shared(tuple(sum(part) for part in zip(*shares, strict=True)), GRID)
    torch.testing.assert_close(shared, alone[0].artifact, atol=1e-5, rtol=1e-4)  # the same image twice


def test_offsets_in_another_order_find_nothing():
    tokens, coords, field, _ = problem(windows=24, noise=0.1)
    wrong = coords[torch.randperm(len(coords), generator=generator(1))]
    right = ShiftSolver(EXACT).fit([(tokens, coords)])
    lost = ShiftSolver(EXACT).fit([(tokens, wrong)])
    assert relative_error(right.field, field[0]) < 0.1 < 0.5 < relative_error(lost.field, field[0])


def test_one_window_has_no_artifact():
    tokens, coords, _, _ = problem(windows=0)
    fit = ShiftSolver(EXACT).fit([(tokens, coords)])
    assert fit.artifact.abs().max() == 0 and torch.equal(fit.field, tokens[0])


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("artifact, goal", [(0.0, 0.05), (0.1, 0.08), (0.65, 0.08), (2.0, 0.1)])
def test_the_artifact_of_a_planted_backbone_is_removed_and_nothing_else_is(photo, artifact, goal, noise):
    backbone = PlantedBackbone(photo, PlantedBackboneConfig(channels=24, artifact=artifact, context=noise))
    size = backbone.input_size((512, 512))
    windows = Shifts(photo, size, backbone.centres(size), ViewConfig(16, "shifts"))
    views = [(backbone(images).patches, coords) for images, coords in windows]
    fit = ShiftSolver().fit(views)
    parts = fit.decompose(views[0][0][0], backbone.centres(size))
    assert relative_error(parts.semantic, backbone.semantic(resize(photo, size)[None])[0]) < goal
    if not fit.found:
        assert artifact == 0 and torch.equal(parts.semantic, parts.raw)


def test_bad_windows_are_refused_with_what_to_do():
    tokens, coords, _, _ = problem()
    solver = ShiftSolver(EXACT)
    with pytest.raises(ConfigError, match="mixed kinds"):
        solver.fit([(tokens, torch.cat((coords[:-1], coords[-1:] * 0.5)))])
    with pytest.raises(ConfigError, match="mixed kinds"):
        solver.fit([(tokens, torch.cat((coords[:-1], coords[-1:].flip(2))))])
    with pytest.raises(ConfigError, match="2 x 2 patches, got 1 x 6"):
        solver.fit([(tokens[:, :1], coords[:, :1])])
    with pytest.raises(ConfigError, match="no views"):
        solver.fit([])
    with pytest.raises(ShapeError, match="as before"):
        solver.fit([(tokens, coords), (tokens[:, :4], coords[:, :4])])
    with pytest.raises(NonFiniteError):
        solver.fit([(tokens / 0, coords)])
    with pytest.raises(ConfigError, match=r"alarm is 0\.001"):
        ShiftConfig(alarm=0.001)


@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (7, 1 + 1)])
def test_an_image_of_few_patches_stays_as_it_is_unless_the_test_can_tell(grid, caplog):
    say_if_too_small.cache_clear()
    tokens, coords, _, _ = problem(grid=grid, windows=16)
    fits = [ShiftSolver().fit([(tokens, coords)]) for _ in range(2)]
    assert torch.equal(fits[0].decompose(tokens[0], coords[0]).semantic, tokens[0]) is not fits[0].found
    too_small = grid[0] * grid[1] < 8
    assert fits[0].found is not too_small
    assert (
        len(caplog.records) == int(too_small) and ("larger --size, or --product ensembled" in caplog.text) is too_small
    )
    assert ShiftSolver(ShiftConfig(alarm=0.2)).fit([(tokens, coords)]).found


# -- outliers ---------------------------------------------------------------------------------------------------------


def planted_errors(photo, seed, robust=True, **outliers):
    """Relative errors of the tokens that are no outliers in this view, and of G; and the share of outliers."""
    config = PlantedBackboneConfig(channels=32, size=160, context=0.5, noise=0.1, seed=seed, **outliers)
    backbone = PlantedBackbone(photo, config)
    size = backbone.input_size((photo.shape[1], photo.shape[2]))
    image = resize(photo, size)
    views = Shifts(photo, size, backbone.centres(size), ViewConfig(16, "shifts", seed=seed))
    batches = [(backbone(images).patches, coords) for images, coords in views]
    fit = ShiftSolver(ShiftConfig(robust=robust)).fit(batches)
    found = fit.decompose(batches[0][0][0], batches[0][1][0]).semantic
    truth, plain = backbone.semantic(image[None])[0], ~backbone.outliers(image[None])[0]
    artifact = relative_error(fit.artifact, backbone.artifact(backbone.grid(size)))
    return relative_error(found[plain][None], truth[plain][None]), artifact, 1 - float(plain.float().mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("flicker", [False, True])
def test_outliers_change_neither_the_artifact_nor_other_tokens(photo, seed, share, flicker):
    clean, artifact, _ = planted_errors(photo, seed)
    dirty, found, outliers = planted_errors(photo, seed, outliers=share, flicker=flicker)
    assert dirty <= 1.3 * clean and found <= 1.3 * artifact + 0.01
    if flicker and outliers > 0.02:  # content's own outliers fall out of the two-way model by themselves
        off, _, _ = planted_errors(photo, seed, robust=False, outliers=share, flicker=flicker)
        assert off > 2 * clean


def test_robust_weights_cost_a_clean_image_little(photo):
    for seed in range(3):
        (with_them, artifact, _), (without, plain, _) = (
            planted_errors(photo, seed, robust=each) for each in (True, False)
        )
        assert with_them <= 1.05 * without and artifact <= 1.1 * plain


def test_an_outlier_is_replaced_by_what_other_windows_show_there(photo):
    tokens, coords, field, _ = problem(noise=0.05, channels=24, windows=40)
    tokens[0, 2, 2] += 30
    fit = ShiftSolver(ShiftConfig(alarm=1)).fit([(tokens, coords)])
    found = fit.decompose(tokens[0], coords[0]).semantic
    assert (found[2, 2] - field[0, 2, 2]).norm() < 0.1 * field[0, 2, 2].norm()
    plain = ShiftSolver(ShiftConfig(alarm=1, robust=False)).fit([(tokens, coords)])
    spoilt = plain.decompose(tokens[0], coords[0]).semantic[2, 2]
    assert (spoilt - field[0, 2, 2]).norm() > field[0, 2, 2].norm()


def test_weighted_images_together_are_each_alone():
    tokens, coords, _, _ = problem(noise=0.5, windows=9)
    flat, weights = tokens.flatten(1, 2), 0.1 + torch.rand(2, 10, GRID[0] * GRID[1], generator=generator(3))
    offsets, period = grids.lattice(coords)
    images = torch.stack((flat, 2 - flat.flip(0)))
    both = TwoWay(2, GRID, period, CHANNELS, flat)
    both.add(images, offsets, weights)
    found, equations = both.solve(1e-6), both.equations()
    for number in range(2):
        alone = TwoWay(1, GRID, period, CHANNELS, flat)
        alone.add(images[number : number + 1], offsets, weights[number : number + 1])
        for part, other in zip(alone.solve(1e-6), found, strict=True):
            torch.testing.assert_close(part[0], other[number])
        for part, other in zip(alone.equations(), equations, strict=True):
            torch.testing.assert_close(part[0], other[number])


def test_the_size_of_batches_changes_nothing_beyond_the_windows_that_are_held(monkeypatch):
    monkeypatch.setattr("dvt.fields.shifts.HELD", 7)
    tokens, coords, _, _ = problem(noise=0.3, windows=20)
    tokens[9, 2, 2] += 30  # not among the first ones
    fits = [
        ShiftSolver(ShiftConfig(alarm=1)).fit(zip(tokens.split(size), coords.split(size), strict=True))
        for size in (1, 4, 6, 21)
    ]
    for fit in fits[1:]:
        torch.testing.assert_close(fit.artifact, fits[0].artifact)
        torch.testing.assert_close(fit.field, fits[0].field)
