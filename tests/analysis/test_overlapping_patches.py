"""Patches that overlap: maps are enlarged, cut into cells and compared at the places where their patches look."""

import base64
import io
import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import dvt
from dvt import grids
from dvt.analysis import pictures
from dvt.analysis.matching import match_images
from dvt.analysis.page.plots import pca_figure, position_figure
from dvt.analysis.page.report import render
from dvt.analysis.page.store_page import store_page
from dvt.analysis.page.viewer import Arrays, Shown
from dvt.analysis.probes.depth import DepthProbe
from dvt.analysis.probes.discovery import Lost, lost, token_cut
from dvt.analysis.probes.probe import HeadConfig, enlarged
from dvt.analysis.probes.segmentation import KnnSegmentation, LinearSegmentation, class_shares
from dvt.analysis.results import Report
from dvt.store import Job, Record, StoreWriter

PATCH, STRIDE = (16, 16), (8, 8)
SIZES = [(64, 96), (96, 64), (80, 80)]


def centres_at(stride):
    return partial(grids.overlapping_centres, patch=PATCH, stride=stride)


def exact(size, stride=STRIDE, seed=0, classes=4):
    """Tokens that are the class (one-hot) at each patch centre, and labels that are the class of the nearest centre.

    Classes are stripes, upright in even seeds: where they meet at corners, bilinear scores draw other borders.
    """
    centres = grids.patch_centres(size, PATCH, stride)
    side = seed % 2
    stripes = torch.randint(classes, (centres.shape[1 - side],), generator=torch.Generator().manual_seed(seed))
    labels = (stripes[:, None] if side else stripes).expand(centres.shape[:2])
    rows, columns = (
        torch.bucketize((torch.arange(length) + 0.5) / length, edges[1:-1].contiguous())
        for length, edges in zip(size, grids.cell_edges(centres), strict=True)
    )
    return torch.eye(classes)[labels], labels[rows[:, None], columns]


@pytest.mark.parametrize("stride", [(8, 8), (4, 8), (16, 16), (5, 7)])
@pytest.mark.parametrize("size", SIZES)
def test_the_grid_alone_gives_the_centres(size, stride):
    expected = grids.patch_centres(size, PATCH, stride)
    assert torch.equal(centres_at(stride)(grids.grid_shape(size, PATCH, stride)), expected)
    backbone = dvt.load_backbone("test_vit", pretrained=False, stride=stride)
    assert torch.equal(backbone.grid_centres(backbone.grid(size)), backbone.centres(size))


@pytest.mark.parametrize("stride", [(8, 8), (4, 8), (16, 16), (5, 7)])
def test_a_linear_map_is_enlarged_to_itself(stride):
    """Values that are the coordinates of the centres become the coordinates of the pixels, between the centres."""
    size = (64, 96)
    centres = grids.patch_centres(size, PATCH, stride)
    found = enlarged(centres.movedim(-1, 0)[None], size, centres_at(stride))[0].movedim(0, -1)
    pixels = grids.grid_centres(size)
    inside = ((pixels >= centres[0, 0]) & (pixels <= centres[-1, -1])).all(-1)
    torch.testing.assert_close(found[inside], pixels[inside], rtol=0, atol=1e-5)
    if stride == PATCH:
        torch.testing.assert_close(enlarged(centres.movedim(-1, 0)[None], size)[0].movedim(0, -1), found)


@pytest.mark.parametrize("rows", [1, 2])
def test_grids_of_one_row_or_column_are_enlarged(rows):
    maps = torch.arange(rows * 3.0).view(1, 1, rows, 3)
    centres = grids.patch_centres((16 * rows, 32), (16 * rows, 16), (8, 8))[:1].expand(rows, -1, -1)
    found = grids.enlarge(maps[:, :, :1], (16, 32), centres[:1])
    assert found.isfinite().all() and found[0, 0, 0, 0] == 0 and found[0, 0, 0, -1] == 2


def test_knn_on_exact_labels_is_right_everywhere():
    pairs = [exact(size, seed=seed) for seed, size in enumerate(SIZES)]
    maps, labels = [list(each) for each in zip(*pairs, strict=True)]
    probe = KnnSegmentation(4, 1).at(centres_at(STRIDE)).fit(maps, labels)
    assert probe.score(maps, labels)["mIoU"] == 1.0
    assert KnnSegmentation(4, 1).fit(maps, labels).score(maps, labels)["mIoU"] < 0.95  # as if patches tiled the image


def test_heads_learn_exact_labels_and_depth():
    pairs = [exact(size, seed=seed, classes=2) for seed, size in enumerate(SIZES * 2)]
    maps, labels = [list(each) for each in zip(*pairs, strict=True)]
    depths = [1.0 + label.float() for label in labels]
    config = HeadConfig(epochs=60, labels_per_patch=0, learning_rate=3e-2)
    scores = {}
    for name, centres in (("true", centres_at(STRIDE)), ("tiles", grids.grid_centres)):
        segmentation = LinearSegmentation(2, config).at(centres).fit(maps, labels).score(maps, labels)["mIoU"]
        depth = DepthProbe("linear", config).at(centres).fit(maps, depths).score(maps, depths)["RMSE"]
        scores[name] = segmentation, depth
    assert scores["true"][0] > 0.99 > scores["tiles"][0]
    assert scores["true"][1] < scores["tiles"][1]


@pytest.mark.parametrize("size", SIZES)
def test_shares_are_those_of_the_nearest_pixels(size):
    tokens, labels = exact(size)
    assert torch.equal(class_shares(labels, 4, grids.patch_centres(size, PATCH, STRIDE)), tokens)


def test_boxes_lie_around_the_pixels_that_are_nearest_to_an_object():
    size = (96, 128)
    centres = grids.patch_centres(size, PATCH, STRIDE)
    tokens = -torch.ones(*centres.shape[:2], 1)
    tokens[3:7, 4:9] = 1
    # Centres lie at 8, 16, 24, ...; rows 3 to 6 at 32 to 56, columns 4 to 8 at 40 to 72.
    truth = [36 / 128, 28 / 96, 76 / 128, 60 / 96]
    assert lost(tokens, 5, centres).tolist() == pytest.approx(truth)
    assert Lost(5).at(centres_at(STRIDE)).predict([tokens], [size])[0].tolist() == [36, 28, 76, 60]
    two = torch.eye(2)[(tokens[..., 0] > 0).long()]
    assert token_cut(two, centres=centres).tolist() == pytest.approx(truth)


def test_matches_are_the_centres_of_patches():
    tokens = torch.eye(21).view(3, 7, 21)
    centres = grids.patch_centres((32, 64), PATCH, STRIDE)
    found = match_images(tokens, tokens.flip(1), centres=(centres, centres))
    assert {tuple(each) for each in found.first.tolist()} == {tuple(each) for each in centres.flatten(0, 1).tolist()}
    torch.testing.assert_close(found.first[:, 0], 1 - found.second[:, 0])


def test_pictures_of_cells_are_labels_of_the_nearest_centres():
    size = (80, 80)
    tokens, labels = exact(size)
    centres = grids.patch_centres(size, PATCH, STRIDE)
    drawn = grids.drawn_cells(tokens.argmax(-1), centres)
    assert drawn.shape == (4 * 9, 4 * 9)
    rows, columns = ((grids.grid_centres(tuple(drawn.shape))[..., k] * size[1 - k]).long() for k in (1, 0))
    assert (drawn == labels[rows, columns]).all()
    plain = tokens[:5, :5]
    assert grids.drawn_cells(plain, grids.patch_centres(size, PATCH)) is plain is grids.drawn_cells(plain, None)


def test_a_figure_draws_overlapping_patches_at_their_places():
    size = (80, 80)
    centres = grids.patch_centres(size, PATCH, STRIDE)
    tokens, labels = exact(size)
    point = centres[3, 4]
    figure = pictures.decomposition_figure(
        torch.rand(3, *size), tokens, tokens, torch.zeros_like(tokens), points=point[None], centres=centres
    )
    found = next(axis for axis in figure.axes if axis.get_title(loc="left") == "Similarity to point 1, semantic")
    alike = torch.as_tensor(found.images[0].get_array()) > 0.99
    rows, columns = ((grids.grid_centres(tuple(alike.shape))[..., k] * size[1 - k]).long() for k in (1, 0))
    here = labels[int(point[1] * size[0]), int(point[0] * size[1])]
    assert torch.equal(alike, labels[rows, columns] == here)
    chosen = pictures.choose_points(tokens, 4, centres)
    assert all((centres == each).all(-1).any() for each in chosen)


def nearest(values, centres, shape):
    """The value (h, w) of the nearest centre at each pixel of a picture of this shape (rows, columns)."""
    places = grids.grid_centres(tuple(shape)).flatten(0, 1)
    return values.flatten()[torch.cdist(places, centres.flatten(0, 1)).argmin(1)].view(*shape)


def pictures_of(page):
    """The maps of a page, in order, as pixels (h, w, 3)."""
    found = re.findall(r'class="map" src="data:image/png;base64,([^"]+)" width="(\d+)" height="(\d+)"', page)
    for data, width, height in found:
        yield torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(data))))), (int(height), int(width))


def test_the_page_of_a_store_draws_overlapping_patches_at_their_places(tmp_path):
    size = (64, 112)
    tokens, _ = exact(size)
    classes, centres = tokens.argmax(-1), grids.patch_centres(size, PATCH, STRIDE)
    for stride in (8, 16):
        job = Job("vit_tiny_patch16_224", "0" * 64, stride=stride, size=64)
        values = tokens if stride == 8 else tokens[:4, :7]
        with StoreWriter(tmp_path / f"{stride}", job) as writer:
            writer.write("one", [Record("x.jpg", "a" * 64, size, {"raw": values.numpy().astype(np.float16)})])
    page = store_page(tmp_path / "8")
    backbone = json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])["backbones"][0]
    rows, columns = (torch.tensor(each) for each in backbone["cells"]["7x13"])
    assert torch.equal(classes[rows[:, None], columns], nearest(classes, centres, (28, 52)))
    [(drawn, shape)] = pictures_of(page)
    assert shape == (137, 240)  # the photograph's proportions, not those of the grid
    known = nearest(classes, centres, drawn.shape[:2])
    assert all(len(drawn[known == each].unique(dim=0)) == 1 for each in classes.unique())
    assert len(drawn.flatten(0, 1).unique(dim=0)) == len(classes.unique())
    plain = store_page(tmp_path / "16")
    assert '"cells":{}' in plain and next(pictures_of(plain))[0].shape == (4, 7, 3)


def test_the_page_and_the_plots_of_a_report_draw_overlapping_patches_at_their_places():
    size = (80, 80)
    tokens, _ = exact(size)
    classes, arrays = tokens.argmax(-1), Arrays()
    known = nearest(classes, grids.patch_centres(size, PATCH, STRIDE), (36, 36))
    arrays.add_jpeg(0, torch.rand(3, *size))
    arrays.add_maps([Shown(0, "vit", -1, "raw", tokens)])
    arrays.add_position("vit", -1, "raw", 1.0 + classes[..., None].float())
    about = {"label": "vit", "name": "vit", "layer": -1, "feature_dim": 4, "image_size": [80, 80]}
    about |= {"weights_sha256": "0", "patch_size": [16, 16], "stride": [8, 8]}
    seconds = dict.fromkeys(("forward", "fields", "denoisers", "metrics", "total"), 1.0)
    report = Report([], ["a.png"], [about], seconds, {}, arrays.index, arrays.arrays)
    for drawn, shape in pictures_of(render(report)):
        assert shape == size and drawn.shape[:2] == (36, 36)
        assert all(len(drawn[known == each].unique(dim=0)) == 1 for each in classes.unique())
    (heat,) = [axis.images[0] for axis in position_figure(report).axes if axis.images and not axis.get_label()]
    assert torch.equal(torch.as_tensor(heat.get_array().data), 1.0 + known)
    assert pca_figure(report).axes[1].images[0].get_array().shape == (36, 36, 3)
    tiled = replace(report, backbones=[{**about, "stride": [16, 16]}])
    assert [drawn.shape for drawn, _ in pictures_of(render(tiled))] == [(9, 9, 3)] * 2
    assert "16 x 16 pixels every 8 x 8 pixels, meant" in render(report)
    assert "16 x 16 pixels, meant" in render(tiled)
    for wrong in ([0, 8], [17, 8]):
        with pytest.raises(dvt.errors.ConfigError, match="cannot be drawn"):
            render(replace(report, backbones=[{**about, "stride": wrong}]))
