"""Find labelled data on disk in our own folders or those of VOC, ADE20K, CamVid, Cityscapes and NYUv2.

Each reader turns a folder into examples by split; it pairs files by their names alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from dvt.errors import ConfigError, DataError, ImageError
from dvt.files import read_plain
from dvt.grids import Size
from dvt.images import find_images, image_size
from dvt.schema import checked, read_json, typed
from dvt.text import counted

IGNORE = -1
"""The label of an ignored pixel after reading, whatever its id in the file."""

SPLITS = ("train", "val", "test")
_LISTED, _SHOWN = 10, 300  # items, and characters of each
_NAME_BYTES = 250  # of a file, which gets a suffix


@dataclass(frozen=True)
class Example:
    """Hold the path of one image and of its ground truth.

    Args:
        name: the path below its split, without suffix; unique in a split.
        image: the image file.
        truth: the label or depth map; None for boxes and categories.
        boxes: ((x0, y0, x1, y1), ...) in pixels.
        category: class index of the whole image.
    """

    name: str
    image: Path
    truth: Path | None = None
    boxes: tuple[tuple[float, ...], ...] = ()
    category: int = IGNORE


@dataclass(frozen=True)
class Layout:
    """Describe a known layout: how to find its root below a folder and its examples by split, and its label ids."""

    targets: tuple[str, ...]
    find: Callable[[Path], Path | None]
    splits: Callable[[Path, str], dict[str, list[Example]]]
    ids: tuple[int, ...] | None = None
    ignore: tuple[int, ...] = ()


class _Boxes(TypedDict):
    """Type an entry of boxes.json."""

    width: int
    height: int
    boxes: list[list[float]]


PLAIN = {
    "labels": "images/{train,val,test}/NAME.jpg with annotations/{train,val,test}/NAME.png",
    "depth": "images/{train,val,test}/NAME.jpg with depth/{train,val,test}/NAME.png (uint16 millimetres)",
    "boxes": "images/NAME.jpg with boxes.json {file: {width, height, boxes: [[x0, y0, x1, y1]]}}",
    "category": "{train,val,test}/CLASS/NAME.jpg",
}


def size_text(size: Size) -> str:
    """Write height and width as text."""
    return f"{size[0]} x {size[1]}"


def some(items: Sequence[object]) -> str:
    """Write the first few items of a list as text, and how many more there are."""
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(str(item)[:_SHOWN] for item in items[:_LISTED]) + more


# -- files ------------------------------------------------------------------------------------------------------------


def _files(folder: Path, ending: str = "") -> dict[str, Path]:
    """Find image files below a folder, by their path without suffix and `ending`; empty if there is no such folder."""
    found: dict[str, Path] = {}
    with suppress(
        ImageError
    ):  # the folder is empty; missing files are reported by name when images and maps are paired
        for path in find_images([folder]):
            inside = path.relative_to(folder).with_suffix("").as_posix()
            if not inside.endswith(ending):
                continue
            name = inside.removesuffix(ending)
            if name in found:
                raise DataError(f"{str(found[name])!r} and {str(path)!r} have one name; rename or remove one of them")
            found[name] = path
    return found


def _paired(images: Mapping[str, Path], maps: Mapping[str, Path], where: Path) -> list[Example]:
    lone_images, lone_maps = sorted(images.keys() - maps.keys()), sorted(maps.keys() - images.keys())
    if lone_images or lone_maps:
        parts = [f"{counted(len(lone_images), 'image')} without a map: {some(lone_images)}"] * bool(lone_images)
        parts += [f"{counted(len(lone_maps), 'map')} without an image: {some(lone_maps)}"] * bool(lone_maps)
        raise DataError(f"missing pairs in {str(where)!r}: {'; '.join(parts)}. Add or remove the listed files")
    return [Example(name, images[name], maps[name]) for name in images]


def _by_split(images: Path, maps: Path, names: Mapping[str, str]) -> dict[str, list[Example]]:
    """Pair images/SPLIT with maps/SPLIT; `names` maps our split names to the folders'."""
    there = {split: name for split, name in names.items() if (images / name).is_dir() or (maps / name).is_dir()}
    return {split: _paired(_files(images / name), _files(maps / name), images / name) for split, name in there.items()}


# -- the layouts ------------------------------------------------------------------------------------------------------


def _has(*inside: str) -> Callable[[Path], Path | None]:
    """Find the first folder, at or just below the root, that holds all the given names."""

    def find(root: Path) -> Path | None:
        # In reverse order, so that the latest of several years of VOC is taken.
        below = sorted((path for path in root.iterdir() if path.is_dir() and path.name[0] != "."), reverse=True)
        deeper = [path / "VOC2012" for path in below]
        return next((base for base in (root, *below, *deeper) if all((base / name).exists() for name in inside)), None)

    return find


def _here(*any_of: str) -> Callable[[Path], Path | None]:
    return lambda root: root if any((root / name).exists() for name in any_of) else None


_OWN_SPLITS = {name: name for name in SPLITS}


def _folder(root: Path, target: str) -> dict[str, list[Example]]:
    if target == "boxes":
        return {"all": _boxes_json(root)}
    images, maps = root / "images", root / {"labels": "annotations", "depth": "depth"}[target]
    if not images.is_dir() or not maps.is_dir():
        raise DataError(f"{str(root)!r} holds no {maps.name if images.is_dir() else 'images'}/; {PLAIN[target]}")
    if splits := _by_split(images, maps, _OWN_SPLITS):
        if "train" not in splits or len(splits) < 2:
            raise DataError(f"{str(images)!r} has the split {', '.join(splits)} only; it needs train and val or test")
        return splits
    return {"all": _paired(_files(images), _files(maps), root)}


def _boxes_json(root: Path) -> list[Example]:
    file = root / "boxes.json"
    try:
        listed = checked(read_json(file), dict[str, dict[str, Any]], "boxes.json")
        kept = _Boxes.__required_keys__  # what else an entry has is its author's
        entries = {
            name: typed(_Boxes, {key: entry[key] for key in kept & entry.keys()}) for name, entry in listed.items()
        }
    except (OSError, ConfigError) as error:
        raise DataError(f"cannot read {str(file)!r}: {error}; {PLAIN['boxes']}") from error
    folder = root / "images" if (root / "images").is_dir() else root
    images = {path.relative_to(folder).as_posix(): path for path in _files(folder).values()}
    lone = sorted(entries.keys() ^ images.keys())
    if lone:
        raise DataError(f"{str(file)!r} and {str(folder)!r} do not list the same images; only in one: {some(lone)}")
    return [
        Example(name, images[name], boxes=_checked_boxes(each["boxes"], (each["height"], each["width"]), images[name]))
        for name, each in entries.items()
    ]


def _checked_boxes(boxes: Sequence[Sequence[float]], size: Size, image: Path) -> tuple[tuple[float, ...], ...]:
    """Check boxes against their image, and clip those that exceed it by up to half a pixel.

    Raises:
        DataError: the stated size is not the image's, or a box is malformed, empty or outside of the image.
    """
    real = image_size(image)
    if size != real:
        raise DataError(
            f"{str(image)!r} is {size_text(real)} pixels (height x width), but its entry says {size_text(size)}"
        )
    if wrong := [box for box in boxes if len(box) != 4]:
        raise DataError(f"{str(image)!r} has the boxes {some(wrong)}; each is [x0, y0, x1, y1] in pixels")
    if not boxes:
        raise DataError(f"{str(image)!r} has no box; leave it out of the data")
    array = np.asarray(boxes, dtype=float)
    slack = 0.5  # annotations are rounded to half pixels
    inside = (array[:, :2] >= -slack).all() and (array[:, 2:] <= np.array(real)[::-1] + slack).all()
    if not (np.isfinite(array).all() and inside and (array[:, 2:] > array[:, :2]).all()):
        raise DataError(
            f"{str(image)!r} ({size_text(real)}, height x width) has the boxes {some(array.tolist())}; each must be "
            "x0 < x1, y0 < y1 and lie inside the image"
        )
    clipped = array.clip(0, np.tile(np.array(real)[::-1], 2))
    return tuple(tuple(row) for row in clipped.tolist())


def _categories(root: Path, target: str) -> dict[str, list[Example]]:
    names = category_names(root)
    folders = {split: root / split for split in SPLITS if (root / split).is_dir()} or {"all": root}
    found: dict[str, list[Example]] = {}
    for split, folder in folders.items():
        every = ((name, path) for name in names for path in _files(folder / name).items())
        found[split] = [Example(f"{name}/{stem}", path, category=names.index(name)) for name, (stem, path) in every]
    if "all" not in found and ("train" not in found or len(found) < 2):
        raise DataError(f"{str(root)!r} has the split {', '.join(found)} only; it needs train and val or test")
    return found


def category_names(root: Path) -> tuple[str, ...]:
    folders = [root / split for split in SPLITS if (root / split).is_dir()] or [root]
    inside = (path for folder in folders for path in folder.iterdir())
    return tuple(sorted({path.name for path in inside if path.is_dir() and not path.name.startswith(".")}))


def _voc(root: Path, target: str) -> dict[str, list[Example]]:
    """Find VOC's examples; val is scored, because the labels of the test split are not public."""
    folder = "Segmentation" if target == "labels" else "Main"
    missing: list[str] = []
    found = {
        split: [_voc_example(root, name, target, missing) for name in _lines(file)]
        for split in ("train", "val")
        if (file := root / "ImageSets" / folder / f"{split}.txt").is_file()
    }
    if missing:
        raise DataError(
            f"missing pairs in {str(root)!r}: {counted(len(missing), 'file')} named in ImageSets: {some(missing)}"
        )
    return {"all": [e for part in found.values() for e in part]} if target == "boxes" else found


def _voc_example(root: Path, name: str, target: str, missing: list[str]) -> Example:
    image = root / "JPEGImages" / f"{name}.jpg"
    truth = root / (f"SegmentationClass/{name}.png" if target == "labels" else f"Annotations/{name}.xml")
    lacking = [str(path.relative_to(root)) for path in (image, truth) if not path.is_file()]
    missing += lacking
    if target == "labels" or lacking:
        return Example(name, image, truth)
    return Example(name, image, boxes=_voc_boxes(truth, image))


def _voc_boxes(file: Path, image: Path) -> tuple[tuple[float, ...], ...]:
    from xml.etree import ElementTree

    try:
        content = read_plain(file)
        if b"<!DOCTYPE" in content:  # its entities can unfold to any size
            raise DataError("a document type is declared in it")
        corners = [
            [float(box.findtext(key, "")) for key in ("xmin", "ymin", "xmax", "ymax")]
            for box in ElementTree.fromstring(content).iterfind("object/bndbox")
        ]
    except (OSError, LookupError, ElementTree.ParseError, ValueError) as error:  # LookupError: an unknown encoding
        raise DataError(f"cannot read the boxes in {str(file)!r}: {error}") from error
    # VOC counts pixels from 1, and its boxes include the last pixel.
    return _checked_boxes([[x0 - 1, y0 - 1, x1, y1] for x0, y0, x1, y1 in corners], image_size(image), image)


def _lines(file: Path) -> list[str]:
    wanted = "it must hold one image name per line, without folders"
    try:
        names = [line.split()[0] for line in read_plain(file).decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(file)!r}: {error}; {wanted}") from error
    if wrong := [name for name in names if Path(name).name != name or len(name.encode()) > _NAME_BYTES]:
        raise DataError(f"{str(file)!r} names {some(wrong)}; {wanted}")
    return names


def _ade20k(root: Path, target: str) -> dict[str, list[Example]]:
    return _by_split(root / "images", root / "annotations", {"train": "training", "val": "validation"})


def _camvid(root: Path, target: str) -> dict[str, list[Example]]:
    there = [split for split in SPLITS if (root / split).is_dir() or (root / f"{split}annot").is_dir()]
    return {split: _paired(_files(root / split), _files(root / f"{split}annot"), root / split) for split in there}


def _cityscapes(root: Path, target: str) -> dict[str, list[Example]]:
    """Find Cityscapes' examples; val is scored, because the test split's labels are not public (its files are void)."""
    images, maps = root / "leftImg8bit", root / "gtFine"
    return {
        split: _paired(_files(images / split, "_leftImg8bit"), _files(maps / split, "_gtFine_labelIds"), images / split)
        for split in ("train", "val")
        if (images / split).is_dir()
    }


def _nyuv2(root: Path, target: str) -> dict[str, list[Example]]:
    """Find NYUv2's official split as the depth literature unpacks it: SCENE/rgb_N.jpg, SCENE/sync_depth_N.png."""
    found: dict[str, list[Example]] = {}
    for split in ("train", "test"):
        every = _files(root / split) if (root / split).is_dir() else {}
        kinds: dict[str, dict[str, Path]] = {"rgb_": {}, "sync_depth_": {}}
        for path in every.values():
            for kind, files in kinds.items():
                if path.name.startswith(kind):
                    scene = path.parent.relative_to(root / split).as_posix()
                    files[f"{scene}/{path.stem.removeprefix(kind)}"] = path
        found[split] = _paired(kinds["rgb_"], kinds["sync_depth_"], root / split)
    return found


def _find_nyuv2(root: Path) -> Path | None:
    below = (root, root / "official_splits", *(path / "official_splits" for path in root.iterdir() if path.is_dir()))
    found = next((base for base in below if next(base.glob("train/*/rgb_*"), None)), None)
    if found is None and (file := next(root.glob("*labeled.mat"), None)):
        raise DataError(
            f"{str(file)!r} must be unpacked first, as the depth literature does: "
            "official_splits/{train,test}/SCENE/rgb_N.jpg and sync_depth_N.png (uint16 millimetres)"
        )
    return found


def _table(pairs: Iterable[tuple[int, int]], size: int) -> tuple[int, ...]:
    known = dict(pairs)
    return tuple(known.get(value, IGNORE) for value in range(size))


# The ids of Cityscapes that are scored, in the order of their train ids.
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

LAYOUTS: dict[str, Layout] = {
    "cityscapes": Layout(
        ("labels",),
        _has("leftImg8bit", "gtFine"),
        _cityscapes,
        _table(((old, new) for new, old in enumerate(_CITYSCAPES)), 34),
    ),
    "voc": Layout(("labels", "boxes"), _has("JPEGImages", "ImageSets"), _voc, tuple(range(21)), ignore=(255,)),
    "ade20k": Layout(("labels",), _has("images/training", "annotations/training"), _ade20k, (IGNORE, *range(150))),
    "camvid": Layout(("labels",), _has("train", "trainannot"), _camvid, tuple(range(11)), ignore=(11,)),
    "nyuv2": Layout(("depth",), _find_nyuv2, _nyuv2),
    "folder": Layout(("labels", "depth", "boxes"), _here("images", "boxes.json"), _folder),
    "categories": Layout(("category",), lambda root: root, _categories),
}
