"""Measure images one by one for a diagnosis, and conclude from the numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dvt import grids
from dvt.analysis.config import DoctorConfig
from dvt.analysis.doctor.diagnosis import Diagnosis, Treated, left_share
from dvt.analysis.measure.treated import treated
from dvt.analysis.measure.types import Decompose, DenoiserLike
from dvt.analysis.metrics import log_norm_outliers, scores
from dvt.analysis.metrics.nulls import Score, matched_noise
from dvt.analysis.metrics.positions import PositionMeans, PositionShare, torus_windows
from dvt.devices import finish_all
from dvt.errors import ConfigError, DvtError
from dvt.text import counted
from dvt.tokens import Tokens
from dvt.views import resize

if TYPE_CHECKING:
    from dvt.backbones import Backbone


class Examination:
    """Measure a backbone, its denoisers and the products of stage one image by image, then conclude."""

    def __init__(
        self,
        backbone: Backbone,
        config: DoctorConfig,
        denoisers: dict[str, DenoiserLike],
        products: dict[str, Decompose],
    ) -> None:
        if both := {"raw", *denoisers} & set(products):
            raise ConfigError(f"a product and a denoiser are both called {sorted(both)[0]!r}; give one another name")
        self.backbone, self.config, self.denoisers, self.products = backbone, config, denoisers, dict(products)
        self.means = {name: PositionMeans(config.draws, config.seed) for name in ["raw", *denoisers, *products]}
        self.whole: dict[str, list[Tokens]] = {name: [] for name in self.means}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.means}
        self.kept: dict[str, list[float]] = {name: [] for name in self.means}
        self.failed: list[str] = []

    @torch.no_grad()
    def add(self, pixels: Tensor, seed: int) -> None:
        """Measure one image (3, H, W)."""
        pixels = pixels.to(self.backbone.device)
        image = resize(pixels, self.backbone.input_size((pixels.shape[1], pixels.shape[2])))
        for name, tokens in self._all(image[None], timed=True).items():
            self.whole[name].append(tokens.to("cpu"))
        windows = torus_windows(image, self.backbone.image_size, self.config.windows, self.config.seed + seed)
        found = self._all(windows, timed=False)
        for name, tokens in found.items():
            self.means[name].add(tokens.patches)
        raw = found["raw"].patches
        content = _centred(raw - raw.mean(0))
        for name in ["raw", *self.denoisers]:
            self.kept[name].append(_resemblance(found[name].patches, content))
        if len(self.whole["raw"]) <= self.config.product_images:
            self._add_products(image, windows, content)

    def _add_products(self, image: Tensor, windows: Tensor, content: Tensor) -> None:
        """Decompose an image and a few of its windows, as many of each independent half."""
        count, half = min(self.config.product_windows, len(windows)) // 2, len(windows) // 2
        chosen = [*range(count), *range(half, half + count)]
        for name, decompose in list(self.products.items()):
            start = settled_time(self.backbone)
            try:
                maps = [decompose(each)["semantic"].float() for each in (image, *windows[chosen])]
            except DvtError as error:
                self.failed.append(f"{name} was not tried: {error}")
                del self.products[name]
                continue
            seconds = settled_time(self.backbone) - start
            self.seconds[name].append(seconds / len(maps))
            self.whole[name].append(Tokens.of(maps[0]).to("cpu"))
            treated_windows = torch.stack(maps[1:])
            self.means[name].add(treated_windows)
            self.kept[name].append(_resemblance(treated_windows, content[chosen]))

    def _all(self, images: Tensor, timed: bool) -> dict[str, Tokens]:
        start = settled_time(self.backbone)
        found = {"raw": self.backbone(images).to(torch.float32)}
        ends = {"raw": settled_time(self.backbone)}
        for name, denoise in self.denoisers.items():
            found[name] = treated(denoise, images, found["raw"]).to(torch.float32)
            if found[name].patches.shape != found["raw"].patches.shape:
                raise ConfigError(f"the denoiser {name!r} changed the shape of the tokens; it must keep it")
            ends[name] = settled_time(self.backbone)
        if timed:
            for name, end in ends.items():
                whole = self.seconds["raw"][-1] if isinstance(self.denoisers.get(name), torch.nn.Module) else 0.0
                self.seconds[name].append(max(end - start - whole, 0.0))  # another backbone runs by itself
                start = end
        return found

    def conclude(self, denoise_seconds: float | None) -> Diagnosis:
        config, share = self.config, self.means["raw"].share()
        outliers, images = self._outliers()
        position = _present(share.own, share.own_interval, config.share)
        if share.shared is not None:
            position |= _present(share.shared, share.shared_interval, config.share)
        rare = 0 < images < min(0.25, 2 / len(self.whole["raw"]))
        norm = outliers.value >= config.outliers and outliers.value > outliers.high and not rare
        kind = {(0, 0): "none", (1, 0): "position", (0, 1): "norm outliers", (1, 1): "both"}[int(position), int(norm)]
        treated = tuple(self._treated(name) for name in [*self.denoisers, *self.products])
        return Diagnosis(
            backbone=self.backbone.name,
            kind=kind,
            remedy=_remedy(kind, share, config),
            best=_best(treated, config) if kind != "none" else None,
            one_pass=_best(treated[: len(self.denoisers)], config) if kind != "none" else None,
            strength=_strength(kind, share, config),
            shared=share.shared,
            own=share.own,
            outliers=outliers,
            outlier_images=images,
            layout=self._layout(share.artifact.cpu()),
            treated=treated,
            raw=replace(self._treated("raw"), milliseconds=0.0),
            products=tuple(self.products),
            backbone_milliseconds=1000 * _median(self.seconds["raw"]),
            denoise_seconds=denoise_seconds,
            images=len(self.whole["raw"]),
            config=config,
            warnings=self._warnings(share),
        )

    def _outliers(self) -> tuple[Score, float]:
        maps, generator = self.whole["raw"], torch.Generator().manual_seed(self.config.seed)
        shares = log_norm_outliers(maps, self.config.ratio)
        null = [
            float(log_norm_outliers(matched_noise(maps, generator), self.config.ratio).mean())
            for _ in range(self.config.draws)
        ]
        return scores.score_of(float(shares.mean()), torch.tensor(null)), float((shares > 0).double().mean())

    def _layout(self, artifact: Tensor) -> Score | None:
        maps = self.whole["raw"]
        if len(maps) < 2:
            return None
        plain = [each.with_patches(each.patches - grids.resample(artifact, each.grid)) for each in maps]
        row = scores.position_r2_row(plain, torch.Generator().manual_seed(self.config.seed), self.config.draws)
        return Score(*(float(getattr(row, name) or 0) for name in ("value", "null", "null_low", "null_high")))

    def _treated(self, name: str) -> Treated:
        share = self.means[name].share(resamples=2)
        outliers = float(log_norm_outliers(self.whole[name], self.config.ratio).mean())
        kept = sum(self.kept[name]) / len(self.kept[name])
        return Treated(name, share.own.value, outliers, kept, 1000 * _median(self.seconds[name]), share.images)

    def _warnings(self, share: PositionShare) -> tuple[str, ...]:
        found = []
        if share.images < 8:
            count = counted(share.images, "image")
            found.append(f"only {count}: ten or more give a safer answer")
        if 0 < self.config.share - share.own.value < 0.02:
            found.append("the position share is just below its threshold")
        return (*found, *self.failed)


def _present(score: Score, interval: tuple[float, float] | None, threshold: float) -> bool:
    low = score.value if interval is None else interval[0]
    return score.value >= threshold and low > max(score.high, 0)


def _remedy(kind: str, share: PositionShare, config: DoctorConfig) -> str:
    if kind in ("none", "norm outliers", "both"):
        return "none" if kind == "none" else "denoiser"
    if share.shared is None:
        return "per image"
    return "subtract" if left_share(share.own, share.shared) < config.share else "per image"


def _strength(kind: str, share: PositionShare, config: DoctorConfig) -> float:
    """Find the smallest strength s, in steps of .05, at which the rest (1 - s)^2 of G's variance is below the limit."""
    if kind != "position":
        return 0.0 if kind == "none" else 1.0
    # Use the upper end of the interval, so that the strength is enough even if the share was underestimated.
    size = min(share.own_interval[1] if share.own_interval else share.own.value, 0.999)
    if size <= config.share:
        return 1.0
    rest = config.share * (1 - size) / (size * (1 - config.share))
    return min(1.0, math.ceil(20 * (1 - rest**0.5) - 1e-9) / 20)


def _best(treated: Sequence[Treated], config: DoctorConfig) -> str | None:
    """Choose, among the denoisers that leave no artifact, the one that keeps the content best."""
    enough = [each for each in treated if each.share < config.share and each.outliers < config.outliers]
    return max(enough, key=lambda each: each.kept).name if enough else None


def _resemblance(maps: Tensor, content: Tensor) -> float:
    return float(torch.cosine_similarity(_centred(maps), content, dim=-1).mean())


def _centred(maps: Tensor) -> Tensor:
    return maps - maps.mean((1, 2), keepdim=True)


def settled_time(backbone: Backbone) -> float:
    """Wait until the device has finished, and return the time."""
    finish_all(backbone.device)
    return time.perf_counter()


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
