"""Run a probe on labelled data with raw features, variants of them and baselines, and make a table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvt import grids
from dvt.analysis.config import TARGETS, ProbeConfig
from dvt.analysis.probes.classification import KnnClassification, LinearClassification
from dvt.analysis.probes.correspondence import Correspondence, WarpConfig, correspondence
from dvt.analysis.probes.crops import cached_crops
from dvt.analysis.probes.datasets import LabelledData, check_sizes, open_data, pick, present_ids
from dvt.analysis.probes.depth import DepthProbe, kept_depth
from dvt.analysis.probes.discovery import TRIVIAL_MARGINS, Lost, TokenCut
from dvt.analysis.probes.features import Lazy, default_cache, held
from dvt.analysis.probes.layouts import IGNORE, Example, some
from dvt.analysis.probes.probe import Centres, Probe
from dvt.analysis.probes.segmentation import KnnSegmentation, LinearSegmentation
from dvt.analysis.probes.table import ProbeReport, make_rows
from dvt.analysis.probes.variants import RAW, UPSAMPLED, RowFeatures, Variant, further_rows, row_names
from dvt.backbones import Backbone
from dvt.errors import ConfigError, DataError
from dvt.grids import boxes_from_pixels
from dvt.images import find_images, image_size, load_image
from dvt.progress import Progress
from dvt.text import counted
from dvt.tokens import Tokens
from dvt.views import ViewConfig

log = logging.getLogger(__name__)

_LEGENDS = {
    "discovery": f"whole: the whole image as the box; centred: the best of {len(TRIVIAL_MARGINS)} centred boxes, "
    "chosen by its CorLoc on these images",
    "correspondence": "position PCK is the score of matching to the same place of the grid, chance PCK that of random "
    "matches",
}


def prepare(config: ProbeConfig, progress: Progress | None = None) -> LabelledData:
    """Prepare the data for a probe: keep the splits "train" and "test", limit them, and cut crops if the protocol does.

    A store given to :func:`run_probe` must hold the files of these examples. "train" is empty if the task needs no
    training (discovery).
    """
    return _opened(config, progress).counted()


def _opened(config: ProbeConfig, progress: Progress | None) -> LabelledData:
    """Prepare the data, without the number of classes where it stands in the labels alone."""
    if config.task not in TARGETS:
        raise ConfigError(f"{config.task} takes any images; there are no labels to prepare")
    target = TARGETS[config.task]
    data = open_data(
        config.data,
        target,
        layout=config.layout,
        ignore=config.ignore,
        num_classes=config.classes,
        depth_scale=config.depth_scale,
        masks=config.masks,
        check=False,
    )
    name: str = config.evaluate or next((each for each in ("all", "test") if each in data.splits), "val")
    if name not in data.splits:
        raise DataError(f"{str(data.root)!r} has no split {name}; it has {', '.join(data.splits)}")
    notes = data.notes if name in ("test", "all") else (*data.notes, f"scored on the split {name}")
    splits = {"train": data.splits.get("train", ()), "test": data.splits[name]}
    data = replace(data, splits=splits, notes=notes)
    data = check_sizes(data.limited(train=config.train_images, test=config.test_images))
    return data if config.protocol == "frames" else cached_crops(data.counted(), _cache(config), config.seed, progress)


def run_probe(
    config: ProbeConfig,
    backbone: Backbone,
    variants: Mapping[str, Variant] | None = None,
    progress: Progress | None = None,
    layers: Sequence[int] = (),
) -> ProbeReport:
    """Train and score one probe on each variant of the features.

    Args:
        config: the probe and its data.
        backbone: computes the raw features, once; they are kept in the cache.
        variants: further rows by name: a denoiser as a function of tokens, a store, another backbone.
        progress: called with (what, done, total).
        layers: several layers, the backbone's own last, read in one forward pass: each other one is a row, and all of
            them side by side, as one head of several layers takes them, another.

    Raises:
        DataError: the data are incomplete or contradict themselves, or a store lacks an image.
        ConfigError: two rows have one name, or a row is not possible for this task.
    """
    variants = variants or {}
    further = further_rows(backbone, layers)
    names = row_names((*further, *config.baselines), variants)
    if config.task == "correspondence":
        if further:
            raise ConfigError("correspondence compares the tokens of one layer; give one --layer")
        return _run_correspondence(config, backbone, names, variants, progress)
    data, examples, truth = _read(config, progress)
    count = len(data.splits["train"])
    train, test = _parts(truth, count)
    notes = [*data.notes, *_notes(train, test, data)]
    source = _row_features(config, backbone, [example.image for example in examples], count, progress, layers)

    probes: dict[str, list[Probe]] = {}
    maps: dict[str, Sequence[Tensor]] = {}
    centres: dict[str, Centres] = {}
    statistics: dict[str, Tensor] = {}
    rows = [(name + UPSAMPLED * (k > 1), name, k) for name in names for k in sorted({1, config.upsample})]
    for number, (name, row, factor) in enumerate(rows):
        learnt, maps[name] = _parts(source.maps(row, variants.get(row), factor), count)
        centres[name] = source.centres(variants.get(row)) if factor == 1 else grids.grid_centres
        probes[name] = _fit(config, data.num_classes, learnt, train, centres[name])
        statistics[name] = _statistics(probes[name], maps[name], test)
        if config.transfer and name != RAW:
            if maps[name][0].shape[-1] == maps[RAW][0].shape[-1]:
                for of, on in ((RAW, name), (name, RAW)):
                    moved = [each.at(centres[on]) for each in probes[of]]
                    statistics[f"{of} probe on {on}"] = _statistics(moved, maps[on], test)
            else:
                notes.append(f"no transfer between {RAW} and {name}: they have different numbers of channels")
        if name != RAW:
            del maps[name]
        if progress:
            progress("probes", number + 1, len(rows))
    described = {"root": str(data.root), "layout": data.layout, "protocol": config.protocol, "train": count}
    described |= {"test": len(examples) - count, "classes": data.num_classes}
    report = _report(config, probes[RAW][0], statistics, described, notes)
    return replace(report, probes={name: each[0] for name, each in probes.items()})


def _read(config: ProbeConfig, progress: Progress | None) -> tuple[LabelledData, list[Example], Sequence[Tensor]]:
    """Read the examples, for training first, and their targets, each once if they fit into memory."""
    data = _opened(config, progress)
    examples = [*data.splits["train"], *data.splits["test"]]
    count = len(data.splits["train"])
    truth = held(Lazy(len(examples), lambda i: _target(data, examples[i], config, scored=i >= count)))
    return data.counted(truth), examples, truth


def _run_correspondence(
    config: ProbeConfig,
    backbone: Backbone,
    names: Sequence[str],
    variants: Mapping[str, Variant],
    progress: Progress | None,
) -> ProbeReport:
    """Match images with their warped views; this needs no labels."""
    files = pick(find_images([config.data]), config.test_images)
    source = _row_features(config, backbone, files, 0, progress)
    images = Lazy(len(files), lambda i: load_image(files[i]).to(backbone.device))
    ways = {n: source.function(n, variants.get(n)) for n in names if not isinstance(variants.get(n), Backbone)}
    passes: dict[str, tuple[Backbone, Mapping[str, Callable[[Tokens], Tokens]]]] = {RAW: (backbone, ways)}
    passes |= {name: (other, {}) for name, other in variants.items() if isinstance(other, Backbone)}
    draws: dict[str, list[Tensor]] = {name: [] for name in names}
    for k in range(config.seeds):
        warps = WarpConfig(seed=config.seed + k)
        for row, (model, own) in passes.items():
            report = progress and _counted(progress, k * len(files), config.seeds * len(files))
            probe = Correspondence(centres=model.grid_centres)
            found = correspondence(model, images, model.input_size, warps, own, probe, report)
            for name in own or (row,):
                draws[name].append(found[name if own else RAW])
    described = {"root": str(config.data), "test": len(files)}
    return _report(config, Correspondence(), {n: torch.stack(draws[n]) for n in names}, described, [])


def _counted(progress: Progress, before: int, total: int) -> Progress:
    return lambda what, done, _: progress(what, before + done, total)


def _report(
    config: ProbeConfig, probe: Probe, statistics: Mapping[str, Tensor], described: Mapping[str, Any], notes: list[str]
) -> ProbeReport:
    if not described.get("train") and (without := {"subtract", "linear-removal"} & set(statistics)):
        notes = [*notes, f"learnt without labels from the scored images themselves: {', '.join(sorted(without))}"]
    if config.task in _LEGENDS:
        notes = [*notes, _LEGENDS[config.task]]
    if not probe.seeded:
        notes = [*notes, "this probe draws no random numbers, so there is no interval over seeds"]
    compare = partial(make_rows, statistics, probe.summarise, probe.metric, seed=config.seed)
    return ProbeReport(config.task, probe.metric, RAW, compare(RAW), described, _plain(config), tuple(notes), compare)


def _row_features(
    config: ProbeConfig,
    backbone: Backbone,
    images: Sequence[Path],
    train: int,
    progress: Progress | None,
    layers: Sequence[int] = (),
) -> RowFeatures:
    views = ViewConfig(count=config.views, seed=config.seed)
    if config.class_token and (not backbone.num_prefix_tokens or config.position == "concatenate"):
        raise ConfigError(
            f"{backbone.name} has no class token to append: leave class_token out"
            if not backbone.num_prefix_tokens
            else "a class token cannot be appended beside position features; choose one of class_token and position"
        )
    given = (config.position, config.seed, progress, layers, config.class_token)
    return RowFeatures(backbone, images, train, _cache(config), views, *given)


def _target(data: LabelledData, example: Example, config: ProbeConfig, scored: bool) -> Tensor:
    truth = data.read(example)
    if data.target == "depth":
        return kept_depth(truth, config.min_depth, config.max_depth, config.depth_crop if scored else "none")
    return boxes_from_pixels(truth, image_size(example.image)) if data.target == "boxes" else truth


def make_probe(config: ProbeConfig, num_classes: int, seed: int = 0) -> Probe:
    """Make the probe that a configuration describes."""
    head = config.head.with_seed(seed)
    if config.task == "segmentation":
        return LinearSegmentation(num_classes, head)
    if config.task == "knn":
        return KnnSegmentation(num_classes, config.neighbours)
    if config.task == "depth":
        return DepthProbe(config.bins, head)
    if config.task == "discovery":
        return (Lost if config.method == "lost" else TokenCut)(centred=config.centred)
    if config.task == "classification":
        return LinearClassification(num_classes)
    return KnnClassification(num_classes, config.neighbours)


def _fit(
    config: ProbeConfig, num_classes: int, maps: Sequence[Tensor], truth: Sequence[Tensor], centres: Centres
) -> list[Probe]:
    """Fit one probe per seed, or a single one if it draws no random numbers."""
    probes = [make_probe(config, num_classes, config.seed + k).at(centres) for k in range(config.seeds)]
    return [probe.fit(maps, truth) for probe in (probes if probes[0].seeded else probes[:1])]


def _statistics(probes: Sequence[Probe], maps: Sequence[Tensor], truth: Sequence[Tensor]) -> Tensor:
    """Compute the statistics of each seed's probe: (seeds, images, ...)."""
    return torch.stack([probe.sufficient_statistics(maps, truth) for probe in probes])


def _parts(items: Sequence[Tensor], count: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Part the first `count` items from the rest, without reading any."""
    return Lazy(count, lambda i: items[i]), Lazy(len(items) - count, lambda i: items[count + i])


def _notes(train: Sequence[Tensor], test: Sequence[Tensor], data: LabelledData) -> list[str]:
    """List properties of the targets that are allowed but affect the scores, such as missing classes."""
    if data.target == "boxes":
        return []
    if data.target == "depth":
        return _void_notes(train, test, lambda truth: bool((truth > 0).any()), "depth")
    return _class_notes(train, test, data)


def _class_notes(train: Sequence[Tensor], test: Sequence[Tensor], data: LabelledData) -> list[str]:
    learnt, scored = (_present(truth, data.num_classes) for truth in (train, test))
    names = [f"{k} ({data.classes[k]})" if k < len(data.classes) else str(k) for k in range(data.num_classes)]
    unlearnt = [names[k] for k in range(data.num_classes) if scored[k] and not learnt[k]]
    unscored = [names[k] for k in range(data.num_classes) if not scored[k]]
    notes = []
    if unlearnt:
        notes.append(f"classes that only scored images have, which no probe can learn, count as 0: {some(unlearnt)}")
    if unscored:
        notes.append(f"classes that no scored image has are left out of the means: {some(unscored)}")
    return notes + _void_notes(train, test, lambda truth: bool((truth != IGNORE).any()), "labels")


def _present(truth: Sequence[Tensor], num_classes: int) -> Tensor:
    seen = torch.zeros(num_classes + 1, dtype=torch.bool)
    for i in range(len(truth)):
        seen[[each for each in present_ids(truth[i]) if each < num_classes]] = True  # IGNORE, -1, is the last entry
    return seen[:-1]


def _void_notes(
    train: Sequence[Tensor], test: Sequence[Tensor], useful: Callable[[Tensor], bool], what: str
) -> list[str]:
    notes = []
    for name, truth in (("training", train), ("scored", test)):
        void = sum(not useful(truth[i]) for i in range(len(truth)))
        if len(truth) == void:
            raise DataError(f"no {what} in {counted(len(truth), f'{name} image')}: all pixels are left out or 0")
        if void:
            notes.append(f"no {what} in {void} of {counted(len(truth), f'{name} image')}, which do not count")
    return notes


def _plain(config: ProbeConfig) -> dict[str, Any]:
    values = asdict(config)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _cache(config: ProbeConfig) -> Path:
    """Find the folder that caches features and crops."""
    return Path(config.cache) if config.cache else default_cache()
