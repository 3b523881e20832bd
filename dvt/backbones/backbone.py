"""A frozen feature extractor: images -> Tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from dvt import grids
from dvt.backbones import families
from dvt.backbones.families import pair
from dvt.backbones.weights import HEAD
from dvt.devices import autocast
from dvt.errors import BackboneError, ImageError, ShapeError
from dvt.grids import Size
from dvt.tokens import Tokens

MAX_PATCHES = 16_384
"""The largest number of patches per image: attention over more needs gigabytes, and only very thin images have more."""

TokensOf = Callable[[nn.Module, Tensor], Tokens]


@dataclass(frozen=True)
class BackboneSpec:
    """Identify a backbone: everything about it that changes its tokens or their shapes.

    Args:
        name: the model's name.
        patch_size: (height, width) of a patch in pixels.
        stride: (vertical, horizontal) pixels between neighbouring patches; the patch size unless patches overlap.
        image_size: (H, W), the input size that the model is meant for.
        feature_dim: C, channels of a token.
        num_prefix_tokens: P, class, distillation and register tokens at this layer.
        layer: -1 for the last block after the final norm, otherwise the block whose output is read.
        num_layers: number of blocks; None for a wrapped model.
        fixed_size: whether `image_size` is the only input size that it takes.
        weights_sha256: hash of the weights; None until :attr:`Backbone.identity` computes it.
    """

    name: str
    patch_size: Size
    stride: Size
    image_size: Size
    feature_dim: int
    num_prefix_tokens: int = 0
    layer: int = -1
    num_layers: int | None = None
    fixed_size: bool = False
    weights_sha256: str | None = None


class Backbone(nn.Module):
    """A frozen feature extractor; make one with :func:`load_backbone` or :func:`wrap`.

    The fields of its :class:`BackboneSpec` can be read from it as well: `backbone.name`, `backbone.patch_size`, ...

    Args:
        model: the inner module; it takes normalised images.
        tokens: function of (model, normalised images) that returns :class:`Tokens`.
        spec: the identity of the backbone.
        mean, std: normalisation of RGB in [0, 1]; kept as (1, 3, 1, 1) buffers.
    """

    mean: Tensor
    std: Tensor
    #: The name of the precision of forward passes; see :func:`dvt.backbones.in_precision`.
    precision: str = "float32"

    def __init__(
        self, model: nn.Module, tokens: TokensOf, spec: BackboneSpec, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self._tokens, self.spec = tokens, spec
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(1, 3, 1, 1), persistent=False)
        self.eval()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    @property
    def patch_size(self) -> Size:
        """The size of a patch in pixels, (height, width)."""
        return self.spec.patch_size

    @property
    def stride(self) -> Size:
        """The pixels between neighbouring patches, (vertical, horizontal)."""
        return self.spec.stride

    @property
    def image_size(self) -> Size:
        """The input size that the model is meant for, (H, W) in pixels."""
        return self.spec.image_size

    @property
    def feature_dim(self) -> int:
        """The number of channels of a token, C."""
        return self.spec.feature_dim

    @property
    def num_prefix_tokens(self) -> int:
        """The number of class, distillation and register tokens at this layer, P."""
        return self.spec.num_prefix_tokens

    @property
    def layer(self) -> int:
        """The block whose output is read; -1 is the last block after the final norm."""
        return self.spec.layer

    @property
    def num_layers(self) -> int | None:
        """The number of blocks; None for a wrapped model."""
        return self.spec.num_layers

    @property
    def fixed_size(self) -> bool:
        """True if :attr:`image_size` is the only input size that the model takes."""
        return self.spec.fixed_size

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.mean.device

    @property
    def precision_setting(self) -> dict[str, str]:
        """The entry for the settings of a job: none for float32, so that jobs of before there was a choice go on."""
        return {} if self.precision == "float32" else {"precision": self.precision}

    @property
    def identity(self) -> BackboneSpec:
        """The spec with the hash of the weights, which takes as long as reading them."""
        return replace(self.spec, weights_sha256=self.weights_sha256)

    def forward(self, images: Tensor) -> Tokens:
        """Compute the tokens of a batch of images, in the dtype of the model (or of autocast).

        Args:
            images: (B, 3, H, W) RGB in [0, 1]; H and W are multiples of the patch, see :meth:`input_size`.

        Returns:
            patches (B, h, w, C) with (h, w) = :meth:`grid` of the size, and prefix (B, P, C).

        Raises:
            ShapeError: the images have a shape that the model does not take.
        """
        self._check(images)
        with autocast(self.device, self.precision):
            tokens = self._tokens(self.model, self.normalise(images))
        tokens = tokens if self.precision == "float32" else tokens.to(torch.float32)
        expected = (*self.grid((images.shape[2], images.shape[3])), self.feature_dim)
        if tuple(tokens.patches.shape[1:]) != expected or tokens.prefix.shape[1] != self.num_prefix_tokens:
            raise ShapeError(
                f"{self.name} gave patches {tuple(tokens.patches.shape)} and {tokens.prefix.shape[1]} prefix tokens "
                f"for images {tuple(images.shape)}; (B, h, w, C) with {expected} and {self.num_prefix_tokens} were "
                "expected: check patch_size, stride, feature_dim and num_prefix_tokens"
            )
        return tokens

    def at_layers(self, images: Tensor, layers: Sequence[int]) -> dict[int, Tokens]:
        """Compute the tokens after several layers in one forward pass.

        Args:
            images: as :meth:`forward` takes them.
            layers: block indices, and -1 for the last block after the final norm, as :func:`load_backbone` has them.

        Returns:
            :class:`Tokens` by layer; a layer may have other channels than :attr:`feature_dim`.

        Raises:
            BackboneError: the model has no such layer; a wrapped model has only the layer of its own tokens.
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
        with autocast(self.device, self.precision):
            found = families.layer_tokens(self.model, self.normalise(images), layers, self.patch_size, self.stride)
        if self.precision == "float32":
            return found
        return {layer: tokens.to(torch.float32) for layer, tokens in found.items()}

    def input_size(self, image_size: Size) -> Size:
        """Find the size (H, W) to resize an image to: its aspect ratio, with the shorter side of :attr:`image_size`.

        A model of fixed size takes every image at its own size, whatever its aspect ratio.

        Raises:
            ImageError: the image is so long and thin that it would take gigabytes: of attention, or of pixels.
        """
        size = grids.fit_size(image_size, min(self.image_size), self.patch_size)
        height, width = self.grid(size)
        if height * width > MAX_PATCHES:
            raise ImageError(
                f"an image of {image_size[0]} x {image_size[1]} pixels would take {height} x {width} patches, more "
                f"than {MAX_PATCHES}; crop it to a less extreme aspect ratio, or choose a smaller size"
            )
        return self.image_size if self.fixed_size else size

    def grid(self, size: Size) -> Size:
        """Count the patches (h, w) of an input of (H, W) pixels."""
        return grids.grid_shape(size, self.patch_size, self.stride)

    def centres(self, size: Size) -> Tensor:
        """Compute the coordinates (x, y) in [0, 1] of the patch centres, (h, w, 2), of an input of (H, W) pixels."""
        return grids.patch_centres(size, self.patch_size, self.stride, device=self.device)

    def grid_centres(self, grid: Size) -> Tensor:
        """Compute the patch centres as :meth:`centres` does, on the CPU, from the grid (h, w) of a token map."""
        return grids.overlapping_centres(grid, self.patch_size, self.stride)

    @cached_property
    def weights_sha256(self) -> str:
        """The hash of the weights (:func:`weights_sha256`) at the time it is first asked for."""
        return weights_sha256(self.model)

    def extra_repr(self) -> str:
        return f"{self.name}, layer={self.layer}, patch={self.patch_size}, stride={self.stride}, C={self.feature_dim}"

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images (B, 3, H, W) in [0, 1] as the model wants them, in its dtype."""
        dtype = torch.float32
        for parameter in self.model.parameters():  # a loop, which PyTorch 2.6 can trace
            if parameter.is_floating_point():
                dtype = parameter.dtype
                break
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
    """Hash a model's weights: name, dtype, shape and bytes of each tensor, without those of a classifier."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not HEAD.match(name):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def rounded_size(size: int | Size, patch: Size) -> Size:
    """Round a size in pixels to whole patches."""
    size = pair(size)
    if min(size) < 1:
        raise BackboneError(f"size must be positive, got {size}")
    if min(size) < min(patch):
        raise BackboneError(f"size {min(size)} is less than a patch of {patch[0]} x {patch[1]} pixels; give more")
    return grids.fit_size(size, min(size), patch)


def checked_stride(stride: int | Size | None, patch: Size, name: str) -> Size:
    """Return the stride as (vertical, horizontal), the patch size by default; refuse one that is out of range."""
    steps = patch if stride is None else pair(stride)
    if any(not 1 <= s <= p for s, p in zip(steps, patch, strict=True)):
        raise BackboneError(f"stride {steps} of {name} must lie between 1 and the patch size {patch}")
    return steps
