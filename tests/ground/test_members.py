"""Images inside of other files: members of .tar archives, as webdataset writes them, and frames of videos."""

import io
import tarfile
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from dvt.backbones import load_backbone
from dvt.errors import ImageError
from dvt.images import file_sha256, find_images, image_size, load_image, size_and_sha256
from dvt.images.members import member_title, split_member
from dvt.jobs.extract import ExtractConfig, extract_images
from dvt.store import FeatureStore


def picture(number, size=(48, 64)):
    """(H, W, 3) a ramp whose colour says its number."""
    ramp = np.linspace(0, 120, size[1])[None, :, None] + np.zeros((*size, 3))
    ramp[..., number % 3] += 10 * number
    return ramp.round().astype(np.uint8)


def png(number):
    content = io.BytesIO()
    Image.fromarray(picture(number)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def shard(tmp_path):
    """A webdataset shard: samples of an image, a class and a caption."""
    path = tmp_path / "shard-000.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(4):
            files = {"png": png(number), "cls": b"3", "json": b"{}"}
            for kind, content in files.items():
                about = tarfile.TarInfo(f"set/{number:03}.{kind}")
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))
        link = tarfile.TarInfo("set/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


def test_an_archive_stands_for_its_images(shard, tmp_path):
    found = find_images([shard])
    assert [str(path) for path in found] == [f"{shard}#set/00{i}.png" for i in range(4)]
    assert find_images([tmp_path / "*.tar"]) == found and find_images([f"{shard}#set/*1.png"]) == found[1:2]
    (tmp_path / "list.txt").write_text("shard-000.tar#set/002.png\n")
    assert find_images([tmp_path / "list.txt"]) == found[2:3]
    loose = tmp_path / "loose.png"
    loose.write_bytes(png(2))
    assert size_and_sha256(found[2]) == size_and_sha256(loose) == ((48, 64), file_sha256(loose))
    assert torch.equal(load_image(found[2]), load_image(loose))
    assert split_member(loose) is None and member_title(found[2]) == "002"


def test_a_name_with_a_number_sign_is_a_name_first(shard, tmp_path):
    path = tmp_path / "a.tar#b.png"
    path.write_bytes(png(1))
    assert find_images([path]) == [path] and image_size(path) == (48, 64)


def test_archives_that_cannot_be_used_say_why(shard, tmp_path):
    for choice in ("none.png", "*.jpg"):
        with pytest.raises(ImageError, match="holds 4 images, and none of that name"):
            find_images([f"{shard}#{choice}"])
    with pytest.raises(ImageError, match="no file of this name"):
        load_image(f"{shard}#none.png")
    with pytest.raises(ImageError, match="no file of this name"):  # links lead nowhere
        load_image(f"{shard}#set/link.png")
    other = tmp_path / "other.tar"
    other.write_bytes(b"no archive" * 99)
    with pytest.raises(ImageError, match=r"other.tar.*not an uncompressed tar"):
        find_images([other])
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(shard, "in.tar")
    with pytest.raises(ImageError, match="unpack a compressed one"):
        find_images([tmp_path / "packed.tar"])
    with tarfile.open(tmp_path / "none.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(ImageError, match="holds no images"):
        find_images([tmp_path / "none.tar"])


def test_of_an_archive_that_ends_early_the_rest_is_used(shard, tmp_path):
    content = shard.read_bytes()
    with tarfile.open(shard) as archive:
        last = archive.getmember("set/002.png")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(content[: last.offset_data + last.size // 2])
    found = find_images([cut])
    assert len(found) == 3 and torch.equal(load_image(found[1]), load_image(f"{shard}#set/001.png"))
    with pytest.raises(ImageError, match=r"cut.tar#set/002.png.*the archive ends within it"):
        load_image(found[2])


# -- videos


def write_video(path, count=30, rate=10, lossless=True, size=(48, 64)):
    """A video with a key frame every ten frames and frames that refer to later ones."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream("libx264rgb" if lossless else "libx264", rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        stream.options = {"crf": "0" if lossless else "20", "g": "10", "bf": "2"}
        stream.time_base = Fraction(1, rate)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number % 12, size), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def clip(tmp_path):
    return write_video(tmp_path / "clip.mp4")


def test_a_video_stands_for_its_frames(clip):
    found = find_images([clip])
    assert [str(path) for path in found] == [f"{clip}#{number:06}" for number in range(30)]
    for number in (7, 3, 29, 0, 12, 11, 25, 24):  # back and forth
        pixels = (load_image(found[number]) * 255).round().byte().movedim(0, -1).numpy()
        np.testing.assert_array_equal(pixels, picture(number % 12))
    assert image_size(found[4]) == (48, 64) and member_title(found[4]) == "clip-000004"
    assert file_sha256(found[2]) == file_sha256(found[14]) != file_sha256(found[3])  # of the pixels


@pytest.mark.parametrize(
    ("choice", "numbers"),
    [("5", [5]), ("::10", [0, 10, 20]), ("3:6", [3, 4, 5]), ("-2:", [28, 29]), ("2fps", [0, 5, 10, 15, 20, 25])],
)
def test_frames_are_chosen_by_number_slice_or_rate(clip, choice, numbers):
    found = find_images([f"{clip}#{choice}"])
    assert [int(str(path).rpartition("#")[2]) for path in found] == numbers


def test_choices_that_stand_for_nothing_are_refused(clip):
    for choice in ("30", "9:3", "fast", "0fps"):
        with pytest.raises(ImageError, match="none of the video's 30 frames; give a number"):
            find_images([f"{clip}#{choice}"])
    with pytest.raises(ImageError, match=r"ends after 30 frames$"):
        load_image(f"{clip}#000030")
    with pytest.raises(ImageError, match="named by its number"):
        load_image(f"{clip}#first")


@pytest.mark.parametrize("kind", [".mp4", ".mkv"])
def test_of_a_video_that_ends_early_the_frames_before_are_used(tmp_path, kind):
    whole = write_video(tmp_path / f"whole{kind}", count=60, lossless=False, size=(96, 128))
    cut = tmp_path / f"cut{kind}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    found = find_images([cut])
    assert 10 < len(found) < 60
    readable = []
    for path in found:
        try:
            readable.append(torch.equal(load_image(path), load_image(str(path).replace("cut", "whole"))))
        except ImageError as error:
            last = error
    assert len(readable) >= len(found) - 5 and all(readable)  # frames that refer to lost ones are lost, too
    with pytest.raises(ImageError, match=r"ends after \d+ frames, of \d+ that it announces; copy it again"):
        load_image(found[-1])
    assert "announces" in str(last)


def test_what_is_no_video_says_so(tmp_path):
    pytest.importorskip("av")
    for name, content in {
        "text.mp4": b"no video" * 99,
        "empty.mkv": b"",
        "list.mp4": b"#EXTM3U\n/etc/passwd\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=rf"{name}.*video"):
            find_images([tmp_path / name])


def test_without_pyav_the_message_says_what_to_install(clip, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    other = tmp_path / "other.mp4"
    other.write_bytes(clip.read_bytes())
    with pytest.raises(ImageError, match=r"denoising-vit\[video\]"):
        find_images([other])


def test_a_job_over_archives_and_videos_resumes(shard, clip, tmp_path):
    backbone = load_backbone("test_vit", pretrained=False, size=48)
    config, paths = ExtractConfig(batch=4, shard_images=4), find_images([shard, clip])
    done = extract_images(backbone, paths, tmp_path / "store", config)
    assert done.done == 34 and not done.failed
    store = FeatureStore(tmp_path / "store")
    assert set(store.images) == {str(path) for path in paths}
    for file in sorted((tmp_path / "store").glob("*.h5"))[:2]:
        file.unlink()
    again = extract_images(backbone, paths, tmp_path / "store", config)
    assert 0 < again.done < 34 and again.done + again.skipped == 34
    fresh = FeatureStore(tmp_path / "store")
    for path in store.images:
        assert torch.equal(store[store.images.index(path)].patches, fresh[fresh.images.index(path)].patches)
