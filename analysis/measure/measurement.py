"""Measure one backbone: read every image once, then score."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dvt.analysis.config import AnalyzeConfig
from dvt.analysis.measure.sample import places_of, read_pixels, spread, store_of
from dvt.analysis.measure.stopwatch import Stopwatch
from dvt.analysis.measure.treated import treated
from dvt.analysis.measure.types import Decompose, DenoiserLike, TermSource
from dvt.analysis.metrics import artifacts as metrics
from dvt.analysis.metrics import scores
from dvt.analysis.metrics.positions import PositionMeans, PositionShare, torus_windows
from dvt.analysis.page.viewer import Arrays, Shown
from dvt.errors import ConfigError
from dvt.grids import Size
from dvt.images import ImageLike
from dvt.progress import Progress
from dvt.tokens import Tokens
from dvt.views import resize

if TYPE_CHECKING:
    from dvt.backbones import Backbone

log = logging.getLogger(__name__)

_DESCRIBED = ("name", "weights_sha256", "layer", "patch_size", "stride", "image_size", "feature_dim")
_TERMS = ("semantic", "artifact", "residual")
# Decomposing a window is slow, so the stability of F is measured on fewer windows of fewer images.
_FIELD_SHIFTS = ((1, 1), (2, 3))
_FIELD_SHIFT_IMAGES = 2


@dataclass
class _LayerTokens:
    """Hold the tokens and sums read at one layer for one variant."""

    tokens: list[Tokens] = field(default_factory=list)
    means: PositionMeans | None = None
    shifts: list[metrics.ShiftStability] = field(default_factory=list)
    greys: list[Tensor] = field(default_factory=list)


class BackboneMeasurement:
    """Measure one backbone: read every image once, then score."""

    def __init__(
        self,
        backbone: Backbone,
        label: str,
        config: AnalyzeConfig,
        variants: dict[str, DenoiserLike],
        source: TermSource,
        watch: Stopwatch,
        progress: Progress,
    ) -> None:
        self.backbone, self.label, self.config, self.watch, self.progress = backbone, label, config, watch, progress
        if taken := {"raw", *_TERMS} & set(variants):
            raise ConfigError(f"a variant cannot be called {sorted(taken)[0]!r}; these names stand for the terms")
        self.variants = variants
        self.store = store_of(source)
        self.places = places_of(self.store) if self.store else {}
        self.decompose = cast("Decompose | None", source if self.store is None else None)
        self.layers = _layers(backbone, config)
        self.kept: dict[tuple[int, str], _LayerTokens] = {}
        self.shares: dict[tuple[int, str], PositionShare] = {}
        self.shown: list[Shown] = []

    def about(self) -> dict[str, Any]:
        """Describe the backbone for the report: its label, and the part of its identity that readers compare."""
        spec = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.backbone.identity).items()}
        described = {name: spec[name] for name in _DESCRIBED}
        return {"label": self.label, **described, "precision": self.backbone.precision}

    # -- reading

    @torch.no_grad()
    def read(self, sample: Sequence[ImageLike], shown: set[int]) -> None:
        """Run all forward passes, one image after the other."""
        config, count = self.config, len(sample)
        layered = set(spread(count, config.layer_images))
        shared, shifted = spread(count, config.share_images), spread(count, config.shift_images)
        for number, image in enumerate(sample):
            pixels = read_pixels(image).to(self.backbone.device)
            size = self.backbone.input_size((pixels.shape[1], pixels.shape[2]))
            whole = resize(pixels, size)
            layers = self.layers if number in layered | shown else self.layers[:1]
            found = self._variants(whole[None], layers) | self._terms(image, pixels)
            for (layer, variant), tokens in found.items():
                keep = layer == self.layers[0] or number in layered
                if keep and variant != "residual":
                    self._at(layer, variant).tokens.append(tokens.to("cpu"))
                if number in shown:
                    self.shown.append(Shown(number, self.label, layer, variant, tokens.patches[0].cpu()))
            if number in shared:  # other layers on every second image: enough for a curve, in half the time
                self._read_windows(whole, number, self.layers[: 1 if shared.index(number) % 2 else None])
            if number in shifted:
                place = shifted.index(number)
                self._read_shifts(pixels, self.layers[: 1 if place % 2 else None], place < _FIELD_SHIFT_IMAGES)
            self.progress(self.label, number + 1, count)
        self._read_greys()

    def _at(self, layer: int, variant: str) -> _LayerTokens:
        return self.kept.setdefault((layer, variant), _LayerTokens())

    def _variants(self, images: Tensor, layers: Sequence[int]) -> dict[tuple[int, str], Tokens]:
        """Compute tokens of some images at some layers, and of every denoiser at the backbone's own."""
        parts = [self._forward(part, layers) for part in images.split(self.config.batch)]
        found = {(layer, "raw"): _joined([part[layer] for part in parts]) for layer in layers}
        own = self.layers[0]
        for name, denoise in self.variants.items():
            with self.watch.measuring("denoisers", images.device):
                found[own, name] = _checked(treated(denoise, images, found[own, "raw"]), found[own, "raw"], name)
        return found

    def _forward(self, images: Tensor, layers: Sequence[int]) -> dict[int, Tokens]:
        with self.watch.measuring("forward", images.device):
            own = list(layers) == [self.backbone.layer]
            found = {layers[0]: self.backbone(images)} if own else self.backbone.at_layers(images, layers)
            return {layer: tokens.to(torch.float32) for layer, tokens in found.items()}

    def _terms(self, image: ImageLike, pixels: Tensor) -> dict[tuple[int, str], Tokens]:
        if self.store is not None:
            number = self.places[os.path.realpath(str(image))]
            names = [name for name in _TERMS if name in self.store.terms]
            terms = {name: torch.from_numpy(self.store.read(number, name)).float() for name in names}
        elif self.decompose is not None:
            terms = self._decomposed(self.decompose, pixels)
        else:
            return {}
        return {(self.layers[0], name): Tokens.of(each) for name, each in terms.items()}

    def _decomposed(self, decompose: Decompose, pixels: Tensor) -> dict[str, Tensor]:
        with self.watch.measuring("fields", pixels.device), self.watch.watching(self.backbone):
            terms = {name: each for name, each in decompose(pixels).items() if name in _TERMS}
        if "semantic" not in terms:
            raise ConfigError("the function for semantic must return a mapping with at least 'semantic': (h, w, C)")
        return terms

    def _read_windows(self, whole: Tensor, number: int, layers: Sequence[int]) -> None:
        windows = torus_windows(whole, self.backbone.image_size, self.config.windows, self.config.seed + number)
        for key, tokens in self._variants(windows, layers).items():
            kept = self._at(*key)
            kept.means = kept.means or PositionMeans(self.config.draws, self.config.seed)
            kept.means.add(tokens.patches)

    def _read_shifts(self, pixels: Tensor, layers: Sequence[int], fields: bool) -> None:
        patch, size = self.backbone.patch_size, self.backbone.image_size
        large = resize(pixels, _covering(pixels, size, patch))
        windows, places = metrics.shifted_windows(large, size, patch, self.backbone.stride)
        for key, tokens in self._variants(windows, layers).items():
            self._at(*key).shifts.append(metrics.stability_of(tokens.patches.cpu(), places))
        if self.decompose is not None and fields:
            windows, places = metrics.shifted_windows(large, size, patch, self.backbone.stride, _FIELD_SHIFTS)
            maps = torch.stack([self._decomposed(self.decompose, each)["semantic"].cpu() for each in windows])
            self._at(self.layers[0], "semantic").shifts.append(metrics.stability_of(maps, places))

    def _read_greys(self) -> None:
        size = self.backbone.image_size
        greys = torch.tensor(scores.GREYS, device=self.backbone.device)[:, None, None, None].expand(-1, 3, *size)
        for key, tokens in self._variants(greys, self.layers).items():
            self._at(*key).greys = list(tokens.patches.cpu())
        if self.decompose is not None:
            self._at(self.layers[0], "semantic").greys = [self._decomposed(self.decompose, greys[2])["semantic"].cpu()]

    # -- scoring

    def rows(self) -> list[scores.Row]:
        rows = []
        for number, ((layer, variant), kept) in enumerate(self.kept.items()):
            generator = torch.Generator().manual_seed(self.config.seed + number)
            found = [*self._share_rows(layer, variant, kept), *self._static_rows(layer, kept, generator)]
            if variant != "artifact":
                found += self._moving_rows(layer, variant, kept, generator)
            rows += [replace(row, variant=variant, layer=layer, backbone=self.label) for row in found]
            self.progress(f"{self.label}: metrics", number + 1, len(self.kept))
        return rows

    def _share_rows(self, layer: int, variant: str, kept: _LayerTokens) -> list[scores.Row]:
        if kept.means is None:
            reason = "it is what stays there" if variant == "artifact" else "would need a decomposition of every window"
            return [scores.missing(name, reason) for name in ("position_own", "position_shared")]
        self.shares[layer, variant] = kept.means.share()
        return scores.share_rows(self.shares[layer, variant])

    def _static_rows(self, layer: int, kept: _LayerTokens, generator: torch.Generator) -> list[scores.Row]:
        config = self.config
        mic_images = config.mic_images if layer == self.layers[0] else max(1, config.mic_images // 4)
        steps = [round(p / s) for p, s in zip(self.backbone.patch_size, self.backbone.stride, strict=True)]
        return scores.static_rows(
            kept.tokens, generator, config.draws, mic_images, config.mic_channels, period=max(2, *steps)
        )

    def _moving_rows(
        self, layer: int, variant: str, kept: _LayerTokens, generator: torch.Generator
    ) -> list[scores.Row]:
        reason = "a store has no tokens of other windows; without the store they are computed"
        if kept.shifts:
            note = f"{len(_FIELD_SHIFTS)} shifts, a decomposition each" if variant == "semantic" else ""
            rows = scores.shift_rows(kept.shifts, generator, note)
        else:
            rows = [scores.missing(name, reason) for name in ("shift_p50", "shift_p5")]
        if not kept.greys:
            return [*rows, scores.missing("blank_energy", reason), scores.missing("blank_correlation", reason)]
        artifact = self.shares[layer, "raw"].artifact.cpu()
        return rows + scores.blank_rows(kept.greys, artifact, generator, self.config.draws)

    def fill(self, arrays: Arrays) -> None:
        """Write the data of the pictures into the arrays."""
        for (layer, variant), share in self.shares.items():
            arrays.add_position(self.label, layer, variant, share.artifact)
        for layer in self.layers:
            tokens = {variant: kept.tokens for (at, variant), kept in self.kept.items() if at == layer and kept.tokens}
            arrays.add_norms(self.label, layer, tokens)


def _layers(backbone: Backbone, config: AnalyzeConfig) -> list[int]:
    """List the backbone's own layer, then the others; the last block's own output is named by its index."""
    if config.layers != "all":
        return list(dict.fromkeys([backbone.layer, *config.layers]))
    if backbone.num_layers is None:
        log.warning("%s is a wrapped model: only its own layer is known", backbone.name)
        return [backbone.layer]
    return list(dict.fromkeys([backbone.layer, *range(backbone.num_layers), -1]))


def _covering(pixels: Tensor, size: Size, patch: Size) -> Size:
    """Compute an image size into which windows shifted by up to 4 patches fit."""
    need = [side + 4 * step for side, step in zip(size, patch, strict=True)]
    scale = max(side / have for side, have in zip(need, pixels.shape[1:], strict=True))
    height, width = (max(side, round(have * scale)) for side, have in zip(need, pixels.shape[1:], strict=True))
    return height, width


def _joined(parts: Sequence[Tokens]) -> Tokens:
    return Tokens(torch.cat([each.patches for each in parts]), torch.cat([each.prefix for each in parts]))


def _checked(tokens: Tokens, raw: Tokens, name: str) -> Tokens:
    if tokens.patches.shape != raw.patches.shape:
        given, wanted = tuple(tokens.patches.shape), tuple(raw.patches.shape)
        raise ConfigError(f"the variant {name!r} made {given} of patches {wanted}; it must keep the shape")
    return tokens.to(torch.float32)
