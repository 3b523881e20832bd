"""Cut labelled data once into random squares, so that position predicts less: the layout-decorrelated protocol."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dvt.analysis.probes.datasets import LabelledData, open_data
from dvt.analysis.probes.layouts import IGNORE, Example
from dvt.errors import ConfigError, DataError
from dvt.files import replaced_folder
from dvt.grids import Size
from dvt.images import load_image

log = logging.getLogger(__name__)

CROP_SHARE = (0.5, 0.65)
_FOLDERS = {"labels": "annotations", "depth": "depth"}
_TRIES = 20


def draw_square(
    size: Size, generator: torch.Generator, share: tuple[float, float] = CROP_SHARE
) -> tuple[int, int, int]:
    """Draw a random square inside an image: (top, left, side) in pixels.

    Args:
        size: (H, W) of the image.
        generator: draws side and place uniformly.
        share: smallest and largest side as a share of the image's height; the side is at most the image's width.
    """
    if not 0 < share[0] <= share[1] <= 1:
        raise ConfigError(f"share must satisfy 0 < smallest <= largest <= 1, got {share}")
    scale, top, left = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    side = max(1, min(round(size[0] * (share[0] + scale * (share[1] - share[0]))), *size))
    return round(top * (size[0] - side)), round(left * (size[1] - side)), side


def write_crops(
    data: LabelledData,
    folder: str | Path,
    generator: torch.Generator,
    share: tuple[float, float] = CROP_SHARE,
    progress: Callable[[str, int, int], None] | None = None,
) -> LabelledData:
    """Write one random square of every image and its label or depth map, as a data set in the plain folder layout.

    A square without any label or measurement is drawn again, up to 20 times. Images are written as PNG, without loss.
    The crops are files like any others: `dvt denoise FOLDER/images` makes their stores.

    Args:
        data: labelled data with label or depth maps.
        folder: output folder; it must be missing or empty.
        generator: draws all squares, in the order of splits and names.

    Returns:
        The new data set, whose label ids are class indices.
    """
    folder = Path(folder)
    if data.target not in _FOLDERS:
        raise ConfigError(f"only labels and depth can be cut with their images, not {data.target}")
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"the folder {str(folder)!r} is not empty; give a new one for the crops")
    total, done = sum(len(part) for part in data.splits.values()), 0
    for split, examples in data.splits.items():
        for example in examples:
            _cut(data, example, folder, split, generator, share)
            done += 1
            if progress:
                progress("crops", done, total)
    return _opened(data, folder)


def cached_crops(
    data: LabelledData, cache: Path, seed: int = 0, progress: Callable[[str, int, int], None] | None = None
) -> LabelledData:
    """Call :func:`write_crops` once for the same examples and seed: later calls open what the first one wrote."""
    files = [[split, e.name, *_stamp(e)] for split, part in data.splits.items() for e in part]
    parts = [str(data.root.resolve()), data.layout, data.ids, data.ignore, seed, CROP_SHARE, files]
    read = [data.depth_scale, data.masks] if data.depth_scale or data.masks else []
    recipe = json.dumps([*parts, *read])
    folder = cache / f"crops-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            with replaced_folder(folder) as part:
                write_crops(data, part, torch.Generator().manual_seed(seed), progress=progress)
        except OSError as error:
            if not folder.is_dir():  # else another process has made the same crops meanwhile
                reason = error.strerror or error
                raise ConfigError(
                    f"cannot keep crops in {str(cache)!r}: {reason}; make room or choose another --cache"
                ) from error
    return _opened(data, folder)


def _stamp(example: Example) -> list[int]:
    """List sizes and times of the files, so that edited labels are cut again."""
    files = [path.stat() for path in (example.image, example.truth) if path is not None]
    return [number for stat in files for number in (stat.st_size, stat.st_mtime_ns)]


def _opened(data: LabelledData, folder: Path) -> LabelledData:
    """Open the crops with the classes and settings of the data that they were cut from."""
    crops = open_data(folder, data.target, layout="folder", ignore=(_void(data),) if data.target == "labels" else ())
    if data.target == "depth":
        crops = replace(crops, depth_scale=_units(data))
    return replace(crops, num_classes=data.num_classes, classes=data.classes, notes=data.notes)


def _units(data: LabelledData) -> float:
    """Choose the units per metre in which crops of depth maps are written: the data's own, if they are whole."""
    return data.depth_scale if data.depth_scale is not None and data.depth_scale >= 100 else 1000.0


def _void(data: LabelledData) -> int:
    """Find the id of ignored pixels in the files of crops."""
    return 255 if data.num_classes <= 255 else 65535


def _cut(
    data: LabelledData,
    example: Example,
    folder: Path,
    split: str,
    generator: torch.Generator,
    share: tuple[float, float],
) -> None:
    truth = data.read(example)
    nothing = IGNORE if data.target == "labels" else 0
    for _ in range(_TRIES):
        top, left, side = draw_square((truth.shape[0], truth.shape[1]), generator, share)
        part = truth[top : top + side, left : left + side]
        if bool((part != nothing).any()):
            break
    pixels = load_image(example.image)[:, top : top + side, left : left + side]
    inside = Path() if split == "all" else Path(split)
    rgb = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    _save(rgb, folder / "images" / inside / f"{example.name}.png")
    _save(_plain(data, part), folder / _FOLDERS[data.target] / inside / f"{example.name}.png")


def _plain(data: LabelledData, truth: Tensor) -> np.ndarray:
    if data.target == "depth":
        units = (truth * _units(data)).round()
        if float(units.max()) > 65535:
            raise DataError(
                f"a depth of {float(truth.max()):.1f} m does not fit 16 bits at {_units(data):g} units per metre: "
                "give --depth-scale 256, or --max-depth and frames instead of crops"
            )
        return units.numpy().astype(np.uint16)
    void = _void(data)
    return torch.where(truth == IGNORE, void, truth.int()).numpy().astype(np.uint8 if void == 255 else np.uint16)


def _save(values: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # where a.png and A.png are one file
        raise DataError(
            f"{str(path)!r} is there already: two examples have names that this file system cannot tell apart"
        )
    Image.fromarray(values).save(path)
