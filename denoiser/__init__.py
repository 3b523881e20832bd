"""Train the online denoiser (stage two), fit its alternatives, and put them inside models."""

import lazy_loader

# The names are in __init__.pyi. They are loaded when first used, because the denoiser needs timm.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
