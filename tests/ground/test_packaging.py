"""What a repository shows besides code: a citation, forms and workflows that can be read, and torch.hub's entry."""

from pathlib import Path

import pytest
import torch

import dvt
from dvt.denoiser import Denoiser
from dvt.denoiser.config import DenoiserConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.cff"), *ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"]
)
def test_yaml_can_be_read(path):
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(path.read_text())


def test_the_citation_has_the_version():
    assert f"version: {dvt.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_torch_hub_loads_a_denoised_backbone(tmp_path):
    plain = dvt.load_backbone("test_vit", pretrained=False, size=96)
    torch.save(plain.model.state_dict(), tmp_path / "weights.pth")
    loaded = dvt.load_backbone("test_vit", weights=tmp_path / "weights.pth", size=96)
    denoiser = Denoiser(DenoiserConfig("conv3x3", loaded.feature_dim, grid=(6, 6)), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1)  # a new one may do nothing
    denoiser.save_pretrained(tmp_path / "denoiser.safetensors")
    found = torch.hub.load(
        str(ROOT),
        "denoised",
        "test_vit",
        str(tmp_path / "denoiser.safetensors"),
        str(tmp_path / "weights.pth"),
        source="local",
        size=96,
    )
    images = torch.rand(1, 3, 96, 96)
    assert not torch.equal(found(images).patches, loaded(images).patches)
    torch.testing.assert_close(found(images).patches, denoiser(loaded(images).patches, loaded(images).prefix))
