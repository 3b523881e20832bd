"""Make the interactive page of a feature store: its photographs and terms to point at, and nothing measured."""

from __future__ import annotations

import logging
from html import escape
from pathlib import Path
from typing import Any

import torch

from dvt.analysis.measure.sample import spread
from dvt.analysis.page import sections
from dvt.analysis.page.report import PageWords, render
from dvt.analysis.page.viewer import Arrays, Shown
from dvt.analysis.results import Report
from dvt.backbones.load import overlapping_patches
from dvt.errors import ConfigError, ImageError
from dvt.images import load_image
from dvt.progress import Progress, silent
from dvt.store import FeatureStore
from dvt.text import counted
from dvt.tokens import Tokens

log = logging.getLogger(__name__)


def store_page(path: str | Path, images: int = 12, progress: Progress | None = None) -> str:
    """Write the page of a store as HTML: similarity to any patch, PCA colours, norms, a strength, several images.

    Args:
        path: a folder of shards, or one shard.
        images: number of images at most, evenly spread. The page stays below 8 MB and says what it left out.
        progress: called with (what, done, total) after every image.

    Raises:
        StoreError: it is not a store, or damaged.
        ConfigError: `images` is less than 1.
    """
    if images < 1:
        raise ConfigError(f"images is {images}; it must be 1 or more")
    store, arrays = FeatureStore(path), Arrays()
    chosen, shown = spread(len(store), images), []
    held: dict[str, list[Tokens]] = {name: [] for name in store.terms}
    label, layer, missing = store.job.backbone, store.job.layer, 0
    for number, index in enumerate(chosen):
        for name in store.terms:
            tokens = torch.from_numpy(store.read(index, name)).float()
            held[name].append(Tokens.of(tokens))
            shown.append(Shown(number, label, layer, name, tokens))
        pixels = _photograph(store.images[index])
        missing += pixels is None
        arrays.add_jpeg(number, _grey(store, index) if pixels is None else pixels)
        (progress or silent)("images", number + 1, len(chosen))
    if missing:
        log.warning("%d of %s not found where the store says, shown grey", missing, counted(len(chosen), "photograph"))
    arrays.add_maps(shown)
    arrays.add_norms(label, layer, held)
    about = {"label": label, "layer": layer, "feature_dim": int(held[store.terms[0]][0].feature_dim)}
    about |= _patches(store)
    names = [store.images[index] for index in chosen]
    report = Report([], names, [about], {}, {}, arrays.index, arrays.arrays)
    return render(report, _words(store, len(chosen)))


def _words(store: FeatureStore, shown: int) -> PageWords:
    *others, last = map(sections.label, store.terms)
    terms = f"{', '.join(others)} and {last}" if others else last
    images = f"{shown} of {len(store)} images" if shown < len(store) else counted(shown, "image")
    lead = f"{images} of a feature store, with {terms}. Nothing is measured here."
    return PageWords("Features of " + store.job.backbone, f'<p class="lead">{escape(lead)}</p>')


def _patches(store: FeatureStore) -> dict[str, Any]:
    """Describe the patches of a store if they overlap."""
    found = overlapping_patches(store.job, store.grids[0])
    return {} if found is None else {"patch_size": found[0], "stride": found[1]}


def _photograph(path: str) -> torch.Tensor | None:
    try:
        return load_image(path)
    except ImageError:
        return None


def _grey(store: FeatureStore, index: int) -> torch.Tensor:
    """Make a grey picture in the proportions of an image whose file is gone."""
    height, width = store.sizes[index]
    scale = 240 / max(height, width)
    return torch.full((3, max(1, round(height * scale)), max(1, round(width * scale))), 0.5)
