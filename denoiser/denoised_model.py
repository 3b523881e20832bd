"""Put a denoiser inside a timm model, by a class that extends the model's methods."""

from __future__ import annotations

import logging
from functools import cache
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from dvt.backbones import families
from dvt.backbones.outside import shared_tree
from dvt.denoiser.derived import derived, patch_grid, reduce_derived, taken_blocks
from dvt.denoiser.sharing import PretrainedDenoiser
from dvt.errors import BackboneError, ShapeError
from dvt.grids import Size
from dvt.tokens import Tokens

logger = logging.getLogger(__name__)


class DenoisedModel(nn.Module):
    """Change a timm model to denoise one layer; :func:`with_denoiser` derives a class from this and the model's own."""

    denoiser: PretrainedDenoiser
    denoised_layer: int  # -1 or the index of an earlier block
    block_prefix: bool  # whether the family gives prefix tokens beside intermediate features
    option_names: tuple[str, ...]  # of forward_intermediates, after the images
    blocks: nn.Sequential

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return the model's output, computed from denoised tokens."""
        if type(self).__name__ == "Gemma4VitEncoder":  # its own forward does not call forward_features
            return self.forward_features(x, *args, **options)
        return cast(Any, super()).forward(x, *args, **options)

    def forward_features(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return the output of timm's method, denoised if the layer is -1."""
        self._grid(x)
        features = cast(Any, super()).forward_features(x, *args, **options)
        return self._final(features, x) if self.denoised_layer == -1 else features

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Return the output of timm's method, with the chosen layer denoised."""
        self._grid(x)
        asked = self._asked(args, options)
        taken, norm = taken_blocks(len(self.blocks), asked.get("indices")), bool(asked.get("norm"))
        only, last = bool(asked.get("intermediates_only")), len(self.blocks) - 1
        denoises_last = self.denoised_layer == -1 and (norm or not self._has_final_norm())
        if self.denoised_layer == -1 and last in taken and not denoises_last and not torch.compiler.is_compiling():
            _warn_raw(type(self).__name__)
        wanted = last if denoises_last else self.denoised_layer
        if wanted not in taken and (only or self.denoised_layer != -1):
            return cast(Any, super()).forward_intermediates(x, **asked)

        # Read maps (B, h, w, C), without the norm if the tokens of an earlier block are to be denoised before it.
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
        entries = [
            tokens.flatten(1, 2) if asked.get("output_fmt") == "NLC" else _channels_first(tokens) for tokens in maps
        ]
        return _answer(final, entries, prefixes, rest, asked)

    def prune_intermediate_layers(self, indices: Any = 1, prune_norm: bool = False, prune_head: bool = True) -> Any:
        """Prune as timm's method does, unless this would remove the layer that the denoiser reads."""
        last = self.denoised_layer == -1
        needed = len(self.blocks) - 1 if last else self.denoised_layer
        if max(taken_blocks(len(self.blocks), indices)) < needed or (prune_norm and last and self._has_final_norm()):
            raise BackboneError(
                f"pruning to the blocks {indices}, norm {'dropped' if prune_norm else 'kept'}, would remove what the "
                f"denoiser at layer {self.denoised_layer} reads: keep it, or prune first and then attach"
            )
        return cast(Any, super()).prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)

    def no_weight_decay(self) -> set[str]:
        """Name timm's parameters without weight decay, and the denoiser's position embedding."""
        own = getattr(super(), "no_weight_decay", set)
        extra = (f"denoiser.{name}" for name, _ in self.denoiser.named_parameters() if name.endswith("pos_embed"))
        return {*own(), *extra}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return reduce_derived(self)

    def _asked(self, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """Map the arguments of ``forward_intermediates`` to names, because their order differs among timm's models."""
        return dict(zip(self.option_names, args)) | options  # noqa: B905 (most calls give only some)

    def _has_final_norm(self) -> bool:
        norm = getattr(self, "norm", getattr(self, "neck", None))
        return norm is not None and not isinstance(norm, nn.Identity)

    def _norm(self, tokens: Tensor) -> Tensor:
        """Apply the final norm to tokens (..., C); SAM's neck to maps (B, h, w, C)."""
        if isinstance(getattr(self, "neck", None), nn.Module):
            return cast(Any, self).neck(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return cast(Any, self).norm(tokens) if self._has_final_norm() else tokens

    def _read(self, x: Tensor, asked: dict[str, Any]) -> tuple[Any, list[Tensor], list[Tensor], dict[str, Any] | None]:
        """Read final features, maps (B, h, w, C), their prefix tokens if the family gives them, and timm's dict."""
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
        """Denoise final features, in timm's layout."""
        tokens = self._tokens(features, x)
        patches = self.denoiser(tokens.patches, tokens.prefix)
        if features.ndim == 4:
            return patches if self._channels_last() else _channels_first(patches)
        return torch.cat((tokens.prefix, patches.flatten(1, 2)), dim=1)

    def _tokens(self, features: Tensor, x: Tensor) -> Tokens:
        """Turn final features, in timm's layout, into tokens."""
        if features.ndim == 4:
            return Tokens.of(features if self._channels_last() else features.permute(0, 2, 3, 1))
        count = families.prefix_tokens(self)
        return Tokens(_map(features[:, count:], self._grid(x)), features[:, :count])

    def _channels_last(self) -> bool:
        return getattr(self, "output_fmt", "NCHW") == "NHWC"

    def _grid(self, x: Tensor) -> Size:
        """Compute the grid (h, w) of images; refuse anything else before the model works on it."""
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise ShapeError(
                "a model with a denoiser takes images (B, 3, H, W), because a denoiser needs whole token maps; "
                f"got {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            )
        return patch_grid(self, x)


def _answer(
    final: Any, entries: list[Tensor], prefixes: list[Tensor], rest: dict[str, Any] | None, asked: dict[str, Any]
) -> Any:
    """Build the result of ``forward_intermediates`` in the form asked for."""
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
    """Reshape (B, h w, C) to (B, h, w, C)."""
    if sequence.shape[1] != grid[0] * grid[1]:
        raise ShapeError(
            f"the model gave {sequence.shape[1]} patch tokens where a grid of {grid} was expected: a denoiser needs "
            "whole token maps, so patches cannot be dropped or padded"
        )
    return sequence.reshape(sequence.shape[0], *grid, sequence.shape[2])


def _channels_first(patches: Tensor) -> Tensor:
    """Move channels first: (B, h, w, C) to (B, C, h, w)."""
    return patches.permute(0, 3, 1, 2).contiguous()


@cache
def _warn_raw(family: str) -> None:
    logger.warning(
        "%s: the last entry of forward_intermediates(norm=False) lies before the final norm and stays raw; "
        "norm=True gives the denoised tokens",
        family,
    )


def with_denoiser(model: nn.Module, denoiser: PretrainedDenoiser, layer: int) -> nn.Module:
    """Copy an encoder of timm, with shared weights, and put a denoiser at a layer (-1 or the index of a block).

    Raises:
        BackboneError: the encoder already has a denoiser.
    """
    base: Any = type(model)
    if issubclass(base, DenoisedModel):
        raise BackboneError(f"this {base.__name__} has a denoiser already; attach the other one to the timm model")
    clean = shared_tree(model)
    clean.__class__ = derived(DenoisedModel, base)
    clean.denoiser, clean.denoised_layer = denoiser, layer
    clean.block_prefix = families.block_prefix_tokens(model) > 0
    clean.option_names = tuple(signature(cast(Any, model).forward_intermediates).parameters)[1:]
    return clean
