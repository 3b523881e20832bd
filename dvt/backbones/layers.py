"""Read the tokens of several layers in one forward pass: choose the layers, name them, put them side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dvt.backbones.backbone import Backbone
from dvt.errors import BackboneError
from dvt.tokens import Tokens


def choose_layers(backbone: Backbone, layers: Sequence[int]) -> tuple[int, ...]:
    """Check block indices and return them as a backbone counts them: from 0, and -1 for the last block.

    Args:
        backbone: the layer that it reads must be the last of the layers.
        layers: from -N to N - 1 of N blocks; repeated ones are left out.

    Raises:
        BackboneError: there is no such layer, or the last one is not the backbone's own.

    >>> import dvt
    >>> choose_layers(dvt.load_backbone("test_vit", pretrained=False), (2, -3, 5))
    (2, 3, -1)
    """
    count = backbone.num_layers
    if count is None:
        raise BackboneError(f"{backbone.name} is a wrapped model: only its own tokens are known, not other layers'")
    if wrong := [layer for layer in layers if not -count <= layer < count]:
        raise BackboneError(
            f"{backbone.name} has {count} blocks: layers must lie in {-count} ... {count - 1}, got {wrong[0]}"
        )
    found = tuple(dict.fromkeys(-1 if layer % count == count - 1 else layer % count for layer in layers))
    if not found or found[-1] != backbone.layer:
        raise BackboneError(f"the last of the layers {layers} must be {backbone.layer}, which the backbone reads")
    return found


def layer_term(backbone: Backbone, layer: int) -> str:
    """Name the tokens of a layer: "layer5" for block 5, counted from 0."""
    return f"layer{layer if layer >= 0 else (backbone.num_layers or 0) - 1}"


def joined_tokens(backbone: Backbone, images: Tensor, layers: Sequence[int]) -> Tokens:
    """Compute the tokens of several layers in one forward pass, side by side: (B, h, w, sum of C).

    Prefix tokens are joined too if all layers have the same number of them, and left out otherwise.
    """
    if list(layers) == [backbone.layer]:
        return backbone(images)
    found = backbone.at_layers(images, layers)
    parts = [found[layer] for layer in layers]
    patches = torch.cat([each.patches for each in parts], dim=-1)
    if len({each.prefix.shape[1] for each in parts}) > 1:
        return Tokens(patches, patches.new_zeros(len(patches), 0, patches.shape[-1]))
    return Tokens(patches, torch.cat([each.prefix for each in parts], dim=-1))
