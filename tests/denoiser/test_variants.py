"""Closed-form denoisers on planted position signals, and their folding into layers."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from torch import nn

import dvt
from dvt import grids
from dvt.analysis import position_decodability
from dvt.backbones import load_backbone
from dvt.denoiser import Denoiser, DenoiserConfig, fit_linear, fit_subtract, fold, fold_after, fold_into
from dvt.errors import BackboneError, ConfigError, NonFiniteError, ShapeError

SHAPES = [(6, 9), (9, 6), (7, 7), (12, 5)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def orthonormal(channels, count, seed=0):
    return torch.linalg.qr(torch.randn(channels, count, generator=generator(seed), dtype=torch.float64))[0]


def planted(images, channels, loadings, noise=1.0, smooth=None, seed=0):
    """(contents, tokens): tokens are contents plus loadings times functions of position, x and y by default.

    Contents have no part along the loadings and, over all images, no correlation with any smooth function of position.
    """
    shapes = [SHAPES[number % len(SHAPES)] for number in range(images)]
    coords = torch.cat([grids.grid_centres(shape).double().flatten(0, 1) for shape in shapes])
    content = noise * torch.randn(len(coords), channels, generator=generator(seed), dtype=torch.float64)
    span = torch.linalg.qr(loadings)[0]
    content = content - content @ span @ span.T
    waves = [
        torch.cos(torch.pi * i * coords[:, 0]) * torch.cos(torch.pi * j * coords[:, 1]) for i, j in np.ndindex(6, 6)
    ]
    waves = torch.stack(waves, dim=1)
    content = 3 + content - waves @ torch.linalg.lstsq(waves, content).solution
    tokens = content + (smooth(coords) if smooth else coords) @ loadings.T
    sizes = [h * w for h, w in shapes]
    return tuple(
        [part.unflatten(0, shape) for part, shape in zip(side.split(sizes), shapes, strict=True)]
        for side in (content, tokens)
    )


def apply(denoiser, maps):
    return [denoiser(tokens[None])[0] for tokens in maps]


def rotated(channels=12, strength=5.0):
    return strength * orthonormal(channels, 2)


# ------------------------------------------------------------------------------------------------------- linear


def test_a_planted_position_subspace_is_removed_exactly():
    loadings = rotated()
    contents, maps = planted(12, 12, loadings)
    span = torch.linalg.qr(loadings)[0]
    for content, cleaned in zip(contents, apply(fit_linear(maps, rank=2), maps), strict=True):
        # What is left is the content, and along the subspace one constant: the mean.
        rest = cleaned - content
        torch.testing.assert_close(rest - rest @ span @ span.T, torch.zeros_like(rest), atol=1e-5, rtol=0)
        assert rest.flatten(0, 1).std(0).max() < 1e-5


def test_directions_that_do_not_exist_are_not_removed():
    _, maps = planted(12, 12, rotated(), noise=0.0)
    directions = fit_linear(maps, rank=5).body.directions
    torch.testing.assert_close(directions.norm(dim=0), torch.tensor([1.0, 1, 0, 0, 0]))


def test_curved_position_signals_are_removed_as_well():
    def curve(xy):
        x, y = xy.unbind(-1)
        return torch.stack((torch.cos(3 * torch.pi * x), x * y, torch.cos(2 * torch.pi * y) * x), dim=-1)

    contents, maps = planted(40, 12, 5 * orthonormal(12, 3), smooth=curve)
    cleaned = apply(fit_linear(maps, rank=3), maps)
    before, after = (
        torch.stack(
            [(a - b - (a - b).mean((0, 1))).square().mean() for a, b in zip(side, contents, strict=True)]
        ).mean()
        for side in (maps, cleaned)
    )
    assert after < 0.02 * before


def test_the_direction_whose_variance_position_explains_most_goes_first():
    def functions(xy):  # of variance 1/2 and 1/4 over the image
        x, y = xy.unbind(-1)
        return torch.stack((torch.cos(torch.pi * x), torch.cos(torch.pi * x) * torch.cos(torch.pi * y)), dim=-1)

    span = orthonormal(12, 2)
    for weaker, first in ((1.6, 1), (1.2, 0)):  # 1.6^2 / 4 > 1 / 2 > 1.2^2 / 4
        _, maps = planted(12, 12, span * torch.tensor([1.0, weaker]), smooth=functions)
        (found,) = fit_linear(maps, rank=1).body.directions.T
        torch.testing.assert_close((found @ span[:, first].float()).abs(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_no_linear_probe_finds_the_waves_afterwards_where_one_did_before():
    draw = generator(3)
    mixing, loadings = torch.randn(16, 16, generator=draw), torch.randn(16, 3, generator=draw)
    coords = [grids.grid_centres(grid) for grid in SHAPES]
    waves = [
        torch.stack((torch.cos(torch.pi * x), torch.cos(torch.pi * y)), -1) for x, y in (c.unbind(-1) for c in coords)
    ]
    waves = [torch.cat((w, w.prod(-1, keepdim=True)), -1) for w in waves]
    maps = [(torch.randn(*w.shape[:2], 16, generator=draw) + w @ loadings.T) @ mixing for w in waves]
    targets = torch.cat([w.flatten(0, 1) for w in waves]).numpy()

    def r2(these):
        features = torch.cat([tokens.flatten(0, 1) for tokens in these]).double().numpy()
        return LinearRegression().fit(features, targets).score(features, targets)

    assert r2(maps) > 0.3
    denoiser = fit_linear(maps, rank=5, waves=2)  # three waves, so three directions; the rest of the rank stays empty
    assert int((denoiser.body.directions.norm(dim=0) > 0).sum()) == 3
    assert abs(r2(apply(denoiser, maps))) < 1e-5


@given(rank=st.integers(1, 8), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_a_removal_is_a_projection_that_keeps_the_mean(rank, seed):
    maps = [torch.randn(*grid, 8, generator=generator(seed)) + 2 for grid in SHAPES]
    denoiser = fit_linear(maps, rank=rank)
    once = apply(denoiser, maps)
    torch.testing.assert_close(apply(denoiser, once), once)
    mean_before, mean_after = (torch.cat([m.flatten(0, 1) for m in side]).mean(0) for side in (maps, once))
    torch.testing.assert_close(mean_after, mean_before, atol=1e-5, rtol=1e-5)
    gram = denoiser.body.directions.T @ denoiser.body.directions
    torch.testing.assert_close(gram, torch.eye(rank), atol=1e-5, rtol=0)


def test_the_fit_streams_and_does_not_depend_on_the_order():
    _, maps = planted(8, 12, rotated())
    alive = []

    def stream(these):
        for tokens in these:
            alive.append(len(alive))
            yield tokens

    one, other = fit_linear(stream(maps), rank=2), fit_linear(reversed(maps), rank=2)
    assert len(alive) == 8
    probe = maps[0][None]
    torch.testing.assert_close(one(probe), other(probe))


def test_on_a_trained_vit_position_goes_and_most_of_the_tokens_stays():
    backbone = load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
    skimage = pytest.importorskip("skimage.data")
    photos = [getattr(skimage, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")]
    tokens = []
    for photo in photos:
        image = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None] / 255
        for top, left in ((0, 0), (40, 90), (70, 200)):
            tokens.append(backbone(image[:, :, top : top + 224, left : left + 224]))
    train, test = tokens[:6], tokens[6:]
    denoiser = fit_linear(t.patches[0] for t in train)
    cleaned = [t.with_patches(denoiser(t.patches)) for t in tokens]
    assert position_decodability(tokens) > 0.9
    assert position_decodability(cleaned) < 0.3
    kept = torch.cat([denoiser(t.patches).flatten(0, 2) for t in test]).var(0).sum()
    assert kept > 0.1 * torch.cat([t.patches.flatten(0, 2) for t in test]).var(0).sum()


# ------------------------------------------------------------------------------------------------------- subtract


def test_subtract_is_the_mean_artifact_where_the_grids_agree():
    artifacts = [torch.randn(6, 9, 4, generator=generator(seed)) for seed in range(5)]
    denoiser = fit_subtract(iter(artifacts))
    patches = torch.randn(2, 6, 9, 4, generator=generator(9))
    torch.testing.assert_close(denoiser(patches), patches - torch.stack(artifacts).mean(0))
    assert denoiser.config.grid == (6, 9)


def test_subtract_removes_a_smooth_artifact_seen_on_several_grids():
    loadings = torch.randn(4, 2, generator=generator())
    artifacts = [(grids.grid_centres(grid) - 0.5) @ loadings.T for grid in SHAPES]
    denoiser = fit_subtract(artifacts, grid=(12, 12))
    content = torch.randn(8, 10, 4, generator=generator(1))
    artifact = (grids.grid_centres((8, 10)) - 0.5) @ loadings.T
    error = denoiser((content + artifact)[None])[0] - content
    assert denoiser.config.grid == (12, 12)
    assert error.square().mean() < 0.02 * artifact.square().mean()


# ------------------------------------------------------------------------------------------------------- folding


def affine_denoiser(kind, channels=8, strength=0.7):
    draw = generator(4)
    if kind == "linear":
        denoiser = fit_linear([torch.randn(*grid, channels, generator=draw) for grid in SHAPES], rank=3)
    else:
        denoiser = Denoiser(DenoiserConfig(kind, channels, (2, 2)))
        for parameter in denoiser.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw)
    denoiser.strength = strength
    return denoiser.requires_grad_(False)


def layer(inputs, outputs, convolution, bias):
    made = nn.Conv2d(inputs, outputs, 1, bias=bias) if convolution else nn.Linear(inputs, outputs, bias=bias)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator(5))
    return made.requires_grad_(False)


def run(module, maps):
    """A layer on a channels-last map, whichever layout it takes."""
    if isinstance(module, nn.Conv2d):
        return module(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return module(maps)


@pytest.mark.parametrize("kind", ["linear", "conv1x1"])
@pytest.mark.parametrize("strength", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_into_the_layers_beside_it_changes_no_result(kind, strength, convolution, bias):
    denoiser, raw = affine_denoiser(kind, strength=strength), torch.randn(2, 4, 5, 8, generator=generator(6))
    reader, maker = layer(8, 3, convolution, bias), layer(6, 8, convolution, bias)
    hidden = torch.randn(2, 4, 5, 6, generator=generator(7))
    untouched = copy.deepcopy(reader.state_dict())
    torch.testing.assert_close(run(fold_into(denoiser, reader), raw), run(reader, denoiser(raw)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        run(fold_after(denoiser, maker), hidden), denoiser(run(maker, hidden)), atol=1e-4, rtol=1e-4
    )
    assert all(torch.equal(value, untouched[name]) for name, value in reader.state_dict().items())
    assert type(fold_into(denoiser, reader)) is type(reader)


@pytest.mark.parametrize("kind", ["linear", "conv1x1"])
def test_folding_into_the_final_norm_gives_what_attaching_gives(kind, make_tiny_backbone):
    backbone, denoiser = make_tiny_backbone(), affine_denoiser(kind, 64)
    weight, bias = backbone.model.norm.weight, backbone.model.norm.bias
    weight.data, bias.data = (torch.randn(64, generator=generator(seed)) for seed in (1, 2))
    images = torch.rand(2, 3, 64, 96, generator=generator(8))
    raw, before = backbone(images), backbone.weights_sha256
    folded = fold(denoiser, backbone)
    tokens = folded(images)
    torch.testing.assert_close(tokens.patches, denoiser(raw.patches), atol=1e-4, rtol=1e-4)
    assert (tokens.patches - raw.patches).abs().max() > 0.1
    torch.testing.assert_close(tokens.prefix, raw.prefix)
    assert torch.equal(backbone(images).patches, raw.patches), "the backbone given is not touched"
    assert folded.weights_sha256 != before == backbone.weights_sha256
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    plain = fold(denoiser, backbone.model)
    normal = (images - backbone.mean) / backbone.std
    torch.testing.assert_close(plain.forward_features(normal)[:, 1:].unflatten(1, (4, 6)), tokens.patches)
    (level,) = plain.forward_intermediates(normal, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
    torch.testing.assert_close(level.permute(0, 2, 3, 1), tokens.patches)


@pytest.mark.parametrize(
    "name", ["cait_xxs24_224", "xcit_nano_12_p8_224", "convit_tiny", "deit_tiny_distilled_patch16_224"]
)
def test_folding_into_the_final_norm_of_other_families(name):
    backbone = load_backbone(name, pretrained=False)
    channels = backbone.feature_dim
    denoiser = Denoiser(DenoiserConfig("conv1x1", channels, (2, 2))).requires_grad_(False)
    denoiser.body.conv.weight.copy_(torch.randn(channels, channels, 1, 1, generator=generator()) / channels**0.5)
    size = backbone.image_size if backbone.fixed_size else tuple(4 * side for side in backbone.patch_size)
    images = torch.rand(1, 3, *size, generator=generator(1))
    raw, tokens = backbone(images), fold(denoiser, backbone)(images)
    torch.testing.assert_close(tokens.patches, denoiser(raw.patches), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens.prefix, raw.prefix)


def test_what_cannot_be_folded_says_why(make_tiny_backbone):
    linear, backbone = affine_denoiser("linear", 64), make_tiny_backbone()
    with pytest.raises(ConfigError, match="'subtract' is no affine map of a token"):
        fold_into(fit_subtract([torch.rand(4, 4, 64)]), nn.Linear(64, 2))
    with pytest.raises(ShapeError, match="reads 32 channels, the denoiser gives 64"):
        fold_into(linear, nn.Linear(32, 2))
    with pytest.raises(ShapeError, match="gives 2 channels, the denoiser reads 64"):
        fold_after(linear, nn.Linear(64, 2))
    for module in (nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 1, groups=2), nn.Conv2d(64, 64, 1, padding=1)):
        with pytest.raises(ShapeError, match="plain 1 x 1 convolution"):
            fold_into(linear, module)
    with pytest.raises(BackboneError, match="end in Identity, not in a LayerNorm over 192"):
        fold(affine_denoiser("linear", 192), load_backbone("eva02_tiny_patch14_224", pretrained=False))
    with pytest.raises(BackboneError, match="reads layer 3"):
        fold(linear, load_backbone("test_vit", pretrained=False, layer=3))
    with pytest.raises(BackboneError, match="takes tokens of 8 channels"):
        fold(affine_denoiser("linear"), backbone)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("fit", [fit_linear, fit_subtract])
def test_maps_that_cannot_be_fitted_are_refused(fit):
    good = torch.rand(4, 5, 8)
    bad = good.clone()
    bad[2, 3, 1] = float("nan")
    with pytest.raises(ShapeError, match="no token maps"):
        fit([])
    with pytest.raises(ShapeError, match=r"map 1 has shape \(4, 5, 9\); all must be \(h, w, 8\)"):
        fit([good, torch.rand(4, 5, 9)])
    with pytest.raises(ShapeError, match=r"map 0 has shape \(1, 4, 5, 8\)"):
        fit([good[None]])
    with pytest.raises(NonFiniteError, match="map 1 holds NaN"):
        fit([good, bad])


@pytest.mark.parametrize(
    ("options", "message"), [({"rank": 0}, "rank"), ({"rank": 9}, "rank"), ({"waves": 1}, "waves")]
)
def test_settings_of_the_fit_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        fit_linear([torch.rand(4, 5, 8)], **options)
