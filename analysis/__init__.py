"""Measure what features hold: artifact metrics, the pictures that show them, probes with labels."""

import lazy_loader

# The names are in __init__.pyi. They are loaded when first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
