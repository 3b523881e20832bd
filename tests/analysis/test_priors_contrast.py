"""The contrastive loss against naive loops and torch's own cross-entropy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dvt.analysis.priors.contrast import contrast, same
from dvt.errors import ConfigError, ShapeError


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(first, second):
    return torch.stack([torch.cosine_similarity(row[None], second) for row in first])


def naive(queries, keys, positives, temperature, itself=False):
    """The definition, one query and one key at a time."""
    losses = []
    for i, query in enumerate(queries):
        others = [j for j in range(len(keys)) if not (itself and i == j)]
        scores = {j: math.exp(float(torch.cosine_similarity(query, keys[j], dim=0)) / temperature) for j in others}
        weight = {j: float(positives[i, j]) for j in others}
        if sum(weight.values()):
            logs = [weight[j] * math.log(scores[j] / sum(scores.values())) for j in others]
            losses.append(-sum(logs) / sum(weight.values()))
    return sum(losses) / len(losses)


def test_pairs_give_infonce_and_clip():
    images, texts = noise(7, 5), noise(7, 5, seed=1)
    logits = cosines(images, texts) / 0.07
    forward, back = (functional.cross_entropy(each, torch.arange(7)) for each in (logits, logits.T))
    assert float(contrast(images, texts, temperature=0.07)) == pytest.approx(float(forward), abs=1e-9)
    both = contrast(images, texts, temperature=0.07, symmetric=True)
    assert float(both) == pytest.approx(float(forward + back) / 2, abs=1e-9)
    assert abs(float(forward - back)) > 0.01  # so the two directions were told apart


def test_one_positive_equals_infonce():
    """Two views of each of six images among all twelve (NT-Xent), to 1e-6 in single precision."""
    views = noise(12, 5).float()
    logits = (cosines(views, views) / 0.1).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    expected = functional.cross_entropy(logits, torch.arange(12).roll(6))
    found = contrast(views, positives=same(torch.arange(6).repeat(2)), temperature=0.1)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_identical_images_of_one_text_give_the_logarithm_of_the_others(count):
    images = noise(1, 6).expand(count, 6)
    assert float(contrast(images, positives=same(torch.zeros(count)))) == pytest.approx(math.log(count - 1), abs=1e-12)


def test_many_positives_equal_the_naive_loop():
    features, labels = noise(9, 4), torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 3])  # the last is alone: no loss
    expected = naive(features, features, same(labels), 0.08, itself=True)
    assert float(contrast(features, positives=same(labels), temperature=0.08)) == pytest.approx(expected, abs=1e-9)


def test_weights_between_other_samples_equal_the_naive_loop():
    queries, keys = noise(4, 3), noise(6, 3, seed=1)
    weights = noise(4, 6, seed=2).clamp(min=0)
    expected = naive(queries, keys, weights, 0.5)
    assert float(contrast(queries, keys, positives=weights, temperature=0.5)) == pytest.approx(expected, abs=1e-9)
    assert float(contrast(queries, keys, positives=9 * weights, temperature=0.5)) == pytest.approx(expected, abs=1e-9)
    back = naive(keys, queries, weights.T, 0.5)
    both = contrast(queries, keys, positives=weights, temperature=0.5, symmetric=True)
    assert float(both) == pytest.approx((expected + back) / 2, abs=1e-9)


def test_lafites_loss():
    """-tau sum_i log exp(sim(f_i, h_i) / tau) / sum_j exp(sim(f_j, h_i) / tau), a mean here, at tau = .5."""
    generated, pseudo = noise(5, 8), noise(5, 8, seed=1)
    similar = cosines(generated, pseudo)
    terms = [similar[i, i] / 0.5 - (similar[:, i] / 0.5).exp().sum().log() for i in range(5)]
    expected = -0.5 * float(torch.stack(terms).mean())
    assert 0.5 * float(contrast(pseudo, generated, temperature=0.5)) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=10), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_order_and_names_of_labels_do_not_matter(labels, seed):
    labels = torch.tensor([*labels, labels[0]])
    features = noise(len(labels), 4, seed=seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    names = torch.tensor([7, -2, 40, 3])
    reference = contrast(features, positives=same(labels))
    moved = contrast(features[order], positives=same(names[labels[order]]))
    scaled = contrast(features * 5, positives=same(labels))
    torch.testing.assert_close(moved, reference)
    torch.testing.assert_close(scaled, reference)


def test_gradients_are_finite_and_pull_positives_together():
    features = noise(8, 4).requires_grad_()
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(4).repeat(2)
    before = torch.cosine_similarity(features[:4], features[4:]).mean()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(contrast(features, positives=same(labels)), features)
        assert bool(gradient.isfinite().all())
        features = (features - 0.5 * gradient).detach().requires_grad_()
    assert torch.cosine_similarity(features[:4], features[4:]).mean() > before + 0.3
    contrast(features, positives=same(labels), temperature=temperature).backward()
    assert temperature.grad.isfinite() and temperature.grad != 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: contrast(noise(3, 2)), ConfigError, "need positives"),
        (lambda: contrast(noise(3, 2), noise(4, 2)), ShapeError, "are not pairs"),
        (lambda: contrast(noise(3, 2), noise(3, 4)), ShapeError, r"\(N, C\) and \(M, C\)"),
        (lambda: contrast(noise(3, 2), noise(4, 2), positives=torch.ones(4, 3)), ShapeError, r"= \(3, 4\), got"),
        (lambda: contrast(noise(3, 2), noise(3, 2), temperature=0.0), ConfigError, "temperature must be positive"),
        (lambda: contrast(noise(3, 2), positives=torch.eye(3)), ConfigError, "not itself"),
        (lambda: contrast(noise(3, 2), noise(3, 2), positives=-torch.eye(3)), ConfigError, "at least 0"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
