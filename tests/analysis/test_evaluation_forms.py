"""Labels and depth as people have them: scales, floats, ranges and crops of depth; turned, 1-bit and 0/255 labels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dvt import grids
from dvt.analysis.probes import ProbeConfig, run_probe
from dvt.analysis.probes.datasets import open_data
from dvt.analysis.probes.depth import CROPS, kept_depth
from dvt.analysis.probes.features import with_class_token
from dvt.errors import ConfigError, DataError, ShapeError
from dvt.tokens import Tokens


def write(root, maps, folder, exif=None, **options):
    """A set with photographs 24 x 32, splits train and test, and one map each, as PIL images."""
    for number, (split, image) in enumerate([("train", maps[0]), ("train", maps[1]), ("test", maps[2])]):
        for where in (root / "images" / split, root / folder / split):
            where.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / split / f"{number}.png")
        given = {} if exif is None else {"exif": exif}
        image.save(root / folder / split / f"{number}.{options.get('suffix', 'png')}", **given)


def read(root, target, **options):
    data = open_data(root, target, **options)
    return [data.read(each) for part in data.splits.values() for each in part]


METRES = np.linspace(0, 80, 24 * 32, dtype=np.float32).reshape(24, 32)


@pytest.mark.parametrize(("scale", "given"), [(256, 256.0), (1000, None), (500, 500.0)])
def test_depth_of_any_scale_is_in_metres(tmp_path, scale, given):
    top = 65535 / scale
    maps = [Image.fromarray((METRES.clip(0, top) * scale).round().astype(np.uint16))] * 3
    write(tmp_path, maps, "depth")
    for found in read(tmp_path, "depth", depth_scale=given):
        assert np.abs(found.numpy() - METRES.clip(0, top)).max() <= 0.51 / scale


def test_float_depth_is_in_metres_and_its_holes_are_zero(tmp_path):
    values = METRES.copy()
    values[0, :3] = [np.nan, np.inf, 0]
    write(tmp_path, [Image.fromarray(values)] * 3, "depth", suffix="tiff")
    for found in read(tmp_path, "depth"):
        assert not found[0, :3].any() and np.array_equal(found.numpy()[1:], METRES[1:])
    assert np.allclose(read(tmp_path, "depth", depth_scale=2)[0].numpy()[1:], METRES[1:] / 2)
    with pytest.raises(ConfigError, match="units per metre"):
        open_data(tmp_path, "depth", depth_scale=0)
    with pytest.raises(DataError, match="of kind F; a label map"):
        (tmp_path / "depth").rename(tmp_path / "annotations")
        read(tmp_path, "labels")


@pytest.mark.parametrize("crop", ["none", *CROPS])
def test_what_lies_outside_of_range_and_crop_is_not_measured(crop):
    truth = torch.rand(375, 1242, generator=torch.Generator().manual_seed(0)) * 100
    found = kept_depth(truth, 1e-3, 80, crop)
    outside = torch.zeros(375, 1242, dtype=torch.bool)
    if crop != "none":
        rows, columns = grids.share_of((375, 1242), CROPS[crop])
        outside[:] = True
        outside[rows, columns] = False
    assert torch.equal(found > 0, (truth > 1e-3) & (truth <= 80) & ~outside)
    assert torch.equal(found[found > 0], truth[found > 0])


def test_the_crops_are_those_of_the_literature():
    # What the evaluation code of the field has: int(share * side) in KITTI, whole pixels in NYU.
    assert grids.share_of((480, 640), CROPS["nyu"]) == (slice(45, 471), slice(41, 601))
    assert grids.share_of((375, 1242), CROPS["garg"]) == (slice(153, 371), slice(44, 1197))
    assert grids.share_of((375, 1242), CROPS["eigen"]) == (slice(124, 342), slice(44, 1197))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_turned_label_map_is_turned_whole(tmp_path, orientation):
    """Its size and its pixels are read in one way: as the photograph is displayed."""
    labels = np.random.default_rng(0).integers(0, 4, (24, 32), dtype=np.uint8)
    back = {1: lambda a: a, 3: lambda a: a[::-1, ::-1], 6: lambda a: np.rot90(a)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path, [Image.fromarray(np.ascontiguousarray(back(labels)))] * 3, "annotations", exif)
    for found in read(tmp_path, "labels"):
        assert np.array_equal(found.numpy(), labels)


@pytest.mark.parametrize("form", ["bits", "0/255", "0/1", "palette"])
def test_masks_of_every_form(tmp_path, form):
    truth = np.random.default_rng(0).integers(0, 2, (24, 32), dtype=np.uint8)
    image = Image.fromarray(truth * (1 if form in ("0/1", "palette") else 255))
    if form == "bits":
        image = image.convert("1")
    if form == "palette":
        image.putpalette([0, 0, 0, 255, 255, 255])
    write(tmp_path, [image] * 3, "annotations")
    data = open_data(tmp_path, "labels", masks=True)
    assert data.num_classes == 2
    for found in read(tmp_path, "labels", masks=True):
        assert np.array_equal(found.numpy(), truth)
    if form == "bits":
        with pytest.raises(DataError, match="give --masks"):
            read(tmp_path, "labels")
    if form == "0/255":
        with pytest.raises(DataError, match="--masks if maps are masks"):
            open_data(tmp_path, "labels").counted()


def test_masks_with_void_and_other_values(tmp_path):
    values = np.full((24, 32), 255, dtype=np.uint8)
    values[0], values[1] = 0, 128
    write(tmp_path, [Image.fromarray(values)] * 3, "annotations")
    with pytest.raises(DataError, match="holds 128, 255 beside 0"):
        read(tmp_path, "labels", masks=True)
    found = read(tmp_path, "labels", masks=True, ignore=(128,))[0]
    assert (
        found[0].unique().tolist() == [0] and found[1].unique().tolist() == [-1] and found[2:].unique().tolist() == [1]
    )
    with pytest.raises(ConfigError, match="masks have 2 classes"):
        open_data(tmp_path, "labels", masks=True, num_classes=3)


def test_the_class_token_follows_each_patch():
    tokens = Tokens(torch.rand(1, 3, 4, 5), torch.rand(1, 2, 5))
    found = with_class_token(tokens)
    assert torch.equal(found[..., :5], tokens.patches[0])
    assert all(torch.equal(row, tokens.prefix[0, 0]) for row in found[..., 5:].flatten(0, 1))
    with pytest.raises(ShapeError, match="class token is needed"):
        with_class_token(Tokens.of(torch.rand(1, 3, 4, 5)))


def test_a_depth_probe_with_all_of_it(tmp_path, tiny_backbone):
    maps = [Image.fromarray((METRES * 256).astype(np.uint16))] * 3
    write(tmp_path / "data", maps, "depth")
    config = ProbeConfig(
        "depth", tmp_path / "data", cache=tmp_path / "cache", seeds=1, baselines=(), depth_scale=256, max_depth=60
    )
    plain = run_probe(config, tiny_backbone)
    cropped = run_probe(replace(config, depth_crop="garg", class_token=True), tiny_backbone)
    assert plain.probes["raw"].depths[1] <= 60
    assert cropped.probes["raw"].head[0].num_features == 2 * tiny_backbone.feature_dim
    assert plain.rows[0].scores != cropped.rows[0].scores
    for options, said in (
        ({"min_depth": 5.0, "max_depth": 2.0}, "hold nothing"),
        ({"depth_crop": "nyu", "protocol": "crops"}, "whole frames"),
        ({"depth_crop": "middle"}, "depth_crop is 'middle'"),
        ({"task": "discovery", "class_token": True}, "class_token out"),
    ):
        with pytest.raises(ConfigError, match=said):
            replace(config, **options)
