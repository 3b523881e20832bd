"""dvt: clean dense features from Vision Transformers."""

__version__ = "0.1.0"
