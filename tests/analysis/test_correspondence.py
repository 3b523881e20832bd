"""Correspondence under known warps: exact truth, features with known answers, naive loops and closed-form chance."""

import itertools
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dvt
from dvt import grids
from dvt.analysis.probes.correspondence import (
    WARP_KINDS,
    Correspondence,
    Matches,
    WarpConfig,
    correspondence,
    draw_warps,
    kind_of,
    match,
    warped_images,
)
from dvt.analysis.probes.protocol import ProbeConfig, run_probe
from dvt.errors import ConfigError, NonFiniteError, ShapeError
from dvt.images import load_image
from dvt.tokens import Tokens

SEEDS = st.integers(0, 10**6)
SIZES = [(224, 224), (224, 336), (480, 320)]
IDENTITY = grids.rotated_view((8, 8), 0, 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def grid_of(size, patch=16):
    return grids.grid_shape(size, (patch, patch))


def place_features(coords, size):
    """Unit vectors whose cosine falls with the distance in the image: (x, y) in pixels lifted to a sphere."""
    flat = coords * torch.tensor([size[1], size[0]]) / max(size) - 0.5
    return torch.nn.functional.normalize(torch.cat((flat, torch.full_like(flat[..., :1], 5.0)), dim=-1), dim=-1)


def many_warps(size, seed=0, count=4):
    return draw_warps(size, WarpConfig(count, rotations=count, scales=count), generator(seed))


# --- warps


@settings(deadline=None)
@given(SEEDS, st.integers(20, 900), st.integers(20, 900))
def test_every_view_lies_inside_the_image_and_keeps_shapes(seed, height, width):
    warps = many_warps((height, width), seed)
    assert [kind_of(matrix) for matrix in warps] == ["crop"] * 4 + ["rotation"] * 4 + ["scale"] * 4
    corners = grids.node_coords((2, 2)).double().view(4, 2)
    for number, matrix in enumerate(warps):
        kind = ("crop", "rotation", "scale")[number // 4]
        there = grids.move(corners, matrix)
        assert there.min() >= -1e-9 and there.max() <= 1 + 1e-9
        top_left, top_right, bottom_left, _ = (there * torch.tensor([width, height])).tolist()
        right, down = np.subtract(top_right, top_left), np.subtract(bottom_left, top_left)
        assert right @ down == pytest.approx(0, abs=1e-6 * width * height)
        zoom = math.hypot(*right) / width
        assert zoom == pytest.approx(math.hypot(*down) / height)
        turn = abs(math.degrees(math.atan2(right[1], right[0])))
        if kind == "rotation":
            assert 10 - 1e-6 <= turn <= 45 + 1e-6
            assert there.min() == pytest.approx(0, abs=1e-9)  # as large as fits
        else:
            assert turn == pytest.approx(0, abs=1e-6) and 0.4 - 1e-9 <= zoom <= 0.8 + 1e-9
        centre = there.mean(0)
        assert kind == "crop" or torch.allclose(centre, torch.tensor([0.5, 0.5]).double())


def test_warps_differ_between_draws_and_repeat_with_the_seed():
    first, again, other = (many_warps((200, 300), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert len({tuple(each.flatten().tolist()) for each in torch.cat((first, other))}) == 24
    turns = [float(each[1, 0]) > 0 for each in many_warps((200, 200), count=20)[20:40]]
    assert 4 < sum(turns) < 16  # to either side


def test_warped_images_hold_the_image_at_the_true_places():
    y, x = torch.meshgrid(torch.arange(320.0) + 0.5, torch.arange(480.0) + 0.5, indexing="ij")
    image = torch.stack((x / 480, y / 320, 0.5 + 0.5 * torch.sin(x / 30) * torch.cos(y / 40)))
    size, warps = (224, 336), many_warps((320, 480), seed=3)
    made = warped_images(image, warps, size)
    assert made.shape == (13, 3, 224, 336) and made.min() >= 0 and made.max() <= 1
    centres = grids.grid_centres(size).double()
    for view, matrix in zip(made[1:], warps, strict=True):
        u, v = grids.move(centres, matrix).unbind(-1)
        expected = torch.stack((u, v, 0.5 + 0.5 * torch.sin(u * 16) * torch.cos(v * 8))).float()
        inside = ((u > 0.02) & (u < 0.98) & (v > 0.02) & (v < 0.98)).expand(3, -1, -1)
        assert (view - expected)[inside].abs().max() < 2e-3  # the ramps: less than a pixel of the view
    small = torch.nn.functional.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    torch.testing.assert_close(made[0], small)


def test_a_view_of_fine_stripes_does_not_alias():
    stripes = (torch.arange(1200) % 2).float().expand(3, 800, 1200).contiguous()
    warps = grids.rotated_view((800, 1200), 0, 0.8)[None]
    assert warped_images(stripes, warps, (160, 240))[1, :, 8:-8, 8:-8].std() < 0.03


def test_an_enlarged_view_shows_what_the_whole_image_is_too_small_for():
    columns = torch.arange(400) + 0.5
    fine = (0.5 + 0.5 * torch.sin(2 * torch.pi * columns / 5)).expand(3, 400, 400).contiguous()
    whole, view = warped_images(fine, grids.rotated_view((400, 400), 0, 0.25)[None], (100, 100))
    assert whole[:, 8:-8, 8:-8].std() < 0.08 and view.std() == pytest.approx(0.5 / math.sqrt(2), abs=0.02)


def test_warped_images_refuse_a_batch():
    with pytest.raises(ShapeError, match=r"\(3, H, W\)"):
        warped_images(torch.rand(1, 3, 20, 20), many_warps((20, 20)), (16, 16))


# --- scores with known answers


@pytest.mark.parametrize("size", SIZES)
def test_the_identity_finds_every_patch(size):
    tokens = noise(*grid_of(size), 12)
    scores = match(tokens, tokens, grids.rotated_view(size, 0, 1))
    assert scores.pck == scores.mutual == scores.mutual_right == scores.position == scores.ceiling == 1
    assert scores.chance < 0.1


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(SIZES), SEEDS)
def test_features_that_know_their_place_find_it_under_every_warp(size, seed):
    grid = grid_of(size)
    centres = grids.grid_centres(grid).double()
    whole = place_features(centres, size)
    for matrix in many_warps(size, seed, count=1):
        scores = match(whole, place_features(grids.move(centres, matrix), size), matrix)
        assert scores.pck == scores.ceiling == 1 and scores.mutual_right == scores.mutual
        # Each patch of the image that lies in the view and has a patch of it near is found back.
        assert 0 < scores.mutual <= float(torch.linalg.det(matrix[:, :2])) * 1.6
        wrong = match(whole, place_features(grids.move(centres, matrix), size).flip(0), matrix)
        assert wrong.pck < 0.6


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(SIZES), SEEDS)
def test_tokens_of_position_alone_score_what_position_scores(size, seed):
    tokens = noise(*grid_of(size), 16, seed=seed)
    for matrix in many_warps(size, seed, count=1):
        scores = match(tokens, tokens, matrix)
        assert scores.pck == scores.position < 1
        assert scores.mutual == 1


def chance_by_counting(grid, matrix, threshold=0.1):
    """Whether each pair of a view patch inside the image and an image patch is near enough, by a loop."""
    height, width = grid
    near = []
    for i, j in itertools.product(range(grid[0]), range(grid[1])):
        point = np.array([(j + 0.5) / grid[1], (i + 0.5) / grid[0], 1.0])
        x, y = matrix.numpy() @ point
        if not (0 <= x <= 1 and 0 <= y <= 1):
            continue
        hits = [
            math.hypot((x - (q + 0.5) / grid[1]) * width, (y - (p + 0.5) / grid[0]) * height)
            <= threshold * max(grid) + 1e-6
            for p, q in itertools.product(range(grid[0]), range(grid[1]))
        ]
        near.append(hits)
    return np.array(near)


@pytest.mark.parametrize("seed", range(3))
def test_random_features_score_chance(seed):
    matrix, count = many_warps((224, 336), seed, count=1)[seed], 14 * 21
    found = [match(noise(14, 21, 64, seed=100 + n), noise(14, 21, 64, seed=200 + n), matrix) for n in range(8)]
    near = chance_by_counting((14, 21), matrix)
    assert found[0].chance == pytest.approx(near.mean(), abs=1e-12)
    assert found[0].ceiling == near.any(1).mean()
    error = math.sqrt(near.mean() / (8 * count))  # binomial; image patches that many view patches take widen it
    assert abs(np.mean([each.pck for each in found]) - near.mean()) < 6 * error
    # An entry of n x n independent ones is the largest of its row and its column with probability 1 / (2n - 1).
    assert np.mean([each.mutual for each in found]) == pytest.approx(count / (2 * count - 1), abs=0.03)


@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_tokens_that_are_all_equal_score_chance_exactly(kind):
    matrix = grids.rotated_view((224, 336), 20, 0.5)
    tokens = torch.full((14, 21, 5), 0.3 if kind == "constant" else 0.0)
    scores = match(tokens, tokens, matrix)
    assert scores.pck == pytest.approx(scores.chance, abs=1e-12)
    assert scores.mutual == pytest.approx(1 / 294)
    assert scores.mutual_right == pytest.approx(scores.chance / 294)


def naive_matches(image, view, matrix, threshold):
    """Matches one by one; no ties."""
    grid = image.shape[:2]
    near = chance_by_counting(grid, matrix, threshold)
    flat = [each.reshape(-1, each.shape[-1]).numpy() for each in (image, view)]
    cosine = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in flat[0]] for a in flat[1]]
    there, back = np.argmax(cosine, axis=1), np.argmax(cosine, axis=0)
    truth = np.array([matrix.numpy() @ [*each, 1] for each in grids.grid_centres(grid).view(-1, 2).tolist()])
    kept = [i for i, (x, y) in enumerate(truth) if 0 <= x <= 1 and 0 <= y <= 1]
    right = np.array([near[row, there[i]] for row, i in enumerate(kept)])
    mutual = np.array([back[there[i]] == i for i in kept])
    same = np.mean([near[row, i] for row, i in enumerate(kept)])
    parts = right.mean(), mutual.mean(), (right & mutual).mean(), near.mean(), same, near.any(1).mean()
    return Matches(*map(float, parts))


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    SEEDS,
    st.floats(-90, 90),
    st.floats(0.3, 1.5),
    st.sampled_from([0.05, 0.1, 0.3]),
)
@example((1, 2), 0, 43.0, 1.5, 0.05)  # a view that shows no patch centre
def test_matches_equal_a_naive_loop(grid, seed, degrees, zoom, threshold):
    image = noise(*grid, 3, seed=seed)
    view = image + 0.5 * noise(*grid, 3, seed=seed + 1)
    matrix = grids.rotated_view((grid[0] * 10 + 1, grid[1] * 12), degrees, zoom, (0.4, 0.55))
    places = np.array([matrix.numpy() @ [*each, 1] for each in grids.grid_centres(grid).view(-1, 2).tolist()])
    if not ((places >= 0) & (places <= 1)).all(1).any():
        with pytest.raises(ShapeError, match="shows nothing"):
            match(image, view, matrix, threshold)
        return
    found, expected = match(image, view, matrix, threshold), naive_matches(image, view, matrix, threshold)
    assert asdict(found) == pytest.approx(asdict(expected), abs=1e-9)


def waves(places, channels=24):
    """Features of the place in the image alone, (..., channels), nearly unique to it."""
    return torch.sin(places @ (noise(2, channels, seed=5) * 6))


def test_noise_lowers_the_score_step_by_step():
    matrix, centres = grids.rotated_view((224, 336), 30, 0.55), grids.grid_centres((14, 21)).double()
    whole, view = waves(centres), waves(grids.move(centres, matrix))
    curve = [
        match(whole + s * noise(14, 21, 24, seed=1), view + s * noise(14, 21, 24, seed=2), matrix).pck
        for s in (0.0, 0.5, 1.0, 2.0, 8.0)
    ]
    assert curve[0] > 0.99 and curve == sorted(curve, reverse=True) and curve[-1] < 0.15


def test_a_position_artifact_lowers_the_score_to_that_of_position():
    warps, centres = many_warps((224, 336), seed=5), grids.grid_centres((14, 21)).double()
    clean = torch.stack([waves(places) for places in (centres, *(grids.move(centres, m) for m in warps))])
    artifact = noise(14, 21, 24, seed=9)
    curve = [Correspondence().score([clean + strength * artifact], [warps]) for strength in (0, 1, 3, 100)]
    scores = [each["PCK"] for each in curve]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0.97 > 0.6 > scores[2]
    assert scores[-1] == pytest.approx(curve[-1]["position PCK"], abs=1e-3)


def test_a_strided_backbones_centres_are_used():
    size = (64, 96)
    centres = grids.patch_centres(size, (16, 16), (8, 8)).double()
    matrix = grids.rotated_view(size, 0, 0.5, (0.3, 0.7))
    whole, view = place_features(centres, size), place_features(grids.move(centres, matrix), size)
    exact = match(whole, view, matrix, threshold=0.06, centres=centres)
    tiled = match(whole, view, matrix, threshold=0.06)
    assert exact.pck == exact.ceiling == 1 > tiled.pck


def test_large_patches_lower_the_ceiling():
    found = match(noise(4, 4, 8), noise(4, 4, 8, seed=1), grids.rotated_view((64, 64), 30, 0.6))
    assert found.ceiling < 1


def test_a_single_patch_matches_itself():
    # Half a patch is further than a tenth of one, but the place is exact.
    assert set(asdict(match(noise(1, 1, 3), noise(1, 1, 3, seed=1), IDENTITY)).values()) == {1.0}


# --- the probe and the whole job


def test_the_probe_predicts_places_and_averages_views_and_images():
    images = 3
    warps = [draw_warps((112, 160), WarpConfig(1, rotations=2, scales=0), generator(n)) for n in range(images)]
    tokens = [noise(4, 7, 10, 6, seed=n) for n in range(images)]
    probe = Correspondence(threshold=0.2)
    assert probe.fit(tokens, warps) is probe
    single = [[match(t[0], t[1 + v], w[v], 0.2) for v in range(3)] for t, w in zip(tokens, warps, strict=True)]
    scores = probe.score(tokens, warps)

    def mean(name, views=slice(None)):
        return np.mean([[getattr(each, name) for each in of_image[views]] for of_image in single])

    for name in ("mutual", "chance", "position"):
        assert scores[name if name == "mutual" else f"{name} PCK"] == pytest.approx(mean(name))
    assert scores["PCK"] == pytest.approx(mean("pck")) and scores["PCK crop"] == pytest.approx(mean("pck", slice(1)))
    assert scores["PCK rotation"] == pytest.approx(mean("pck", slice(1, 3)))
    assert scores["position PCK crop"] == pytest.approx(mean("position", slice(1)))
    assert scores["mutual PCK"] == pytest.approx(mean("mutual_right") / mean("mutual"))
    assert "PCK scale" not in scores
    for places, its, of_image in zip(probe.predict(tokens), warps, single, strict=True):
        assert places.shape == (3, 7, 10, 2)
        far = (places - torch.stack([grids.move(grids.grid_centres((7, 10)), m) for m in its])) * torch.tensor([10, 7])
        share = (far.norm(dim=-1) <= 0.2 * 10).double().mean((1, 2))
        assert share.tolist() == pytest.approx([each.pck for each in of_image])


def test_the_evidence_of_images_adds_up():
    warps = [many_warps((64, 96), seed, count=2) for seed in range(3)]
    tokens = [noise(7, 8, 12, 5, seed=seed) for seed in range(3)]
    statistics = Correspondence().sufficient_statistics(tokens, warps)
    assert statistics.shape == (3, len(WARP_KINDS), 7) and (statistics[..., 0] == 2).all()
    each = Correspondence.summarise(statistics)
    for i in range(3):
        alone = Correspondence().score(tokens[i : i + 1], warps[i : i + 1])
        assert alone == pytest.approx({name: float(values[i]) for name, values in each.items()})
    total = Correspondence.summarise(statistics.sum(0))
    assert float(total["PCK"]) == pytest.approx(float(each["PCK"].mean()))


def pixel_means(images):
    """Tokens of content alone: each patch's mean colours and edges."""
    parts = images.unfold(2, 8, 8).unfold(3, 8, 8)
    return Tokens.of(torch.cat((parts.mean((4, 5)), parts.std((4, 5))), dim=1).movedim(1, -1) - 0.4)


def test_on_photographs_position_hides_content_and_subtracting_it_helps():
    folder = Path(dvt.__file__).parent / "data" / "photos"
    images = [load_image(path) for path in sorted(folder.glob("*.jpg"))[:3]]
    artifact = 2 * noise(20, 20, 6, seed=3).float()
    calls = []

    def dirty(batch):
        tokens = pixel_means(batch)
        return tokens.with_patches(tokens.patches + artifact)

    statistics = correspondence(
        dirty,
        images,
        lambda _: (160, 160),
        WarpConfig(1, rotations=1, scales=1, seed=2),
        {"clean": lambda tokens: tokens.with_patches(tokens.patches - artifact)},
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("correspondence", n, 3) for n in (1, 2, 3)]
    raw, clean = (Correspondence.summarise(statistics[name].sum(0)) for name in ("raw", "clean"))
    assert clean["PCK"] > raw["PCK"] and clean["PCK"] > 3 * clean["chance PCK"]
    assert float(raw["PCK"]) == pytest.approx(float(raw["position PCK"]), abs=0.05)
    assert (raw["chance PCK"], raw["position PCK"]) == (clean["chance PCK"], clean["position PCK"])


def test_a_real_backbone_and_a_seed(tiny_backbone, photo):
    def run(seed):
        config = WarpConfig(1, rotations=1, scales=0, seed=seed)
        return correspondence(tiny_backbone, iter([photo]), tiny_backbone.input_size, config)["raw"]

    assert torch.equal(run(4), run(4)) and not torch.equal(run(4), run(5))
    warps = draw_warps((512, 512), WarpConfig(1, rotations=1, scales=0), generator(4))
    tokens = tiny_backbone(warped_images(photo, warps, tiny_backbone.input_size((512, 512)))).patches
    assert torch.equal(run(4), Correspondence().sufficient_statistics([tokens], [warps]))


def test_the_job_draws_warps_again_for_each_seed(make_tiny_backbone, tmp_path):
    backbone, calls = make_tiny_backbone(96), []
    for path in sorted((Path(dvt.__file__).parent / "data" / "photos").glob("*.jpg"))[:2]:
        shutil.copy(path, tmp_path)
    config = ProbeConfig("correspondence", tmp_path, seeds=2, seed=7, baselines=(), cache=tmp_path / "cache")
    same = run_probe(config, backbone, {"same": lambda tokens: tokens, "other": make_tiny_backbone(64)})
    run_probe(config, backbone, progress=lambda *call: calls.append(call))
    assert calls == [("correspondence", n, 4) for n in (1, 2, 3, 4)]
    raw = same.row("raw")
    assert raw.scores == same.row("same").scores != same.row("other").scores and same.row("same").difference == 0
    images, by_hand = [load_image(path) for path in sorted(tmp_path.glob("*.jpg"))], []
    for seed in (7, 8):
        statistics = correspondence(backbone, images, backbone.input_size, WarpConfig(seed=seed))["raw"]
        by_hand.append(float(Correspondence.summarise(statistics.sum(0))["PCK"]))
    assert by_hand[0] != by_hand[1] and raw.scores["PCK"] == pytest.approx(np.mean(by_hand))
    assert raw.seeds is not None and raw.images is not None and "position PCK" in same.table()


def test_the_job_takes_the_centres_of_overlapping_patches(tmp_path):
    for path in sorted((Path(dvt.__file__).parent / "data" / "photos").glob("*.jpg"))[:1]:
        shutil.copy(path, tmp_path)
    (image,) = (load_image(path) for path in tmp_path.glob("*.jpg"))
    backbone = dvt.load_backbone("vit_tiny_patch16_224", pretrained=False, stride=8, size=64)
    config = ProbeConfig("correspondence", tmp_path, seeds=1, baselines=(), cache=tmp_path / "cache")
    size = backbone.input_size((image.shape[1], image.shape[2]))
    expected = Correspondence(centres=lambda grid: backbone.centres(size))
    statistics = correspondence(backbone, [image], backbone.input_size, WarpConfig(), probe=expected)["raw"].sum(0)
    tiled = correspondence(backbone, [image], backbone.input_size, WarpConfig())["raw"].sum(0)
    chance = [float(Correspondence.summarise(each)["chance PCK"]) for each in (statistics, tiled)]
    assert run_probe(config, backbone).row("raw").scores["chance PCK"] == pytest.approx(chance[0])
    assert chance[0] != pytest.approx(chance[1], rel=1e-3)


# --- bad input


def test_bad_tokens_are_refused():
    tokens = noise(4, 4, 3)
    broken = tokens.clone()
    broken[0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError):
        match(tokens, broken, IDENTITY)
    with pytest.raises(ShapeError, match=r"got \(4, 4, 3\) and \(4, 5, 3\)"):
        match(tokens, noise(4, 5, 3), IDENTITY)
    with pytest.raises(ShapeError, match="not empty"):
        match(noise(0, 4, 3), noise(0, 4, 3), IDENTITY)
    with pytest.raises(ShapeError, match="nothing of the image"):
        match(tokens, tokens, grids.rotated_view((64, 64), 0, 0.5, (5, 5)))
    with pytest.raises(ShapeError, match="centres"):
        match(tokens, tokens, IDENTITY, centres=grids.grid_centres((5, 5)))
    with pytest.raises(ConfigError, match="threshold"):
        match(tokens, tokens, IDENTITY, threshold=0)


def test_sets_that_do_not_fit_are_refused():
    warps, probe = many_warps((64, 64), count=1), Correspondence()
    with pytest.raises(ShapeError, match="2 images came with the warps of 1"):
        probe.score([noise(4, 4, 4, 3)] * 2, [warps])
    with pytest.raises(ShapeError, match="0 images"):
        probe.score([], [])
    with pytest.raises(ShapeError, match=r"tokens \(3, 4, 4, 3\) must be"):
        probe.score([noise(3, 4, 4, 3)], [warps])
    with pytest.raises(ShapeError, match="at least one"):
        probe.score([noise(1, 4, 4, 3)], [warps[:0]])
    with pytest.raises(ShapeError, match="no image"):
        correspondence(pixel_means, [], lambda _: (32, 32))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"crops": -1}, "0 or more"),
        ({"crops": 0, "rotations": 0, "scales": 0}, "one of them positive"),
        ({"crop_zoom": (0.8, 0.5)}, "crop_zoom"),
        ({"scale_zoom": (0.5, 1.5)}, "scale_zoom"),
        ({"degrees": (-5, 20)}, "degrees"),
    ],
)
def test_settings_out_of_range_are_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        WarpConfig(**bad)
