"""Distances, cosines and fits against naive loops, scipy and planted truths."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kstest
from torch.nn import functional

from dvt.analysis.priors import evaluate
from dvt.analysis.priors.evaluate import frechet_distance, kernel_distance, memorisation, round_trip_cosine
from dvt.analysis.priors.scaling import fit_floored_law, fit_power_law
from dvt.analysis.priors.scoring import judged
from dvt.analysis.probes.heads import HeadCard, SavedHead
from dvt.analysis.probes.segmentation import KnnSegmentation, LinearSegmentation
from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.tokens import Tokens


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# --- features


def test_features_are_the_backbones_tokens(tiny_backbone):
    images = torch.rand(5, 3, 96, 96, generator=generator())
    tokens = tiny_backbone(images)
    read = {kind: evaluate.features(tiny_backbone, images, kind, batch_size=2) for kind in ("cls", "mean", "patch")}
    torch.testing.assert_close(read["cls"], tokens.prefix[:, 0])
    torch.testing.assert_close(read["patch"], tokens.patches)
    torch.testing.assert_close(read["mean"], tokens.patches.flatten(1, 2).mean(1))


def test_generated_images_are_clipped_resized_and_cleaned(tiny_backbone):
    images = torch.rand(2, 3, 48, 48, generator=generator()) * 2 - 0.5
    large = functional.interpolate(images.clamp(0, 1), (96, 96), mode="bilinear", antialias=True)
    expected = 2 * tiny_backbone(large).patches.mean((1, 2))

    def twice(tokens):
        return tokens.with_patches(2 * tokens.patches)

    torch.testing.assert_close(evaluate.features(tiny_backbone, images, clean=twice, size=(96, 96)), expected)


def test_features_that_cannot_be_read_are_refused(tiny_backbone):
    images = torch.zeros(1, 3, 96, 96)
    with pytest.raises(ConfigError, match="'cls', 'mean' or 'patch'"):
        evaluate.features(tiny_backbone, images, "pooled")
    with pytest.raises(ShapeError, match="at least one"):
        evaluate.features(tiny_backbone, images[:0])
    with pytest.raises(ShapeError, match="no class token"):
        evaluate.features(lambda x: Tokens.of(tiny_backbone(x).patches), images, "cls")


# --- Frechet distance


def reference_frechet(real, generated):
    """The definition with a symmetric square root, in numpy."""
    real, generated = real.double().numpy(), generated.double().numpy()
    first, second = (np.atleast_2d(np.cov(each.T)) for each in (real, generated))
    values, directions = np.linalg.eigh(first)
    root = (directions * np.sqrt(values.clip(0))) @ directions.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    shift = real.mean(0) - generated.mean(0)
    return float(shift @ shift + np.trace(first) + np.trace(second) - 2 * cross)


@pytest.mark.parametrize(("count", "dim"), [(500, 8), (300, 64), (20, 64), (2, 5), (400, 1)])
def test_the_frechet_distance_is_the_definition(count, dim):
    """With fewer samples than channels too, where covariances are singular."""
    mixing = noise(dim, dim, seed=9)
    real, generated = noise(count, dim) @ mixing + 3, 1.4 * noise(count + 3, dim, seed=1)
    assert frechet_distance(real, generated) == pytest.approx(reference_frechet(real, generated), rel=1e-5)


def test_a_shift_costs_its_square_wherever_the_origin_is():
    real = noise(200, 16)
    shift = noise(16, seed=1)
    expected = float(shift.double().square().sum())
    assert frechet_distance(real, real + shift) == pytest.approx(expected, rel=1e-5)
    far = real.double() + 1e6
    assert frechet_distance(far, far + shift.double()) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-5)


def test_few_samples_bias_the_distance_upwards():
    """Why the docstring asks for equal counts: two halves of one distribution are far apart when they are small."""
    few, many = (frechet_distance(noise(n, 32), noise(n, 32, seed=1)) for n in (40, 4000))
    assert few > 10 and many < 0.5


@pytest.mark.parametrize(
    ("real", "generated", "error", "message"),
    [
        (noise(1, 3), noise(4, 3), ShapeError, "real must be .* at least 2 images"),
        (noise(4, 3), noise(1, 3), ShapeError, "generated must be"),
        (noise(4, 3), noise(4, 2), ShapeError, "3 channels, generated ones 2"),
        (noise(4, 3, 2), noise(4, 3), ShapeError, r"\(N, C\)"),
        (noise(4, 3), noise(4, 3) / 0, NonFiniteError, "generated features"),
    ],
)
def test_features_without_a_distance_are_refused(real, generated, error, message):
    with pytest.raises(error, match=message):
        frechet_distance(real, generated)


# --- round trip


@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 3, 5)])
def test_round_trip_cosines_equal_the_naive_loop(shape):
    conditions = noise(*shape)
    generated = conditions + noise(*shape, seed=1)
    cosines = torch.tensor(
        [[float(torch.cosine_similarity(g, c, dim=-1).mean()) for c in conditions] for g in generated],
        dtype=torch.float64,
    )
    own = cosines.diagonal()
    others = torch.stack([torch.cat((row[:i], row[i + 1 :])).mean() for i, row in enumerate(cosines)])
    found = round_trip_cosine(generated, conditions)
    assert found.matched == pytest.approx(float(own.mean()), abs=1e-6)
    assert found.shuffled == pytest.approx(float(others.mean()), abs=1e-6)
    assert found.error == pytest.approx(float((own - others).std()) / math.sqrt(6), abs=1e-6)


def test_a_prior_that_ignores_its_condition_is_within_chance():
    sigmas = [round_trip_cosine(noise(50, 8, seed=s), noise(50, 8, seed=1000 + s) + 1).sigmas for s in range(200)]
    assert kstest(sigmas, "norm").pvalue > 1e-3
    conditions = noise(50, 8) + 1
    assert round_trip_cosine(conditions + 0.5 * noise(50, 8, seed=1), conditions).sigmas > 10


def test_round_trips_of_other_shapes_are_refused():
    for generated, conditions in ((noise(5, 3), noise(4, 3)), (noise(2, 3), noise(2, 3)), (noise(5), noise(5))):
        with pytest.raises(ShapeError, match="N >= 3"):
            round_trip_cosine(generated, conditions)


# --- power law


def test_an_exact_power_law_is_found():
    sizes = [10, 30, 100, 300]
    law = fit_power_law(sizes, [2.5 * size**-0.3 for size in sizes])
    assert law.k == pytest.approx(0.3) and law.b == pytest.approx(math.log(2.5)) and law.residual < 1e-9
    assert law.high - law.low < 1e-6 and law(1000) == pytest.approx(2.5 * 1000**-0.3)


def test_the_fit_and_its_interval_by_hand():
    """Ordinary least squares from the normal equations, and t(.975, 3) = 3.1824."""
    sizes, losses = np.array([8, 16, 40, 90, 200]), np.array([3.1, 2.2, 1.9, 1.2, 1.05])
    rows = np.stack((-np.log(sizes), np.ones(5)), axis=1)
    answer, left = np.linalg.lstsq(rows, np.log(losses), rcond=None)[:2]
    spread = math.sqrt(left[0] / 3)
    half = 3.1824463 * spread * math.sqrt(np.linalg.inv(rows.T @ rows)[0, 0])
    law = fit_power_law(sizes.tolist(), losses.tolist())
    np.testing.assert_allclose([law.k, law.b, law.residual], [*answer, spread])
    np.testing.assert_allclose([law.low, law.high], [answer[0] - half, answer[0] + half])


def coverage(count, simulations=200, k=0.35):
    draws = generator(count)
    sizes = torch.logspace(2, 5, count, dtype=torch.float64)
    hits = 0
    for _ in range(simulations):
        logs = 1.2 - k * sizes.log() + 0.1 * torch.randn(count, generator=draws, dtype=torch.float64)
        law = fit_power_law(sizes.tolist(), logs.exp().tolist())
        hits += law.low <= k <= law.high
    return hits / simulations


@pytest.mark.parametrize("count", [4, 5, 6, 7, 8])
def test_the_interval_covers_a_planted_exponent(count):
    assert 0.90 <= coverage(count) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 8])
def test_the_interval_covers_in_95_of_100_cases(count):
    found = coverage(count, 10_000)
    print(f"{count} sizes: the interval covers in {found:.4f} of 10,000 simulations")
    assert found == pytest.approx(0.95, abs=0.009)


def test_seeds_are_averaged_before_the_fit():
    sizes = [10, 30, 100, 300]
    logs = noise(4, 3).double() - torch.tensor(sizes).log()[:, None]
    assert fit_power_law(sizes, logs.exp().tolist()) == fit_power_law(sizes, logs.mean(1).exp().tolist())


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ([1, 2, 3], [3, 2, 1], "4 or more different sizes"),
        ([1, 2, 3, 3], [4, 3, 2, 1], "4 or more different sizes"),
        ([1, 2, 3, 4], [3, 2, 1], "4 or more different sizes"),
        ([1, 2, 3, 4], [3, 2, 1, 0], "positive and finite"),
        ([0, 2, 3, 4], [3, 2, 1, 1], "positive and finite"),
        ([1, 2, 3, 4], [3, 2, 1, math.nan], "positive and finite"),
    ],
)
def test_points_without_a_law_are_refused(sizes, losses, message):
    with pytest.raises(ConfigError, match=message):
        fit_power_law(sizes, losses)


def test_an_exact_law_with_a_floor_is_found():
    sizes = [10, 30, 100, 300, 1000, 3000]
    law = fit_floored_law(sizes, [0.3 + 2.0 * size**-0.5 for size in sizes])
    assert law.k == pytest.approx(0.5, abs=0.03) and law.floor == pytest.approx(0.3, abs=0.01)
    assert law.a == pytest.approx(2.0, rel=0.1) and law(100) == pytest.approx(0.5, abs=0.01)
    # The plain law has no floor, and calls the same losses nearly flat.
    assert fit_power_law(sizes, [0.3 + size**-0.5 for size in sizes]).k < 0.2


@pytest.mark.parametrize(
    ("count", "k", "floor", "scatter"),
    [(6, 0.5, 0.3, 0.05), (8, 0.5, 0.3, 0.05), (6, 1.0, 0.1, 0.05), (8, 0.35, 0.2, 0.03)],
)
def test_the_intervals_cover_a_planted_exponent_and_floor(count, k, floor, scatter):
    draws = generator(count)
    sizes = torch.logspace(1, 4, count, dtype=torch.float64)
    hits = {"k": 0, "floor": 0}
    for _ in range(200):
        logs = (floor + 2 * sizes**-k).log() + scatter * torch.randn(count, generator=draws, dtype=torch.float64)
        law = fit_floored_law(sizes.tolist(), logs.exp().tolist())
        hits["k"] += law.k_low <= k <= law.k_high
        hits["floor"] += law.floor_low <= floor <= law.floor_high
    print(hits)
    assert all(0.9 <= each / 200 <= 0.99 for each in hits.values()), hits


def test_a_law_with_a_floor_needs_five_sizes():
    with pytest.raises(ConfigError, match="5 or more"):
        fit_floored_law([1, 2, 3, 4], [4, 3, 2, 1])
    with pytest.raises(ConfigError, match="positive and finite"):
        fit_floored_law([1, 2, 3, 4, 5], [4, 3, 2, 1, 0])


# --- kernel distance


def naive_kernel_distance(real, generated):
    scale = real.var(0).mean().sqrt()
    x, y = (real - real.mean(0)) / scale, (generated - real.mean(0)) / scale

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    own = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    other = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    return own + other - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_the_kernel_distance_is_the_naive_loop():
    real, generated = noise(23, 5).double(), noise(31, 5, seed=1).double() + 0.3
    assert kernel_distance(real, generated).value == pytest.approx(naive_kernel_distance(real, generated), abs=1e-9)


def test_the_kernel_distance_has_no_bias_and_its_interval_covers():
    """Of two samples of one distribution the mean is 0 also where they are small, and 95 % intervals hold 0."""
    found = [kernel_distance(noise(40, 8, seed=s), noise(40, 8, seed=1000 + s)) for s in range(150)]
    values = np.array([each.value for each in found])
    assert abs(values.mean()) < 3 * values.std() / 150**0.5
    assert np.mean([each.low <= 0 <= each.high for each in found]) > 0.9
    apart = kernel_distance(noise(200, 8), noise(200, 8, seed=1) + 1)
    assert apart.low > 0


# --- memorisation


def test_copies_of_training_images_are_found():
    training, held_out = noise(300, 8), noise(100, 8, seed=1)
    copied = torch.tensor([7, 100, 299])
    generated = torch.cat((3 * training[copied] + 1e-3 * noise(3, 8, seed=2), noise(30, 8, seed=3)))
    found = memorisation(generated, training, held_out)
    assert found.neighbours[:3].tolist() == copied.tolist()
    assert float(found.distances[:3].max()) < 1e-5 < found.threshold
    brute = [min(1 - float(torch.cosine_similarity(g, t, dim=0)) for t in training) for g in generated]
    torch.testing.assert_close(found.distances, torch.tensor(brute).double(), atol=1e-6, rtol=0)
    assert found.share >= 3 / 33


def test_the_null_of_memorisation():
    """Fresh samples: the share is near .05 and p is uniform. A prior that remembers half of its images is caught."""
    found = [
        memorisation(noise(40, 8, seed=s), noise(100, 8, seed=999), noise(200, 8, seed=500 + s)) for s in range(60)
    ]
    assert np.mean([each.share for each in found]) == pytest.approx(0.05, abs=0.015)
    assert binomtest(sum(each.p_value < 0.05 for each in found), 60, 0.05).pvalue > 1e-3
    training = noise(100, 8, seed=999)
    generated = torch.cat((training[:20] + 0.1 * noise(20, 8), noise(20, 8, seed=1)))
    caught = memorisation(generated, training, noise(200, 8, seed=2))
    assert caught.p_value < 1e-4 and caught.share > 0.45


def test_too_few_held_out_images_are_refused():
    with pytest.raises(ShapeError, match=r"held-out must be .* at least 20"):
        memorisation(noise(5, 3), noise(5, 3), noise(19, 3))


# --- a frozen head


def head_of(channels, task="segmentation", upsample=1):
    """A head that calls a token by the sign of its first channel."""
    tokens = torch.randn(40, 2, 2, channels, generator=generator(7))
    labels = [(each[..., 0] > 0).long() for each in tokens]
    probe = KnnSegmentation(2, 1).fit(tokens, labels) if task == "knn" else LinearSegmentation(2).fit(tokens, labels)
    card = HeadCard(task, "tiny", "abc", (-1,), (8, 8), 32, channels, num_classes=2, upsample=upsample)
    return SavedHead(card, probe)


def test_a_head_sees_in_generated_features_what_it_sees_in_equal_real_ones():
    reals = torch.randn(12, 3, 3, 4, generator=generator(1))
    reals[..., 0] = reals[..., 0].sign() * 3  # far from the border between the classes
    same = judged(head_of(4), reals.repeat_interleave(2, 0), [row for row in range(12) for _ in range(2)], reals)
    assert same["matched"] == 1 and same["shares"] == 0 and same["shuffled"] < 0.65
    other = judged(head_of(4), reals.roll(1, 0), range(12), reals)
    assert abs(other["matched"] - other["shuffled"]) < 0.15 and other["shares"] == 0
    flipped = reals.clone()
    flipped[..., 0] = 3
    assert judged(head_of(4), flipped, range(12), reals)["shares"] > 0.3
    with pytest.raises(ConfigError, match="4 channels, upsampled 2 times"):
        judged(head_of(4, upsample=2), reals, range(12), reals)
    with pytest.raises(ConfigError, match="features of 4 channels"):
        judged(head_of(3), reals, range(12), reals)
