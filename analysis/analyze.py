"""One call that measures the artifacts of one or more backbones, with nulls and intervals."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

from dvt.analysis.metrics import artifacts as metrics
from dvt.analysis.metrics import scores
from dvt.analysis.metrics.positions import PositionMeans, PositionShare, torus_windows
from dvt.analysis.page.viewer import Arrays, Shown
from dvt.analysis.results import Report
from dvt.errors import ConfigError, ImageError
from dvt.grids import Size
from dvt.images import load_image
from dvt.progress import Progress
from dvt.tokens import Tokens
from dvt.views import resize

if TYPE_CHECKING:
    from dvt.backbones import Backbone
    from dvt.store import FeatureStore

log = logging.getLogger(__name__)

#: A function of the raw tokens, or another backbone of the same images.
Denoise: TypeAlias = "Callable[[Tokens], Tokens] | Backbone"
Decompose = Callable[[Tensor], Mapping[str, Tensor]]
Source: TypeAlias = "FeatureStore | Decompose | None"
ImageLike = str | Path | Tensor

_TERMS = ("semantic", "artifact", "residual")
_KEEP_BYTES = 2 << 30
# A decomposition for each window is dear: fewer windows of fewer images tell how stable F is.
_FIELD_SHIFTS = ((1, 1), (2, 3))
_FIELD_SHIFT_IMAGES = 2


@dataclass(frozen=True)
class AnalyzeConfig:
    """What an analysis computes.

    Args:
        images: the sample: at most so many of the images given, evenly spread over them.
        layers: "all", or block indices with -1 for the final one, beside the backbone's own layer, which is always
            measured. All layers come from one forward pass.
        layer_images: images of the sample that other layers are measured on; their position share and shift
            stability come from half of the images below.
        share_images: images that the position share and the map of the artifact come from.
        windows: torus windows of each of them, an even number.
        shift_images: images that shift stability comes from, six windows each.
        mic_images: images that MIC is computed on (a quarter of them for other layers).
        mic_channels: channels that MIC scores for each axis, those with most information on fixed cuts; None all.
        draws: of the nulls of position R2, position share, grid peak and blank correlation, at least 2; the others
            have one an image.
        shown: images whose token maps are kept for pictures.
        batch: images per forward pass.
        seed: of windows, nulls and bootstraps.
    """

    images: int = 120
    layers: Literal["all"] | tuple[int, ...] = ()
    layer_images: int = 12
    share_images: int = 24
    windows: int = 16
    shift_images: int = 16
    mic_images: int = 8
    mic_channels: int | None = 4
    draws: int = 5
    shown: int = 12
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "layer_images", "share_images", "shift_images", "mic_images", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.windows < 2 or self.windows % 2 or self.draws < 2 or self.shown < 0:
            raise ConfigError(
                f"windows must be even, draws at least 2 and shown not negative, got {self.windows}, {self.draws} and "
                f"{self.shown}"
            )
        if self.mic_channels is not None and self.mic_channels < 1:
            raise ConfigError(f"mic_channels must be 1 or more, or None for all, got {self.mic_channels}")
        if isinstance(self.layers, str) and self.layers != "all":
            raise ConfigError(f"layers must be 'all' or block indices, got {self.layers!r}")


def analyze(
    backbone: Backbone | Sequence[Backbone],
    images: Sequence[ImageLike] | Tensor,
    config: AnalyzeConfig | None = None,
    *,
    variants: Mapping[str, Denoise] | Sequence[Mapping[str, Denoise]] | None = None,
    semantic: FeatureStore | Decompose | Sequence[FeatureStore | Decompose | None] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure the artifacts of a backbone, of what denoisers make of it, and of its decomposition, side by side.

    Args:
        backbone: one, or several to compare; its device is used.
        images: paths, or images (3, H, W) in [0, 1]; an (N, 3, H, W) tensor too.
        config: settings.
        variants: denoisers by name, each from Tokens to Tokens at the backbone's own layer, or a backbone of the same
            shapes whose inside was changed; with several backbones a sequence of such mappings, one each.
        semantic: where the terms come from: a store that ``dvt denoise`` wrote (the sample is then taken from the
            images that it holds, known by their paths), or a function from an image (3, H, W) in [0, 1] to its terms
            {"semantic": (h, w, C), "artifact": ..., "residual": ...}, of which any may be missing; with several
            backbones a sequence, one each.
        progress: called with (what, done, total) after every image.

    Returns:
        A table of metric x variant x layer x backbone with the data for its pictures; rows that cannot be had say
        why.

    Raises:
        ImageError: no image is given, or one cannot be read.
        ConfigError: settings, stores or names that do not fit.

    >>> import dvt
    >>> from dvt.analysis import AnalyzeConfig, analyze
    >>> tiny = dvt.load_backbone("test_vit", pretrained=False)
    >>> config = AnalyzeConfig(share_images=2, windows=2, shift_images=1, mic_images=1)
    >>> report = analyze(tiny, torch.rand(3, 3, 160, 200), config)
    >>> report.get("position_r2").images
    3
    """
    config, start = config or AnalyzeConfig(), time.perf_counter()
    backbones = [backbone] if isinstance(backbone, torch.nn.Module) else list(backbone)
    if not backbones:
        raise ConfigError("no backbone was given; analyze needs at least one")
    mappings = [variants] if variants is None or isinstance(variants, Mapping) else list(variants)
    sources = cast("list[Source]", list(semantic) if isinstance(semantic, (list, tuple)) else [semantic])
    for name, given in (("variants", mappings), ("semantic", sources)):
        if len(given) == 1 and given[0] is None:
            given *= len(backbones)
        if len(given) != len(backbones):
            raise ConfigError(
                f"{name} must be one for each backbone, in a sequence: got {len(given)}, not {len(backbones)}"
            )
    sample = _sample(list(images), config, backbones, [store for store in map(_store, sources) if store is not None])
    watch, arrays, shown = _Watch(), Arrays(), spread(len(sample), config.shown)
    rows: list[scores.Row] = []
    maps: list[Shown] = []
    about: list[dict[str, Any]] = []
    for each, mapping, source in zip(backbones, mappings, sources, strict=True):
        run = _Run(each, _label(each, about), config, dict(mapping or {}), source, watch, progress or quiet)
        run.read(sample, set(shown))
        rows += run.rows()
        maps += run.shown
        run.fill(arrays)
        about.append(run.about())
    for number in shown:
        arrays.add_jpeg(number, read_pixels(sample[number]))
    arrays.add_maps(maps)
    total = time.perf_counter() - start
    seconds = {**watch.seconds, "total": total, "metrics": total - sum(watch.seconds.values())}
    report = Report(
        rows,
        [_name(each, i) for i, each in enumerate(sample)],
        about,
        seconds,
        asdict(config),
        arrays.index,
        arrays.arrays,
    )
    log.info("everything but the backbone took %.2f of its time", report.share)
    return report


class _Watch:
    """Seconds in the backbone, in decompositions besides it, and in denoisers."""

    def __init__(self) -> None:
        self.seconds = {"forward": 0.0, "fields": 0.0, "denoisers": 0.0}

    @contextmanager
    def measuring(self, what: str, device: torch.device) -> Iterator[None]:
        inner = sum(self.seconds.values())
        start = time.perf_counter()
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds[what] += time.perf_counter() - start - (sum(self.seconds.values()) - inner)

    @contextmanager
    def watching(self, backbone: Backbone) -> Iterator[None]:
        """Count what a user's function does with the backbone, its views, as the backbone's time."""
        entered: list[Any] = []

        def before(*_: object) -> None:
            entered.append(self.measuring("forward", backbone.device))
            entered[-1].__enter__()

        def after(*_: object) -> None:
            entered.pop().__exit__(None, None, None)

        hooks = [backbone.register_forward_pre_hook(before), backbone.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass
class _Kept:
    """What is kept of one layer and variant."""

    tokens: list[Tokens] = field(default_factory=list)
    means: PositionMeans | None = None
    shifts: list[metrics.ShiftStability] = field(default_factory=list)
    greys: list[Tensor] = field(default_factory=list)


class _Run:
    """One backbone's analysis: reads every image once, then scores."""

    def __init__(
        self,
        backbone: Backbone,
        label: str,
        config: AnalyzeConfig,
        variants: dict[str, Denoise],
        source: FeatureStore | Decompose | None,
        watch: _Watch,
        progress: Progress,
    ) -> None:
        self.backbone, self.label, self.config, self.watch, self.progress = backbone, label, config, watch, progress
        if taken := {"raw", *_TERMS} & set(variants):
            raise ConfigError(f"a variant cannot be called {sorted(taken)[0]!r}; these names stand for the terms")
        self.variants = variants
        self.store = _store(source)
        self.places = _places(self.store) if self.store else {}
        self.decompose = cast("Decompose | None", source if self.store is None else None)
        self.layers = _layers(backbone, config)
        self.kept: dict[tuple[int, str], _Kept] = {}
        self.shares: dict[tuple[int, str], PositionShare] = {}
        self.shown: list[Shown] = []

    def about(self) -> dict[str, Any]:
        each = self.backbone
        return {
            "label": self.label,
            "name": each.name,
            "weights_sha256": each.weights_sha256,
            "layer": each.layer,
            "patch_size": list(each.patch_size),
            "image_size": list(each.image_size),
            "feature_dim": each.feature_dim,
        }

    # -- reading

    @torch.no_grad()
    def read(self, sample: Sequence[ImageLike], shown: set[int]) -> None:
        """All forward passes, one image after the other."""
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

    def _at(self, layer: int, variant: str) -> _Kept:
        return self.kept.setdefault((layer, variant), _Kept())

    def _variants(self, images: Tensor, layers: Sequence[int]) -> dict[tuple[int, str], Tokens]:
        """Tokens of some images at some layers, and of every denoiser at the backbone's own."""
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

    def _share_rows(self, layer: int, variant: str, kept: _Kept) -> list[scores.Row]:
        if kept.means is None:
            reason = "1 by definition" if variant == "artifact" else "would need a decomposition of every window"
            return [scores.missing("position_share", reason)]
        self.shares[layer, variant] = kept.means.share()
        return [scores.share_row(self.shares[layer, variant])]

    def _static_rows(self, layer: int, kept: _Kept, generator: torch.Generator) -> list[scores.Row]:
        config = self.config
        mic_images = config.mic_images if layer == self.layers[0] else max(1, config.mic_images // 4)
        steps = [round(p / s) for p, s in zip(self.backbone.patch_size, self.backbone.stride, strict=True)]
        return scores.static_rows(
            kept.tokens, generator, config.draws, mic_images, config.mic_channels, period=max(2, *steps)
        )

    def _moving_rows(self, layer: int, variant: str, kept: _Kept, generator: torch.Generator) -> list[scores.Row]:
        reason = "a store has no tokens of other windows; hand in a function instead"
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
        """Hand over the data of the pictures."""
        for (layer, variant), share in self.shares.items():
            arrays.add_position(self.label, layer, variant, share.artifact)
        for layer in self.layers:
            tokens = {variant: kept.tokens for (at, variant), kept in self.kept.items() if at == layer and kept.tokens}
            arrays.add_norms(self.label, layer, tokens)


def _layers(backbone: Backbone, config: AnalyzeConfig) -> list[int]:
    """The backbone's own layer first, then the others; the last block's own output is named by its index."""
    if config.layers != "all":
        return list(dict.fromkeys([backbone.layer, *config.layers]))
    if backbone.num_layers is None:
        log.warning("%s is a wrapped model: only its own layer is known", backbone.name)
        return [backbone.layer]
    return list(dict.fromkeys([backbone.layer, *range(backbone.num_layers), -1]))


def _sample(
    images: list[ImageLike], config: AnalyzeConfig, backbones: Sequence[Backbone], stores: Sequence[FeatureStore]
) -> list[ImageLike]:
    """Evenly spread images, of those that all stores hold, and no more than memory is meant for."""
    for store in stores:
        made = {each.weights_sha256 for each in backbones}
        if store.job.weights_sha256 not in made:
            raise ConfigError(f"the store {str(store.path)!r} was made by {store.job.backbone} with other weights")
        held = _places(store)
        images = [each for each in images if not isinstance(each, Tensor) and os.path.realpath(str(each)) in held]
        if not images:
            raise ConfigError(f"the store {str(store.path)!r} holds none of the images; give the images it was made of")
    if not images:
        raise ImageError("no image was given; analyze needs at least one")
    height, width = max((each.grid(each.image_size) for each in backbones), key=lambda grid: grid[0] * grid[1])
    one = 4 * height * width * max(each.feature_dim for each in backbones) * 4  # float32, about four variants
    count = min(config.images, max(2, _KEEP_BYTES // one))
    if count < min(config.images, len(images)):
        log.warning("%d images are sampled, not %d: more tokens would take over 2 GB", count, config.images)
    return [images[i] for i in spread(len(images), count)]


def _store(source: FeatureStore | Decompose | None) -> FeatureStore | None:
    from dvt.store import FeatureStore

    return source if isinstance(source, FeatureStore) else None


def _places(store: FeatureStore) -> dict[str, int]:
    return {os.path.realpath(path): number for number, path in enumerate(store.images)}


def spread(count: int, wanted: int) -> list[int]:
    """Indices of at most `wanted` of `count` things, evenly spread."""
    if wanted >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def read_pixels(image: ImageLike) -> Tensor:
    return image if isinstance(image, Tensor) else load_image(image)


def _name(image: ImageLike, number: int) -> str:
    return f"image {number + 1}" if isinstance(image, Tensor) else str(image)


def _label(backbone: Backbone, about: Sequence[dict[str, Any]]) -> str:
    taken = {each["label"] for each in about}
    names = (backbone.name if number == 1 else f"{backbone.name} ({number})" for number in range(1, len(about) + 2))
    return next(name for name in names if name not in taken)


def _covering(pixels: Tensor, size: Size, patch: Size) -> Size:
    """The size to resize an image to, so that windows shifted by up to 4 patches fit into it."""
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


def treated(denoise: Denoise, images: Tensor, raw: Tokens) -> Tokens:
    """Tokens of images (B, 3, H, W) as a denoiser makes them of the raw ones, or another backbone by itself."""
    from dvt.backbones import Backbone  # with timm, which nothing else here needs

    if not isinstance(denoise, Backbone):
        return denoise(raw)
    with torch.no_grad():
        return denoise(images)


def quiet(what: str, done: int, total: int) -> None:
    pass
