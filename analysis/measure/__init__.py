"""Measure the artifacts of one or more backbones in one call, with nulls and intervals."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dvt.analysis.config import AnalyzeConfig
from dvt.analysis.measure.measurement import BackboneMeasurement
from dvt.analysis.measure.sample import choose_sample, name_of, read_pixels, spread, store_of
from dvt.analysis.measure.stopwatch import Stopwatch
from dvt.analysis.measure.types import Decompose, DenoiserLike
from dvt.analysis.metrics.scores import Row
from dvt.analysis.page.viewer import Arrays, Shown
from dvt.analysis.results import Report
from dvt.errors import ConfigError
from dvt.images import ImageLike, image_list
from dvt.progress import Progress, silent

if TYPE_CHECKING:
    from dvt.backbones import Backbone
    from dvt.store import FeatureStore

__all__ = ["AnalyzeConfig", "Decompose", "DenoiserLike", "ImageLike", "analyze"]

log = logging.getLogger(__name__)


def analyze(
    backbone: Backbone | Sequence[Backbone],
    images: Sequence[ImageLike] | Tensor,
    config: AnalyzeConfig | None = None,
    *,
    variants: Mapping[str, DenoiserLike] | Sequence[Mapping[str, DenoiserLike]] | None = None,
    semantic: FeatureStore | Decompose | Sequence[FeatureStore | Decompose | None] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure the artifacts in a backbone's tokens, after denoisers, and in the terms of its decomposition.

    Args:
        backbone: one, or several to compare; its device is used.
        images: paths, or images (3, H, W) in [0, 1], or an (N, 3, H, W) tensor.
        config: settings.
        variants: denoisers by name, each a function of Tokens at the backbone's own layer, or a backbone with a changed
            model of the same shapes; with several backbones, a sequence of one mapping per backbone.
        semantic: the source of the terms: a store that ``dvt denoise`` wrote (the sample is then chosen from its
            images, by path), or a function from an image (3, H, W) in [0, 1] to its terms
            {"semantic": (h, w, C), "artifact": ..., "residual": ...}, of which any may be missing; with several
            backbones, a sequence of one source per backbone.
        progress: called with (what, done, total) after every image.

    Returns:
        A table of metric x variant x layer x backbone with the data for its pictures; rows without a value give the
        reason.

    Raises:
        ImageError: no image is given, or none can be read. If only some cannot be read, they are left out and logged.
        ConfigError: settings, stores or names do not fit together.

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
    mappings = variants if variants is None or isinstance(variants, Mapping) else list(variants)
    mappings = _one_each("variants", mappings, len(backbones))
    sources = list(semantic) if isinstance(semantic, (list, tuple)) else semantic
    sources = _one_each("semantic", sources, len(backbones))
    sample = choose_sample(image_list(images), config, backbones, [store for store in map(store_of, sources) if store])
    watch, arrays, shown = Stopwatch(), Arrays(), spread(len(sample), config.shown)
    rows: list[Row] = []
    maps: list[Shown] = []
    about: list[dict[str, Any]] = []
    for each, mapping, source in zip(backbones, mappings, sources, strict=True):
        label, report_progress = _label(each, about), progress or silent
        measured = BackboneMeasurement(each, label, config, dict(mapping or {}), source, watch, report_progress)
        measured.read(sample, set(shown))
        rows += measured.rows()
        maps += measured.shown
        measured.fill(arrays)
        about.append(measured.about())
    for number in shown:
        arrays.add_jpeg(number, read_pixels(sample[number]))
    arrays.add_maps(maps)
    names = [name_of(each, number) for number, each in enumerate(sample)]
    seconds = watch.split(time.perf_counter() - start)
    report = Report(rows, names, about, seconds, asdict(config), arrays.index, arrays.arrays)
    log.info("everything but the backbone took %.2f of its time", report.share)
    return report


def _one_each(name: str, given: Any, count: int) -> list[Any]:
    """Make a list of one entry per backbone of None, a single entry or a sequence; raise if the number differs."""
    listed = given if isinstance(given, list) else [given]
    if len(listed) == 1 and listed[0] is None:
        listed = listed * count
    if len(listed) != count:
        raise ConfigError(f"{name} must be one for each backbone, in a sequence: got {len(listed)}, not {count}")
    return listed


def _label(backbone: Backbone, about: Sequence[dict[str, Any]]) -> str:
    taken = {each["label"] for each in about}
    names = (backbone.name if number == 1 else f"{backbone.name} ({number})" for number in range(1, len(about) + 2))
    return next(name for name in names if name not in taken)
