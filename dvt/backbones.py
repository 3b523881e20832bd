"""Backbones: any single-scale timm model, or any other model through :func:`wrap`, as images -> Tokens.

What differs between timm's families is in :mod:`dvt.families`; ``docs/backbones.md`` lists what each of them can do.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from dvt import families, grids
from dvt.checkpoints import HEAD, State, load_state, read_state
from dvt.errors import BackboneError, ShapeError, WeightsError
from dvt.families import pair
from dvt.grids import Size
from dvt.tokens import Tokens

TokensOf = Callable[[nn.Module, Tensor], Tokens]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A frozen feature extractor; make one with :func:`load_backbone` or :func:`wrap`.

    Attributes:
        name: the model's name.
        model: the inner module; it takes normalised images.
        patch_size: (height, width) of a patch in pixels.
        stride: (vertical, horizontal) pixels between neighbouring patches; the patch size unless patches overlap.
        image_size: (H, W), the input size that the model is meant for.
        fixed_size: whether `image_size` is the only input size that it takes.
        feature_dim: C, channels of a token.
        num_prefix_tokens: P, class, distillation and register tokens at this layer.
        layer: -1 for the last block after the final norm, otherwise the block whose output is read.
        num_layers: number of blocks; None for a wrapped model.
        mean, std: (1, 3, 1, 1) normalisation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        tokens: TokensOf,
        *,
        name: str,
        patch_size: Size,
        stride: Size,
        image_size: Size,
        feature_dim: int,
        num_prefix_tokens: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        layer: int = -1,
        num_layers: int | None = None,
        fixed_size: bool = False,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self._tokens = tokens
        self.name, self.layer, self.num_layers = name, layer, num_layers
        self.patch_size, self.stride = patch_size, stride
        self.image_size, self.fixed_size = image_size, fixed_size
        self.feature_dim, self.num_prefix_tokens = feature_dim, num_prefix_tokens
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tokens:
        """Tokens of a batch of images, in the dtype of the model (or of autocast).

        Args:
            images: (B, 3, H, W) RGB in [0, 1]; H and W are multiples of the patch, see :meth:`input_size`.

        Returns:
            patches (B, h, w, C) with (h, w) = :meth:`grid` of the size, and prefix (B, P, C).

        Raises:
            ShapeError: the images have a shape that the model does not take.
        """
        self._check(images)
        tokens = self._tokens(self.model, self._normalise(images))
        expected = (*self.grid((images.shape[2], images.shape[3])), self.feature_dim)
        if tuple(tokens.patches.shape[1:]) != expected or tokens.prefix.shape[1] != self.num_prefix_tokens:
            raise ShapeError(
                f"{self.name} gave patches {tuple(tokens.patches.shape)} and {tokens.prefix.shape[1]} prefix tokens "
                f"for images {tuple(images.shape)}; (B, h, w, C) with {expected} and {self.num_prefix_tokens} were "
                "expected: check patch_size, stride, feature_dim and num_prefix_tokens"
            )
        return tokens

    def at_layers(self, images: Tensor, layers: Sequence[int]) -> dict[int, Tokens]:
        """Tokens after several layers, from one forward pass.

        Args:
            images: as :meth:`forward` takes them.
            layers: block indices, and -1 for the last block after the final norm, as :func:`load_backbone` has them.

        Returns:
            :class:`Tokens` by layer; a layer may have other channels than :attr:`feature_dim`.

        Raises:
            BackboneError: a layer that the model does not have; a wrapped model has only its own.
        """
        if self.num_layers is None:
            if any(layer != self.layer for layer in layers):
                raise BackboneError(
                    f"{self.name} is a wrapped model: only its own tokens, layer {self.layer}, are known"
                )
            return {self.layer: self(images)}
        if any(not -1 <= layer < self.num_layers for layer in layers):
            raise BackboneError(
                f"{self.name} has {self.num_layers} blocks: layers must lie in -1 ... {self.num_layers - 1}"
            )
        self._check(images)
        return families.layer_tokens(self.model, self._normalise(images), layers, self.patch_size, self.stride)

    def input_size(self, image_size: Size) -> Size:
        """(H, W) to resize an image of `image_size` to: its aspect ratio, the shorter side of :attr:`image_size`.

        A model of fixed size takes every image at its own size, whatever its aspect ratio.
        """
        return self.image_size if self.fixed_size else grids.fit_size(image_size, min(self.image_size), self.patch_size)

    def grid(self, size: Size) -> Size:
        """(h, w): patches of an input of (H, W) pixels."""
        return grids.grid_shape(size, self.patch_size, self.stride)

    def centres(self, size: Size) -> Tensor:
        """(h, w, 2) coordinates (x, y) in [0, 1] of the patch centres of an input of (H, W) pixels."""
        return grids.patch_centres(size, self.patch_size, self.stride, device=self.mean.device)

    @cached_property
    def weights_sha256(self) -> str:
        """:func:`weights_sha256` of the model as it is when first asked for."""
        return weights_sha256(self.model)

    def extra_repr(self) -> str:
        return f"{self.name}, layer={self.layer}, patch={self.patch_size}, stride={self.stride}, C={self.feature_dim}"

    def _normalise(self, images: Tensor) -> Tensor:
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        return ((images - self.mean.to(images.dtype)) / self.std.to(images.dtype)).to(dtype)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ShapeError(
                f"images have shape {tuple(images.shape)} and dtype {images.dtype}; "
                "they must be (B, 3, H, W), RGB, floating point in [0, 1]"
            )
        size = (images.shape[2], images.shape[3])
        if self.fixed_size and size != self.image_size:
            raise ShapeError(f"images are {size}; {self.name}, as loaded, takes only {self.image_size}")
        if any(s < p or s % p for s, p in zip(size, self.patch_size, strict=True)):
            raise ShapeError(
                f"images are {size}; {self.name} takes multiples of its patch {self.patch_size}: "
                f"resize to {grids.fit_size(size, min(size), self.patch_size)}"
            )


def weights_sha256(model: nn.Module) -> str:
    """Hash of a model's weights: name, dtype, shape and bytes, without a classifier."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not HEAD.match(name):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    """Any other model (transformers, torch.hub, your own) as a backbone.

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

    >>> net = torch.nn.Conv2d(3, 8, 16, 16)
    >>> backbone = wrap(net, lambda m, x: Tokens.of(m(x).permute(0, 2, 3, 1)), 16, name="one convolution")
    >>> backbone(torch.rand(2, 3, 32, 48)).grid, backbone.feature_dim
    ((2, 3), 8)
    """
    patch = pair(patch_size)
    backbone = Backbone(
        module,
        tokens,
        name=name,
        patch_size=patch,
        stride=_checked_stride(stride, patch, name),
        image_size=_rounded(image_size, patch),
        feature_dim=feature_dim or 0,
        num_prefix_tokens=num_prefix_tokens,
        mean=mean,
        std=std,
    )
    if feature_dim is None:
        parameter = next(module.parameters(), torch.zeros(()))
        backbone.to(parameter.device)
        with torch.no_grad():
            black = torch.zeros(1, 3, *backbone.image_size, device=parameter.device)
            backbone.feature_dim = tokens(module, backbone._normalise(black)).feature_dim
    return backbone


def load_backbone(
    name: str,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    pretrained: bool = True,
    layer: int = -1,
    stride: int | Size | None = None,
    size: int | Size | None = None,
) -> Backbone:
    """Any single-scale timm model as a backbone, frozen and in evaluation mode.

    Args:
        name: a timm name such as ``vit_small_patch14_dinov2.lvd142m``, or ``hf-hub:organisation/model``.
        weights: a .safetensors file, a .pth of tensors, or a state dict; None downloads timm's own from the Hugging
            Face hub. A classifier in it is left out, position embeddings of another grid are resampled, and where it
            has another number of register tokens than timm's model of this name, the model gets as many.
        pretrained: False gives random weights, for tests.
        layer: -1 is the last block as timm's ``forward_features`` returns it, after the final norm where the model
            has one (models that pool first and norm afterwards have none; SAM's neck and XCiT's class attention
            belong to it). Another index reads the tokens after that block; the last index means -1.
        stride: pixels between neighbouring patches, from 1 to the patch; smaller than the patch they overlap.
        size: input size in pixels, one number for a square or (height, width), rounded to the patch.

    Raises:
        BackboneError: unknown name, several scales, no network, or a layer, stride or size it cannot take.
        WeightsError: the file does not hold finite weights of this model.

    >>> backbone = load_backbone("test_vit", pretrained=False)
    >>> tokens = backbone(torch.rand(1, 3, 160, 240))
    >>> tokens.grid, tokens.feature_dim, backbone.num_prefix_tokens
    ((10, 15), 64, 1)
    """
    state = dict(weights) if isinstance(weights, Mapping) else None if weights is None else read_state(weights)
    with torch.device("meta"):  # everything that can be refused is refused before gigabytes are downloaded
        skeleton = _create(name, pretrained=False)
    _check_single_scale(skeleton, name)
    layer = _checked_layer(layer, len(families.core(skeleton).blocks), name)
    patch = families.patch_size(skeleton)
    steps = _checked_stride(stride, patch, name)
    if steps != patch and families.patch_convolution(skeleton) is None:
        raise BackboneError(f"{name} does not cut its patches by a plain convolution: it takes no stride but {patch}")
    image_size = _checked_size(skeleton, name, size, patch)

    options: dict[str, Any] = {"dynamic_img_size": True} if type(skeleton).__name__ in families.DYNAMIC else {}
    options |= _register_option(skeleton, state or {})
    model = _create(name, pretrained=pretrained and state is None, **options)
    if state is not None:
        source = "the state dict" if isinstance(weights, Mapping) else str(weights)
        _load_weights(model, state, image_size if size else None, source)
    if families.sizing(model) in ("loaded", "square"):
        _regrid(model, image_size, grids.grid_shape(image_size, patch, steps))
    if (convolution := families.patch_convolution(model)) is not None:
        convolution.stride = steps
    return _backbone(model, name, layer, patch, steps, image_size)


def _backbone(model: families.Model, name: str, layer: int, patch: Size, stride: Size, image_size: Size) -> Backbone:
    core = families.core(model)
    if getattr(core, "global_pool", None) == "soft":
        core.global_pool = ""  # Gemma's pooling of patches, which dvt does not use, would refuse most sizes
    last = layer == -1
    read = families.last_tokens if last else partial(families.block_tokens, layer=layer)
    return Backbone(
        model,
        partial(read, patch=patch, stride=stride),
        name=name,
        patch_size=patch,
        stride=stride,
        image_size=image_size,
        feature_dim=core.num_features if last else core.feature_info[layer]["num_chs"],
        num_prefix_tokens=families.prefix_tokens(model) if last else families.block_prefix_tokens(model),
        mean=model.pretrained_cfg["mean"],
        std=model.pretrained_cfg["std"],
        layer=layer,
        num_layers=len(core.blocks),
        fixed_size=families.sizing(model) != "any",
    )


def single_scale_models(family: str | None = None) -> Iterator[tuple[str, str, families.Model]]:
    """(family, architecture, model without weights) of every timm model that dvt takes.

    Args:
        family: one timm module such as "eva"; None goes through all of them, which takes a minute. Families go by
            their first model: no family of timm mixes single-scale and hierarchical models.
    """
    for module in [family] if family else timm.list_modules():
        for number, name in enumerate(timm.list_models(module=module)):
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False, num_classes=0)
            if families.scales(model) == 1:
                yield module, name, model
            elif number == 0:
                break


def _rounded(size: int | Size, patch: Size) -> Size:
    """A size rounded to whole patches."""
    size = pair(size)
    if min(size) < 1:
        raise BackboneError(f"size must be positive, got {size}")
    return grids.fit_size(size, min(size), patch)


def _checked_stride(stride: int | Size | None, patch: Size, name: str) -> Size:
    steps = patch if stride is None else pair(stride)
    if any(not 1 <= s <= p for s, p in zip(steps, patch, strict=True)):
        raise BackboneError(f"stride {steps} of {name} must lie between 1 and the patch size {patch}")
    return steps


def _checked_layer(layer: int, count: int, name: str) -> int:
    if not -count <= layer < count:
        raise BackboneError(f"{name} has {count} blocks: layer must lie in {-count} ... {count - 1}, got {layer}")
    return -1 if layer % count == count - 1 else layer % count


def _checked_size(model: families.Model, name: str, size: int | Size | None, patch: Size) -> Size:
    own = _rounded(families.own_size(model), patch)
    asked = own if size is None else _rounded(size, patch)
    kind = families.sizing(model)
    if kind == "own" and asked != own:
        raise BackboneError(f"{name} mixes a fixed number of patches: it takes only size {own}, got {size}")
    if kind == "square" and asked[0] // patch[0] != asked[1] // patch[1]:
        raise BackboneError(f"{name} takes only square grids of patches, got size {size}; its own is {own}")
    return asked


def _check_single_scale(model: families.Model, name: str) -> None:
    count = families.scales(model)
    if count == 0:
        raise BackboneError(f"{name} ({type(model).__name__}) gives no intermediate features, so dvt cannot read it")
    if count > 1:
        raise BackboneError(
            f"{name} ({type(model).__name__}) is hierarchical: its features come at {count} scales. dvt takes "
            "single-scale models, such as ViTs, whose blocks all keep one grid of patches"
        )


def _create(name: str, pretrained: bool, **options: Any) -> families.Model:
    """A timm model without a classifier."""
    _check_name(name)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:  # each hub client raises its own kinds, and timm plain RuntimeErrors
        raise BackboneError(
            f"cannot get the model {name!r}: {type(error).__name__}: {error}\n"
            "Without a network, or for a model without published weights, give a file with --weights FILE "
            "(in Python weights=...); `dvt demo` needs no network"
        ) from error


def _check_name(name: str) -> None:
    """Refuse a name that timm does not know; names with a source, such as hf-hub:, are checked by their source."""
    if ":" in name:
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.5)
        hint = f"close: {', '.join(close)}" if close else "timm.list_models() lists them"
        raise BackboneError(f"timm has no model {name!r}; {hint}. Those of the hub are named hf-hub:organisation/model")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")] if tag else []
    if tag and tag not in tags:
        raise BackboneError(f"timm has no weights {tag!r} of {architecture}; it has: {', '.join(tags) or 'none'}")


def _regrid(model: families.Model, image_size: Size, grid: Size) -> None:
    """Give a model that was built for one size another: position embeddings and relative positions are resampled."""
    embed = families.embedding(model)
    old = tuple(embed.grid_size)
    embed.img_size = image_size
    if old == grid:
        return
    embed.grid_size, embed.num_patches = grid, math.prod(grid)
    if hasattr(model, "num_patches"):
        model.num_patches = math.prod(grid)
    for name in ("pos_embed", "patch_pos"):
        table = getattr(model, name, None)
        if table is not None:
            prefix = table.shape[1] - math.prod(old)
            setattr(model, name, nn.Parameter(resample_abs_pos_embed(table.detach(), list(grid), list(old), prefix)))
    for module in model.modules():
        if hasattr(module, "set_window_size"):
            module.set_window_size(grid)


def _load_weights(model: families.Model, state: State, size: Size | None, source: str) -> None:
    """Load a user's file through timm's own conversion for the family."""
    own = model.state_dict()
    other_shapes = any(k in own and own[k].shape != v.shape for k, v in state.items())
    if size is not None and other_shapes and getattr(families.embedding(model), "grid_size", None):
        # A file made for the size asked for is taken as it is, not resampled to the model's own size and back.
        _regrid(model, size, grids.grid_shape(size, families.patch_size(model)))
    try:
        state = _conversion(model)(dict(state))
    except Exception as error:  # timm's conversions index and reshape what they expect to find
        raise WeightsError(
            f"{source} does not fit {type(model).__name__}: timm's conversion failed with {error!r}; "
            "are these the weights of another architecture?"
        ) from error
    load_state(model, state, source)


def _register_option(model: families.Model, state: Mapping[str, Tensor]) -> dict[str, int]:
    """What timm must be told so that the model has the register tokens of a file."""
    option, tokens = families.REGISTERS.get(type(model).__name__), state.get("reg_token")
    if option is None or tokens is None or tokens.ndim != 3:
        return {}
    own = 0 if model.reg_token is None else model.reg_token.shape[1]
    return {} if tokens.shape[1] == own else {option: tokens.shape[1]}


def _conversion(model: families.Model) -> Callable[[State], State]:
    """timm's filter for a family's checkpoints: names of other projects, position embeddings of other grids."""
    module = sys.modules[type(model).__module__]
    kind = "classifier" if families.core(model) is not model else "encoder"
    function = getattr(module, "checkpoint_filter_fn", getattr(module, f"checkpoint_filter_fn_{kind}", None))
    if function is None:
        return lambda state: state
    adapt = "adapt_layer_scale" in inspect.signature(function).parameters  # DeiT-III as its authors published it
    return partial(function, model=model, **({"adapt_layer_scale": True} if adapt else {}))
