"""A denoiser inside a timm model, which then answers what it answered, denoised; or behind any other backbone.

The result is a copy of the model that shares its modules, of a class derived from the model's own: a plain
``nn.Module`` that timm's tools, ``torch.compile``, ``torch.export`` and ``isinstance`` see as the model that it was.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from dvt.backbones import Backbone, families, weights_sha256
from dvt.denoiser.derived import derived, grid_of, reduced, shared_copy, stride_of
from dvt.denoiser.model import Denoiser
from dvt.denoiser.remedies.install import registered_backbone, with_test_time_registers
from dvt.errors import BackboneError, ShapeError
from dvt.grids import Size
from dvt.tokens import Tokens

logger = logging.getLogger(__name__)


def attach(denoiser: Denoiser, model: Backbone | nn.Module, layer: int = -1, force: bool = False) -> nn.Module:
    """A timm model whose patch tokens of one layer are denoised.

    What `model` answers stays: ``forward``, ``forward_features``, ``forward_intermediates`` with every flag,
    ``forward_head``, ``feature_info``, ``set_grad_checkpointing``, ``reset_classifier``, ``state_dict`` (its own names,
    and the denoiser's under ``denoiser.``). Weights are shared with `model`, which itself goes on answering raw tokens;
    parameters keep their ``requires_grad``, so either part can be trained.

    With layer -1 the tokens that ``forward_features`` returns are denoised, and with them what a classifier pools and
    the last entry of ``forward_intermediates(norm=True)``. The last block without the final norm (``norm=False``,
    timm's default) is another space, which the denoiser does not know: these tokens stay raw, and a warning says so
    once. Models without a final norm have them denoised either way, and XCiT's, whose class attention changes patches
    too, are the final ones. With an earlier layer the tokens of that block are
    replaced in what ``forward_intermediates`` returns, not in what later blocks read; ``norm=True`` norms the
    denoised ones. Test-time registers (the kind "registers") act inside the model and change all of its layers.

    Args:
        denoiser: made for this model and layer; it is not copied.
        model: a single-scale timm model, or a backbone of :func:`dvt.load_backbone`, of which the timm model is taken.
        layer: the block whose tokens are denoised, -1 for the last one after the final norm. A backbone's own layer
            is taken where this is -1.
        force: attach a denoiser whose card names another model, layer or weights.

    Returns:
        A module of the model's class; it takes what the timm model took: (B, 3, H, W), normalised.

    Raises:
        BackboneError: the model is not a single-scale timm model, or the denoiser was made for another one.

    >>> import timm
    >>> from dvt.denoiser import DenoiserConfig
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
        raise BackboneError(
            f"{type(model).__name__} is not a single-scale timm model: a denoiser is attached to those; for a backbone "
            "made by dvt.wrap use dvt.denoiser.attach.denoised_backbone"
        )
    inner = families.core(model)
    layer = _layer(inner, layer)
    _check_card(denoiser, model, inner, layer, force)
    _check_pooling(inner)
    clean = _denoised(inner, denoiser, layer)
    if inner is model:
        return clean
    outer = shared_copy(model)
    outer.encoder = clean
    return outer


def denoised_backbone(denoiser: Denoiser, backbone: Backbone, force: bool = False) -> Backbone:
    """A backbone that gives denoised tokens, from one of :func:`dvt.load_backbone` or of :func:`dvt.wrap`.

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
    def __init__(self, model: nn.Module, denoiser: nn.Module) -> None:
        super().__init__()
        self.model, self.denoiser = model, denoiser


class _PairTokens:
    """Tokens of a model, denoised; a class and not a closure, so that it can be copied and pickled."""

    def __init__(self, read: Callable[[nn.Module, Tensor], Tokens]) -> None:
        self.read = read

    def __call__(self, pair: nn.Module, images: Tensor) -> Tokens:
        tokens = self.read(cast(nn.Module, pair.model), images)
        return tokens.with_patches(cast(Denoiser, pair.denoiser)(tokens.patches, tokens.prefix))


class FeatureMaps(nn.Module):
    """A list of feature maps (B, C, h, w), like timm's ``features_only`` models.

    Args:
        model: a module made by :func:`attach`, or a timm model.
        indices: blocks, as ``forward_intermediates`` takes them.
        norm: whether the maps go through the final norm; what a denoiser at layer -1 denoises does.

    Attributes:
        feature_info: with ``channels()``, ``reduction()`` and ``module_name()``, one value a map.
    """

    def __init__(self, model: nn.Module, indices: int | Sequence[int] = (-1,), norm: bool = True) -> None:
        super().__init__()
        self.model, self.norm = model, norm
        inner = families.core(model)
        self.indices = _taken(len(inner.blocks), indices)
        infos = [dict(families.core(model).feature_info[i]) for i in self.indices]
        for info in infos:
            info["num_chs"] = info.get("num_chs_norm", info["num_chs"]) if norm else info["num_chs"]
            info["reduction"] = stride_of(model)[0]
        self.feature_info = FeatureInfo(infos)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w) of images (B, 3, H, W), normalised as the timm model takes them."""
        take = cast(Any, self.model).forward_intermediates
        return take(images, indices=list(self.indices), norm=self.norm, intermediates_only=True)


class FeatureInfo(list):
    """What segmentation and detection heads ask about the maps of a backbone, in timm's words."""

    def channels(self) -> list[int]:
        """C of each map."""
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        """Pixels between neighbouring cells of each map."""
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        """The block that each map is read after."""
        return [info["module"] for info in self]


class Denoised(nn.Module):
    """What changes in a timm model with a denoiser; :func:`attach` derives a class from this and the model's own."""

    denoiser: Denoiser
    denoised_layer: int  # -1 or the index of an earlier block
    block_prefix: bool  # whether the family gives prefix tokens beside intermediate features
    option_names: tuple[str, ...]  # of forward_intermediates, after the images
    blocks: nn.Sequential

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """As timm's, whose head reads denoised tokens."""
        if type(self).__name__ == "Gemma4VitEncoder":  # its own goes around forward_features
            return self.forward_features(x, *args, **options)
        return cast(Any, super()).forward(x, *args, **options)

    def forward_features(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """As timm's; denoised for layer -1."""
        self._grid(x)
        features = cast(Any, super()).forward_features(x, *args, **options)
        return self._final(features, x) if self.denoised_layer == -1 else features

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """As timm's, with the chosen layer denoised."""
        self._grid(x)
        asked = self._asked(args, options)
        taken, norm = _taken(len(self.blocks), asked.get("indices")), bool(asked.get("norm"))
        only, last = bool(asked.get("intermediates_only")), len(self.blocks) - 1
        denoises_last = self.denoised_layer == -1 and (norm or not self._has_final_norm())
        if self.denoised_layer == -1 and last in taken and not denoises_last and not torch.compiler.is_compiling():
            _warn_raw(type(self).__name__)
        wanted = last if denoises_last else self.denoised_layer
        if wanted not in taken and (only or self.denoised_layer != -1):
            return cast(Any, super()).forward_intermediates(x, **asked)

        # Read as (B, h, w, C) and without the norm where an earlier block's tokens are denoised before it.
        earlier = self.denoised_layer != -1
        final, maps, prefixes, rest = self._read(x, asked | {"norm": norm and not earlier})
        entry = sorted(taken).index(wanted) if wanted in taken else None
        if earlier and entry is not None:
            maps[entry] = self.denoiser(maps[entry], prefixes[entry] if prefixes else None)
        elif not asked.get("stop_early") or last in taken:
            final = self._final(final, x)
            if entry is not None:
                maps[entry] = self._tokens(final, x).patches
        if earlier and norm:
            maps = [self._norm(tokens) for tokens in maps]
            prefixes = [self._norm(tokens) for tokens in prefixes]
        entries = [tokens.flatten(1, 2) if asked.get("output_fmt") == "NLC" else _first(tokens) for tokens in maps]
        return _answer(final, entries, prefixes, rest, asked)

    def prune_intermediate_layers(self, indices: Any = 1, prune_norm: bool = False, prune_head: bool = True) -> Any:
        """As timm's, as long as what the denoiser reads stays."""
        last = self.denoised_layer == -1
        needed = len(self.blocks) - 1 if last else self.denoised_layer
        if max(_taken(len(self.blocks), indices)) < needed or (prune_norm and last and self._has_final_norm()):
            raise BackboneError(
                f"pruning to the blocks {indices}, norm {'dropped' if prune_norm else 'kept'}, would remove what the "
                f"denoiser at layer {self.denoised_layer} reads: keep it, or prune first and attach then"
            )
        return cast(Any, super()).prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)

    def no_weight_decay(self) -> set[str]:
        """timm's names, and the denoiser's position embedding."""
        own = getattr(super(), "no_weight_decay", set)
        extra = (f"denoiser.{name}" for name, _ in self.denoiser.named_parameters() if name.endswith("pos_embed"))
        return {*own(), *extra}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return reduced(self)

    def _asked(self, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """The options of ``forward_intermediates`` by name; where timm's models have them differs by position."""
        return dict(zip(self.option_names, args)) | options  # noqa: B905 (seldom are all given)

    def _has_final_norm(self) -> bool:
        norm = getattr(self, "norm", getattr(self, "neck", None))
        return norm is not None and not isinstance(norm, nn.Identity)

    def _norm(self, tokens: Tensor) -> Tensor:
        """The final norm of tokens (..., C); SAM's neck of maps (B, h, w, C)."""
        if isinstance(getattr(self, "neck", None), nn.Module):
            return cast(Any, self).neck(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return cast(Any, self).norm(tokens) if self._has_final_norm() else tokens

    def _read(self, x: Tensor, asked: dict[str, Any]) -> tuple[Any, list[Tensor], list[Tensor], dict[str, Any] | None]:
        """Final features, maps (B, h, w, C), their prefix tokens where the family gives them, and timm's dict."""
        options = asked | {"intermediates_only": False}
        if type(self).__name__ not in families.CHANNELS_FIRST and options.get("output_fmt", "NCHW") == "NCHW":
            options["output_fmt"] = "NLC"  # timm's reshape to NCHW ignores a changed stride
        if self.block_prefix:
            options["return_prefix_tokens"] = True
        out = cast(Any, super()).forward_intermediates(x, **options)
        rest = out if isinstance(out, dict) else None
        final, entries = out if rest is None else (rest["image_features"], rest["image_intermediates"])
        prefixes = list(rest.get("image_intermediates_prefix", ())) if rest is not None else []
        if entries and isinstance(entries[0], tuple):
            entries, prefixes = [patches for patches, _ in entries], [prefix for _, prefix in entries]
        grid = self._grid(x)
        maps = [y.permute(0, 2, 3, 1) if y.ndim == 4 else _map(y, grid) for y in entries]
        return final, maps, prefixes, rest

    def _final(self, features: Tensor, x: Tensor) -> Tensor:
        """Final features in timm's layout, denoised."""
        tokens = self._tokens(features, x)
        patches = self.denoiser(tokens.patches, tokens.prefix)
        if features.ndim == 4:
            return patches if self._channels_last() else _first(patches)
        return torch.cat((tokens.prefix, patches.flatten(1, 2)), dim=1)

    def _tokens(self, features: Tensor, x: Tensor) -> Tokens:
        """Final features in timm's layout as tokens."""
        if features.ndim == 4:
            return Tokens.of(features if self._channels_last() else features.permute(0, 2, 3, 1))
        count = families.prefix_tokens(self)
        return Tokens(_map(features[:, count:], self._grid(x)), features[:, :count])

    def _channels_last(self) -> bool:
        return getattr(self, "output_fmt", "NCHW") == "NHWC"

    def _grid(self, x: Tensor) -> Size:
        """(h, w) of images; refuses what is none before the model works on it."""
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise ShapeError(
                "a model with a denoiser takes images (B, 3, H, W), because a denoiser needs whole token maps; "
                f"got {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            )
        return grid_of(self, x)


def _answer(
    final: Any, entries: list[Tensor], prefixes: list[Tensor], rest: dict[str, Any] | None, asked: dict[str, Any]
) -> Any:
    """What ``forward_intermediates`` returns, in the form asked for."""
    only, with_prefix = asked.get("intermediates_only"), asked.get("return_prefix_tokens") and prefixes
    if rest is not None:
        result = rest | {"image_intermediates": entries, "image_features": final}
        left_out = {"image_features"} if only else set()
        if with_prefix:
            result["image_intermediates_prefix"] = prefixes
        else:
            left_out.add("image_intermediates_prefix")
        return {key: value for key, value in result.items() if key not in left_out}
    pairs = list(zip(entries, prefixes, strict=True)) if with_prefix else entries
    return pairs if only else (final, pairs)


def _map(sequence: Tensor, grid: Size) -> Tensor:
    """(B, h, w, C) from (B, h w, C)."""
    if sequence.shape[1] != grid[0] * grid[1]:
        raise ShapeError(
            f"the model gave {sequence.shape[1]} patch tokens where a grid of {grid} was expected: a denoiser needs "
            "whole token maps, so patches cannot be dropped or padded"
        )
    return sequence.reshape(sequence.shape[0], *grid, sequence.shape[2])


def _first(patches: Tensor) -> Tensor:
    """(B, C, h, w) from (B, h, w, C)."""
    return patches.permute(0, 3, 1, 2).contiguous()


def _taken(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """The blocks that timm means by `indices`: None is all, a number the last so many, negative ones count back."""
    if indices is None or isinstance(indices, int):
        return list(range(count))[-indices if indices else 0 :]
    return sorted({i % count for i in indices})


@cache
def _warn_raw(family: str) -> None:
    logger.warning(
        "%s: the last entry of forward_intermediates(norm=False) lies before the final norm and stays raw; "
        "norm=True gives the denoised tokens",
        family,
    )


def _denoised(model: nn.Module, denoiser: Denoiser, layer: int) -> nn.Module:
    base: Any = type(model)
    if issubclass(base, Denoised):
        raise BackboneError(f"this {base.__name__} has a denoiser already; attach the other one to the timm model")
    clean = cast(Denoised, shared_copy(model, derived(Denoised, base)))
    clean.denoiser, clean.denoised_layer = denoiser, layer
    clean.block_prefix = families.block_prefix_tokens(model) > 0
    clean.option_names = tuple(signature(cast(Any, model).forward_intermediates).parameters)[1:]
    return clean


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


def _check_card(denoiser: Denoiser, model: Any, inner: Any, layer: int, force: bool) -> None:
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


def _warn_weights(denoiser: Denoiser, model: Any, inner: Any) -> None:
    """Say it where a card tells that a denoiser was made for other weights of the same architecture."""
    name, made_for = _names(denoiser, model)
    expected = denoiser.card.get("weights_sha256")
    if expected and name == made_for and weights_sha256(model) != expected:
        logger.warning(
            "the weights of this %s are not those that the denoiser was made for (a position embedding resampled to "
            "another size is enough to differ); untrained or fine-tuned weights need a denoiser of their own",
            type(inner).__name__,
        )


def _names(denoiser: Denoiser, model: Any) -> tuple[str, str]:
    """The architecture of a timm model, and the one that a denoiser was made for where its card tells."""
    name = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or "")
    return name, str(denoiser.card.get("backbone") or name).partition(".")[0]


def _check_name(denoiser: Denoiser, model: Any, force: bool) -> None:
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
