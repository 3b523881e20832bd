"""Differences between timm's families of single-scale models, found out from the models themselves.

Which module cuts the patches, which sizes and strides a model takes, where its prefix tokens are and in which layout
its features come out. Families go by timm's class names, so that a timm without one of them works too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dvt import grids
from dvt.errors import BackboneError, ShapeError
from dvt.grids import Size
from dvt.tokens import Tokens

Model = Any  # a timm module: its attributes differ by family, and that is what this file is about

#: Families whose position embeddings timm resamples in each forward pass when told so at construction.
DYNAMIC = ("VisionTransformer", "VisionTransformerDistilled", "Eva")
#: Families whose input size is chosen when the model is loaded. All others take any size at any time.
SIZED = {
    "Beit": "loaded",
    "Cait": "loaded",
    "TNT": "loaded",
    "VisionTransformerRelPos": "loaded",
    "ConVit": "square",
    "MlpMixer": "own",
}
#: Families that take register tokens, and what the option of ``timm.create_model`` for their number is called.
REGISTERS = {"VisionTransformer": "reg_tokens", "Eva": "num_reg_tokens"}
#: Families that give intermediate features as NCHW only.
CHANNELS_FIRST = ("VisionTransformerSAM", "ConvMixer")


def pair(value: int | Size) -> Size:
    """Turn one number or two into (height, width)."""
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


def scales(model: Model) -> int:
    """Count the resolutions among a model's blocks; 0 when it gives no intermediate features."""
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        return 0
    return len({str(info["reduction"]) for info in model.feature_info})


def core(model: Model) -> Model:
    """Find the encoder inside timm's classifier wrappers (DeepSeek, Gemma, Qwen); return other models as they are."""
    return getattr(model, "encoder", model)


def embedding(model: Model) -> Model:
    """Find the module that cuts the image into patches, under whatever name the family gives it."""
    inner = core(model)
    return next(getattr(inner, n) for n in ("patch_embed", "pixel_embed", "embeds", "stem") if hasattr(inner, n))


def patch_size(model: Model) -> Size:
    """Read the size (height, width) of a patch in pixels."""
    embed = embedding(model)
    if hasattr(embed, "feat_ratio"):
        return pair(tuple(embed.feat_ratio(as_scalar=False)))
    return pair(core(model).feature_info[0]["reduction"])


def own_size(model: Model) -> Size:
    """Read the input size (H, W) that the model is built for; where it takes any, the one of its training."""
    height, width = getattr(embedding(model), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    return int(height), int(width)


def sizing(model: Model) -> str:
    """Tell when the input size is chosen: "any" time, when "loaded", the same but "square", or "own" (no choice)."""
    return SIZED.get(type(model).__name__, "any")


def prefix_tokens(model: Model) -> int:
    """Count the class, distillation and register tokens of the final features."""
    return getattr(core(model), "num_prefix_tokens", 0) or 0


def block_prefix_tokens(model: Model) -> int:
    """Count them in intermediate features; 0 where the class token joins only after the blocks (CaiT, XCiT)."""
    parameters = inspect.signature(core(model).forward_intermediates).parameters
    return prefix_tokens(model) if "return_prefix_tokens" in parameters else 0


def check_whole(model: Model) -> None:
    """Refuse timm models without their final norm, whose tokens would pass for final ones in silence.

    Raises:
        BackboneError: the model was made with ``features_only=True``, or its final norm was pruned.
    """
    if type(model).__module__ == "timm.models._features":
        raise BackboneError(
            f"{type(model).__name__} was made with features_only=True, which drops timm's final norm: give "
            "timm.create_model(name) itself; dvt.denoiser.FeatureMaps(model) makes the same list of maps of it"
        )
    inner = core(model)
    name = (getattr(inner, "pretrained_cfg", None) or {}).get("architecture") or ""
    norms = [getattr(inner, each, None) for each in ("norm", "fc_norm")]
    if "norm" not in inner._modules or not all(isinstance(each, (nn.Identity, type(None))) for each in norms):
        return
    if not timm.is_model(name):
        return
    with torch.device("meta"):
        fresh = core(timm.create_model(name, num_classes=0))
    if not isinstance(getattr(fresh, "norm", None), (nn.Identity, type(None))):
        raise BackboneError(
            f"this {name} has lost its final norm (features_only=True or prune_norm=True): give the whole model of "
            "timm.create_model(name), or put the norm back"
        )


def patch_convolution(model: Model) -> nn.Conv2d | None:
    """Find the convolution that cuts the patches; None where a smaller stride does more than make them overlap."""
    if sizing(model) == "own":
        return None  # the number of tokens is part of a mixer's weights
    embed = embedding(model)
    layer = embed[0] if isinstance(embed, nn.Sequential) else getattr(embed, "proj", None)
    patch = patch_size(model)
    if not isinstance(layer, nn.Conv2d) or layer.padding != (0, 0):
        return None
    return layer if layer.kernel_size == layer.stride == patch else None


def stride_of(model: Model) -> Size:
    """Find the pixels between patches: fewer than the patch where a backbone was loaded with a stride."""
    patch, embed = patch_size(model), embedding(model)
    layer = embed[0] if isinstance(embed, nn.Sequential) else getattr(embed, "proj", None)
    if isinstance(layer, nn.Conv2d) and layer.padding == (0, 0) and layer.kernel_size == patch:
        return layer.stride[0], layer.stride[1]
    return patch


def last_tokens(model: Model, images: Tensor, patch: Size, stride: Size) -> Tokens:
    """Compute the tokens that timm calls the final features, before any pooling."""
    inner = core(model)
    features = inner.forward_features(images)
    if features.ndim == 4:
        return _from_map(inner, features)
    count = prefix_tokens(model)
    return _from_sequence(features[:, count:], features[:, :count], images, patch, stride)


def block_tokens(model: Model, images: Tensor, layer: int, patch: Size, stride: Size) -> Tokens:
    """Compute the output of one block, without the final norm."""
    return layer_tokens(model, images, [layer], patch, stride)[layer]


def layer_tokens(model: Model, images: Tensor, layers: Sequence[int], patch: Size, stride: Size) -> dict[int, Tokens]:
    """Compute the outputs of several blocks in one pass, without the final norm; -1 is :func:`last_tokens`."""
    inner = core(model)
    options: dict[str, Any] = {}
    if type(inner).__name__ not in CHANNELS_FIRST:
        options["output_fmt"] = "NLC"  # timm's reshape to NCHW ignores a changed stride
    if block_prefix_tokens(model):
        options["return_prefix_tokens"] = True
    blocks, last = sorted({layer for layer in layers if layer != -1}), -1 in layers
    given = inner.forward_intermediates(
        images, indices=blocks or [len(inner.blocks) - 1], stop_early=not last, intermediates_only=not last, **options
    )
    final, outputs = given if last else (None, given)
    found = {}
    for layer, out in zip(blocks, outputs, strict=False):
        features, prefix = out if isinstance(out, tuple) else (out, out[:, :0])
        found[layer] = _from_features(inner, features, prefix, images, patch, stride)
    if final is not None:
        count = prefix_tokens(model) if final.ndim == 3 else 0
        found[-1] = _from_features(inner, final[:, count:], final[:, :count], images, patch, stride)
    return found


def _from_features(inner: Model, features: Tensor, prefix: Tensor, images: Tensor, patch: Size, stride: Size) -> Tokens:
    return _from_map(inner, features) if features.ndim == 4 else _from_sequence(features, prefix, images, patch, stride)


def _from_map(inner: Model, features: Tensor) -> Tokens:
    last = getattr(inner, "output_fmt", "NCHW") == "NHWC"
    return Tokens.of(features if last else features.permute(0, 2, 3, 1))


def _from_sequence(patches: Tensor, prefix: Tensor, images: Tensor, patch: Size, stride: Size) -> Tokens:
    grid = grids.grid_shape((images.shape[2], images.shape[3]), patch, stride)
    if patches.shape[1] != math.prod(grid):
        raise ShapeError(f"the model gave {patches.shape[1]} patch tokens where a grid of {grid} was expected")
    return Tokens(patches.unflatten(1, grid), prefix)
