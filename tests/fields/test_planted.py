"""The planted problem: its terms have the sizes that it promises, and it is the same every time."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nnf

from dvt import grids
from dvt.errors import ConfigError, ShapeError
from dvt.fields.planted import Planted, PlantedBackbone, PlantedBackboneConfig, PlantedConfig, relative_error

SMALL = PlantedConfig(channels=24, grid=(8, 10), views=40, blur=0.02)


@pytest.fixture(scope="module")
def make(photo):
    kept = {}

    def planted(config=SMALL):
        return kept.setdefault(config, Planted(photo, config))

    return planted


def read(planted):
    return [torch.cat(part) for part in zip(*planted, strict=True)]


def test_a_token_is_field_plus_artifact_plus_noise_of_the_promised_size(make):
    planted = make()
    tokens, coords = read(planted)
    assert tokens.shape == (41, 8, 10, 24) and coords.shape == (41, 8, 10, 2) and len(planted) == 41
    noise = tokens - planted.truth(coords) - planted.artifact
    assert abs(noise.std() - 0.05) < 0.001 and abs(noise.mean()) < 0.001
    assert noise.mean(0).std() < 3 * 0.05 / 41**0.5  # nothing in it repeats from view to view
    torch.testing.assert_close(coords[0], grids.grid_centres((8, 10)))
    torch.testing.assert_close(planted.truth(coords[0]), planted.field)


def test_the_sizes_are_relative_to_a_field_of_unit_variance(make):
    planted = make()
    everywhere = planted.truth(grids.node_coords((384, 384)))
    torch.testing.assert_close(everywhere.std((0, 1)), torch.ones(24), atol=1e-3, rtol=0)
    assert everywhere.mean((0, 1)).abs().max() < 1e-4
    assert planted.artifact.square().mean().sqrt().item() == pytest.approx(0.65, rel=1e-5)
    assert planted.artifact.mean((0, 1)).abs().max() < 1e-6


def test_the_artifact_holds_a_wave_of_the_patch_grid_and_a_few_large_positions(make):
    artifact = make().artifact
    power = torch.fft.fft2(artifact, dim=(0, 1)).abs().square().mean(-1)
    assert power[4, 5] > 3 * power.median()  # the checkerboard's own frequency
    norm = artifact.norm(dim=-1).flatten()
    assert norm.max() > 2 * norm.median() and (norm > 2 * norm.median()).float().mean() < 0.1


def test_the_field_depends_on_the_photograph_and_not_on_the_view(make, photo):
    planted = make()
    other = Planted(1 - photo.flip(-1), SMALL)
    assert relative_error(other.field, planted.field) > 0.5
    torch.testing.assert_close(other.artifact, planted.artifact)
    mirrored = Planted(1 - photo, SMALL)  # filters are linear and their mean is removed
    torch.testing.assert_close(mirrored.field, -planted.field, atol=1e-3, rtol=0)


def test_reading_again_gives_the_same_tokens_and_another_seed_others(make, photo):
    planted = make()
    first, again, fresh = read(planted), read(planted), read(Planted(photo, SMALL, batch=16))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, fresh, strict=True))
    assert not torch.equal(first[0], read(make(replace(SMALL, seed=1)))[0])


def test_the_global_generator_is_neither_read_nor_moved(photo):
    before = torch.get_rng_state()
    read(Planted(photo, replace(SMALL, outliers=0.02, views=4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_outliers_have_the_promised_share_norm_and_place(make):
    planted = make(replace(SMALL, outliers=0.02, noise=0.0, views=200))
    tokens, coords = read(planted)
    extra = tokens - planted.truth(coords) - planted.artifact
    norm = extra.norm(dim=-1)
    outlier = norm > 1e-3
    assert 0.01 < outlier.float().mean() < 0.04
    typical = planted.truth(coords).norm(dim=-1).mean()
    assert 3 < norm[outlier].mean() / typical < 5  # 4 times the field's mean norm, of uniform spread
    direction = extra[outlier] / norm[outlier][:, None]
    torch.testing.assert_close(direction, direction[:1].expand_as(direction), atol=1e-3, rtol=0)
    field_norm = planted.truth(coords).norm(dim=-1)
    assert field_norm[outlier].max() < field_norm.quantile(0.2)  # only where there is little content
    assert outlier.float().mean(0).max() < 0.2  # and at no fixed position


def test_relative_error():
    truth = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    centred = truth - truth.mean((0, 1))
    assert relative_error(truth + torch.arange(5.0), truth) < 1e-6  # blind to a constant vector
    assert relative_error(0 * truth, truth) == pytest.approx(1)
    assert relative_error(centred * 1.1, truth) == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(ShapeError, match="same shape"):
        relative_error(truth[:2], truth)


# The planted backbone --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels(photo):
    return nnf.interpolate(photo[None], size=(224, 336), mode="bilinear", antialias=True)


def planted(pixels, **settings):
    return PlantedBackbone(pixels[0], PlantedBackboneConfig(channels=24, **settings))


def test_a_planted_backbone_is_the_sum_of_its_terms(pixels):
    backbone = planted(pixels, artifact=0.65)
    tokens, field, artifact = backbone(pixels), backbone.semantic(pixels), backbone.artifact((14, 21))
    assert tokens.grid == (14, 21) and tokens.feature_dim == 24
    torch.testing.assert_close(tokens.patches, field + artifact)
    assert artifact.mean((0, 1)).abs().max() < 1e-6 and artifact.square().mean().sqrt().item() == pytest.approx(0.65)
    assert (field - field.mean((0, 1, 2))).square().mean().item() == pytest.approx(1, rel=1e-4)
    again = planted(pixels, artifact=0.65)
    assert again.weights_sha256 == backbone.weights_sha256 and torch.equal(again(pixels).patches, tokens.patches)


def test_its_field_changes_with_scale_and_mirroring_and_not_with_whole_patch_shifts(pixels):
    backbone = planted(pixels)
    field = backbone.semantic(pixels)
    assert relative_error(backbone.semantic(pixels.flip(-1)).flip(2)[0], field[0]) > 0.3
    double = backbone.semantic(nnf.interpolate(pixels, scale_factor=2, mode="bicubic"))
    pooled = nnf.avg_pool2d(double.movedim(-1, 1), 2).movedim(1, -1)
    assert relative_error(pooled[0], field[0]) > 0.3
    torch.testing.assert_close(backbone.semantic(pixels.roll((32, 48), (2, 3))), field.roll((2, 3), (1, 2)))


def test_context_makes_a_token_depend_on_what_else_is_seen(pixels):
    for context, least, most in ((0.0, 0.0, 1e-5), (0.5, 0.005, 0.5)):
        backbone = planted(pixels, context=context)
        whole, part = backbone.semantic(pixels)[0, 3:, 4:], backbone.semantic(pixels[:, :, 48:, 64:])[0]
        assert least <= relative_error(part, whole) < most


def test_noise_has_its_size_and_neither_content_nor_position_tells_it(pixels):
    backbone = planted(pixels, artifact=0.0, noise=0.3)
    here = (backbone(pixels).patches - backbone.semantic(pixels))[0]
    there = (backbone(pixels.roll(16, 3)).patches - backbone.semantic(pixels.roll(16, 3)))[0]
    assert here.square().mean().sqrt().item() == pytest.approx(0.3, rel=0.1)
    assert nnf.cosine_similarity(here.flatten(), there.roll(-1, 1).flatten(), dim=0).abs() < 0.1
    assert nnf.cosine_similarity(here.flatten(), there.flatten(), dim=0).abs() < 0.1


@pytest.mark.parametrize("flicker", [False, True])
def test_outliers_lie_on_flat_patches_and_flicker_or_stay(pixels, flicker):
    backbone = planted(pixels, outliers=0.5, flicker=flicker)
    found, moved = backbone.outliers(pixels), backbone.outliers(pixels.roll(32, 3)).roll(-2, 2)
    assert 0.02 < found.float().mean() < 0.18
    assert torch.equal(found, moved) != flicker
    extra = (backbone(pixels).patches - backbone.semantic(pixels) - backbone.artifact((14, 21))).norm(dim=-1)
    mean_norm = backbone.semantic(pixels).norm(dim=-1).mean()
    assert extra[~found].max() < 1e-4
    torch.testing.assert_close(extra[found], (4 * mean_norm).expand_as(extra[found]), rtol=1e-4, atol=1e-4)
    flat = nnf.unfold(pixels, 16, stride=16).std(1).view(found.shape)
    assert flat[found].max() <= flat.flatten().quantile(0.21)


def test_a_planted_backbone_refuses_sizes_out_of_range():
    with pytest.raises(ConfigError, match=r"share in \[0, 1\]"):
        PlantedBackboneConfig(outliers=1.5)
