"""Read labelled data from disk, in our own folder layout or in one of five well-known ones.

Our layout, in which the split folders are optional::

    DATA/images/{train,val,test}/NAME.jpg
    DATA/annotations/{train,val,test}/NAME.png      class ids; `ignore` lists ids to leave out
    DATA/depth/{train,val,test}/NAME.png            uint16 millimetres (or another scale), 0 = no measurement
    DATA/boxes.json                                 {file: {"width", "height", "boxes": [[x0, y0, x1, y1]]}}
    DATA/{train,val,test}/CLASS/NAME.jpg            one class per image

:func:`open_data` also reads VOC, ADE20K, CamVid, Cityscapes and NYUv2 as they are distributed (:data:`LAYOUTS`).
Opening reads only names and headers; pixels are read with each example.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from dvt.analysis.config import AnnotationKind
from dvt.analysis.probes.layouts import IGNORE, LAYOUTS, PLAIN, SPLITS, Example, category_names, size_text, some
from dvt.errors import ConfigError, DataError, ImageError
from dvt.images import image_size, load_stored
from dvt.text import counted

log = logging.getLogger(__name__)

Picked = TypeVar("Picked")


MOST_CLASSES = 1000
_FORMS = ("PNG", "TIFF", "BMP", "GIF", "PPM")
_MILLIMETRES = 1000.0


@dataclass(frozen=True)
class LabelledData:
    """Hold examples by split, with all that is needed to read their ground truth.

    Args:
        root: the folder of the data.
        layout: name of the layout.
        target: the kind of ground truth.
        splits: split name to examples, sorted by name.
        classes: class names, if the layout or the folders give them.
        ids: class of each id in the files, IGNORE for ids to leave out; None takes ids as classes.
        ignore: further ids in the files to leave out.
        num_classes: K; 0 if :meth:`counted` must find it in the labels.
        notes: warnings for readers of a score, such as that the split was made here.
        depth_scale: units of a depth map per metre; None means 1000 for whole numbers and 1 for floats.
        masks: label maps are masks: 0 is class 0, and whatever else, 1 or 255, is class 1.
    """

    root: Path
    layout: str
    target: AnnotationKind
    splits: Mapping[str, tuple[Example, ...]]
    classes: tuple[str, ...] = ()
    ids: tuple[int, ...] | None = None
    ignore: tuple[int, ...] = ()
    num_classes: int = 0
    notes: tuple[str, ...] = field(default=())
    depth_scale: float | None = None
    masks: bool = False

    def read(self, example: Example) -> Tensor:
        """Read the truth of an example.

        Returns:
            labels: (H, W) int16 class indices, or IGNORE. depth: (H, W) float32 metres, 0 where unknown.
            boxes: (n, 4) float32 pixels (x0, y0, x1, y1). category: () int16.

        Raises:
            DataError: the file cannot be read, is not such a map, or holds an id out of range.
        """
        if self.target == "boxes":
            return torch.tensor(example.boxes, dtype=torch.float32)
        if self.target == "category":
            return torch.tensor(example.category, dtype=torch.int16)
        values = _read_map(_path(example.truth), self.target, self.masks)
        return _depth(values, example, self.depth_scale) if self.target == "depth" else self._labels(values, example)

    def limited(self, **counts: int | None) -> LabelledData:
        """Keep at most the given number of examples of each split, evenly spaced; None keeps all."""
        return replace(self, splits={name: pick(part, counts.get(name)) for name, part in self.splits.items()})

    def counted(self, truth: Iterable[Tensor] | None = None) -> LabelledData:
        """Add the number of classes; if the layout does not give it, find it in the labels of all splits.

        Args:
            truth: those labels, if they have been read already.

        Raises:
            DataError: the ids seem to be colours or regions (more than MOST_CLASSES), or 255 seems to mark void pixels.
        """
        if self.num_classes or self.target not in ("labels", "category"):
            return self
        if truth is None:
            truth = (self.read(example) for examples in self.splits.values() for example in examples)
        found = sorted({value for labels in truth for value in present_ids(labels)} - {IGNORE})
        if not found:
            raise DataError(f"every pixel of every label map in {str(self.root)!r} is ignored ({self.ignore})")
        if found[-1] == 255 and 254 not in found:
            raise DataError(
                f"label maps in {str(self.root)!r} hold the ids {some(found)}; 255 usually marks pixels without a "
                "label: give --ignore 255, or --masks if maps are masks of 0 and 255, or --classes 256 if it is a class"
            )
        data = replace(self, num_classes=found[-1] + 1)
        if missing := sorted(set(range(found[-1])) - set(found)):
            data = replace(data, notes=(*data.notes, f"no label map holds the ids {some(missing)}"))
        return data

    def _labels(self, values: np.ndarray, example: Example) -> Tensor:
        if self.masks:
            values = self._mask(values, example)
        present = present_ids(torch.from_numpy(values)) if values.dtype == np.uint8 else np.unique(values).tolist()
        known = len(self.ids) if self.ids is not None else self.num_classes or MOST_CLASSES
        if wrong := [v for v in present if not 0 <= v < known and v not in self.ignore]:
            raise DataError(
                f"{os.fspath(_path(example.truth))!r} holds the ids {some(wrong)}; class ids lie in 0 ... {known - 1}. "
                "Give --ignore ID for ids that are not a class, or --classes N if there are more classes"
            )
        table = np.full(max(present, default=0) + 1, IGNORE, dtype=np.int16)
        for value in present:
            if value not in self.ignore:
                table[value] = value if self.ids is None else self.ids[value]
        return torch.from_numpy(table[values])

    def _mask(self, values: np.ndarray, example: Example) -> np.ndarray:
        """Turn a mask of 0 and one other value into 0 and 1; ids to leave out stay."""
        void = np.isin(values, self.ignore)
        others = sorted({int(value) for value in np.unique(values[~void])} - {0})
        if len(others) > 1:
            raise DataError(
                f"{os.fspath(_path(example.truth))!r} holds {some(others)} beside 0; a mask has one other value: leave "
                "--masks out for class ids, or give --ignore ID for ids that are not a class"
            )
        return np.where(void, values, values != 0)


def present_ids(labels: Tensor) -> list[int]:
    """List the ids in labels from IGNORE up, in order; counting them is many times faster than sorting pixels."""
    return (torch.bincount(labels.flatten().int() - IGNORE).nonzero()[:, 0] + IGNORE).tolist()


def _depth(values: np.ndarray, example: Example, scale: float | None) -> Tensor:
    if values.dtype == np.uint8:
        raise DataError(f"{os.fspath(_path(example.truth))!r} is an 8-bit image; depth is 16 bits or float")
    units = scale or (1.0 if values.dtype == np.float32 else _MILLIMETRES)
    metres = torch.from_numpy(values.astype(np.float32) / np.float32(units))
    return torch.where(metres.isfinite(), metres, 0.0)  # some data sets mark holes by NaN or infinity


def _path(truth: Path | None) -> Path:
    if truth is None:
        raise DataError("this example has no label or depth map; open the data with another target")
    return truth


def _read_map(path: Path, target: AnnotationKind, masks: bool) -> np.ndarray:
    """Read the (H, W) values of a single-channel image, palette indices included, turned as its photograph is."""
    try:
        image = load_stored(path)
    except ImageError as error:
        raise DataError(str(error)) from error
    values = np.asarray(image)
    taken = values.ndim == 2 and image.format in _FORMS and (image.mode != "1" or masks)
    if not taken or (image.mode == "F") != (values.dtype == np.float32) or (image.mode == "F" and target != "depth"):
        hint = "; give --masks for masks of 1 bit" if image.mode == "1" and target == "labels" else ""
        raise DataError(
            f"{os.fspath(path)!r} is a {image.format} of kind {image.mode}; a label map has one channel of whole "
            f"numbers, a depth map one of whole numbers or floats, without loss ({', '.join(_FORMS)}){hint}"
        )
    if image.mode == "F":
        return values.astype(np.float32)
    return values.astype(np.uint8 if values.dtype in (np.uint8, np.bool_) else np.int64)


# -- opening ----------------------------------------------------------------------------------------------------------


def open_data(
    root: str | Path,
    target: AnnotationKind,
    *,
    layout: str = "auto",
    ignore: Sequence[int] = (),
    num_classes: int | None = None,
    depth_scale: float | None = None,
    masks: bool = False,
    check: bool = True,
) -> LabelledData:
    """Find the examples below a folder, and check names and sizes.

    Args:
        root: the folder, in one of the :data:`LAYOUTS`.
        target: "labels", "depth", "boxes" or "category".
        layout: one of :data:`LAYOUTS`; "auto" recognises it.
        ignore: ids in the label files to leave out, besides those that the layout leaves out.
        num_classes: K, for our folder layout; None finds it in the labels.
        depth_scale: units of a depth map per metre (KITTI 256); None means 1000 for whole numbers and 1 for floats.
        masks: label maps are masks of 0 and one other value, 1 or 255, or of 1 bit.
        check: check sizes; without it, :func:`check_sizes` is for the part of the examples that is used.

    Raises:
        DataError: nothing is found, pairs are missing (they are listed), names clash or sizes disagree.
        ConfigError: the layout or target is unknown.
    """
    root = Path(root)
    if target not in get_args(AnnotationKind):
        raise ConfigError(f"target is {target!r}; it must be one of {', '.join(get_args(AnnotationKind))}")
    if layout != "auto" and layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; it must be auto or one of {', '.join(LAYOUTS)}")
    if num_classes is not None and not 1 <= num_classes <= MOST_CLASSES:
        raise ConfigError(f"the number of classes is {num_classes}; it must lie in 1 ... {MOST_CLASSES}")
    if depth_scale is not None and not depth_scale > 0:
        raise ConfigError(f"depth_scale is {depth_scale}; it is a number of units per metre, such as 256 or 1000")
    if masks and num_classes not in (None, 2):
        raise ConfigError(f"masks have 2 classes, got num_classes {num_classes}; leave one of the two out")
    if not root.is_dir():
        raise DataError(f"{str(root)!r} is not a folder; give the folder of the labelled data")
    name, base = _recognise(root, target, layout)
    known = LAYOUTS[name]
    found = {split: sorted(part, key=lambda e: e.name) for split, part in known.splits(base, target).items() if part}
    if not found:
        raise DataError(
            f"no examples with {target} found in {str(base)!r} (layout {name}); see the layouts in the docs"
        )
    notes: tuple[str, ...] = ()
    if "all" in found and target != "boxes":
        found, notes = _made_split(found["all"], target)
    splits = {split: tuple(found[split]) for split in (*SPLITS, "all") if split in found}
    classes = category_names(base) if target == "category" else ()
    wanted = len(classes) or (max(known.ids) + 1 if known.ids else 2 if masks else num_classes or 0)
    ignored = (*known.ignore, *ignore)
    data = LabelledData(
        base, name, target, splits, classes, known.ids, ignored, wanted, notes, depth_scale, masks and not known.ids
    )
    for note in notes:
        log.info("%s", note)
    return check_sizes(data) if check else data


def _recognise(root: Path, target: str, layout: str) -> tuple[str, Path]:
    for name in LAYOUTS if layout == "auto" else (layout,):
        known = LAYOUTS[name]
        if target in known.targets and (base := known.find(root)) is not None:
            return name, base
    able = [name for name in LAYOUTS if target in LAYOUTS[name].targets]
    raise DataError(
        f"{str(root)!r} is not in a layout with {target} that dvt knows"
        f"{'' if layout == 'auto' else f' as {layout}'}; known are {', '.join(able)}. The simplest: "
        f"{PLAIN[target]}"
    )


def _made_split(examples: list[Example], target: str) -> tuple[dict[str, list[Example]], tuple[str, ...]]:
    """Split 70, 10 and 20 % in blocks of the sorted names, so that neighbouring frames of a film stay together."""
    groups: dict[int, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.category, []).append(example)
    parts: dict[str, list[Example]] = {name: [] for name in SPLITS}
    for group in groups.values():
        first, second = round(0.7 * len(group)), round(0.8 * len(group))
        for name, part in zip(SPLITS, (group[:first], group[first:second], group[second:]), strict=True):
            parts[name] += part
    if not parts["train"] or not parts["test"]:
        raise DataError(f"{len(examples)} examples are too few to split into train, val and test; add split folders")
    sizes = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    each = " of each class" if target == "category" else ""
    note = f"the data has no split folders: made {sizes} from blocks of the sorted names{each} (70, 10 and 20 %)"
    return {name: part for name, part in parts.items() if part}, (note,)


def check_sizes(data: LabelledData) -> LabelledData:
    """Check that label and depth maps are as large as their images, and return the data.

    Raises:
        DataError: some are not; the message lists them.
    """
    wrong = []
    for examples in data.splits.values():
        for example in examples:
            if example.truth is not None:
                sizes = image_size(example.image), image_size(example.truth)
                if sizes[0] != sizes[1]:
                    wrong.append(f"{example.image} {size_text(sizes[0])} and {example.truth} {size_text(sizes[1])}")
    if wrong:
        raise DataError(f"the maps of {counted(len(wrong), 'image')} have other sizes (height x width): {some(wrong)}")
    return data


def pick(items: Sequence[Picked], count: int | None) -> tuple[Picked, ...]:
    """Take at most `count` items, evenly spaced and in order; None takes all.

    >>> pick("abcdefg", 3)
    ('a', 'c', 'e')
    """
    count = len(items) if count is None else min(count, len(items))
    return tuple(items[k * len(items) // count] for k in range(count))
