"""Position embeddings whose number of positions fits several grids, and timm models without their final norm."""

import logging

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

import dvt
from dvt.backbones.positions import _roughness
from dvt.denoiser import Denoiser, DenoiserConfig
from dvt.errors import BackboneError, WeightsError


def trained_table(grid, channels, prefix=1):
    """A table as training gives it: that of the bundled weights, resampled, with channels left out or repeated."""
    table = load_file(dvt.demo_weights())["pos_embed"].float()
    table = resample_abs_pos_embed(table, list(grid), [14, 14], num_prefix_tokens=1)
    return table[:, 1 - prefix :, torch.arange(channels) % table.shape[-1]]


def model_of(grid, table):
    """timm's test_vit, whose own grid is 10 x 10, built for another one, with a given table."""
    size = (16 * grid[0], 16 * grid[1])
    model = timm.create_model("test_vit", num_classes=0, img_size=size, dynamic_img_size=True).eval()
    model.pos_embed.data.copy_(table)
    return model, size


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("grid", [(5, 20), (20, 5)])
def test_an_oblong_table_of_a_square_number_is_taken_at_its_size(grid, trained, tmp_path):
    noise = torch.randn(1, 101, 64, generator=torch.Generator().manual_seed(0))
    model, size = model_of(grid, trained_table(grid, 64) if trained else noise)
    save_file(model.state_dict(), tmp_path / "oblong.safetensors")
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    backbone = dvt.load_backbone("test_vit", tmp_path / "oblong.safetensors", size=size)
    expected = model.forward_features(backbone.normalise(images))
    found = backbone(images).patches
    assert found.shape[1:3] == grid
    torch.testing.assert_close(found.flatten(1, 2), expected[:, 1:], rtol=0, atol=1e-5)


def test_an_oblong_table_is_not_taken_for_a_square_one_in_silence(tmp_path, caplog):
    model, size = model_of((5, 20), trained_table((5, 20), 64))
    save_file(model.state_dict(), tmp_path / "oblong.safetensors")
    for given in (None, 160, 224):
        with pytest.raises(WeightsError, match=r"look like a grid of 5 x 20, not of 10 x 10.*size=\(80, 320\)"):
            dvt.load_backbone("test_vit", tmp_path / "oblong.safetensors", size=given)
    # The reverse: a square table of as many positions as the size asked for has.
    square, _ = model_of((10, 10), trained_table((10, 10), 64))
    with caplog.at_level(logging.WARNING):
        backbone = dvt.load_backbone("test_vit", square.state_dict(), size=size)
    assert "100 positions fit a grid of 5 x 20 and one of 10 x 10; taken as 10 x 10" in caplog.text
    images = backbone.normalise(torch.rand(1, 3, *size))
    torch.testing.assert_close(
        backbone.model.forward_features(images), square.forward_features(images), rtol=0, atol=1e-5
    )


def test_the_right_grid_of_a_trained_table_has_rows_that_are_alike():
    for grid in ((14, 14), (7, 28), (28, 7), (6, 24)):
        table = trained_table(grid, 192, prefix=0)[0]
        count = len(table)
        rough = {h: _roughness(table, (h, count // h)) for h in range(2, count // 2 + 1) if count % h == 0}
        assert min(rough, key=rough.get) == grid[0]
        assert sorted(rough.values())[1] > 2 * rough[grid[0]]
    noise = torch.randn(196, 192, generator=torch.Generator().manual_seed(0))
    assert all(0.6 < _roughness(noise, (h, 196 // h)) < 1.7 for h in (2, 4, 7, 14, 28, 49, 98))


def pruned():
    model = timm.create_model("test_vit", dynamic_img_size=True)
    model.prune_intermediate_layers([2], prune_norm=True)
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: timm.create_model("test_vit", features_only=True), "made with features_only=True.*FeatureMaps"),
        (lambda: timm.create_model("test_vit", features_only=True).model, "test_vit has lost its final norm"),
        (pruned, "test_vit has lost its final norm.*put the norm back"),
    ],
)
def test_a_model_without_its_final_norm_is_refused(make, said):
    denoiser = Denoiser(DenoiserConfig("block", 64, grid=(10, 10)))
    with pytest.raises(BackboneError, match=said):
        dvt.wrap(make())
    with pytest.raises(BackboneError, match=said):
        denoiser.attach(make())


def test_a_model_that_has_no_final_norm_of_its_own_is_taken():
    """BEiT norms after pooling: that is how it is built, and not a loss."""
    model = timm.create_model("beit_base_patch16_224", num_classes=0, depth=1, embed_dim=64, num_heads=2)
    assert isinstance(model.norm, torch.nn.Identity)
    assert dvt.wrap(model).feature_dim == 64
