"""Labelled data: every layout on folders that the tests write, and every way in which data can be wrong."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dvt.analysis.probes.datasets import open_data
from dvt.analysis.probes.layouts import IGNORE, LAYOUTS
from dvt.errors import ConfigError, DataError, ImageError

SIZE = (8, 12)
VOID = (11,)


def write(path, values=None, palette=False, size=SIZE):
    """An image, or a map of the given values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)
        return path
    picture = Image.fromarray(np.asarray(values))
    if palette:
        picture.putpalette([k % 256 for k in range(768)])
    picture.save(path)
    return path


def ids(*values, dtype=np.uint8):
    """(8, 12) a map whose rows go through the values."""
    return np.repeat(np.resize(np.array(values, dtype), SIZE[0])[:, None], SIZE[1], axis=1)


def plain(root, splits=("train", "test"), count=2, values=(0, 1, 11), kind="annotations", dtype=np.uint8):
    for split in splits:
        for k in range(count):
            write(root / "images" / split / f"{k}.jpg")
            write(root / kind / split / f"{k}.png", ids(*values, dtype=dtype))
    return root


def names(data):
    return {split: [example.name for example in part] for split, part in data.splits.items()}


# --- our own layout


def test_labels_are_read_with_ignored_ids_marked(tmp_path):
    data = open_data(plain(tmp_path), "labels", ignore=VOID)
    assert (data.layout, names(data)) == ("folder", {"train": ["0", "1"], "test": ["0", "1"]})
    labels = data.read(data.splits["train"][0])
    assert labels.dtype == torch.int16 and tuple(labels.shape) == SIZE
    assert labels[:, 0].tolist() == [0, 1, IGNORE, 0, 1, IGNORE, 0, 1]
    assert data.counted().num_classes == 2


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=8), st.sets(st.integers(0, 200), max_size=4))
def test_any_ids_come_back_as_they_are_written(tmp_path_factory, values, ignore):
    root = plain(tmp_path_factory.mktemp("data"), values=values, count=1)
    data = open_data(root, "labels", ignore=tuple(ignore))
    expected = [IGNORE if v in ignore else int(v) for v in ids(*values)[:, 0]]
    assert data.read(data.splits["train"][0])[:, 0].tolist() == expected


def test_a_split_is_made_from_blocks_and_reported(tmp_path):
    for k in range(20):
        write(tmp_path / "images" / f"f{k:02}.jpg")
        write(tmp_path / "depth" / f"f{k:02}.png", ids(1500, dtype=np.uint16))
    data = open_data(tmp_path, "depth")
    assert [len(part) for part in data.splits.values()] == [14, 2, 4]
    assert [name for part in names(data).values() for name in part] == [f"f{k:02}" for k in range(20)]
    assert len(data.notes) == 1 and "no split folders" in data.notes[0] and "14 train, 2 val, 4 test" in data.notes[0]
    assert open_data(tmp_path, "depth") == data


def test_depth_is_in_metres_and_zero_where_unknown(tmp_path):
    data = open_data(plain(tmp_path, kind="depth", values=(0, 1, 65535), dtype=np.uint16), "depth")
    depth = data.read(data.splits["test"][0])
    assert depth.dtype == torch.float32
    torch.testing.assert_close(depth[:3, 5], torch.tensor([0.0, 0.001, 65.535]))


def test_categories_come_from_folders(tmp_path):
    for split, classes in (("train", ("cat", "dog")), ("test", ("dog", "owl"))):
        for name in classes:
            write(tmp_path / split / name / "a.jpg")
    data = open_data(tmp_path, "category")
    assert data.classes == ("cat", "dog", "owl") and data.num_classes == 3
    assert [int(data.read(example)) for example in data.splits["test"]] == [1, 2]


def test_categories_without_splits_are_split_within_each_class(tmp_path):
    for name in ("a", "b"):
        for k in range(10):
            write(tmp_path / name / f"{k}.jpg")
    data = open_data(tmp_path, "category")
    assert {s: [e.category for e in part].count(1) for s, part in data.splits.items()} == {
        "train": 7,
        "val": 1,
        "test": 2,
    }


def boxes(root, entries, size=SIZE):
    for name in entries:
        write(root / "images" / name, size=size)
    (root / "boxes.json").write_text(json.dumps(entries))
    return root


def entry(*rows, width=SIZE[1], height=SIZE[0]):
    return {"width": width, "height": height, "boxes": list(rows)}


def test_boxes(tmp_path):
    data = open_data(
        boxes(tmp_path, {"a.jpg": entry([0, 1, 12, 8], [2, 2, 3, 3.5]), "b.jpg": entry([0, 0, 1, 1])}), "boxes"
    )
    assert names(data) == {"all": ["a.jpg", "b.jpg"]}
    assert data.read(data.splits["all"][0]).tolist() == [[0, 1, 12, 8], [2, 2, 3, 3.5]]


def test_limits_are_spread_evenly(tmp_path):
    data = open_data(plain(tmp_path, count=9), "labels", ignore=VOID)
    assert names(data.limited(train=3, test=None)) == {"train": ["0", "3", "6"], "test": [str(k) for k in range(9)]}


# --- the layouts of others


def voc(root, train=("a", "b"), val=("c",)):
    base = root / "VOCdevkit" / "VOC2012"
    for split, part in (("train", train), ("val", val)):
        lists = base / "ImageSets" / "Segmentation" / f"{split}.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        lists.write_text("".join(f"{name}\n" for name in part))
        for name in part:
            write(base / "JPEGImages" / f"{name}.jpg")
            write(base / "SegmentationClass" / f"{name}.png", ids(0, 20, 255), palette=True)
    write(base / "JPEGImages" / "not_segmented.jpg")
    return base


@pytest.mark.parametrize("above", [0, 1, 2])
def test_voc(tmp_path, above):
    base = voc(tmp_path)
    data = open_data([base, base.parent, base.parent.parent][above], "labels")
    assert (data.layout, data.num_classes, names(data)) == ("voc", 21, {"train": ["a", "b"], "val": ["c"]})
    assert data.read(data.splits["val"][0])[:3, 0].tolist() == [0, 20, IGNORE]


def test_voc_lists_what_is_missing(tmp_path):
    base = voc(tmp_path)
    (base / "JPEGImages" / "b.jpg").unlink()
    (base / "SegmentationClass" / "c.png").unlink()
    with pytest.raises(DataError, match=r"2 files.*JPEGImages/b\.jpg.*SegmentationClass/c\.png"):
        open_data(base, "labels")
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("../../secret\n")
    with pytest.raises(DataError, match="one image name per line"):
        open_data(base, "labels")


def test_voc_boxes_count_from_one(tmp_path):
    base = voc(tmp_path)
    box = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>12</xmax><ymax>8</ymax></bndbox></object>"
    (base / "ImageSets" / "Main").mkdir()
    (base / "ImageSets" / "Main" / "train.txt").write_text("a\nb 1\n")
    for name in "ab":
        file = base / "Annotations" / f"{name}.xml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"<annotation>{box}</annotation>")
    data = open_data(base, "boxes")
    assert names(data) == {"all": ["a", "b"]}
    assert data.read(data.splits["all"][0]).tolist() == [[0, 1, 12, 8]]
    file.write_text(f"<annotation>{box}")
    with pytest.raises(DataError, match=r"b\.xml"):
        open_data(base, "boxes")


def test_ade20k_counts_classes_from_one(tmp_path):
    for split in ("training", "validation"):
        write(tmp_path / "images" / split / "x.jpg")
        write(tmp_path / "annotations" / split / "x.png", ids(0, 1, 150))
    data = open_data(tmp_path, "labels")
    assert (data.layout, data.num_classes, set(data.splits)) == ("ade20k", 150, {"train", "val"})
    assert data.read(data.splits["train"][0])[:3, 0].tolist() == [IGNORE, 0, 149]
    write(tmp_path / "annotations" / "training" / "x.png", ids(151))
    with pytest.raises(DataError, match="151"):
        data.read(data.splits["train"][0])


def test_camvid_as_segnet_has_it(tmp_path):
    for split in ("train", "val", "test"):
        write(tmp_path / split / "f.png")
        write(tmp_path / f"{split}annot" / "f.png", ids(0, 10, 11))
    data = open_data(tmp_path, "labels")
    assert (data.layout, data.num_classes, set(data.splits)) == ("camvid", 11, {"train", "val", "test"})
    assert data.read(data.splits["val"][0])[:3, 0].tolist() == [0, 10, IGNORE]


def test_cityscapes_ids_become_train_ids(tmp_path):
    for split in ("train", "val", "test"):
        stem = f"{split}/bonn/bonn_000000_000019"
        write(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png")
        write(tmp_path / "gtFine" / f"{stem}_gtFine_labelIds.png", ids(0, 7, 8, 9, 11, 14, 26, 33))
        write(tmp_path / "gtFine" / f"{stem}_gtFine_color.png")
    data = open_data(tmp_path, "labels")
    assert names(data) == {"train": ["bonn/bonn_000000_000019"], "val": ["bonn/bonn_000000_000019"]}
    assert (data.layout, data.num_classes) == ("cityscapes", 19)
    # From the table of the data set's own scripts: road 0, sidewalk 1, building 2, car 13, bicycle 18.
    assert data.read(data.splits["val"][0])[:, 0].tolist() == [IGNORE, 0, 1, IGNORE, 2, IGNORE, 13, 18]


@pytest.mark.parametrize("inside", ["", "official_splits", "nyu/official_splits"])
def test_nyuv2(tmp_path, inside):
    for split in ("train", "test"):
        for number in ("00001", "00010"):
            write(tmp_path / inside / split / "kitchen_0004" / f"rgb_{number}.jpg")
            write(tmp_path / inside / split / "kitchen_0004" / f"sync_depth_{number}.png", ids(2500, dtype=np.uint16))
    data = open_data(tmp_path, "depth")
    assert (data.layout, names(data)["test"]) == ("nyuv2", ["kitchen_0004/00001", "kitchen_0004/00010"])
    assert float(data.read(data.splits["test"][1]).max()) == 2.5
    (tmp_path / inside / "test" / "kitchen_0004" / "sync_depth_00010.png").unlink()
    with pytest.raises(DataError, match="kitchen_0004/00010"):
        open_data(tmp_path, "depth")


def test_nyuv2_must_be_unpacked(tmp_path):
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(b"")
    with pytest.raises(DataError, match=r"labeled\.mat' must be unpacked"):
        open_data(tmp_path, "depth")


def test_of_two_years_of_voc_the_later_is_taken(tmp_path):
    base = voc(tmp_path)
    (base.parent / "VOC2007" / "JPEGImages").mkdir(parents=True)
    (base.parent / "VOC2007" / "ImageSets").mkdir()
    assert open_data(base.parent, "labels").root == base


def test_a_layout_that_is_named_is_not_guessed(tmp_path):
    plain(tmp_path)
    for layout in LAYOUTS:
        if layout != "folder":
            with pytest.raises(DataError):
                open_data(tmp_path, "labels", layout=layout)
    with pytest.raises(ConfigError, match="auto or one of"):
        open_data(tmp_path, "labels", layout="kitti")
    with pytest.raises(ConfigError, match="labels, depth"):
        open_data(tmp_path, "panoptic")


# --- what can be wrong


def test_missing_pairs_are_listed(tmp_path):
    plain(tmp_path, count=3)
    (tmp_path / "annotations" / "train" / "1.png").unlink()
    (tmp_path / "images" / "train" / "2.jpg").unlink()
    with pytest.raises(DataError, match="1 image without a map: 1; 1 map without an image: 2"):
        open_data(tmp_path, "labels")


def test_a_long_list_is_cut(tmp_path):
    plain(tmp_path, count=14)
    for file in (tmp_path / "annotations" / "train").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"14 images without a map: 0, 1, 10, .* and 4 more"):
        open_data(tmp_path, "labels")


def test_sizes_that_disagree(tmp_path):
    plain(tmp_path)
    write(tmp_path / "images" / "test" / "1.jpg", size=(12, 8))
    with pytest.raises(DataError, match=r"maps of 1 image.*12 x 8.*8 x 12"):
        open_data(tmp_path, "labels")


def test_ids_out_of_range(tmp_path):
    plain(tmp_path, values=(0, 1, 7))
    data = open_data(tmp_path, "labels", num_classes=3)
    with pytest.raises(DataError, match=r"0\.png.*the ids 7; class ids lie in 0 \.\.\. 2"):
        data.read(data.splits["train"][0])
    assert open_data(tmp_path, "labels").counted().num_classes == 8
    assert "2, 3, 4, 5, 6" in open_data(tmp_path, "labels").counted().notes[0]


def test_a_void_that_nobody_named(tmp_path):
    plain(tmp_path, values=(0, 1, 255))
    with pytest.raises(DataError, match="--ignore 255"):
        open_data(tmp_path, "labels").counted()
    assert open_data(tmp_path, "labels", ignore=(255,)).counted().num_classes == 2
    assert open_data(tmp_path, "labels", num_classes=256).counted().num_classes == 256


def test_everything_ignored(tmp_path):
    plain(tmp_path, values=(11,))
    with pytest.raises(DataError, match="every pixel"):
        open_data(tmp_path, "labels", ignore=VOID).counted()


def test_regions_are_no_classes(tmp_path):
    plain(tmp_path, values=(0, 5000), dtype=np.uint16)
    with pytest.raises(DataError, match="5000"):
        open_data(tmp_path, "labels").counted()


@pytest.mark.parametrize("kind", ["colour", "eight bits", "damaged"])
def test_maps_of_another_kind(tmp_path, kind):
    plain(tmp_path, kind="depth", values=(900,), dtype=np.uint16)
    file = tmp_path / "depth" / "train" / "0.png"
    if kind == "damaged":
        file.write_bytes(file.read_bytes()[:-30])
    else:
        write(file, None if kind == "colour" else ids(9))
    data = open_data(tmp_path, "depth")  # opening reads headers only
    with pytest.raises(DataError, match=r"0\.png"):
        data.read(data.splits["train"][0])


def test_too_few_splits_or_examples(tmp_path):
    with pytest.raises(DataError, match="train only; it needs"):
        open_data(plain(tmp_path / "one", splits=("train",)), "labels")
    (tmp_path / "few" / "images").mkdir(parents=True)
    write(tmp_path / "few" / "images" / "a.jpg")
    write(tmp_path / "few" / "annotations" / "a.png", ids(0))
    with pytest.raises(DataError, match="too few"):
        open_data(tmp_path / "few", "labels")
    (tmp_path / "empty" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match="annotations"):
        open_data(tmp_path / "empty", "labels")
    with pytest.raises(DataError, match="not a folder"):
        open_data(tmp_path / "nowhere", "labels")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"images/\{train,val,test\}"):
        open_data(tmp_path / "void", "labels")


def test_two_images_of_one_name(tmp_path):
    plain(tmp_path)
    write(tmp_path / "images" / "train" / "0.png")
    with pytest.raises(DataError, match="have one name"):
        open_data(tmp_path, "labels")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"a.jpg": entry([0, 0, 13, 8])}, "lie inside"),
        ({"a.jpg": entry([-2, 0, 5, 5])}, "lie inside"),
        ({"a.jpg": entry([5, 0, 5, 5])}, "x0 < x1"),
        ({"a.jpg": entry([0, 0, float("nan"), 5])}, "finite number"),
        ({"a.jpg": entry([0, 0, 5])}, "each is"),
        ({"a.jpg": entry()}, "no box"),
        ({"a.jpg": entry([0, 0, 5, 5], width=99)}, "its entry says"),
        ({"a.jpg": {"boxes": []}}, "misses height, width"),
        ({"a.jpg": [1, 2]}, "named values"),
    ],
)
def test_boxes_that_cannot_be(tmp_path, entries, words):
    with pytest.raises(DataError, match=words):
        open_data(boxes(tmp_path, entries), "boxes")


def test_boxes_and_images_must_agree(tmp_path):
    boxes(tmp_path, {"a.jpg": entry([0, 0, 1, 1]), "b.jpg": entry([0, 0, 1, 1])})
    (tmp_path / "images" / "b.jpg").rename(tmp_path / "images" / "c.jpg")
    with pytest.raises(DataError, match=r"b\.jpg, c\.jpg"):
        open_data(tmp_path, "boxes")
    (tmp_path / "boxes.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read.*boxes\.json"):
        open_data(tmp_path, "boxes")


def test_an_image_that_is_none(tmp_path):
    plain(tmp_path)
    (tmp_path / "images" / "train" / "0.jpg").write_text("no picture")
    with pytest.raises(ImageError, match=r"0\.jpg"):
        open_data(tmp_path, "labels")
