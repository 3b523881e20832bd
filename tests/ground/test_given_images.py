"""An image in every form that functions take, and pixels that are refused by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from dvt.errors import ImageError
from dvt.images import image_list, load_image, read_image


def test_every_form_of_one_image_gives_the_same_pixels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    wanted = load_image(path)
    forms = [path, str(path), Image.fromarray(array), array, array.astype(np.float64) / 255]
    forms += [torch.from_numpy(array).permute(2, 0, 1), wanted, array[::-1][::-1]]
    for form in forms:
        pixels = read_image(form)
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels, wanted)


def test_a_pil_image_is_turned_as_its_file_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(105, dtype=np.uint8).reshape(5, 7, 3)).save(path, exif=exif)
    with Image.open(path) as image:
        torch.testing.assert_close(read_image(image), load_image(path))
    assert load_image(path).shape == (3, 7, 5)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.linspace(0, 255, 60).reshape(3, 4, 5), r"float32 from 0 to 255.*divide"),
        (np.full((4, 5, 3), np.nan), "float64 from nan"),
        (torch.full((3, 4, 5), -2.0), "from -2 to -2"),
        (torch.zeros(4, 5, 3), r"\(4, 5, 3\).*permute\(2, 0, 1\)"),
        (np.zeros((3, 4, 5)), r"\(3, 4, 5\).*transpose\(1, 2, 0\)"),
        (torch.zeros(2, 3, 4, 5), r"\(2, 3, 4, 5\).*one image at a time"),
        (np.zeros((4, 5)), r"\(4, 5\).*give a \(H, W, 3\) array"),
        (torch.zeros(3, 0, 5), r"\(3, 0, 5\)"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), "torch.int64"),
        (7, "given as int"),
    ],
)
def test_other_pixels_are_refused_by_what_was_given(image, said):
    with pytest.raises(ImageError, match=said):
        read_image(image)


def test_images_of_one_argument_are_listed(tmp_path):
    array = np.zeros((5, 7, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "b.png")
    Image.fromarray(array).save(tmp_path / "a.png")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    assert image_list(tmp_path) == image_list(str(tmp_path)) == image_list(iter(paths)) == paths
    assert image_list(str(paths[0])) == paths[:1]
    one = torch.zeros(3, 5, 7)
    assert image_list(one)[0] is one and len(image_list(array)) == len(image_list(Image.fromarray(array))) == 1
    assert len(image_list(torch.zeros(2, 3, 5, 7))) == 2 and image_list([]) == []
    for wrong in (7, None, b"a.png", {"image": one}):
        with pytest.raises(ImageError, match=f"given as {type(wrong).__name__}"):
            image_list(wrong)
