"""Object discovery: planted objects, naive loops and other eigenvalue solvers, and boxes that see no image."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from dvt import grids
from dvt.analysis.probes import discovery
from dvt.analysis.probes.discovery import (
    DiscoveryProbe,
    Lost,
    TokenCut,
    box_statistics,
    lost,
    second_eigenvector,
    token_cut,
)
from dvt.analysis.probes.protocol import ProbeConfig, run_probe
from dvt.errors import ConfigError, DataError, NonFiniteError, ShapeError
from dvt.store import FeatureStore
from dvt.tokens import Tokens

METHODS = [lost, token_cut]
WHOLE = [0.0, 0.0, 1.0, 1.0]
BOXES = Path(__file__).resolve().parents[3] / "shared" / "data" / "boxes"


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(grid, box, background=6, seed=0, spread=0.15, channels=32):
    """Similar tokens in a box of cells on a background of several kinds of things, and the box in [0, 1].

    Background kinds share a direction that the object opposes: an object resembles fewer patches than a background.
    """
    kinds = torch.eye(channels, dtype=torch.float64)
    choice = torch.randint(1, 1 + background, grid, generator=torch.Generator().manual_seed(seed))
    tokens = kinds[choice] * 0.5 + kinds[-1]
    x0, y0, x1, y1 = box
    tokens[y0:y1, x0:x1] = kinds[0] - kinds[-1]
    tokens = tokens + spread * noise(*grid, channels, seed=seed) / channels**0.5
    return tokens, grids.boxes_from_pixels(torch.tensor(box), grid).tolist()


@st.composite
def problems(draw):
    """A grid and a box of cells in it of at least 2 x 2 that covers less than a third."""
    height, width = draw(st.integers(6, 16)), draw(st.integers(6, 16))
    x0, y0 = draw(st.integers(0, width - 2)), draw(st.integers(0, height - 2))
    x1, y1 = draw(st.integers(x0 + 2, width)), draw(st.integers(y0 + 2, height))
    if 3 * (x1 - x0) * (y1 - y0) >= height * width:
        x1, y1 = x0 + 2, y0 + 2
    return (height, width), (x0, y0, x1, y1), draw(st.integers(0, 1000))


# --- the two methods


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=40)
@given(problems())
def test_a_planted_object_gives_its_box(method, problem):
    grid, box, seed = problem
    tokens, expected = planted(grid, box, seed=seed)
    assert method(tokens).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_of_two_equal_objects_only_the_connected_part_counts(method):
    tokens, expected = planted((12, 16), (2, 3, 7, 8), spread=0.0)
    tokens[9:11, 12:14] = tokens[4, 4]  # the same thing again, elsewhere
    tokens[8, 7] = tokens[4, 4]  # and touching the first one at a corner
    assert method(tokens).tolist() == pytest.approx(expected, abs=1e-6)
    tokens[2, 2] = tokens[4, 4]  # now joined over an edge
    grown = grids.boxes_from_pixels(torch.tensor((2, 2, 7, 8)), (12, 16)).tolist()
    assert method(tokens).tolist() == pytest.approx(grown, abs=1e-6)


def naive_box(mask, seed, grid):
    """A flood fill from the seed, over edges."""
    height, width = grid
    todo, seen = [divmod(seed, width)], set()
    while todo:
        row, column = todo.pop()
        if (row, column) in seen or not (0 <= row < height and 0 <= column < width) or not mask[row * width + column]:
            continue
        seen.add((row, column))
        todo += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    rows, columns = zip(*seen, strict=True)
    return [min(columns) / width, min(rows) / height, (max(columns) + 1) / width, (max(rows) + 1) / height]


def naive_lost(tokens, lowest):
    grid, flat = tokens.shape[:2], tokens.reshape(-1, tokens.shape[-1]).numpy()
    count = len(flat)
    degree = [sum(flat[p] @ flat[q] >= 0 for q in range(count)) for p in range(count)]
    seed = min(range(count), key=lambda p: degree[p])
    voters = [q for q in sorted(range(count), key=lambda p: degree[p])[:lowest] if flat[q] @ flat[seed] >= 0]
    mask = [sum(flat[q] @ flat[s] for s in voters) >= 0 for q in range(count)]
    return naive_box(mask, seed, grid), seed, voters


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(1, 5), st.integers(1, 60), st.integers(0, 1000))
def test_lost_equals_a_naive_loop(height, width, channels, lowest, seed):
    tokens = noise(height, width, channels, seed=seed).float().double() + 0.3
    expected, _, _ = naive_lost(tokens, lowest)
    assert lost(tokens, lowest).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_naive_loop_meets_more_than_one_voter_and_more_than_one_answer():
    cases = [naive_lost(noise(6, 7, 4, seed=seed) + 0.3, 12) for seed in range(20)]
    assert len({tuple(box) for box, _, _ in cases}) > 5 and max(len(voters) for _, _, voters in cases) > 3


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 30), st.integers(0, 1000))
def test_the_eigenvector_is_that_of_the_generalised_problem(count, seed):
    points = noise(count, 3, seed=seed)
    weights = torch.exp(-torch.cdist(points, points))
    degrees = weights.sum(1).numpy()
    # An unsymmetric solver on D^-1 (D - W), and the equation itself.
    values, vectors = scipy.linalg.eig(np.diag(1 / degrees) @ (np.diag(degrees) - weights.numpy()))
    order = np.argsort(values.real)
    expected, found = vectors[:, order[1]].real, second_eigenvector(weights).numpy()
    assert abs(values[order[0]]) < 1e-9 < values[order[1]].real
    cosine = expected @ found / np.linalg.norm(expected) / np.linalg.norm(found)
    assert abs(cosine) == pytest.approx(1, abs=1e-6)
    left, right = (np.diag(degrees) - weights.numpy()) @ found, values[order[1]].real * degrees * found
    np.testing.assert_allclose(left, right, atol=1e-8 * np.abs(right).max())
    assert found[np.abs(found).argmax()] > 0


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 8), st.integers(3, 8), st.integers(0, 1000), st.sampled_from([0.0, 0.2, 0.5]))
def test_token_cut_equals_a_dense_numpy_solve(height, width, seed, tau):
    tokens = noise(height, width, 3, seed=seed)
    flat = tokens.reshape(-1, 3).numpy()
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    weights = np.where(unit @ unit.T >= tau, 1.0, 1e-5)
    degrees = weights.sum(1)
    values, vectors = np.linalg.eig((np.diag(degrees) - weights) / degrees[:, None])
    order = values.real.argsort()
    vector = vectors[:, order[1]].real
    size = np.sort(np.abs(vector))
    # Otherwise two cuts, or two seeds, are equally good.
    assume(values.real[order[2]] - values.real[order[1]] > 1e-6 and size[-1] - size[-2] > 1e-5 * size[-1])
    seed_patch = int(np.abs(vector).argmax())
    side = vector > vector.mean() if vector[seed_patch] > 0 else vector < vector.mean()
    assert token_cut(tokens, tau).tolist() == pytest.approx(naive_box(side, seed_patch, (height, width)), abs=1e-6)


def test_the_threshold_decides_what_token_cut_joins():
    angles = torch.zeros(8, 8)
    angles[2:5, 2:5] = 60.0
    radians = torch.deg2rad(angles)
    tokens = torch.stack((radians.cos(), radians.sin()), dim=-1)
    assert token_cut(tokens, tau=0.55).tolist() == [0.25, 0.25, 0.625, 0.625]
    assert token_cut(tokens, tau=0.45).tolist() == WHOLE


@pytest.mark.parametrize("method", METHODS)
def test_the_kind_of_number_does_not_matter_and_nothing_is_changed(method):
    tokens, _ = planted((10, 12), (3, 3, 8, 7), seed=4)
    before = tokens.clone()
    boxes = [method(tokens.to(kind)).tolist() for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert boxes[0] == boxes[1] == boxes[2] == boxes[3] and torch.equal(tokens, before)
    assert method(tokens * 1000).tolist() == boxes[0]


# --- degenerate maps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [noise(1, 1, 4), torch.ones(5, 7, 3), torch.zeros(4, 4, 2), -torch.ones(1, 2, 1)])
def test_where_nothing_differs_the_box_is_the_whole_image(method, tokens):
    assert method(tokens).tolist() == WHOLE


@pytest.mark.parametrize("method", METHODS)
def test_bad_tokens_are_refused(method):
    broken = noise(4, 4, 3)
    broken[1, 2, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN"):
        method(broken)
    with pytest.raises(ShapeError, match=r"\(h, w, C\).*got \(1, 4, 4, 3\)"):
        method(noise(1, 4, 4, 3))
    with pytest.raises(ShapeError, match="not empty"):
        method(noise(0, 4, 3))


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="lowest"):
        lost(noise(3, 3, 2), lowest=0)
    with pytest.raises(ConfigError, match="tau"):
        token_cut(noise(3, 3, 2), tau=1.5)
    with pytest.raises(ConfigError, match="epsilon"):
        token_cut(noise(3, 3, 2), epsilon=0)


# --- scores


def naive_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def random_boxes(count, seed):
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = corners.amin(1) * 0.9, corners.amax(1)
    return torch.cat((low, high.clamp(min=low + 0.05)), dim=1)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 1000))
def test_the_evidence_equals_a_loop_and_is_the_same_in_pixels(boxes, seed):
    predicted, truth = random_boxes(1, seed)[0], random_boxes(boxes, seed + 1)
    ways = [predicted.tolist()] + [[m, m, 1 - m, 1 - m] for m in discovery.TRIVIAL_MARGINS]
    expected = [max(naive_iou(way, box) for box in truth.tolist()) for way in ways]
    found = box_statistics(predicted, truth)
    assert found[:, 3].tolist() == pytest.approx(expected, abs=1e-9)
    assert found.tolist() == [[1, iou > 0.5, iou > 0.7, iou] for iou in found[:, 3].tolist()]
    sides = np.array([480, 320, 480, 320])
    pixels = max(naive_iou(predicted.numpy() * sides, box) for box in truth.numpy() * sides)
    assert pixels == pytest.approx(expected[0], abs=1e-9)


def scores_of(predicted, truth):
    total = torch.stack([box_statistics(*pair) for pair in zip(predicted, truth, strict=True)]).sum(0)
    return {name: float(value) for name, value in DiscoveryProbe.summarise(total).items()}


def test_scores_by_hand():
    # IoU of the predictions: 1, exactly 1/2 (which is not enough), 0 and .6.
    truth = [torch.tensor([[0.125, 0.125, 0.875, 0.875]])] * 4
    high = [0.875, 0.5, 0.125, 0.575]
    predicted = torch.tensor([[0.125, 0.125 if y > 0.125 else 0.0, 0.875, y] for y in high], dtype=torch.float64)
    scores = scores_of(predicted, truth)
    assert scores["CorLoc"] == 0.5 and scores["CorLoc70"] == 0.25
    assert scores["IoU"] == pytest.approx((1 + 0.5 + 0 + 0.6) / 4)
    assert scores["whole CorLoc"] == 1 and scores["whole CorLoc70"] == 0
    assert scores["whole IoU"] == pytest.approx(0.75**2)
    assert scores["centred margin"] == 0.1 and scores["centred IoU"] == pytest.approx(0.75**2 / 0.8**2)


def test_any_true_box_will_do_and_an_image_without_one_does_not_count():
    truth = [torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0]]), torch.zeros(0, 4)]
    predicted = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.1, 0.1]])
    scores = scores_of(predicted, truth)
    assert scores["CorLoc"] == scores["IoU"] == 1
    with pytest.raises(DataError, match="nothing to score"):
        Lost().score(noise(2, 4, 4, 3), [torch.zeros(0, 4)] * 2)


def test_sums_of_evidence_keep_leading_dimensions_and_choose_their_own_centred_box():
    truth = [torch.tensor([[0.2, 0.2, 0.8, 0.8]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])]
    statistics = torch.stack([box_statistics(torch.tensor([0.2, 0.2, 0.8, 0.8]), each) for each in truth])
    scores = DiscoveryProbe.summarise(torch.stack((statistics[0], statistics[1], statistics.sum(0))))
    assert scores["CorLoc"].tolist() == [1, 0, 0.5]
    assert scores["centred margin"].tolist() == [0.2, 0.0, pytest.approx(0.1)]
    assert scores["centred CorLoc"].tolist() == [1, 1, 1]
    assert torch.stack(list(DiscoveryProbe.summarise(torch.zeros(7, 4)).values()))[:-1].isnan().all()


@pytest.mark.parametrize("probe", [Lost(), TokenCut()])
def test_the_probe_scores_planted_objects_of_several_grids(probe):
    problems = [((10, 12), (1, 1, 5, 5)), ((10, 12), (5, 4, 11, 8)), ((14, 8), (1, 9, 5, 13))]
    planted_ones = [planted(*problem, seed=seed) for seed, problem in enumerate(problems)]
    maps, truth = [tokens for tokens, _ in planted_ones], [torch.tensor([box]) for _, box in planted_ones]
    assert probe.fit(maps, truth) is probe
    scores = probe.score(maps, truth)
    assert scores["CorLoc"] == scores["CorLoc70"] == 1 and scores["centred CorLoc"] < 1
    assert probe.score([noise(*each.shape) for each in maps], truth)["IoU"] < 0.6
    pixels = probe.predict(maps, [(100, 240), (50, 60), (28, 16)])
    assert [each.tolist() for each in pixels] == [[20, 10, 100, 50], [25, 20, 55, 40], [2, 18, 10, 26]]
    assert probe.predict(torch.stack(maps[:2]))[1].tolist() == pytest.approx(truth[1][0].tolist())


def test_settings_reach_the_methods():
    tokens = noise(9, 9, 4, seed=3) + 0.3
    plain = Lost(lowest=1, centred=False).predict([tokens])[0].tolist()
    assert plain == lost(tokens, 1).tolist() != lost(tokens, 100).tolist()
    cut = TokenCut(tau=0.9, centred=False).predict([tokens])[0].tolist()
    assert cut == token_cut(tokens, 0.9).tolist() != token_cut(tokens).tolist()


@pytest.mark.parametrize("kind", [Lost, TokenCut])
def test_a_constant_vector_changes_nothing_once_tokens_are_centred(kind):
    tokens, expected = planted((12, 16), (2, 3, 7, 8))
    far = tokens + 30 * noise(32, seed=8)
    for each in (tokens, far, far.float()):
        assert kind().predict([each])[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert kind(centred=False).predict([far])[0].tolist() == WHOLE
    assert kind().predict([torch.full((5, 7, 3), 0.3), torch.ones(1, 1, 2)])[0].tolist() == WHOLE


def test_bad_boxes_and_sets_are_refused():
    good = torch.tensor([[0.1, 0.1, 0.5, 0.5]])
    for bad in ([10.0, 20.0, 30.0, 40.0], [0.5, 0.1, 0.4, 0.6], [0.1, 0.1, float("nan"), 0.5]):
        with pytest.raises(ShapeError, match=r"true boxes.*boxes_from_pixels"):
            box_statistics(good[0], torch.tensor([bad]))
        with pytest.raises(ShapeError, match="predicted box"):
            box_statistics(torch.tensor(bad), good)
    with pytest.raises(ShapeError, match="true boxes"):
        box_statistics(good[0], torch.tensor([[0.1, 0.1, 0.5]]))
    with pytest.raises(ShapeError, match="2 token maps and 1 target were"):
        Lost().sufficient_statistics(noise(2, 4, 4, 3), [good])
    with pytest.raises(NonFiniteError, match="image 1"):
        Lost().sufficient_statistics(noise(2, 4, 4, 3) * torch.tensor([1.0, float("nan")]).view(2, 1, 1, 1), [good] * 2)


# --- the whole job


@pytest.fixture
def boxed_photos(tmp_path):
    """A folder of three pictures with boxes."""
    (tmp_path / "images").mkdir()
    listed = {}
    for number in range(3):
        pixels = (255 * torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(number))).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        listed[f"{number}.png"] = {
            "width": 96,
            "height": 64,
            "boxes": [[24.0, 16.0, 72.0, 48.0], [72.0, -0.5, 96.5, 9.0]],
        }
    (tmp_path / "boxes.json").write_text(json.dumps(listed))
    return tmp_path


def job(data, **more):
    return ProbeConfig("discovery", data, baselines=(), **more)


@pytest.mark.parametrize("method", ["lost", "tokencut"])
def test_the_job_scores_variants_beside_raw_features(method, boxed_photos, tiny_backbone, tmp_path):
    def drawn(tokens):
        height, width = tokens.grid
        maps = -torch.ones(1, height, width, 1)
        maps[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
        return Tokens.of(maps)

    calls = []
    config = job(boxed_photos, method=method, cache=tmp_path / "cache")
    report = run_probe(config, tiny_backbone, {"drawn": drawn}, lambda *call: calls.append(call))
    assert [row.variant for row in report.rows] == ["raw", "drawn"] and report.data["test"] == 3
    fewer = run_probe(replace(config, test_images=2), tiny_backbone)
    assert fewer.data["test"] == 2 and len(list((tmp_path / "cache").iterdir())) == 1
    # On 6 x 9 patches the drawn object is 4 x 5 of them around the true box, a quarter of the image.
    assert report.row("drawn").scores["CorLoc"] == 1
    assert report.row("drawn").scores["IoU"] == pytest.approx(0.25 / (20 / 54))
    assert report.row("raw").scores["centred margin"] == 0.25 and report.row("raw").scores["whole CorLoc"] == 0
    assert report.row("drawn").difference == 1 - report.row("raw").scores["CorLoc"]
    assert calls[-1] == ("probes", 2, 2) and "centred CorLoc" in report.table()
    (store,) = (tmp_path / "cache").iterdir()
    again = run_probe(config, tiny_backbone, {"store": FeatureStore(store)})
    assert again.row("store").scores == again.row("raw").scores == report.row("raw").scores


@pytest.mark.parametrize("method", ["lost", "tokencut"])
def test_the_job_takes_tokens_as_they_are_where_asked_to(method, boxed_photos, tiny_backbone, tmp_path):
    def far(tokens):
        return tokens.with_patches(tokens.patches + 1000)

    as_published = job(boxed_photos, method=method, centred=False, cache=tmp_path / "cache")
    centred = run_probe(replace(as_published, centred=True), tiny_backbone, {"far": far})
    assert centred.row("far").scores["IoU"] == pytest.approx(centred.row("raw").scores["IoU"], abs=0.05)
    scores = run_probe(as_published, tiny_backbone, {"far": far}).row("far").scores
    assert scores["IoU"] == scores["whole IoU"] != centred.row("far").scores["IoU"]


def test_the_job_refuses_what_it_cannot_score(boxed_photos, tiny_backbone):
    with pytest.raises(DataError, match="no split val"):
        run_probe(job(boxed_photos, evaluate="val"), tiny_backbone)
    with pytest.raises(ConfigError, match="method"):
        job(boxed_photos, method="dino")
    with pytest.raises(ConfigError, match="images"):
        job(boxed_photos, test_images=0)


@pytest.mark.skipif(not BOXES.is_dir(), reason="needs the shared data")
def test_the_trivial_boxes_score_what_the_data_say():
    listed = json.loads((BOXES / "boxes.json").read_text()).values()
    truth = [grids.boxes_from_pixels(torch.tensor(each["boxes"]), (each["height"], each["width"])) for each in listed]
    scores = scores_of(torch.tensor([WHOLE]).expand(len(truth), 4), truth)
    assert round(scores["CorLoc"], 2) == round(scores["whole CorLoc"], 2) == 0.48
    assert round(scores["CorLoc70"], 2) == 0.07
    assert round(scores["centred CorLoc"], 2) == 0.83 and round(scores["centred CorLoc70"], 2) == 0.2
    assert scores["centred margin"] == pytest.approx(0.1)
