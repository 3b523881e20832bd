"""Put a denoiser inside a model, or after any other backbone.

The result is a copy of the model that shares its modules, of a class derived from the model's own: a plain
``nn.Module`` that its library's tools, ``torch.compile``, ``torch.export`` and ``isinstance`` treat as the original
model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast, overload

from torch import Tensor, nn

from dvt.backbones import Backbone, families, outside, weights_sha256
from dvt.denoiser.denoised_model import with_denoiser
from dvt.denoiser.denoised_outside import with_denoiser_outside
from dvt.denoiser.derived import around
from dvt.denoiser.remedies.install import registered_backbone, with_test_time_registers
from dvt.denoiser.sharing import PretrainedDenoiser
from dvt.errors import BackboneError
from dvt.tokens import Tokens

M = TypeVar("M", bound=nn.Module)

logger = logging.getLogger(__name__)


@overload
def attach(denoiser: PretrainedDenoiser, model: Backbone, layer: int = -1, force: bool = False) -> nn.Module: ...


@overload
def attach(denoiser: PretrainedDenoiser, model: M, layer: int = -1, force: bool = False) -> M: ...


def attach(denoiser: PretrainedDenoiser, model: nn.Module, layer: int = -1, force: bool = False) -> nn.Module:
    """Put a denoiser inside a model, so that its patch tokens of one layer are denoised.

    The model may be one of timm or of the libraries that :func:`dvt.wrap` knows. In the latter only the last layer can
    be denoised: `last_hidden_state` in transformers (also what is pooled from it, and the last feature map of its
    backbones), `x_norm_patchtokens` and the last entry of `get_intermediate_layers` in DINOv2 and DINOv3, the tokens of
    an open_clip tower, and the output of `encoder` in torchvision. The following is about timm's models.

    The interface of `model` is kept: ``forward``, ``forward_features``, ``forward_intermediates`` with every flag,
    ``forward_head``, ``feature_info``, ``set_grad_checkpointing``, ``reset_classifier``, ``state_dict`` (its own names,
    and the denoiser's under ``denoiser.``). Weights are shared with `model`, which still returns raw tokens itself;
    parameters keep their ``requires_grad``, so either part can be trained.

    With layer -1, the tokens that ``forward_features`` returns are denoised, and so are the tokens that a classifier
    pools and the last entry of ``forward_intermediates(norm=True)``. Tokens of the last block without the final norm
    (``norm=False``, timm's default) lie in another space, for which the denoiser was not made: they stay raw, with a
    warning once. Models without a final norm have them denoised in both cases; for XCiT, whose class attention also
    changes patches, they are the final tokens. With an earlier layer, the tokens of that block are replaced in the
    output of ``forward_intermediates``, not in the input of later blocks; ``norm=True`` normalises the denoised tokens.
    Test-time registers (the kind "registers") act inside the model and change all of its layers.

    Args:
        denoiser: a denoiser made for this model and layer; it is not copied.
        model: a single-scale timm model, a model of the other libraries, or a backbone, whose model is used.
        layer: the block whose tokens are denoised; -1 for the last one, after the final norm, or for a backbone's own
            layer.
        force: attach a denoiser even if its card names another model, layer or weights.

    Returns:
        A module of the model's class, with the same inputs.

    Raises:
        BackboneError: the model is of no known library, or the denoiser was made for another model.

    >>> import timm, torch
    >>> from dvt.denoiser import Denoiser, DenoiserConfig, FeatureMaps
    >>> model = timm.create_model("test_vit", dynamic_img_size=True).eval()
    >>> clean = attach(Denoiser(DenoiserConfig("block", 64, grid=(10, 10))), model)
    >>> clean(torch.rand(1, 3, 160, 240)).shape, isinstance(clean, type(model))
    (torch.Size([1, 1000]), True)
    >>> [tuple(y.shape) for y in FeatureMaps(clean)(torch.rand(1, 3, 160, 240))]
    [(1, 64, 10, 15)]
    """
    if isinstance(model, Backbone):
        layer = _backbone_layer(model, layer)
        denoiser.check_fits(model, force)
        model = model.model
    if denoiser.config.kind == "registers":
        _check_name(denoiser, model, force)
        _warn_weights(denoiser, model, families.core(model))
        return with_test_time_registers(denoiser, model)
    if layer == -1:
        families.check_whole(model)
    if families.scales(model) != 1 or not hasattr(families.core(model), "blocks"):
        return _attach_outside(denoiser, model, layer, force)
    inner = families.core(model)
    layer = _layer(inner, layer)
    _check_card(denoiser, model, inner, layer, force)
    _check_pooling(inner)
    return around(model, with_denoiser(inner, denoiser, layer))


def _attach_outside(denoiser: PretrainedDenoiser, model: nn.Module, layer: int, force: bool) -> nn.Module:
    if (inside := outside.inner_timm(model)) is not None:
        clean = outside.shared_tree(model)
        parent, _, name = inside.rpartition(".")
        setattr(clean.get_submodule(parent), name, attach(denoiser, model.get_submodule(inside), layer, force))
        return clean
    found = outside.recognise(model)
    if found is None:
        raise BackboneError(
            f"{type(model).__name__} is none of the models that a denoiser can be attached to: {outside.KNOWN}. A "
            "backbone made with dvt.wrap(model, tokens=...) is denoised by dvt.denoiser.denoised_backbone"
        )
    if layer != -1:
        raise BackboneError(
            f"a denoiser is attached to the last layer (-1) of {type(model).__name__}, got {layer}; earlier layers can "
            "be denoised in timm models"
        )
    _check_outside(denoiser, found, force)
    return with_denoiser_outside(model, found, denoiser)


def _check_outside(denoiser: PretrainedDenoiser, found: outside.Outside, force: bool) -> None:
    """Refuse a model for which the denoiser was not made, by the hash of its weights or, without one, by its name."""
    if found.feature_dim != denoiser.feature_dim:
        raise BackboneError(
            f"this denoiser takes tokens of {denoiser.feature_dim} channels, {found.name} gives {found.feature_dim}; "
            "no option makes them fit: train a denoiser for this model"
        )
    card = denoiser.card
    made_for, layer, expected = (card.get(key) for key in ("backbone", "layer", "weights_sha256"))
    same = weights_sha256(found.encoder) == expected if expected else not made_for or made_for == found.name
    if not force and (layer not in (None, -1) or not same):
        raise BackboneError(
            f"this denoiser was made for layer {layer} of {made_for}, weights {str(expected)[:12]}, and is to be "
            f"attached to layer -1 of {found.name} with other weights (or the same in another precision): train one "
            "for it, or pass force=True if you know that they agree"
        )


def denoised_backbone(denoiser: PretrainedDenoiser, backbone: Backbone, force: bool = False) -> Backbone:
    """Make a backbone with denoised tokens from one made by :func:`dvt.load_backbone` or :func:`dvt.wrap`.

    The denoiser is copied, and the copy is frozen like every backbone; the given denoiser can still be trained.

    Raises:
        BackboneError: the denoiser was made for another backbone, layer or feature size.
    """
    denoiser.check_fits(backbone, force)
    if denoiser.config.kind == "registers":
        return registered_backbone(denoiser, backbone)
    result = Backbone(
        _Pair(backbone.model, copy.deepcopy(denoiser)),
        _PairTokens(backbone._tokens),
        backbone.spec,
        mean=backbone.mean.flatten().tolist(),
        std=backbone.std.flatten().tolist(),
    )
    result.model.denoiser.to(backbone.device)
    result.mean, result.std = backbone.mean.clone(), backbone.std.clone()
    return result


class _Pair(nn.Module):
    """Hold a model and a denoiser of its tokens."""

    def __init__(self, model: nn.Module, denoiser: nn.Module) -> None:
        super().__init__()
        self.model, self.denoiser = model, denoiser


class _PairTokens:
    """Read the denoised tokens of a model; a class, because a closure cannot be copied or pickled."""

    def __init__(self, read: Callable[[nn.Module, Tensor], Tokens]) -> None:
        self.read = read

    def __call__(self, pair: nn.Module, images: Tensor) -> Tokens:
        tokens = self.read(cast(nn.Module, pair.model), images)
        return tokens.with_patches(cast(PretrainedDenoiser, pair.denoiser)(tokens.patches, tokens.prefix))


def _backbone_layer(backbone: Backbone, layer: int) -> int:
    if layer not in (-1, backbone.layer):
        raise BackboneError(
            f"{backbone.name} was loaded with layer={backbone.layer} and the denoiser is to be attached at "
            f"layer {layer}; load the backbone with layer={layer}"
        )
    return backbone.layer


def _layer(inner: families.Model, layer: int) -> int:
    count = len(inner.blocks)
    if not -count <= layer < count:
        raise BackboneError(
            f"{type(inner).__name__} has {count} blocks: layer must lie in {-count} ... {count - 1}, got {layer}"
        )
    return -1 if layer % count == count - 1 else layer % count


def _check_card(denoiser: PretrainedDenoiser, model: Any, inner: Any, layer: int, force: bool) -> None:
    channels = inner.num_features if layer == -1 else inner.feature_info[layer]["num_chs"]
    if channels != denoiser.feature_dim:
        raise BackboneError(
            f"this denoiser takes tokens of {denoiser.feature_dim} channels, layer {layer} of {type(inner).__name__} "
            f"gives {channels}; no option makes them fit: train a denoiser for this model"
        )
    name, made_for = _names(denoiser, model)
    own_layer = denoiser.card.get("layer", layer)
    _warn_weights(denoiser, model, inner)
    if not force and (own_layer != layer or (name and made_for != name)):
        raise BackboneError(
            f"this denoiser was made for layer {own_layer} of {made_for}, and is to be attached at layer {layer} of "
            f"{name}: train one for it, or pass force=True if you know that they agree"
        )


def _warn_weights(denoiser: PretrainedDenoiser, model: Any, inner: Any) -> None:
    """Warn if the denoiser's card says that it was made for other weights of the same architecture."""
    name, made_for = _names(denoiser, model)
    expected = denoiser.card.get("weights_sha256")
    if expected and name == made_for and weights_sha256(model) != expected:
        logger.warning(
            "the weights of this %s are not those that the denoiser was made for (a position embedding resampled to "
            "another size also changes them); untrained or fine-tuned weights need their own denoiser",
            type(inner).__name__,
        )


def _names(denoiser: PretrainedDenoiser, model: Any) -> tuple[str, str]:
    """Return the name of a timm model's architecture, and of the one in the denoiser's card."""
    name = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or "")
    return name, str(denoiser.card.get("backbone") or name).partition(".")[0]


def _check_name(denoiser: PretrainedDenoiser, model: Any, force: bool) -> None:
    name, made_for = _names(denoiser, model)
    if name and made_for != name and not force:
        raise BackboneError(
            f"these registers are neurons of {made_for}, and are to be attached to {name}: find those of this model, "
            "or pass force=True if you know that they agree"
        )


def _check_pooling(inner: Any) -> None:
    """Refuse encoders whose forward pools the patches, because their outputs are not patch tokens."""
    if type(inner).__name__ == "Gemma4VitEncoder" and inner.global_pool not in ("", "none"):
        raise BackboneError(
            f"Gemma4VitEncoder pools its patches ({inner.global_pool!r}) before they can be denoised; create it with "
            "global_pool='', or load it with dvt.load_backbone, which does so"
        )
