"""Decompose the features of images into a semantic field, an artifact and a residual (stage one)."""

import lazy_loader

# The names are in __init__.pyi. They are loaded when first used, because settings need no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
