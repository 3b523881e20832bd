"""Several layers from one forward pass: choosing, naming, joining them; stored as terms of one store."""

import pytest
import torch

import dvt
from dvt.backbones.layers import choose_layers, joined_tokens, layer_term
from dvt.errors import BackboneError
from dvt.jobs.extract import ExtractConfig, extract_images
from dvt.store import FeatureStore


def test_layers_side_by_side_are_those_of_one_backbone_each(tiny_backbone):
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    joined = joined_tokens(tiny_backbone, images, choose_layers(tiny_backbone, (1, -3, 5)))
    for k, layer in enumerate((1, 3, -1)):
        alone = dvt.load_backbone("test_vit", tiny_backbone.model.state_dict(), layer=layer)(images)
        part = slice(k * 64, (k + 1) * 64)
        torch.testing.assert_close(joined.patches[..., part], alone.patches)
        torch.testing.assert_close(joined.prefix[..., part], alone.prefix)


def test_layers_that_cannot_be_read(tiny_backbone):
    with pytest.raises(BackboneError, match=r"-6 \.\.\. 5, got 6"):
        choose_layers(tiny_backbone, (6, -1))
    with pytest.raises(BackboneError, match="must be -1"):
        choose_layers(tiny_backbone, (-1, 2))
    assert choose_layers(tiny_backbone, (2, 2, -4, 5)) == (2, -1)
    assert [layer_term(tiny_backbone, layer) for layer in (2, -1)] == ["layer2", "layer5"]


@pytest.fixture
def photos(tmp_path, photo):
    from PIL import Image

    for name, part in (("a", photo[:, :96, :128]), ("b", photo[:, 100:196, 60:156])):
        Image.fromarray(part.mul(255).byte().movedim(0, -1).numpy()).save(tmp_path / f"{name}.png")
    return [tmp_path / "a.png", tmp_path / "b.png"]


def test_layers_are_terms_of_one_store(tiny_backbone, photos, tmp_path):
    config = ExtractConfig(batch=2, layers=(1, 3))
    extract_images(tiny_backbone, photos, tmp_path / "several", config)
    extract_images(tiny_backbone, photos, tmp_path / "one", ExtractConfig(batch=2))
    several, one = FeatureStore(tmp_path / "several"), FeatureStore(tmp_path / "one")
    assert several.terms == ("raw", "layer1", "layer3") and one.terms == ("raw",)
    assert several.job.config["layers"] == [1, 3, -1] and "layers" not in one.job.config
    early = dvt.load_backbone("test_vit", tiny_backbone.model.state_dict(), layer=1, size=96)
    extract_images(early, photos, tmp_path / "early", ExtractConfig(batch=2))
    for i, path in enumerate(several.images):
        assert path == one.images[i]
        torch.testing.assert_close(several[i].patches, one[i].patches, atol=2e-3, rtol=2e-3)
        own = FeatureStore(tmp_path / "early")[i].patches
        torch.testing.assert_close(FeatureStore(tmp_path / "several", "layer1")[i].patches, own, atol=2e-3, rtol=2e-3)
