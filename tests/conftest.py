"""What the tests share: a photograph, a tiny backbone with fixed weights, and one thread for every test."""

import hashlib
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photo():
    """(3, 512, 512) a photograph in [0, 1], from scikit-image."""
    data = pytest.importorskip("skimage.data")
    return torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="session")
def digests():
    """A function that digests the files of a folder, by name: a failure names those that differ, in a line each."""

    def digest(folder, *patterns):
        found = (path for pattern in patterns or ("*",) for path in Path(folder).rglob(pattern))
        files = sorted(path for path in found if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return digest


@pytest.fixture(scope="session")
def make_tiny_backbone():
    """A function that makes timm's test_vit (patch 16, 64 channels), its weights drawn from a fixed generator."""
    from dvt.backbones import load_backbone

    def make(size=96):
        backbone = load_backbone("test_vit", pretrained=False, size=size)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in sorted(backbone.model.named_parameters()):
            if parameter.ndim > 1:
                spread = 0.5 if name == "pos_embed" else parameter[0].numel() ** -0.5
                parameter.data = spread * torch.randn(parameter.shape, generator=generator)
        return backbone

    return make


@pytest.fixture(scope="session")
def tiny_backbone(make_tiny_backbone):
    """The tiny backbone, shared: a test that changes it makes its own."""
    return make_tiny_backbone()
