"""Probe features with labels behind one interface: fit, predict, score; :func:`run_probe` makes a whole table."""

import lazy_loader

# The names are in __init__.pyi. They are loaded when first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
