"""Make the features of each row of a table of probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dvt import grids
from dvt.analysis.probes import features
from dvt.analysis.probes.features import Lazy, cached_tokens, held, stored_tokens
from dvt.analysis.probes.probe import Centres
from dvt.backbones import Backbone
from dvt.backbones.families import pair
from dvt.backbones.layers import layer_term
from dvt.errors import ConfigError, ShapeError
from dvt.images import load_image
from dvt.progress import Progress
from dvt.store import FeatureStore
from dvt.tokens import Tokens
from dvt.upsampling import upsample
from dvt.views import ViewConfig

Variant = Callable[[Tokens], Tokens] | FeatureStore | Backbone
"""A function of the raw tokens, a store that holds the images (its `term` is used), or another backbone."""

RAW = "raw"
UPSAMPLED = ", upsampled"
"""The suffix of a row's name if its maps are upsampled."""


def row_names(baselines: Sequence[str], variants: Mapping[str, Variant]) -> list[str]:
    """List the rows of a table, raw features first.

    Raises:
        ConfigError: two rows have one name.
    """
    names = [RAW, *baselines, *variants]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two rows are named {twice[0]!r}; give the variant another name")
    return names


def joined_row(backbone: Backbone, layers: Sequence[int]) -> str:
    """Name the row of several layers side by side."""
    return " + ".join(layer_term(backbone, layer) for layer in layers)


def further_rows(backbone: Backbone, layers: Sequence[int]) -> list[str]:
    """List the rows that several layers add to a table: each but the last, which is raw, and all side by side."""
    names = [layer_term(backbone, layer) for layer in layers[:-1]]
    return [*names, joined_row(backbone, layers)] if names else []


def layer_rows(backbone: Backbone, layers: Sequence[int], joined: Sequence[Tokens]) -> dict[str, Sequence[Tokens]]:
    """Part the tokens of several layers, side by side, into the rows of a table; raw is the last layer's.

    Args:
        backbone: of the layers.
        layers: in the order of the tokens; with fewer than two there are no rows.
        joined: tokens of each image.
    """
    if len(layers) < 2:
        return {}

    def part(k: int) -> Sequence[Tokens]:
        def make(i: int) -> Tokens:
            one = joined[i]
            width = one.feature_dim // len(layers)
            return Tokens(one.patches[..., k * width : (k + 1) * width], one.prefix[..., k * width : (k + 1) * width])

        return Lazy(len(joined), make)

    names = [*(layer_term(backbone, layer) for layer in layers[:-1]), RAW]
    return {name: part(k) for k, name in enumerate(names)} | {joined_row(backbone, layers): joined}


class RowFeatures:
    """Make token maps of images by the name of a row.

    Args:
        backbone: computes the raw tokens, on its device; maps are on the same device.
        images: image files.
        train: number of images, from the first, that the baselines without labels may learn from; 0 for all.
        cache: folder for features.
        views: views for view averaging; PH-Reg has as many, of its own kind.
        position: how :func:`~dvt.analysis.probes.features.with_position` changes each map.
        seed: seed of the noise.
        progress: called with (what, done, total).
        layers: further layers, the backbone's own last, each of which is a row, and all of them side by side another.
        class_token: append the class token to each patch token, in the rows whose tokens have one.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: Sequence[Path],
        train: int,
        cache: Path,
        views: ViewConfig,
        position: str,
        seed: int,
        progress: Progress | None,
        layers: Sequence[int] = (),
        class_token: bool = False,
    ) -> None:
        self.class_token = class_token
        self.backbone, self.images, self.cache, self.progress = backbone, images, cache, progress
        self.views, self.position, self.seed = views, position, seed
        self.train = train or len(images)
        self.device = backbone.device
        joined = cached_tokens(backbone, images, cache, progress=progress, layers=layers)
        self.layered = layer_rows(backbone, layers, joined)
        self.raw = self.layered.pop(RAW, joined)

    def maps(self, name: str, variant: Variant | None, factor: int = 1) -> Sequence[Tensor]:
        """Make the map (h, w, C) of each image, with position features if `position` asks for them.

        With a factor the map is upsampled to (factor h, factor w, C), guided by the image (:func:`dvt.upsample`).
        """
        tokens, places = self._tokens(name, variant), self.centres(variant)

        def make(i: int) -> Tensor:
            found = tokens[i]
            if found.patches.ndim != 4 or len(found) != 1:
                raise ShapeError(f"{name} gave patches {tuple(found.patches.shape)} for one image; return (1, h, w, C)")
            found = self.placed(name, found.to(self.device))
            patches = (
                features.with_class_token(found) if self.class_token and found.prefix.shape[1] else found.patches[0]
            )
            if factor == 1:
                return patches
            centres = places((patches.shape[0], patches.shape[1])).to(patches.device)
            return upsample(patches, load_image(self.images[i]), factor, centres=centres)

        return held(Lazy(len(tokens), make))

    def centres(self, variant: Variant | None) -> Centres:
        """Return the function of a grid that gives the patch centres of a row's maps, without upsampling."""
        model = variant if isinstance(variant, Backbone) else self.backbone
        stride = model.stride
        if isinstance(variant, FeatureStore):
            own = variant.job.stride
            stride = model.patch_size if own is None else pair(own)  # type: ignore[arg-type]
        if stride == model.patch_size:
            return grids.grid_centres
        return partial(grids.overlapping_centres, patch=model.patch_size, stride=stride)

    def function(self, name: str, variant: Variant | None) -> Callable[[Tokens], Tokens]:
        """Return the row as a function of raw tokens of any images.

        Raises:
            ConfigError: the row needs more than tokens, such as whole images.
        """
        if name == "random":
            generator = torch.Generator().manual_seed(self.seed)
            change: Callable[[Tokens], Tokens] = lambda tokens: _noise(tokens, generator)  # noqa: E731
        elif name in ("view-averaging", "ph-reg") or isinstance(variant, FeatureStore):
            raise ConfigError(f"{name} exists for whole images only, not for warped views of them; leave this row out")
        else:
            change = variant or self._learnt(name)
        return lambda tokens: self.placed(name, change(tokens.to(self.device)))

    def placed(self, name: str, tokens: Tokens) -> Tokens:
        """Convert tokens to float32 and add position features, except for the rows of position alone and of noise."""
        if self.position == "none" or name in ("position-only", "random"):
            return tokens.to(torch.float32)
        maps = torch.stack([features.with_position(each.float(), self.position) for each in tokens.patches])
        fits = maps.shape[-1] == tokens.prefix.shape[-1]  # not with position features side by side
        return Tokens(maps, tokens.prefix.float()) if fits else Tokens.of(maps)

    def _tokens(self, name: str, variant: Variant | None) -> Sequence[Tokens]:
        if name == RAW:
            return self.raw
        if name in self.layered and variant is None:
            return self.layered[name]
        if isinstance(variant, FeatureStore):
            return stored_tokens(variant, self.images)
        if isinstance(variant, Backbone):
            return cached_tokens(variant, self.images, self.cache, progress=self.progress)
        if name in ("view-averaging", "ph-reg"):
            views = self.views if name == "view-averaging" else replace(self.views, **features.PH_REG)
            return cached_tokens(self.backbone, self.images, self.cache, views, self.progress)
        if name == "random":
            seed = 1_000_003 * self.seed
            return Lazy(len(self.raw), lambda i: _noise(self.raw[i], torch.Generator().manual_seed(seed + i)))
        return self._changed(variant or self._learnt(name))

    def _changed(self, function: Callable[[Tokens], Tokens]) -> Sequence[Tokens]:
        @torch.no_grad()
        def make(i: int) -> Tokens:
            return function(self.raw[i].to(self.device))

        return Lazy(len(self.raw), make)

    def _learnt(self, name: str) -> Callable[[Tokens], Tokens]:
        if name == RAW:
            return lambda tokens: tokens
        if name == "position-only":
            return features.position_only
        tokens = (self.raw[i].to(self.device) for i in range(self.train))
        return (features.mean_subtraction if name == "subtract" else features.linear_removal)(tokens)


def _noise(tokens: Tokens, generator: torch.Generator) -> Tokens:
    return tokens.with_patches(torch.randn(tokens.patches.shape, generator=generator).to(tokens.patches.device))
