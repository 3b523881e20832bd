"""dvt: clean dense features from Vision Transformers.

>>> import dvt
>>> backbone = dvt.load_backbone("vit_tiny_patch16_224", weights=dvt.demo_weights())
>>> backbone.feature_dim
192
"""

from pathlib import Path

import lazy_loader

__version__ = "0.1.0"

# The names are in __init__.pyi. They are loaded when first used, so that `import dvt` is fast.
__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", "demo_weights", *_names]


def demo_weights() -> Path:
    """Find the weights of the bundled small ViT, for timm's vit_tiny_patch16_224 (see dvt/data/README.md)."""
    return Path(__file__).parent / "data" / "vit_tiny_patch16_224.mae_photos.safetensors"
