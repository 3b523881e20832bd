"""Probes against naive loops, planted truths and other libraries; the protocol on data that the tests write."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import AvgPool2d

from dvt import grids
from dvt.analysis.metrics.intervals import resample_counts
from dvt.analysis.metrics.ridge import held_out
from dvt.analysis.probes import features
from dvt.analysis.probes.classification import KnnClassification, LinearClassification
from dvt.analysis.probes.crops import CROP_SHARE, cached_crops, draw_square, write_crops
from dvt.analysis.probes.datasets import LabelledData, open_data
from dvt.analysis.probes.depth import DepthProbe, depth_errors
from dvt.analysis.probes.layouts import IGNORE
from dvt.analysis.probes.probe import HeadConfig, reduced
from dvt.analysis.probes.protocol import ProbeConfig, prepare, run_probe
from dvt.analysis.probes.segmentation import (
    KnnSegmentation,
    LinearSegmentation,
    class_counts,
    count_scores,
    near_boundaries,
)
from dvt.analysis.probes.table import make_rows, resampled, student
from dvt.backbones import wrap
from dvt.errors import ConfigError, DataError, NonFiniteError, ShapeError
from dvt.images import load_image
from dvt.store import FeatureStore, Job, Record, StoreWriter
from dvt.tokens import Tokens
from dvt.views import ViewConfig

GRID = (4, 6)
QUICK = HeadConfig(epochs=20, learning_rate=0.02)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def patches_of(labels, pixels=4):
    """(H, W) with every label of a grid repeated over its patch's pixels."""
    return labels.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)


def planted(count, classes=3, channels=8, seed=0, spread=0.05, grid=GRID, pixels=4):
    """Tokens that are their class's vector and a little noise, and labels of some pixels a patch and side."""
    vectors = noise(classes, channels, seed=99)
    patches = torch.randint(classes, (count, *grid), generator=generator(seed))
    tokens = vectors[patches] + spread * noise(count, *grid, channels, seed=seed + 1)
    return tokens, [patches_of(each, pixels).to(torch.int16) for each in patches]


# --- scores


def naive_scores(predicted, labels, classes):
    """mIoU, mAcc and aAcc with plain loops over pixels."""
    iou, accuracy, right, known = [], [], 0, 0
    for p, t in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
        known += t != IGNORE
        right += t != IGNORE and p == t
    for k in range(classes):
        both = either = true = 0
        for p, t in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if t == IGNORE:
                continue
            both += p == k and t == k
            either += p == k or t == k
            true += t == k
        if true:
            iou.append(both / either)
            accuracy.append(both / true)
    return {"mIoU": np.mean(iou), "mAcc": np.mean(accuracy), "aAcc": right / known}


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_segmentation_scores_are_those_of_loops_over_pixels(seed, classes):
    predicted = torch.randint(classes, (5, 7), generator=generator(seed))
    labels = torch.randint(-1, classes, (5, 7), generator=generator(seed + 1))
    labels[0, 0] = 0
    found = count_scores(class_counts(predicted, labels, classes))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        naive_scores(predicted, labels, classes)
    )


def test_mean_iou_is_that_of_torchmetrics_when_every_class_occurs():
    from torchmetrics.functional.classification import multiclass_jaccard_index

    predicted, labels = (torch.randint(4, (40, 40), generator=generator(seed)) for seed in (0, 1))
    expected = multiclass_jaccard_index(predicted, labels, 4)
    assert float(count_scores(class_counts(predicted, labels, 4))["mIoU"]) == pytest.approx(float(expected))


def test_a_class_that_the_truth_lacks_is_left_out_but_its_pixels_are_wrong():
    labels, predicted = torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 0, 0, 1]])
    assert float(count_scores(class_counts(predicted, labels, 3))["mIoU"]) == pytest.approx(3 / 4)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_depth_errors_are_those_of_loops_over_pixels(seed):
    found = 0.1 + 5 * torch.rand(6, 5, generator=generator(seed))
    true = (0.1 + 5 * torch.rand(6, 5, generator=generator(seed + 1))) * (
        torch.rand(6, 5, generator=generator(seed + 2)) > 0.3
    )
    pairs = [(d, t) for d, t in zip(found.flatten().tolist(), true.flatten().tolist(), strict=True) if t > 0]
    expected = [
        1.0,
        sum(abs(d - t) / t for d, t in pairs) / len(pairs),
        math.sqrt(sum((d - t) ** 2 for d, t in pairs) / len(pairs)),
        sum(max(d / t, t / d) < 1.25 for d, t in pairs) / len(pairs),
    ]
    assert depth_errors(found, true).tolist() == pytest.approx(expected)


def test_depth_scores_are_means_over_images_with_a_measurement():
    true = [torch.full((2, 2), 2.0), torch.zeros(2, 2), torch.tensor([[4.0, 0.0], [0.0, 0.0]])]
    guess = torch.full((2, 2), 3.0)
    statistics = torch.stack([depth_errors(guess, each) for each in true])
    found = {name: float(value) for name, value in DepthProbe.summarise(statistics.sum(0)).items()}
    assert found == pytest.approx({"AbsRel": (0.5 + 0.25) / 2, "RMSE": 1.0, "delta1": 0.0})


# --- segmentation


@pytest.mark.parametrize("make", [lambda: LinearSegmentation(3, QUICK), lambda: KnnSegmentation(3)])
def test_planted_classes_are_found_and_shuffled_ones_are_chance(make):
    tokens, labels = planted(24, pixels=1)
    new, truth = planted(12, seed=7, pixels=1)
    probe = make().fit(tokens, labels)
    assert probe.score(new, truth) == {"mIoU": 1.0, "mAcc": 1.0, "aAcc": 1.0, "bAcc": 1.0}
    assert torch.equal(probe.predict(new)[0], truth[0].long())
    chance = []
    for draw in range(12):  # each finds three classes at random, so one alone can be far from a third
        shuffled = [torch.randint(3, GRID, generator=generator(100 * draw + k)) for k in range(24)]
        chance.append(make().fit(tokens, shuffled).score(new, truth)["aAcc"])
    assert 0.15 < sum(chance) / len(chance) < 0.55
    larger = probe.predict(new, [(12, 18)] * 12)[0]  # the middle of every patch keeps its class
    assert torch.equal(larger[1::3, 1::3], truth[0].long())


def test_linear_head_reaches_every_pixel_when_tokens_are_far_apart():
    tokens, labels = planted(24, classes=2, grid=(1, 1))
    assert LinearSegmentation(2, QUICK).fit(tokens, labels).score(tokens, labels)["mIoU"] == 1


def brute_force_knn(tokens, labels, new, classes, neighbours):
    """Labels of new tokens by loops: centroids of every class of every image, votes, then likeness."""
    centroids = []
    for image, label in zip(tokens, labels, strict=True):
        for k in range(classes):
            total, weight = 0.0, 0.0
            for i in range(image.shape[0]):
                for j in range(image.shape[1]):
                    share = (label[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] == k).float().mean()
                    total, weight = total + share * image[i, j], weight + share
            if weight > 0:
                centroids.append((total / weight, k))
    found = torch.zeros(new.shape[:2], dtype=torch.long)
    for i in range(new.shape[0]):
        for j in range(new.shape[1]):
            cosines = [(float(torch.cosine_similarity(new[i, j], c, dim=0)), k) for c, k in centroids]
            best = sorted(cosines, reverse=True)[:neighbours]
            votes = Counter(k for _, k in best)
            most = max(votes.values())
            tied = [k for k in votes if votes[k] == most]
            found[i, j] = max(tied, key=lambda k: sum(cosine for cosine, kk in best if kk == k))
    return found


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_nearest_centroids_are_those_of_brute_force(seed, neighbours):
    tokens, new = noise(4, 2, 3, 5, seed=seed), noise(2, 3, 5, seed=seed + 1)
    labels = [torch.randint(-1, 4, (8, 12), generator=generator(seed + k)) for k in range(4)]
    probe = KnnSegmentation(4, neighbours).fit(tokens, labels)
    assert torch.equal(probe.predict(new[None])[0], brute_force_knn(tokens, labels, new, 4, neighbours))


def test_pixels_near_boundaries_are_those_of_a_naive_loop():
    labels = torch.randint(-1, 2, (5, 7), generator=generator(0)).repeat_interleave(4, 0).repeat_interleave(4, 1)
    height, width = labels.shape
    expected = torch.zeros(height, width, dtype=torch.bool)
    for i in range(height):
        for j in range(width):
            for y, x in ((i + 1, j), (i, j + 1)):
                pair = {int(labels[i, j]), int(labels[y, x])} if y < height and x < width else set()
                if pair == {0, 1}:
                    for a, b in ((i, j), (y, x)):
                        expected[max(0, a - 2) : a + 3, max(0, b - 2) : b + 3] = True
    assert torch.equal(near_boundaries(labels, distance=2), expected)


def test_accuracy_near_boundaries_counts_only_those_pixels():
    tokens, labels = torch.eye(2)[torch.tensor([[0, 0, 1, 1]])].repeat(8, 4, 1, 1), torch.zeros(8, 16, 32).long()
    labels[:, :, 16:] = 1
    moved = labels.roll(-2, 2)
    moved[:, :, -2:] = 1  # the truth that is scored lies two pixels off what was learnt
    probe = LinearSegmentation(2, QUICK).fit(tokens, list(labels))
    assert probe.score(tokens, list(labels))["bAcc"] == 1
    found = probe.score(tokens, list(moved))
    assert found["aAcc"] == pytest.approx(30 / 32) and found["bAcc"] == pytest.approx(6 / 8)


@pytest.mark.parametrize("make", [lambda: LinearSegmentation(3, QUICK), lambda: KnnSegmentation(3)])
def test_ignored_pixels_teach_nothing_and_count_for_nothing(make):
    tokens, labels = planted(12)
    hidden, wild = [each.clone() for each in labels], tokens.clone()
    for each in hidden:
        each[:, 12:] = IGNORE
    wild[:, :, 3:] += 5 * noise(12, 4, 3, 8, seed=5)
    probe = make().fit(tokens, hidden)
    counts = probe.sufficient_statistics(wild, hidden)
    assert counts[..., :3].sum(1).tolist() == [[float(right), 16 * 12, 16 * 12] for right in counts[..., 0].sum(1)]
    changed = [torch.where(each == IGNORE, IGNORE, each) for each in hidden]
    changed[0] = torch.full_like(changed[0], IGNORE)
    again = make().fit(tokens[1:], hidden[1:])
    if probe.seeded:  # an image that is ignored whole changes the order of the batches, but not what is learnt
        with_void = make().fit(tokens, changed).score(tokens, labels)["mIoU"]
        assert with_void == pytest.approx(again.score(tokens, labels)["mIoU"], abs=0.05)
    else:
        assert torch.equal(make().fit(tokens, changed).centroids, again.centroids)


def test_the_same_seed_gives_the_same_numbers():
    tokens, labels = planted(12, spread=1.0)
    scores = [LinearSegmentation(3, HeadConfig(epochs=2, seed=seed)).fit(tokens, labels).head for seed in (3, 3, 4)]
    assert torch.equal(scores[0][1].weight, scores[1][1].weight)
    assert not torch.equal(scores[0][1].weight, scores[2][1].weight)


def test_smaller_targets_hold_no_new_values():
    labels = patches_of(2 * torch.randint(2, (5, 7), generator=generator(0)) - 1, 3).to(torch.int16)  # IGNORE or 1
    small = reduced(labels, (10, 14))
    assert small.dtype == torch.int16 and set(small.unique().tolist()) == {-1, 1}
    assert torch.equal(small, patches_of(labels[1::3, 1::3], 2))
    assert set(reduced(labels, (7, 9)).unique().tolist()) == {-1, 1}


def test_images_of_several_grids_are_trained_together():
    wide, wide_labels = planted(8)
    tall, tall_labels = planted(8, grid=(6, 3), seed=3)
    tokens, labels = [*wide, *tall], [*wide_labels, *tall_labels]
    for probe in (LinearSegmentation(3, QUICK), KnnSegmentation(3)):
        assert probe.fit(tokens, labels).score(tokens, labels)["mIoU"] > 0.9


@pytest.mark.parametrize(
    "make", [lambda: LinearSegmentation(3, QUICK), lambda: KnnSegmentation(3), lambda: DepthProbe()]
)
def test_what_a_probe_refuses(make):
    tokens, labels = planted(4)
    with pytest.raises(ConfigError, match=r"call fit\(tokens, targets\) first"):
        make().predict(tokens)
    with pytest.raises(ShapeError, match="4 token maps and 3 targets"):
        make().fit(tokens, labels[:3])
    with pytest.raises(NonFiniteError, match="image 2"):
        make().fit([*tokens[:2], tokens[2] / 0], labels[:3])
    with pytest.raises(ShapeError, match="fitted on 8"):
        make().fit(tokens, [each.float() + 1 if isinstance(make(), DepthProbe) else each for each in labels]).predict(
            tokens[..., :5]
        )


def test_labels_that_cannot_be():
    tokens, labels = planted(4)
    for probe in (LinearSegmentation(2, QUICK), KnnSegmentation(2)):
        with pytest.raises(DataError, match=r"0 \.\.\. 2; they must lie in 0 \.\.\. 1"):
            probe.fit(tokens, labels)
        with pytest.raises(DataError, match="nothing to learn"):
            probe.fit(tokens, [torch.full_like(each, IGNORE) for each in labels])
    probe = KnnSegmentation(3).fit(tokens, labels)
    with pytest.raises(DataError, match="nothing to score"):
        probe.score(tokens, [torch.full_like(each, IGNORE) for each in labels])


# --- depth


@pytest.mark.parametrize("bins", ["log", "linear"])
def test_planted_depth_is_found(bins):
    depths = 1 + 7 * torch.rand(40, 1, 1, generator=generator(1))  # one plane an image: nothing to interpolate
    depths = depths.expand(-1, *GRID)
    channels = torch.stack([depths, depths.log(), depths.square() / 10, (2 * depths).sin()], -1)
    tokens = channels + 0.01 * noise(*channels.shape)
    truth = [patches_of(each).contiguous() for each in depths]
    for each in truth:
        each[:3] = 0  # no measurement
    probe = DepthProbe(bins, HeadConfig(epochs=60, learning_rate=0.03)).fit(tokens[:30], truth[:30])
    scores = probe.score(tokens[30:], truth[30:])
    assert scores["AbsRel"] < 0.08 and scores["delta1"] > 0.97
    low, high = min(float(t[t > 0].min()) for t in truth[:30]), max(float(t.max()) for t in truth[:30])
    assert all(low * 0.999 <= float(each.min()) and float(each.max()) <= high * 1.001 for each in probe.predict(tokens))
    guess = float(torch.stack(truth)[:30].max() / 2)
    constant = torch.stack([depth_errors(torch.full_like(t, guess), t) for t in truth[30:]])[:, 1].mean()
    assert scores["AbsRel"] < constant / 5


def test_depth_without_any_measurement():
    tokens, _ = planted(3)
    nothing = [torch.zeros(16, 24)] * 3
    with pytest.raises(DataError, match="all 3 training depth maps are zero"):
        DepthProbe().fit(tokens, nothing)
    with pytest.raises(DataError, match="negative"):
        DepthProbe().fit(tokens, [*nothing[:2], torch.full((16, 24), -1.0)])
    some = [*nothing[:2], torch.full((16, 24), 2.0)]
    probe = DepthProbe(config=QUICK).fit(tokens, some)
    assert probe.score(tokens, some)["AbsRel"] < 0.01
    with pytest.raises(DataError, match="nothing to score"):
        probe.score(tokens, nothing)


# --- classification


@pytest.mark.parametrize("make", [lambda: LinearClassification(3), lambda: KnnClassification(3, 5)])
def test_classes_of_images(make):
    classes = torch.arange(30) % 3
    tokens = (3 * noise(3, 6, seed=9))[classes][:, None, None] + noise(30, 2, 2, 6)
    targets = list(classes.to(torch.int16))
    probe = make().fit(tokens[:21], targets[:21])
    assert probe.score(tokens[21:], targets[21:]) == {"accuracy": 1.0, "class accuracy": 1.0}
    random = list(torch.randint(3, (21,), generator=generator(2)))
    assert make().fit(tokens[:21], random).score(tokens[21:], targets[21:])["accuracy"] < 0.8
    with pytest.raises(DataError, match="needs two classes"):
        make().fit(tokens[:2], [torch.tensor(1), torch.tensor(1)])
    uneven = probe.score(tokens[21:], [torch.tensor(0), *targets[22:-1], torch.tensor(1)])
    assert uneven["accuracy"] == pytest.approx(8 / 9) and uneven["class accuracy"] < 1


# --- statistics


def test_bootstrap_is_that_of_a_loop():
    counts = torch.randint(20, (2, 5, 3, 3), generator=generator(0)).double()
    samples = resample_counts(5, 7, generator(1))
    assert samples.sum(1).tolist() == [5] * 7
    found = resampled(counts, samples, count_scores, "mIoU")
    for draw, weights in enumerate(samples.long().tolist()):
        chosen = [i for i, times in enumerate(weights) for _ in range(times)]
        each = [float(count_scores(counts[s][chosen].sum(0))["mIoU"]) for s in range(2)]
        assert float(found[draw]) == pytest.approx(sum(each) / 2)


def test_differences_are_paired():
    """Images differ a lot and the variants by a constant on every image: a paired interval has no width."""
    hits = torch.randint(10, 80, (12,), generator=generator(0)).double()
    right = {"raw": hits, "better": hits + 10}  # of 100 pixels each, all of class 0
    counts = {name: torch.stack((n, torch.full_like(n, 100), n), -1) for name, n in right.items()}
    statistics = {name: torch.stack((n, torch.zeros_like(n)), 1)[None] for name, n in counts.items()}
    raw, better = make_rows(statistics, count_scores, "aAcc", "raw")
    assert better.difference == pytest.approx(0.1) and better.difference_interval == pytest.approx((0.1, 0.1))
    assert raw.difference is None and raw.images[1] - raw.images[0] > 0.1
    assert raw.seeds is None  # one seed has no interval


def test_interval_over_seeds_is_students():
    from scipy.stats import sem, t

    values = torch.tensor([0.2, 0.25, 0.31, 0.22], dtype=torch.float64)
    expected = t.interval(0.95, 3, loc=float(values.mean()), scale=sem(values.numpy()))
    assert student(values) == pytest.approx(expected)


def test_a_score_that_is_not_defined_comes_with_its_reason():
    rows = make_rows({"raw": torch.zeros(2, 3, 4)}, DepthProbe.summarise, "AbsRel", "raw")
    assert set(rows[0].scores.values()) == {None} and rows[0].images is None and rows[0].seeds is None
    assert len(rows[0].notes) == 3 and "no scored image" in rows[0].notes[0]


# --- features


def pooling_backbone():
    """Tokens are the mean colour of a patch: an affine picture has affine tokens."""
    return wrap(AvgPool2d(16), lambda m, x: Tokens.of(m(x).permute(0, 2, 3, 1)), 16, name="mean colour", image_size=96)


def test_averaged_views_of_an_affine_picture_are_its_tokens():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 192), torch.linspace(0, 1, 288), indexing="ij")
    image = torch.stack((rows, columns, (rows + columns) / 2))
    backbone = pooling_backbone()
    whole = features.averaged_tokens(backbone, image, ViewConfig(count=0)).patches
    many = features.averaged_tokens(backbone, image, ViewConfig(count=24, batch=7)).patches
    assert many.shape == (1, 6, 9, 3)
    inner = (slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(many[inner], whole[inner], atol=0.06, rtol=0)
    assert (many - whole)[inner].abs().mean() < 0.01


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_averaged_shifts_of_a_backbone_that_sees_its_patch_alone_are_its_tokens(photo, flip):
    """Such tokens do not depend on shifts, and mean colours not on mirroring: each patch comes back to its place."""
    views = replace(ViewConfig(count=10, batch=4), **features.PH_REG | {"flip": flip})
    image = photo[:, :192, :288]
    whole, mean = (
        features.averaged_tokens(pooling_backbone(), image, each).patches for each in (ViewConfig(count=0), views)
    )
    torch.testing.assert_close(mean, whole, atol=1e-5, rtol=0)


def test_ph_reg_spreads_an_artifact_over_shifts_of_at_most_15_per_cent(photo):
    spike = torch.zeros(1, 20, 20, 1)
    spike[0, 10, 10] = 1
    backbone = wrap(
        torch.nn.Identity(), lambda m, x: Tokens.of(spike.expand(len(x), -1, -1, -1)), 16, name="spike", image_size=320
    )
    views = replace(ViewConfig(count=40), **features.PH_REG | {"flip": 0.0})
    mean = features.averaged_tokens(backbone, photo[:, :320, :320], views).patches[0, ..., 0]
    where = mean.nonzero()
    assert (where - 10).abs().max() <= 3 < (where - 10).abs().max() + 1  # 15 % of 20 patches, and it is reached
    assert mean.max() < 0.3 and mean.sum() == pytest.approx(1, rel=0.1)


def test_averaging_views_removes_what_stays_at_its_place(tiny_backbone, photo):
    raw, mean = (features.averaged_tokens(tiny_backbone, photo, ViewConfig(count=count)).patches for count in (0, 16))
    assert (raw - mean).abs().mean() > 0.01 and mean.var() < raw.var()


def test_the_position_is_subtracted_from_planted_tokens():
    artifact = 3 * noise(5, 7, 6, seed=5)
    sets = [Tokens.of(noise(1, 5, 7, 6, seed=k) + artifact) for k in range(60)]
    clean = features.mean_subtraction(sets[:40])

    def shared(change):  # what the other images still have in common, beside a mean token
        common = torch.cat([change(each).patches for each in sets[40:]]).mean(0)
        return float((common - common.mean((0, 1))).std())

    assert shared(lambda each: each) > 2.5 and shared(clean) < 0.4
    one = features.mean_subtraction(sets[:1])(sets[0]).patches
    torch.testing.assert_close(one, sets[0].patches.mean((1, 2), keepdim=True).expand_as(one))
    other = features.mean_subtraction(sets)(Tokens.of(noise(2, 3, 4, 6)))
    assert other.grid == (3, 4)


def test_linear_removal_hides_the_position_and_keeps_the_rest():
    coords = (grids.grid_centres((6, 8)) - 0.5) * 3
    mixing = noise(2, 10, seed=8)
    sets = [Tokens.of(noise(1, 6, 8, 10, seed=k) + coords @ mixing) for k in range(40)]
    clean = features.linear_removal(sets[:30], rank=2)

    def r2(change):
        groups = [(change(each).patches[0].flatten(0, 1), coords.flatten(0, 1)) for each in sets]
        return float(held_out(groups[:30], groups[30:]).r2().mean())

    assert r2(lambda each: each) > 0.8 and r2(clean) < 0.1
    removed = torch.cat([(each.patches - clean(each).patches).flatten(0, 2) for each in sets])
    assert torch.linalg.matrix_rank(removed - removed.mean(0), atol=1e-2) == 2  # x and y, nothing else


def test_linear_removal_is_the_denoiser_of_that_kind():
    from dvt.denoiser import fit_linear

    grid = (6, 8)
    strong = 20 * features.position_features(grid)[..., 1:] @ noise(15, 24, seed=8)
    sets = [Tokens.of(noise(1, *grid, 24, seed=k) + strong) for k in range(12)]
    clean, other = features.linear_removal(sets), fit_linear(each.patches[0] for each in sets)
    for tokens in (sets[3], Tokens.of(noise(2, 4, 5, 24))):
        with torch.no_grad():
            torch.testing.assert_close(clean(tokens).patches, other(tokens.patches), atol=1e-4, rtol=1e-4)


def test_position_put_back():
    tokens = 3 * noise(5, 7, 16)
    longer = features.with_position(tokens, "concatenate")
    assert longer.shape == (5, 7, 32) and torch.equal(longer[..., :16], tokens)
    added = features.with_position(tokens, "add") - tokens
    assert torch.allclose(added, features.with_position(3 * noise(5, 7, 16), "add") - tokens)
    assert float(added.square().mean().sqrt()) == pytest.approx(float(tokens.square().mean().sqrt()), rel=0.01)
    assert len(torch.unique(added.flatten(0, 1).round(decimals=4), dim=0)) == 35  # every patch has its own
    assert features.with_position(tokens, "none") is tokens
    with pytest.raises(ConfigError, match="multiples of 4"):
        features.with_position(noise(5, 7, 6), "add")


# --- crops and the whole protocol


def checkered(root, count=10, size=(96, 144), splits=("train", "test"), kind="labels", change=None):
    """Random pictures whose labels are a 2 x 2 checkerboard of place: position alone solves them."""
    rows, columns = np.indices(size)
    labels = ((rows >= size[0] / 2) ^ (columns >= size[1] / 2)).astype(np.uint8)
    for number, split in enumerate(splits):
        for k in range(count):
            values = np.random.default_rng(100 * number + k).integers(0, 255, (*size, 3), np.uint8)
            truth = labels if kind == "labels" else 1000 + 1000 * labels.astype(np.uint16)
            truth = truth if change is None else change(split, k, truth.copy())
            for folder, picture in (("images", values), ("annotations" if kind == "labels" else "depth", truth)):
                (root / folder / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(root / folder / split / f"{k}.png")
    return root


def config(root, **more):
    settings = {"task": "segmentation", "data": root, "cache": root / "cache", "seeds": 2, "head": QUICK}
    return ProbeConfig(**{**settings, **more})


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 99))
def test_squares_lie_inside(height, width, seed):
    top, left, side = draw_square((height, width), generator(seed))
    assert side >= 1 and 0 <= top <= height - side and 0 <= left <= width - side
    assert side == width or side == 1 or CROP_SHARE[0] * height - 1 <= side <= CROP_SHARE[1] * height + 1


def test_squares_lie_anywhere():
    draws = generator(0)
    squares = np.array([draw_square((100, 200), draws) for _ in range(300)], dtype=float)
    across, down = squares[:, 1] / (200 - squares[:, 2]), squares[:, 0] / (100 - squares[:, 2])
    for share in (across, down, (squares[:, 2] - 50) / 15):
        assert np.quantile(share, (0, 0.5, 1)) == pytest.approx((0, 0.5, 1), abs=0.12)
    assert np.abs(np.corrcoef((across, down, squares[:, 2])) - np.eye(3)).max() < 0.2


def test_crops_are_parts_of_their_images_with_their_labels(tmp_path):
    def own(split, k, truth):
        truth[:] = np.arange(truth.size).reshape(truth.shape) % 17 + (k == 1)
        return truth

    root = checkered(tmp_path / "data", count=3, change=own)
    data = open_data(root, "labels", ignore=(16,)).counted()
    crops = write_crops(data, tmp_path / "crops", generator(3))
    again = write_crops(data, tmp_path / "again", generator(3))
    assert crops.num_classes == data.num_classes and crops.layout == "folder"
    for split, part in data.splits.items():
        for example, cropped, twin in zip(part, crops.splits[split], again.splits[split], strict=True):
            whole, piece = load_image(example.image), load_image(cropped.image)
            side = piece.shape[1]
            where = [
                (i, j)
                for i in range(whole.shape[1] - side + 1)
                for j in range(whole.shape[2] - side + 1)
                if torch.equal(whole[:, i, j : j + 3], piece[:, 0, :3])
            ]
            (i, j) = where[0]
            assert len(where) == 1 and torch.equal(whole[:, i : i + side, j : j + side], piece)
            assert torch.equal(data.read(example)[i : i + side, j : j + side], crops.read(cropped))
            assert cropped.image.read_bytes() == twin.image.read_bytes()
    with pytest.raises(DataError, match="not empty"):
        write_crops(data, tmp_path / "crops", generator(3))


def test_crops_are_cut_once_and_again_when_labels_change(tmp_path):
    data = open_data(checkered(tmp_path / "data", count=2, kind="depth"), "depth")
    first, second = cached_crops(data, tmp_path), cached_crops(data, tmp_path)
    assert first == second and len(list(tmp_path.glob("crops-*"))) == 1
    assert cached_crops(data, tmp_path, seed=1).root != first.root
    values = {float(v) for e in first.splits["train"] for v in first.read(e).unique()}
    assert values <= {1.0, 2.0} and values
    Image.fromarray(np.full((96, 144), 9, np.uint16)).save(data.splits["train"][0].truth)
    assert cached_crops(data, tmp_path).root != first.root


def test_a_square_without_labels_is_drawn_again(tmp_path):
    def corner(split, k, truth):
        truth[:, 30:] = 255
        return truth

    data = open_data(checkered(tmp_path / "data", count=6, change=corner), "labels", ignore=(255,)).counted()
    crops = write_crops(data, tmp_path / "crops", generator(0))
    assert all(bool((crops.read(e) != IGNORE).any()) for part in crops.splits.values() for e in part)


def test_position_alone_solves_layout_on_frames_and_fails_on_crops(tmp_path, tiny_backbone):
    root = checkered(tmp_path / "data")
    frames = run_probe(config(root), tiny_backbone)
    crops = run_probe(config(root, protocol="crops"), tiny_backbone)
    assert frames.row("position-only").scores["mIoU"] > 0.9
    assert crops.row("position-only").scores["mIoU"] < 0.6


def test_each_label_map_is_read_once_and_what_is_not_used_not_at_all(tmp_path, tiny_backbone, monkeypatch):
    root = checkered(tmp_path / "data", count=6)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "annotations" / "test" / "5.png")
    read = Counter()
    monkeypatch.setattr(
        LabelledData, "read", lambda self, each, own=LabelledData.read: (read.update([each]), own(self, each))[1]
    )
    run_probe(config(root, test_images=2, baselines=()), tiny_backbone)
    assert len(read) == 6 + 2 and set(read.values()) == {1}
    with pytest.raises(DataError, match="the maps of 1 image have other sizes"):
        run_probe(config(root, baselines=()), tiny_backbone)


def test_a_whole_run(tmp_path, tiny_backbone):
    """Variants of every kind, transfer, all baselines; equal variants score the same; it repeats itself exactly."""
    root = checkered(tmp_path / "data", count=5)
    names = ("position-only", "random", "subtract", "linear-removal", "view-averaging", "ph-reg")
    settings = config(root, transfer=True, baselines=names, views=2)
    data = prepare(settings)
    images = [example.image for part in data.splits.values() for example in part]
    tokens = features.cached_tokens(tiny_backbone, images, tmp_path / "other")
    with StoreWriter(tmp_path / "store", Job("any", "ab")) as writer:
        hashes = [features.file_sha256(path) for path in images]
        records = [
            Record(str(path), sha, (96, 144), {"semantic": each.patches[0]})
            for path, sha, each in zip(images, hashes, tokens, strict=True)
        ]
        writer.write("shard", records[::-1])
    variants = {
        "same": lambda each: each,
        "stored": FeatureStore(tmp_path / "store", "semantic"),
        "minus": lambda each: each.with_patches(-each.patches),
        "model": pooling_backbone(),
    }
    seen = []
    report = run_probe(settings, tiny_backbone, variants, lambda *what: seen.append(what))
    assert [row.variant for row in report.rows if "probe on" not in row.variant] == ["raw", *names, *variants]
    raw = report.row("raw")
    assert raw.seeds[0] < raw.scores["mIoU"] < raw.seeds[1]  # the seeds differ
    for name in ("same", "stored", "raw probe on same", "same probe on raw", "raw probe on stored"):
        assert report.row(name).scores == pytest.approx(raw.scores, abs=1e-6), name
        assert report.row(name).difference_interval == pytest.approx((0, 0), abs=1e-6)
    own = report.row("minus").scores["mIoU"]  # nearly raw's: the head learns the other sign
    for name in ("raw probe on minus", "minus probe on raw"):
        assert report.row(name).scores["mIoU"] < min(own, raw.scores["mIoU"]) - 0.1
    assert any("different numbers of channels" in note for note in report.notes)
    assert ("features", 10, 10) in seen and seen[-1] == ("probes", 11, 11)
    assert report.data["train"] == 5 and report.data["classes"] == 2

    turned = report.against(names[0])
    assert turned.reference == names[0] and turned.against("raw") == report and turned.row(names[0]).difference is None
    assert turned.row("raw").difference == pytest.approx(-(report.row(names[0]).difference or 0))
    low, high = report.row(names[0]).difference_interval or (0, 0)
    assert turned.row("raw").difference_interval == pytest.approx((-high, -low))
    with pytest.raises(ConfigError, match="no row"):
        report.against("nothing")
    with pytest.raises(ConfigError, match="without the statistics"):
        replace(report, compare=None).against("raw")
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["rows"][0]["scores"] == raw.scores and plain["config"]["data"] == str(root)
    lines = report.table().splitlines()
    assert lines[0].startswith("features") and "mIoU %" in lines[0] and f"{100 * raw.scores['mIoU']:.1f}" in lines[1]
    calls = []
    handle = tiny_backbone.register_forward_hook(lambda *_: calls.append(1))
    assert run_probe(settings, tiny_backbone, variants).rows == report.rows and not calls  # all from the cache
    handle.remove()


def test_cached_tokens_are_the_backbones(tmp_path, tiny_backbone):
    data = open_data(checkered(tmp_path / "data", count=3), "labels")
    images = [example.image for example in data.splits["train"]]
    first = features.cached_tokens(tiny_backbone, images[:2], tmp_path / "cache")
    more = features.cached_tokens(tiny_backbone, images, tmp_path / "cache")
    direct = tiny_backbone(load_image(images[2])[None])
    torch.testing.assert_close(more[2].patches, direct.patches, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(more[2].prefix, direct.prefix, atol=2e-3, rtol=2e-3)
    assert torch.equal(first[1].patches, more[1].patches)
    store = FeatureStore(next((tmp_path / "cache").iterdir()))
    with pytest.raises(DataError, match=r"lacks 3 of 4 images: .*test.*0\.png"):
        features.stored_tokens(store, [images[0], *(example.image for example in data.splits["test"])])


@pytest.mark.parametrize("task", ["knn", "depth"])
def test_other_tasks_run(tmp_path, tiny_backbone, task):
    root = checkered(tmp_path / "data", count=6, kind="labels" if task == "knn" else "depth")
    report = run_probe(config(root, task=task, position="concatenate"), tiny_backbone)
    assert all(math.isfinite(value) for row in report.rows for value in row.scores.values())
    assert (report.rows[0].seeds is None) == (task == "knn")
    assert (task == "knn") == any("no random numbers" in note for note in report.notes)


def test_images_are_classified(tmp_path, tiny_backbone):
    for split in ("train", "val"):
        for number, name in enumerate(("black", "grey", "white")):
            for k in range(4):
                (tmp_path / "data" / split / name).mkdir(parents=True, exist_ok=True)
                values = np.full((32, 32, 3), 110 * number + 5 * k, np.uint8)
                Image.fromarray(values).save(tmp_path / "data" / split / name / f"{k}.png")
    for task in ("classification", "knn-classification"):
        report = run_probe(
            config(tmp_path / "data", task=task, neighbours=3, baselines=("random",)), pooling_backbone()
        )
        assert report.row("raw").scores["accuracy"] > (0.9 if task == "classification" else 0.3)
        assert report.row("random").scores["accuracy"] < 0.8 and "scored on the split val" in report.notes


def test_objects_are_discovered(tmp_path):
    """A bright square on a dark ground, whose tokens are its colour, less the mean."""
    entries = {}
    (tmp_path / "data" / "images").mkdir(parents=True)
    for k in range(4):
        values = np.zeros((96, 144, 3), np.uint8)
        x, y = 16 + 16 * k, 16 * (k % 2)
        values[y : y + 48, x : x + 48] = 250
        Image.fromarray(values).save(tmp_path / "data" / "images" / f"{k}.png")
        entries[f"{k}.png"] = {"width": 144, "height": 96, "boxes": [[x, y, x + 48, y + 48]]}
    (tmp_path / "data" / "boxes.json").write_text(json.dumps(entries))
    for method in ("lost", "tokencut"):
        settings = config(tmp_path / "data", task="discovery", method=method, baselines=("subtract",))
        report = run_probe(settings, pooling_backbone(), {"turned": lambda each: each.with_patches(-each.patches)})
        assert report.row("raw").scores["CorLoc"] == 1.0 and report.row("turned").scores["IoU"] == pytest.approx(1)
        assert report.row("raw").seeds is None and "whole CorLoc % 0.0" in report.table()
        assert any("scored images themselves: subtract" in note for note in report.notes)
    with pytest.raises(ConfigError, match="no probe to transfer"):
        config(tmp_path, task="discovery", transfer=True)


def test_warped_views_are_matched(tmp_path, tiny_backbone, photo):
    for k in range(3):
        values = (photo[:, 60 * k : 60 * k + 200, 100:400] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(values).save(tmp_path / f"{k}.png")
    settings = config(tmp_path, task="correspondence", test_images=2, baselines=("position-only", "random", "subtract"))
    report = run_probe(settings, pooling_backbone(), {"same": lambda each: each, "model": tiny_backbone})
    raw = report.row("raw").scores
    assert report.data["test"] == 2 and report.row("same").scores == raw and report.row("model").scores != raw
    assert report.row("position-only").scores["PCK"] == pytest.approx(raw["position PCK"])
    assert report.row("random").scores["PCK"] == pytest.approx(raw["chance PCK"], abs=0.05)
    assert raw["PCK"] > raw["chance PCK"] + 0.1
    for name in ("view-averaging", "ph-reg"):
        with pytest.raises(ConfigError, match=f"{name} exists for whole images only"):
            run_probe(config(tmp_path, task="correspondence", baselines=(name,)), pooling_backbone())


def test_odd_labels_are_allowed_and_said(tmp_path, tiny_backbone):
    def odd(split, k, truth):
        if split == "test":
            truth[truth == 1] = 3  # in training, 3 never occurs
        if k == 0:
            truth[:] = 255
        return truth

    root = checkered(tmp_path / "data", count=4, change=odd)
    report = run_probe(config(root, ignore=(255,), baselines=()), tiny_backbone)
    text = "\n".join(report.notes)
    assert "count as 0: 3" in text and "left out of the means: 1, 2" in text
    assert "no labels in 1 of 4 training images" in text and "no labels in 1 of 4 scored images" in text
    assert report.row("raw").scores["mIoU"] <= 0.5


def test_nothing_to_learn_or_score(tmp_path, tiny_backbone):
    root = checkered(tmp_path / "a", count=3, change=lambda split, k, truth: truth * 0 + 255 * (split == "test"))
    with pytest.raises(DataError, match="no labels in 3 scored images"):
        run_probe(config(root, ignore=(255,)), tiny_backbone)
    root = checkered(tmp_path / "b", count=3, kind="depth", change=lambda split, k, truth: truth * (split == "test"))
    with pytest.raises(DataError, match="no depth in 3 training images"):
        run_probe(config(root, task="depth"), tiny_backbone)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"task": "detection"}, "task is 'detection'"),
        ({"seeds": 0}, "seeds is 0"),
        ({"baselines": ("nothing",)}, "no baseline 'nothing'"),
        ({"protocol": "crops", "task": "classification"}, "whole images only"),
        ({"train_images": 0}, "train_images is 0"),
    ],
)
def test_settings_that_cannot_be(tmp_path, wrong, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **wrong)


def test_names_of_rows_and_splits(tmp_path, tiny_backbone):
    root = checkered(tmp_path / "data", count=2)
    with pytest.raises(ConfigError, match="two rows are named 'raw'"):
        run_probe(config(root), tiny_backbone, {"raw": lambda tokens: tokens})
    with pytest.raises(DataError, match="no split val; it has train, test"):
        prepare(config(root, evaluate="val"))
    with pytest.raises(ConfigError, match="takes any images"):
        prepare(config(root, task="correspondence"))
    with pytest.raises(ShapeError, match="flat gave patches"):
        run_probe(
            config(root, baselines=()), tiny_backbone, {"flat": lambda t: Tokens.of(t.patches.repeat(2, 1, 1, 1))}
        )


def test_finer_features_are_rows_of_their_own(tiny_backbone, tmp_path, monkeypatch):
    generator_ = generator(0)
    for split in ("train", "test"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(2):
            pixels = torch.rand(96, 96, 3, generator=generator_).mul(255).byte().numpy()
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{i}.png")
            labels = torch.zeros(96, 96, dtype=torch.uint8)
            labels[:, 50:] = 1
            Image.fromarray(labels.numpy()).save(tmp_path / "annotations" / split / f"{i}.png")
    config = ProbeConfig("knn", tmp_path, upsample=2, cache=tmp_path / "cache")
    report = run_probe(config, tiny_backbone, {"same": lambda tokens: tokens})
    names = ["raw", "raw, upsampled", "position-only", "position-only, upsampled", "same", "same, upsampled"]
    assert [row.variant for row in report.rows] == names
    scores = {row.variant: row.scores for row in report.rows}
    assert scores["same, upsampled"] == scores["raw, upsampled"] != scores["raw"] == scores["same"]
    with pytest.raises(ConfigError, match="upsample"):
        ProbeConfig("discovery", tmp_path, upsample=2)
