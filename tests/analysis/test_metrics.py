"""Metrics against planted truths and independent references: brute force, scikit-learn, numpy."""

from itertools import combinations, pairwise
from math import erfc, log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvt import grids
from dvt.analysis.metrics import artifacts as metrics
from dvt.analysis.metrics.blank import blank_response
from dvt.analysis.metrics.information import mic
from dvt.analysis.metrics.nulls import matched_noise, shuffled, torus_shifted, with_null
from dvt.analysis.metrics.ridge import held_out
from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.tokens import Tokens


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def planted_position(strength, images=6, grid=(9, 12), channels=12, seed=0):
    """Noise of unit variance plus one fixed linear map of the coordinates; the first channels are x and y alone."""
    mixing = torch.cat((torch.eye(2), noise(2, channels - 2, seed=99)), dim=1)
    coords = (grids.grid_centres(grid) - 0.5) * sqrt(12)
    return Tokens.of(noise(images, *grid, channels, seed=seed) + strength * coords @ mixing)


def wave(grid, kind):
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return (-1.0) ** {"rows": rows, "columns": columns, "checkerboard": rows + columns}[kind]


# --- maximal information coefficient


def brute_force_mic(x, y, exponent=0.6):
    """MIC with one axis in equal parts of ranks, every possible partition of the other tried in turn."""

    def information(rows, columns):
        table = np.zeros((max(rows) + 1, max(columns) + 1))
        for r, c in zip(rows, columns, strict=True):
            table[r, c] += 1 / len(rows)
        outer = table.sum(1, keepdims=True) * table.sum(0)
        return (table[table > 0] * np.log(table[table > 0] / outer[table > 0])).sum()

    def one_way(equal, free):
        best = 0.0
        values = sorted(set(free))
        middle = [sum(v < e for v in equal) + sum(v == e for v in equal) / 2 for e in equal]
        for parts in range(2, int(bound / 2) + 1):
            rows = [min(parts - 1, int(rank * parts / len(equal))) for rank in middle]
            for cuts in range(1, min(int(bound / parts), len(values))):
                for where in combinations(values[1:], cuts):
                    columns = [sum(v >= edge for edge in where) for v in free]
                    best = max(best, information(rows, columns) / log(min(parts, cuts + 1)))
        return best

    bound = max(len(x) ** exponent, 4)
    return max(one_way(x, y), one_way(y, x))


@pytest.mark.parametrize("seed", range(4))
def test_mic_equals_brute_force_on_tiny_data(seed):
    position = torch.arange(4.0).repeat(5)
    features = noise(20, 3, seed=seed)
    features[:, 1] += (position - 1.5).abs()
    features[:, 2] = (features[:, 2] * 2).round()  # ties
    found = mic(features, position)
    for channel in range(3):
        expected = brute_force_mic(features[:, channel].tolist(), position.tolist())
        assert float(found[channel]) == pytest.approx(expected, abs=1e-5)


def test_mic_of_noiseless_relations_is_one_and_of_noise_small():
    position = torch.arange(20.0).repeat(15)
    features = torch.stack((position, -position.exp(), (position - 9.5).square(), torch.zeros(300)), dim=1)
    assert mic(features, position).tolist() == pytest.approx([1, 1, 1, 0], abs=1e-5)
    assert float(mic(noise(300, 20), position).max()) < 0.3
    # The bias falls with the number of tokens.
    assert float(mic(noise(3000, 4), torch.arange(20.0).repeat(150)).max()) < 0.1


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6))
def test_mic_depends_on_order_alone(seed):
    position, features = torch.arange(6.0).repeat(7), noise(42, 2, seed=seed).double()
    assert torch.equal(mic(features, position), mic(features.exp() * 3, position * 10 + 2))
    assert torch.allclose(mic(features, position), mic(-features, -position), atol=0.12)


def test_mic_in_chunks_equals_mic_alone():
    features, position = noise(60, 130), torch.arange(10.0).repeat(6)
    assert torch.allclose(mic(features, position)[[0, 70, 129]], mic(features[:, [0, 70, 129]], position), atol=1e-5)


def test_mic_refuses_other_lengths():
    with pytest.raises(ShapeError, match="n >= 4"):
        mic(noise(10, 2), torch.arange(9.0))
    with pytest.raises(ConfigError, match="exponent"):
        mic(noise(10, 2), torch.arange(10.0), exponent=2)


# --- position


@pytest.mark.parametrize("metric", [metrics.position_mic, metrics.position_decodability])
def test_position_metrics_grow_with_planted_position_up_to_one(metric):
    strengths = (0.0, 0.3, 1.0, 3.0, 30.0)
    curve = [metric(planted_position(strength)) for strength in strengths]
    assert all(low < high for low, high in pairwise(curve)), curve
    assert curve[-1] > 0.97
    low = with_null(metric, planted_position(0.0), generator(1), draws=8)
    assert not low.beyond_chance
    assert with_null(metric, planted_position(1.0), generator(1)).beyond_chance


@pytest.mark.parametrize("metric", [metrics.position_mic, metrics.position_decodability])
def test_shuffled_positions_give_the_null_within_its_interval(metric):
    tokens = planted_position(3.0)
    score = with_null(metric, shuffled(tokens, generator(5)), generator(6), draws=8)
    assert score.low <= score.value <= score.high
    assert score.high - score.low < 0.35


def smooth_maps(images, grid=(12, 12), channels=12, seed=0, width=2.0):
    """Periodic Gaussian random fields of unit variance, smooth over some patches; no two have anything in common."""
    waves = [torch.fft.fftfreq(n) for n in grid]
    filtered = torch.exp(-2 * (torch.pi * width) ** 2 * (waves[0][:, None] ** 2 + waves[1] ** 2))
    fields = torch.fft.ifft2(torch.fft.fft2(noise(images, channels, *grid, seed=seed)) * filtered).real
    return (fields / fields.std((2, 3), keepdim=True)).permute(0, 2, 3, 1)


def test_smooth_maps_look_bound_to_position_beside_shuffled_ones_and_not_beside_shifted_ones():
    """MIC within an image cannot tell smoothness from a code of position; pooled over images, it can."""
    tokens = Tokens.of(smooth_maps(8))
    within = with_null(metrics.position_mic, tokens, generator(), draws=3)
    assert within.value > 0.5 > 0.35 > within.high  # far beyond the null that is no null of it
    pooled = with_null(metrics.pooled_position_mic, tokens, generator(), draws=6, null=torus_shifted)
    assert not pooled.beyond_chance and pooled.value < 0.3


def test_a_code_of_position_in_smooth_maps_lies_outside_the_null_of_shifts():
    code = (grids.grid_centres((12, 12)) - 0.5) @ noise(2, 12, seed=3)
    tokens = Tokens.of(smooth_maps(8) + 3 * code)
    for metric in (metrics.pooled_position_mic, metrics.position_decodability):
        score = with_null(metric, tokens, generator(), draws=6, null=torus_shifted)
        assert score.value > score.high, metric


def test_the_null_of_shifts_is_rarely_left_by_maps_without_a_code():
    left = 0
    for seed in range(10):
        tokens = Tokens.of(smooth_maps(6, (10, 10), 6, seed))
        score = with_null(lambda each: metrics.pooled_position_mic(each, 3), tokens, generator(seed), 6, torus_shifted)
        left += score.beyond_chance
    assert left <= 3  # one in twenty is expected


def test_shifting_only_rolls_maps_each_by_steps_of_its_own():
    tokens = Tokens.of(noise(5, 6, 7, 3))
    moved = torus_shifted(tokens, generator(4))
    steps = []
    for before, after in zip(tokens.patches, moved.patches, strict=True):
        found = [(y, x) for y in range(6) for x in range(7) if torch.equal(before.roll((y, x), (0, 1)), after)]
        steps += found
    assert len(steps) == 5 and len(set(steps)) > 1
    assert torch.equal(moved.patches, torus_shifted(tokens, generator(4)).patches)
    one, other = torus_shifted([tokens, tokens], generator(4))
    assert torch.equal(one.patches, moved.patches) and not torch.equal(other.patches, moved.patches)


def test_a_pooled_metric_needs_images_of_one_grid():
    with pytest.raises(ShapeError, match="two or more images"):
        metrics.pooled_position_mic(Tokens.of(noise(1, 5, 5, 3)))
    with pytest.raises(ShapeError, match="two or more images"):
        metrics.pooled_position_mic([Tokens.of(noise(5, 5, 3)), Tokens.of(noise(5, 6, 3))])


def test_decodability_of_exact_coordinates_is_one_on_mixed_grids():
    mixing = noise(2, 7)
    images = [Tokens.of(grids.grid_centres(grid) @ mixing + 5) for grid in ((4, 6), (7, 5), (8, 8), (5, 9))]
    assert metrics.position_decodability(images) == pytest.approx(1, abs=1e-4)


def test_decodability_equals_least_squares_where_the_ridge_does_not_matter():
    tokens = planted_position(0.7, images=8)
    maps = tokens.patches.double().flatten(1, 2).numpy()
    xy = grids.grid_centres(tokens.grid).flatten(0, 1).double().numpy()
    with_one = np.concatenate((maps, np.ones_like(maps[..., :1])), -1)
    train, test = with_one[:4].reshape(-1, 13), with_one[4:].reshape(-1, 13)
    weights = np.linalg.lstsq(train, np.tile(xy, (4, 1)), rcond=None)[0]
    truth = np.tile(xy, (4, 1))
    expected = 1 - ((test @ weights - truth) ** 2).sum(0) / ((truth - truth.mean(0)) ** 2).sum(0)
    assert metrics.position_decodability(tokens) == pytest.approx(expected.mean(), abs=2e-3)


def test_ridge_equals_scikit_learn_at_its_best_strength():
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score

    weights = noise(40, 2, seed=3)
    groups = [
        (x := noise(12, 40, seed=seed) * 3 + 1, x @ weights + 20 * noise(12, 2, seed=seed + 50)) for seed in range(9)
    ]
    train, test = groups[:6], groups[6:]
    x, y = (torch.cat(part).double().numpy() for part in zip(*train, strict=True))
    x_test, y_test = (torch.cat(part).double().numpy() for part in zip(*test, strict=True))
    mean, deviation = x.mean(0), x.std(0)
    strengths = np.logspace(-7, 2, 19)
    errors = []
    for strength in strengths:
        wrong = 0.0
        for fold in range(5):
            kept = [group for index, group in enumerate(train) if index % 5 != fold]
            left = [group for index, group in enumerate(train) if index % 5 == fold]
            a, b = (torch.cat(part).double().numpy() for part in zip(*kept, strict=True))
            c, d = (torch.cat(part).double().numpy() for part in zip(*left, strict=True))
            model = Ridge(alpha=strength * len(a)).fit((a - mean) / deviation, b)
            wrong += ((model.predict((c - mean) / deviation) - d) ** 2).sum()
        errors.append(wrong)
    best = strengths[int(np.argmin(errors))]
    assert strengths[0] < best < strengths[-1]
    model = Ridge(alpha=best * len(x)).fit((x - mean) / deviation, y)
    expected = r2_score(y_test, model.predict((x_test - mean) / deviation), multioutput="raw_values")
    assert held_out(train, test).r2().tolist() == pytest.approx(expected.tolist(), abs=1e-8)


def test_decodability_of_one_and_two_images():
    one = planted_position(10.0, images=1)
    assert metrics.position_decodability(one) > 0.9
    assert metrics.position_decodability(planted_position(10.0, images=2)) > 0.9
    assert not with_null(metrics.position_decodability, planted_position(0.0, images=1), generator(), 8).value > 0.2


def test_decodability_reads_other_targets():
    tokens = planted_position(0.0, images=6)
    targets = [each[..., :1] * 2 + 1 for each in tokens.patches]
    assert metrics.position_decodability(tokens, targets) > 0.99
    with pytest.raises(ShapeError, match="targets"):
        metrics.position_decodability(tokens, targets[:-1])
    with pytest.raises(ShapeError, match="constant"):
        metrics.position_decodability(tokens, [torch.ones(*tokens.grid, 1)] * 6)


def test_position_that_differs_between_images_is_not_decodable():
    """The probe is scored on images that it has not seen, so memorising one image does not help."""
    coords = grids.grid_centres((8, 10))
    images = [Tokens.of(coords @ noise(2, 12, seed=seed) + 0.01 * noise(8, 10, 12, seed=seed)) for seed in range(2)]
    assert metrics.position_decodability(images[:1]) > 0.9
    assert metrics.position_decodability(images) < 0.5


# --- norms


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 30), st.integers(0, 10), st.integers(0, 1000))
def test_norm_outliers_finds_the_planted_share(high, low, seed):
    patches = torch.nn.functional.normalize(noise(2, 10, 10, 8, seed=seed), dim=-1)
    patches = patches * (10 + torch.rand(2, 10, 10, 1, generator=generator(seed)))
    flat = patches.view(-1, 8)
    order = torch.randperm(200, generator=generator(seed))
    flat[order[:high]] *= 20
    flat[order[high : high + low]] *= 0.05
    found = metrics.norm_outliers(Tokens.of(patches), sigmas=4)
    assert found.share == pytest.approx((high + low) / 200) and found.high_share == pytest.approx(high / 200)
    norms = np.linalg.norm(flat.numpy(), axis=1)
    expected = [np.quantile(norms, q, method="nearest") for q in (0.01, 0.5, 0.99)]
    assert [found.q1, found.q50, found.q99] == pytest.approx(expected, rel=0.1)
    assert found.largest == pytest.approx(norms.max(), rel=1e-5)


def test_equal_norms_have_no_outliers_and_the_normal_share_is_met():
    unit = torch.nn.functional.normalize(noise(1, 20, 20, 5), dim=-1).half()
    assert metrics.norm_outliers(Tokens.of(unit)).share == 0
    nearly = torch.ones(1, 10, 10, 3)
    nearly[0, 0] *= 1.002
    assert metrics.norm_outliers(Tokens.of(nearly)).share == 0
    tall = torch.zeros(1, 300, 300, 1) + 100 + noise(1, 300, 300, 1)
    assert metrics.norm_outliers(Tokens.of(tall), sigmas=2).share == pytest.approx(erfc(sqrt(2)), abs=0.004)


def test_matched_noise_has_the_mean_and_covariance_but_no_outliers():
    patches = noise(3, 40, 40, 4) @ noise(4, 4, seed=1) + torch.tensor([1.0, -20.0, 0.0, 5.0])
    patches[0, :3, :20] *= 10
    tokens = Tokens.of(patches)
    fake = matched_noise(tokens, generator())
    before, after = patches.reshape(-1, 4).numpy(), fake.patches.reshape(-1, 4).numpy()
    assert (np.abs(before.mean(0) - after.mean(0)) < 4 * before.std(0) / sqrt(len(before))).all()
    assert np.abs(np.cov(before.T) - np.cov(after.T)).max() < 0.06 * np.abs(np.cov(before.T)).max()
    score = with_null(lambda each: metrics.norm_outliers(each).share, tokens, generator(), null=matched_noise)
    assert score.beyond_chance and score.null < 0.001


# --- grid peak


@pytest.mark.parametrize("kind", ["rows", "columns", "checkerboard"])
@pytest.mark.parametrize("grid", [(14, 21), (16, 16), (37, 37)])
def test_grid_peak_grows_with_a_planted_patch_wave(kind, grid):
    base, direction = noise(3, *grid, 6), noise(6, seed=1)
    curve = [
        metrics.grid_peak(Tokens.of(base + strength * wave(grid, kind)[..., None] * direction))
        for strength in (0.0, 0.2, 0.5, 1.0, 2.0)
    ]
    assert curve[0] < 2
    assert all(low < high for low, high in pairwise(curve[1:])) and curve[2] > curve[0]
    assert curve[-1] > 20


def test_grid_peak_is_blind_to_smooth_maps_and_other_periods():
    x = grids.grid_centres((16, 24))[..., :1]
    smooth = Tokens.of(torch.sin(2 * torch.pi * x) * 50 + x * 100 + noise(16, 24, 4))
    assert metrics.grid_peak(smooth) < 4
    rows = torch.arange(24.0)[:, None, None]
    third = Tokens.of(torch.cos(2 * torch.pi * rows / 3).expand(24, 24, 4) * 2 + noise(24, 24, 4))
    assert metrics.grid_peak(third, period=3) > 20 > 3 > metrics.grid_peak(third)


@pytest.mark.parametrize(
    ("channels", "images", "low", "high"), [(4, 1, 1.4, 2.1), (64, 1, 1.05, 1.3), (64, 20, 0.99, 1.1)]
)
def test_the_documented_nulls_of_grid_peak(channels, images, low, high):
    drawn = [metrics.grid_peak(Tokens.of(noise(images, 14, 14, channels, seed=seed))) for seed in range(40)]
    assert low < np.mean(drawn) < high


def test_channels_that_depend_on_each_other_raise_the_null_of_grid_peak_and_matched_noise_knows():
    tokens = Tokens.of(noise(1, 14, 14, 2) @ noise(2, 64, seed=1))
    independent = with_null(metrics.grid_peak, Tokens.of(noise(1, 14, 14, 64)), generator(), 20, matched_noise)
    score = with_null(metrics.grid_peak, tokens, generator(), 20, matched_noise)
    assert score.null > 1.25 * independent.null and not score.beyond_chance


def test_grid_peak_of_shuffled_noise_and_of_constants_is_about_one():
    score = with_null(metrics.grid_peak, Tokens.of(noise(20, 14, 14, 16)), generator())
    assert 0.8 < score.null < 1.5 and not score.value > 1.6
    assert metrics.grid_peak(Tokens.of(torch.ones(1, 9, 9, 2))) == 1
    with pytest.raises(ShapeError, match="8 x 8"):
        metrics.grid_peak(Tokens.of(noise(1, 7, 9, 2)))


# --- backbones: small ones with a known answer


def patch_means(images):
    """Tokens that know their patch's content and nothing else."""
    return Tokens.of(torch.nn.functional.avg_pool2d(images, 4).movedim(1, -1) - 0.5)


def positional(strength):
    def backbone(images):
        tokens = patch_means(images)
        return tokens.with_patches(tokens.patches + strength * noise(*tokens.grid, 3, seed=7))

    return backbone


def test_shift_stability_is_one_for_pure_content_and_falls_with_position():
    image = torch.rand(3, 64, 72, generator=generator())
    scores = [metrics.shift_stability(positional(s), image, (40, 48), (4, 4)) for s in (0.0, 0.03, 0.1, 1.0)]
    assert scores[0].p1 == pytest.approx(1, abs=1e-5)
    for name in ("p1", "p5", "p50"):
        values = [getattr(score, name) for score in scores]
        assert values == sorted(values, reverse=True) and values[-1] < values[0] - 0.3
    assert all(score.p1 <= score.p5 <= score.p50 for score in scores)
    assert abs(scores[0].unmatched) < 0.4


def test_shift_stability_equals_a_loop_over_patches():
    image, backbone = torch.rand(3, 40, 40, generator=generator(3)), positional(0.3)
    found = metrics.shift_stability(backbone, image, (24, 28), (4, 4), shifts=[(2, 3)])
    first = backbone(image[None, :, :24, :28]).patches[0]
    second = backbone(image[None, :, 8:32, 12:40]).patches[0]
    cosines = []
    for row in range(2, 6):
        for column in range(3, 7):
            a, b = first[row, column].numpy(), second[row - 2, column - 3].numpy()
            cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert [found.p1, found.p5, found.p50] == pytest.approx(np.quantile(cosines, [0.01, 0.05, 0.5]).tolist(), abs=1e-5)


def test_shift_stability_with_overlapping_patches():
    def strided(images):
        return Tokens.of(torch.nn.functional.avg_pool2d(images, 4, stride=2).movedim(1, -1) - 0.5)

    image = torch.rand(3, 48, 48, generator=generator())
    assert metrics.shift_stability(strided, image, (24, 24), (4, 4), (2, 2)).p1 == pytest.approx(1, abs=1e-5)


def test_shift_stability_refuses_what_it_cannot_do():
    image = torch.rand(3, 40, 48)
    with pytest.raises(ShapeError, match=r"need an image of \(56, 64\)"):
        metrics.shift_stability(patch_means, image, (40, 48), (4, 4))
    with pytest.raises(ConfigError, match="none negative"):
        metrics.shift_stability(patch_means, image, (24, 24), (4, 4), shifts=[(-1, 0)])
    with pytest.raises(ConfigError, match="common"):
        metrics.shift_stability(patch_means, image, (8, 8), (4, 4), shifts=[(2, 2)])


def test_blank_response_finds_a_planted_artifact():
    artifact = noise(8, 10, 3, seed=7)
    found = blank_response(positional(0.3), (32, 40), artifact + 4)
    assert found.correlation == pytest.approx(1, abs=1e-5)
    # The grey image gives zero content here, so all but the artifact's mean varies.
    expected = 1 - artifact.mean((0, 1)).square().sum() / artifact.square().sum(-1).mean()
    assert found.energy == pytest.approx(float(expected), abs=1e-5)
    other = blank_response(positional(0.3), (32, 40), noise(8, 10, 3, seed=8))
    assert other.correlation is not None and abs(other.correlation) < 0.25
    assert blank_response(patch_means, (32, 40), level=0.2).energy == pytest.approx(0, abs=1e-9)
    with pytest.raises(ShapeError, match="artifact"):
        blank_response(patch_means, (32, 40), noise(8, 10, 4))


# --- nulls and bad input


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_shuffled_only_moves_tokens(images, height, width, seed):
    tokens = Tokens(noise(images, height, width, 2, seed=seed), noise(images, 1, 2))
    moved = shuffled(tokens, generator(seed))
    assert torch.equal(moved.prefix, tokens.prefix)
    for before, after in zip(tokens.patches, moved.patches, strict=True):
        rows = [sorted(map(tuple, each.reshape(-1, 2).tolist())) for each in (before, after)]
        assert rows[0] == rows[1]
    assert torch.equal(moved.patches, shuffled(tokens, generator(seed)).patches)


def test_the_null_interval_covers_a_new_draw_as_often_as_it_says():
    tokens = Tokens.of(noise(1, 2, 2, 1))
    draws = generator(11)
    inside = [
        not with_null(lambda _: float(torch.randn((), generator=draws)), tokens, generator(), draws=3).beyond_chance
        for _ in range(4000)
    ]
    assert 0.942 < sum(inside) / 4000 < 0.96


@pytest.mark.parametrize(
    "metric", [metrics.position_mic, metrics.position_decodability, metrics.norm_outliers, metrics.grid_peak]
)
def test_bad_tokens_are_refused(metric):
    broken = noise(2, 9, 9, 3)
    broken[1, 2, 3, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="image 1 of 2"):
        metric(Tokens.of(broken))
    with pytest.raises(ShapeError, match="at least one"):
        metric([])
    with pytest.raises(ShapeError, match="feature sizes"):
        metric([Tokens.of(noise(9, 9, 3)), Tokens.of(noise(9, 9, 4))])


def test_settings_out_of_range_are_refused():
    tokens = planted_position(0)
    with pytest.raises(ShapeError, match="2 x 2"):
        metrics.position_mic(Tokens.of(noise(1, 9, 3)))
    with pytest.raises(ConfigError, match="at least 2 draws"):
        with_null(metrics.grid_peak, tokens, generator(), draws=1)
    with pytest.raises(ConfigError, match="sigmas"):
        metrics.norm_outliers(tokens, sigmas=0)
    with pytest.raises(ConfigError, match="period"):
        metrics.grid_peak(tokens, period=1)
    with pytest.raises(ConfigError, match="level"):
        blank_response(patch_means, (8, 8), level=2)
