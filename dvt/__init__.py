"""dvt: clean dense features from Vision Transformers.

>>> import dvt
>>> backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
>>> backbone.feature_dim
192
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dvt.backbones import Backbone as Backbone
    from dvt.backbones import load_backbone as load_backbone
    from dvt.backbones import wrap as wrap
    from dvt.denoiser.config import DenoiserConfig as DenoiserConfig
    from dvt.denoiser.model import Denoiser as Denoiser
    from dvt.errors import DvtError as DvtError
    from dvt.fields.config import DenoiseConfig as DenoiseConfig
    from dvt.fields.decomposition import Decomposition as Decomposition
    from dvt.fields.image import denoise as denoise
    from dvt.fields.images import denoise_images as denoise_images
    from dvt.store import FeatureStore as FeatureStore
    from dvt.tokens import Tokens as Tokens

# Loaded when first asked for, so that `import dvt` takes no time and `dvt --help` little.
_HOME = {
    "Backbone": "dvt.backbones",
    "Decomposition": "dvt.fields.decomposition",
    "DenoiseConfig": "dvt.fields.image",
    "Denoiser": "dvt.denoiser.model",
    "DenoiserConfig": "dvt.denoiser.config",
    "DvtError": "dvt.errors",
    "FeatureStore": "dvt.store",
    "Tokens": "dvt.tokens",
    "denoise": "dvt.fields.image",
    "denoise_images": "dvt.fields.images",
    "load_backbone": "dvt.backbones",
    "wrap": "dvt.backbones",
}

__all__ = ["__version__", "demo_weights", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dvt' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def demo_weights() -> Path:
    """The weights of the small ViT that comes with dvt, for timm's vit_tiny_patch16_224 (see dvt/data/README.md)."""
    return Path(__file__).parent / "data" / "vit_tiny_patch16_224.mae_photos.safetensors"
