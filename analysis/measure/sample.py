"""Choose and read the images of an analysis, and find them in a store."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dvt.analysis.config import AnalyzeConfig
from dvt.analysis.measure.types import TermSource
from dvt.errors import ConfigError, ImageError
from dvt.images import ImageLike, read_image, usable_images

if TYPE_CHECKING:
    from dvt.backbones import Backbone
    from dvt.store import FeatureStore

log = logging.getLogger(__name__)

_KEEP_BYTES = 2 << 30


def choose_sample(
    images: list[ImageLike], config: AnalyzeConfig, backbones: Sequence[Backbone], stores: Sequence[FeatureStore]
) -> list[ImageLike]:
    """Choose evenly spread images among those that all stores hold, at most as many as 2 GB of tokens allow."""
    for store in stores:
        made = {each.weights_sha256 for each in backbones}
        if store.job.weights_sha256 not in made:
            raise ConfigError(f"the store {str(store.path)!r} was made by {store.job.backbone} with other weights")
        held = places_of(store)
        images = [each for each in images if isinstance(each, (str, Path)) and os.path.realpath(str(each)) in held]
        if not images:
            raise ConfigError(f"the store {str(store.path)!r} holds none of the images; give those it was made from")
    if not images:
        raise ImageError("no image was given; analyze needs at least one")
    height, width = max((each.grid(each.image_size) for each in backbones), key=lambda grid: grid[0] * grid[1])
    one = 4 * height * width * max(each.feature_dim for each in backbones) * 4  # float32, about four variants
    count = min(config.images, max(2, _KEEP_BYTES // one))
    if count < min(config.images, len(images)):
        log.warning("%d images are sampled, not %d: more tokens would take over 2 GB", count, config.images)
    sample = [images[i] for i in spread(len(images), count)]
    return [sample[i] for i in usable_images(sample, *(each.input_size for each in backbones))]


def store_of(source: TermSource) -> FeatureStore | None:
    from dvt.store import FeatureStore

    return source if isinstance(source, FeatureStore) else None


def places_of(store: FeatureStore) -> dict[str, int]:
    return {os.path.realpath(path): number for number, path in enumerate(store.images)}


def spread(count: int, wanted: int) -> list[int]:
    """List at most `wanted` of the indices 0 ... count - 1, evenly spread."""
    if wanted >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def read_pixels(image: ImageLike) -> Tensor:
    return read_image(image)


def name_of(image: ImageLike, number: int) -> str:
    return str(image) if isinstance(image, (str, Path)) else f"image {number + 1}"
