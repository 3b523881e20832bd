"""`dvt show` and `dvt match` as a user runs them."""

import json

import numpy as np
import pytest
import torch

from dvt import grids
from dvt.analysis import gallery
from dvt.cli import main
from dvt.store import Job, Record, StoreWriter

WITH = ("--backbone", "vit_tiny_patch16_224", "--weights", "demo", "--size", "64")


def test_photographs_and_their_store_are_shown(photo, tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo.mul(255).byte().movedim(0, -1).numpy()).save("a.png")
    assert main(["show", "a.png", *WITH, "--views", "4", "--upsample", "2", "--out", "one", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["terms"] == ["raw", "semantic"] and (tmp_path / "one" / "0000-a.png").is_file()
    assert main(["extract", "a.png", *WITH, "--out", "store"]) == 0
    assert main(["show", "store", "--out", "two", "--foreground"]) == 0
    assert (tmp_path / "two" / "index.html").read_text().count("<img") == 2
    assert main(["show", "store", "--terms", "semantic", "--out", "three"]) == 2
    assert main(["show", "a.png", "--upsample", "0", "--out", "three"]) == 2
    (tmp_path / "a.png").unlink()
    assert main(["show", "store", "--upsample", "2", "--out", "three"]) == 2  # its photograph is gone
    assert not (tmp_path / "three").exists()


def test_a_photograph_matches_itself_place_by_place(photo, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo.mul(255).byte().movedim(0, -1).numpy()).save("a.png")
    assert main(["match", "a.png", "a.png", *WITH, "--views", "0", "--out", "all"]) == 0
    pairs = json.loads((tmp_path / "all" / "matches.json").read_text())["matches"]["raw"]
    assert len(pairs) == 16 and all(pair["first"] == pair["second"] for pair in pairs)
    arguments = [
        "match",
        "a.png",
        "a.png",
        *WITH,
        "--views",
        "0",
        "--points",
        "0.1",
        "0.1",
        "0.9",
        "0.4",
        "--out",
        "two",
    ]
    assert main(arguments) == 0
    assert len(json.loads((tmp_path / "two" / "matches.json").read_text())["matches"]["raw"]) == 2
    assert (tmp_path / "two" / "matches.png").is_file()
    outside = [{"0.9": "7"}.get(each, each) for each in arguments]
    assert main([*outside[:-1], "bad"]) == 2
    assert main(["match", "a.png", "none.png", *WITH, "--out", "bad"]) == 2


def test_a_store_is_searched_for_a_photograph(photo, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    pixels = photo.mul(255).byte().movedim(0, -1).numpy()
    for name, each in {"a": pixels, "b": pixels[::-1], "c": 255 - pixels}.items():
        Image.fromarray(each).save(f"{name}.png")
    assert main(["extract", "a.png", "b.png", "c.png", *WITH, "--out", "store"]) == 0
    arguments = ["search", "c.png", "store", *WITH, "--views", "0", "--box", "0", "0", "0.5", "0.5"]
    assert main([*arguments, "--out", "found"]) == 0
    best = json.loads((tmp_path / "found" / "search.json").read_text())["found"]["raw"][0]
    assert best["path"].endswith("c.png") and best["box"] == [0, 0, 0.5, 0.5]
    assert (tmp_path / "found" / "search.png").is_file()
    pytest.importorskip("faiss")
    assert main([*arguments, "--index", "index", "--out", "near"]) == 0
    near = json.loads((tmp_path / "near" / "search.json").read_text())["found"]["raw"]
    assert near[0] == best and (tmp_path / "index" / "raw.faiss").is_file()
    assert main([*arguments, "--layer", "5", "--out", "bad"]) == 2  # other features than the store's
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("product", ["removed", "ensembled"])
def test_a_photograph_is_cleaned_as_the_store_s_images_were(product, photo, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    pixels = photo.mul(255).byte().movedim(0, -1).numpy()
    for name, each in {"a": pixels, "b": 255 - pixels}.items():
        Image.fromarray(each).save(f"{name}.png")
    cleaned = ("--views", "6", "--product", product, "--out", "store")
    assert main(["denoise", "a.png", "b.png", *WITH, *cleaned]) == 0
    assert main(["search", "b.png", "store", *WITH, "--box", "0.2", "0.2", "0.7", "0.7", "--out", "found"]) == 0
    best = json.loads((tmp_path / "found" / "search.json").read_text())["found"]["semantic"][0]
    assert best["path"].endswith("b.png") and best["cosine"] > 0.99, best


def test_a_clip_is_shown_in_colours_that_last(photo, tmp_path, monkeypatch, capsys):
    """What stands still in a film keeps its colour, whatever moves beside it."""
    import numpy as np
    from PIL import Image

    av = pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    still = photo[:, :128, :192].mul(255).byte().movedim(0, -1).contiguous().numpy()
    with av.open("clip.mp4", "w") as container:
        stream = container.add_stream("libx264rgb", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.options = 128, 192, "rgb24", {"crf": "0"}
        for number in (0, 0, 1, 2):
            frame = still.copy()
            frame[:, :32] = 60 * number
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert main(["show", "clip.mp4#::1", *WITH, "--views", "0", "--out", "shown", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 4 and result["files"][0] == "shown/0000-clip-000000.png"
    with Image.open("shown/clip.webp") as film:
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB")).astype(int))
    assert frames[0].shape == (240, 720, 3) and len(frames) == film.n_frames >= 3
    assert main(["show", "clip.mp4#3", *WITH, "--views", "0", "--out", "one"]) == 0
    assert not (tmp_path / "one" / "clip.webp").exists()
    assert main(["show", "clip.mp4#9", *WITH, "--out", "none"]) == 2


def test_maps_of_overlapping_patches_lie_at_their_centres(photo, tmp_path, monkeypatch, capsys):
    """A store's maps are drawn and upsampled as the photograph's own are, though it does not hold the patch size."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo[:, :256].mul(255).byte().movedim(0, -1).numpy()).save("a.png")
    centres, upsample = [], gallery.upsample
    monkeypatch.setattr(
        gallery, "upsample", lambda *a, **options: (centres.append(options["centres"]), upsample(*a, **options))[1]
    )
    for stride in ("8", "16"):
        own = (*WITH, "--stride", stride)
        assert main(["extract", "a.png", *own, "--out", f"store{stride}"]) == 0
        for factor in ("1", "2"):
            assert main(["show", f"store{stride}", "--upsample", factor, "--out", "stored"]) == 0
            assert main(["show", "a.png", *own, "--views", "0", "--upsample", factor, "--out", "own"]) == 0
            drawn = [np.asarray(Image.open(tmp_path / name / "0000-a.png"), np.int16) for name in ("stored", "own")]
            assert np.abs(drawn[0] - drawn[1]).max() < 9  # a store holds half precision
    assert torch.equal(centres[0], grids.patch_centres((64, 128), (16, 16), (8, 8))) and torch.equal(*centres[:2])
    assert centres[2] is None


def test_a_patch_size_that_cannot_be_known_is_said(tmp_path, capsys, caplog):
    values = {"raw": np.zeros((3, 3, 4), np.float16)}
    with StoreWriter(tmp_path / "store", Job("my-own-model", "0" * 64, stride=8, size=32)) as writer:
        writer.write("one", [Record("x.jpg", "a" * 64, (32, 32), values)])
    assert main(["show", str(tmp_path / "store"), "--out", str(tmp_path / "out")]) == 0
    assert main(["view", str(tmp_path / "store"), "--out", str(tmp_path / "page.html")]) == 0
    assert caplog.text.count("'my-own-model' does not tell how far patches overlap: drawn as tiles") == 2
    assert main(["show", str(tmp_path / "store"), "--upsample", "2", "--out", str(tmp_path / "fine")]) == 2
    assert "overlap (stride 8 x 8)" in capsys.readouterr().err and not (tmp_path / "fine").exists()
