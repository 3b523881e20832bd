"""Any model that is not timm's as a backbone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dvt.backbones.backbone import Backbone, BackboneSpec, TokensOf, checked_stride, rounded_size
from dvt.backbones.families import pair
from dvt.grids import Size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def wrap(
    module: nn.Module,
    tokens: TokensOf,
    patch_size: int | Size,
    *,
    name: str,
    image_size: int | Size = (224, 224),
    feature_dim: int | None = None,
    num_prefix_tokens: int = 0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    stride: int | Size | None = None,
) -> Backbone:
    """Make a backbone of any other model (transformers, torch.hub, your own).

    Args:
        module: the model; it is put into evaluation mode and its parameters are frozen.
        tokens: function of (module, images (B, 3, H, W), already normalised) that returns :class:`Tokens`.
        patch_size: pixels of a patch.
        name: what to call it in stores and reports.
        image_size: the input size that the model is meant for.
        feature_dim: channels of a token; found by running one black image when None.
        num_prefix_tokens: class and register tokens that `tokens` returns.
        mean, std: the model's normalisation of RGB in [0, 1]; ImageNet's by default.
        stride: pixels between patches where they overlap.

    Raises:
        BackboneError: patch, stride and size do not fit each other.

    >>> from dvt.tokens import Tokens
    >>> net = torch.nn.Conv2d(3, 8, 16, 16)
    >>> backbone = wrap(net, lambda m, x: Tokens.of(m(x).permute(0, 2, 3, 1)), 16, name="one convolution")
    >>> backbone(torch.rand(2, 3, 32, 48)).grid, backbone.feature_dim
    ((2, 3), 8)
    """
    patch = pair(patch_size)
    spec = BackboneSpec(
        name,
        patch_size=patch,
        stride=checked_stride(stride, patch, name),
        image_size=rounded_size(image_size, patch),
        feature_dim=feature_dim or 0,
        num_prefix_tokens=num_prefix_tokens,
    )
    backbone = Backbone(module, tokens, spec, mean, std)
    if feature_dim is None:
        parameter = next(module.parameters(), torch.zeros(()))
        backbone.to(parameter.device)
        with torch.no_grad():
            black = torch.zeros(1, 3, *backbone.image_size, device=parameter.device)
            found = tokens(module, backbone.normalise(black)).feature_dim
        backbone.spec = replace(spec, feature_dim=found)
    return backbone
