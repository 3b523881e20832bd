"""dvt.denoise with plain arguments, with lists and batches, and what it says of what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dvt
from dvt.errors import ConfigError, ImageError, NonFiniteError
from dvt.fields.image import denoise_image


@pytest.fixture(scope="module")
def photos():
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, height, width, generator=generator) for height, width in [(96, 96)] * 3 + [(96, 144)] * 2]


def same(found, expected, tolerance=2e-4):
    for name, value in expected.terms().items():
        torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("product", ["removed", "ensembled"])
@pytest.mark.parametrize("together", [1, 8])
def test_several_images_give_what_each_gives_alone(tiny_backbone, photos, product, together):
    config = dvt.DenoiseConfig(views=6, product=product, solve_images=together)
    found = dvt.denoise(tiny_backbone, photos, config)
    assert iter(found) is found
    results = list(found)
    assert len(results) == len(photos)
    for result, image in zip(results, photos, strict=True):
        same(result, dvt.denoise(tiny_backbone, image, config))


def test_batches_arrays_paths_and_generators(tiny_backbone, photos, tmp_path):
    batch = (torch.stack(photos[:2]) * 255).round().to(torch.uint8)
    expected = list(dvt.denoise(tiny_backbone, batch, views=4))
    last = batch.permute(0, 2, 3, 1).numpy()
    for number, pixels in enumerate(last):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    files = sorted(tmp_path.glob("*.png"))
    forms = [last, last.astype(np.float32) / 255, files, list(map(str, files)), map(Image.open, files)]
    for form in [*forms, [files[0], last[1]], (each for each in batch)]:
        for found, wanted in zip(dvt.denoise(tiny_backbone, form, views=4), expected, strict=True):
            same(found, wanted)


def test_images_are_read_as_the_results_are_taken(tiny_backbone, photos):
    read = []

    def one_by_one():
        for number, image in enumerate(photos):
            read.append(number)
            yield image

    results = dvt.denoise(tiny_backbone, one_by_one(), views=2)
    assert read == []
    next(results)
    assert len(read) == 2  # the second tells that the first has no neighbour to wait for


def test_plain_arguments_are_those_of_the_config(tiny_backbone, photos):
    image = photos[0]
    plain = dvt.denoise(tiny_backbone, image, views=5, product="ensembled")
    same(plain, dvt.denoise(tiny_backbone, image, dvt.DenoiseConfig(views=5, product="ensembled")), 0)
    half = dvt.denoise(tiny_backbone, image, views=5, product="ensembled", strength=0.5)
    torch.testing.assert_close(half.semantic, (plain.raw + plain.semantic) / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(half.artifact, plain.artifact / 2)
    assert torch.equal(dvt.denoise(tiny_backbone, image, views=5, strength=0).semantic, plain.raw)
    many = list(dvt.denoise(tiny_backbone, photos[:2], views=5, product="ensembled", strength=0.5))
    same(many[0], half)
    assert dvt.DenoiseConfig(views=48).views.count == 48


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": dvt.DenoiseConfig(views=2), "views": 3}, "a config and views=3 were given"),
        ({"config": {"views": 3}}, "config is a dict"),
        ({"views": "48"}, "views is '48'; give their number"),
        ({"views": 4.0}, "views is 4.0"),
        ({"views": -1}, "views is -1; it must be 0 or more"),
        ({"product": "clean"}, "product is 'clean'; it must be one of removed, ensembled, blend"),
        ({"strength": 2}, r"strength is 2; it must lie in \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(tiny_backbone, photos, options, said):
    for given in (photos[0], photos):
        with pytest.raises(ConfigError, match=said):
            dvt.denoise(tiny_backbone, given, **options)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "the list holds no image"),
        (torch.zeros(0, 3, 64, 64), r"the batch \(0, 3, 64, 64\) holds no image"),
        (torch.zeros(2, 64, 64, 3), r"image 1 of the batch \(2, 64, 64, 3\).*image.permute\(2, 0, 1\)"),
        (np.zeros((2, 3, 64, 64)), r"image 1 of the batch \(2, 3, 64, 64\).*image.transpose\(1, 2, 0\)"),
        (torch.full((2, 3, 64, 64), 255.0), "image 1 of the batch.*from 255 to 255 were given.*divide values"),
        ([torch.zeros(3, 64, 64), torch.zeros(64, 64)], r"image 2 of the list: .*shape \(64, 64\)"),
        (["missing.jpg"], "image 1 of the list: cannot read image 'missing.jpg'"),
        ([[torch.zeros(3, 64, 64)]], "image 1 of the list: an image was given as list"),
        ([torch.zeros(3, 64, 64), torch.zeros(3, 4, 4000)], "image 2 of several: an image of 4 x 4000"),
        ({"a": torch.zeros(3, 64, 64)}, "an image was given as dict"),
        (7, "an image was given as int"),
        (torch.zeros(1, 2, 3, 64, 64), r"image 1 of the list.*\(2, 3, 64, 64\)|has shape \(1, 2, 3, 64, 64\)"),
    ],
)
def test_what_cannot_be_read_is_named_as_it_was_given(tiny_backbone, images, said):
    with pytest.raises(ImageError, match=said):
        for _ in dvt.denoise(tiny_backbone, images, views=1):
            pass


def test_an_image_of_no_use_ends_a_group_with_its_reason(make_tiny_backbone, photos):
    backbone = make_tiny_backbone()
    backbone.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError):
        list(dvt.denoise(backbone, photos[:2], dvt.DenoiseConfig(views=2, solve_images=2)))


def test_one_line_for_many_files(tiny_backbone, photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(photos[:3]):
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    config = dvt.DenoiseConfig(views=2)
    for number, given in enumerate((folder, str(folder / "*.png"), sorted(folder.iterdir()))):
        summary = dvt.denoise_images(tiny_backbone, given, tmp_path / f"store{number}", config)
        store = dvt.FeatureStore(tmp_path / f"store{number}", "semantic")
        assert summary.done == len(store) == 3
        alone = denoise_image(tiny_backbone, Path(folder / "1.png"), config).decomposition.semantic
        torch.testing.assert_close(store["1.png"].patches[0], alone, rtol=0, atol=0.02)
    assert dvt.denoise_images(tiny_backbone, folder, tmp_path / "defaults").done == 3
