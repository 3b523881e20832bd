"""Many images at once: each gets the fit that it gets alone."""

import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dvt import grids
from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.fields import LinearConfig, LinearSolver, NeuralConfig, NeuralSolver
from dvt.fields.equations import BlockTridiagonal, NormalEquations
from dvt.fields.pilot import _neighbours, _search
from dvt.views import ViewConfig, draw_boxes

SEEDS = st.integers(0, 10**6)
GRID = (5, 6)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def view_coords(views, seed=0, grid=GRID):
    """(views, h, w, 2) float64."""
    boxes, flips = draw_boxes(ViewConfig(count=views - 1), torch.Generator().manual_seed(seed))
    return grids.view_to_image(grids.grid_centres(grid).double(), boxes, flips)


def image(seed, nodes, noise, views=60, outliers=0, where=0):
    """Batches of 7 views of a random field of nodes x nodes, an artifact, noise, and some tokens far from the rest."""
    coords = view_coords(views, where)
    tokens = grids.sample(randn(seed, nodes, nodes, 6), coords) + randn(seed + 1, *GRID, 6)
    tokens = tokens + noise * randn(seed + 2, *tokens.shape)
    chosen = torch.randperm(tokens[..., 0].numel(), generator=torch.Generator().manual_seed(seed))[:outliers]
    tokens.view(-1, 6)[chosen] += 30
    return list(zip(tokens.split(7), coords.split(7), strict=True))


def smooth_and_detailed(views=60, outliers=20):
    """Four images whose best resolution and smoothness differ; the third has its views elsewhere."""
    return [
        image(0, 3, 0.5, views, outliers),
        image(10, 24, 0.01, views, outliers),
        image(20, 3, 0.5, views, 0, where=1),
        image(30, 9, 0.1, views, outliers),
    ]


def assert_same(one, other, tolerance=1e-9):
    assert one.config == other.config
    pairs = [(one.nodes, other.nodes), (one.artifact, other.artifact), (one.residual_mean, other.residual_mean)]
    assert (one.residual_map is None) == (other.residual_map is None)
    if one.residual_map is not None:
        pairs.append((one.residual_map, other.residual_map))
    for a, b in pairs:
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    assert (one.noise, one.error) == pytest.approx((other.noise, other.error), rel=tolerance)


# -- equal to one at a time -------------------------------------------------------------------------------------------


def test_images_keep_their_own_resolution_and_smoothness():
    images = smooth_and_detailed()
    solver = LinearSolver()
    alone = [solver.fit(each) for each in images]
    assert len({fit.config.resolution for fit in alone}) > 1 and len({fit.config.smoothness for fit in alone}) > 2
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 1]):
        for fit, number in zip(solver.fit_many([images[k] for k in order]), order, strict=True):
            assert_same(fit, alone[number])


CONFIGS = {
    "more views than the pilot's": LinearConfig(pilot_views=20),
    "not robust": LinearConfig(robust=False),
    "not robust, no residual": LinearConfig(robust=False, residual=False),
    "chosen smoothness alone": LinearConfig(resolution=12),
    "chosen resolution alone": LinearConfig(smoothness=0.05),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_setting_gives_the_fit_of_each_image_alone(config, shared):
    images, solver = smooth_and_detailed()[:3], LinearSolver(config)
    known = randn(99, *GRID, 6) if shared else None
    known = known - known.mean((0, 1)) if shared else None  # a mean would be the field's
    for fit, each in zip(solver.fit_many(images, known), images, strict=True):
        assert_same(fit, solver.fit(each, known))
        assert not shared or torch.equal(fit.artifact, known)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_images_of_few_views(views):
    images, solver = [image(seed, 4, 0.1, views) for seed in (0, 10)], LinearSolver()
    for fit, each in zip(solver.fit_many(images), images, strict=True):
        assert_same(fit, solver.fit(each))
        assert (views > 1) == bool(fit.artifact.any())


def test_single_precision():
    images = [[(t.float(), c.float()) for t, c in each] for each in smooth_and_detailed()]
    solver = LinearSolver()
    for fit, each in zip(solver.fit_many(images), images, strict=True):
        assert fit.nodes.dtype == torch.float32
        assert_same(fit, solver.fit(each), 1e-5)


def test_an_image_that_the_pilot_fits_exactly_does_not_touch_the_others():
    nothing = [(torch.zeros(60, *GRID, 6, dtype=torch.float64), view_coords(60))]
    noisy = image(0, 3, 0.5, outliers=20)
    solver = LinearSolver()
    zero, fit = solver.fit_many([nothing, noisy])
    assert_same(fit, solver.fit(noisy))
    assert not zero.artifact.any() and not zero.nodes.any() and zero.noise == zero.error == 0


def test_batches_of_views_may_differ_from_image_to_image():
    tokens, coords = (torch.cat(part) for part in zip(*image(0, 9, 0.1), strict=True))
    whole, split = LinearSolver(LinearConfig(pilot_views=20)).fit_many(
        [[(tokens, coords)], zip(tokens.split(11), coords.split(11), strict=True)]
    )
    assert_same(whole, split, 1e-6)


def test_no_images_give_no_fits():
    assert LinearSolver().fit_many([]) == [] == NeuralSolver().fit_many([])


def test_the_neural_solver_fits_many_one_by_one():
    solver = NeuralSolver(NeuralConfig(levels=2, finest=32, steps=4, tokens_per_step=16))
    images = [image(seed, 4, 0.1, 5) for seed in (0, 10)]
    for fit, each in zip(solver.fit_many(images), images, strict=True):
        alone = solver.fit(each)
        assert torch.equal(fit.artifact, alone.artifact)
        assert torch.equal(fit.semantic(each[0][1]), alone.semantic(each[0][1]))


# -- the equations ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([(1,), (3,), (2, 3)]), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_the_batched_factor_equals_dense_solves(seed, batch, rows, columns, channels):
    stencil, nodes = randn(seed, *batch, 5, rows, columns), rows * columns
    stencil[..., 1:, :, :].clamp_(-2, 2)
    stencil[..., 0, :, :] = stencil[..., 0, :, :].abs() + 16.5  # more than its eight neighbours, hence definite
    matrix = torch.zeros(*batch, nodes, nodes, dtype=torch.float64)
    for d, (down, right) in enumerate([(0, 0), (0, 1), (1, -1), (1, 0), (1, 1)]):
        for i in range(rows - down):
            for j in range(max(0, -right), min(columns, columns - right)):
                a, b = i * columns + j, (i + down) * columns + j + right
                matrix[..., a, b] = matrix[..., b, a] = stencil[..., d, i, j]
    rhs = randn(seed + 1, *batch, nodes, channels)
    solved = BlockTridiagonal(stencil).solve(rhs.clone())
    torch.testing.assert_close(solved, torch.linalg.solve(matrix, rhs), rtol=1e-9, atol=1e-9)


def test_one_system_that_is_not_definite_is_reported():
    stencil = torch.zeros(3, 5, 4, 4, dtype=torch.float64)
    stencil[:, 0] = 1
    BlockTridiagonal(stencil)
    stencil[1, 0, 2, 1] = -1
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        BlockTridiagonal(stencil)


def test_views_added_to_one_image_or_to_all_are_the_same_sums():
    tokens, coords, weights = randn(0, 3, 4, 30, 2), torch.rand(3, 4, 30, 2).double(), torch.rand(3, 4, 30).double()
    together, apart = (NormalEquations(3, (6, 7), 30, 2, tokens) for _ in range(2))
    together.add(tokens, coords, weights)
    for number in (2, 0, 1):
        part = slice(number, number + 1)
        apart.image(number).add(tokens[part], coords[part], weights[part])
    for name in ("stencil", "cross", "field_rhs", "count", "artifact_rhs"):
        assert getattr(apart, name).any()
        torch.testing.assert_close(getattr(apart, name), getattr(together, name))


def test_several_smoothness_values_are_solved_at_once():
    tokens, coords = randn(0, 2, 4, 30, 3), torch.rand(2, 4, 30, 2).double()
    equations = NormalEquations(2, (6, 7), 30, 3, tokens)
    equations.add(tokens, coords)
    values, known = torch.tensor([[0.01, 1.0], [0.3, 0.02], [5.0, 0.1]]).double(), randn(1, 2, 30, 3)
    fields, _ = equations.solve(values, known)
    assert fields.shape == (3, 2, 42, 3)
    for value, field in zip(values, fields, strict=True):
        for number in range(2):
            alone, _ = equations.image(number).solve(float(value[number]), known[number])
            torch.testing.assert_close(field[number], alone[0])


class Counted(TorchDispatchMode):
    """Counts the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def test_many_images_take_as_many_eliminations_as_one():
    images, solver = [image(seed, 9, 0.1) for seed in (0, 10, 20)], LinearSolver(LinearConfig(resolution=10))
    counts = []
    for views in (images[:1], images):
        with Counted() as counted:
            solver.fit_many(views)
        counts.append(counted.counts)
    for name in ("aten.linalg_solve_triangular", "aten.linalg_cholesky_ex", "aten.baddbmm_"):
        assert counts[0][name] == counts[1][name] > 10, name


# -- the neighbour search ---------------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_by_brute_force():
    coords = torch.stack([view_coords(4, seed).flatten(1, 2) for seed in (0, 1, 0)]).float()
    near, near_nodes = _neighbours(coords, (7, 8))
    assert near.shape == (3, 120, 9) and near_nodes.shape == (3, 56, 9)
    assert not torch.equal(near[0], near[1]) and torch.equal(near[0], near[2])
    points = coords.flatten(1, 2).double()
    nodes = grids.node_coords((7, 8)).view(1, -1, 2).expand(3, -1, -1).double()
    for found, targets in ((near, points), (near_nodes, nodes)):
        distance = (targets[:, :, None] - points[:, None]).norm(dim=-1)
        torch.testing.assert_close(distance.gather(2, found), distance.topk(9, largest=False).values)


def test_images_of_equal_coordinates_share_one_search_and_few_are_remembered():
    _search.cache_clear()
    solver, images = LinearSolver(LinearConfig(resolution=10)), smooth_and_detailed()
    cold = solver.fit(images[0])
    assert _search.cache_info().misses == 1
    warm = solver.fit_many([images[0], images[1]])[0]
    assert _search.cache_info().misses == 1
    assert_same(warm, cold)
    solver.fit_many(images)  # the third has other coordinates
    assert _search.cache_info().misses == 2
    for seed in range(8):
        _neighbours(view_coords(2, seed)[None].flatten(2, 3), (5, 5))
    assert _search.cache_info().currsize <= 4


def test_threads_may_fit_at_once():
    _search.cache_clear()
    images, solver = smooth_and_detailed(), LinearSolver(LinearConfig(resolution=10))
    alone = [solver.fit(each) for each in images]
    _search.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(solver.fit, images), alone, strict=True):
            assert_same(one, other)


# -- streaming --------------------------------------------------------------------------------------------------------


def test_images_are_read_in_order_and_only_the_pilots_views_are_held():
    coords, read, alive, most = view_coords(12), [], set(), 0

    def views(name):
        nonlocal most
        for number, view in enumerate(coords):
            memory = np.random.default_rng(number).standard_normal((1, *GRID, 3))
            read.append((name, number))
            alive.add((name, number))
            weakref.finalize(memory, alive.discard, (name, number))
            tokens = torch.from_numpy(memory)
            del memory
            yield tokens, view[None]
            del tokens
            if number >= 5:  # past the pilot's views
                most = max(most, len([each for each in alive if each[0] == name]))

    LinearSolver(LinearConfig(pilot_views=5, resolution=8, residual=False)).fit_many([views("a"), views("b")])
    heads = [(name, number) for name in "ab" for number in range(5)]
    assert read == heads + [(name, number) for name in "ab" for number in range(5, 12)]
    assert not alive
    assert most <= 1  # the one in the solver's hands


# -- what is refused --------------------------------------------------------------------------------------------------


def test_images_that_do_not_fit_together_are_refused():
    (tokens, coords), *_ = image(0, 4, 0.1, 6)
    solver, one = LinearSolver(), [(tokens, coords)]
    for other in ([(tokens[:, :3], coords[:, :3])], [(tokens[..., :2], coords)]):
        with pytest.raises(ShapeError, match="as before"):
            solver.fit_many([one, other])
    with pytest.raises(ShapeError, match="equally many views"):
        solver.fit_many([one, [(tokens[:4], coords[:4])]])
    with pytest.raises(ShapeError, match="as before"):
        solver.fit_many([one, one], randn(0, 6, 5, 6))
    with pytest.raises(ConfigError, match="no views"):
        solver.fit_many([one, []])
    # beyond the pilot's views, images may differ
    assert len(LinearSolver(LinearConfig(pilot_views=4)).fit_many([one, [(tokens[:4], coords[:4])]])) == 2


@pytest.mark.parametrize("place", [0, -1])
def test_one_image_that_is_not_finite_is_refused(place):
    images = [image(seed, 4, 0.1, 30) for seed in (0, 10)]
    images[1][place][0][-1, 1, 1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        LinearSolver(LinearConfig(pilot_views=8)).fit_many(images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("shared", [False, True])
def test_cuda_equals_cpu(shared):
    images, solver = smooth_and_detailed(views=80), LinearSolver()
    known = randn(99, *GRID, 6) if shared else None
    on_cuda = [[(tokens.cuda(), coords.cuda()) for tokens, coords in each] for each in images]
    found = solver.fit_many(on_cuda, None if known is None else known.cuda())
    for fit, each, cpu in zip(found, images, solver.fit_many(images, known), strict=True):
        assert fit.nodes.is_cuda and fit.config == cpu.config
        raw, coords = each[0][0][0], each[0][1][0]
        cuda_terms, cpu_terms = fit.decompose(raw.cuda(), coords.cuda()).terms(), cpu.decompose(raw, coords).terms()
        for name, term in cuda_terms.items():
            torch.testing.assert_close(term.cpu(), cpu_terms[name], atol=1e-6, rtol=1e-6)
