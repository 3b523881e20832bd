"""Put a denoiser inside a model, or behind any other backbone.

The result is a copy of the model that shares its modules, of a class derived from the model's own: a plain
``nn.Module`` that its library's tools, ``torch.compile``, ``torch.export`` and ``isinstance`` see as the model that it
was.
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
    """Put a denoiser inside a model, whose patch tokens of one layer are then denoised.

    Of timm and of the libraries that :func:`dvt.wrap` reads by itself. Of the latter only the last layer: clean are
    `last_hidden_state` in transformers (and what is pooled from it, and the last feature map of its backbones),
    `x_norm_patchtokens` and the last of `get_intermediate_layers` in DINOv2 and DINOv3, the tokens of an open_clip
    tower, and what comes out of `encoder` in torchvision. The rest is about timm's models.

    What `model` answers stays: ``forward``, ``forward_features``, ``forward_intermediates`` with every flag,
    ``forward_head``, ``feature_info``, ``set_grad_checkpointing``, ``reset_classifier``, ``state_dict`` (its own names,
    and the denoiser's under ``denoiser.``). Weights are shared with `model`, which itself still answers raw tokens;
    parameters keep their ``requires_grad``, so either part can be trained.

    With layer -1 the tokens that ``forward_features`` returns are denoised, and with them what a classifier pools and
    the last entry of ``forward_intermediates(norm=True)``. The last block without the final norm (``norm=False``,
    timm's default) is another space, which the denoiser does not know: these tokens stay raw, and a warning says so
    once. Models without a final norm have them denoised either way, and XCiT's, whose class attention changes patches
    too, are the final ones. With an earlier layer the tokens of that block are replaced in what
    ``forward_intermediates`` returns, not in what later blocks read; ``norm=True`` norms the denoised ones. Test-time
    registers (the kind "registers") act inside the model and change all of its layers.

    Args:
        denoiser: made for this model and layer; it is not copied.
        model: a single-scale timm model, a model of the other libraries, or a backbone, of which the model is taken.
        layer: the block whose tokens are denoised, -1 for the last one after the final norm. A backbone's own layer
            is taken where this is -1.
        force: attach a denoiser whose card names another model, layer or weights.

    Returns:
        A module of the model's class; it takes what the model took.

    Raises:
        BackboneError: the model is of no known library, or the denoiser was made for another one.

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
    """Refuse a model that a denoiser was not made for: its weights are compared or, where none are stated, its name."""
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
            "for it, or force it (force=True) where you know that they agree"
        )


def denoised_backbone(denoiser: PretrainedDenoiser, backbone: Backbone, force: bool = False) -> Backbone:
    """Make a backbone that gives denoised tokens, from one of :func:`dvt.load_backbone` or of :func:`dvt.wrap`.

    The denoiser is copied, and frozen like every backbone: training goes on with the one given.

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
    """Hold a model and the denoiser of its tokens."""

    def __init__(self, model: nn.Module, denoiser: nn.Module) -> None:
        super().__init__()
        self.model, self.denoiser = model, denoiser


class _PairTokens:
    """Read the tokens of a model, denoised; a class and not a closure, so that it can be copied and pickled."""

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
            f"{name}: train one for it, or force it (force=True) where you know that they agree"
        )


def _warn_weights(denoiser: PretrainedDenoiser, model: Any, inner: Any) -> None:
    """Warn where a card states that a denoiser was made for other weights of the same architecture."""
    name, made_for = _names(denoiser, model)
    expected = denoiser.card.get("weights_sha256")
    if expected and name == made_for and weights_sha256(model) != expected:
        logger.warning(
            "the weights of this %s are not those that the denoiser was made for (a position embedding resampled to "
            "another size is enough to differ); untrained or fine-tuned weights need a denoiser of their own",
            type(inner).__name__,
        )


def _names(denoiser: PretrainedDenoiser, model: Any) -> tuple[str, str]:
    """Name the architecture of a timm model, and the one that the card of a denoiser states."""
    name = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or "")
    return name, str(denoiser.card.get("backbone") or name).partition(".")[0]


def _check_name(denoiser: PretrainedDenoiser, model: Any, force: bool) -> None:
    name, made_for = _names(denoiser, model)
    if name and made_for != name and not force:
        raise BackboneError(
            f"these registers are neurons of {made_for}, and are to be attached to {name}: find those of this model, "
            "or force it (force=True) where you know that they agree"
        )


def _check_pooling(inner: Any) -> None:
    """Refuse encoders whose own forward pools the patches: what comes out are no patch tokens."""
    if type(inner).__name__ == "Gemma4VitEncoder" and inner.global_pool not in ("", "none"):
        raise BackboneError(
            f"Gemma4VitEncoder pools its patches ({inner.global_pool!r}) past every place where they can be denoised; "
            "make it with global_pool='', or load it with dvt.load_backbone, which does"
        )
