"""The neural solver on a small planted problem, and what it refuses."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import scipy.optimize
import torch

from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.fields.encodings import GridLayout
from dvt.fields.neural import NeuralConfig, NeuralSolver
from dvt.grids import grid_centres, sample, view_to_image

GRID, CHANNELS = (8, 8), 16
CONFIG = NeuralConfig(levels=4, finest=64, channels=4, steps=400, tokens_per_step=1024, lr=0.02)
QUICK = replace(CONFIG, steps=20, tokens_per_step=64)


class Problem:
    """33 views of a smooth random field of rank 4, with waves for an artifact and noise of .05."""

    def __init__(self, seed=0, views=32, noise=0.05, size=1.0):
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(13, 13, 4, generator=generator)
        self.map = size * latent @ torch.randn(4, CHANNELS, generator=generator) / 2
        self.coords = grid_centres(GRID)
        waves = torch.sin(2 * math.pi * (self.coords @ (3 * torch.rand(2, CHANNELS, generator=generator))))
        self.artifact = size * (waves - waves.mean((0, 1)))
        corners = torch.rand(views, 2, generator=generator) * 0.5
        boxes = torch.cat((torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.cat((corners, corners + 0.5), -1)))
        flips = torch.rand(views + 1, generator=generator) < 0.5
        flips[0] = False
        self.view_coords = view_to_image(self.coords, boxes, flips)
        tokens = self.field(self.view_coords) + self.artifact
        self.tokens = tokens + size * noise * torch.randn(tokens.shape, generator=generator)

    def field(self, coords):
        return sample(self.map, coords)

    def batches(self, size=10):
        return zip(self.tokens.split(size), self.view_coords.split(size), strict=True)

    def errors(self, fit):
        """Relative errors of F and G after removing means."""
        pairs = ((fit.semantic(self.coords), self.field(self.coords)), (fit.artifact, self.artifact))
        centred = [(a - a.mean((0, 1)), b - b.mean((0, 1))) for a, b in pairs]
        return tuple(((a - b).norm() / b.norm()).item() for a, b in centred)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The matrices are so small that more threads only wait for each other, above all beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.fixture(scope="module")
def fit(problem):
    return NeuralSolver(CONFIG).fit(problem.batches())


def numbers(fit, problem):
    return torch.stack((fit.semantic(problem.coords), fit.artifact, fit.residual(problem.tokens[0])))


def test_planted_terms_are_recovered(problem, fit):
    field, artifact = problem.errors(fit)
    assert field < 0.12 and artifact < 0.1


def test_the_law_and_the_noise_left_over(problem, fit):
    parts = fit.decompose(problem.tokens[0], problem.coords)
    assert torch.equal(parts.semantic, parts.field)
    torch.testing.assert_close(
        parts.raw, parts.semantic + parts.artifact + parts.residual + parts.error, rtol=0, atol=1e-5
    )
    assert 0.02 < parts.error.square().mean().sqrt() < 0.15


def test_the_artifact_is_centred_and_the_field_holds_the_mean(problem, fit):
    assert fit.artifact.mean((0, 1)).abs().max() < 1e-5
    shifted = NeuralSolver(replace(CONFIG, steps=200)).fit((tokens + 7, coords) for tokens, coords in problem.batches())
    moved = shifted.semantic(problem.coords).mean((0, 1)) - fit.semantic(problem.coords).mean((0, 1))
    torch.testing.assert_close(moved, torch.full((CHANNELS,), 7.0), rtol=0, atol=0.1)


@pytest.mark.parametrize("size", [1e-3, 1e4])
def test_recovery_does_not_depend_on_the_features_size(size):
    large = Problem(size=size)
    field, artifact = large.errors(NeuralSolver(CONFIG).fit(large.batches()))
    assert field < 0.12 and artifact < 0.1


def test_features_beyond_half_precision_are_kept():
    huge = Problem(size=1e6)
    assert max(huge.errors(NeuralSolver(replace(CONFIG, steps=100)).fit(huge.batches()))) < 0.6


def test_a_field_varies_and_is_defined_everywhere(problem, fit):
    coords = torch.rand(5, 7, 3, 2) * 1.2 - 0.1
    values = fit.semantic(coords)
    assert values.shape == (5, 7, 3, CHANNELS) and torch.isfinite(values).all()
    torch.testing.assert_close(fit.semantic(coords[2, 3]), values[2, 3], rtol=1e-4, atol=1e-4)
    fine = grid_centres((32, 32))
    truth = problem.field(fine)
    assert (fit.semantic(fine) - truth).square().mean().sqrt() < 0.5 * truth.square().mean().sqrt()


def test_the_residual_term_changes_the_fit_and_can_be_off(problem, fit):
    without = NeuralSolver(replace(CONFIG, residual=False)).fit(problem.batches())
    assert torch.equal(without.residual(problem.tokens), torch.zeros_like(problem.tokens))
    assert torch.equal(without.artifact, fit.artifact), "h starts after G is frozen"
    assert not torch.allclose(without.semantic(problem.coords), fit.semantic(problem.coords), atol=1e-3)


def test_the_residual_explains_outlying_tokens_unless_it_must_be_sparse():
    problem = Problem(noise=0.02)
    chosen = torch.rand(problem.tokens.shape[:3], generator=torch.Generator().manual_seed(5)) < 0.03
    planted = torch.zeros_like(problem.tokens)
    planted[chosen] = 1.5
    problem.tokens += planted + 5
    found, strict = (
        NeuralSolver(replace(CONFIG, sparsity=s)).fit(problem.batches()).residual(problem.tokens) for s in (0.02, 10.0)
    )
    assert (found[chosen] - planted[chosen]).norm() < 0.7 * planted[chosen].norm()
    assert found[~chosen].abs().mean() < 0.1 * found[chosen].abs().mean()
    assert strict[chosen].abs().mean() < 0.1 * found[chosen].abs().mean()


def test_the_residual_learns_from_its_own_loss_alone(problem):
    silent = replace(CONFIG, residual_weight=0.0, sparsity=0.0, steps=60)
    fit = NeuralSolver(silent).fit(problem.batches())
    assert not fit.residual(problem.tokens).any()
    loud = NeuralSolver(replace(silent, residual_weight=1.0)).fit(problem.batches())
    assert loud.residual(problem.tokens).any()


def test_the_residuals_loss_does_not_move_the_field(problem):
    # The only step of the second half begins at h = 0, where the reconstruction does not see the weight either.
    fits = [NeuralSolver(replace(QUICK, steps=2, residual_weight=w)).fit(problem.batches()) for w in (0.0, 100.0)]
    assert torch.equal(fits[0].semantic(problem.coords), fits[1].semantic(problem.coords))


def test_one_point_takes_the_minimiser_of_squared_error_and_cosine():
    tokens = torch.tensor([[8.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]).view(4, 1, 1, 2)
    deviation = (tokens - tokens.mean(0)).square().mean().sqrt().item()

    def loss(c):
        squared, cosine = 0.0, 0.0
        for x, y in tokens.view(4, 2).tolist():
            squared += ((c[0] - x) ** 2 + (c[1] - y) ** 2) / 2 / deviation**2 / 4
            cosine += (c[0] * x + c[1] * y) / math.hypot(*c) / math.hypot(x, y) / 4
        return squared + 1 - cosine

    best = torch.tensor(scipy.optimize.minimize(loss, [2.0, 0.75], method="Nelder-Mead", tol=1e-8).x).float()
    config = replace(CONFIG, steps=400, final_lr=1e-5, tokens_per_step=4096, residual=False)
    found = NeuralSolver(config).fit([(tokens, torch.full((4, 1, 1, 2), 0.5))]).semantic(torch.full((2,), 0.5))
    assert (best - tokens.mean((0, 1, 2))).norm() > 0.3, "the mean, which squared error alone would take, is far"
    torch.testing.assert_close(found, best, rtol=0, atol=0.05)


def test_a_known_artifact_is_kept(problem):
    offset = 3 * torch.ones(CHANNELS)
    fit = NeuralSolver(CONFIG).fit(problem.batches(), artifact=problem.artifact + offset)
    torch.testing.assert_close(fit.artifact, problem.artifact, rtol=0, atol=1e-5)
    assert problem.errors(fit)[0] < 0.1
    total = fit.semantic(problem.coords) + fit.artifact
    assert (total - problem.tokens[0]).square().mean().sqrt() < 0.2


def test_weight_decay_is_adams_l2(problem):
    """Nodes that no token touches have no other gradient: they follow Adam with a gradient of decay times p."""
    config = replace(CONFIG, steps=12, weight_decay=1e-3)
    half = [(tokens, 0.4 * coords) for tokens, coords in problem.batches()]
    found = next(NeuralSolver(config).fit(half).field[0].parameters())
    kept = next(NeuralSolver(replace(config, weight_decay=0.0)).fit(half).field[0].parameters())
    initial = GridLayout.of(config).initial_table(torch.Generator().manual_seed(config.seed))
    untouched = (kept == initial).all(-1)
    assert 0.3 < untouched.float().mean() < 1
    value, first, second = initial[untouched].double(), 0.0, 0.0
    for step in range(config.steps):
        gradient = config.weight_decay * value
        first = config.betas[0] * first + (1 - config.betas[0]) * gradient
        second = config.betas[1] * second + (1 - config.betas[1]) * gradient**2
        corrected = [m / (1 - beta ** (step + 1)) for m, beta in zip((first, second), config.betas, strict=True)]
        value = value - config.learning_rate(step) * corrected[0] / (corrected[1].sqrt() + config.eps)
    torch.testing.assert_close(found[untouched].double(), value, rtol=1e-2, atol=1e-5)


def test_the_defaults_are_those_of_the_papers_code():
    config = NeuralConfig()
    assert (config.steps, config.weight_decay, config.lr, config.levels) == (25_000, 1e-5, 0.01, 16)
    assert config.warmup * config.steps == 2500
    with pytest.raises(ConfigError, match="weight_decay"):
        NeuralConfig(weight_decay=-1e-5)


def test_same_seed_same_result_and_another_seed_another(problem):
    one, same, other = (
        numbers(NeuralSolver(replace(QUICK, seed=s)).fit(problem.batches()), problem) for s in (4, 4, 5)
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-3)


def test_neither_batch_size_nor_global_state_matters(problem):
    before = torch.get_rng_state()
    one = numbers(NeuralSolver(QUICK).fit(problem.batches(size=10)), problem)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.inference_mode():
        views = [(tokens.clone(), coords.clone()) for tokens, coords in problem.batches(size=3)]
        two = numbers(NeuralSolver(QUICK).fit(views), problem)
    with torch.no_grad():
        three = numbers(NeuralSolver(QUICK).fit(problem.batches(size=33)), problem)
    assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("value", [0.0, 1.0, -300.0])
def test_constant_features_are_their_own_field(problem, value):
    tokens = torch.full((3, 8, 8, CHANNELS), value)
    fit = NeuralSolver(replace(CONFIG, steps=100)).fit([(tokens, problem.view_coords[:3])])
    tolerance = 0.01 * max(abs(value), 1)
    torch.testing.assert_close(fit.semantic(problem.coords), tokens[0], rtol=0, atol=tolerance)
    assert fit.artifact.abs().max() < tolerance and fit.residual(tokens).abs().max() < tolerance


def test_one_view_is_explained_though_not_separated(problem):
    fit = NeuralSolver(CONFIG).fit([(problem.tokens[:1], problem.view_coords[:1])])
    parts = fit.decompose(problem.tokens[0], problem.coords)
    assert parts.error.norm() < 0.3 * parts.raw.norm()


def test_a_single_channel_and_position():
    fit = NeuralSolver(QUICK).fit([(torch.rand(2, 1, 1, 1), torch.rand(2, 1, 1, 2))])
    assert fit.artifact.shape == (1, 1, 1) and fit.artifact.abs().item() == 0


def test_progress_counts_the_steps(problem):
    seen = []
    NeuralSolver(replace(QUICK, steps=5)).fit(problem.batches(), progress=lambda *at: seen.append(at))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    config = NeuralConfig(steps=1001, warmup=0.1)
    rates = [config.learning_rate(step) for step in range(1001)]
    assert rates[0] == pytest.approx(1e-4) and rates[99] == pytest.approx(1e-2) == max(rates)
    assert rates[550] == pytest.approx((1e-2 + 1e-3) / 2) and rates[1000] == pytest.approx(1e-3)
    assert all(a > b for a, b in pairwise(rates[101:]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 1},
        {"tokens_per_step": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"final_lr": 0.02},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"warmup": 1.0},
        {"residual_weight": -1.0},
        {"sparsity": float("nan")},
        {"encoding": "hash"},
        {"levels": 0},
    ],
)
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        NeuralConfig(**wrong)


def test_no_views_are_refused():
    with pytest.raises(ConfigError, match="at least one"):
        NeuralSolver(QUICK).fit([])


@pytest.mark.parametrize(
    ("tokens", "coords"),
    [
        ((2, 8, 8, 16), (2, 8, 8, 3)),
        ((2, 8, 8, 16), (1, 8, 8, 2)),
        ((8, 8, 16), (8, 8, 2)),
        ((0, 8, 8, 4), (0, 8, 8, 2)),
    ],
)
def test_batches_of_other_shapes_are_refused(tokens, coords):
    with pytest.raises(ShapeError):
        NeuralSolver(QUICK).fit([(torch.zeros(tokens), torch.zeros(coords))])


def test_disagreeing_batches_and_artifacts_are_refused(problem):
    other = (torch.zeros(1, 4, 4, CHANNELS), torch.zeros(1, 4, 4, 2))
    with pytest.raises(ShapeError, match="one grid"):
        NeuralSolver(QUICK).fit([*problem.batches(), other])
    with pytest.raises(ShapeError, match="artifact"):
        NeuralSolver(QUICK).fit(problem.batches(), artifact=torch.zeros(4, 4, CHANNELS))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_views_that_are_not_finite_are_refused(problem, place, value):
    batch = [problem.tokens.clone(), problem.view_coords.clone()]
    batch[place][3, 2, 1, 0] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        NeuralSolver(QUICK).fit([tuple(batch)])


def test_a_diverging_loss_is_reported(problem):
    with pytest.raises(NonFiniteError, match="loss"):
        NeuralSolver(replace(QUICK, lr=1e30)).fit(problem.batches())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_recovers_the_planted_terms_and_repeats_itself(problem):
    def views():
        return ((tokens.cuda(), coords.cuda()) for tokens, coords in problem.batches())

    one, two = NeuralSolver(CONFIG).fit(views()), NeuralSolver(CONFIG).fit(views())
    assert one.artifact.is_cuda and torch.equal(one.artifact, two.artifact)
    estimate = one.artifact.cpu()
    assert (estimate - problem.artifact).norm() < 0.12 * problem.artifact.norm()
