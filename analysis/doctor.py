"""One page for someone who only asks: does my backbone need denoising, and if so, what do I do?"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dvt import grids
from dvt.analysis.analyze import Decompose, Denoise, ImageLike, quiet, read_pixels, spread, treated
from dvt.analysis.metrics import log_norm_outliers, scores
from dvt.analysis.metrics.nulls import Score, matched_noise
from dvt.analysis.metrics.positions import PositionMeans, PositionShare, torus_windows
from dvt.errors import ConfigError, ImageError
from dvt.progress import Progress
from dvt.tokens import Tokens
from dvt.views import resize

if TYPE_CHECKING:
    from dvt.backbones import Backbone


@dataclass(frozen=True)
class DoctorConfig:
    """What counts as an artifact, and how much is looked at.

    Args:
        images: at most so many, evenly spread over those given.
        windows: torus windows of each, an even number.
        share: least share of the variance that stays at the position for a position artifact. Two patches of equal
            content at different positions then have a cosine of .95 instead of 1, about the size of what
            quantising or resizing does; a random ViT has .01, trained ones with the artifact .2 and more.
        outliers: least share of tokens for a norm artifact, a tenth of the 2.37 % that Darcet et al. count in
            DINOv2-g.
        ratio: how many times the median norm an outlier has at least.
        layout: R^2 of position read from photographs without the artifact, from which position counts as a cue
            that the content has too.
        draws: of the nulls.
        seed: of windows and nulls.
    """

    images: int = 16
    windows: int = 16
    share: float = 0.05
    outliers: float = 0.0025
    ratio: float = 2.0
    layout: float = 0.2
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 1 or self.windows < 2 or self.windows % 2 or self.draws < 2:
            raise ConfigError(
                "images must be 1 or more, windows even and draws at least 2, got "
                f"{self.images}, {self.windows} and {self.draws}"
            )
        if not (0 < self.share < 1 and 0 < self.outliers < 1 and self.ratio > 1):
            raise ConfigError(f"share and outliers must lie in (0, 1) and ratio above 1, got {self}")


@dataclass(frozen=True)
class Treated:
    """What a denoiser does.

    Args:
        name: as it was given.
        share: share of the variance that still stays at the position.
        outliers: share of tokens that are still norm outliers.
        kept: mean cosine with the raw tokens without their position mean, both about an image's mean, in [-1, 1].
        milliseconds: it adds to an image.
    """

    name: str
    share: float
    outliers: float
    kept: float
    milliseconds: float


@dataclass(frozen=True)
class Diagnosis:
    """The answer; ``print`` it, or take :meth:`to_json`.

    Attributes:
        backbone: its name.
        kind: "none", "position", "norm outliers" or "both".
        remedy: "none", "subtract" (one map for all images), "per image" (``dvt denoise``, or a denoiser trained on
            that) or "denoiser" (a trained one).
        best: which of the denoisers given does best, or None; `command` makes it, or else the :attr:`nearest`, where
            that is known.
        strength: of the remedy, in [0, 1]: the least that brings the position share below its threshold.
        shared, own: share of variance at the position: the same in all images, and within each, with their nulls.
        outliers: share of norm outliers with its null; `outlier_images` of the images have one.
        layout: R^2 of position read from photographs without the artifact, with its null; None with one image.
        treated: what the denoisers given do.
        backbone_milliseconds: an image takes; `denoise_seconds` a decomposition, if one was tried.
        images: how many were looked at.
        config: the thresholds.
        warnings: about the answer itself.
    """

    backbone: str
    kind: str
    remedy: str
    best: str | None
    strength: float
    shared: Score | None
    own: Score
    outliers: Score
    outlier_images: float
    layout: Score | None
    treated: tuple[Treated, ...]
    backbone_milliseconds: float
    denoise_seconds: float | None
    images: int
    config: DoctorConfig
    warnings: tuple[str, ...] = field(default=())
    command: str | None = None

    @property
    def nearest(self) -> str | None:
        """Of denoisers that do not remove enough, the one that leaves least of the artifact, if less than half."""
        if not self.treated or self.kind not in ("position", "norm outliers"):
            return None
        size, raw = ("share", self.own) if self.kind == "position" else ("outliers", self.outliers)
        least = min(self.treated, key=lambda each: getattr(each, size))
        return least.name if getattr(least, size) < raw.value / 2 else None

    def to_json(self) -> dict[str, Any]:
        """All fields, ready for JSON, and the page."""
        return {"schema": "dvt-diagnosis/1", **asdict(self), "text": self.to_text()}

    def to_text(self) -> str:
        """The page."""
        parts = [self._answer(), self._evidence(), self._what_to_do(), self._costs(), self._harms()]
        return "\n\n".join(part for part in parts if part)

    __str__ = to_text

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.to_text())}</pre>"

    def _answer(self) -> str:
        answers = {
            "none": "No: no artifact above its threshold. None needed.",
            "position": "Yes: part of each token depends on its position, not on the image.",
            "norm outliers": "Yes: some tokens have norms far beyond the others and stand for no place in the image.",
            "both": "Yes: tokens depend on their position, and some have norms far beyond the others.",
        }
        return f"Does {self.backbone} need denoising? ({self.images} images)\n{answers[self.kind]}"

    def _evidence(self) -> str:
        limit, lines = self.config, ["What was measured"]
        lines.append(f"  stays at the position within an image  {_told(self.own)}, artifact from {limit.share:g}")
        if self.shared is not None:
            lines.append(f"  the same in all images                 {_told(self.shared)}")
        lines.append(
            f"  tokens with outlier norms              {_told(self.outliers, 4)}, artifact from {limit.outliers:g}"
        )
        if self.images > 1:
            lines.append(f"  images that have such tokens           {self.outlier_images:.0%}")
        if self.layout is not None:
            lines.append(f"  position R2 with the artifact removed  {_told(self.layout)}: their layout")
        return "\n".join([*lines, *(f"  ! {each}" for each in self.warnings)])

    def _what_to_do(self) -> str:
        if self.remedy == "none":
            return ""
        texts = {
            "subtract": "Subtract one map: the artifact is the same in all images. `dvt train STORE --kind subtract` "
            "finds it; applying it costs nothing.",
            "per image": "`dvt denoise` for each image: the artifact differs from image to image, so that one map "
            "cannot remove it. For many images train a denoiser on that store: `dvt train STORE`.",
            "denoiser": "A trained denoiser: `dvt denoise` some hundred images, `dvt train STORE`; a map that is "
            "subtracted cannot see norm outliers. Or a backbone with registers, which `dvt remedy registers` adds "
            "without training; `dvt doctor --remedies` compares.",
        }
        if self.shared is None and self.remedy == "per image":
            texts["per image"] = (
                "`dvt denoise` for this image. Whether the artifact is the same in all images, so that one map could "
                "be subtracted from them, one image does not tell: give ten or more."
            )
        advice = [texts[self.remedy], f"Strength {self.strength:g}, the least that brings it below its threshold."]
        if self.shared is not None and self.remedy != "denoiser":
            advice.append(f"One map for all images would leave a position share of {_left(self.own, self.shared):.3f}.")
        lines = [
            "What to do",
            *(textwrap.fill(each, 96, initial_indent="  ", subsequent_indent="  ") for each in advice),
        ]
        for each in self.treated:
            mark = "best of those given: " if each.name == self.best else ""
            lines.append(
                f"  {mark}{each.name} leaves {each.share:.3f} at the position and {each.outliers:.4f} outliers; "
                f"what it gives resembles the content by a cosine of {each.kept:.2f}"
            )
        if self.treated and self.best is None:
            least = f" {self.nearest} leaves least." if self.nearest else ""
            lines.append(f"  None of the denoisers given removes enough.{least}")
        if self.command is not None:
            lines.append(f"  {'Take' if self.best else 'The nearest'} {self.best or self.nearest}: {self.command}")
        return "\n".join(lines)

    def _costs(self) -> str:
        lines = [
            "What it costs on this machine",
            f"  backbone                 {self.backbone_milliseconds:.1f} ms an image",
        ]
        for each in self.treated:
            lines.append(f"  {each.name:<24} {each.milliseconds:.1f} ms more an image")
        if self.denoise_seconds is not None:
            lines.append(f"  {'dvt denoise':<24} {self.denoise_seconds:.1f} s an image")
        return "\n".join(lines) if self.remedy != "none" or len(lines) > 2 else ""

    def _harms(self) -> str:
        if self.remedy == "none":
            return ""
        lines = [
            "What it may hurt",
            "  Tasks that need to know where a patch is: detection, pose, and scenes of one layout. Compare raw and",
            "  denoised features on your labels (`dvt probe`), whole frames and crops, before you settle the strength.",
        ]
        if self.layout is not None and self.layout.value >= self.config.layout and self.layout.beyond_chance:
            lines.append("  Here position is a cue: these photos share a layout, so start from a lower strength.")
        return "\n".join(lines)


def diagnose(
    backbone: Backbone,
    images: Sequence[ImageLike] | Tensor,
    denoisers: Mapping[str, Denoise] | None = None,
    config: DoctorConfig | None = None,
    *,
    commands: Mapping[str, str] | None = None,
    decompose: Decompose | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Tell whether a backbone's tokens have artifacts, of which kind, and what to do about them.

    Position is told from layout by moving the content: windows of the images mirrored into a torus. An artifact is
    called one when its size passes a threshold *and* its bootstrap interval lies above its null.

    Args:
        backbone: its own layer is looked at, on its device.
        images: paths, or images (3, H, W) in [0, 1]; ten or more are better.
        denoisers: by name, each from Tokens to Tokens, or a backbone whose inside was changed; to be tried and timed.
        config: thresholds.
        commands: how to get a denoiser, by its name; the page ends with that of the best one.
        decompose: one image's terms, as in :func:`dvt.analysis.analyze.analyze`; tried once, for its time.
        progress: called with (what, done, total) after every image.

    Raises:
        ImageError: no image is given, or one cannot be read.

    >>> import dvt
    >>> net = torch.nn.Conv2d(3, 8, 16, 16)
    >>> plain = dvt.wrap(net, lambda m, x: Tokens.of(m(x).permute(0, 2, 3, 1)), 16, name="a convolution")
    >>> diagnose(plain, torch.rand(3, 3, 224, 224), config=DoctorConfig(windows=4)).kind
    'none'
    """
    config, denoisers = config or DoctorConfig(), dict(denoisers or {})
    given = list(images)
    if not given:
        raise ImageError("no image was given; the doctor needs at least one, ten or more are better")
    exam = _Exam(backbone, config, denoisers)
    chosen = spread(len(given), config.images)
    for done, index in enumerate(chosen):
        exam.add(read_pixels(given[index]), index)
        (progress or quiet)(f"doctor {backbone.name}", done + 1, len(chosen))
    seconds = None
    if decompose is not None:
        pixels, start = read_pixels(given[chosen[0]]).to(backbone.device), time.perf_counter()
        decompose(pixels)
        seconds = _settled(backbone) - start
    found = exam.conclude(seconds)
    taken = found.best or found.nearest
    return replace(found, command=(commands or {}).get(taken or ""))


class _Exam:
    """Measurements, image by image."""

    def __init__(self, backbone: Backbone, config: DoctorConfig, denoisers: dict[str, Denoise]) -> None:
        self.backbone, self.config, self.denoisers = backbone, config, denoisers
        self.means = {name: PositionMeans(config.draws, config.seed) for name in ["raw", *denoisers]}
        self.whole: dict[str, list[Tokens]] = {name: [] for name in self.means}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.means}
        self.kept: dict[str, list[float]] = {name: [] for name in denoisers}

    @torch.no_grad()
    def add(self, pixels: Tensor, seed: int) -> None:
        """Look at one image (3, H, W)."""
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
        for name in self.denoisers:
            cosine = torch.cosine_similarity(_centred(found[name].patches), content, dim=-1)
            self.kept[name].append(float(cosine.mean()))

    def _all(self, images: Tensor, timed: bool) -> dict[str, Tokens]:
        start = _settled(self.backbone)
        found = {"raw": self.backbone(images).to(torch.float32)}
        ends = {"raw": _settled(self.backbone)}
        for name, denoise in self.denoisers.items():
            found[name] = treated(denoise, images, found["raw"]).to(torch.float32)
            if found[name].patches.shape != found["raw"].patches.shape:
                raise ConfigError(f"the denoiser {name!r} changed the shape of the tokens; it must keep it")
            ends[name] = _settled(self.backbone)
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
        seldom = 0 < images < min(0.25, 2 / len(self.whole["raw"]))
        norm = outliers.value >= config.outliers and outliers.value > outliers.high and not seldom
        kind = {(0, 0): "none", (1, 0): "position", (0, 1): "norm outliers", (1, 1): "both"}[int(position), int(norm)]
        treated = tuple(self._treated(name) for name in self.denoisers)
        return Diagnosis(
            backbone=self.backbone.name,
            kind=kind,
            remedy=_remedy(kind, share, config),
            best=_best(treated, config) if kind != "none" else None,
            strength=_strength(kind, share, config),
            shared=share.shared,
            own=share.own,
            outliers=outliers,
            outlier_images=images,
            layout=self._layout(share.artifact.cpu()),
            treated=treated,
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
        row = scores.position_r2(plain, torch.Generator().manual_seed(self.config.seed), self.config.draws)
        return Score(*(float(getattr(row, name) or 0) for name in ("value", "null", "null_low", "null_high")))

    def _treated(self, name: str) -> Treated:
        share = self.means[name].share(resamples=2)
        outliers = float(log_norm_outliers(self.whole[name], self.config.ratio).mean())
        kept = sum(self.kept[name]) / len(self.kept[name])
        return Treated(name, share.own.value, outliers, kept, 1000 * _median(self.seconds[name]))

    def _warnings(self, share: PositionShare) -> tuple[str, ...]:
        found = []
        if share.images < 8:
            found.append(f"only {share.images} images: ten or more give a safer answer")
        if 0 < self.config.share - share.own.value < 0.02:
            found.append("the position share is just below its threshold")
        return tuple(found)


def _present(score: Score, interval: tuple[float, float] | None, threshold: float) -> bool:
    low = score.value if interval is None else interval[0]
    return score.value >= threshold and low > max(score.high, 0)


def _remedy(kind: str, share: PositionShare, config: DoctorConfig) -> str:
    if kind in ("none", "norm outliers", "both"):
        return "none" if kind == "none" else "denoiser"
    if share.shared is None:
        return "per image"
    return "subtract" if _left(share.own, share.shared) < config.share else "per image"


def _left(own: Score, shared: Score) -> float:
    """The position share once the map that all images share is gone, of the variance that is left then."""
    return max(0.0, own.value - shared.value) / max(1 - shared.value, 1e-6)


def _strength(kind: str, share: PositionShare, config: DoctorConfig) -> float:
    """The least strength s, in steps of .05, that leaves (1 - s)^2 of G's variance below the threshold."""
    if kind != "position":
        return 0.0 if kind == "none" else 1.0
    # The upper end of the interval: enough also where the share was underestimated.
    size = min(share.own_interval[1] if share.own_interval else share.own.value, 0.999)
    if size <= config.share:
        return 1.0
    rest = config.share * (1 - size) / (size * (1 - config.share))
    return min(1.0, math.ceil(20 * (1 - rest**0.5) - 1e-9) / 20)


def _best(treated: Sequence[Treated], config: DoctorConfig) -> str | None:
    """Of the denoisers that leave no artifact, the one that resembles the content most."""
    enough = [each for each in treated if each.share < config.share and each.outliers < config.outliers]
    return max(enough, key=lambda each: each.kept).name if enough else None


def _centred(maps: Tensor) -> Tensor:
    return maps - maps.mean((1, 2), keepdim=True)


def _settled(backbone: Backbone) -> float:
    """The time when the device has done what it was told."""
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)
    return time.perf_counter()


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _told(score: Score, digits: int = 3) -> str:
    null = f"null {score.null:.{digits}f}, at most {score.high:.{digits}f}"
    return f"{score.value:.{digits}f} ({null})"
