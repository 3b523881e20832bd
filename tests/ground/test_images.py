"""Finding, measuring and reading images; every bad file is made here."""

import hashlib
import io
import os
import resource
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dvt.errors import ImageError
from dvt.images import (
    MAX_PIXELS,
    SUFFIXES,
    file_sha256,
    find_images,
    find_sources,
    image_size,
    load_image,
    size_and_sha256,
)

PHOTO = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def save(path: Path, array=PHOTO, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2, late: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + late + png_chunk(b"IEND", b"")


# -- finding --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for name in ("b.png", "a.JPG", "sub/c.tif", "sub/deep/d.webp", ".hidden/e.png", "._b.png", "notes.md", "x.npy"):
        (root / name).write_bytes(b"-")
    return root


def names(found: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in found]


def test_a_folder_is_searched_to_its_depths(tree):
    assert names(find_images([tree]), tree) == ["a.JPG", "b.png", "sub/c.tif", "sub/deep/d.webp"]


def test_pictures_that_dvt_drew_are_left_out_and_told(tree, caplog):
    from matplotlib.figure import Figure

    from dvt.analysis.pictures import save

    drawn = save(Figure((1, 1)), tree / "out" / "pictures" / "drawn.png")
    Figure((1, 1)).savefig(tree / "plot.png")  # matplotlib's, but not dvt's
    wanted = ["a.JPG", "b.png", "plot.png", "sub/c.tif", "sub/deep/d.webp"]
    assert names(find_images([tree]), tree) == wanted
    assert "left out 1 picture in" in caplog.text and str(tree) in caplog.text
    assert find_images([f"{tree}/**/*.png"]) == [tree / "b.png", tree / "plot.png"]
    assert find_images([drawn]) == [drawn]  # asked for by name
    (tree / "out" / "shard-0.h5").touch()
    with pytest.raises(ImageError, match=r"out' is a feature store.*photographs.*--store"):
        find_images([tree / "out"])


def test_symlinked_folders_are_followed_and_loops_end(tree, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far.png").write_bytes(b"-")
    (tree / "link").symlink_to(elsewhere)
    (tree / "sub" / "loop").symlink_to(tree)
    (elsewhere / "back").symlink_to(elsewhere)
    found = find_images([tree])
    assert names(found, tree) == ["a.JPG", "b.png", "link/far.png", "sub/c.tif", "sub/deep/d.webp"]


def test_one_file_under_several_paths_is_found_once(tree, monkeypatch):
    (tree / "z.png").symlink_to(tree / "b.png")
    monkeypatch.chdir(tree)
    found = find_images(["z.png", "b.png", tree / "sub" / ".." / "b.png", "*.png"])
    assert len(found) == 1 and found[0].samefile("b.png")


def test_globs_take_images_and_folders(tree):
    assert names(find_images([str(tree / "**" / "*.tif")]), tree) == ["sub/c.tif"]
    assert names(find_images([f"{tree}/*"]), tree) == ["a.JPG", "b.png", "sub/c.tif", "sub/deep/d.webp"]


def test_a_name_with_glob_characters_is_a_name_first(tree):
    (tree / "q[1].png").write_bytes(b"-")
    assert names(find_images([tree / "q[1].png"]), tree) == ["q[1].png"]


def test_a_list_is_relative_to_its_own_folder(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listing = tree / "some.txt"
    listing.write_text(
        f"\ufeff# a comment\nb.png\r\n\n  sub/deep  \n{tree}/a.JPG\n*.tif\nsub/*.tif\n", encoding="utf-8"
    )
    assert names(find_images([listing]), tree) == ["a.JPG", "b.png", "sub/c.tif", "sub/deep/d.webp"]


def test_what_is_found_does_not_depend_on_the_order_asked(tree):
    specs = [tree / "sub", tree / "b.png", tree / "a.JPG"]
    assert find_images(specs) == find_images(specs[::-1]) == find_images([tree])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: [root / "missing.png"], "missing.png.* does not exist"),
        (lambda root: [root / "sub" / "*.png"], "no images found in .*png"),
        (lambda root: [], "no images were given"),
        (lambda root: ["a\0b.png"], "does not exist"),
        (lambda root: [_list(root, b"b.png\ngone.png\n")], "in image list .*l.txt.*gone.png.* does not exist"),
        (lambda root: [_list(root, b"\xff\xfe\x00")], "in image list .*l.txt"),
        (lambda root: [_list(root, b"a\0b\n")], "NUL"),
        (lambda root: [_list(root, b"a" * 300_000)], "in image list"),
        (lambda root: [_list(root, b"# nothing\n")], "no images found in .*l.txt"),
        (lambda root: [_list(root, b"l.txt\n")], None),
    ],
)
def test_what_cannot_be_found_is_an_error(tree, make, words):
    if words is None:  # a list inside a list is an ordinary name, so lists cannot nest without end
        assert names(find_images(make(tree)), tree) == ["l.txt"]
    else:
        with pytest.raises(ImageError, match=words):
            find_images(make(tree))


def _list(root: Path, content: bytes) -> Path:
    (root / "l.txt").write_bytes(content)
    return root / "l.txt"


def test_two_links_to_a_folder_above_are_no_endless_way(tree):
    plain = find_images([f"{tree}/**/*"])
    for name in ("one", "two"):  # glob alone goes through each of 2 ** 40 ways
        (tree / name).symlink_to(tree, target_is_directory=True)
    for pattern in ("**", "**/*", "**/**/*", "**/", "*/**/**/*"):
        found = find_images([f"{tree}/{pattern}"])
        assert {os.path.realpath(path) for path in found} == {os.path.realpath(path) for path in plain}, pattern


def test_lines_and_patterns_of_any_length(tmp_path):
    (tmp_path / "list.txt").write_text("# " + "x" * 70_000 + "\n")
    with pytest.raises(ImageError, match="line 1 takes more than 64 KB"):
        find_images([tmp_path / "list.txt"])
    with pytest.raises(ImageError, match="cannot be used as a pattern") as caught:
        find_images([f"{tmp_path}/" + "*/" * 3000])
    assert len(str(caught.value)) < 1000
    with pytest.raises(ImageError, match="no images"):
        find_images([f"{tmp_path}/*\0"])


def test_an_empty_folder_says_what_was_given(tmp_path):
    with pytest.raises(ImageError, match=f"no images found in '{tmp_path}'"):
        find_images([tmp_path])


# -- reading: known values ------------------------------------------------------------------------------------------


def test_rgb_is_exact(tmp_path):
    image = load_image(save(tmp_path / "a.png"))
    assert image.dtype == torch.float32 and image.is_contiguous()
    assert torch.equal(image, torch.from_numpy(PHOTO).permute(2, 0, 1).float() / 255)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_suffix_that_counts_can_be_read(tmp_path, suffix):
    array = np.full((32, 48, 3), 128, np.uint8)
    mode = {".pbm": "1", ".pgm": "L"}.get(suffix)
    path = save(tmp_path / f"a{suffix}", array, mode)
    image = load_image(path)
    assert image.shape == (3, 32, 48) and image_size(path) == (32, 48)
    assert abs(image.mean().item() - 0.5) < 0.02


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 1, 255, 256], [32767, 32768, 65534, 65535]], np.uint16)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(values).save(path)
    want = torch.from_numpy(values.astype(np.float32)) / 65535
    assert torch.equal(load_image(path), want.expand(3, -1, -1))


def test_big_endian_sixteen_bit_tiff_is_exact(tmp_path):
    values = np.array([[1, 256, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes()).save(buffer, "TIFF")
    (tmp_path / "a.tif").write_bytes(buffer.getvalue())
    assert torch.equal(load_image(tmp_path / "a.tif")[1], torch.from_numpy(values.astype(np.float32)) / 65535)


def test_sixteen_bit_transparent_grey_is_white(tmp_path):
    rows = b"".join(b"\0" + struct.pack(">2H", 1000, 2000) for _ in range(2))
    plain = png(2, 2, rows, depth=16, colour=0)
    (tmp_path / "a.png").write_bytes(plain[:33] + png_chunk(b"tRNS", struct.pack(">H", 1000)) + plain[33:])
    want = torch.tensor([[1.0, 2000 / 65535]] * 2).expand(3, -1, -1)
    assert torch.equal(load_image(tmp_path / "a.png"), want)


def test_float_tiff_is_taken_as_it_is(tmp_path):
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert torch.equal(load_image(tmp_path / "a.tif")[2], torch.from_numpy(values))


@pytest.mark.parametrize("bad", [-0.5, 1.5, 255.0, np.nan, np.inf])
def test_float_tiff_outside_its_range_is_refused(tmp_path, bad):
    values = np.full((3, 4), 0.5, np.float32)
    values[1, 2] = bad
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a.tif.*must lie in \[0, 1\]"):
        load_image(tmp_path / "a.tif")


def test_wide_integers_are_refused_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="65535"):
        load_image(tmp_path / "a.tif")


def test_grey_has_three_equal_channels(tmp_path):
    image = load_image(save(tmp_path / "a.png", PHOTO[..., 0]))
    assert torch.equal(image, (torch.from_numpy(PHOTO[..., 0]).float() / 255).expand(3, -1, -1))


def test_one_bit(tmp_path):
    bits = PHOTO[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert torch.equal(load_image(tmp_path / "a.png")[0], torch.from_numpy(bits).float())


def test_palette(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png")
    want = torch.tensor([[[10, 40], [70, 10]], [[20, 50], [80, 20]], [[30, 60], [90, 30]]]) / 255
    assert torch.equal(load_image(tmp_path / "a.png"), want)


@pytest.mark.parametrize("kind", ["one index", "bytes"])
def test_transparent_palette_is_white(tmp_path, kind):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=0 if kind == "one index" else b"\x00\xff")
    assert torch.equal(load_image(tmp_path / "a.png")[0], torch.tensor([[1.0, 40 / 255]]))


def test_colour_key_is_white(tmp_path):
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    want = torch.tensor([[[1, 4 / 255]], [[1, 5 / 255]], [[1, 6 / 255]]])
    assert torch.equal(load_image(tmp_path / "a.png"), want)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_over_white(tmp_path, mode):
    alpha = np.array([[0, 51, 255]], np.uint8)
    colour = np.array([[90, 90, 90]], np.uint8)
    layers = [colour] * (3 if mode == "RGBA" else 1) + [alpha]
    Image.fromarray(np.stack(layers, -1), mode).save(tmp_path / "a.png")
    want = torch.tensor([1.0, 90 / 255 * 0.2 + 0.8, 90 / 255])
    torch.testing.assert_close(load_image(tmp_path / "a.png")[:, 0], want.expand(3, 3), atol=1e-6, rtol=0)


def test_cmyk(tmp_path):
    pure = np.zeros((24, 32, 4), np.uint8)
    pure[:, :8, 0] = pure[:, 8:16, 1] = pure[:, 16:24, 2] = pure[:, 24:, 3] = 255  # stripes of cyan, magenta, ...
    Image.fromarray(pure, "CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    stripes = load_image(tmp_path / "a.jpg")[:, 12, 4::8].T
    want = torch.tensor([[0.0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(stripes, want, atol=0.02, rtol=0)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_the_first_frame_of_many(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if suffix == ".webp" else {}
    path = tmp_path / f"a{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as saved:
        assert saved.n_frames == 3
    assert torch.equal(load_image(path)[:, 3, 3], torch.tensor([1.0, 0, 0]))


@pytest.mark.parametrize("shape", [(9, 1), (1, 9), (1, 1)])
def test_one_pixel_wide_is_allowed(tmp_path, shape):
    array = PHOTO.reshape(-1, 3)[: shape[0] * shape[1]].reshape(*shape, 3)
    path = save(tmp_path / "a.png", array)
    assert load_image(path).shape == (3, *shape) and image_size(path) == shape


# Where the standard says the first row and column of the stored image lie.
TURNED = {
    1: lambda a: a,
    2: lambda a: np.fliplr(a),
    3: lambda a: np.rot90(a, 2),
    4: lambda a: np.flipud(a),
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_exif_orientation(tmp_path, orientation, suffix):
    options = {"lossless": True} if suffix == ".webp" else {}
    path = save(tmp_path / f"a{suffix}", exif=exif(orientation), **options)
    want = np.ascontiguousarray(TURNED[orientation](PHOTO))
    assert torch.equal(load_image(path), torch.from_numpy(want).permute(2, 0, 1).float() / 255)
    assert image_size(path) == want.shape[:2]


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_of_a_jpeg_agrees_with_pillow(tmp_path, orientation):
    path = save(tmp_path / "a.jpg", exif=exif(orientation))
    with Image.open(path) as image:
        want = np.array(ImageOps.exif_transpose(image))
    assert torch.equal(load_image(path), torch.from_numpy(want).permute(2, 0, 1).float() / 255)
    assert image_size(path) == want.shape[:2]


@pytest.mark.parametrize("orientation", TURNED)
def test_sixteen_bit_images_turn_too(tmp_path, orientation):
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10000
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif(orientation))
    want = np.ascontiguousarray(TURNED[orientation](values)).astype(np.float32)
    assert torch.equal(load_image(tmp_path / "a.png")[0], torch.from_numpy(want) / 65535)


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    block = exif(6).tobytes().removeprefix(b"Exif\0\0")
    rows = b"".join(b"\0" + row.tobytes() for row in PHOTO)
    (tmp_path / "a.png").write_bytes(png(7, 5, rows, late=png_chunk(b"eXIf", block)))
    assert image_size(tmp_path / "a.png") == (7, 5)
    want = np.ascontiguousarray(np.rot90(PHOTO, -1))
    assert torch.equal(load_image(tmp_path / "a.png"), torch.from_numpy(want).permute(2, 0, 1).float() / 255)


def test_a_damaged_exif_block_does_not_lose_the_image(tmp_path, caplog):
    path = save(tmp_path / "a.png", exif=b"Exif\0\0not a TIFF header at all")
    assert torch.equal(load_image(path), torch.from_numpy(PHOTO).permute(2, 0, 1).float() / 255)
    assert image_size(path) == (5, 7) and "EXIF" in caplog.text and "a.png" in caplog.text


def test_the_size_needs_no_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(png(300, 200))  # a header whose pixels are missing
    assert image_size(tmp_path / "a.png") == (200, 300)
    with pytest.raises(ImageError, match=r"a\.png"):
        load_image(tmp_path / "a.png")


# -- reading: bad files ---------------------------------------------------------------------------------------------


def half(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


NOISE = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".bmp", ".gif", ".ppm", ".jp2", ".avif"])
def test_truncated(tmp_path, suffix):
    path = half(save(tmp_path / f"a{suffix}", NOISE))
    with pytest.raises(ImageError, match=f"cannot read image .*a{suffix}'"):
        load_image(path)


def test_corrupt(tmp_path):
    path = save(tmp_path / "a.png", NOISE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.png"):
        load_image(path)


@pytest.mark.parametrize("read", [load_image, image_size, file_sha256])
def test_folders_and_missing_files(tmp_path, read):
    with pytest.raises(ImageError, match="it is a folder"):
        read(tmp_path)
    with pytest.raises(ImageError, match="No such file"):
        read(tmp_path / "a.png")
    with pytest.raises(ImageError, match="null byte"):
        read("a\0.png")


@pytest.mark.parametrize("read", [load_image, image_size, file_sha256])
def test_pipes_and_devices_do_not_block(tmp_path, read):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", "/dev/zero"):
        with pytest.raises(ImageError, match="not a regular file"):
            read(path)


@pytest.mark.parametrize("read", [load_image, image_size])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"hello, this is text\n" * 20, "not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "not an image of a known"),
        (png(0, 5), "a.png"),
        (png(5, 0), "a.png"),
    ],
)
def test_what_is_no_image(tmp_path, read, content, words):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=words):
        read(tmp_path / "a.png")


def test_an_unreadable_file(tmp_path):
    path = save(tmp_path / "a.png")
    tmp_path.chmod(0o755)
    path.chmod(0)
    # A process without privileges: root reads everything.
    code = """
import os, sys
from PIL import Image
from dvt.images import load_image, image_size, file_sha256
from dvt.errors import ImageError
Image.init()
if os.geteuid() == 0:
    os.seteuid(65534)
for read in (load_image, image_size, file_sha256):
    try:
        read(sys.argv[1])
    except ImageError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, path.name], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.count("cannot read image 'a.png': Permission denied") == 3, done.stderr


def bombs() -> dict[str, bytes]:
    width = height = 14_143  # 200.02 megapixels
    bmp = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)
    return {
        "200 MP": png(width, height, bytes(1000)),
        "2 billion": png(2**31 - 1, 2**31 - 1, bytes(1000)),
        "just above": png(MAX_PIXELS + 1, 1, bytes(1000)),
        "bmp": bmp,
        "ppm": b"P6 20000 20000 255\n",
    }


@pytest.mark.parametrize("name", bombs())
@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, None])  # many programs switch it off
def test_a_bomb_is_refused_from_its_header(tmp_path, name, pillow_limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    (tmp_path / "bomb.png").write_bytes(bombs()[name])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for read in (load_image, image_size):
        with pytest.raises(ImageError, match=f"{MAX_PIXELS}"), warnings.catch_warnings():
            warnings.simplefilter("error")
            read(tmp_path / "bomb.png")
    assert time.monotonic() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def test_an_image_under_the_limit_gives_no_warning(tmp_path):
    (tmp_path / "large.png").write_bytes(png(10_000, 10_000))  # Pillow warns from 89 megapixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(tmp_path / "large.png") == (10_000, 10_000)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own words about damaged tags
def test_random_damage_raises_nothing_else(tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for suffix in (".jpg", ".png", ".tif", ".webp", ".gif", ".bmp", ".jp2"):
        good = save(tmp_path / f"a{suffix}", NOISE[:24, :24], exif=exif(6)).read_bytes()
        for _ in range(40):
            bad = bytearray(good)
            for place in rng.integers(0, len(good), 1 + rng.integers(8)):
                bad[place] = rng.integers(256)
            (tmp_path / "b").write_bytes(bad[: rng.integers(1, len(bad) + 1)])
            try:
                image = load_image(tmp_path / "b")
            except ImageError as error:
                assert str(tmp_path / "b") in str(error)
            else:
                assert image.shape[1:] == image_size(tmp_path / "b")
                assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# -- URLs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path):
    """fsspec's file system in memory with pictures in it, and the bytes of one."""
    files = fsspec.filesystem("memory")
    Image.new("RGB", (30, 20), (9, 80, 200)).save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    for name in ("a.png", "deep/b.PNG", "deep/.hidden.png", ".cache/c.png", "notes.md"):
        files.pipe_file(f"/bucket/{name}", content)
    yield files, content
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("memory://bucket", ["a.png", "deep/b.PNG"]),
        ("memory://bucket/deep/", ["deep/b.PNG"]),
        ("memory://bucket/*.png", ["a.png"]),
        ("memory://bucket/**/*.[pP]*", ["a.png", "deep/b.PNG"]),
        ("memory://bucket/d*", ["deep/b.PNG"]),
        ("memory:///bucket/notes.md", ["notes.md"]),
    ],
)
def test_urls_stand_for_what_paths_would(bucket, spec, expected):
    assert find_sources([spec]) == [f"memory:///bucket/{name}" for name in expected]


def test_lists_hold_urls_and_lists_behind_urls_hold_names_beside_them(bucket, tmp_path):
    files, _ = bucket
    (tmp_path / "list.txt").write_text("image.png\nmemory:///bucket/a.png\n# memory://bucket/none.png\n")
    assert find_sources([tmp_path / "list.txt"]) == [tmp_path / "image.png", "memory:///bucket/a.png"]
    files.pipe_file("/bucket/deep/list.txt", b"b.PNG\nmemory:///bucket/a.png\n/image.png\n")
    files.pipe_file("/bucket/deep/image.png", b"")
    expected = ["memory:///bucket/a.png", "memory:///bucket/deep/b.PNG", "memory:///bucket/deep/image.png"]
    assert find_sources(["memory:///bucket/deep/list.txt"]) == expected
    with pytest.raises(ImageError, match="is a URL"):
        find_images([tmp_path / "list.txt"])


@pytest.mark.parametrize("name", ["s.tar", "s.tar#a.png", "clip.MP4#::5", "*.tar"])
def test_an_archive_or_a_video_behind_a_url_is_refused_with_the_way_out(bucket, tmp_path, name):
    (tmp_path / "list.txt").write_text(f"https://localhost/{name}\n")
    for given in (f"memory://bucket/{name}", f"http://localhost/{name}", tmp_path / "list.txt"):
        with pytest.raises(ImageError, match="download it first"):
            find_sources([given])


def test_an_image_behind_a_url_is_the_image(bucket, tmp_path):
    _, content = bucket
    for url in ("memory://bucket/a.png", f"file://{tmp_path}/image.png"):
        assert image_size(url) == (20, 30) and file_sha256(url) == hashlib.sha256(content).hexdigest()
        assert size_and_sha256(url) == (image_size(url), file_sha256(url))
        assert torch.equal(load_image(url), load_image(tmp_path / "image.png"))
        with pytest.raises(ImageError, match="bytes changed"):
            load_image(url, "0" * 64)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("memory://bucket/none.png", "none.png"),
        ("memory://bucket/deep", "deep"),
        ("nothing://bucket/a.png", "not known"),
        ("gs://bucket/a.png", "pip install"),
        ("http://127.0.0.1:9/a.png", "127.0.0.1"),
    ],
)
def test_a_url_that_cannot_be_read_is_an_image_error(bucket, url, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # whether it is installed or not
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(url)
    assert url in str(caught.value)
    if url.startswith(("nothing", "gs")) or "none" in url:
        with pytest.raises(ImageError):
            find_sources([url])


def test_too_large_an_object_is_not_fetched(bucket, monkeypatch):
    monkeypatch.setattr("dvt.images.urls.MAX_BYTES", 50)
    with pytest.raises(ImageError, match="the largest size that is downloaded"):
        load_image("memory://bucket/a.png")
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", lambda *args, **rest: {"size": None})
    with pytest.raises(ImageError, match="the largest size that is downloaded"):  # nor one that does not tell its size
        load_image("memory://bucket/a.png")


def test_a_folder_whose_name_looks_like_a_protocol_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "a").mkdir(parents=True)
    Image.new("RGB", (3, 2)).save("s3:/a/b.png")
    assert find_images(["s3:/a/b.png"]) == [Path("s3:/a/b.png")] and image_size("s3:/a/b.png") == (2, 3)


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".png", ".webp"])
def test_pages_and_frames_that_are_left_out_are_said_once(tmp_path, suffix, caplog):
    first, other = (Image.new("RGB", (20, 10), colour) for colour in ("red", "blue"))
    first.save(tmp_path / f"two{suffix}", save_all=True, append_images=[other])
    first.save(tmp_path / f"one{suffix}")
    for name in ("two", "one", "two"):
        assert load_image(tmp_path / f"{name}{suffix}")[0].mean() > 0.9  # red
    said = [record.message for record in caplog.records if "frames or pages" in record.message]
    assert len(said) == 1 and f"two{suffix}" in said[0]


@pytest.mark.parametrize(("bands", "planar"), [(6, "contig"), (13, "contig"), (13, "separate")])
def test_a_tiff_of_many_bands_is_refused(tmp_path, bands, planar):
    tifffile = pytest.importorskip("tifffile")
    values = np.zeros((bands, 8, 8) if planar == "separate" else (8, 8, bands), np.uint8)
    kind = "rgb" if bands < 7 else "minisblack"  # of more than six Pillow itself knows nothing
    tifffile.imwrite(tmp_path / "x.tif", values, photometric=kind, planarconfig=planar)
    for read in (load_image, image_size):
        with pytest.raises(ImageError, match=r"x\.tif.*6 bands" if bands == 6 else r"x\.tif"):
            read(tmp_path / "x.tif")


def test_a_tiff_whose_bands_are_pages_says_so(tmp_path, caplog):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((13, 8, 8), np.uint16), photometric="minisblack")
    assert load_image(tmp_path / "x.tif").shape == (3, 8, 8)
    assert "x.tif has several frames or pages" in caplog.text
