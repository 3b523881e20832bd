"""Backbones: any single-scale timm model, or any other model through :func:`wrap`, as images -> Tokens.

What differs between timm's families is in :mod:`dvt.backbones.families`; ``docs/backbones.md`` lists what each of
them can do.
"""

from dvt.backbones.backbone import Backbone, BackboneSpec, TokensOf, weights_sha256
from dvt.backbones.load import load_backbone, single_scale_models
from dvt.backbones.precision import choose_precision, in_precision
from dvt.backbones.wrapped import IMAGENET_MEAN, IMAGENET_STD, wrap

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Backbone",
    "BackboneSpec",
    "TokensOf",
    "choose_precision",
    "in_precision",
    "load_backbone",
    "single_scale_models",
    "weights_sha256",
    "wrap",
]
