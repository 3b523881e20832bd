"""Pictures: equal features have equal colours, every panel is there, and nothing global is touched."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvt import grids
from dvt.analysis import pictures
from dvt.errors import ConfigError, ShapeError


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_parts(grid=(10, 14), channels=8):
    """A map whose left half is one token and whose right half another, with a little noise."""
    tokens = noise(channels, seed=1).expand(*grid, channels).clone()
    tokens[:, grid[1] // 2 :] = noise(channels, seed=2)
    return tokens + 0.01 * noise(*grid, channels, seed=3)


def figure_of(**options):
    semantic, artifact = two_parts(), 0.3 * noise(10, 14, 8, seed=4)
    image = torch.rand(3, 80, 112, generator=torch.Generator().manual_seed(0))
    return pictures.decomposition_figure(image, semantic + artifact, semantic, artifact, **options)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 9), st.floats(0.1, 100), st.integers(2, 12))
def test_colours_are_deterministic_in_range_and_free_of_offset_and_scale(seed, width, scale, channels):
    tokens, other = noise(6, width, channels, seed=seed), noise(4, 5, channels, seed=seed + 1)
    colours = pictures.pca_colours([tokens, other])
    again = pictures.pca_colours([tokens, other])
    assert [tuple(each.shape) for each in colours] == [(6, width, 3), (4, 5, 3)]
    assert all(torch.equal(a, b) for a, b in zip(colours, again, strict=True))
    assert all(float(each.min()) >= 0 and float(each.max()) <= 1 for each in colours)
    moved = pictures.pca_colours([tokens, other * scale + noise(channels, seed=9)])
    assert torch.allclose(moved[1], colours[1], atol=2e-3)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_the_same_direction_has_the_same_colour_in_every_map(seed):
    """A second map made of the first one's tokens in another order shows the first one's colours in that order."""
    tokens = noise(5, 8, 6, seed=seed)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    moved = tokens.view(40, 6)[order].view(8, 5, 6)
    first, second = pictures.pca_colours(tokens, moved)
    assert torch.allclose(first.reshape(40, 3)[order], second.reshape(40, 3), atol=1e-4)


def test_colours_are_the_principal_components_of_scikit_learn():
    from sklearn.decomposition import PCA

    tokens = noise(12, 15, 7) * torch.tensor([5.0, 3, 2, 1, 1, 0.5, 0.1])
    colours = pictures.pca_colours(tokens)[0].reshape(-1, 3).numpy()
    components = PCA(3).fit_transform(tokens.reshape(-1, 7).numpy())
    for channel in range(3):
        shown = (colours[:, channel] > 0) & (colours[:, channel] < 1)
        assert shown.mean() > 0.95
        assert abs(np.corrcoef(colours[shown, channel], components[shown, channel])[0, 1]) > 0.9999


def test_a_strong_artifact_in_raw_does_not_hide_the_semantic_map():
    semantic = two_parts()
    ramp = grids.grid_centres((10, 14)) @ noise(2, 8, seed=5) * 40
    raw_colours, colours = pictures.pca_colours([semantic + ramp, semantic])
    gap = (colours[:, :7].mean((0, 1)) - colours[:, 7:].mean((0, 1))).norm()
    assert float(gap) > 0.5
    assert float(colours[:, :7].flatten(0, 1).std(0).max()) < 0.1 < float(raw_colours.flatten(0, 1).std(0).min())


def test_constant_maps_and_few_channels_are_grey_where_nothing_is_known():
    assert torch.equal(pictures.pca_colours(torch.ones(3, 4, 5))[0], torch.full((3, 4, 3), 0.5))
    narrow = pictures.pca_colours(noise(6, 6, 1))[0]
    assert torch.equal(narrow[..., 1:], torch.full((6, 6, 2), 0.5)) and float(narrow[..., 0].std()) > 0.1
    with pytest.raises(ShapeError, match=r"\(h, w, C\)"):
        pictures.pca_colours(noise(2, 3, 4, 5))


def test_similarity_against_numpy_and_free_of_the_constant():
    tokens = noise(6, 9, 5)
    found = pictures.similarity(tokens, torch.tensor([0.5, 0.25]))  # column 4, row 1
    centred = tokens.numpy() - tokens.numpy().mean((0, 1))
    norms = np.linalg.norm(centred, axis=-1)
    assert found.numpy() == pytest.approx(centred @ centred[1, 4] / norms / norms[1, 4], abs=1e-5)
    assert float(found[1, 4]) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(pictures.similarity(tokens + 7, torch.tensor([0.5, 0.25])), found, atol=1e-4)


def test_points_lie_in_different_parts_away_from_the_border_and_repeat():
    points = pictures.choose_points(two_parts(), 2)
    assert torch.equal(points, pictures.choose_points(two_parts(), 2))
    assert sorted((points[:, 0] > 0.5).tolist()) == [False, True]
    assert float(points.min()) > 1.5 / 14 and float(points.max()) < 1 - 1.5 / 14
    many = pictures.choose_points(noise(14, 21, 6))
    assert float(torch.pdist(many * torch.tensor([1.5, 1.0])).min()) >= 0.2
    assert len(pictures.choose_points(torch.ones(5, 5, 3))) == 1


def test_the_figure_has_every_panel_and_its_data():
    figure = figure_of(residual=0.1 * noise(10, 14, 8, seed=6))
    titles = [axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")]
    assert titles[:4] == ["Input, with points to compare", "Raw, PCA colours", "Semantic, same colours", titles[3]]
    assert titles[3].startswith("Artifact")
    assert [title.split(" (")[0] for title in titles[4:8]] == [
        f"Norm, {name}" for name in ("raw", "semantic", "artifact", "residual")
    ]
    assert titles[8:] == [f"Similarity to point {k}, {name}" for name in ("raw", "semantic") for k in (1, 2, 3, 4)]
    norms = figure.axes[5].images[0]
    assert np.allclose(norms.get_array(), two_parts().norm(dim=-1).numpy(), atol=1e-5)
    assert {each.images[0].get_clim() for each in figure.axes[4:8]} == {norms.get_clim()}
    assert len({each.images[0].get_clim() for each in figure.axes[8:16]}) == 1
    assert all(each.images[0].get_interpolation() == "nearest" for each in figure.axes[:16])


def test_a_flat_norm_map_says_why():
    ones = torch.nn.functional.normalize(two_parts(), dim=-1) * 7
    figure = pictures.decomposition_figure(torch.rand(3, 80, 112), ones, 0.3 * ones, 0.7 * ones)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert "Norm, raw: 7 (final norm)" in titles


def test_titles_over_an_upright_image_do_not_run_into_each_other():
    tokens = torch.nn.functional.normalize(noise(21, 14, 8), dim=-1) * 13.86
    figure = pictures.decomposition_figure(torch.rand(3, 336, 224), tokens, 0.7 * noise(21, 14, 8), 0.3 * tokens)
    figure.draw_without_rendering()
    titles = [axis._left_title for axis in figure.axes if axis.get_title(loc="left")]
    boxes = [title.get_window_extent() for title in titles]
    for first, second in pairwise(boxes):
        assert first.x1 < second.x0 or first.y0 > second.y1, [title.get_text() for title in titles]


def test_without_a_residual_the_rest_is_shown_and_points_can_be_given():
    figure = figure_of(points=torch.tensor([[0.3, 0.3], [0.8, 0.6]]))
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert "Norm, left over: zero" in titles
    assert "Similarity to point 2, raw" in titles and "Similarity to point 3, raw" not in titles
    marks = [line.get_xydata()[0].tolist() for line in figure.axes[0].lines]
    assert marks == [pytest.approx([0.3, 0.3]), pytest.approx([0.8, 0.6])]


@pytest.mark.parametrize("grid", [(10, 14), (14, 10), (3, 40), (40, 3), (2, 2)])
def test_titles_and_panels_do_not_overlap(grid):
    tokens = noise(*grid, 6)
    image = torch.rand(3, grid[0] * 8, grid[1] * 8)
    figure = pictures.decomposition_figure(image, tokens, tokens * 0.7, tokens * 0.3)
    figure.draw_without_rendering()
    shown = [axis for axis in figure.axes if axis.get_title(loc="left")]
    boxes = [axis.get_window_extent() for axis in shown] + [axis._left_title.get_window_extent() for axis in shown]
    width, height = figure.bbox.width, figure.bbox.height
    for index, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        for other in boxes[index + 1 :]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(across, down) < 1


def test_the_file_is_whole_and_leaves_no_part(tmp_path):
    from PIL import Image

    path = pictures.save(figure_of(), tmp_path / "new" / "page.png", dpi=50)
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 500
        assert np.asarray(picture.convert("L")).std() > 10
    assert [each.name for each in path.parent.iterdir()] == ["page.png"]


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(b"old")

    class Broken:
        def savefig(self, target, **options):
            target.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(ConfigError, match=r"disk full.*make room"):
        pictures.save(Broken(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_no_global_state_is_touched():
    """In a fresh process: importing is light, and drawing neither loads pyplot nor changes any setting."""
    code = """
import sys, torch
import dvt.analysis.pictures as pictures
heavy = {"matplotlib", "sklearn", "scipy"} & set(sys.modules)
assert not heavy, heavy
import matplotlib
before = dict(matplotlib.rcParams.copy())
state = torch.get_rng_state()
tokens = torch.randn(6, 6, 4, generator=torch.Generator().manual_seed(0))
pictures.decomposition_figure(torch.zeros(3, 48, 48), tokens, tokens, tokens * 0).savefig(sys.argv[1], dpi=30)
assert dict(matplotlib.rcParams.copy()) == before
assert "matplotlib.pyplot" not in sys.modules
assert torch.equal(state, torch.get_rng_state())
"""
    subprocess.run([sys.executable, "-c", code, "/dev/null"], check=True, timeout=120)


def test_shapes_that_disagree_are_refused():
    tokens, image = noise(4, 4, 3), torch.zeros(3, 32, 32)
    with pytest.raises(ShapeError, match="all maps one"):
        pictures.decomposition_figure(image, tokens, tokens[:3], tokens)
    with pytest.raises(ShapeError, match="image must be"):
        pictures.decomposition_figure(image[:1], tokens, tokens, tokens)
    with pytest.raises(ShapeError, match="points"):
        pictures.decomposition_figure(image, tokens, tokens, tokens, points=torch.zeros(5, 2))
