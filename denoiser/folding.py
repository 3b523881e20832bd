"""Fold affine denoisers into the layers beside them, exactly.

A denoiser of kind "linear" or "conv1x1" is one affine map x -> M x + c of each patch token, so it merges with a linear
layer just behind or just before it at no cost: :func:`fold_into` and :func:`fold_after`. It does not commute with
the LayerNorm at the end of most backbones, nor with a residual sum, whose skip branch later blocks read as well: there
:func:`fold` makes the norm's affine part a whole matrix instead. That costs C^2 multiplications per patch, compared
with 12 C^2 of a block and 2 C rank of an attached "linear" denoiser: it saves the wrapper, not time.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dvt.backbones import Backbone, families
from dvt.denoiser.model import Denoiser
from dvt.errors import BackboneError, ConfigError, ShapeError

L = TypeVar("L", nn.Linear, nn.Conv2d)
M = TypeVar("M", bound=nn.Module)


def affine(denoiser: Denoiser) -> tuple[Tensor, Tensor]:
    """Compute M (C, C) and c (C,), float64, such that the denoiser, at its strength, is x -> M x + c.

    Raises:
        ConfigError: the denoiser is not the same affine map at each position.
    """
    body, kind = denoiser.body, denoiser.config.kind
    identity = torch.eye(
        denoiser.feature_dim, dtype=torch.float64, device=next(iter(body.state_dict().values())).device
    )
    if kind == "linear":
        change = -body.directions.double() @ body.directions.double().T
        offset = -change @ body.mean.double()
    elif kind == "conv1x1":
        change, offset = body.conv.weight.detach().double()[:, :, 0, 0], body.conv.bias.detach().double()
    else:
        raise ConfigError(
            f"a denoiser of kind {kind!r} is no affine map of a token; fold one of kind linear or conv1x1"
        )
    return identity + denoiser.strength * change, denoiser.strength * offset


def fold_into(denoiser: Denoiser, layer: L) -> L:
    """Copy a layer that reads patch tokens, such that copy(x) = layer(denoiser(x)) for raw tokens x.

    Args:
        denoiser: a denoiser of kind "linear" or "conv1x1".
        layer: a Linear or a 1 x 1 convolution of C inputs: a probe, a head, a projection.

    Raises:
        ConfigError: the denoiser is not affine.
        ShapeError: the layer does not read C channels of one position at a time.
    """
    matrix, offset = affine(denoiser)
    weight = _matrix(layer)
    if weight.shape[1] != denoiser.feature_dim:
        raise ShapeError(f"the layer reads {weight.shape[1]} channels, the denoiser gives {denoiser.feature_dim}")
    return _replaced(layer, weight @ matrix, weight @ offset + _bias(layer))


def fold_after(denoiser: Denoiser, layer: L) -> L:
    """Copy a layer that makes patch tokens, such that copy(h) = denoiser(layer(h)).

    Args:
        denoiser: a denoiser of kind "linear" or "conv1x1".
        layer: the backbone's last operation, a Linear or a 1 x 1 convolution of C outputs (a neck, a projection).

    Raises:
        ConfigError: the denoiser is not affine.
        ShapeError: the layer does not give C channels.
    """
    matrix, offset = affine(denoiser)
    weight = _matrix(layer)
    if weight.shape[0] != denoiser.feature_dim:
        raise ShapeError(f"the layer gives {weight.shape[0]} channels, the denoiser reads {denoiser.feature_dim}")
    return _replaced(layer, matrix @ weight, matrix @ _bias(layer) + offset)


def fold(denoiser: Denoiser, model: M, force: bool = False) -> M:
    """Copy a backbone so that its final LayerNorm gives denoised patch tokens; prefix tokens do not change.

    Args:
        denoiser: a denoiser of kind "linear" or "conv1x1", for the last layer.
        model: a timm model, or a :class:`~dvt.backbones.Backbone` of the last layer.
        force: fold a denoiser whose card names another backbone, layer or weights.

    Raises:
        ConfigError: the denoiser is not affine.
        BackboneError: the denoiser was made for another backbone; or the features do not end in a LayerNorm of its
            size, as in models that pool first and norm afterwards, and after SAM's neck: fold into their reader.
    """
    if isinstance(model, Backbone):
        denoiser.check_fits(model, force)
        if model.layer != -1:
            raise BackboneError(f"a denoiser folds into the final norm, but this backbone reads layer {model.layer}")
    folded = copy.deepcopy(model)
    folded.__dict__.pop("weights_sha256", None)  # the copy gets other weights, so another hash
    core: Any = families.core(folded.model if isinstance(folded, Backbone) else folded)
    norm = getattr(core, "norm", None)
    if not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != (denoiser.feature_dim,):
        raise BackboneError(
            f"the features of {type(core).__name__} end in {type(norm).__name__}, not in a LayerNorm over "
            f"{denoiser.feature_dim} channels; attach the denoiser, or fold it into the layer that reads the features "
            "(fold_into)"
        )
    core.norm = DenoisedNorm(norm, *affine(denoiser), prefix=families.prefix_tokens(core))
    return folded


class DenoisedNorm(nn.Module):
    """Apply a LayerNorm to tokens (B, P + n, C), and then the affine map x -> M x + c to the n patches."""

    def __init__(self, norm: nn.LayerNorm, matrix: Tensor, offset: Tensor, prefix: int) -> None:
        super().__init__()
        self.norm, self.prefix = norm, prefix
        like = next(norm.parameters(), matrix.new_zeros((), dtype=torch.float32))
        self.patches = nn.Linear(matrix.shape[1], matrix.shape[0], device=like.device, dtype=like.dtype)
        if norm.bias is not None:
            offset = offset + matrix @ norm.bias.detach().double()
        if norm.weight is not None:
            matrix = matrix * norm.weight.detach().double()
        self.patches.load_state_dict({"weight": matrix, "bias": offset})
        self.patches.requires_grad_(like.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        prefix, patches = self.norm(x[:, : self.prefix]), x[:, self.prefix :]
        denoised = self.patches(nnf.layer_norm(patches, self.norm.normalized_shape, eps=self.norm.eps))
        return torch.cat((prefix, denoised.to(prefix.dtype)), dim=1)


def _matrix(layer: nn.Linear | nn.Conv2d) -> Tensor:
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Conv2d):
        if layer.kernel_size != (1, 1) or layer.groups != 1 or layer.padding not in ((0, 0), "valid"):
            raise ShapeError(f"a denoiser folds into a plain 1 x 1 convolution, not into {layer}")
        weight = weight[:, :, 0, 0]
    return weight


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    return layer.weight.new_zeros(len(layer.weight)).double() if layer.bias is None else layer.bias.detach().double()


def _replaced(layer: L, weight: Tensor, bias: Tensor) -> L:
    """Copy a layer with other values; the copy always has a bias."""
    new = copy.deepcopy(layer)
    new.weight = nn.Parameter(weight.reshape(layer.weight.shape).to(layer.weight), layer.weight.requires_grad)
    new.bias = nn.Parameter(bias.to(layer.weight), layer.weight.requires_grad)
    return new
