"""Make backbones (images -> Tokens) of any single-scale timm model, or of any other model by :func:`wrap`.

The differences between timm's families are in :mod:`dvt.backbones.families`; ``docs/backbones.md`` lists what each
family supports.
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
