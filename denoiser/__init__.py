"""The online denoiser for all images: its kinds, its training, and its place inside timm models."""

import lazy_loader

# The names stand in __init__.pyi. They are loaded when first used: the denoiser needs timm.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
