"""Make a backbone of an existing model: one of timm, of another known library, or any other with a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvt import grids
from dvt.backbones import families, outside
from dvt.backbones.backbone import Backbone, BackboneSpec, checked_stride, rounded_size
from dvt.backbones.families import pair
from dvt.backbones.hub import hub_or_cache, without_hub
from dvt.backbones.names import TRANSFORMERS
from dvt.backbones.outside import IMAGENET_MEAN, IMAGENET_STD
from dvt.errors import BackboneError, DvtError, ShapeError
from dvt.grids import Size
from dvt.tokens import Tokens

RETURN = "return dvt.Tokens, or one tensor (B, N, C) with the prefix tokens first"


def wrap(
    module: nn.Module,
    tokens: Callable[[nn.Module, Tensor], Tokens | Tensor] | None = None,
    patch_size: int | Size | None = None,
    *,
    name: str | None = None,
    image_size: int | Size | None = None,
    feature_dim: int | None = None,
    num_prefix_tokens: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    stride: int | Size | None = None,
    processor: Any = None,
) -> Backbone:
    """Make a backbone of an existing model.

    A model of transformers, open_clip, torchvision, the DINOv2 and DINOv3 repositories or timm needs no other argument;
    any other model needs `tokens` and `patch_size`. The backbone is tried before it is returned: its tokens must have
    the stated shapes and two calls must agree; if it fails on an oblong image, it takes only images of its own size
    (:attr:`Backbone.fixed_size`). A masked autoencoder of transformers is read without masks.

    Args:
        module: the model; it is put into evaluation mode and its parameters are frozen.
        tokens: function of (module, normalised images (B, 3, H, W)) that returns :class:`Tokens` or one tensor
            (B, P + h w, C), prefix tokens first; None for the libraries above.
        patch_size: pixels of a patch; not needed for the libraries above.
        name: name in stores and reports; None takes the model's repository or class.
        image_size: the input size that the model is meant for; None takes the model's own, or 224.
        feature_dim: channels of a token; None reads it from the model's output.
        num_prefix_tokens: class and register tokens that `tokens` returns; None reads it from the output.
        mean, std: the model's normalisation of RGB in [0, 1]; None takes those of `processor`, else of the processor
            saved with a transformers model, else of the model's family, else ImageNet's.
        stride: pixels between patches, if they overlap.
        processor: an image processor of transformers, which gives mean and deviation.

    Raises:
        BackboneError: the model is not known and `tokens` is None, two calls disagree, or the model cannot be run.
        ShapeError: the model gives tokens of another shape or type.

    >>> net = torch.nn.Conv2d(3, 8, 16, 16)
    >>> backbone = wrap(net, lambda m, x: m(x).flatten(2).mT, 16, name="one convolution")
    >>> backbone(torch.rand(2, 3, 32, 48)).grid, backbone.feature_dim, backbone.fixed_size
    ((2, 3), 8, False)
    """
    if processor is not None and mean is None and std is None:
        mean, std = outside.processor_normalisation(processor)
    if tokens is None:
        given = {"patch_size": patch_size, "num_prefix_tokens": num_prefix_tokens, "stride": stride}
        normal = None if mean is None or std is None else (mean, std)
        backbone = _known(module, image_size, normal, {what: v for what, v in given.items() if v is not None})
    else:
        if patch_size is None:
            raise BackboneError("wrap(..., tokens=) needs patch_size=, the side of a patch in pixels")
        patch = pair(patch_size)
        steps = checked_stride(stride, patch, name or type(module).__name__)
        spec = BackboneSpec(
            name or type(module).__name__,
            patch_size=patch,
            stride=steps,
            image_size=rounded_size(224 if image_size is None else image_size, patch),
            feature_dim=feature_dim or 0,
            num_prefix_tokens=-1 if num_prefix_tokens is None else num_prefix_tokens,
        )
        backbone = Backbone(module, _Read(tokens, patch, steps, num_prefix_tokens), spec, IMAGENET_MEAN, IMAGENET_STD)
    backbone.spec = replace(backbone.spec, name=name or backbone.name)
    for which, values in (("mean", mean), ("std", std)):
        if values is not None:
            setattr(backbone, which, torch.tensor(tuple(values)).view(1, 3, 1, 1))
    parameter = next(backbone.model.parameters(), torch.zeros(()))
    return _tried(backbone.to(parameter.device))


@dataclass(frozen=True)
class _Read:
    """Convert the result of a user's function to Tokens; a class, because a closure cannot be pickled."""

    function: Callable[[Any, Tensor], Any]
    patch: Size
    stride: Size
    prefix: int | None

    def __call__(self, model: nn.Module, images: Tensor) -> Tokens:
        found = self.function(model, images)
        if isinstance(found, Tokens):
            return found
        grid = grids.grid_shape((images.shape[2], images.shape[3]), self.patch, self.stride)
        if not isinstance(found, Tensor) or found.ndim != 3:
            raise ShapeError(f"the function of wrap gave {_described(found)}; {RETURN}")
        count = found.shape[1] - math.prod(grid)
        if count < 0 or self.prefix not in (None, count):
            raise ShapeError(
                f"the function of wrap gave {found.shape[1]} tokens for images {tuple(images.shape)}; that is a grid "
                f"of {grid} and {count} prefix tokens, not {self.prefix or 0}: check patch_size, stride and "
                "num_prefix_tokens"
            )
        return Tokens(found[:, count:].unflatten(1, grid), found[:, :count])


def _described(found: Any) -> str:
    if isinstance(found, Tensor):
        hint = ", perhaps .flatten(2).mT of it" if found.ndim == 4 else ""
        return f"a tensor of shape {tuple(found.shape)}{hint}"
    if hasattr(found, "last_hidden_state"):
        return f"{type(found).__name__}: return its .last_hidden_state"
    if isinstance(found, dict):
        hint = ": return its ['x_norm_patchtokens']" if "x_norm_patchtokens" in found else ""
        return f"a dict of {', '.join(map(str, list(found)[:6]))}{hint}"
    return f"a {type(found).__name__}"


def _known(
    module: nn.Module, image_size: int | Size | None, normal: tuple[Any, Any] | None, given: dict[str, Any]
) -> Backbone:
    """Make the backbone of a model of a known library."""
    if (inside := outside.inner_timm(module)) is not None:
        module = module.get_submodule(inside)
    families.check_whole(module)
    if families.scales(module) == 1:
        size = families.own_size(module) if image_size is None else image_size
        patch = families.patch_size(module)
        backbone = timm_backbone(
            module, timm_name(module), -1, patch, families.stride_of(module), rounded_size(size, patch)
        )
    elif (found := outside.recognise(module)) is not None:
        if hasattr(found.encoder, "out_features"):
            raise BackboneError(
                f"{type(found.encoder).__name__} gives feature maps: wrap the model of transformers that gives "
                "last_hidden_state (AutoModel instead of AutoBackbone); a denoiser can be attached to either"
            )
        size = found.image_size if image_size is None else image_size
        spec = BackboneSpec(
            found.name,
            patch_size=found.patch_size,
            stride=found.patch_size,
            image_size=rounded_size(size, found.patch_size),
            feature_dim=found.feature_dim,
            num_prefix_tokens=found.num_prefix_tokens,
        )
        mean, std = normal or outside.normalisation(module, found)
        read = _Read(found.read, found.patch_size, found.patch_size, found.num_prefix_tokens)
        backbone = Backbone(found.encoder, read, spec, mean, std)
    else:
        raise BackboneError(
            f"{type(module).__name__} is none of the models that dvt knows: {outside.KNOWN}. Give tokens=, a "
            "function of (module, normalised images) that returns (B, N, C) tokens, and patch_size="
        )
    for what, value in given.items():
        own = getattr(backbone, what)
        if own != (pair(value) if isinstance(own, tuple) else value):
            raise BackboneError(f"{backbone.name} has {what} {own}, got {value}: leave it out, or give tokens= as well")
    return backbone


def load_transformers(
    name: str, weights: Any, pretrained: bool, layer: int, stride: int | Size | None, size: int | Size | None
) -> Backbone:
    """Load a model of transformers by ``hf:NAME_OR_FOLDER``; :func:`load_backbone` explains the arguments.

    Raises:
        BackboneError: transformers is missing or cannot load it, or weights, a layer or a stride are given.
    """
    if weights is not None or layer != -1 or stride is not None:
        raise BackboneError(
            f"models of transformers such as {name} are read with their own weights, last layer and stride; for other "
            "weights, layers and strides use timm's model of the same weights (for example dinov2_vits14)"
        )
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise BackboneError(f"{name} needs transformers: pip install 'denoising-vit[hf]'") from error
    source = name.partition(":")[2]
    if source.startswith(("/", "./", "../", "~")) and not Path(source).expanduser().is_dir():
        raise BackboneError(f"transformers cannot load {source!r}: there is no such folder")
    why: str | None = None
    try:
        with nullcontext() if Path(source).expanduser().is_dir() else hub_or_cache() as why:
            options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": why is not None}
            if pretrained:
                model = AutoModel.from_pretrained(source, **options)
            else:
                model = AutoModel.from_config(AutoConfig.from_pretrained(source, **options))
    except Exception as error:  # the hub's client, files and configurations raise many kinds
        if why is not None:
            option = f"--backbone hf:FOLDER (in Python {TRANSFORMERS}FOLDER)"
            said = without_hub(f"the files of {name!r}", why, source, "the folder with all its files", option)
            raise BackboneError(said) from error
        raise BackboneError(
            f"transformers cannot load {source!r}: {type(error).__name__}: {error}\nGive a folder that save_pretrained "
            "wrote, or a name on the hub, which needs a network the first time"
        ) from error
    return wrap(model, image_size=size)


def timm_name(model: Any) -> str:
    """Name a timm model, with its tag if it has one."""
    known = getattr(model, "pretrained_cfg", None) or {}
    parts = [str(known.get(key)) for key in ("architecture", "tag") if known.get(key)]
    return ".".join(parts) or type(model).__name__


def timm_backbone(
    model: families.Model, name: str, layer: int, patch: Size, stride: Size, image_size: Size
) -> Backbone:
    """Make the backbone of a timm model; sizes and layer must have been checked."""
    core = families.core(model)
    if getattr(core, "global_pool", None) == "soft":
        core.global_pool = ""  # dvt does not use Gemma's pooling of patches, which would refuse most sizes
    last = layer == -1
    read = families.last_tokens if last else partial(families.block_tokens, layer=layer)
    spec = BackboneSpec(
        name,
        patch_size=patch,
        stride=stride,
        image_size=image_size,
        feature_dim=core.num_features if last else core.feature_info[layer]["num_chs"],
        num_prefix_tokens=families.prefix_tokens(model) if last else families.block_prefix_tokens(model),
        layer=layer,
        num_layers=len(core.blocks),
        fixed_size=families.sizing(model) != "any",
    )
    tokens = partial(read, patch=patch, stride=stride)
    known = getattr(model, "pretrained_cfg", None) or {}
    return Backbone(model, tokens, spec, known.get("mean", IMAGENET_MEAN), known.get("std", IMAGENET_STD))


@torch.no_grad()
def _tried(backbone: Backbone) -> Backbone:
    """Run a backbone to check its spec and that two calls agree, and to find out if it takes other sizes.

    Raises:
        BackboneError: it cannot be run at its own size, or two calls differ.
        ShapeError: its tokens do not have the stated shapes.
    """
    noise = torch.rand(1, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0)).to(backbone.device)
    try:
        first = backbone._tokens(backbone.model, backbone.normalise(noise))
    except DvtError:
        raise
    except Exception as error:  # of any model
        raise BackboneError(
            f"{backbone.name} fails on images of {backbone.image_size}: {type(error).__name__}: {error}. "
            "Give the size that it takes (image_size=)"
        ) from error
    if not isinstance(first, Tokens):
        raise ShapeError(f"the function of wrap gave {_described(first)}; {RETURN}")
    spec = backbone.spec
    backbone.spec = replace(
        spec,
        feature_dim=spec.feature_dim or first.feature_dim,
        num_prefix_tokens=first.prefix.shape[1] if spec.num_prefix_tokens < 0 else spec.num_prefix_tokens,
    )
    second = backbone(noise)
    for one, two in ((first.patches, second.patches), (first.prefix, second.prefix)):
        if one.numel() and not (one - two).norm() <= 1e-2 * two.norm():
            raise BackboneError(
                f"two calls of {backbone.name} on one image give other tokens: it draws at random (masked patches, "
                "dropout), or its values are not finite. Give a model, or tokens=, without randomness"
            )
    if not backbone.fixed_size:
        backbone.spec = replace(backbone.spec, fixed_size=not _takes_oblong(backbone))
    return backbone


def _takes_oblong(backbone: Backbone) -> bool:
    rows, columns = backbone.grid(backbone.image_size)
    patch, stride = backbone.patch_size, backbone.stride
    # A smaller grid than the model's own, so that no index into its table of positions is out of range.
    grid = (max(1, rows // 2), max(1, columns // 2 - 1)) if rows <= columns else (max(1, rows // 2 - 1), columns)
    needed = [p * -(-(p + (n - 1) * d) // p) for n, p, d in zip(grid, patch, stride, strict=True)]
    try:
        backbone(torch.zeros(1, 3, *needed, device=backbone.device))
    except Exception as error:  # a model may raise anything, and Backbone raises errors of wrong shapes
        outside.logger.info("%s takes no images of %s: %s", backbone.name, needed, error)
        return False
    return True
